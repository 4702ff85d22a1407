"""VT-d second-stage tables, 3, 4 and 5 levels.

Intel VT-d 3.7 (second-stage translation), 9.8 (second-stage entries), 9.6 (AW and SSADE of the PASID-table entry),
7.1 (fault conditions). Bits 2 (execute), 5:3 and 6 (memory type) never refuse a request: ignored.

unspecified: several faults at once; here present, reserved bits at each level, then R and W of all levels at the end.
An entry with R = W = 0 is NOT_PRESENT here; the hardware reports it as missing read or write permission.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .building import Builder as _Builder
from .common import RWX, Access, Fault, Kind, Perms, Reader, Reason, Result, Update, bits, mask, merge, pending
from .memory import Memory, Region

READ, WRITE, LARGE, ACCESSED, DIRTY, SNOOP, TRANSIENT = 1 << 0, 1 << 1, 1 << 7, 1 << 8, 1 << 9, 1 << 11, 1 << 62


@dataclass(frozen=True, slots=True)
class Config:
    """`pa_bits`: host address width (HAW). `access_dirty`: SSADE. `snoop_control`: ECAP.SC, else bit 11 is reserved."""

    root: int
    levels: int = 4
    pa_bits: int = 52
    access_dirty: bool = False
    large_2m: bool = True
    large_1g: bool = True
    snoop_control: bool = True

    def __post_init__(self) -> None:
        if self.levels not in (3, 4, 5) or self.root % 4096:
            raise ValueError(f"second-stage tables have 3 to 5 levels and a 4 KiB aligned root, not {self}")


def walk(memory: Reader, config: Config, iova: int, access: Access) -> Result | Fault:
    """Translates `iova` (64 bits) for one access. There is no execute permission: execution needs read."""
    # 1. The address fits the adjusted guest address width.
    if iova >> (12 + 9 * config.levels):
        return Fault(Reason.ADDRESS_WIDTH, 0)

    table = config.root
    used: list[Update] = []
    read = write = True
    for level in range(config.levels, 0, -1):
        # 2. The entry.
        shift = 12 + 9 * (level - 1)
        address = table + 8 * bits(iova, shift + 8, shift)
        entry = memory.read64(address)
        if entry is None:
            return Fault(Reason.TABLE_ACCESS, level, address, None, merge(used))
        # 3. Present: R or W.
        if not entry & (READ | WRITE):
            return Fault(Reason.NOT_PRESENT, level, address, entry, merge(used))
        # 4. Reserved bits: address bits above HAW and, of a large page, below its size; bit 62; bit 11 of a table
        #    pointer; the page-size bit where no large page exists.
        large_here = (level == 2 and config.large_2m) or (level == 3 and config.large_1g)
        leaf = level == 1 or (large_here and bool(entry & LARGE))
        reserved = mask(51, config.pa_bits) | TRANSIENT
        if not leaf or not config.snoop_control:
            reserved |= SNOOP
        if level > 1 and not large_here:
            reserved |= LARGE
        if leaf:
            reserved |= mask(shift - 1, 12)
        if entry & reserved:
            return Fault(Reason.RESERVED_BITS, level, address, entry, merge(used))
        # 5. Permissions of all levels together.
        read &= bool(entry & READ)
        write &= bool(entry & WRITE)
        if config.access_dirty:
            used += pending(address, entry, ACCESSED)
        if not leaf:
            table = entry & mask(51, 12)
            continue
        if not (write if access.kind is Kind.WRITE else read):
            return Fault(Reason.PERMISSION, level, address, entry, merge(used))
        # 6. Accessed in every entry, dirty in the leaf at a write.
        if config.access_dirty and access.kind is Kind.WRITE:
            used += pending(address, entry, DIRTY)
        output = (entry & mask(51, shift)) | bits(iova, shift - 1, 0)
        return Result(output, 1 << shift, read, write, read, True, merge(used))
    raise AssertionError("level 1 is always a leaf")


class Builder(_Builder):
    """Leaves of 4 KiB, 2 MiB, 1 GiB."""

    sizes = (1 << 30, 1 << 21, 1 << 12)

    def __init__(self, memory: Memory, region: Region, levels: int = 4) -> None:
        self.levels = levels
        self.input_bits = 12 + 9 * levels
        super().__init__(memory, region)

    def shift(self, level: int) -> int:
        return (12, 21, 30, 39, 48)[level - 1]

    def table_entry(self, level: int, address: int) -> int:
        return address | 0x3

    def leaf_entry(self, level: int, oa: int, perms: Perms = RWX, size: int | None = None) -> int:
        return oa | (0x1 * perms.read) | (0x2 * perms.write) | (0x80 if level > 1 else 0)

    def config(self, **changes: Any) -> Config:
        return replace(Config(self.root, self.levels), **changes)
