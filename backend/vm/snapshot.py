"""Reading guest memory from outside the DMA path: to prove that something did not change it.

A client can truncate its memory under us, and a plain touch would then end the process by SIGBUS. process_vm_readv
on ourselves answers with EFAULT instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.ioasid import PAGE_SIZE

CHUNK = 1 << 16
"""Bytes of a chunk: what a Snapshot can tell apart. Small enough to name what changed, large enough to hash at full
speed."""


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_IoVector),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVector),
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.mincore.restype = ctypes.c_int


@dataclass(frozen=True, slots=True)
class Extent:
    """[gpa, gpa + size) of the guest stands at hva of this process. Bytes, whole pages."""

    gpa: int
    size: int
    hva: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What memory held: a SHA-256 of each chunk that was not all zero, by its GPA."""

    chunks: Mapping[int, bytes]

    @property
    def digest(self) -> str:
        """One SHA-256 for all of it, in hexadecimal."""
        whole = hashlib.sha256()
        for gpa, chunk in sorted(self.chunks.items()):
            whole.update(gpa.to_bytes(8, "little") + chunk)
        return whole.hexdigest()

    def changed(self, later: Snapshot) -> list[int]:
        """GPAs of the chunks that hold something else in `later`."""
        return sorted(
            gpa for gpa in self.chunks.keys() | later.chunks.keys() if self.chunks.get(gpa) != later.chunks.get(gpa)
        )


def read_memory(hva: int, buffer: ctypes.Array[ctypes.c_char], offset: int, size: int) -> int:
    """Copy `size` bytes of our own memory to `buffer[offset:]`; answers with how many could be read before memory
    was gone."""
    local = _IoVector(ctypes.addressof(buffer) + offset, size)
    remote = _IoVector(hva, size)
    return max(0, int(_libc.process_vm_readv(os.getpid(), local, 1, remote, 1, 0)))


def take_snapshot(extents: Iterable[Extent], exclude: Sequence[tuple[int, int]] = ()) -> Snapshot:
    """Hash all of the extents but the excluded (GPA, bytes), which count as zero."""
    skip_holes = not _swapping()
    data = bytearray(CHUNK)
    buffer = (ctypes.c_char * CHUNK).from_buffer(data)
    zero = bytes(CHUNK)
    chunks: dict[int, bytes] = {}
    for extent in extents:
        pages = _resident(extent) if skip_holes else b"\1" * (extent.size // PAGE_SIZE)
        for gpa, size in _chunks(extent):
            first = (gpa - extent.gpa) // PAGE_SIZE
            held = pages[first : first + size // PAGE_SIZE]
            if 1 not in held:
                continue
            data[:] = zero
            gone = False
            for run in re.finditer(b"\1+", held):
                start, length = run.start() * PAGE_SIZE, len(run.group()) * PAGE_SIZE
                gone |= read_memory(extent.hva + gpa - extent.gpa + start, buffer, start, length) != length
            for start, length in _clip(exclude, gpa, size):
                data[start : start + length] = bytes(length)
            if gone or data != zero:
                chunks[gpa] = hashlib.sha256(data).digest() + (b"gone" if gone else b"")
    return Snapshot(chunks)


def _chunks(extent: Extent) -> Iterator[tuple[int, int]]:
    """(GPA, bytes) of its parts; boundaries are multiples of CHUNK wherever the extent begins."""
    gpa, end = extent.gpa, extent.gpa + extent.size
    while gpa < end:
        size = min(end, gpa // CHUNK * CHUNK + CHUNK) - gpa
        yield gpa, size
        gpa += size


def _clip(ranges: Sequence[tuple[int, int]], gpa: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of the ranges that lie in [gpa, gpa + size), as (offset, bytes)."""
    for start, length in ranges:
        low, high = max(start, gpa), min(start + length, gpa + size)
        if low < high:
            yield low - gpa, high - low


def _resident(extent: Extent) -> bytes:
    """One byte a page: 1 where it exists, 0 where the file has a hole and so reads as zero. Reading a hole would
    fill it."""
    pages = ctypes.create_string_buffer(extent.size // PAGE_SIZE)
    if _libc.mincore(extent.hva, extent.size, pages):
        return b"\1" * (extent.size // PAGE_SIZE)
    return pages.raw


def _swapping() -> bool:
    """Whether the host may have swapped guest memory out, where mincore does not see it (the first line is a
    heading)."""
    try:
        return len(Path("/proc/swaps").read_text("ascii").splitlines()) > 1
    except OSError:
        return True
