"""A cpio archive as the kernel unpacks it, the "newc" format.

Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import stat
from pathlib import PurePosixPath

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
MAX_FILE = 0xFFFFFFFF  # sizes are eight hexadecimal digits


class Archive:
    """Collects entries by path; `data` is the archive, the same bytes for the same entries. Parents come along."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes, int]] = {}  # path -> mode, data, device number

    def folder(self, path: str, mode: int = 0o755) -> None:
        self._add(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file; ValueError beyond 4 GiB."""
        if len(data) > MAX_FILE:
            raise ValueError(f"{path} has {len(data)} bytes, a newc archive holds files of up to {MAX_FILE}")
        self._add(path, stat.S_IFREG | mode, data)

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(path, stat.S_IFCHR | mode, b"", os.makedev(major, minor))

    @property
    def data(self) -> bytes:
        # The kernel makes entries in their order: sorted by parts, a folder stands before what it holds.
        ordered = sorted(self._entries.items(), key=lambda entry: PurePosixPath(entry[0]).parts)
        records = [_record(inode, path, *entry) for inode, (path, entry) in enumerate(ordered, start=1)]
        return b"".join([*records, _record(0, TRAILER, 0, b"", 0)])

    def _add(self, path: str, mode: int, data: bytes, device: int = 0) -> None:
        path = path.strip("/")
        parts = PurePosixPath(path).parts
        if not parts or ".." in parts or "\0" in path:
            raise ValueError(f"{path!r} is no path within an archive")
        name = "/".join(parts)
        for depth in range(1, len(parts)):
            self._entries.setdefault("/".join(parts[:depth]), (stat.S_IFDIR | 0o755, b"", 0))
        present = self._entries.get(name)
        if present is not None and present != (mode, data, device) and not stat.S_ISDIR(mode):
            raise ValueError(f"{name} is in the archive already, with other contents")
        self._entries[name] = (mode, data, device)


def _record(inode: int, path: str, mode: int, data: bytes, device: int) -> bytes:
    """Header, name and data; name and data each end at a multiple of four bytes. Owner and time are 0."""
    name = os.fsencode(path) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, os.major(device), os.minor(device), len(name), 0)
    head = MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
