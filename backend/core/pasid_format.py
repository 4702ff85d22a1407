"""Kinds of PASID tables and their options, as `Core.bind_pasid_table` takes them.

What a PASID table itself says of the page tables that it leads to (their format, root, levels and most options) is not
asked for here; what it leaves to the device's own entry or to the IOMMU's capabilities is. A combination that no
hardware has is refused by the core with BadValueError.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from backend.core.table_format import FLAGS, flags_of


@dataclass(frozen=True, slots=True)
class PasidFormat:
    """A kind of PASID table with all that is to be known to read one, but for where it lies."""

    name: ClassVar[str]
    """As in the core's list of PASID tables."""

    def fields(self) -> dict[str, int]:
        """The vio_pasid_table, but for its root."""
        numbers = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name not in FLAGS}
        return {**numbers, "flags": flags_of(self)}


@dataclass(frozen=True, slots=True)
class AmdGcr3(PasidFormat):
    """AMD guest CR3 table of 1 to 3 levels (DTE GLX + 1), over x86-64 tables.

    table_levels: 4 or 5 (DTE GuestPagingMode). pasid_bits: PASmax + 1; 0: all that the levels resolve. Addresses of
    PASID 0 are not sign-extended. The rest as in X86.
    """

    name: ClassVar[str] = "amd-gcr3"
    levels: int = 1
    table_levels: int = 4
    pasid_bits: int = 0
    output_bits: int = 52
    gigabyte_leaves: bool = True
    write_protect: bool = True
    smep: bool = False


@dataclass(frozen=True, slots=True)
class VtdPasid(PasidFormat):
    """VT-d scalable-mode PASID directory (its address is the root) and tables.

    pasid_bits: 13 to 20 (PDTS + 13, at most 20). output_bits: HAW. large_leaves, snoop_control: of second-stage tables.
    """

    name: ClassVar[str] = "vtd-pasid"
    pasid_bits: int = 20
    output_bits: int = 52
    large_leaves: bool = True
    gigabyte_leaves: bool = True
    snoop_control: bool = True


@dataclass(frozen=True, slots=True)
class ArmCd(PasidFormat):
    """SMMUv3 context descriptors.

    pasid_bits: S1CDMax. leaf: None for a linear table; 4096 or 65536, bytes of a lower table, for two levels.
    output_bits: OAS; 52 has 52-bit descriptors.
    """

    name: ClassVar[str] = "arm-cd"
    pasid_bits: int = 0
    leaf: int | None = None
    output_bits: int = 48

    def fields(self) -> dict[str, int]:
        leaf_bits = 0 if self.leaf is None else (self.leaf // 64).bit_length() - 1  # a descriptor has 64 bytes
        levels = {"levels": 1 if self.leaf is None else 2, "leaf_bits": max(leaf_bits, 0)}
        return {**levels, "pasid_bits": self.pasid_bits, "output_bits": self.output_bits}


@dataclass(frozen=True, slots=True)
class RiscVPdt(PasidFormat):
    """RISC-V process-directory table of 1 (PD8), 2 (PD17) or 3 (PD20) levels. The rest as in RiscV."""

    name: ClassVar[str] = "riscv-pdt"
    levels: int = 1
    accessed_dirty: bool = False
    svnapot: bool = True
    svpbmt: bool = True
    svrsw60t59b: bool = False
