"""The AMD IOMMU as a PCI function: registers and queues of the guest on one side, IOASID commands on the other.

Source: AMD I/O Virtualization Technology (IOMMU) Specification, publication 48882; section numbers are its own. Where
it calls the effect of a software error undefined, a write is ignored: software then reads back what still holds.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable

from backend.core import Fault
from backend.ioasid import Context, FaultRecord, IoasidError
from backend.pci import Bar, Msi, PciFunction, PciIds, RawCapability, ResetKind
from backend.pci.registers import WriteHook
from backend.viommu.amd import features
from backend.viommu.amd.command_buffer import CommandBuffer, StoreFailed
from backend.viommu.amd.commands import (
    AddressRange,
    Command,
    CompletePpr,
    CompletionWait,
    InvalidateAll,
    InvalidateDeviceEntry,
    InvalidateDeviceTlb,
    InvalidateInterruptTable,
    InvalidatePages,
    Opcode,
    PrefetchPages,
)
from backend.viommu.amd.device_table import EVERYTHING, Decision, DeviceTable, Verdict
from backend.viommu.amd.device_tlbs import CallLater, DeviceTlbs, call_later, time_out
from backend.viommu.amd.domains import Domains
from backend.viommu.amd.event_log import EventCode, EventLog, code_of
from backend.viommu.amd.faults import request_event
from backend.viommu.amd.ppr_log import PprLog
from backend.viommu.amd.registers import (
    BAR_SIZE,
    COMMAND_BASE,
    COMMAND_HEAD,
    COMMAND_TAIL,
    CONTROL,
    DEVICE_TABLE_BASE,
    EVENT_BASE,
    EVENT_HEAD,
    EVENT_TAIL,
    EXCLUSION_BASE,
    EXCLUSION_LIMIT,
    PPR_BASE,
    PPR_HEAD,
    PPR_TAIL,
    STATUS,
    Control,
    Status,
    exclusion_range,
    register_table,
    ring_size,
)
from backend.viommu.amd.status import StatusRegister

log = logging.getLogger(__name__)

IDS = PciIds(vendor=0x1022, device=0x1419, class_code=0x080600)

_RINGS = (
    (Control.EVENT_LOG_EN, Status.EVENT_LOG_RUN, EVENT_BASE),
    (Control.PPR_LOG_EN, Status.PPR_LOG_RUN, PPR_BASE),
    (Control.CMD_BUF_EN, Status.CMD_BUF_RUN, COMMAND_BASE),
)
"""Each ring's enable bit, run bit and base."""


