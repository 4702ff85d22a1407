"""Entries of the device table: 32 bytes in, a verdict out; and the cache that INVALIDATE_DEVTAB_ENTRY empties.

The order of the checks is that of section 2.2.2 of publication 48882 (device table entry, feature enablement for
address translation). Of bits 255:128, which govern interrupts, those alone are looked at that say what becomes of
writes to the interrupt address range, and how deep guest tables are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

from backend.core import Access, Fault
from backend.viommu.amd.features import Efr, gcr3_levels, guest_levels, host_levels

ENTRY_SIZE = 32
NO_ACCESS = Access(0)
EVERYTHING = Access.READ | Access.WRITE

_RESERVED_LOW = 1 << 63 | 0x7C  # bits 63 and 6:2 of the entry
_RESERVED_HIGH = 1 << 42  # bit 106

# Bits of the two halves (63:0, 127:64) that mean something only with a feature, and are reserved without it.
_OPTIONAL_LOW = (
    (Efr.HOST_ACCESSED, 1 << 7),  # HAD, accessed bits
    (Efr.HOST_DIRTY, 1 << 8),  # HAD, dirty bits
    (Efr.PPR, 1 << 52),  # PPR
    (Efr.ENHANCED_PPR, 1 << 53),  # GPRP
    (Efr.GUEST_IO, 1 << 54),  # GIoV
    (Efr.GUEST_TRANSLATION, 0x3F << 55),  # GV, GLX, GCR3 table root pointer 14:12
)
_OPTIONAL_HIGH = ((Efr.GUEST_TRANSLATION, 0xFFFF_F800_FFFF_0000),)  # GCR3 table root pointer 30:15 and 51:31


def reserved_bits(efr: int) -> tuple[int, int]:
    """Masks of the bits that must be zero in a valid entry's 63:0 and 127:64 when `efr` is what is offered."""
    low, high = _RESERVED_LOW, _RESERVED_HIGH
    for feature, bits in _OPTIONAL_LOW:
        low |= 0 if feature & efr else bits
    for feature, bits in _OPTIONAL_HIGH:
        high |= 0 if feature & efr else bits
    return low, high


class Decision(Enum):
    """What becomes of a device's requests; of those without a PASID, where there is a guest table."""

    BYPASS = auto()  # forwarded untranslated, bounded by `access`
    TRANSLATE = auto()  # walked through the table at `root`
    NO_TRANSLATION = auto()  # TV clear: refused as a page that is not present
    OUT_OF_TABLE = auto()  # the device ID lies beyond the table's size
    ILLEGAL_LEVEL = auto()  # paging mode 7, GLX 3, or deeper than offered
    ILLEGAL_BITS = auto()  # reserved bits set
    UNREADABLE = auto()  # the entry could not be read
    NO_TABLE = auto()  # the engine refused a table


@dataclass(frozen=True, slots=True)
class GuestTables:
    """The guest translation of an entry with GV: a GCR3 table that leads from PASIDs to guest tables."""

    root: int
    """Of the GCR3 table: an address of the VM's memory, which no host table translates (GCR3TRPMode 0)."""
    levels: int
    """Of the GCR3 table, GLX + 1."""
    table_levels: int
    """Of the guest tables (GuestPagingMode)."""
    untagged: bool
    """Requests without a PASID use the table of PASID 0 (GIoV)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A device table entry, judged.

    `access` is IR and IW; `domain_id` holds for a valid entry, `root` (GPA) and `levels` for TRANSLATE, `guest` for
    both BYPASS and TRANSLATE; `address` is the GPA of the entry; `fault` is why the entry is UNREADABLE.
    """

    decision: Decision
    address: int
    access: Access = NO_ACCESS
    domain_id: int = 0
    root: int = 0
    levels: int = 0
    guest: GuestTables | None = None
    accessed: bool = False
    """Walks of the host table set accessed bits (HAD)."""
    dirty: bool = False
    page_requests: bool = False
    """PPR: page requests are logged."""
    device_tlb: bool = False
    """I: translation requests, and requests translated already, are served."""
    suppress_repeated: bool = False
    """SE: of page faults, all but the first since the entry was read are not logged."""
    suppress_all: bool = False
    """SA: no page fault is logged."""
    exclusion: bool = False
    """EX: the exclusion range holds for this device."""
    valid: bool = False
    """V: without it the IOMMU lets everything through."""
    interrupts_blocked: bool = False
    """Writes to the interrupt address range end (IV with IntCtl 00b)."""
    fault: Fault | None = None

    @property
    def routed(self) -> bool:
        """Whether any request is let through."""
        return self.decision in (Decision.BYPASS, Decision.TRANSLATE)


