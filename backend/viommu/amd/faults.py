"""From what became of an endpoint's request to the event that tells the guest."""

from backend.core import Fault, Reason
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


def hardware_error(fault: Fault | None) -> int:
    """The Type of a hardware error: nothing answers at the address, or the memory there was taken away."""
    gone = fault is not None and fault.reason is Reason.MEMORY_GONE
    return EventFlag.DATA_ERROR if gone else EventFlag.MASTER_ABORT


def request_event(fault: Fault, verdict: Verdict) -> bytes | None:
    """The event of a faulted request, 16 bytes; None if the IOMMU let it through and it ended where no memory is."""
    rw = direction(fault.access)
    if fault.pasid is not None:
        # Requests with a PASID need guest translation, which no entry here can have.
        flags = EventFlag.GN | rw
        return event(EventCode.IO_PAGE_FAULT, device_id=fault.rid, tag=fault.pasid, flags=flags, address=fault.iova)
    if fault.reason is Reason.NO_ROUTE:
        return _refusal(fault, verdict, rw)
    if fault.stage == 2 and not fault.table:
        return None  # stage 2 is what surrounds the IOMMU: nothing answers there, and the device alone learns of it
    if fault.table:  # no memory answers where an entry of the guest's table would lie, or it was taken away
        return event(
            EventCode.PAGE_TAB_HARDWARE_ERROR,
            device_id=fault.rid,
            tag=verdict.domain_id,
            flags=hardware_error(fault) | rw,
            address=fault.gpa or 0,
        )
    if fault.stage == 0 and fault.reason is Reason.MISALIGNED:
        return None  # the device asked for what no bus carries
    flags = _PAGE_FAULT_FLAGS.get(fault.reason, 0) | rw
    return event(EventCode.IO_PAGE_FAULT, device_id=fault.rid, tag=verdict.domain_id, flags=flags, address=fault.iova)


def _refusal(fault: Fault, verdict: Verdict, rw: int) -> bytes | None:
    if verdict.decision not in _REFUSALS:
        return None  # its entry lets it through, and yet it has no route: nothing the guest did
    code, flags = _REFUSALS[verdict.decision]
    address = fault.iova
    tag = verdict.domain_id
    if code is EventCode.DEV_TAB_HARDWARE_ERROR:
        address = verdict.address
        flags |= hardware_error(verdict.fault)
    elif code is EventCode.PAGE_TAB_HARDWARE_ERROR:
        address = verdict.root
    if code in (EventCode.DEV_TAB_HARDWARE_ERROR, EventCode.ILLEGAL_DEV_TABLE_ENTRY):
        tag = 0  # these two carry no domain
    return event(code, device_id=fault.rid, tag=tag, flags=flags | rw, address=address)
