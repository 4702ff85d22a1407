"""Base address registers (PCI Local Bus 3.0, 6.2.5.1)."""

from __future__ import annotations

from dataclasses import dataclass

from backend.pci.registers import RegisterTable

BAR_COUNT = 6
BAR_IO = 1 << 0
BAR_TYPE_64 = 2 << 1
BAR_PREFETCHABLE = 1 << 3

# A memory BAR decodes at least 16 bytes; QEMU maps BARs in pages, so smaller ones would share one.
SMALLEST_MEMORY = 16
SMALLEST_IO = 4
# libvfio-user keeps a region's size in 32 bits.
LARGEST = 1 << 31


@dataclass(frozen=True, slots=True)
class Bar:
    """One BAR: its size in bytes (a power of two), its kind, and the registers behind it.

    A BAR without registers belongs to a function that overrides bar_read and bar_write.
    A 64-bit BAR takes the next slot as well.
    """

    size: int
    registers: RegisterTable | None = None
    is_64bit: bool = False
    prefetchable: bool = False
    is_io: bool = False

    def __post_init__(self) -> None:
        smallest = SMALLEST_IO if self.is_io else SMALLEST_MEMORY
        if self.size & self.size - 1 or not smallest <= self.size <= LARGEST:
            raise ValueError(f"BAR size {self.size:#x}: must be a power of two from {smallest} to {LARGEST:#x}")
        if self.is_io and (self.is_64bit or self.prefetchable):
            raise ValueError("an I/O BAR is neither 64-bit nor prefetchable")
        if self.registers is not None and self.registers.end > self.size:
            raise ValueError(f"registers end at {self.registers.end:#x}, behind a BAR of {self.size:#x} bytes")

    @property
    def type_bits(self) -> int:
        """The read-only low bits of the BAR register."""
        if self.is_io:
            return BAR_IO
        return (BAR_TYPE_64 if self.is_64bit else 0) | (BAR_PREFETCHABLE if self.prefetchable else 0)

    @property
    def address_mask(self) -> int:
        """The writable bits of the register (64 bits of them for a 64-bit BAR): what sizing reads back."""
        width = 64 if self.is_64bit else 32
        return (1 << width) - self.size
