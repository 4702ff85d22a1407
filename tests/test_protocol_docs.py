"""docs/rpc.md: its client runs as it stands, and its figures are those of the code."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rpc_serving import RpcServing

from protocol import Limits

PAGE = (Path(__file__).parents[1] / "docs/rpc.md").read_text(encoding="utf-8")


def test_the_client_of_the_page_runs(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code += 'print(call("add", a=1, b=2))\n'
    with RpcServing(tmp_path / "rpc.sock") as serving:
        argv = [sys.executable, "-c", code, str(serving.path)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert (done.stdout, done.stderr) == ("1\n3\n", "")


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+)", PAGE, re.MULTILINE)
    assert {name: float(figure) for name, figure in rows} == asdict(Limits())
