"""The device TLB: translations that a function keeps, so that it need not ask for them again (PCIe 5.0, 10.1.3)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backend.core import Translated

PAGE = 4096
ENTRIES_MAX = 8192
"""Translations a function keeps: 32 MiB of scattered 4 KiB pages, which is what some tens of jobs have under way."""

UNSUPPORTED_MAX = 4096
"""PASIDs remembered as unsupported: beyond that, they are asked for again."""

Entry = tuple[int, int, int, int]
"""First IOVA, end, address for translated requests, access (as an int: operators of an IntFlag cost a microsecond)."""
Segments = list[tuple[int, int]]
"""(address, bytes) in order."""


class _Table:
    """Entries of one PASID, in order of their IOVAs, none overlapping another."""

    __slots__ = ("entries", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.entries: list[Entry] = []

    def overlapping(self, iova: int, end: int) -> slice:
        """Which entries [iova, end) touches."""
        first = bisect_right(self.starts, iova) - 1
        if first < 0 or self.entries[first][1] <= iova:
            first += 1
        return slice(first, bisect_left(self.starts, end, first))

    def put(self, where: slice, entries: Sequence[Entry]) -> None:
        """Replace entries."""
        self.starts[where] = [entry[0] for entry in entries]
        self.entries[where] = entries


class DeviceTlb:
    """Bounded. Entries are of whole pages of any number; what an invalidation touches is forgotten as a whole.

    When there are too many, the PASID that was asked for least recently loses all of its own; the last one that is left
    begins anew.
    """

    def __init__(self, entries_max: int = ENTRIES_MAX) -> None:
        self._max = entries_max
        self._tables: dict[int | None, _Table] = {}
        """By PASID, None for requests without one, the one that was asked for last at the end; none is empty."""
        self._count = 0
        self.unit = PAGE
        """Bytes, a power of two: invalidations are taken to be of whole units (the smallest translation unit)."""
        self.unsupported: set[int | None] = set()
        """PASIDs, None for requests without one, for which translation requests are not supported."""
        self.changes = 0
        """How often something was to be forgotten: whoever found something before that has to look again."""

    def __len__(self) -> int:
        """Entries kept."""
        return self._count

    def __call__(self, pasid: int | None, iova: int, size: int | None, done: Callable[[], None]) -> None:
        """Forget [iova, iova + size), None: all, of a PASID; None: of all PASIDs, and of requests without one.

        A request without a PASID may be meant to be of those alone (10.3.8), or of all: the TLB cannot tell.
        `done` is called before this returns: requests are one call each, and none of them is under way meanwhile.
        """
        self.changes += 1
        if pasid is None:
            self.unsupported.clear()
        else:
            self.unsupported.discard(pasid)
        if size is None:
            if pasid is None:
                self._tables.clear()
                self._count = 0
            else:
                self._forget_all(pasid)
        else:
            first = iova & -self.unit
            end = iova + size + self.unit - 1 & -self.unit
            for key in list(self._tables) if pasid is None else [pasid]:
                self._forget(key, first, end)
        done()

    def clear(self) -> None:
        """Forget everything."""
        self(None, 0, None, _nobody)

    def refuse(self, pasid: int | None) -> None:
        """Translation requests with this PASID are not supported: none is to be sent until something of it changes."""
        if len(self.unsupported) >= UNSUPPORTED_MAX:
            self.unsupported.clear()
        self.unsupported.add(pasid)

    def find(self, pasid: int | None, iova: int, end: int, access: int) -> tuple[Segments, int]:
        """Where [iova, end) lies as far as entries that permit `access` reach without a gap, and where that ends."""
        found: Segments = []
        table = self._tables.get(pasid)
        if table is None:
            return found, iova
        entries = table.entries
        begin = bisect_right(table.starts, iova) - 1
        for index in range(max(begin, 0), len(entries)):
            first, stop, address, permitted = entries[index]
            if iova < first or iova >= stop or access & ~permitted:
                break
            address += iova - first
            if stop >= end:
                found.append((address, end - iova))
                return found, end
            found.append((address, stop - iova))
            iova = stop
        return found, iova

    def keep(self, pasid: int | None, translations: Sequence[Translated]) -> None:
        """Enter what a translation request was answered, in the order of the IOVAs. What overlaps it is replaced."""
        if not translations:
            return
        entries: list[Entry] = [
            (iova, iova + size, address, int(access)) for iova, size, address, access in translations
        ]
        table = self._tables.pop(pasid, None) or _Table()
        self._tables[pasid] = table  # at the end
        where = table.overlapping(entries[0][0], entries[-1][1])
        table.put(where, entries)
        self._count += len(entries) - (where.stop - where.start)
        while self._count > self._max:
            oldest = next(iter(self._tables))
            if oldest == pasid:
                table.put(slice(None), entries)
                self._count = len(entries)
                break
            self._forget_all(oldest)

    def _forget(self, pasid: int | None, iova: int, end: int) -> None:
        table = self._tables.get(pasid)
        if table is not None:
            where = table.overlapping(iova, end)
            table.put(where, ())
            self._count -= where.stop - where.start
            if not table.entries:
                del self._tables[pasid]

    def _forget_all(self, pasid: int | None) -> None:
        table = self._tables.pop(pasid, None)
        self._count -= len(table.entries) if table is not None else 0


def _nobody() -> None:
    """Nobody waits for it."""
