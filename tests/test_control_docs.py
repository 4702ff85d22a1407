"""docs/control.md: its example runs as it stands there. docs/commands.md: it says what the table says."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

from control_serving import serving

from backend.control.binding import bind_all
from backend.control.commands_page import page

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_worked_example(tmp_path: Path) -> None:
    text = (DOCS / "control.md").read_text()
    found = re.search(r"```sh\n(.*?)```\n\nprints\n\n```\n(.*?)```", text, re.DOTALL)
    assert found is not None
    script, printed = found.groups()
    # the program as a user has it: by its name
    program = tmp_path / "vioasid"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m backend.cli.main "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with serving(tmp_path / "s", endpoints=2) as served:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SOCKET": str(served.path)}
        done = subprocess.run(
            ["sh", "-e", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert (done.stdout, done.stderr, done.returncode) == (printed, "", 0)


def test_the_page_of_commands_is_current() -> None:
    written = (DOCS / "commands.md").read_text()
    assert written == page(), "python -m backend.control.commands_page > docs/commands.md"
    assert all(f"`{name}`" in written for name in bind_all())
