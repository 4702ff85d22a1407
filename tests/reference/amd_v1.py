"""AMD IOMMU host tables (v1), 1 to 6 levels.

AMD IOMMU 48882 2.2.3 (I/O page tables for host translations: page-table entries, page-directory entries, example
page-size encodings, level parameters), 2.2.2 (device-table entry: Mode, IR, IW, HAD), 2.5.3 (IO_PAGE_FAULT: PR, RZ).

unspecified: several faults at once; here present, reserved bits, level code and size code, alignment, skipped address
bits, then permissions of all levels at the end. The specification lets a walker stop at the first level without
permission; the answer to the device is the same.
unspecified: the low address bits of a leaf of default size above level 1; here they must be zero (MISALIGNED).
unspecified: a size code beyond 52 bits, the width of an output address; here BAD_LEVEL.
Skipped address bits that are not zero are a page fault of no class of its own in the specification: ADDRESS_WIDTH here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .building import Builder as _Builder
from .common import RWX, Access, Fault, Kind, Perms, Reader, Reason, Result, Update, bits, mask, merge, pending
from .memory import Memory, Region

PRESENT, ACCESSED, DIRTY, READ, WRITE = 1 << 0, 1 << 5, 1 << 6, 1 << 61, 1 << 62


@dataclass(frozen=True, slots=True)
class Config:
    """`read`, `write`: IR and IW of the device-table entry; `accessed`, `dirty`: what its HAD field allows."""

    root: int
    levels: int = 4
    read: bool = True
    write: bool = True
    accessed: bool = False
    dirty: bool = False

    def __post_init__(self) -> None:
        if self.levels not in range(1, 7) or self.root % 4096:
            raise ValueError(f"AMD v1 tables have 1 to 6 levels and a 4 KiB aligned root, not {self}")
        if self.dirty and not self.accessed:
            raise ValueError("HAD has no encoding for dirty without accessed")


def walk(memory: Reader, config: Config, iova: int, access: Access) -> Result | Fault:
    """Translates `iova` (64 bits) for one access. There is no execute permission: execution needs read."""
    # 1. Mode tells how many address bits the tables cover; the rest must be zero.
    if iova >> min(12 + 9 * config.levels, 64):
        return Fault(Reason.ADDRESS_WIDTH, 0)

    table, level = config.root, config.levels
    used: list[Update] = []
    read, write = config.read, config.write
    while True:
        # 2. The entry: nine address bits, seven at level 6.
        shift = 12 + 9 * (level - 1)
        address = table + 8 * bits(iova, min(shift + 8, 63), shift)
        entry = memory.read64(address)
        if entry is None:
            return Fault(Reason.TABLE_ACCESS, level, address, None, merge(used))
        # 3. PR.
        if not entry & PRESENT:
            return Fault(Reason.NOT_PRESENT, level, address, entry, merge(used))
        # 4. Reserved bits: 58:52 of a page entry, 60:52 of a directory entry.
        next_level = bits(entry, 11, 9)
        is_page = next_level in (0, 7)
        if entry & (mask(58, 52) if is_page else mask(60, 52)):
            return Fault(Reason.RESERVED_BITS, level, address, entry, merge(used))
        # 5. Level code: level 6 holds no pages, a directory entry leads strictly down.
        if (is_page and level == 6) or (not is_page and next_level >= level):
            return Fault(Reason.BAD_LEVEL, level, address, entry, merge(used))
        if next_level == 7:
            # 6. Size code: the lowest zero of address bits 12 and up is the top bit below the page size. The size lies
            #    strictly between the default sizes of this level and the next.
            zero = 12
            while zero < 52 and entry >> zero & 1:
                zero += 1
            size_bits = zero + 1
            if not shift < size_bits < shift + 9 or size_bits > 52:
                return Fault(Reason.BAD_LEVEL, level, address, entry, merge(used))
        elif next_level == 0:
            # 7. The level's default size, aligned to it.
            size_bits = shift
            if entry & mask(shift - 1, 12):
                return Fault(Reason.MISALIGNED, level, address, entry, merge(used))
        elif next_level < level - 1 and bits(iova, shift - 1, 12 + 9 * next_level):
            # 8. Address bits of skipped levels must be zero.
            return Fault(Reason.ADDRESS_WIDTH, level, address, entry, merge(used))
        # 9. IR and IW are ANDed from the device-table entry down.
        read &= bool(entry & READ)
        write &= bool(entry & WRITE)
        if config.accessed:
            used += pending(address, entry, ACCESSED)
        if not is_page:
            table, level = entry & mask(51, 12), next_level
            continue
        if not (write if access.kind is Kind.WRITE else read):
            return Fault(Reason.PERMISSION, level, address, entry, merge(used))
        # 10. Dirty in the entry used, which is one of several where a size code spans entries.
        if config.dirty and access.kind is Kind.WRITE:
            used += pending(address, entry, DIRTY)
        output = (entry & mask(51, size_bits)) | bits(iova, size_bits - 1, 0)
        return Result(output, 1 << size_bits, read, write, read, True, merge(used))


class Builder(_Builder):
    """Leaves of every power of two from 4 KiB up to what the tables cover, at most 2^51 bytes.

    skips: level -> level that its directory entries lead to, for trees that leave levels out.
    """

    def __init__(self, memory: Memory, region: Region, levels: int = 4, skips: Mapping[int, int] | None = None) -> None:
        self.levels = levels
        self.input_bits = min(12 + 9 * levels, 64)
        self.sizes = tuple(1 << n for n in range(min(11 + 9 * levels, 51), 11, -1))
        self.skips = dict(skips or {})
        super().__init__(memory, region)

    def shift(self, level: int) -> int:
        return (12, 21, 30, 39, 48, 57)[level - 1]

    def level_of(self, size: int) -> int:
        return (size.bit_length() - 13) // 9 + 1

    def next_level(self, level: int, iova: int) -> int:
        below = self.skips.get(level, level - 1)
        if below < level - 1 and (iova % (1 << self.shift(level))) >> self.shift(below + 1):
            raise ValueError(f"{iova:#x} has address bits in the levels that level {level} skips")
        return below

    def table_entry(self, level: int, address: int) -> int:
        return address | (self.skips.get(level, level - 1) << 9) | 0x6000_0000_0000_0001

    def leaf_entry(self, level: int, oa: int, perms: Perms = RWX, size: int | None = None) -> int:
        entry = oa | 1 | (perms.read << 61) | (perms.write << 62)
        if size is not None and size > 1 << self.shift(level):
            entry |= (7 << 9) | (((size >> 13) - 1) << 12)
        return entry

    def config(self, **changes: Any) -> Config:
        return replace(Config(self.root, self.levels), **changes)
