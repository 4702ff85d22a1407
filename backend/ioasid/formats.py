"""The page-table formats that an IOASID can have: one row a format."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .kinds import Kind

PAGE_SIZE = 4096
"""Bytes. The smallest page of every format here, hence the unit of every command."""


@dataclass(frozen=True, slots=True)
class PgtableFormat:
    """What a user says about a page table.

    vendor: a name of FORMATS; levels: of the table, counted from the leaves; accessed, dirty: whether a walk sets
    these bits in a guest's table (AMD-Vi: DTE HA and HD).
    """

    vendor: str = "amd-v1"
    levels: int = 4
    accessed: bool = False
    dirty: bool = False


@dataclass(frozen=True, slots=True)
class FormatRule:
    """What a format can be asked for.

    levels: those that a root may have; index_bits: of the address consumed by each level; root_bits: width of the root
    table's address; kinds: of IOASID that may have it; source: where the format is specified; write_only: a mapping can
    permit writes without reads.
    """

    vendor: str
    levels: range
    index_bits: int
    root_bits: int
    kinds: frozenset[Kind]
    source: str
    write_only: bool = False

    def address_width(self, levels: int) -> int:
        """Bits of an input address that a table of so many levels translates."""
        return min(64, 12 + self.index_bits * levels)

    def page_sizes(self, levels: int) -> tuple[int, ...]:
        """Bytes of a leaf at each level, smallest first."""
        return tuple(PAGE_SIZE << (self.index_bits * level) for level in range(levels))


FORMATS: Mapping[str, FormatRule] = MappingProxyType(
    {
        rule.vendor: rule
        for rule in (
            FormatRule(
                vendor="amd-v1",
                levels=range(1, 7),
                index_bits=9,
                root_bits=52,
                kinds=frozenset({Kind.KERNEL, Kind.USER}),
                write_only=True,
                source="AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 2.2.3",
            ),
        )
    }
)
"""Every format, by vendor name."""
