"""Commands of the command buffer: 16 bytes in, a value or "illegal" out; no I/O (section 2.4 of publication 48882)."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from struct import Struct
from typing import NamedTuple

from backend.viommu.amd.features import Efr

COMMAND_SIZE = 16
_PAGE = 0xFFFF_FFFF_FFFF_F000
_OPERAND = (1 << 60) - 1  # the first half but for the opcode
_GUEST_TRANSLATION = int(Efr.GUEST_TRANSLATION)  # an operator of an IntFlag costs a microsecond
_HALVES = Struct("<QQ")
_GN = 1 << 2  # bit 66: the command is about guest translations, and has a PASID


class Opcode(IntEnum):
    COMPLETION_WAIT = 1
    INVALIDATE_DEVTAB_ENTRY = 2
    INVALIDATE_IOMMU_PAGES = 3
    INVALIDATE_IOTLB_PAGES = 4
    INVALIDATE_INTERRUPT_TABLE = 5
    PREFETCH_IOMMU_PAGES = 6
    COMPLETE_PPR_REQUEST = 7
    INVALIDATE_IOMMU_ALL = 8


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses to invalidate, in bytes; `size` may be 2^64, which is all of them."""

    start: int
    size: int

    @property
    def everything(self) -> bool:
        return self.size >= 1 << 64


@dataclass(frozen=True, slots=True)
class CompletionWait:
    store_address: int | None  # None: no store asked for
    store_data: int
    interrupt: bool
    flush: bool


@dataclass(frozen=True, slots=True)
class InvalidateDeviceEntry:
    device_id: int


@dataclass(frozen=True, slots=True)
class InvalidatePages:
    domain_id: int
    range: AddressRange
    directories: bool  # PDE: page directory entries too, not leaves alone
    pasid: int | None = None  # GN: of the guest table of this PASID; None: of the host table


@dataclass(frozen=True, slots=True)
class InvalidateDeviceTlb:
    device_id: int
    range: AddressRange
    pasid: int | None = None  # GN: of requests with this PASID; None: of those without one
    at_once: int = 0  # Maxpend: invalidations that the queue of the device takes before it has answered; 0 is all


@dataclass(frozen=True, slots=True)
class InvalidateInterruptTable:
    device_id: int


@dataclass(frozen=True, slots=True)
class PrefetchPages:
    """A hint: translations that will be needed soon."""

    device_id: int
    range: AddressRange  # of the first translation
    count: int  # PFCount: of translations of that size, one after the other; 0 is one
    pasid: int | None  # GN
    invalidate: bool  # what is cached of them is forgotten before


@dataclass(frozen=True, slots=True)
class CompletePpr:
    device_id: int
    tag: int  # of the request, without its LAST bit
    code: int  # PCI Express response code: 0 success, 1 invalid request, 15 response failure
    pasid: int | None  # GN; None: the answer carries none


@dataclass(frozen=True, slots=True)
class InvalidateAll:
    pass


Command = (
    CompletionWait
    | InvalidateDeviceEntry
    | InvalidatePages
    | InvalidateDeviceTlb
    | InvalidateInterruptTable
    | PrefetchPages
    | CompletePpr
    | InvalidateAll
)


class IllegalCommand(Exception):
    """The 16 bytes are no command that this IOMMU knows; the text says why, for the log."""


def address_range(operand: int) -> AddressRange:
    """Decode the address and S (size) bit of an invalidation (section 2.4.3, table "example page size encodings").

    With S clear it is one 4 KiB page. With S set the lowest zero bit of the address from bit 12 up gives the size: bit
    12 zero is 8 KiB, 0x7FFFFFFFFFFFF000 is everything. An address of ones alone has no zero bit: everything too.
    """
    address = operand & _PAGE
    if not operand & 1:
        return AddressRange(address, 0x1000)
    ones = (address >> 12) + 1 & ~(address >> 12)  # the lowest zero bit
    size = ones << 13
    if size >= 1 << 64:
        return AddressRange(0, 1 << 64)
    return AddressRange(address & -size, size)


def _completion_wait(low: int, high: int) -> Command:
    store = low & 0x000F_FFFF_FFFF_FFF8 if low & 1 else None
    return CompletionWait(store, high, interrupt=bool(low & 2), flush=bool(low & 4))


def _invalidate_device_entry(low: int, _high: int) -> Command:
    return InvalidateDeviceEntry(low & 0xFFFF)


def _invalidate_pages(low: int, high: int) -> Command:
    pasid = low & 0xF_FFFF if high & _GN else None
    return InvalidatePages(low >> 32 & 0xFFFF, address_range(high), directories=bool(high & 2), pasid=pasid)


