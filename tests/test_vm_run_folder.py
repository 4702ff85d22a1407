"""The folders of a run: private, one owner, gone afterwards."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from backend.vm import run_folder
from backend.vm.errors import CannotRun
from backend.vm.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_private_and_gone_afterwards(tmp_path: Path) -> None:
    with RunFolder("a") as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert folder.path.parent == tmp_path / "run" / "vioasid"
        folder.socket("s").touch()
        (folder.logs / "log").write_text("x")
    assert not folder.path.exists()
    assert not folder.logs.exists()


def test_logs_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOGS_KEPT", 3)
    kept = []
    for number in range(5):
        with RunFolder(f"run{number}") as folder:
            folder.keep_logs = True
            (folder.logs / "log").write_text("x")
            os.utime(folder.logs, (number, number))
            kept.append(folder.logs)
    assert [path.exists() for path in kept] == [False, False, True, True, True]


def test_a_second_owner_is_refused() -> None:
    with RunFolder("a"), pytest.raises(CannotRun, match="'a' is active already"):
        RunFolder("a")
    with RunFolder("a"):
        pass


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    script = (
        "from backend.vm.run_folder import RunFolder; import os; f = RunFolder('a'); f.socket('s').touch(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (tmp_path / "run" / "vioasid" / "a" / "s.sock").exists()
    with RunFolder("a") as folder:
        assert list(folder.path.iterdir()) == []


def test_a_socket_path_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with RunFolder("a") as folder, pytest.raises(CannotRun, match="a Unix socket takes 107; set XDG_RUNTIME_DIR"):
        folder.socket("iommu")


def test_a_folder_that_others_can_enter(tmp_path: Path) -> None:
    shared = tmp_path / "run" / "vioasid"
    shared.mkdir()
    shared.chmod(0o755)
    with pytest.raises(CannotRun, match="not a folder of this user alone"):
        RunFolder("a")


def test_no_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    with pytest.raises(CannotRun, match="set XDG_RUNTIME_DIR"):
        RunFolder("a")
