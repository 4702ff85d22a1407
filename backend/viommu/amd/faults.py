"""From what became of an endpoint's request to the event that tells the guest."""

from backend.core import Access, AddressType, Fault, Reason
from backend.viommu.amd.device_table import Decision, Verdict
from backend.viommu.amd.event_log import EventCode, EventFlag, direction, event

# Flags of an IO_PAGE_FAULT for a walk that ended (section 2.5.3, table of event types). PR is clear where no page
# stands; where one does, RZ tells a reserved bit from an illegal level.
_PAGE_FAULT_FLAGS = {
    Reason.BLOCKED: EventFlag.PR | EventFlag.PE,
    Reason.NOT_PRESENT: 0,
    Reason.ADDRESS_WIDTH: 0,  # the address is wider than the table: nothing stands there
    Reason.PERMISSION: EventFlag.PR | EventFlag.PE,
    Reason.RESERVED_BITS: EventFlag.PR | EventFlag.RZ,
    Reason.BAD_LEVEL: EventFlag.PR,
    Reason.MISALIGNED: EventFlag.PR,
}

# Where a request ends whose entry lets nothing through, and the flags beyond its direction (sections 2.5.2 to 2.5.5).
_REFUSALS = {
    Decision.NO_TRANSLATION: (EventCode.IO_PAGE_FAULT, 0),
    Decision.OUT_OF_TABLE: (EventCode.IO_PAGE_FAULT, 0),
    Decision.ILLEGAL_BITS: (EventCode.ILLEGAL_DEV_TABLE_ENTRY, EventFlag.RZ),
    Decision.ILLEGAL_LEVEL: (EventCode.ILLEGAL_DEV_TABLE_ENTRY, 0),
    Decision.UNREADABLE: (EventCode.DEV_TAB_HARDWARE_ERROR, 0),
    Decision.NO_TABLE: (EventCode.PAGE_TAB_HARDWARE_ERROR, EventFlag.MASTER_ABORT),
}


_READABLE = (Decision.BYPASS, Decision.TRANSLATE, Decision.NO_TRANSLATION)
"""Entries whose I bit counts."""

_USER = 1 << 1
"""US stands in bit 49 of an INVALID_DEVICE_REQUEST."""

# Flags of the request itself that each of these events has (their figures in sections 2.5.2 to 2.5.5).
_REQUEST_FLAGS = {
    EventCode.ILLEGAL_DEV_TABLE_ENTRY: EventFlag.GN | EventFlag.RW | EventFlag.TR,
    EventCode.IO_PAGE_FAULT: EventFlag.GN | EventFlag.NX | EventFlag.US | EventFlag.RW | EventFlag.TR,
    EventCode.DEV_TAB_HARDWARE_ERROR: EventFlag.RW | EventFlag.TR,
    EventCode.PAGE_TAB_HARDWARE_ERROR: EventFlag.GN | EventFlag.RW | EventFlag.TR,
}


def hardware_error(fault: Fault | None) -> int:
    """The Type of a hardware error: nothing answers at the address, or the memory there was taken away."""
    gone = fault is not None and fault.reason is Reason.MEMORY_GONE
    return EventFlag.DATA_ERROR if gone else EventFlag.MASTER_ABORT


class InvalidRequest:
    """Type 59:57 of an INVALID_DEVICE_REQUEST (section 2.5.9), with TR, as flags."""

    TRANSLATED = 1 << 9
    """A translated request of a device with I clear or V clear."""
    TRANSLATION = EventFlag.TR
    """A translation request of a device with I clear, V clear or TV clear."""
    READ_INTERRUPTS = 0
    """A read or another non-posted request in the interrupt address range."""
    INTERRUPT = 5 << 9
    """A write to the interrupt address range by a device with IntCtl 00b."""
    TRANSLATE_INTERRUPTS = EventFlag.TR | 1 << 9
    """A translation request for what is never translated."""