class AmdIommu(PciFunction):
    """An AMD IOMMU for `endpoints` (RIDs), for the VM whose memory is the IOASID `stage2` of `context`.

    The owner binds the endpoints' devices and this function's own to the context, attaches this function's own to
    `stage2`, hands `route` and `on_fault` to the engine, and records of the context's fault queue that are page
    requests of `endpoints` to `page_request`. Attachments of the endpoints are this front end's: they come with an
    endpoint's first request and go when the guest invalidates. Several IOMMUs may share a context.

    `on_enable` is called when the guest has turned the IOMMU on, `on_disable` when it turns it off, before a route
    changes: what is counted between the two passed the guest's device table.
    """

    def __init__(
        self,
        context: Context,
        stage2: int,
        endpoints: Iterable[int],
        *,
        name: str = "amd-iommu",
        later: CallLater = call_later,
    ) -> None:
        """`later(seconds, call)` is for what devices owe an answer; the loop's that runs, if not said."""
        self.registers = register_table(features.EFR)
        super().__init__(
            name=name,
            ids=IDS,
            bars={0: Bar(BAR_SIZE, self.registers)},
            capabilities=(
                RawCapability(features.CAPABILITY_ID, features.capability_data(), offset=features.CAPABILITY_OFFSET),
                Msi(offset=features.MSI_OFFSET),
            ),
            force_bus_master=True,  # Linux never sets it on an IOMMU, and QEMU drops the MSI of a function without it
        )
        self.endpoints = frozenset(endpoints)
        self.domains = Domains(context, stage2)
        self.device_table = DeviceTable(self._read_memory, features.EFR)
        self.status = StatusRegister(self.registers, self.interrupt)
        self.event_log = EventLog(self.registers, self.status, self._write_memory)
        self.ppr_log = PprLog(context, self.registers, self.status, self._write_memory)
        self.command_buffer = CommandBuffer(
            self.registers,
            self.status,
            features.EFR,
            read=self._read_memory,
            execute=self._execute,
            report=self.event_log.append,
        )
        self.device_tlbs = DeviceTlbs(
            self._invalidate_device_tlb, self.command_buffer.run, self.event_log.append, later
        )
        self.on_enable: Callable[[], None] | None = None
        self.on_disable: Callable[[], None] | None = None
        self.enables = 0
        """Times that the guest turned the IOMMU on."""
        self.aborted = 0
        """Requests that were translated to where no memory is: they end there, which is no event of an IOMMU."""
        self._page_faulted: set[int] = set()
        """Endpoints with a page fault since their entry was read, for SE."""
        command_run, event_run, ppr_run = Status.CMD_BUF_RUN, Status.EVENT_LOG_RUN, Status.PPR_LOG_RUN
        for register, hook in (
            (COMMAND_BASE, self._base_hook(COMMAND_BASE, COMMAND_HEAD, COMMAND_TAIL, command_run)),
            (COMMAND_HEAD, self._pointer_hook(COMMAND_HEAD, COMMAND_BASE, command_run)),
            (COMMAND_TAIL, self._command_tail_written),
            (EVENT_BASE, self._base_hook(EVENT_BASE, EVENT_HEAD, EVENT_TAIL, event_run)),
            (EVENT_HEAD, self._pointer_hook(EVENT_HEAD, EVENT_BASE, 0)),
            (EVENT_TAIL, self._pointer_hook(EVENT_TAIL, EVENT_BASE, event_run)),
            (PPR_BASE, self._base_hook(PPR_BASE, PPR_HEAD, PPR_TAIL, ppr_run)),
            (PPR_HEAD, self._pointer_hook(PPR_HEAD, PPR_BASE, 0)),
            (PPR_TAIL, self._pointer_hook(PPR_TAIL, PPR_BASE, ppr_run)),
            (EXCLUSION_BASE, self._exclusion_written),
            (EXCLUSION_LIMIT, self._exclusion_written),
            (CONTROL, self._control_written),
            (STATUS, lambda _new, _old: self.status.update()),
        ):
            self.registers.on_write(register, hook)

    @property
    def enabled(self) -> bool:
        """Whether the guest has turned the IOMMU on (IommuEn)."""
        return bool(self.registers[CONTROL] & Control.IOMMU_EN)

    @property
    def commands(self) -> Counter[Opcode]:
        """Commands done, by opcode."""
        return self.command_buffer.done

    @property
    def event_log_range(self) -> tuple[int, int]:
        """GPA and bytes of the guest's event log: the one part of memory that a refused request changes."""
        return self.event_log.range

    def stage1(self, rid: int) -> str | None:
        """The tables that the guest gave this endpoint for requests without a PASID, in words; None: it gave none."""
        verdict = self.device_table.look_up(rid, self.registers[DEVICE_TABLE_BASE])
        stages = []
        if verdict.guest is not None and verdict.guest.untagged:
            stages.append(f"x86, {verdict.guest.table_levels} levels")
        if verdict.decision is Decision.TRANSLATE:
            stages.append(f"AMD v1, {verdict.levels} levels")
        return ", over ".join(stages) or None

    def reset(self, kind: ResetKind) -> None:
        """Off, every request bypasses, nothing is cached. Counts stay: they are the host's."""
        if self.enabled and self.on_disable is not None:
            self.on_disable()
        super().reset(kind)
        self.device_tlbs.forget()
        self.device_table.guest_enabled = False
        self._forget_all()
        self.status.reset()

    def drained(self) -> None:
        self.command_buffer.check()

    # What the engine asks and tells

    def route(self, rid: int, pasid: int | None = None) -> bool:
        """Attach an endpoint that has no route, as its device table entry says. False: its requests are refused."""
        if rid not in self.endpoints or self.domains.going(rid):
            return False
        if not self.enabled:
            return pasid is None and self._attach(rid, Verdict(Decision.BYPASS, 0, EVERYTHING))
        verdict = self.device_table.look_up(rid, self.registers[DEVICE_TABLE_BASE])
        if not verdict.routed or (pasid is not None and verdict.guest is None):
            return False
        if self._attach(rid, verdict):
            return True
        self.device_table.refuse(rid)
        return False

    def on_fault(self, fault: Fault) -> None:
        """Log the event of an endpoint's faulted request, if it was the IOMMU that stopped it."""
        if fault.rid not in self.endpoints or not self.enabled:
            return
        verdict = self.device_table.look_up(fault.rid, self.registers[DEVICE_TABLE_BASE])
        raw = request_event(fault, verdict)
        if raw is None:
            self.aborted += 1
        elif code_of(raw) is not EventCode.IO_PAGE_FAULT:
            self.event_log.append(raw)
        elif not verdict.suppress_all and not (verdict.suppress_repeated and fault.rid in self._page_faulted):
            self._page_faulted.add(fault.rid)
            self.event_log.append(raw)

    def page_request(self, record: FaultRecord) -> None:
        """Log a page request of an endpoint, or answer it where the guest does not want any."""
        if not record.recoverable or record.rid not in self.endpoints:
            return
        wanted = False
        if self.enabled and self.registers[CONTROL] & Control.PPR_EN:
            wanted = self.device_table.look_up(record.rid, self.registers[DEVICE_TABLE_BASE]).page_requests
        refused = self.ppr_log.request(record, wanted=wanted)
        if refused is not None and self.enabled:
            self.event_log.append(refused)

    def _attach(self, rid: int, verdict: Verdict) -> bool:
        try:
            self.domains.route(rid, verdict, self._excluded(verdict))
        except IoasidError as error:
            log.warning("%s: no route for RID %#06x: %s", self.name, rid, error)
            return False
        return True

    def _excluded(self, verdict: Verdict) -> tuple[int, int] | None:
        """The exclusion range, if it holds for a device with this entry."""
        found = exclusion_range(self.registers[EXCLUSION_BASE], self.registers[EXCLUSION_LIMIT])
        if found is None or not (found.everyone or verdict.exclusion):
            return None
        return found.start, found.end

    def _forget(self, rid: int) -> None:
        self.domains.drop(rid)
        self.device_table.forget(rid)
        self._page_faulted.discard(rid)

    def _forget_all(self) -> None:
        self.domains.drop_all()
        self.device_table.forget_all()
        self._page_faulted.clear()

    # Registers

    def _base_hook(self, base: str, head: str, tail: str, run: int) -> WriteHook:
        """A ring's base: not while the ring runs; a new one starts empty (sections 2.4, 2.5)."""

        def written(_new: int, old: int) -> None:
            if self.registers[STATUS] & run:
                self.registers[base] = old
            else:
                self.registers[head] = self.registers[tail] = 0

        return written

    def _pointer_hook(self, pointer: str, base: str, run: int) -> WriteHook:
        """A ring's pointer: not beyond the ring; not while it runs where the IOMMU moves it (section 3.3.13)."""

        def written(new: int, old: int) -> None:
            if self.registers[STATUS] & run or new >= ring_size(self.registers[base]):
                self.registers[pointer] = old

        return written

    def _command_tail_written(self, new: int, old: int) -> None:
        if new >= ring_size(self.registers[COMMAND_BASE]):
            self.registers[COMMAND_TAIL] = old
        else:
            self.command_buffer.run()

    def _exclusion_written(self, new: int, old: int) -> None:
        """Devices are routed anew, with another range."""
        if new != old:
            self.domains.drop_all()

    def _control_written(self, new: int, old: int) -> None:
        turned = (new ^ old) & Control.IOMMU_EN
        if turned and not new & Control.IOMMU_EN and self.on_disable is not None:
            self.on_disable()
        if (new ^ old) & (Control.IOMMU_EN | Control.GT_EN):
            self.device_table.guest_enabled = bool(new & Control.GT_EN)
            self._forget_all()
        if turned and not new & Control.IOMMU_EN:
            self.device_tlbs.forget()
        if turned and new & Control.IOMMU_EN:
            self.enables += 1
            if self.on_enable is not None:
                self.on_enable()
        for enable, run, base in _RINGS:
            self._follow(new, old, enable, run, base)
        self.status.update()
        self.command_buffer.run()

    def _follow(self, new: int, old: int, enable: int, run: int, base: str) -> None:
        """A run bit follows its enable bit and IommuEn: a halted ring starts again only when one of them goes 0 to 1.

        A ring of a reserved length never starts.
        """
        needed = enable | Control.IOMMU_EN
        if new & needed != needed:
            self.status.change(clear=run)
        elif old & needed != needed and ring_size(self.registers[base]):
            self.status.change(set_=run)

    # Commands

    def _execute(self, command: Command, address: int) -> bool:
        """Do one command; False: it must wait for a device."""
        match command:
            case CompletionWait():
                if self.device_tlbs.waiting:
                    return False
                self._complete(command)
            case InvalidateDeviceEntry():
                self._forget(command.device_id)
            case InvalidatePages(pasid=None):
                self.domains.invalidate(command.domain_id, command.range)
            case InvalidatePages(pasid=int(pasid)):
                self.domains.invalidate_guest(command.domain_id, pasid, command.range)
            case InvalidateAll():
                self._forget_all()
            case PrefetchPages():
                self._prefetch(command)
            case CompletePpr():
                if command.device_id in self.endpoints:
                    self.ppr_log.complete(command)
            case InvalidateDeviceTlb():
                return self.device_tlbs.invalidate(command, address, time_out(self.registers[CONTROL]))
            case InvalidateInterruptTable():
                pass  # interrupts do not pass here: nothing of them is cached
        return True

    def _prefetch(self, command: PrefetchPages) -> None:
        """A hint: what is wrong with it, or with what it finds, is told when a request meets it."""
        rid, first = command.device_id, command.range
        if rid not in self.endpoints or (rid not in self.domains and not self.route(rid, command.pasid)):
            return
        addresses = AddressRange(first.start, first.size * max(command.count, 1))
        try:
            self.domains.prefetch(rid, command.pasid, addresses, invalidate=command.invalidate)
        except IoasidError as error:
            log.debug("%s: no prefetch for RID %#06x: %s", self.name, rid, error)

    def _invalidate_device_tlb(self, command: InvalidateDeviceTlb, answered: Callable[[], None]) -> None:
        if command.device_id in self.endpoints:
            self.domains.invalidate_device(command.device_id, command.pasid, command.range, answered)
        else:
            answered()

    def _complete(self, command: CompletionWait) -> None:
        """All before it is done, and nothing after it was begun: the flush bit has nothing left to wait for."""
        if command.store_address is not None:
            fault = self.dma.store(command.store_address, command.store_data, 8)
            if fault is not None:
                raise StoreFailed(command.store_address, fault)
        if command.interrupt:
            self.status.change(set_=Status.COM_WAIT_INT)

    # Memory

    def _read_memory(self, gpa: int, length: int) -> bytes | Fault:
        return self.dma.read(gpa, length)

    def _write_memory(self, gpa: int, data: bytes) -> Fault | None:
        return self.dma.write(gpa, data)
