"""Capabilities of the configuration space: each one a list of registers, at offsets from its own start.

The header (id and link to the next one) is laid by ConfigSpace. Section numbers are those of the PCI Local Bus
Specification 3.0, PCI Bus Power Management 1.2 and PCI Express Base 5.0, as named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from backend.pci.registers import Register

PMCSR = 4
PMCSR_STATE = 0x3
MSI_ENABLE = 1 << 0
MSI_64BIT = 1 << 7
MSI_PER_VECTOR_MASK = 1 << 8
MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENTRY_SIZE = 16
EXP_DEVCAP_FLR = 1 << 28
EXP_DEVCTL_FLR = 1 << 15
EXP_DEVCAP2_END_TO_END_PREFIX = 1 << 21


class Capability:
    """A capability as it is laid out. `offset` None lets ConfigSpace choose; extended ones live at 0x100 and above."""

    id: ClassVar[int]
    extended: ClassVar[bool] = False
    version: ClassVar[int] = 1
    """Version field of an extended capability's header."""
    offset: int | None
    size: int
    """Bytes, the header included."""

    def registers(self) -> Sequence[Register]:
        """Registers behind the header, offsets relative to the capability."""
        raise TypeError(f"{type(self).__name__} lays out no registers")


@dataclass(frozen=True)
class PowerManagement(Capability):
    """Power management: D0 and D3hot, no PME, and no reset on the way back to D0 (PM 1.2, 3.2)."""

    id: ClassVar[int] = 0x01
    offset: int | None = None
    size: int = 8

    def registers(self) -> Sequence[Register]:
        """PMC says version 3; PMCSR carries the power state and No_Soft_Reset."""
        return (
            Register("PMC", 2, 2, reset=3, ro=0xFFFF, section="PM 1.2, 3.2.3"),
            Register("PMCSR", PMCSR, 2, reset=1 << 3, ro=1 << 3, rw=PMCSR_STATE, section="PM 1.2, 3.2.4"),
        )


@dataclass(frozen=True)
class Msi(Capability):
    """Message signalled interrupts (PCI 3.0, 6.8.1). `vectors` is a power of two up to 32."""

    id: ClassVar[int] = 0x05
    vectors: int = 1
    is_64bit: bool = True
    per_vector_mask: bool = False
    offset: int | None = None

    def __post_init__(self) -> None:
        if self.vectors not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"MSI has 1, 2, 4, 8, 16 or 32 vectors, not {self.vectors}")

    @property
    def size(self) -> int:  # type: ignore[override]
        """Bytes, by the options: 10, 14, 20 or 24."""
        return (14 if self.is_64bit else 10) + (10 if self.per_vector_mask else 0)

    @property
    def data_offset(self) -> int:
        """Where message data stands, from the capability's start."""
        return 12 if self.is_64bit else 8

    @property
    def mask_offset(self) -> int:
        """Where the mask bits stand, from the capability's start (only with per-vector masking)."""
        return self.data_offset + 4

    def registers(self) -> Sequence[Register]:
        """Control, address, data; with per-vector masking also mask and pending bits."""
        control = (self.vectors.bit_length() - 1) << 1
        control |= MSI_64BIT if self.is_64bit else 0
        control |= MSI_PER_VECTOR_MASK if self.per_vector_mask else 0
        table = [
            Register("MSI_CONTROL", 2, 2, reset=control, ro=0x018E, rw=0x0071, section="PCI 3.0, 6.8.1.3"),
            Register("MSI_ADDRESS", 4, 4, rw=0xFFFF_FFFC, section="PCI 3.0, 6.8.1.4"),
        ]
        if self.is_64bit:
            table.append(Register("MSI_ADDRESS_HIGH", 8, 4, rw=0xFFFF_FFFF, section="PCI 3.0, 6.8.1.5"))
        table.append(Register("MSI_DATA", self.data_offset, 2, rw=0xFFFF, section="PCI 3.0, 6.8.1.6"))
        if self.per_vector_mask:
            bits = (1 << self.vectors) - 1
            table.append(Register("MSI_MASK", self.mask_offset, 4, rw=bits, section="PCI 3.0, 6.8.1.7"))
            table.append(Register("MSI_PENDING", self.mask_offset + 4, 4, ro=bits, section="PCI 3.0, 6.8.1.8"))
        return table