def request_event(fault: Fault, verdict: Verdict) -> bytes | None:
    """The event of a faulted request, 16 bytes; None if the IOMMU let it through and it ended where no memory is."""
    invalid = _invalid(fault, verdict)
    if invalid is not None:
        tag, flags = _whose(fault, verdict)
        flags = flags & EventFlag.GN | (_USER if flags & EventFlag.US else 0) | invalid
        tag = tag if flags & EventFlag.GN else 0
        return event(EventCode.INVALID_DEVICE_REQUEST, device_id=fault.rid, tag=tag, flags=flags, address=fault.iova)
    if fault.reason is Reason.RESERVED_RANGE:
        return None  # an interrupt, which a device here sends by its MSI alone: nothing answers
    if fault.reason is Reason.NO_ROUTE:
        return _refusal(fault, verdict)
    if fault.stage == 2 and not fault.table:
        return None  # stage 2 is what surrounds the IOMMU: nothing answers there, and the device alone learns of it
    tag, flags = _whose(fault, verdict)
    # No memory answers where an entry of a table of the guest's would lie, or it was taken away.
    if fault.table and (fault.stage == 2 or fault.reason is Reason.MEMORY_GONE):
        return event(
            EventCode.PAGE_TAB_HARDWARE_ERROR,
            device_id=fault.rid,
            tag=tag,
            flags=hardware_error(fault) | flags & (EventFlag.GN | EventFlag.RW | EventFlag.TR),
            address=fault.gpa or 0,
        )
    if fault.stage == 0 and fault.reason is Reason.MISALIGNED:
        return None  # the device asked for what no bus carries
    flags |= _PAGE_FAULT_FLAGS.get(fault.reason, 0)
    address = fault.iova if fault.middle is None else fault.middle  # without GN it is one of the host table's
    return event(EventCode.IO_PAGE_FAULT, device_id=fault.rid, tag=tag, flags=flags, address=address)


def _invalid(fault: Fault, verdict: Verdict) -> int | None:
    """The type of a request that its device may not send at all; None: it may."""
    if fault.reason is Reason.RESERVED_RANGE:
        return _interrupt(fault, verdict)
    untranslatable = verdict.decision is Decision.NO_TRANSLATION or not verdict.device_tlb
    refused = fault.reason is Reason.ATS_OFF or (fault.reason is Reason.NO_ROUTE and untranslatable)
    if not refused or verdict.decision not in _READABLE:
        return None
    if fault.type is AddressType.TRANSLATION_REQUEST:
        return InvalidRequest.TRANSLATION
    return InvalidRequest.TRANSLATED if fault.type is AddressType.TRANSLATED else None


def _interrupt(fault: Fault, verdict: Verdict) -> int | None:
    """The type of a request to the interrupt address range (section 2.1.4), unless it is an interrupt."""
    if not verdict.valid:
        return None
    if fault.type is AddressType.TRANSLATION_REQUEST:
        return InvalidRequest.TRANSLATE_INTERRUPTS
    if fault.access & Access.READ:
        return InvalidRequest.READ_INTERRUPTS
    return InvalidRequest.INTERRUPT if verdict.interrupts_blocked else None


def _whose(fault: Fault, verdict: Verdict) -> tuple[int, int]:
    """PASID or domain ID of an event, and the flags that tell which, with those that tell the request.

    A request without a PASID that goes through the table of PASID 0 (GIoV) has that PASID. What a host table beneath a
    guest table refused is told as of the host table.
    """
    # RW means nothing where TR is set.
    rw = EventFlag.TR if fault.type is AddressType.TRANSLATION_REQUEST else direction(fault.access)
    pasid = fault.pasid
    if pasid is None and verdict.guest is not None and verdict.guest.untagged:
        pasid = 0
    if pasid is None or fault.middle is not None:
        return verdict.domain_id, rw
    flags = EventFlag.GN | rw
    flags |= 0 if fault.access & Access.PRIVILEGED else EventFlag.US
    flags |= EventFlag.NX if fault.access & Access.EXECUTE else 0
    return pasid, flags


def _refusal(fault: Fault, verdict: Verdict) -> bytes | None:
    tag, request = _whose(fault, verdict)
    if verdict.routed:
        if fault.pasid is None or verdict.guest is not None:
            return None  # its entry lets it through, and yet it has no route: nothing the guest did
        # A PASID, and no guest translation (GV clear): there is no page for it.
        return event(EventCode.IO_PAGE_FAULT, device_id=fault.rid, tag=tag, flags=request, address=fault.iova)
    code, flags = _REFUSALS[verdict.decision]
    address = fault.iova
    if code is EventCode.DEV_TAB_HARDWARE_ERROR:
        address = verdict.address
        flags |= hardware_error(verdict.fault)
    elif code is EventCode.PAGE_TAB_HARDWARE_ERROR:
        address = verdict.guest.root if verdict.guest is not None else verdict.root
    if code is EventCode.DEV_TAB_HARDWARE_ERROR or (
        code is EventCode.ILLEGAL_DEV_TABLE_ENTRY and not request & EventFlag.GN
    ):
        tag = 0  # these carry no domain, and the former no PASID
    request &= _REQUEST_FLAGS[code]
    return event(code, device_id=fault.rid, tag=tag, flags=flags | request, address=address)
