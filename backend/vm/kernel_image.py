"""A Linux kernel image for x86: whether a file is one, and which version it is.

Offsets are those of the kernel's Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from backend.vm.errors import CannotRun

SECTOR = 512
SETUP_SECTS = 0x1F1
SYSSIZE = 0x1F4
BOOT_FLAG = 0x1FE
HEADER = 0x202
PROTOCOL = 0x206
KERNEL_VERSION = 0x20E
XLOADFLAGS = 0x236
HEADER_END = 0x260
BOOT_FLAG_VALUE = 0xAA55
HEADER_MAGIC = b"HdrS"
PROTOCOL_WITH_XLOADFLAGS = 0x20C
XLF_KERNEL_64 = 1
SETUP_LIMIT = 0x10200
"""The version string lies in the setup code, at a 16-bit offset from its second sector."""


@dataclass(frozen=True, slots=True)
class Kernel:
    vmlinuz: Path
    modules_dir: Path | None
    """The folder with this version's modules ("kernel" and "modules.order" lie in it), None if there is none."""
    version: str
    """As `uname -r` says."""
    source: str
    """"user" or "cache"."""


def read_version(path: Path) -> str:
    """The version in a bzImage's header. Raises CannotRun if the file is no whole 64-bit x86 kernel."""
    try:
        with open(path, "rb") as file:
            head = file.read(SETUP_LIMIT)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CannotRun(f"The kernel {path} cannot be read: {error.strerror}. Give a readable bzImage.") from error
    if len(head) < HEADER_END or _word(head, BOOT_FLAG) != BOOT_FLAG_VALUE or head[HEADER : HEADER + 4] != HEADER_MAGIC:
        raise CannotRun(f"{path} is no x86 kernel (no boot header). Give a bzImage, such as /boot/vmlinuz-VERSION.")
    if _word(head, PROTOCOL) < PROTOCOL_WITH_XLOADFLAGS or not _word(head, XLOADFLAGS) & XLF_KERNEL_64:
        raise CannotRun(f"{path} is no 64-bit kernel. Give one built for x86-64.")
    setup_bytes = ((head[SETUP_SECTS] or 4) + 1) * SECTOR  # 0 means 4, for old loaders
    whole = setup_bytes + struct.unpack_from("<I", head, SYSSIZE)[0] * 16
    if size + 16 <= whole:  # syssize counts in units of 16 bytes
        raise CannotRun(f"The kernel {path} is cut short: {size} of {whole} bytes are there. Copy it again.")
    start = _word(head, KERNEL_VERSION) + SECTOR
    text = head[start : min(setup_bytes, start + 256)].partition(b"\0")[0].decode("ascii", "replace")
    version = text.split(" ")[0]
    if start == SECTOR or not version:
        raise CannotRun(f"The kernel {path} does not say its version. Give an image of Linux.")
    return version


def user_kernel(path: Path) -> Kernel:
    """The kernel in a user's file, with the modules that this host has for it. Raises CannotRun."""
    version = read_version(path)
    # a file may claim any version: one with a slash would name another folder
    installed = Path("/lib/modules", version.replace("/", "_"))
    return Kernel(path.absolute(), installed if (installed / "kernel").is_dir() else None, version, "user")


def _word(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<H", data, offset)[0])
