"""QEMU's line: what must stand in it for a guest and its devices to share memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from backend.vm import machine
from backend.vm.qemu_command import QemuCommand


def option(argv: list[str], name: str) -> str:
    assert argv.count(name) == 1
    return argv[argv.index(name) + 1]


@pytest.mark.parametrize(("cpus", "most"), [(1, 2), (2, 2), (4, 4)])
def test_there_can_always_be_two_cpus(cpus: int, most: int) -> None:
    """Else TCG has no reason to make atomic instructions atomic for anybody but the one CPU."""
    chosen = dataclasses.replace(machine.load("q35-amd"), cpus=cpus)
    sockets = {function.name: Path("/run") / function.name for function in chosen.functions}
    command = QemuCommand(["qemu"], chosen, "tcg", sockets, Path("/kernel"), Path("/initrd"))
    assert option(command.argv(), "-smp") == f"cpus={cpus},maxcpus={most}"
    assert option(command.argv(), "-object").endswith(",share=on")
