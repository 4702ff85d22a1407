"""bzImage headers laid by hand after the kernel's Documentation/arch/x86/boot.rst."""

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.vm.errors import CannotRun
from backend.vm.kernel_image import read_version, user_kernel

SETUP_SECTORS = 4
PAYLOAD = 16 * 64


def image(version: bytes = b"6.12.1-test (a@b) #1 SMP\0", *, xloadflags: int = 1, protocol: int = 0x20F) -> bytes:
    data = bytearray((SETUP_SECTORS + 1) * 512 + PAYLOAD)
    data[0x1F1] = SETUP_SECTORS
    data[0x1F4:0x1F8] = (PAYLOAD // 16).to_bytes(4, "little")
    data[0x1FE:0x200] = b"\x55\xaa"
    data[0x202:0x206] = b"HdrS"
    data[0x206:0x208] = struct.pack("<H", protocol)
    data[0x20E:0x210] = struct.pack("<H", 0x600 - 0x200)  # "pointer to kernel version string, less 0x200"
    data[0x236:0x238] = struct.pack("<H", xloadflags)
    data[0x600 : 0x600 + len(version)] = version
    return bytes(data)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_version(tmp_path: Path) -> None:
    assert read_version(write(tmp_path / "k", image())) == "6.12.1-test"


def test_a_zero_count_of_setup_sectors_means_four(tmp_path: Path) -> None:
    data = bytearray(image())
    data[0x1F1] = 0
    assert read_version(write(tmp_path / "k", bytes(data))) == "6.12.1-test"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no x86 kernel"),
        (b"#!/bin/sh\n" * 200, "no x86 kernel"),
        (b"\x7fELF" + bytes(4096), "no x86 kernel"),
        (image()[:0x250], "no x86 kernel"),
        (image()[:-17], "cut short"),
        (image(xloadflags=0), "no 64-bit kernel"),
        (image(protocol=0x20B), "no 64-bit kernel"),  # before xloadflags
        (image(b"\0"), "does not say its version"),
    ],
)
def test_files_that_are_no_kernel(tmp_path: Path, data: bytes, problem: str) -> None:
    path = write(tmp_path / "k", data)
    with pytest.raises(CannotRun, match=f"{path}.* {problem}"):
        read_version(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="No such file"):
        read_version(tmp_path / "absent")
    with pytest.raises(CannotRun, match="Is a directory"):
        read_version(tmp_path)


def test_a_user_kernel_without_modules_here(tmp_path: Path) -> None:
    kernel = user_kernel(write(tmp_path / "k", image(b"0.0.1-none\0")))
    assert (kernel.version, kernel.modules_dir, kernel.source) == ("0.0.1-none", None, "user")


@pytest.mark.parametrize("version", [b"../../../../\0", b"..\0", b"a/b\0"])
def test_a_version_cannot_name_another_folder(tmp_path: Path, version: bytes) -> None:
    assert user_kernel(write(tmp_path / "k", image(version))).modules_dir is None


@given(changes=st.dictionaries(st.integers(0, 0x5FF), st.integers(0, 255), max_size=12), keep=st.integers(0, 4096))
def test_hostile_headers_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[int, int], keep: int
) -> None:
    data = bytearray(image())
    for offset, value in changes.items():
        data[offset] = value
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(data[:keep])
    with contextlib.suppress(CannotRun):
        assert read_version(path)
