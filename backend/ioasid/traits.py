"""What a device is, as whoever makes it known says."""

from __future__ import annotations

from dataclasses import dataclass

from .pasid_pool import PasidMode

U64_END = 1 << 64


@dataclass(frozen=True, slots=True)
class Window:
    """IOVAs [start, end) that a device cannot use, and why."""

    start: int
    end: int
    why: str = "msi"


MSI_WINDOW = Window(0xFEE00000, 0xFEF00000)
"""x86: writes there are interrupts and not DMA (Intel SDM volume 3, 11.11.1; VT-d 3.14; AMD 48882, 2.1.4.2)."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a device can do. What is not said is what a whole PCI Express function can."""

    reserved: tuple[Window, ...] = ()
    """IOVAs that never reach memory: behind an x86 IOMMU, MSI_WINDOW."""
    address_width: int = 64
    """Bits of an IOVA that it can send."""
    pasid_bits: int = 20
    """0: it has no PASIDs."""
    pasid_mode: PasidMode = PasidMode.WHOLE
    formats: frozenset[str] | None = None
    """Page-table formats that the IOMMU before it can walk; None: all."""
    ats: bool = True
    """It can have a TLB of its own and send translation requests (PCI Express ATS)."""
    snoop: bool = True
    """Its DMA can be made coherent whatever the device asks for."""

    def windows(self) -> tuple[Window, ...]:
        """All IOVAs that it cannot use, in order."""
        found = list(self.reserved)
        if self.address_width < 64:
            found.append(Window(1 << self.address_width, U64_END, "address width"))
        return tuple(sorted(found, key=lambda each: each.start))

    def permitted(self, width: int = 64) -> tuple[tuple[int, int], ...]:
        """[start, end) of the IOVAs that are left of so many bits."""
        left, start = [], 0
        for window in self.windows():
            if window.start > start:
                left.append((start, min(window.start, 1 << width)))
            start = max(start, window.end)
        left.append((start, 1 << width))
        return tuple((first, end) for first, end in left if first < end)


BEHIND_X86 = Traits(reserved=(MSI_WINDOW,))
"""A whole function behind the IOMMU of an x86 machine."""
