"""Arm VMSAv8-64 tables as an SMMUv3 walks them: stage 1 (two ranges), stage 2; granules 4K, 16K, 64K; 48 and 52 bits.

Arm ARM D8.2 (translation process, granules, start levels, concatenated tables), D8.3 (descriptor formats), D8.4
(permissions, hierarchical permissions), D8.5 (hardware update of access flag and dirty state), D8.15/D8.16 (faults and
their priority within a stage: translation, address size, access flag, permission). SMMUv3 5.2 (STE S2*), 5.4 (CD).
Without LPA2: 52-bit addresses exist with the 64K granule only.

RES0 bits of a descriptor are ignored, and so is the part of a block's address below its size: RESERVED_BITS and
MISALIGNED never occur. A descriptor type that a level does not have is a translation fault in the specification; here
it is BAD_LEVEL, to tell it from an invalid descriptor (NOT_PRESENT). EPDn is NOT_PRESENT at level 0.
unspecified: whether a permission fault sets the access flag (constrained unpredictable): told in `may_update`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .building import Builder as _Builder
from .common import RWX, Access, Fault, Kind, Perms, Reader, Reason, Result, Update, bits, mask, merge
from .memory import Memory, Region

AF, DBM = 1 << 10, 1 << 51
NOT_WRITABLE, S2_WRITABLE = 1 << 7, 1 << 7  # AP[2] of stage 1, S2AP[1] of stage 2


@dataclass(frozen=True, slots=True)
class Tables:
    """One tree: TTBR0, TTBR1 or the stage-2 root.

    granule: log2 of the page size (12, 14, 16). input_bits: 64 - TnSZ. start: Arm level of the root, None for what
    stage 1 derives from input_bits. tbi: bits 63:56 are ignored. hierarchical: table attributes count (not HADn).
    """

    root: int
    input_bits: int
    granule: int = 12
    start: int | None = None
    tbi: bool = False
    hierarchical: bool = True

    def __post_init__(self) -> None:
        if self.granule not in (12, 14, 16):
            raise ValueError(f"granules are 2^12, 2^14 and 2^16 bytes, not 2^{self.granule}")
        if not 16 <= self.input_bits <= (52 if self.granule == 16 else 48):
            raise ValueError(f"{self.input_bits} input bits do not suit the granule 2^{self.granule}")
        # D8.2: stage 2 may join up to 16 root tables, so that the root is indexed by up to 4 bits more than a table.
        extra = self.input_bits - (self.shift(self.first) + self.stride)
        if self.first not in (0, 1, 2, 3) or not -self.stride < extra <= (0 if self.start is None else 4):
            raise ValueError(f"level {self.start} is no start for {self.input_bits} bits, granule 2^{self.granule}")
        if self.root % (8 << (self.input_bits - self.shift(self.first))):
            raise ValueError(f"root {self.root:#x} is not aligned to the size of its table")

    @property
    def stride(self) -> int:
        """Bits that one table resolves."""
        return self.granule - 3

    @property
    def first(self) -> int:
        """Arm level of the root."""
        return 4 - -(-(self.input_bits - self.granule) // self.stride) if self.start is None else self.start

    def shift(self, arm_level: int) -> int:
        """Log2 of the bytes that one entry covers."""
        return self.granule + (3 - arm_level) * self.stride


@dataclass(frozen=True, slots=True)
class Stage1:
    """`ha`, `hd`: hardware sets the access flag, the dirty state. `affd`: a clear access flag is no fault.

    `pa_bits`: output size in force (IPS). `lpa`: the SMMU has 52 output bits (OAS), whatever is in force.
    """

    ttbr0: Tables | None
    ttbr1: Tables | None = None
    pa_bits: int = 48
    ha: bool = False
    hd: bool = False
    affd: bool = False
    lpa: bool = False

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Stage2:
    """`xnx`: XN has two bits, one each for privileged and user code (FEAT_XNX, IDR3.XNX)."""

    tables: Tables
    pa_bits: int = 48
    ha: bool = False
    hd: bool = False
    affd: bool = False
    xnx: bool = True
    lpa: bool = False

    def __post_init__(self) -> None:
        _check(self)


def _check(config: Stage1 | Stage2) -> None:
    if config.hd and not config.ha:
        raise ValueError("hardware dirty state needs hardware access flags (HD needs HA)")
    if config.pa_bits > 48 and not config.lpa:
        raise ValueError(f"{config.pa_bits} output bits need an SMMU that has 52 (lpa)")


@dataclass(frozen=True, slots=True)
class _Leaf:
    """What the descent found: the leaf descriptor, and the ORed attributes 63:59 of the tables above it."""

    descriptor: int
    address: int
    arm_level: int
    output: int
    table_attributes: int

    def fault(self, reason: Reason, may_update: tuple[Update, ...] = ()) -> Fault:
        """A fault found at this leaf."""
        return Fault(reason, 4 - self.arm_level, self.address, self.descriptor, may_update)


def _output(descriptor: int, low: int, wide: bool) -> int:
    """Address bits 51:low of a descriptor; bits 51:48 stand in 15:12, if anywhere."""
    address = descriptor & mask(47, low)
    return address | (bits(descriptor, 15, 12) << 48 if wide else 0)


def _block_levels(tables: Tables, lpa: bool) -> tuple[int, ...]:
    """Arm levels that have block descriptors: 4K 1 and 2, 16K 2, 64K 2 and, in an SMMU of 52 bits, 1 (D8.3)."""
    if tables.granule == 12:
        return (1, 2)
    return (1, 2) if tables.granule == 16 and lpa else (2,)


def _descend(memory: Reader, tables: Tables, config: Stage1 | Stage2, ia: int) -> _Leaf | Fault:
    """D8.2: from the root to a block or page descriptor, output address checked."""
    table = tables.root
    attributes = 0
    for arm_level in range(tables.first, 4):
        level = 4 - arm_level
        # 1. The descriptor. The root's index takes all input bits that are left.
        shift = tables.shift(arm_level)
        top = tables.input_bits - 1 if arm_level == tables.first else shift + tables.stride - 1
        address = table + 8 * bits(ia, top, shift)
        descriptor = memory.read64(address)
        if descriptor is None:
            return Fault(Reason.TABLE_ACCESS, level, address)
        # 2. Bit 0: valid.
        if not descriptor & 1:
            return Fault(Reason.NOT_PRESENT, level, address, descriptor)
        # 3. Bit 1: table or page; clear: block, which few levels have.
        block = not descriptor & 2
        if block and arm_level not in _block_levels(tables, config.lpa):
            return Fault(Reason.BAD_LEVEL, level, address, descriptor)
        leaf = block or arm_level == 3
        # 4. The output address fits the physical address size.
        output = _output(descriptor, shift if leaf else tables.granule, config.lpa and tables.granule == 16)
        if output >> config.pa_bits:
            return Fault(Reason.ADDRESS_WIDTH, level, address, descriptor)
        if leaf:
            return _Leaf(descriptor, address, arm_level, output, attributes)
        attributes |= descriptor & mask(63, 59) if tables.hierarchical else 0
        table = output
    raise AssertionError("level 3 has no tables")


def walk_stage1(memory: Reader, config: Stage1, iova: int, access: Access) -> Result | Fault:
    """Translates `iova` (64 bits) for one access by TTBR0 or TTBR1."""
    # 1. Bit 55 chooses the range; the bits above its size all equal bit 55, but for a byte that TBI ignores.
    upper_range = bool(iova >> 55 & 1)
    tables = config.ttbr1 if upper_range else config.ttbr0
    if tables is None:
        return Fault(Reason.NOT_PRESENT, 0)
    top = 55 if tables.tbi else 63
    if bits(iova, top, tables.input_bits) != (mask(top - tables.input_bits, 0) if upper_range else 0):
        return Fault(Reason.ADDRESS_WIDTH, 0)

    # 2. The walk.
    leaf = _descend(memory, tables, config, bits(iova, tables.input_bits - 1, 0))
    if isinstance(leaf, Fault):
        return leaf
    d = leaf.descriptor

    # 3. Access flag.
    if not d & AF and not config.ha and not config.affd:
        return leaf.fault(Reason.ACCESS_FLAG)
    access_update = [Update(leaf.address, AF)] if config.ha and not d & AF else []

    # 4. Permissions: AP[2:1], with DBM counting as writable, then what the tables above take away (APTable).
    writable = not d & NOT_WRITABLE or (config.hd and bool(d & DBM))
    user_access = bool(d >> 6 & 1)
    no_user, read_only = leaf.table_attributes >> 61 & 1, leaf.table_attributes >> 62 & 1
    user_read = user_access and not no_user
    write = writable and not read_only
    user_write = write and user_read
    user_execute = not (d >> 54 & 1 or leaf.table_attributes >> 60 & 1)
    # Code that user requests can write is never executed with privilege.
    privileged_execute = not (d >> 53 & 1 or leaf.table_attributes >> 59 & 1) and not user_write
    if access.privileged:
        allowed = {Kind.READ: True, Kind.WRITE: write, Kind.EXECUTE: privileged_execute}
    else:
        allowed = {Kind.READ: user_read, Kind.WRITE: user_write, Kind.EXECUTE: user_execute}
    if not allowed[access.kind]:
        return leaf.fault(Reason.PERMISSION, merge(access_update))

    # 5. Hardware update: AF, and AP[2] cleared by a write through DBM.
    if access.kind is Kind.WRITE and config.hd and d & DBM and d & NOT_WRITABLE:
        access_update.append(Update(leaf.address, 0, NOT_WRITABLE))
    return _result(leaf, tables, iova, allowed=allowed, user=user_read, updates=access_update)


def walk_stage2(memory: Reader, config: Stage2, iova: int, access: Access) -> Result | Fault:
    """Translates `iova` (an intermediate physical address) for one access."""
    # 1. The address fits the input size.
    tables = config.tables
    if iova >> tables.input_bits:
        return Fault(Reason.ADDRESS_WIDTH, 0)

    # 2. The walk; stage 2 tables have no attributes for what is below them.
    leaf = _descend(memory, tables, config, iova)
    if isinstance(leaf, Fault):
        return leaf
    d = leaf.descriptor

    # 3. Access flag.
    if not d & AF and not config.ha and not config.affd:
        return leaf.fault(Reason.ACCESS_FLAG)
    access_update = [Update(leaf.address, AF)] if config.ha and not d & AF else []

    # 4. Permissions: S2AP[0] read, S2AP[1] write or DBM; XN 54:53; what cannot be read cannot be executed.
    read = bool(d >> 6 & 1)
    write = bool(d & S2_WRITABLE) or (config.hd and bool(d & DBM))
    if config.xnx:
        execute = read and bits(d, 54, 53) in ((0, 3) if access.privileged else (0, 1))
    else:
        execute = read and not d >> 54 & 1
    allowed = {Kind.READ: read, Kind.WRITE: write, Kind.EXECUTE: execute}
    if not allowed[access.kind]:
        return leaf.fault(Reason.PERMISSION, merge(access_update))

    # 5. Hardware update: AF, and S2AP[1] set by a write through DBM.
    if access.kind is Kind.WRITE and config.hd and d & DBM and not d & S2_WRITABLE:
        access_update.append(Update(leaf.address, S2_WRITABLE))
    return _result(leaf, tables, iova, allowed=allowed, user=True, updates=access_update)


def _result(
    leaf: _Leaf, tables: Tables, iova: int, *, allowed: dict[Kind, bool], user: bool, updates: list[Update]
) -> Result:
    """The translation by a leaf that allows the access."""
    shift = tables.shift(leaf.arm_level)
    output = leaf.output | bits(iova, shift - 1, 0)
    return Result(
        output, 1 << shift, allowed[Kind.READ], allowed[Kind.WRITE], allowed[Kind.EXECUTE], user, merge(updates)
    )


class Builder(_Builder):
    """One tree of either stage. `joined`: log2 of the root tables that stage 2 joins, 0 to 4.

    upper: a TTBR1 tree. dbm: leaves have DBM, and are not writable until hardware makes them so. preset: AF set.
    """

    def __init__(
        self,
        memory: Memory,
        region: Region,
        granule: int = 12,
        input_bits: int = 48,
        *,
        stage: int = 1,
        joined: int = 0,
        upper: bool = False,
        pa_bits: int = 48,
        dbm: bool = False,
        preset: bool = True,
    ) -> None:
        self.granule, self.input_bits, self.stage, self.upper = granule, input_bits, stage, upper
        self.pa_bits, self.dbm, self.preset = pa_bits, dbm, preset
        index_bits = input_bits - granule - joined
        self.levels = (index_bits + granule - 4) // (granule - 3)
        self.table_bytes = 1 << granule
        self.root_bytes = max(8 << (input_bits - self.shift(self.levels)), 64)
        by_granule = {12: (30, 21, 12), 14: (25, 14), 16: (42, 29, 16) if pa_bits == 52 else (29, 16)}
        self.sizes = tuple(1 << s for s in by_granule[granule] if s <= self.shift(self.levels))
        super().__init__(memory, region)

    def shift(self, level: int) -> int:
        return self.granule + (level - 1) * (self.granule - 3)

    def extend(self, raw: int) -> int:
        return raw | ((1 << 64) - (1 << self.input_bits)) if self.upper else raw

    def _address(self, address: int) -> int:
        return (address & 0xFFFF_FFFF_FFFF) | (address >> 48 << 12)

    def table_entry(self, level: int, address: int) -> int:
        return self._address(address) | 3

    def leaf_entry(self, level: int, oa: int, perms: Perms = RWX, size: int | None = None) -> int:
        entry = self._address(oa) | (3 if level == 1 else 1) | (0x400 if self.preset else 0)
        if self.dbm and perms.write:
            entry |= 1 << 51
        if self.stage == 1:
            entry |= (0x40 * perms.user) | (0 if perms.write and not self.dbm else 0x80)
            return entry | (0 if perms.execute and perms.user else 1 << 54) | (0 if perms.execute else 1 << 53)
        entry |= (0x40 * perms.read) | (0x80 if perms.write and not self.dbm else 0)
        return entry | (0 if perms.execute else 2 << 53)

    def tables_config(self, **changes: Any) -> Tables:
        """The tree alone, for a configuration of two ranges."""
        start = None if self.stage == 1 else 4 - self.levels
        return replace(Tables(self.root, self.input_bits, self.granule, start), **changes)

    def config(self, **changes: Any) -> Stage1 | Stage2:
        flags = {"pa_bits": self.pa_bits, "lpa": self.pa_bits == 52, "ha": self.dbm, "hd": self.dbm}
        if self.stage == 2:
            return replace(Stage2(self.tables_config()), **(flags | changes))
        if self.upper:
            return replace(Stage1(None, self.tables_config()), **(flags | changes))
        return replace(Stage1(self.tables_config()), **(flags | changes))
