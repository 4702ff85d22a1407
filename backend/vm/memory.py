"""The VM's one stage 2, kept from the vfio-user DMA maps of all its functions."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import Protocol

from backend.core import Access
from backend.ioasid import IoasidError, VmMemorySource

from .backing import Duplicate, Duplicates, whole_pages
from .snapshot import Extent, Snapshot, read_memory, take_snapshot

MAX_REGIONS_OF_FUNCTION = 64
"""Regions of a function: libvfio-user itself stops at 16, and a PC's firmware leaves 6."""

MAX_REGIONS = 4096
"""Regions of all functions: 64 functions, more than a machine of ours has; a change looks at each of them."""

MAX_READ = 1 << 26
"""Bytes of one `read`: 64 MiB, more than any check compares at once."""


class Region(Protocol):
    """What a DMA_MAP or DMA_UNMAP says (backend.pci's DmaRegion). Addresses and sizes are bytes."""

    @property
    def gpa(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def hva(self) -> int | None:
        """Where libvfio-user mapped it, None where the client gave no file: ROM, device memory."""

    @property
    def access(self) -> Access: ...


@dataclass(frozen=True, slots=True)
class _Word:
    """What a function said about [gpa, gpa + size). Without a duplicate: that nothing can be reached there."""

    sequence: int
    gpa: int
    size: int
    duplicate: Duplicate | None
    access: Access


@dataclass(frozen=True, slots=True)
class MappedExtent:
    """One mapping of the stage 2. Bytes, whole pages."""

    gpa: int
    size: int
    hva: int
    access: Access


class VmMemory:
    """Regions of every function -> what the engine's IOASIDs of kind vm follow.

    Each function is told of the same guest memory by messages of its own, in an order of its own. What a GPA stands
    for is decided by the most recent of the regions that functions still hold there: read-only parts stay read-only,
    and regions without a file are holes. A function that goes takes its own regions with it and no more.

    HVAs are duplicates that belong to us, so that memory outlives the connection that brought it as long as another
    function still holds it. All calls come from the server's one thread, which does no DMA meanwhile.
    """

    def __init__(self, source: VmMemorySource, address_width: int) -> None:
        """`source`: of the engine; `address_width`: bits of a GPA that the VM's stage 2 can translate."""
        self._source = source
        self._width = address_width
        self._words: dict[str, dict[tuple[int, int], _Word]] = {}
        self._extents: set[MappedExtent] = set()
        self._duplicates = Duplicates()
        self._sequence = 0

    def map(self, function: str, region: Region) -> None:
        """A function was told of a region. The same region told again is its newest word.

        IoasidError, and nothing changed: EINVAL no whole pages, wider than the stage 2, or a private mapping; EFAULT
        the HVA is not mapped; ENOSPC too many regions.
        """
        gpa, size = region.gpa, region.size
        where = f"{function}: DMA region [{gpa:#x}, {gpa + size:#x})"
        if not whole_pages(gpa, size):
            raise IoasidError(errno.EINVAL, f"{where} is no range of whole 4 KiB pages: it cannot be mapped")
        if (gpa + size) >> self._width and gpa + size != 1 << self._width:
            raise IoasidError(errno.EINVAL, f"{where} is wider than the {self._width} bits of the VM's stage 2")
        held = self._words.get(function, {})
        if (gpa, size) not in held:
            if len(held) >= MAX_REGIONS_OF_FUNCTION:
                raise IoasidError(
                    errno.ENOSPC, f"{where} comes on top of {len(held)} regions: the client must unmap some"
                )
            if self.regions() >= MAX_REGIONS:
                raise IoasidError(errno.ENOSPC, f"{where} comes on top of {MAX_REGIONS} regions of all functions")
        duplicate = self._duplicates.take(region.hva, size, gpa) if region.hva is not None else None
        access = region.access
        if duplicate is not None and not duplicate.identity.writable:
            access &= ~Access.WRITE  # whatever the client says: a store to such a mapping ends the process
        self._sequence += 1
        word = _Word(self._sequence, gpa, size, duplicate, access)
        try:
            self._become({**self._words, function: {**held, (gpa, size): word}})
        except IoasidError:
            if duplicate is not None:
                self._duplicates.release(duplicate)
            raise
        old = held.get((gpa, size))
        if old is not None:
            self._forget([old])

    def unmap(self, function: str, region: Region) -> None:
        """A function was told that a region is gone. IoasidError ENOENT: it never held this one."""
        held = dict(self._words.get(function, {}))
        word = held.pop((region.gpa, region.size), None)
        if word is None:
            raise IoasidError(
                errno.ENOENT,
                f"{function}: no DMA region of {region.size:#x} bytes at {region.gpa:#x} is mapped: unmap what was",
            )
        self._shrink({**self._words, function: held}, [word])

    def disconnect(self, function: str) -> None:
        """A function lost its client: its regions go."""
        words = self._words.get(function, {})
        self._shrink({name: held for name, held in self._words.items() if name != function}, words.values())

    def close(self) -> None:
        """All regions of all functions go."""
        for function in list(self._words):
            self.disconnect(function)

    def regions(self, function: str | None = None) -> int:
        """How many regions a function, or all of them, hold."""
        if function is not None:
            return len(self._words.get(function, ()))
        return sum(len(held) for held in self._words.values())

    @property
    def extents(self) -> list[MappedExtent]:
        """What the stage 2 maps, in order of GPA."""
        return sorted(self._extents, key=lambda each: each.gpa)

    def read(self, gpa: int, size: int) -> bytes:
        """Guest memory as it stands, for a check; no DMA, counted nowhere. IoasidError EFAULT: not all of it is
        there."""
        if not 0 <= size <= MAX_READ:
            raise IoasidError(errno.EINVAL, f"cannot read {size:#x} bytes at once: read at most {MAX_READ:#x}")
        buffer = (ctypes.c_char * size)()
        done = 0
        for extent in self.extents:
            if extent.gpa <= gpa + done < extent.gpa + extent.size and done < size:
                offset = gpa + done - extent.gpa
                length = min(size - done, extent.size - offset)
                got = read_memory(extent.hva + offset, buffer, done, length)
                done += got
                if got < length:
                    break
        if done < size:
            raise IoasidError(errno.EFAULT, f"no guest memory at GPA {gpa + done:#x}")
        return bytes(buffer)

    def snapshot(self, exclude: Sequence[tuple[int, int]] = ()) -> Snapshot:
        """Hashes of all writable guest memory but the excluded (GPA, bytes): stop the VM, take one before and one
        after.

        At least 1 GB/s; holes that the guest never touched cost nothing and stay holes.
        """
        writable = (each for each in self.extents if each.access & Access.WRITE)
        return take_snapshot((Extent(each.gpa, each.size, each.hva) for each in writable), exclude)

    def _become(self, words: dict[str, dict[tuple[int, int], _Word]]) -> None:
        """Bring the stage 2 to what these words say. Where that fails, it is brought back and the words stay as they
        were."""
        try:
            self._apply(words)
        except IoasidError:
            self._apply(self._words)
            raise
        self._words = words

    def _shrink(self, words: dict[str, dict[tuple[int, int], _Word]], gone: Iterable[_Word]) -> None:
        """Follow fewer words. What was taken away is away even where what showed beneath it could not be mapped."""
        self._words = words
        try:
            self._apply(words)
        finally:
            self._forget(gone)

    def _apply(self, words: dict[str, dict[tuple[int, int], _Word]]) -> None:
        wanted = _layout(word for held in words.values() for word in held.values())
        for extent in self.extents:
            if extent not in wanted:
                self._source.unmap(extent.gpa, extent.size)
                self._extents.discard(extent)
        for extent in sorted(wanted - self._extents, key=lambda each: each.gpa):
            self._source.map(extent.gpa, extent.hva, extent.size, extent.access)
            self._extents.add(extent)

    def _forget(self, words: Iterable[_Word]) -> None:
        """Words that stage 2 no longer follows: give their memory back."""
        for word in words:
            if word.duplicate is not None:
                self._duplicates.release(word.duplicate)


def _layout(words: Iterable[_Word]) -> set[MappedExtent]:
    """What the words come to: at each GPA the newest one counts. Neighbours of the same mapping become one extent."""
    starting = sorted(words, key=lambda word: word.gpa, reverse=True)
    edges = sorted({word.gpa for word in starting} | {word.gpa + word.size for word in starting})
    open_words: list[tuple[int, _Word]] = []  # newest first; those that ended are dropped when they come up
    extents: list[MappedExtent] = []
    origin: Duplicate | None = None
    for low, high in pairwise(edges):
        while starting and starting[-1].gpa == low:
            word = starting.pop()
            heappush(open_words, (-word.sequence, word))
        while open_words and open_words[0][1].gpa + open_words[0][1].size <= low:
            heappop(open_words)
        if not open_words or open_words[0][1].duplicate is None or not open_words[0][1].access:
            continue
        word = open_words[0][1]
        duplicate = word.duplicate
        assert duplicate is not None
        extent = MappedExtent(low, high - low, duplicate.hva + low - word.gpa, word.access)
        last = extents[-1] if extents else None
        if last is not None and origin is duplicate and _continues(last, extent):
            extents[-1] = MappedExtent(last.gpa, last.size + extent.size, last.hva, last.access)
        else:
            extents.append(extent)
        origin = duplicate
    return set(extents)


def _continues(first: MappedExtent, second: MappedExtent) -> bool:
    return (
        first.gpa + first.size == second.gpa and first.hva + first.size == second.hva and first.access == second.access
    )
