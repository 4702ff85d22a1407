"""AMD guest CR3 tables: PASID -> root of a guest (v2) tree, 1 to 3 levels.

AMD IOMMU 48882 2.2.6.3 (guest CR3 table), 2.2.2 (device-table entry: GCR3 table root pointer, GLX, bits 55:54 of its
third quadword for five-level guest tables). GLX 0, 1, 2 give 1, 2, 3 levels: PASID 8:0, 17:9, 19:18.

unspecified: bits 11:1 and 63:52 of an entry, told as reserved; here they are checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from .common import Fault, Reader, Reason, bits, mask
from .memory import Memory, Region

VALID = 1 << 0


@dataclass(frozen=True, slots=True)
class Config:
    """`levels` is GLX + 1."""

    root: int
    levels: int = 1

    def __post_init__(self) -> None:
        if self.levels not in (1, 2, 3) or self.root % 4096:
            raise ValueError(f"GCR3 tables have 1 to 3 levels and a 4 KiB aligned root, not {self}")


def lookup(memory: Reader, config: Config, pasid: int) -> int | Fault:
    """Address of the PASID's page-table root."""
    # 1. The PASID fits the levels.
    if pasid >> min(9 * config.levels, 20):
        return Fault(Reason.ADDRESS_WIDTH, 0)
    table = config.root
    for level in range(config.levels, 0, -1):
        # 2. Nine PASID bits a level, two at the third.
        address = table + 8 * bits(pasid, 9 * level - 1, 9 * (level - 1))
        entry = memory.read64(address)
        if entry is None:
            return Fault(Reason.TABLE_ACCESS, level, address)
        # 3. V, then the reserved bits.
        if not entry & VALID:
            return Fault(Reason.NOT_PRESENT, level, address, entry)
        if entry & (mask(63, 52) | mask(11, 1)):
            return Fault(Reason.RESERVED_BITS, level, address, entry)
        table = entry & mask(51, 12)
    return table


class Builder:
    """Builds one GCR3 table."""

    def __init__(self, memory: Memory, region: Region, levels: int = 1) -> None:
        self.memory, self.region, self.levels = memory, region, levels
        self.root = region.allocate(4096)
        self.tables: dict[tuple[int, int], int] = {}

    def slot(self, pasid: int) -> int:
        """Address of the PASID's last-level entry."""
        table = self.root
        for shift in (18, 9)[3 - self.levels :]:
            key = (shift, pasid >> shift)
            if key not in self.tables:
                self.tables[key] = self.region.allocate(4096)
                self.memory.write64(table + (pasid >> shift) % 512 * 8, self.tables[key] | 1)
            table = self.tables[key]
        return table + pasid % 512 * 8

    def set(self, pasid: int, root: int) -> None:
        """Gives the PASID a page-table root."""
        self.memory.write64(self.slot(pasid), root | 1)

    def config(self) -> Config:
        """What the device-table entry says."""
        return Config(self.root, self.levels)
