"""What a context pins of its user's memory: counted once where it was registered, else once a mapping."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Registered:
    """[vaddr, vaddr + size), and how many mappings use a part of it."""

    vaddr: int
    size: int
    users: int = 0

    @property
    def end(self) -> int:
        """First address past it."""
        return self.vaddr + self.size


class PinnedMemory:
    """limit: bytes that may be pinned, None for all. `exclusive`: nothing but registered memory may be mapped, since
    something was registered once.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.pinned = 0
        """Bytes."""
        self.exclusive = False
        self._starts: list[int] = []
        self._by_start: dict[int, Registered] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def room(self, size: int) -> bool:
        """Whether so many bytes more may be pinned."""
        return self.limit is None or self.pinned + size <= self.limit

    def at(self, vaddr: int) -> Registered | None:
        """The range that begins at vaddr."""
        return self._by_start.get(vaddr)

    def overlapping(self, vaddr: int, size: int) -> Registered | None:
        """The first range that shares a byte with [vaddr, vaddr + size)."""
        index = bisect_right(self._starts, vaddr)
        for start in self._starts[max(index - 1, 0) : index + 1]:
            found = self._by_start[start]
            if found.vaddr < vaddr + size and vaddr < found.end:
                return found
        return None

    def register(self, vaddr: int, size: int) -> None:
        """Pin a range that overlaps none; ask `room` first."""
        self._starts.insert(bisect_right(self._starts, vaddr), vaddr)
        self._by_start[vaddr] = Registered(vaddr, size)
        self.pinned += size
        self.exclusive = True

    def unregister(self, registered: Registered) -> None:
        """Pin it no longer."""
        self._starts.remove(registered.vaddr)
        del self._by_start[registered.vaddr]
        self.pinned -= registered.size

    def covering(self, vaddr: int, size: int) -> list[Registered] | None:
        """The ranges that cover all of [vaddr, vaddr + size) together; None: a part is not registered."""
        found, at = [], vaddr
        for each in self._from(vaddr):
            if each.vaddr > at:
                break
            found.append(each)
            at = each.end
            if at >= vaddr + size:
                return found
        return None

    def _from(self, vaddr: int) -> Iterator[Registered]:
        index = bisect_right(self._starts, vaddr)
        for start in self._starts[max(index - 1, 0) :]:
            if self._by_start[start].end > vaddr:
                yield self._by_start[start]