@dataclass(frozen=True)
class Msix(Capability):
    """MSI-X (PCI 3.0, 6.8.2): a table and a pending-bit array inside BARs, offsets multiples of 8."""

    id: ClassVar[int] = 0x11
    vectors: int
    table_bar: int
    table_offset: int
    pba_offset: int
    pba_bar: int = -1
    """-1: in the table's BAR."""
    offset: int | None = None
    size: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.vectors <= 2048:
            raise ValueError(f"MSI-X has 1 to 2048 vectors, not {self.vectors}")
        if self.table_offset % 8 or self.pba_offset % 8:
            raise ValueError("MSI-X table and pending bits start at multiples of 8")
        if self.pba_bar < 0:
            object.__setattr__(self, "pba_bar", self.table_bar)
        table_end = self.table_offset + MSIX_ENTRY_SIZE * self.vectors
        if self.pba_bar == self.table_bar and self.table_offset < self.pba_end and self.pba_offset < table_end:
            raise ValueError("MSI-X table and pending bits overlap")

    @property
    def table_end(self) -> int:
        """First byte behind the table in its BAR."""
        return self.table_offset + MSIX_ENTRY_SIZE * self.vectors

    @property
    def pba_end(self) -> int:
        """First byte behind the pending bits in their BAR: one bit a vector, in 64-bit words."""
        return self.pba_offset + (self.vectors + 63) // 64 * 8

    def registers(self) -> Sequence[Register]:
        """Control, and where table and pending bits lie."""
        return (
            Register(
                "MSIX_CONTROL",
                2,
                2,
                reset=self.vectors - 1,
                ro=0x07FF,
                rw=MSIX_ENABLE | MSIX_FUNCTION_MASK,
                section="PCI 3.0, 6.8.2.3",
            ),
            Register("MSIX_TABLE", 4, 4, self.table_offset | self.table_bar, ro=0xFFFF_FFFF, section="6.8.2.4"),
            Register("MSIX_PBA", 8, 4, self.pba_offset | self.pba_bar, ro=0xFFFF_FFFF, section="6.8.2.5"),
        )


