"""What programs need, against what readelf says of the same files."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.vm import elf

PROGRAM = Path(shutil.which("ls") or sys.executable).resolve()


def readelf(path: Path) -> tuple[str | None, set[str]]:
    dynamic = subprocess.run(["readelf", "-W", "-d", "-l", path], capture_output=True, text=True, check=True).stdout
    loader = re.search(r"program interpreter: ([^\]]+)\]", dynamic)
    return loader[1] if loader else None, set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="install binutils for readelf")
@pytest.mark.parametrize("path", [PROGRAM, Path(sys.executable).resolve()], ids=lambda path: path.name)
def test_as_readelf_says(path: Path) -> None:
    loader, libraries = readelf(path)
    found = elf.needs(path.read_bytes())
    assert (found.loader, set(found.libraries)) == (loader, libraries)
    assert loader is not None


def test_all_files_of_a_program() -> None:
    files = elf.program_files(Path("/"), str(PROGRAM))
    listed = subprocess.run(["ldd", PROGRAM], capture_output=True, text=True, check=True).stdout
    wanted = {Path(path).resolve() for path in re.findall(r"(/\S+) \(0x", listed)} | {PROGRAM}
    assert {path.resolve() for path in files.values()} == wanted
    assert files[str(PROGRAM).lstrip("/")].resolve() == PROGRAM


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    shutil.copy(PROGRAM, tmp_path / "program")
    with pytest.raises(FileNotFoundError, match=r"is not below"):
        elf.program_files(tmp_path, "program")


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_are_values_errors_or_answers(data: st.DataObject) -> None:
    whole = PROGRAM.read_bytes()[:8192]
    cut = data.draw(st.integers(0, len(whole)))
    damaged = bytearray(whole[:cut])
    for _ in range(3):
        if damaged:
            damaged[data.draw(st.integers(0, min(len(damaged), 1024) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        elf.needs(bytes(damaged))


def test_no_elf_file() -> None:
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        elf.needs(b"#!/bin/sh\n")
