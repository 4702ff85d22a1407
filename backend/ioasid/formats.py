"""The page-table formats that an IOASID can have: one row a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from backend import core

from .kinds import Kind

PAGE_SIZE = 4096
"""Bytes. The smallest page of every format here, hence the unit of every command."""


@dataclass(frozen=True, slots=True)
class PgtableFormat:
    """What a user says about a page table. What is left at 0 is what the format has usually."""

    vendor: str = "amd-v1"
    """A name of FORMATS."""
    levels: int = 0
    """Of the table, counted from the leaves."""
    accessed: bool = False
    """Walks set accessed bits in a guest's table (AMD-Vi: DTE HA); formats that have no choice take no."""
    dirty: bool = False
    """Walks set dirty bits, too (AMD-Vi: DTE HD)."""
    address_width: int = 0
    """Bits of an IOVA; formats whose levels do not say it."""
    granule: int = 0
    """Bytes of the smallest page; formats with several."""
    output_width: int = 0
    """Bits of the addresses that entries hold."""
    upper_root: int | None = None
    """Arm stage 1: GPA of the root table of the upper range (TTBR1); None: it is switched off."""
    upper_address_width: int = 0
    """Of the upper range; 0: as of the lower."""
    upper_granule: int = 0
    """Of the upper range; 0: as of the lower."""
    options: tuple[str, ...] = ()
    """Names that the format's row lists."""


