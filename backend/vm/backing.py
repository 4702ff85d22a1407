"""The memory behind a vfio-user DMA mapping: whose it is, and a mapping of it that is our own."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass

from backend.ioasid import PAGE_SIZE, IoasidError

MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MAP_NORESERVE = 0x4000
PROT_NONE = 0
LEAVES = (1 << 30, 1 << 21)
"""Bytes of the large leaves that page tables have: worth aligning memory to."""
MAP_FAILED = (1 << 64) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.munmap.restype = ctypes.c_int


@dataclass(frozen=True, slots=True)
class Identity:
    """Which bytes of which file a mapping shows, and whether it may write them. Equal ones show the same memory."""

    device: str
    """Major and minor number, as the kernel prints them."""
    inode: int
    offset: int
    """Bytes into the file."""
    size: int
    writable: bool


def identify(hva: int, size: int) -> Identity:
    """What is mapped at [hva, hva + size) of this process, from /proc/self/maps (proc(5)).

    EFAULT: not one mapping covers it; EINVAL: it is private, so that nobody else would see what is written to it.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            span, permissions, offset, device, inode = line.split(maxsplit=5)[:5]
            start, end = (int(each, 16) for each in span.split("-"))
            if not start <= hva < end:
                continue
            if hva + size > end:
                break
            if permissions[3] != "s":
                raise IoasidError(
                    errno.EINVAL,
                    f"memory at HVA {hva:#x} is a private mapping: guest RAM needs a memory backend with share=on",
                )
            return Identity(device, int(inode), int(offset, 16) + hva - start, size, permissions[1] == "w")
    raise IoasidError(errno.EFAULT, f"no mapping of this process covers HVA [{hva:#x}, {hva + size:#x})")


def private_to(pid: int, hva: int, size: int) -> bool:
    """Whether process `pid` maps the file behind our [hva, hva + size) for itself alone, as QEMU does without share=on.

    What it writes there never reaches the file, so the file that it gave us shows nothing of its memory. False also
    where its mappings cannot be read.
    """
    with suppress(OSError, IoasidError):
        identity = identify(hva, size)
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                _, permissions, _, device, inode = line.split(maxsplit=5)[:5]
                if (device, int(inode)) == (identity.device, identity.inode) and permissions.startswith("rw"):
                    return permissions[3] == "p"
    return False


@dataclass(slots=True, eq=False)
class Duplicate:
    """Our own mapping of some memory, and how many use it."""

    identity: Identity
    hva: int
    users: int = 0


class Duplicates:
    """Mappings of our own, one for each identity however many use it.

    They outlive the mapping they were made from, and hold the file, so that its inode names nothing else meanwhile.
    """

    def __init__(self) -> None:
        self._by_identity: dict[Identity, Duplicate] = {}

    def __len__(self) -> int:
        return len(self._by_identity)

    def take(self, hva: int, size: int, gpa: int) -> Duplicate:
        """A mapping of what is mapped at [hva, hva + size), used once more. Bytes, whole pages.

        A new one is placed so that stage 2 can map it at `gpa` with large leaves.
        Errors: those of `identify`; EFAULT where the kernel does not duplicate it.
        """
        identity = identify(hva, size)
        duplicate = self._by_identity.get(identity)
        if duplicate is None:
            # An old size of 0 makes mremap add a mapping of the same shared pages instead of moving one (mremap(2)).
            copy = _libc.mremap(hva, 0, size, MREMAP_MAYMOVE, None)
            if copy == MAP_FAILED:
                why = os.strerror(ctypes.get_errno())
                raise IoasidError(errno.EFAULT, f"cannot duplicate the {size:#x} bytes mapped at HVA {hva:#x}: {why}")
            duplicate = self._by_identity[identity] = Duplicate(identity, _align(copy, size, gpa))
        duplicate.users += 1
        return duplicate

    def release(self, duplicate: Duplicate) -> None:
        """One user fewer; unmapped with the last. No IOASID may map it then."""
        duplicate.users -= 1
        if duplicate.users == 0:
            del self._by_identity[duplicate.identity]
            _libc.munmap(duplicate.hva, duplicate.identity.size)


def _align(hva: int, size: int, gpa: int) -> int:
    """Move a mapping of ours to an address congruent to gpa modulo the largest leaf that fits, if there is room."""
    leaf = next((each for each in LEAVES if each <= size), PAGE_SIZE)
    if (hva - gpa) % leaf == 0:
        return hva
    room = _libc.mmap(None, size + leaf, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if room == MAP_FAILED:
        return hva
    place: int = room + (gpa - room) % leaf
    moved = _libc.mremap(hva, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, place)
    if place > room:
        _libc.munmap(room, place - room)
    _libc.munmap(place + size, room + leaf - place)
    # Where it did not move, the middle of the room stays: it may be another thread's by now, so not ours to unmap.
    return hva if moved == MAP_FAILED else place


def whole_pages(start: int, size: int) -> bool:
    """Whether [start, start + size) is some whole pages below 2^64."""
    return start >= 0 and size > 0 and start % PAGE_SIZE == 0 and size % PAGE_SIZE == 0 and start + size <= 1 << 64
