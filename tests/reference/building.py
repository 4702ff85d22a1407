"""What the table builders share: cutting a range into leaves, finding the slot of a leaf, allocating tables.

A builder remembers where its tables are instead of decoding entries, so that it owes nothing to any walker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from .common import RWX, Perms
from .memory import Memory, Region


class Builder(ABC):
    """Builds one table tree. Subclasses give the geometry and the encodings.

    levels: root level, as in common.py. input_bits: width of the addresses that are indexed. sizes: leaf sizes in
    bytes, largest first. table_bytes: size of every table but the root, which has root_bytes.
    """

    levels: int
    input_bits: int
    sizes: tuple[int, ...]
    table_bytes: int = 4096
    root_bytes: int = 4096

    def __init__(self, memory: Memory, region: Region) -> None:
        self.memory = memory
        self.region = region
        self.root = region.allocate(self.root_bytes)
        self.tables: dict[tuple[int, int], int] = {}  # (level of the pointing entry, address prefix) -> child table
        self.leaves: dict[tuple[int, int], int] = {}  # (level, address prefix) -> address of the leaf entry

    @abstractmethod
    def shift(self, level: int) -> int:
        """Log2 of the bytes that one entry of `level` covers."""

    @abstractmethod
    def table_entry(self, level: int, address: int) -> int:
        """An entry of `level` that points to the table at `address`, one level down."""

    @abstractmethod
    def leaf_entry(self, level: int, oa: int, perms: Perms = RWX, size: int | None = None) -> int:
        """A leaf entry of `level`; `size` only where one level has leaves of several sizes."""

    @abstractmethod
    def config(self, **changes: Any) -> Any:
        """The walker's configuration for this tree, with fields replaced by `changes`."""

    def extend(self, raw: int) -> int:
        """The full 64-bit input address of which `raw` is the part that indexes the tables."""
        return raw

    def level_of(self, size: int) -> int:
        """The level whose entries hold a leaf of `size` bytes."""
        return max(level for level in range(1, self.levels + 1) if 1 << self.shift(level) <= size)

    def raw(self, iova: int) -> int:
        """The part of an input address that indexes the tables."""
        return iova & ((1 << self.input_bits) - 1)

    def next_level(self, level: int, iova: int) -> int:
        """The level that a table pointer of `level` leads to."""
        del iova
        return level - 1

    def slot(self, iova: int, level: int) -> int:
        """Address of the entry for `iova` at `level`; tables on the way are allocated."""
        iova = self.raw(iova)
        table, above = self.root, self.levels
        while above != level:
            key = (above, iova >> self.shift(above))
            if key in self.leaves:
                raise ValueError(f"{iova:#x} is mapped already by a leaf of level {above}")
            below = self.next_level(above, iova)
            if below < level:
                raise ValueError(f"no table of level {level} at {iova:#x}: an entry above skips it")
            if key not in self.tables:
                child = self.region.allocate(self.table_bytes)
                self.memory.write64(table + 8 * self.index(iova, above), self.table_entry(above, child))
                self.tables[key] = child
            table, above = self.tables[key], below
        return table + 8 * self.index(iova, level)

    def index(self, iova: int, level: int) -> int:
        """Index into a table of `level`; the root takes all bits that are left."""
        index = self.raw(iova) >> self.shift(level)
        return index if level == self.levels else index % (self.table_bytes // 8)

    def map(self, iova: int, oa: int, size: int, perms: Perms = RWX, *, leaf: int | None = None) -> None:
        """Maps [iova, iova + size) to oa by the largest leaves that fit, or by leaves of `leaf` bytes only."""
        end = iova + size
        while iova < end:
            fits = [s for s in self.sizes if leaf in (None, s) and not (iova | oa) % s and s <= end - iova]
            if not fits:
                raise ValueError(f"no leaf fits {iova:#x} -> {oa:#x}, {end - iova:#x} bytes left, leaf {leaf}")
            self.map_leaf(iova, oa, fits[0], perms)
            iova, oa = iova + fits[0], oa + fits[0]

    def map_leaf(self, iova: int, oa: int, size: int, perms: Perms) -> None:
        """One leaf; where it takes several entries (AMD size codes, Svnapot) all of them."""
        level = self.level_of(size)
        first = self.raw(iova) >> self.shift(level)
        keys = [(level, first + i) for i in range(size >> self.shift(level))]
        if any(key in self.tables or key in self.leaves for key in keys):
            raise ValueError(f"{iova:#x} is mapped already")
        slot = self.slot(iova, level)
        for i, key in enumerate(keys):  # all in one table: no leaf is larger than half a table of its level
            self.memory.write64(slot + 8 * i, self.leaf_entry(level, oa, perms, size))
            self.leaves[key] = slot + 8 * i
