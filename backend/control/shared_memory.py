"""Memory that a client shares as a memfd: mapped here, it stands for a range of the client's own addresses."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from dataclasses import dataclass

from backend.ioasid import PAGE_SIZE, IoasidError
from backend.ioasid.limits import USER_END
from backend.ioasid.share import UNBOUNDED, Allowance

MAX_SHARES = 64
"""Ranges that one client may share at a time: a VM's memory has fewer than ten parts, and a thousand clients must fit
the 65,530 mappings that Linux gives a process (vm.max_map_count)."""

MAX_PLACES = 1024
"""Ranges that one client ever shared and that some IOASID may still map: their addresses stay taken until it goes."""

MAX_SIZE = 1 << 42
"""Bytes of them all: 4 TiB of addresses, so that no client takes all of the server's 128."""

LEAVES = (1 << 30, 1 << 21)
"""Bytes of the large leaves that page tables have: worth aligning memory to."""

MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
PROT_NONE = 0
MAP_FAILED = (1 << 64) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class Share:
    """[vaddr, vaddr + size) of the client is [hva, hva + size) here. Bytes, whole pages."""

    vaddr: int
    size: int
    hva: int
    writable: bool

    @property
    def end(self) -> int:
        """First address of the client past it."""
        return self.vaddr + self.size


class SharedMemory:
    """What one client has shared. All of it goes at `close`, which must come after its context's end.

    size, ranges: what it may have beside other clients, bytes and mappings of this process.
    """

    def __init__(self, size: Allowance = UNBOUNDED, ranges: Allowance = UNBOUNDED) -> None:
        self._size = size
        self._ranges = ranges
        self._shares: list[Share] = []
        self._places: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._shares)

    def add(self, fd: int, vaddr: int, size: int, offset: int = 0) -> Share:
        """Map [offset, offset + size) of a memfd for the client's [vaddr, vaddr + size); the fd stays the caller's.

        Raises IoasidError: EINVAL no whole pages, no memfd, or beyond its end; EEXIST a part is shared already; ENOSPC
        too many; ENOMEM the kernel does not map it.
        """
        self._check(fd, vaddr, size, offset)
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_WRITE | getattr(fcntl, "F_SEAL_FUTURE_WRITE", 0x10)):
            writable = False
        self._take(size)
        try:
            hva = self._map(fd, vaddr, size, offset, writable=writable)
        except BaseException:
            self._give(size)
            raise
        share = Share(vaddr, size, hva, writable)
        self._shares.append(share)
        self._places.append((hva, size))
        return share

    def remove(self, vaddr: int, size: int) -> None:
        """Give a share back. What an IOASID still maps of it faults (MEMORY_GONE). ENOENT: no such share."""
        share = next((each for each in self._shares if (each.vaddr, each.size) == (vaddr, size)), None)
        if share is None:
            raise IoasidError(errno.ENOENT, f"unshare: [{vaddr:#x}, {vaddr + size:#x}) is not what was shared")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        # The addresses stay ours: tables may hold them, and nothing else may come to lie there.
        _mmap(share.hva, share.size, PROT_NONE, flags, -1, 0)
        self._shares.remove(share)

    def find(self, vaddr: int, size: int) -> Share | None:
        """The share that holds all of [vaddr, vaddr + size)."""
        return next((each for each in self._shares if each.vaddr <= vaddr and vaddr + size <= each.end), None)

    def touches(self, vaddr: int, size: int) -> bool:
        """Whether any of [vaddr, vaddr + size) is shared."""
        return any(each.vaddr < vaddr + size and vaddr < each.end for each in self._shares)

    def vaddr_of(self, hva: int) -> int | None:
        """The client's address for one of ours."""
        for share in self._shares:
            if share.hva <= hva < share.hva + share.size:
                return share.vaddr + hva - share.hva
        return None

    def close(self) -> None:
        """Unmap everything."""
        for hva, size in self._places:
            _munmap(hva, size)
            self._give(size)
        self._shares.clear()
        self._places.clear()

    def _check(self, fd: int, vaddr: int, size: int, offset: int) -> None:
        where = f"share: [{vaddr:#x}, {vaddr + size:#x})"
        if size <= 0 or vaddr < 0 or offset < 0 or (vaddr | size | offset) % PAGE_SIZE:
            raise IoasidError(errno.EINVAL, f"{where} at offset {offset:#x}: all three are whole pages of {PAGE_SIZE}")
        if not 0 < vaddr <= USER_END - size:
            raise IoasidError(errno.EINVAL, f"{where} are no addresses of a process: choose some in [0x1000, 2^47)")
        try:
            # Only memory has seals. Any other file could be one whose pages never come (FUSE), and stop the server.
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise IoasidError(errno.EINVAL, f"{where}: the file sent is no memfd: see memfd_create(2)") from error
        length = os.fstat(fd).st_size
        if offset + size > length:
            raise IoasidError(errno.EINVAL, f"{where} at offset {offset:#x} ends past the memfd's {length:#x} bytes")
        other = next((each for each in self._shares if each.vaddr < vaddr + size and vaddr < each.end), None)
        if other is not None:
            raise IoasidError(errno.EEXIST, f"{where} overlaps [{other.vaddr:#x}, {other.end:#x}): unshare that first")
        if len(self._shares) >= MAX_SHARES:
            raise IoasidError(errno.ENOSPC, f"{where}: {MAX_SHARES} ranges are shared: use fewer, larger ones")
        if sum(each for _, each in self._places) + size > MAX_SIZE:
            raise IoasidError(errno.ENOSPC, f"{where}: more than {MAX_SIZE:#x} bytes in all: share less")
        if len(self._places) >= MAX_PLACES:
            raise IoasidError(errno.ENOSPC, f"{where}: {MAX_PLACES} ranges were shared: connect again")

    def _take(self, size: int) -> None:
        if not self._ranges.take():
            raise IoasidError(errno.ENOSPC, "share: the clients have shared all the ranges they may have: use fewer")
        if not self._size.take(size):
            self._ranges.give()
            raise IoasidError(errno.ENOMEM, f"share: {size:#x} bytes more than the clients may share together")

    def _give(self, size: int) -> None:
        self._ranges.give()
        self._size.give(size)

    def _map(self, fd: int, vaddr: int, size: int, offset: int, *, writable: bool) -> int:
        """Where it lies is congruent to vaddr modulo the largest leaf that fits: as the client laid out its own."""
        leaf = next((each for each in LEAVES if each <= size), PAGE_SIZE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        room = _mmap(None, size + leaf, PROT_NONE, flags, -1, 0)
        if room == MAP_FAILED:
            raise IoasidError(errno.ENOMEM, f"share: no {size:#x} bytes of addresses are left in the server")
        place = int(room) + (vaddr - int(room)) % leaf
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        if _mmap(place, size, protection, mmap.MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED:
            why = os.strerror(ctypes.get_errno())
            _munmap(room, size + leaf)
            raise IoasidError(errno.ENOMEM, f"share: the server cannot map the memfd: {why}")
        if place > room:
            _munmap(room, place - int(room))
        _munmap(place + size, int(room) + leaf - place)
        return place
