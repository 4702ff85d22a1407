"""The formats of a guest's PASID table: one row a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from backend import core


@dataclass(frozen=True, slots=True)
class PasidTableFormat:
    """What a user says about a PASID table. What is left at 0 is what the format has usually."""

    vendor: str = "amd-gcr3"
    """A name of PASID_FORMATS."""
    levels: int = 0
    """AMD: GLX + 1; RISC-V: 1 PD8, 2 PD17, 3 PD20."""
    pasid_bits: int = 0
    """VT-d: PDTS + 13, at most 20; Arm: S1CDMax; AMD: PASmax + 1, and no more than the levels resolve."""
    leaf: int = 0
    """Arm: bytes of a lower table, 4096 or 65536; 0: the table is linear."""
    table_levels: int = 0
    """AMD: of the page tables that it leads to."""
    output_width: int = 0
    """Bits of the addresses that entries hold."""
    options: tuple[str, ...] = ()
    """Of the page tables that it leads to: names that the format's row lists."""


_NUMBERS = {
    "levels": "levels",
    "pasid_bits": "pasid_bits",
    "leaf": "leaf",
    "table_levels": "table_levels",
    "output_width": "output_bits",
}
"""Fields of PasidTableFormat, and the core's names for them."""


@dataclass(frozen=True, slots=True)
class PasidTableRule:
    """What a PASID table can be asked for; leads_to: the page-table format of what it finds."""

    vendor: str
    table_class: type[core.PasidFormat]
    leads_to: tuple[str, ...]
    root_bits: int
    source: str

    @property
    def options(self) -> tuple[str, ...]:
        """Names for PasidTableFormat.options: what is on by default goes under "no-"."""
        return tuple(self._options())

    @property
    def numbers(self) -> tuple[str, ...]:
        """Fields of PasidTableFormat that it takes."""
        names = {each.name for each in fields(self.table_class)}
        return tuple(field for field, name in _NUMBERS.items() if name in names)

    def table(self, fmt: PasidTableFormat) -> core.PasidFormat:
        """The format as the core takes it. ValueError, its text a sentence: it does not have what was asked for."""
        given: dict[str, Any] = {}
        for name, core_name in _NUMBERS.items():
            number = getattr(fmt, name)
            if number and name not in self.numbers:
                raise ValueError(f"{name} {number}: {self.vendor} has {', '.join(self.numbers)}")
            if number:
                given[core_name] = number
        options = self._options()
        for option in fmt.options:
            if option not in options:
                raise ValueError(f"an option {option!r}: {self.vendor} has {', '.join(options) or 'none'}")
            name, value = options[option]
            given[name] = value
        return self.table_class(**given)

    def pasid_bits(self, fmt: PasidTableFormat) -> int:
        """Bits of a PASID that the table resolves, 20 at most."""
        table = self.table(fmt)
        if isinstance(table, core.AmdGcr3):
            return min(9 * table.levels, 20, table.pasid_bits or 20)
        if isinstance(table, core.RiscVPdt):
            return {1: 8, 2: 17}.get(table.levels, 20)
        assert isinstance(table, core.VtdPasid | core.ArmCd)
        return table.pasid_bits

    def _options(self) -> dict[str, tuple[str, bool]]:
        return {
            ("no-" if each.default else "") + each.name.replace("_", "-"): (each.name, not each.default)
            for each in fields(self.table_class)
            if isinstance(each.default, bool)
        }


PASID_FORMATS: Mapping[str, PasidTableRule] = MappingProxyType(
    {
        rule.vendor: rule
        for rule in (
            PasidTableRule("amd-gcr3", core.AmdGcr3, ("x86",), 52, "AMD 48882, 2.2.6.3 (guest CR3 table)"),
            PasidTableRule("vtd-pasid", core.VtdPasid, ("x86", "vtd-second-stage"), 52, "Intel VT-d, 3.4.3 and 9.6"),
            PasidTableRule("arm-cd", core.ArmCd, ("arm-s1",), 52, "SMMUv3 (IHI 0070), 5.4 (context descriptor)"),
            PasidTableRule("riscv-pdt", core.RiscVPdt, ("riscv",), 56, "RISC-V IOMMU, Process-Directory-Table"),
        )
    }
)
"""Every format, by vendor name."""
