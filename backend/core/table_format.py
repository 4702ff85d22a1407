"""Page-table formats and their options, as `Core.bind_table` and `Core.create_host_space` take them.

Levels: 1 holds the smallest leaves, the root stands at `levels`. What an option does is said by the specification that
the format's header (formats/*.h) names. An option that a format does not have cannot be asked for; a combination that
no hardware has is refused by the core with BadValueError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from backend.core._native import ffi, lib
from backend.core.errors import BadValueError
from backend.core.native import address, small


def _flags(*options: tuple[bool, str]) -> int:
    """The VIO_TABLE_* of the options that are on."""
    flags = 0
    for on, name in options:
        flags |= getattr(lib, f"VIO_TABLE_{name}") if on else 0
    return flags


@dataclass(frozen=True, slots=True)
class TableFormat(ABC):
    """A format with all that is to be known to read a table, but for where it lies."""

    name: ClassVar[str]
    """As in the core's list of formats."""

    @abstractmethod
    def fields(self, root: int) -> dict[str, Any]:
        """The vio_table of a table at `root`."""


@dataclass(frozen=True, slots=True)
class AmdV1(TableFormat):
    """AMD IOMMU host tables. `accessed`, `dirty`: DTE.HAD bits 0 and 1; its value 2, dirty alone, is reserved."""

    name: ClassVar[str] = "amd-v1"
    levels: int = 4
    accessed: bool = False
    dirty: bool = False

    def fields(self, root: int) -> dict[str, Any]:
        flags = _flags((self.accessed, "ACCESSED"), (self.dirty, "DIRTY"))
        return {"tree": {"root": root, "levels": self.levels}, "flags": flags}


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
        flags = self.execute_disable.value | _flags(
            (not self.sign_extended, "UNSIGNED"),
            (not self.gigabyte_leaves, "NO_1G"),
            (not self.write_protect, "WRITE_ANY"),
            (self.smep, "SMEP"),
        )
        tree = {"root": root, "levels": self.levels}
        return {"tree": tree, "output_bits": self.output_bits, "flags": flags}


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

    def fields(self, root: int) -> dict[str, Any]:
        flags = _flags(
            (self.accessed_dirty, "ACCESSED"),
            (self.accessed_dirty, "DIRTY"),
            (not self.large_leaves, "NO_2M"),
            (not self.gigabyte_leaves, "NO_1G"),
            (not self.snoop_control, "NO_SNOOP"),
        )
        tree = {"root": root, "levels": self.levels}
        return {"tree": tree, "output_bits": self.output_bits, "flags": flags}


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

    def fields(self, root: int) -> dict[str, Any]:
        flags = _flags(
            (self.accessed_dirty, "ACCESSED"),
            (self.accessed_dirty, "DIRTY"),
            (not self.execute_only, "NO_EXECUTE_ONLY"),
            (self.execute_modes, "EXECUTE_MODES"),
            (not self.large_leaves, "NO_2M"),
            (not self.gigabyte_leaves, "NO_1G"),
        )
        tree = {"root": root, "levels": self.levels}
        return {"tree": tree, "output_bits": self.output_bits, "flags": flags}


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
        lower, upper = self.lower, self.upper
        flags = _flags(
            (self.large_output, "LARGE_OUTPUT"),
            (self.accessed, "ACCESSED"),
            (self.dirty, "DIRTY"),
            (not self.access_faults, "NO_ACCESS_FAULT"),
            (lower is not None and lower.ignore_top_byte, "TOP_BYTE"),
            (lower is not None and not lower.hierarchical, "FLAT"),
            (upper is not None and upper.ignore_top_byte, "UPPER_TOP_BYTE"),
            (upper is not None and not upper.hierarchical, "UPPER_FLAT"),
        )
        none: dict[str, int] = {"levels": 0}
        return {
            "tree": lower.fields(root) if lower else none,
            "upper": upper.fields(upper.root) if upper else none,
            "output_bits": self.output_bits,
            "flags": flags,
        }


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
        flags = _flags(
            (self.large_output, "LARGE_OUTPUT"),
            (self.accessed, "ACCESSED"),
            (self.dirty, "DIRTY"),
            (not self.access_faults, "NO_ACCESS_FAULT"),
            (not self.two_xn, "ONE_XN"),
        )
        return {"tree": self.tree.fields(root), "output_bits": self.output_bits, "flags": flags}


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

    def fields(self, root: int) -> dict[str, Any]:
        flags = _flags(
            (self.accessed_dirty, "ACCESSED"),
            (self.accessed_dirty, "DIRTY"),
            (self.user_memory, "SUM"),
            (not self.svnapot, "NO_NAPOT"),
            (not self.svpbmt, "NO_PBMT"),
            (self.svrsw60t59b, "RSW"),
        )
        return {"tree": {"root": root, "levels": self.levels}, "flags": flags}


@dataclass(frozen=True, slots=True)
class RiscVSecondStage(TableFormat):
    """RISC-V Sv39x4, Sv48x4, Sv57x4. Options as in RiscV; accessed_dirty: GADE."""

    name: ClassVar[str] = "riscv-x4"
    levels: int = 3
    accessed_dirty: bool = False
    svnapot: bool = True
    svpbmt: bool = True
    svrsw60t59b: bool = False

    def fields(self, root: int) -> dict[str, Any]:
        flags = _flags(
            (self.accessed_dirty, "ACCESSED"),
            (self.accessed_dirty, "DIRTY"),
            (not self.svnapot, "NO_NAPOT"),
            (not self.svpbmt, "NO_PBMT"),
            (self.svrsw60t59b, "RSW"),
        )
        return {"tree": {"root": root, "levels": self.levels}, "flags": flags}


def table_of(fmt: TableFormat | str, root: int, levels: int) -> tuple[str, Any]:
    """Return the name of a format and the vio_table of a table of it at `root`; `levels` counts with a mere name."""
    address(root, "root")
    if isinstance(fmt, str):
        return fmt, ffi.new("vio_table *", {"tree": {"root": root, "levels": small(levels)}})
    try:
        return fmt.name, ffi.new("vio_table *", fmt.fields(root))
    except OverflowError as beyond:
        raise BadValueError(f"{fmt} has a number that no table has") from beyond