@dataclass(frozen=True, slots=True)
class FormatRule:
    """What a format can be asked for.

    levels: those that a root may have, the usual one being `usual`; index_bits: of the address consumed by each level;
    extra_bits: consumed by the root beyond that; root_bits: width of the root table's address; leaf_levels: highest
    level with leaves; signed: a guest's IOVAs are sign-extended, and the host maps their lower half alone; write_only:
    a mapping can permit writes without reads; granules: bytes of the smallest page, the usual first; kinds: of IOASID
    that may have it; source: where the format is specified.
    """

    vendor: str
    table_class: type[core.TableFormat]
    levels: range
    source: str
    usual: int = 4
    root_bits: int = 52
    index_bits: int = 9
    extra_bits: int = 0
    leaf_levels: int = 3
    signed: bool = False
    write_only: bool = False
    granules: tuple[int, ...] = (PAGE_SIZE,)
    kinds: frozenset[Kind] = frozenset({Kind.KERNEL, Kind.VM, Kind.USER})

    @property
    def options(self) -> tuple[str, ...]:
        """Names for PgtableFormat.options: what is on by default goes under "no-"."""
        return (*_options(self.table_class), *(_RANGES if self.table_class is core.ArmStage1 else ()))

    @property
    def has_trees(self) -> bool:
        """Arm's formats: the width of an IOVA and the granule are given, and levels follow."""
        return len(self.granules) > 1

    def complete(self, fmt: PgtableFormat) -> PgtableFormat:
        """The same with its usual numbers in place of 0. ValueError, its text a sentence: it cannot be."""
        granule = fmt.granule or self.granules[0]
        if granule not in self.granules:
            raise ValueError(f"a granule of {granule} bytes: {self.vendor} has {_numbers(self.granules)}")
        levels = fmt.levels
        if self.has_trees:
            page = granule.bit_length() - 1
            width = fmt.address_width or min(48, page + (page - 3) * (levels or 4))
            fewest = -(-(width - page) // (page - 3))
            fmt = replace(fmt, address_width=width, granule=granule, levels=levels or fewest)
        else:
            fmt = replace(fmt, granule=granule, levels=levels or self.usual)
            width = self.address_width(fmt)
            if fmt.address_width not in {0, width}:
                raise ValueError(
                    f"an address width of {fmt.address_width} bits: {self.vendor} with {fmt.levels} levels has {width}"
                )
            fmt = replace(fmt, address_width=width)
        if fmt.levels not in self.levels:
            raise ValueError(f"{fmt.levels} levels: {self.vendor} has {self.levels[0]} to {self.levels[-1]}")
        if fmt.dirty and not fmt.accessed:
            raise ValueError("dirty bits are kept only together with accessed bits: ask for both")
        self.table(fmt)
        return fmt

    def table(self, fmt: PgtableFormat) -> core.TableFormat:
        """The format as the core takes it. ValueError: an option that it does not have."""
        return self.table_class(**self._arguments(fmt))

    def _arguments(self, fmt: PgtableFormat) -> dict[str, Any]:
        names = {each.name for each in fields(self.table_class)}
        options = _options(self.table_class)
        given: dict[str, Any] = {}
        for option in fmt.options:
            if option not in self.options:
                raise ValueError(f"an option {option!r}: {self.vendor} has {', '.join(self.options) or 'none'}")
            if option in options:
                name, value = options[option]
                given[name] = value
        if fmt.output_width:
            if "output_bits" not in names:
                raise ValueError(f"an output width of {fmt.output_width} bits: {self.vendor} has one alone")
            given["output_bits"] = fmt.output_width
        if "accessed" in names:
            given |= {"accessed": fmt.accessed, "dirty": fmt.dirty}
        elif "accessed_dirty" in names:
            if fmt.accessed != fmt.dirty:
                raise ValueError(f"accessed and dirty bits go together in {self.vendor}: ask for both or none")
            given["accessed_dirty"] = fmt.accessed
        elif fmt.accessed or fmt.dirty:
            raise ValueError(f"accessed and dirty bits: {self.vendor} keeps them always, there is nothing to ask for")
        if fmt.upper_root is not None and "upper" not in names:
            raise ValueError(f"an upper range: {self.vendor} has one range alone")
        if not self.has_trees:
            return {**given, "levels": fmt.levels}
        if "upper" not in names:
            return {**given, "tree": core.ArmTree(fmt.address_width, fmt.granule, fmt.levels)}
        return {**given, "lower": _arm_lower(fmt), "upper": _arm_upper(fmt)}

    def address_width(self, fmt: PgtableFormat, *, host: bool = False) -> int:
        """Bits of an input address that a table of this format translates; `host`: one that the host builds."""
        if self.has_trees:
            return fmt.address_width
        return min(64, 12 + self.index_bits * fmt.levels + self.extra_bits) - (self.signed and host)

    def widest(self, levels: int) -> int:
        """Bits of an IOVA that a guest's table of so many levels can have, whatever its granule."""
        if not self.has_trees:
            return self.address_width(PgtableFormat(self.vendor, levels))
        return max(
            min(52 if page == 1 << 16 else 48, (page.bit_length() - 4) * (levels + 1) + 3) for page in self.granules
        )

    def page_sizes(self, fmt: PgtableFormat) -> tuple[int, ...]:
        """Bytes of a leaf at each level that has leaves, smallest first."""
        page = fmt.granule.bit_length() - 1
        stride = page - 3 if self.has_trees else self.index_bits
        leaves = self.leaf_levels if fmt.granule == PAGE_SIZE else 2  # Arm's larger granules have blocks at one level
        return tuple(fmt.granule << stride * level for level in range(min(fmt.levels, leaves)))


_RANGES = ("no-lower", "ignore-top-byte", "upper-ignore-top-byte", "no-hierarchical", "no-upper-hierarchical")
"""Options of Arm's stage 1 that are a range's: EPD0, TBI0, TBI1, HAD0, HAD1."""


def _arm_lower(fmt: PgtableFormat) -> core.ArmTree | None:
    if "no-lower" in fmt.options:
        return None
    top, flat = "ignore-top-byte" in fmt.options, "no-hierarchical" in fmt.options
    return core.ArmTree(fmt.address_width, fmt.granule, fmt.levels, top, not flat)


def _arm_upper(fmt: PgtableFormat) -> core.ArmTree | None:
    if fmt.upper_root is None:
        return None
    width, granule = fmt.upper_address_width or fmt.address_width, fmt.upper_granule or fmt.granule
    top, flat = "upper-ignore-top-byte" in fmt.options, "no-upper-hierarchical" in fmt.options
    return core.ArmTree(width, granule, None, top, not flat, fmt.upper_root)


def _options(table: type[core.TableFormat]) -> dict[str, tuple[str, Any]]:
    """Option -> the core's name for it and its value."""
    found: dict[str, tuple[str, Any]] = {}
    for each in fields(table):
        name = each.name.replace("_", "-")
        if isinstance(each.default, core.ExecuteDisable):
            for member in core.ExecuteDisable:
                if member != each.default:
                    found[f"{name}-{member.name.lower()}"] = (each.name, member)
        elif isinstance(each.default, bool) and each.name not in {"accessed", "dirty", "accessed_dirty"}:
            found[f"no-{name}" if each.default else name] = (each.name, not each.default)
    return found


def _numbers(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


_ARM = "Arm Architecture Reference Manual, D8; SMMUv3 (IHI 0070), "
_RISCV = "RISC-V Privileged Architecture, "

FORMATS: Mapping[str, FormatRule] = MappingProxyType(
    {
        rule.vendor: rule
        for rule in (
            FormatRule(
                vendor="amd-v1",
                table_class=core.AmdV1,
                levels=range(1, 7),
                leaf_levels=5,
                write_only=True,
                source="AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.3",
            ),
            FormatRule(
                vendor="x86",
                table_class=core.X86,
                levels=range(4, 6),
                signed=True,
                source="Intel SDM volume 3, 4.5; VT-d first stage, 3.6; AMD 48882, 2.2.6 (guest table)",
            ),
            FormatRule(
                vendor="vtd-second-stage",
                table_class=core.VtdSecondStage,
                levels=range(3, 6),
                write_only=True,
                source="Intel VT-d, 3.7 and 9.8",
            ),
            FormatRule(
                vendor="ept",
                table_class=core.Ept,
                levels=range(4, 6),
                source="Intel SDM volume 3, The Extended Page Table Mechanism",
            ),
            FormatRule(
                vendor="arm-s1",
                table_class=core.ArmStage1,
                levels=range(1, 5),
                granules=(4096, 16384, 65536),
                source=_ARM + "5.4 (CD)",
            ),
            FormatRule(
                vendor="arm-s2",
                table_class=core.ArmStage2,
                levels=range(1, 5),
                granules=(4096, 16384, 65536),
                write_only=True,
                source=_ARM + "5.2 (STE)",
            ),
            FormatRule(
                vendor="riscv",
                table_class=core.RiscV,
                levels=range(3, 6),
                usual=3,
                root_bits=56,
                leaf_levels=5,
                signed=True,
                source=_RISCV + "Sv39, Sv48, Sv57",
            ),
            FormatRule(
                vendor="riscv-x4",
                table_class=core.RiscVSecondStage,
                levels=range(3, 6),
                usual=3,
                root_bits=56,
                extra_bits=2,
                leaf_levels=5,
                source=_RISCV + "Two-Stage Address Translation (Sv39x4, Sv48x4, Sv57x4)",
            ),
        )
    }
)
"""Every format, by vendor name."""
