"""Page requests: the PPR log (section 2.6 of publication 48882), and the answers by COMPLETE_PPR_REQUEST.

A request comes as a record of the context's fault queue, and its group's answer goes back by PAGE_RESPONSE. What is not
logged, because the guest has not asked for page requests of that device, is answered here: by an invalid request, so
that the device gives up that access and may ask for others. What finds the log full is discarded, as the specification
has it; its group ends when the engine gives up waiting.
"""

from collections.abc import Callable

from backend.core import Access, Fault
from backend.ioasid import Code, Context, FaultRecord, IoasidError
from backend.pci.registers import RegisterTable
from backend.viommu.amd.commands import CompletePpr
from backend.viommu.amd.event_log import EventCode
from backend.viommu.amd.log_ring import LogRegisters, LogRing
from backend.viommu.amd.registers import PPR_BASE, PPR_HEAD, PPR_TAIL, Status
from backend.viommu.amd.status import StatusRegister

PAGE_SERVICE_REQUEST = 1
_LAST = 1 << 9  # of the tag: the group is complete
_CODES = {0: Code.SUCCESS, 1: Code.INVALID}
"""PCI Express, page request group response codes; what is unused there counts as a failure (10.4.2.1)."""

REGISTERS = LogRegisters(PPR_BASE, PPR_HEAD, PPR_TAIL, Status.PPR_LOG_RUN, Status.PPR_INT, Status.PPR_OVERFLOW)


class PprFlag:
    """Bits 59:48 of an entry, as plain numbers."""

    EXECUTE = 1 << 1
    READ = 1 << 2
    WRITE = 1 << 5
    US = 1 << 6  # by an unprivileged request
    GN = 1 << 8  # with a PASID


_ACCESSES = (
    (int(Access.READ), PprFlag.READ),
    (int(Access.WRITE), PprFlag.WRITE),
    (int(Access.EXECUTE), PprFlag.EXECUTE),
)
_PRIVILEGED = int(Access.PRIVILEGED)


def entry(record: FaultRecord, code: int) -> bytes:
    """Lay out a page request as an entry of the PPR log, or as an INVALID_PPR_REQUEST event; they differ in the code.

    15:0 device ID, 31:16 PASID bits 15:0, 41:32 tag with LAST in bit 9, 45:42 PASID bits 19:16, 59:48 flags, 63:60
    code, 127:64 address of the page.
    """
    pasid = record.pasid or 0
    flags = PprFlag.GN if record.pasid is not None else 0
    access = int(record.access)
    for asked, flag in _ACCESSES:
        flags |= flag if access & asked else 0
    flags |= 0 if access & _PRIVILEGED else PprFlag.US
    tag = (record.group or 0) | (_LAST if record.last else 0)
    low = record.rid | (pasid & 0xFFFF) << 16 | tag << 32 | (pasid >> 16 & 0xF) << 42 | flags << 48 | code << 60
    return low.to_bytes(8, "little") + (record.iova & ~0xFFF).to_bytes(8, "little")


class PprLog:
    """The PPR log of an IOMMU, and the way back. `write(gpa, data)` is the IOMMU's own DMA."""

    def __init__(
        self,
        context: Context,
        registers: RegisterTable,
        status: StatusRegister,
        write: Callable[[int, bytes], Fault | None],
    ) -> None:
        self._context = context
        self._status = status
        self._log = LogRing(registers, status, REGISTERS, write)
        self.logged = 0
        self.lost = 0
        """Discarded, for the log was full or guest memory did not take them."""
        self.unexpected = 0
        """Answers that no device waited for."""
        self.on_unexpected: Callable[[int], None] | None = None
        """Told of each, by the RID that it was for: the device may want to note it."""

    def request(self, record: FaultRecord, *, wanted: bool) -> bytes | None:
        """Log a page request that is `wanted` (DTE.PPR and PPREn). Else it is refused, and the answer is its event."""
        if not wanted:
            self._refuse(record)
            return entry(record, EventCode.INVALID_PPR_REQUEST)
        if self._log.append(entry(record, PAGE_SERVICE_REQUEST)):
            self.logged += 1
        else:
            self.lost += 1
            if not self._status & Status.PPR_OVERFLOW:  # nobody will look into a log that does not run
                self._refuse(record)
        return None

    def complete(self, command: CompletePpr) -> None:
        """Pass an answer of the guest on to its device. One that nobody waits for has no effect here."""
        code = _CODES.get(command.code, Code.FAILURE)
        if not self._respond(command.device_id, command.tag, code, command.pasid) and self.on_unexpected is not None:
            self.on_unexpected(command.device_id)

    def _refuse(self, record: FaultRecord) -> None:
        """The answer to a group comes once, after its last request."""
        if record.last and record.group is not None:
            self._respond(record.rid, record.group, Code.INVALID, record.pasid)

    def _respond(self, rid: int, group: int, code: Code, pasid: int | None) -> bool:
        try:
            self._context.page_response(rid, group, code, pasid)
        except IoasidError:
            self.unexpected += 1
            return False
        return True