@dataclass(frozen=True)
class PciExpress(Capability):
    """PCI Express capability, version 2 (PCIe 5.0, 7.5.3), of an endpoint or a root complex integrated one.

    `payload` is the largest payload in bytes; `prefixes` announces end-to-end TLP prefixes, which PASID needs.
    """

    id: ClassVar[int] = 0x10
    integrated: bool = False
    flr: bool = True
    payload: int = 256
    prefixes: bool = False
    offset: int | None = None
    size: int = 0x3C

    def registers(self) -> Sequence[Register]:
        """Device, link and their second sets; an integrated endpoint has no link."""
        if self.payload not in (128, 256, 512, 1024, 2048, 4096):
            raise ValueError(f"PCIe payload is a power of two from 128 to 4096 bytes, not {self.payload}")
        kind = 0x9 if self.integrated else 0x0
        # Role-based error reporting (bit 15) is required of every device since PCIe 1.1.
        device = (self.payload // 128).bit_length() - 1 | 1 << 15 | (EXP_DEVCAP_FLR if self.flr else 0)
        device2 = EXP_DEVCAP2_END_TO_END_PREFIX if self.prefixes else 0
        control = 0xFFFF if self.flr else 0x7FFF
        link = 0 if self.integrated else 1 | 1 << 4
        return (
            Register("EXP_CAPABILITIES", 2, 2, reset=2 | kind << 4, ro=0xFFFF, section="PCIe 5.0, 7.5.3.2"),
            Register("EXP_DEVICE_CAPABILITIES", 4, 4, reset=device, ro=0xFFFF_FFFF, section="7.5.3.3"),
            Register("EXP_DEVICE_CONTROL", 8, 2, reset=0x2810, rw=control, section="7.5.3.4"),
            Register("EXP_DEVICE_STATUS", 0xA, 2, ro=0x30, w1c=0xF, section="7.5.3.5"),
            Register("EXP_LINK_CAPABILITIES", 0xC, 4, reset=link, ro=0xFFFF_FFFF, section="7.5.3.6"),
            Register("EXP_LINK_CONTROL", 0x10, 2, rw=(0 if self.integrated else 0x01CB), section="7.5.3.7"),
            Register("EXP_LINK_STATUS", 0x12, 2, reset=link, ro=0xFFFF, section="7.5.3.8"),
            Register("EXP_DEVICE_CAPABILITIES_2", 0x24, 4, reset=device2, ro=0xFFFF_FFFF, section="7.5.3.15"),
            Register("EXP_DEVICE_CONTROL_2", 0x28, 2, rw=0xFFFF, section="7.5.3.16"),
            Register("EXP_LINK_CAPABILITIES_2", 0x2C, 4, reset=(0 if self.integrated else 2), ro=0xFFFF_FFFF),
            Register(
                "EXP_LINK_CONTROL_2",
                0x30,
                2,
                reset=(0 if self.integrated else 1),
                rw=(0 if self.integrated else 0xFFFF),
            ),
        )


@dataclass(frozen=True)
class VendorSpecific(Capability):
    """A vendor's own capability (PCI 3.0, Appendix H): `data` follows the length byte and is read-only."""

    id: ClassVar[int] = 0x09
    data: bytes = b""
    offset: int | None = None

    @property
    def size(self) -> int:  # type: ignore[override]
        """Header, length byte and data."""
        return 3 + len(self.data)

    def registers(self) -> Sequence[Register]:
        """The length byte and the data, byte by byte."""
        return byte_registers("VENDOR", 2, bytes((self.size,)) + self.data)


@dataclass(frozen=True)
class RawCapability(Capability):
    """Any capability, given as the bytes behind its two-byte header; `writable` masks them (read-only without)."""

    capability_id: int
    data: bytes
    writable: bytes = b""
    offset: int | None = None

    @property
    def id(self) -> int:  # type: ignore[override]
        """The id that was asked for."""
        return self.capability_id

    @property
    def size(self) -> int:  # type: ignore[override]
        """Header and data."""
        return 2 + len(self.data)

    def registers(self) -> Sequence[Register]:
        """The data, byte by byte."""
        return byte_registers("RAW", 2, self.data, self.writable)


@dataclass(frozen=True)
class Dsn(Capability):
    """Device serial number, 64 bits (PCIe 5.0, 7.9.3)."""

    id: ClassVar[int] = 0x0003
    extended: ClassVar[bool] = True
    serial: int = 0
    offset: int | None = None
    size: int = 12

    def registers(self) -> Sequence[Register]:
        """The two halves of the number."""
        return (
            Register("DSN_LOW", 4, 4, self.serial & 0xFFFF_FFFF, ro=0xFFFF_FFFF, section="PCIe 5.0, 7.9.3.2"),
            Register("DSN_HIGH", 8, 4, self.serial >> 32, ro=0xFFFF_FFFF, section="PCIe 5.0, 7.9.3.2"),
        )


@dataclass(frozen=True)
class Ats(Capability):
    """Address translation service (PCIe 5.0, 10.5.1). `queue_depth` 1 to 32 invalidations (32 is written as 0)."""

    id: ClassVar[int] = 0x000F
    extended: ClassVar[bool] = True
    queue_depth: int = 32
    page_aligned: bool = True
    offset: int | None = None
    size: int = 8

    def registers(self) -> Sequence[Register]:
        """Capability and control; the smallest translation unit is in control 4:0, enable is bit 15."""
        if not 1 <= self.queue_depth <= 32:
            raise ValueError(f"ATS invalidate queue depth is 1 to 32, not {self.queue_depth}")
        capability = self.queue_depth % 32 | (1 << 5 if self.page_aligned else 0)
        return (
            Register("ATS_CAPABILITY", 4, 2, reset=capability, ro=0xFFFF, section="PCIe 5.0, 10.5.1.2"),
            Register("ATS_CONTROL", 6, 2, rw=0x801F, section="PCIe 5.0, 10.5.1.3"),
        )


@dataclass(frozen=True)
class Pri(Capability):
    """Page request interface (PCIe 5.0, 10.5.2). `outstanding` is the most page requests at a time."""

    id: ClassVar[int] = 0x0013
    extended: ClassVar[bool] = True
    outstanding: int = 32
    response_pasid: bool = True
    offset: int | None = None
    size: int = 16

    def registers(self) -> Sequence[Register]:
        """Control (enable, reset), status, capacity and the allocation that software grants."""
        status = 1 << 8 | (1 << 15 if self.response_pasid else 0)
        return (
            Register("PRI_CONTROL", 4, 2, rw=0x3, section="PCIe 5.0, 10.5.2.2"),
            Register("PRI_STATUS", 6, 2, reset=status, ro=0x8100, w1c=0x3, section="PCIe 5.0, 10.5.2.3"),
            Register("PRI_CAPACITY", 8, 4, reset=self.outstanding, ro=0xFFFF_FFFF, section="10.5.2.4"),
            Register("PRI_ALLOCATION", 12, 4, rw=0xFFFF_FFFF, section="PCIe 5.0, 10.5.2.5"),
        )


@dataclass(frozen=True)
class Pasid(Capability):
    """Process address space ids (PCIe 5.0, 7.8.8). `width` is the number of PASID bits, up to 20."""

    id: ClassVar[int] = 0x001B
    extended: ClassVar[bool] = True
    width: int = 16
    execute: bool = False
    privileged: bool = False
    offset: int | None = None
    size: int = 8

    def registers(self) -> Sequence[Register]:
        """Capability and control; enable is bit 0, what may be enabled follows the capability."""
        if not 0 <= self.width <= 20:
            raise ValueError(f"PASIDs have up to 20 bits, not {self.width}")
        modes = (1 << 1 if self.execute else 0) | (1 << 2 if self.privileged else 0)
        return (
            Register("PASID_CAPABILITY", 4, 2, modes | self.width << 8, ro=0xFFFF, section="PCIe 5.0, 7.8.8.2"),
            Register("PASID_CONTROL", 6, 2, rw=1 | modes, section="PCIe 5.0, 7.8.8.3"),
        )


def byte_registers(name: str, offset: int, data: bytes, writable: bytes = b"") -> list[Register]:
    """A register for each byte of `data`; bits set in `writable` (padded with zeros) are rw, the others ro."""
    table = []
    for index, value in enumerate(data):
        rw = writable[index] if index < len(writable) else 0
        table.append(Register(f"{name}_{index}", offset + index, 1, value, ro=0xFF & ~rw, rw=rw))
    return table
