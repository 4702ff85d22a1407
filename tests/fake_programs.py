"""Programs that stand in for the host's own: what a mirror, an old QEMU or a broken KVM would do."""

import os
from pathlib import Path

import pytest


class FakePrograms:
    """A folder at the head of PATH; each program is a shell script, and notes its arguments in NAME.args."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(self, name: str, script: str) -> Path:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {self.folder}/{name}.args\n{script}\n')
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> str:
        path = self.folder / f"{name}.args"
        return path.read_text() if path.exists() else ""
