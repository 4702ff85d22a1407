"""SMMUv3 context descriptors: SubstreamID -> stage-1 configuration; linear, 2-level with 4 KiB or 64 KiB leaves.

SMMUv3 (IHI 0070) 5.2 (STE S1Fmt, S1ContextPtr, S1CDMax), 5.3 (level 1 context descriptor), 5.4 (context descriptor),
5.4.1 (what makes a CD illegal). A CD has 64 bytes; a level-1 descriptor 8: V 0, L2Ptr 51:12.

Illegal CDs (C_BAD_CD) are RESERVED_BITS; a SubstreamID out of range ADDRESS_WIDTH; V clear NOT_PRESENT. Levels in
faults: 2 the level-1 table, 1 the CD. unspecified: the order among causes of C_BAD_CD, which are one event.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arm_lpae import Stage1, Tables
from .common import Fault, Reader, Reason, bits, mask
from .memory import Memory, Region

VALID = 1 << 31
GRANULE0 = {0: 12, 1: 16, 2: 14}  # TG0
GRANULE1 = {2: 12, 3: 16, 1: 14}  # TG1
PA_BITS = (32, 36, 40, 42, 44, 48, 52)  # IPS


@dataclass(frozen=True, slots=True)
class Config:
    """`split`: log2 of the CDs in a leaf table, 6 (4 KiB) or 10 (64 KiB); 0 means linear. `max_bits`: S1CDMax.

    `oas`: output address size of the SMMU, which bounds IPS; 52 has 52-bit descriptors.
    """

    root: int
    split: int = 0
    max_bits: int = 0
    oas: int = 52

    def __post_init__(self) -> None:
        if self.split not in (0, 6, 10) or self.max_bits not in range(21) or self.root % 64:
            raise ValueError(f"CD tables are linear or split at 6 or 10 of at most 20 bits, not {self}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A context descriptor, decoded."""

    asid: int
    stage1: Stage1


def lookup(memory: Reader, config: Config, substream: int) -> Entry | Fault:
    """The context descriptor of a SubstreamID."""
    # 1. The SubstreamID fits S1CDMax.
    if substream >> config.max_bits:
        return Fault(Reason.ADDRESS_WIDTH, 0)
    # 2. Two levels: the level-1 descriptor. Its reserved bits are ignored.
    base, index = config.root, substream
    if config.split:
        address = config.root + 8 * (substream >> config.split)
        entry = memory.read64(address)
        if entry is None:
            return Fault(Reason.TABLE_ACCESS, 2, address)
        if not entry & 1:
            return Fault(Reason.NOT_PRESENT, 2, address, entry)
        base, index = entry & mask(51, 12), bits(substream, config.split - 1, 0)
    # 3. The CD, eight words of which the first three matter.
    address = base + 64 * index
    words = [memory.read64(address + 8 * i) for i in range(3)]
    if words[0] is None or words[1] is None or words[2] is None:
        return Fault(Reason.TABLE_ACCESS, 1, address)
    if not words[0] & VALID:
        return Fault(Reason.NOT_PRESENT, 1, address, words[0])
    return _decode(config, address, words[0], words[1], words[2])


def _decode(config: Config, address: int, cd: int, word1: int, word2: int) -> Entry | Fault:
    """A valid CD: T0SZ 5:0, TG0 7:6, EPD0 14, ENDI 15, T1SZ 21:16, TG1 23:22, EPD1 30, IPS 34:32, AFFD 35, TBI 39:38,
    AA64 41, HD 42, HA 43, ASID 63:48; TTB0 in the second word, TTB1 in the third, HADn in bit 1 of each."""
    illegal = Fault(Reason.RESERVED_BITS, 1, address, cd)
    ips = bits(cd, 34, 32)
    if not cd >> 41 & 1 or cd >> 15 & 1 or ips >= len(PA_BITS):
        return illegal  # AArch32 and big-endian tables are not modelled
    pa_bits = min(PA_BITS[ips], config.oas)
    hd, ha = bool(cd >> 42 & 1), bool(cd >> 43 & 1)
    ranges: list[Tables | None] = []
    for word, low, granules, disabled in ((word1, 0, GRANULE0, cd >> 14 & 1), (word2, 16, GRANULE1, cd >> 30 & 1)):
        if disabled:
            ranges.append(None)
            continue
        granule = granules.get(bits(cd, low + 7, low + 6))
        root = word & mask(51, 4)
        if granule is None or root >> pa_bits:
            return illegal
        upper = bool(low)
        try:
            tables = Tables(
                root,
                64 - bits(cd, low + 5, low),
                granule,
                tbi=bool(cd >> (39 if upper else 38) & 1),
                hierarchical=not word >> 1 & 1,
            )
        except ValueError:
            return illegal  # TnSZ out of range, or the root not aligned to its table
        ranges.append(tables)
    if hd and not ha:
        return illegal
    affd, lpa = bool(cd >> 35 & 1), config.oas == 52
    return Entry(bits(cd, 63, 48), Stage1(ranges[0], ranges[1], pa_bits, ha, hd, affd, lpa))


class Builder:
    """Builds a CD table; split as in Config."""

    def __init__(self, memory: Memory, region: Region, split: int = 0, max_bits: int = 0) -> None:
        self.memory, self.region, self.split, self.max_bits = memory, region, split, max_bits
        self.root = region.allocate(max(8 << (max_bits - split), 64) if split else 64 << max_bits)
        self.tables: dict[int, int] = {}

    def slot(self, substream: int) -> int:
        """Address of the SubstreamID's CD."""
        if not self.split:
            return self.root + substream * 64
        group, index = divmod(substream, 64 if self.split == 6 else 1024)
        if group not in self.tables:
            self.tables[group] = self.region.allocate(4096 if self.split == 6 else 65536)
            self.memory.write64(self.root + group * 8, self.tables[group] | 1)
        return self.tables[group] + index * 64

    def set(self, substream: int, *, asid: int, root: int, t0sz: int, granule: int = 12, ips: int = 5) -> None:
        """A CD with TTBR0 only."""
        tg0 = {12: 0, 16: 1, 14: 2}[granule]
        word = t0sz | (tg0 << 6) | (1 << 30) | (1 << 31) | (ips << 32) | (1 << 41) | (asid << 48)
        slot = self.slot(substream)
        self.memory.write64(slot, word)
        self.memory.write64(slot + 8, root)

    def config(self) -> Config:
        """What the stream-table entry says."""
        return Config(self.root, self.split, self.max_bits)
