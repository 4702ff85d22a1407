"""AMD v1 page tables by brute force: entries laid out and walked bit by bit, from the specification alone.

AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.3. Imports nothing of what it checks, and
shares no way of computing with it: entries are taken apart as strings of 64 binary digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Leaf:
    """A leaf was found: `base` is the output address of the page, `size_lg2` its size."""

    address: int
    size_lg2: int
    read: bool
    write: bool


@dataclass(frozen=True)
class Stop:
    """The walk ended at an entry of `level`, read at `at` (None: no entry was read)."""

    reason: str
    level: int
    at: int | None
    entry: int


def pointer(address: int, next_level: int, *, read: bool = True, write: bool = True) -> int:
    """An entry that leads to the table at `address`."""
    return int(f"0{int(write)}{int(read)}" + "0" * 9 + f"{address >> 12:040b}" + f"{next_level:03b}" + "0" * 8 + "1", 2)


def leaf(address: int, *, read: bool = True, write: bool = True) -> int:
    """A leaf of the default size of the level it stands in."""
    return pointer(address, 0, read=read, write=write)


def sized_leaf(address: int, size_lg2: int, *, read: bool = True, write: bool = True) -> int:
    """A leaf whose size is coded in its address: ones from bit 12 up to below bit size_lg2 - 1, where a zero stands."""
    ones = sum(1 << bit for bit in range(12, size_lg2 - 1))
    return pointer(address | ones, 7, read=read, write=write)


def default_size_lg2(level: int) -> int:
    """4 KiB, 2 MiB, 1 GiB, 512 GiB, 256 TiB; level 6 has no leaves, its entries cover 2^57."""
    return {1: 12, 2: 21, 3: 30, 4: 39, 5: 48, 6: 57}[level]


def index(address: int, level: int) -> int:
    digits = f"{address:064b}"
    bits = {1: (20, 12), 2: (29, 21), 3: (38, 30), 4: (47, 39), 5: (56, 48), 6: (63, 57)}[level]
    return int(digits[63 - bits[0] : 64 - bits[1]], 2)


def walk(read_entry: Callable[[int], int], root: int, levels: int, address: int, *, write: bool) -> Leaf | Stop:
    """Walk for a read or a write. `read_entry(address)` may raise: what it raises passes through."""
    reach = {1: 21, 2: 30, 3: 39, 4: 48, 5: 57, 6: 64}[levels]
    if address >= 1 << reach:
        return Stop("ADDRESS_WIDTH", 0, None, 0)
    table, level = root, levels
    may_read = may_write = True
    while True:
        at = table + 8 * index(address, level)
        entry = read_entry(at)
        digits = f"{entry:064b}"[::-1]  # digits[n] is bit n

        def stop(reason: str, level: int = level, at: int = at, entry: int = entry) -> Stop:
            return Stop(reason, level, at, entry)

        if digits[0] == "0":
            return stop("NOT_PRESENT")
        next_level = int(digits[9:12][::-1], 2)
        output = int(digits[12:52][::-1], 2) * 4096
        is_leaf = next_level in (0, 7)
        if "1" in (digits[52:59] if is_leaf else digits[52:61]):
            return stop("RESERVED_BITS")
        size_lg2 = default_size_lg2(level)
        if next_level == 0:
            if level == 6:
                return stop("BAD_LEVEL")
            if output % (1 << size_lg2):
                return stop("MISALIGNED")
        elif next_level == 7:
            ones = len(digits[12:52]) - len(digits[12:52].lstrip("1"))
            size_lg2 = 13 + ones
            if level == 6 or size_lg2 > 52 or not default_size_lg2(level) < size_lg2 < default_size_lg2(level + 1):
                return stop("BAD_LEVEL")
            output -= output % (1 << size_lg2)
        elif next_level >= level:
            return stop("BAD_LEVEL")
        may_read = may_read and digits[61] == "1"
        may_write = may_write and digits[62] == "1"
        if is_leaf:
            if not (may_write if write else may_read):
                return stop("PERMISSION")
            return Leaf(output + address % (1 << size_lg2), size_lg2, may_read, may_write)
        if any(index(address, skipped) for skipped in range(next_level + 1, level)):
            return stop("ADDRESS_WIDTH")
        table, level = output, next_level
