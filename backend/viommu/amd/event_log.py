"""Events: their 16 bytes (section 2.5 of publication 48882), and the ring in guest memory that they are written to."""

from collections import Counter
from collections.abc import Callable
from enum import IntEnum

from backend.core import Access, Fault

EVENT_SIZE = 16


class EventCode(IntEnum):
    ILLEGAL_DEV_TABLE_ENTRY = 1
    IO_PAGE_FAULT = 2
    DEV_TAB_HARDWARE_ERROR = 3
    PAGE_TAB_HARDWARE_ERROR = 4
    ILLEGAL_COMMAND_ERROR = 5
    COMMAND_HARDWARE_ERROR = 6


class EventFlag:
    """Bits 59:48 of an event, as plain numbers; each event has those that its figure shows."""

    GN = 1 << 0  # the address is one of a guest table, and the PASID is valid
    NX = 1 << 1
    US = 1 << 2
    I = 1 << 3  # an interrupt request  # noqa: E741 (the specification's name)
    PR = 1 << 4  # the page was present
    RW = 1 << 5  # a write
    PE = 1 << 6  # the permission was lacking
    RZ = 1 << 7  # a reserved bit was set; clear: the level was illegal
    TR = 1 << 8  # a translation request, not an access
    MASTER_ABORT = 1 << 9  # Type 01 of a hardware error: nothing answers at the address
    DATA_ERROR = 3 << 9  # Type 11 of a hardware error: the data did not arrive whole


def direction(access: Access) -> int:
    return EventFlag.RW if access & Access.WRITE else 0


def event(code: EventCode, *, address: int, device_id: int = 0, tag: int = 0, flags: int = 0) -> bytes:
    """Lay out one event (generic format, section 2.5.1).

    15:0 device ID, 47:32 domain ID, 59:48 flags, 63:60 code, 127:64 address. `tag` is the domain ID, or with GN the
    PASID, whose bits 19:16 stand in 19:16.
    """
    low = device_id | (tag >> 16 & 0xF) << 16 | (tag & 0xFFFF) << 32 | flags << 48 | int(code) << 60
    return low.to_bytes(8, "little") + address.to_bytes(8, "little")


def code_of(raw: bytes) -> EventCode:
    return EventCode(raw[7] >> 4)


class EventNotWritten(Exception):
    """Guest memory does not take an event where the log stands; the text says where."""


class EventLog:
    """The ring in guest memory that events are written to. Its registers are the owner's; here are only counts.

    `write(gpa, data)` is the IOMMU's own DMA.
    """

    def __init__(self, write: Callable[[int, bytes], Fault | None]) -> None:
        self._write = write
        self.logged: Counter[EventCode] = Counter()
        self.lost: Counter[EventCode] = Counter()

    def append(self, raw: bytes, base: int, size: int, head: int, tail: int) -> int | None:
        """Write one event at `tail` and answer with the next tail, or None when the ring is full.

        `base` is a GPA, the rest are bytes. One entry always stays free: head equal to tail means empty. Raises
        EventNotWritten.
        """
        following = (tail + EVENT_SIZE) % size
        code = code_of(raw)
        if following == head:
            self.lost[code] += 1
            return None
        fault = self._write(base + tail, raw)
        if fault is not None:
            self.lost[code] += 1
            raise EventNotWritten(f"the event log takes no entry at {base + tail:#x}: {fault.reason.name}")
        self.logged[code] += 1
        return following
