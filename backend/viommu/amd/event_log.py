"""Events: their 16 bytes (section 2.5 of publication 48882), and the log that they are written to."""

from collections import Counter
from collections.abc import Callable
from enum import IntEnum

from backend.core import Access, Fault
from backend.pci.registers import RegisterTable
from backend.viommu.amd.log_ring import LogRegisters, LogRing
from backend.viommu.amd.registers import EVENT_BASE, EVENT_HEAD, EVENT_TAIL, Status
from backend.viommu.amd.status import StatusRegister

_REGISTERS = LogRegisters(
    EVENT_BASE, EVENT_HEAD, EVENT_TAIL, Status.EVENT_LOG_RUN, Status.EVENT_LOG_INT, Status.EVENT_OVERFLOW
)


class EventCode(IntEnum):
    ILLEGAL_DEV_TABLE_ENTRY = 1
    IO_PAGE_FAULT = 2
    DEV_TAB_HARDWARE_ERROR = 3
    PAGE_TAB_HARDWARE_ERROR = 4
    ILLEGAL_COMMAND_ERROR = 5
    COMMAND_HARDWARE_ERROR = 6
    IOTLB_INV_TIMEOUT = 7
    INVALID_DEVICE_REQUEST = 8
    INVALID_PPR_REQUEST = 9


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


class EventLog(LogRing):
    """The event log, with counts of what was logged and what was lost."""

    def __init__(
        self, registers: RegisterTable, status: StatusRegister, write: Callable[[int, bytes], Fault | None]
    ) -> None:
        super().__init__(registers, status, _REGISTERS, write)
        self.logged: Counter[EventCode] = Counter()
        self.lost: Counter[EventCode] = Counter()

    def append(self, raw: bytes) -> bool:
        written = super().append(raw)
        (self.logged if written else self.lost)[code_of(raw)] += 1
        return written
