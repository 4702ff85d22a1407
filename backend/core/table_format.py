"""Page-table formats and their options, as `Core.bind_table` and `Core.create_host_space` take them.

Levels: 1 holds the smallest leaves, the root stands at `levels`. What an option does is said by the specification that
the format's header (formats/*.h) names. An option that a format does not have cannot be asked for; a combination that
no hardware has is refused by the core with BadValueError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar

from backend.core._native import ffi, lib
from backend.core.errors import BadValueError
from backend.core.native import address, small

FLAGS: Mapping[str, tuple[bool, tuple[str, ...]]] = MappingProxyType(
    {
        "accessed": (True, ("ACCESSED",)),
        "dirty": (True, ("DIRTY",)),
        "accessed_dirty": (True, ("ACCESSED", "DIRTY")),
        "sign_extended": (False, ("UNSIGNED",)),
        "large_leaves": (False, ("NO_2M",)),
        "gigabyte_leaves": (False, ("NO_1G",)),
        "write_protect": (False, ("WRITE_ANY",)),
        "smep": (True, ("SMEP",)),
        "snoop_control": (False, ("NO_SNOOP",)),
        "execute_only": (False, ("NO_EXECUTE_ONLY",)),
        "execute_modes": (True, ("EXECUTE_MODES",)),
        "large_output": (True, ("LARGE_OUTPUT",)),
        "access_faults": (False, ("NO_ACCESS_FAULT",)),
        "two_xn": (False, ("ONE_XN",)),
        "user_memory": (True, ("SUM",)),
        "svnapot": (False, ("NO_NAPOT",)),
        "svpbmt": (False, ("NO_PBMT",)),
        "svrsw60t59b": (True, ("RSW",)),
    }
)
"""Of an option, whatever format has it: the value that the core is told of, and the VIO_TABLE_* that tell it."""


def _flags(*names: str) -> int:
    flags = 0
    for name in names:
        flags |= getattr(lib, f"VIO_TABLE_{name}")
    return flags


def flags_of(options: Any) -> int:
    """The VIO_TABLE_* of a format's options, of tables or of PASID tables."""
    flags = 0
    for each in dataclasses.fields(options):
        if each.name in FLAGS:
            when, names = FLAGS[each.name]
            flags |= _flags(*names) if bool(getattr(options, each.name)) == when else 0
    return flags


@dataclass(frozen=True, slots=True)
class TableFormat:
    """A format with all that is to be known to read a table, but for where it lies."""

    name: ClassVar[str]
    """As in the core's list of formats."""

    def fields(self, root: int) -> dict[str, Any]:
        """The vio_table of a table at `root`."""
        told: dict[str, Any] = {"flags": flags_of(self)}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name == "output_bits":
                told["output_bits"] = value
            elif each.name == "levels":
                told["tree"] = {"root": root, "levels": value}
        return told


@dataclass(frozen=True, slots=True)
class AmdV1(TableFormat):
    """AMD IOMMU host tables. `accessed`, `dirty`: DTE.HAD bits 0 and 1; its value 2, dirty alone, is reserved."""

    name: ClassVar[str] = "amd-v1"
    levels: int = 4
    accessed: bool = False
    dirty: bool = False


class ExecuteDisable(Enum):
    """What bit 63 of an x86 entry means (EFER.NXE, VT-d NXE, AMD NXSup)."""

    HONOURED = 0
    IGNORED = lib.VIO_TABLE_XD_IGNORED
    RESERVED = lib.VIO_TABLE_XD_RESERVED


@dataclass(frozen=True, slots=True)
class X86(TableFormat):
    """x86-64 tables: VT-d first stage, AMD IOMMU guest (v2) tables.

    sign_extended: addresses are canonical; AMD requests of PASID 0 are unsigned. output_bits: host address width.
    write_protect: CR0.WP, WPE. smep: no privileged execution of user pages.
    """

    name: ClassVar[str] = "x86"
    levels: int = 4
    sign_extended: bool = True
    output_bits: int = 52
    gigabyte_leaves: bool = True
    write_protect: bool = True
    execute_disable: ExecuteDisable = ExecuteDisable.HONOURED
    smep: bool = False

    def fields(self, root: int) -> dict[str, Any]:
        told = super(X86, self).fields(root)
        return {**told, "flags": told["flags"] | self.execute_disable.value}


@dataclass(frozen=True, slots=True)
class VtdSecondStage(TableFormat):
    """VT-d second-stage tables. output_bits: HAW. accessed_dirty: SSADE. snoop_control: ECAP.SC."""

    name: ClassVar[str] = "vtd-second-stage"
    levels: int = 4
    output_bits: int = 52
    accessed_dirty: bool = False
    large_leaves: bool = True
    gigabyte_leaves: bool = True
    snoop_control: bool = True


