"""Ranges that may overlap, found by what they cover."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from .formats import PAGE_SIZE

END = 1 << 64
PAGE_BITS = PAGE_SIZE.bit_length() - 1


class Range(Protocol):
    """[start, start + size). Bytes, whole pages."""

    @property
    def start(self) -> int: ...

    @property
    def size(self) -> int: ...


R = TypeVar("R", bound=Range)


class Intervals(Generic[R]):
    """A set of ranges, each an object of its own. What covers or begins in a range is found without looking at others.

    Each range stands in the nodes of a binary tree over all addresses that make it up: aligned powers of two, two of
    each size at most. Who covers an address stands in one of the nodes above it, one of each size.
    """

    def __init__(self) -> None:
        self._starts: list[tuple[int, int]] = []
        self._by_key: dict[tuple[int, int], R] = {}
        self._nodes: dict[tuple[int, int], dict[tuple[int, int], R]] = {}
        self._levels: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, item: R) -> None:
        """Take one in, that is not in yet."""
        key = (item.start, id(item))
        insort(self._starts, key)
        self._by_key[key] = item
        for node in _nodes(item):
            self._nodes.setdefault(node, {})[key] = item
            self._levels[node[0]] = self._levels.get(node[0], 0) + 1

    def remove(self, item: R) -> None:
        """Forget one that is in."""
        key = (item.start, id(item))
        del self._starts[bisect_left(self._starts, key)]
        del self._by_key[key]
        for node in _nodes(item):
            del self._nodes[node][key]
            if not self._nodes[node]:
                del self._nodes[node]
            self._levels[node[0]] -= 1
            if not self._levels[node[0]]:
                del self._levels[node[0]]

    def overlapping(self, start: int, size: int) -> list[R]:
        """All that share a byte with [start, start + size), which is not empty."""
        if not self._by_key:
            return []
        found = [
            item
            for level in self._levels
            for item in self._nodes.get((level, start >> PAGE_BITS >> level), {}).values()
            if item.start < start
        ]
        first, end = bisect_left(self._starts, (start, 0)), bisect_left(self._starts, (start + size, 0))
        return found + [self._by_key[key] for key in self._starts[first:end]]


def _nodes(item: Range) -> Iterator[tuple[int, int]]:
    """(log2 of a node's pages, its place among those of its size) for the largest nodes that make the range up."""
    page, end = item.start >> PAGE_BITS, (item.start + item.size) >> PAGE_BITS
    while page < end:
        level = (end - page).bit_length() - 1
        if page:
            level = min(level, (page & -page).bit_length() - 1)
        yield level, page >> level
        page += 1 << level
