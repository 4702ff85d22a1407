"""Guest memory for tests: a memfd, mapped as libvfio-user maps it, and AMD v1 tables laid in it by hand.

Nothing here imports what walks those tables.
"""

import ctypes
import mmap
import os
import struct

PAGE = 4096


class Ram:
    """A memfd with one shared mapping of it. `hva`: of its first byte."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("guest-ram")
        os.ftruncate(self.fd, size)
        self.mapping = Mapping(self.fd, size)
        self.hva = self.mapping.hva

    def poke(self, offset: int, data: bytes) -> None:
        os.pwrite(self.fd, data, offset)

    def peek(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def map_again(self, offset: int, size: int, *, writable: bool = True) -> "Mapping":
        """As another function's libvfio-user does: its own fd, its own mapping."""
        fd = os.dup(self.fd)
        try:
            return Mapping(fd, size, offset, writable=writable)
        finally:
            os.close(fd)

    def close(self) -> None:
        self.mapping.close()
        os.close(self.fd)


class Mapping:
    """A shared mapping of a part of a file."""

    def __init__(self, fd: int, size: int, offset: int = 0, *, writable: bool = True) -> None:
        self.size = size
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
        libc.mmap.restype = ctypes.c_void_p
        libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.hva: int = libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, offset)
        assert self.hva not in {None, (1 << 64) - 1}
        self._libc = libc

    def close(self) -> None:
        if self.hva:
            self._libc.munmap(self.hva, self.size)
            self.hva = 0


def table_entry(gpa: int, next_level: int) -> int:
    """AMD v1 entry that may be read and written (48882, 2.2.3): PR bit 0, NextLevel 11:9, IR 61, IW 62."""
    return 1 | next_level << 9 | gpa | 3 << 61


class AmdTables:
    """Four levels of AMD v1 tables in guest memory, from `base` onward."""

    def __init__(self, ram: Ram, base: int) -> None:
        self._ram = ram
        self.root = base
        self._next = base + PAGE
        ram.poke(base, bytes(PAGE))

    def map(self, iova: int, gpa: int) -> None:
        table = self.root
        for level in (4, 3, 2):
            slot = table + (iova >> (12 + 9 * (level - 1)) & 511) * 8
            (entry,) = struct.unpack("<Q", self._ram.peek(slot, 8))
            if not entry:
                entry = table_entry(self._next, level - 1)
                self._ram.poke(self._next, bytes(PAGE))
                self._ram.poke(slot, struct.pack("<Q", entry))
                self._next += PAGE
            table = entry & 0x000FFFFFFFFFF000
        self._ram.poke(table + (iova >> 12 & 511) * 8, struct.pack("<Q", table_entry(gpa, 0)))
