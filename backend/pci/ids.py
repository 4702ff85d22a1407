"""Who a function says it is (PCI Local Bus 3.0, 6.2.1 Device Identification)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PciIds:
    """The identification fields of the configuration header.

    `class_code` is 24 bits: base class 23:16, sub-class 15:8, programming interface 7:0.
    A subsystem left at 0 takes the vendor and device ids, as a function without a board maker has it.
    """

    vendor: int
    device: int
    subsystem_vendor: int = 0
    subsystem: int = 0
    revision: int = 0
    class_code: int = 0

    def __post_init__(self) -> None:
        widths = (
            ("vendor", 16),
            ("device", 16),
            ("subsystem_vendor", 16),
            ("subsystem", 16),
            ("revision", 8),
            ("class_code", 24),
        )
        for name, bits in widths:
            value: int = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise ValueError(f"PciIds.{name} is {value:#x}: the field has {bits} bits")
        if self.subsystem_vendor == 0 and self.subsystem == 0:
            object.__setattr__(self, "subsystem_vendor", self.vendor)
            object.__setattr__(self, "subsystem", self.device)
