"""RISC-V IOMMU process-directory tables: process_id -> process context; PD8, PD17, PD20.

RISC-V IOMMU specification "Process-Directory-Table (PDT)", "Process to locate the Process-context" (thirteen steps,
numbered below; step 3, the second stage, is the reader's), "Process-context configuration checks". PDI[0] is
process_id 7:0, PDI[1] 16:8, PDI[2] 19:17. Step 2 of the text indexes every upper level by PDI[2]; PDI[i] is meant.

A process_id wider than the mode is "Transaction type disallowed", told as ADDRESS_WIDTH; V clear NOT_PRESENT; "entry
misconfigured" RESERVED_BITS. Levels in faults: i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import riscv
from .common import Fault, Reader, Reason, bits
from .memory import Memory, Region

V = 1 << 0
LEVELS = {8: 3, 9: 4, 10: 5}  # fsc.MODE -> levels of Sv39, Sv48, Sv57; 0 is Bare


@dataclass(frozen=True, slots=True)
class Config:
    """`levels`: 1 PD8, 2 PD17, 3 PD20. `hardware_ad`: tc.SADE, for the trees found."""

    root: int
    levels: int = 1
    hardware_ad: bool = False

    def __post_init__(self) -> None:
        if self.levels not in (1, 2, 3) or self.root % 4096:
            raise ValueError(f"process directories have 1 to 3 levels and a 4 KiB aligned root, not {self}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A process context. `stage1` None: Bare. `supervisor`: ENS, privileged requests are allowed."""

    pscid: int
    supervisor: bool
    stage1: riscv.Config | None


def lookup(memory: Reader, config: Config, process: int) -> Entry | Fault:
    """The process context of a process_id."""
    if process >> (8, 17, 20)[config.levels - 1]:
        return Fault(Reason.ADDRESS_WIDTH, 0)
    pdi = (bits(process, 7, 0), bits(process, 16, 8), bits(process, 19, 17))
    # 1. a = pdtp.PPN x 4096, i = LEVELS - 1.
    a = config.root
    for i in range(config.levels - 1, 0, -1):
        # 2. to 6. A non-leaf entry.
        address = a + pdi[i] * 8
        entry = memory.read64(address)
        if entry is None:
            return Fault(Reason.TABLE_ACCESS, i + 1, address)
        # 7., 8. V, then reserved bits.
        if not entry & V:
            return Fault(Reason.NOT_PRESENT, i + 1, address, entry)
        if bits(entry, 9, 1) or bits(entry, 63, 54):
            return Fault(Reason.RESERVED_BITS, i + 1, address, entry)
        # 9. One level down.
        a = bits(entry, 53, 10) << 12
    # 10. The process context, two words.
    address = a + pdi[0] * 16
    ta, fsc = memory.read64(address), memory.read64(address + 8)
    if ta is None or fsc is None:
        return Fault(Reason.TABLE_ACCESS, 1, address)
    # 11. V.
    if not ta & V:
        return Fault(Reason.NOT_PRESENT, 1, address, ta)
    # 12. Reserved bits, and a mode that is neither Bare nor Sv39, Sv48, Sv57.
    mode = bits(fsc, 63, 60)
    if bits(ta, 11, 3) or bits(ta, 63, 32) or bits(fsc, 59, 44) or (mode and mode not in LEVELS):
        return Fault(Reason.RESERVED_BITS, 1, address, ta)
    # 13. Found.
    stage1 = None
    if mode:
        root = bits(fsc, 43, 0) << 12
        stage1 = riscv.Config(root, LEVELS[mode], hardware_ad=config.hardware_ad, sum=bool(ta >> 2 & 1))
    return Entry(bits(ta, 31, 12), bool(ta >> 1 & 1), stage1)


class Builder:
    """Builds one process directory."""

    def __init__(self, memory: Memory, region: Region, levels: int = 1) -> None:
        self.memory, self.region, self.levels = memory, region, levels
        self.root = region.allocate(4096)
        self.tables: dict[tuple[int, int], int] = {}

    def slot(self, process: int) -> int:
        """Address of the 16-byte process context."""
        table = self.root
        for shift in (17, 8)[3 - self.levels :]:
            key = (shift, process >> shift)
            if key not in self.tables:
                self.tables[key] = self.region.allocate(4096)
                index = (process >> shift) & (7 if shift == 17 else 511)
                self.memory.write64(table + index * 8, (self.tables[key] >> 2) | 1)
            table = self.tables[key]
        return table + (process & 255) * 16

    def set(self, process: int, *, pscid: int, root: int = 0, mode: int = 8, flags: int = 1) -> None:
        """Fills a process context. mode: fsc.MODE (0, 8, 9, 10); flags: ta bits 2:0 (V, ENS, SUM)."""
        slot = self.slot(process)
        self.memory.write64(slot, flags | (pscid << 12))
        self.memory.write64(slot + 8, (root >> 12) | (mode << 60))

    def config(self, *, hardware_ad: bool = False) -> Config:
        """What the device context says."""
        return Config(self.root, self.levels, hardware_ad)