def _invalidate_device_tlb(low: int, high: int) -> Command:
    # The PASID stands in three pieces: 7:0 in 55:48, 15:8 in 23:16, 19:16 in 59:56.
    pasid = low >> 48 & 0xFF | (low >> 16 & 0xFF) << 8 | (low >> 56 & 0xF) << 16
    return InvalidateDeviceTlb(low & 0xFFFF, address_range(high), pasid if high & _GN else None, low >> 24 & 0xFF)


def _invalidate_interrupt_table(low: int, _high: int) -> Command:
    return InvalidateInterruptTable(low & 0xFFFF)


def _prefetch_pages(low: int, high: int) -> Command:
    pasid = low >> 32 & 0xF_FFFF if high & _GN else None
    return PrefetchPages(low & 0xFFFF, address_range(high), low >> 24 & 0xFF, pasid, invalidate=bool(high >> 4 & 1))


def _complete_ppr(low: int, high: int) -> Command:
    pasid = low >> 32 & 0xF_FFFF if high & _GN else None
    return CompletePpr(low & 0xFFFF, high >> 32 & 0x1FF, high >> 44 & 0xF, pasid)


def _invalidate_all(_low: int, _high: int) -> Command:
    return InvalidateAll()


class _Format(NamedTuple):
    """One command: bits that may be set in each half (opcode aside), the feature it needs, how to read it, and the bits
    that may be set as well where guest translation is offered."""

    opcode: Opcode
    low: int
    high: int
    requires: int
    decode: Callable[[int, int], Command]
    guest_low: int = 0
    guest_high: int = 0


# The type of a device-TLB invalidation belongs to a feature that is not offered: it is reserved here.
_FORMATS = (
    _Format(Opcode.COMPLETION_WAIT, 0x000F_FFFF_FFFF_FFFF, (1 << 64) - 1, 0, _completion_wait),
    _Format(Opcode.INVALIDATE_DEVTAB_ENTRY, 0xFFFF, 0, 0, _invalidate_device_entry),
    _Format(Opcode.INVALIDATE_IOMMU_PAGES, 0x0000_FFFF_0000_0000, _PAGE | 3, 0, _invalidate_pages, 0x000F_FFFF, _GN),
    _Format(
        Opcode.INVALIDATE_IOTLB_PAGES,
        0x0000_FFFF_FF00_FFFF,
        _PAGE | 1,
        0,
        _invalidate_device_tlb,
        0x0FFF_0000_00FF_0000,
        _GN,
    ),
    _Format(Opcode.INVALIDATE_INTERRUPT_TABLE, 0xFFFF, 0, 0, _invalidate_interrupt_table),
    _Format(
        Opcode.PREFETCH_IOMMU_PAGES,
        0xFF00_FFFF,
        _PAGE | 1 << 4 | 1,
        int(Efr.PREFETCH),
        _prefetch_pages,
        0x000F_FFFF_0000_0000,
        _GN,
    ),
    _Format(
        Opcode.COMPLETE_PPR_REQUEST,
        0xFFFF,
        0xF3FF << 32,
        int(Efr.PPR),
        _complete_ppr,
        0x000F_FFFF_0000_0000,
        _GN,
    ),
    _Format(Opcode.INVALIDATE_IOMMU_ALL, 0, 0, int(Efr.INVALIDATE_ALL), _invalidate_all),
)


class _Offered(NamedTuple):
    """A command as an IOMMU with certain features reads it: bits that must be zero in each half."""

    opcode: Opcode
    reserved_low: int
    reserved_high: int
    decode: Callable[[int, int], Command]


@cache
def _offered(efr: int) -> dict[int, _Offered]:
    """By opcode. An IOMMU's features never change, and models of it have few sets of them."""
    guest = bool(efr & _GUEST_TRANSLATION)
    return {
        int(form.opcode): _Offered(
            form.opcode,
            ~(form.low | form.guest_low * guest) & _OPERAND,
            ~(form.high | form.guest_high * guest),
            form.decode,
        )
        for form in _FORMATS
        if not form.requires or efr & form.requires
    }


def decode(raw: bytes, efr: int) -> tuple[Opcode, Command]:
    """Read one command of 16 bytes. Raises IllegalCommand for one that these features do not have."""
    low, high = _HALVES.unpack(raw)
    form = _offered(efr).get(low >> 60)
    if form is None:
        raise IllegalCommand(_why_not(low >> 60, efr))
    opcode, reserved_low, reserved_high, read = form
    if low & reserved_low or high & reserved_high:
        raise IllegalCommand(f"{opcode.name} with reserved bits {low & reserved_low:#x}, {high & reserved_high:#x} set")
    return opcode, read(low, high)


def _why_not(number: int, efr: int) -> str:
    """Why an opcode is none that an IOMMU with these features has."""
    form = next((each for each in _FORMATS if each.opcode == number), None)
    if form is None:
        return f"opcode {number:#x} is not offered"
    return f"{form.opcode.name} needs {Efr(form.requires)!r}, which EFR {efr:#x} does not offer"
