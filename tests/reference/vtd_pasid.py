"""VT-d scalable-mode PASID directory and PASID table.

Intel VT-d 3.4.3 (hierarchy), 9.5 (PASID directory entry), 9.6 (PASID table entry), 9.4 (context entry: PASIDDIRPTR,
PDTS), 7.1 (fault conditions SPD, SPT). PASID 19:6 indexes the directory (8-byte entries, 2^(PDTS + 7) of them), 5:0
the table (64-byte entries).

unspecified: several faults at once; here present, reserved bits, then the encodings in the order PGTT, AW, FSPM. Of the
reserved bits those are checked that no revision since 3.0 gave a meaning. An illegal PGTT is RESERVED_BITS, an illegal
AW or FSPM BAD_LEVEL.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from . import vtd_second_stage, x86
from .common import Fault, Reader, Reason, bits, mask
from .memory import Memory, Region

PRESENT = 1 << 0


class Type(Enum):
    """PGTT, PASID granular translation type."""

    FIRST_STAGE = 1
    SECOND_STAGE = 2
    NESTED = 3
    PASS_THROUGH = 4


@dataclass(frozen=True, slots=True)
class Config:
    """`directory`: PASIDDIRPTR; `pdts`: its size, 2^(pdts + 7) entries. `pa_bits`: host address width."""

    directory: int
    pdts: int = 7
    pa_bits: int = 52

    def __post_init__(self) -> None:
        if self.pdts not in range(8) or self.directory % 4096:
            raise ValueError(f"PDTS is 0 to 7 and the PASID directory 4 KiB aligned, not {self}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A PASID-table entry, decoded: what to walk with."""

    type: Type
    domain: int
    first: x86.Config | None
    second: vtd_second_stage.Config | None
    supervisor_requests: bool


def lookup(memory: Reader, config: Config, pasid: int) -> Entry | Fault:
    """The entry of a PASID (20 bits). Levels in faults: 2 the directory, 1 the table."""
    # 1. The PASID fits the directory.
    if pasid >> min(config.pdts + 13, 20):
        return Fault(Reason.ADDRESS_WIDTH, 0)
    # 2. The directory entry: P 0, FPD 1, 11:2 reserved, table pointer 63:12.
    address = config.directory + 8 * bits(pasid, 19, 6)
    entry = memory.read64(address)
    if entry is None:
        return Fault(Reason.TABLE_ACCESS, 2, address)
    if not entry & PRESENT:
        return Fault(Reason.NOT_PRESENT, 2, address, entry)
    if entry & (mask(11, 2) | mask(63, config.pa_bits)):
        return Fault(Reason.RESERVED_BITS, 2, address, entry)
    # 3. The table entry, eight words of which the first three matter; P is bit 0 of the first.
    address = (entry & mask(63, 12)) + 64 * bits(pasid, 5, 0)
    words = [memory.read64(address + 8 * i) for i in range(3)]
    if words[0] is None or words[1] is None or words[2] is None:
        return Fault(Reason.TABLE_ACCESS, 1, address)
    if not words[0] & PRESENT:
        return Fault(Reason.NOT_PRESENT, 1, address, words[0])
    return _decode(config, address, words[0], words[1], words[2])


def _decode(config: Config, address: int, low: int, middle: int, high: int) -> Entry | Fault:
    """A present table entry: AW 4:2, PGTT 8:6, SSADE 9, SSPTPTR 63:12; DID 15:0 of the second word; in the third SRE 0,
    FSPM 3:2, WPE 4, NXE 5, FSPTPTR 63:12."""
    # 4. Reserved: 11:10, and pointer bits above the host address width.
    if low & (mask(11, 10) | mask(63, config.pa_bits)) or high & mask(63, config.pa_bits):
        return Fault(Reason.RESERVED_BITS, 1, address, low)
    # 5. PGTT, then AW for a second stage, then FSPM for a first.
    if bits(low, 8, 6) not in (1, 2, 3, 4):
        return Fault(Reason.RESERVED_BITS, 1, address, low)
    kind = Type(bits(low, 8, 6))
    first = second = None
    if kind in (Type.SECOND_STAGE, Type.NESTED):
        if bits(low, 4, 2) not in (1, 2, 3):
            return Fault(Reason.BAD_LEVEL, 1, address, low)
        second = vtd_second_stage.Config(
            low & mask(63, 12), bits(low, 4, 2) + 2, config.pa_bits, access_dirty=bool(low >> 9 & 1)
        )
    if kind in (Type.FIRST_STAGE, Type.NESTED):
        if bits(high, 3, 2) not in (0, 1):
            return Fault(Reason.BAD_LEVEL, 1, address, low)
        first = x86.Config(
            high & mask(63, 12),
            bits(high, 3, 2) + 4,
            pa_bits=config.pa_bits,
            write_protect=bool(high >> 4 & 1),
            xd=x86.Xd.HONOURED if high >> 5 & 1 else x86.Xd.IGNORED,
        )
    return Entry(kind, bits(middle, 15, 0), first, second, bool(high & 1))


class Builder:
    """Builds a PASID directory and its tables."""

    def __init__(self, memory: Memory, region: Region, pdts: int = 7) -> None:
        self.memory, self.region, self.pdts = memory, region, pdts
        self.directory = region.allocate(max(8 << (pdts + 7), 4096))
        self.tables: dict[int, int] = {}

    def slot(self, pasid: int) -> int:
        """Address of the PASID's 64-byte entry."""
        if pasid >> 6 not in self.tables:
            self.tables[pasid >> 6] = self.region.allocate(4096)
            self.memory.write64(self.directory + (pasid >> 6) * 8, self.tables[pasid >> 6] | 1)
        return self.tables[pasid >> 6] + pasid % 64 * 64

    def set(
        self,
        pasid: int,
        *,
        domain: int,
        first: tuple[int, int] | None = None,
        second: tuple[int, int] | None = None,
        write_protect: bool = True,
    ) -> None:
        """Fills an entry. first, second: (root, levels) of the trees; both: nested; none: pass-through."""
        low = 1 | ((4 if (first, second) == (None, None) else (first is not None) + 2 * (second is not None)) << 6)
        high = (write_protect << 4) | (1 << 5) | 1
        if second is not None:
            low |= second[0] | ((second[1] - 2) << 2)
        if first is not None:
            high |= first[0] | ((first[1] - 4) << 2)
        slot = self.slot(pasid)
        for i, word in enumerate((low, domain, high)):
            self.memory.write64(slot + 8 * i, word)

    def config(self) -> Config:
        """What the context entry says."""
        return Config(self.directory, self.pdts)
