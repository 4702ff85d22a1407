"""Stock guests on the machines beside the default one: several IOMMUs, root ports, shared virtual addressing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

COMMAND = [sys.executable, "-m", "backend.cli.main"]
MACHINES = ("q35-amd-two", "q35-amd-sva")
Report = Mapping[str, Any]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """What each machine's boot came to; both at once, for the tests' two processors."""
    running = {}
    for machine in MACHINES:
        root = tmp_path_factory.mktemp("machine")
        (root / "run").mkdir(mode=0o700)
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(root / "run"), "XDG_STATE_HOME": str(root / "state")}
        running[machine] = subprocess.Popen(
            [*COMMAND, "boot", "--machine", machine, "--json"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    found = {}
    try:
        for machine, process in running.items():
            out, said = process.communicate(timeout=380)
            assert process.returncode in {0, 1}, f"{machine}: {said}"
            found[machine] = json.loads(out)
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    return found


@pytest.mark.parametrize("machine", MACHINES)
def test_every_check_passes(reports: dict[str, Report], machine: str) -> None:
    report = reports[machine]
    assert [check for check in report["checks"] if check["status"] != "pass"] == []
    assert report["ok"] is True


def details(report: Report) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in report["checks"]}


def test_functions_behind_root_ports_stand_behind_their_iommus(reports: dict[str, Report]) -> None:
    """Three controllers: one behind the first IOMMU, two behind the second. The guest checks one, then the others."""
    report = reports["q35-amd-two"]
    found = details(report)
    prefix = "others/group-"
    behind = {name.removeprefix(prefix): text.split()[-1] for name, text in found.items() if name.startswith(prefix)}
    expected = {"0000:01:00.0": "ivhd0", "0000:02:00.0": "ivhd1", "0000:00:05.0": "ivhd1"}
    del expected[report["guest"]["nvme"]]
    assert behind == expected
    assert found["iommu/present"] == "ivhd0 ivhd1"
    for name in ("iommu0", "iommu1"):
        assert "COMPLETION_WAIT" in found[f"dma/{name}-commands"]
    assert report["dma"]["iommu_enables"] == 2
