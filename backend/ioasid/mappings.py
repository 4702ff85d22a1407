"""What was mapped into a host-managed IOASID, kept as it was asked for."""

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from backend.core import Access


class Mapping(NamedTuple):
    """[iova, iova + size) stands for the user's memory at vaddr. Bytes; all multiples of 4096."""

    iova: int
    size: int
    vaddr: int
    """In the user's addresses; beneath a parent, in the parent's."""
    where: int
    """The same for the core: an address of this process; beneath a parent, vaddr."""
    access: Access
    registered: bool = False
    """It uses registered memory, and is not counted by itself."""

    @property
    def end(self) -> int:
        """First IOVA past it."""
        return self.iova + self.size


class Mappings:
    """Mappings that do not overlap, in order of their IOVA. Look-ups take O(log n)."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._by_start: dict[int, Mapping] = {}
        self.size = 0
        """Bytes mapped in all."""

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Mapping]:
        return (self._by_start[start] for start in self._starts)

    def at(self, iova: int) -> Mapping | None:
        """The mapping that begins at iova."""
        return self._by_start.get(iova)

    def overlapping(self, iova: int, size: int) -> Mapping | None:
        """The first mapping that shares a byte with [iova, iova + size)."""
        starts = self._starts
        index = bisect_left(starts, iova)
        if index:
            before = self._by_start[starts[index - 1]]
            if iova < before.end:
                return before
        if index < len(starts) and starts[index] < iova + size:
            return self._by_start[starts[index]]
        return None

    def within(self, iova: int, size: int) -> Iterator[Mapping]:
        """All mappings that share a byte with [iova, iova + size), in order."""
        first = bisect_left(self._starts, iova)
        if first and self._by_start[self._starts[first - 1]].end > iova:
            first -= 1
        for start in self._starts[first : bisect_left(self._starts, iova + size)]:
            yield self._by_start[start]

    def add(self, mapping: Mapping) -> None:
        """Take one in. It must overlap none: ask `overlapping` first."""
        self._starts.insert(bisect_left(self._starts, mapping.iova), mapping.iova)
        self._by_start[mapping.iova] = mapping
        self.size += mapping.size

    def remove(self, mapping: Mapping) -> None:
        """Forget one that `at` gave."""
        del self._starts[bisect_left(self._starts, mapping.iova)]
        del self._by_start[mapping.iova]
        self.size -= mapping.size