@dataclass(frozen=True, slots=True)
class Ept(TableFormat):
    """EPT. output_bits: MAXPHYADDR. accessed_dirty: EPTP bit 6. execute_modes: mode-based execute control."""

    name: ClassVar[str] = "ept"
    levels: int = 4
    output_bits: int = 52
    accessed_dirty: bool = False
    execute_only: bool = True
    execute_modes: bool = False
    large_leaves: bool = True
    gigabyte_leaves: bool = True


@dataclass(frozen=True, slots=True)
class ArmTree:
    """One Arm tree: TTBR0, TTBR1, or that of stage 2.

    input_bits: 64 - TnSZ. granule: bytes of a page, 4096, 16384 or 65536. levels: None for the fewest that cover the
    input; stage 2 may have one less, with up to 16 root tables joined. ignore_top_byte: TBI. hierarchical: attributes
    of tables count (HADn clear). root: of TTBR1; that of the other trees is given to `Core.bind_table`.
    """

    input_bits: int = 48
    granule: int = 4096
    levels: int | None = None
    ignore_top_byte: bool = False
    hierarchical: bool = True
    root: int = 0

    def fields(self, root: int) -> dict[str, int]:
        """The vio_tree of a table at `root`."""
        granule = self.granule.bit_length() - 1
        levels = self.levels
        if levels is None:
            levels = -(-(self.input_bits - granule) // max(granule - 3, 1))
        return {"root": root, "levels": levels, "input_bits": self.input_bits, "granule": granule}


@dataclass(frozen=True, slots=True)
class ArmStage1(TableFormat):
    """Arm VMSAv8-64 stage 1, as an SMMUv3 walks it.

    lower, upper: TTBR0 and TTBR1; None: disabled (EPDn). output_bits: IPS. large_output: the SMMU has 52 output bits.
    accessed, dirty: HA, HD. access_faults: a clear access flag is a fault where hardware does not set it (AFFD clear).
    """

    name: ClassVar[str] = "arm-s1"
    lower: ArmTree | None = field(default_factory=ArmTree)
    upper: ArmTree | None = None
    output_bits: int = 48
    large_output: bool = False
    accessed: bool = False
    dirty: bool = False
    access_faults: bool = True

    def fields(self, root: int) -> dict[str, Any]:
        told = super(ArmStage1, self).fields(root)
        for prefix, tree in (("", self.lower), ("UPPER_", self.upper)):
            if tree is not None:
                told["flags"] |= _flags(f"{prefix}TOP_BYTE") if tree.ignore_top_byte else 0
                told["flags"] |= 0 if tree.hierarchical else _flags(f"{prefix}FLAT")
        none = {"levels": 0}
        lower = self.lower.fields(root) if self.lower else none
        return {**told, "tree": lower, "upper": self.upper.fields(self.upper.root) if self.upper else none}


@dataclass(frozen=True, slots=True)
class ArmStage2(TableFormat):
    """Arm VMSAv8-64 stage 2. Options as in ArmStage1; two_xn: XN has two bits (FEAT_XNX)."""

    name: ClassVar[str] = "arm-s2"
    tree: ArmTree = field(default_factory=ArmTree)
    output_bits: int = 48
    large_output: bool = False
    accessed: bool = False
    dirty: bool = False
    access_faults: bool = True
    two_xn: bool = True

    def fields(self, root: int) -> dict[str, Any]:
        return {**super(ArmStage2, self).fields(root), "tree": self.tree.fields(root)}


@dataclass(frozen=True, slots=True)
class RiscV(TableFormat):
    """RISC-V Sv39, Sv48, Sv57 (3, 4, 5 levels).

    accessed_dirty: hardware sets A and D (SADE), else one that is wanted and clear is a fault. user_memory: privileged
    reads and writes may touch user pages (SUM). svrsw60t59b: bits 60:59 are software's.
    """

    name: ClassVar[str] = "riscv"
    levels: int = 3
    accessed_dirty: bool = False
    user_memory: bool = False
    svnapot: bool = True
    svpbmt: bool = True
    svrsw60t59b: bool = False


@dataclass(frozen=True, slots=True)
class RiscVSecondStage(TableFormat):
    """RISC-V Sv39x4, Sv48x4, Sv57x4. Options as in RiscV; accessed_dirty: GADE."""

    name: ClassVar[str] = "riscv-x4"
    levels: int = 3
    accessed_dirty: bool = False
    svnapot: bool = True
    svpbmt: bool = True
    svrsw60t59b: bool = False


def table_of(fmt: TableFormat | str, root: int, levels: int) -> tuple[str, Any]:
    """Return the name of a format and the vio_table of a table of it at `root`; `levels` counts with a mere name."""
    address(root, "root")
    if isinstance(fmt, str):
        return fmt, ffi.new("vio_table *", {"tree": {"root": root, "levels": small(levels)}})
    try:
        return fmt.name, ffi.new("vio_table *", fmt.fields(root))
    except OverflowError as beyond:
        raise BadValueError(f"{fmt} has a number that no table has") from beyond