def judge(raw: bytes, address: int, efr: int, *, guest_enabled: bool = True) -> Verdict:
    """Judge the 32 bytes of one entry, read at GPA `address`. `guest_enabled`: GTEn, without which GV counts as 0."""
    low = int.from_bytes(raw[:8], "little")
    high = int.from_bytes(raw[8:16], "little")
    interrupts = int.from_bytes(raw[16:24], "little")
    blocked = bool(interrupts & 1) and not interrupts >> 60 & 3
    # V=0: nothing else of the entry counts, requests are forwarded untranslated; IV counts by itself.
    if not low & 1:
        return Verdict(Decision.BYPASS, address, EVERYTHING, interrupts_blocked=blocked)

    mode = low >> 9 & 7
    access = (Access.READ if low >> 61 & 1 else NO_ACCESS) | (Access.WRITE if low >> 62 & 1 else NO_ACCESS)

    def verdict(decision: Decision, guest: GuestTables | None = None) -> Verdict:
        return Verdict(
            decision,
            address,
            access,
            domain_id=high & 0xFFFF,
            root=low & 0x000F_FFFF_FFFF_F000,
            levels=mode,
            guest=guest,
            accessed=bool(low >> 7 & 1),
            dirty=bool(low >> 8 & 1),
            page_requests=bool(low >> 52 & 1),
            device_tlb=bool(high >> 32 & 1),
            suppress_repeated=bool(high >> 33 & 1),
            suppress_all=bool(high >> 34 & 1),
            exclusion=bool(high >> 39 & 1),
            valid=True,
            interrupts_blocked=blocked,
        )

    reserved_low, reserved_high = reserved_bits(efr)
    if low & reserved_low or high & reserved_high or low >> 7 & 3 == 2:  # HAD 10b is reserved
        return verdict(Decision.ILLEGAL_BITS)
    # TV=0: there is no translation information, a request that needs it ends here.
    if not low & 2:
        return verdict(Decision.NO_TRANSLATION)
    if mode > host_levels(efr):
        return verdict(Decision.ILLEGAL_LEVEL)
    guest = None
    if guest_enabled and low >> 55 & 1:
        guest = _guest_tables(low, high, interrupts)
        if guest.levels > gcr3_levels(efr) or guest.table_levels > guest_levels(efr):
            return verdict(Decision.ILLEGAL_LEVEL)
    # Mode 0: no host table, and IR and IW still decide.
    return verdict(Decision.TRANSLATE if mode else Decision.BYPASS, guest)


def _guest_tables(low: int, high: int, interrupts: int) -> GuestTables:
    """The fields of an entry with GV set. The root pointer lies in three pieces: 60:58, 95:80, 127:107."""
    root = (low >> 58 & 7) << 12 | (high >> 16 & 0xFFFF) << 15 | (high >> 43 & 0x1F_FFFF) << 31
    table_levels = 4 + (interrupts >> 54 & 3)
    return GuestTables(root, 1 + (low >> 56 & 3), table_levels, bool(low >> 54 & 1))


class DeviceTable:
    """The table in guest memory, and what was read of it.

    `read(gpa, length)` is the IOMMU's own DMA. An entry is read once and then kept, refusals as well, until forgotten:
    as many verdicts as there are devices asked for, which the caller bounds to its endpoints. `guest_enabled`: GTEn,
    whose change is followed by forget_all.
    """

    def __init__(self, read: Callable[[int, int], bytes | Fault], efr: int) -> None:
        self._read = read
        self._efr = efr
        self._verdicts: dict[int, Verdict] = {}
        self.guest_enabled = False

    def look_up(self, device_id: int, base_register: int) -> Verdict:
        """The verdict for a device, from the table that the Device Table Base Address Register names.

        Its bits 8:0 are the size in 4 KiB pages less one, 51:12 the address.
        """
        verdict = self._verdicts.get(device_id)
        if verdict is None:
            verdict = self._fetch(device_id, base_register)
            self._verdicts[device_id] = verdict
        return verdict

    def _fetch(self, device_id: int, base_register: int) -> Verdict:
        address = (base_register & 0x000F_FFFF_FFFF_F000) + device_id * ENTRY_SIZE
        if device_id * ENTRY_SIZE >= ((base_register & 0x1FF) + 1) * 0x1000:
            return Verdict(Decision.OUT_OF_TABLE, address)
        raw = self._read(address, ENTRY_SIZE)
        if isinstance(raw, Fault):
            return Verdict(Decision.UNREADABLE, address, fault=raw)
        return judge(raw, address, self._efr, guest_enabled=self.guest_enabled)

    def refuse(self, device_id: int) -> None:
        """Remember that the engine would not take a table of this device's entry."""
        self._verdicts[device_id] = replace(self._verdicts[device_id], decision=Decision.NO_TABLE)

    def forget(self, device_id: int) -> None:
        self._verdicts.pop(device_id, None)

    def forget_all(self) -> None:
        self._verdicts.clear()
