"""The AMD IOMMU as a PCI function: registers and queues of the guest on one side, IOASID commands on the other.

Source: AMD I/O Virtualization Technology (IOMMU) Specification, publication 48882; section numbers are its own. Where
it calls the effect of a software error undefined, a write is ignored: software then reads back what still holds.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable

from backend.core import Fault
from backend.ioasid import Context, IoasidError
from backend.pci import Bar, Msi, PciFunction, PciIds, RawCapability, ResetKind
from backend.pci.registers import WriteHook
from backend.viommu.amd import features
from backend.viommu.amd.command_buffer import UnreadableCommand, pending_commands
from backend.viommu.amd.commands import (
    Command,
    CompletionWait,
    IllegalCommand,
    InvalidateAll,
    InvalidateDeviceEntry,
    InvalidateDeviceTlb,
    InvalidateInterruptTable,
    InvalidatePages,
    Opcode,
    decode,
)
from backend.viommu.amd.device_table import EVERYTHING, Decision, DeviceTable, Verdict
from backend.viommu.amd.domains import Domains
from backend.viommu.amd.event_log import EventCode, EventLog, EventNotWritten, code_of, event
from backend.viommu.amd.faults import hardware_error, request_event
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
    STATUS,
    Control,
    Status,
    register_table,
    ring_address,
    ring_size,
)

log = logging.getLogger(__name__)

IDS = PciIds(vendor=0x1022, device=0x1419, class_code=0x080600)


class StoreFailed(Exception):
    """Guest memory did not take the store of a COMPLETION_WAIT."""

    def __init__(self, address: int, fault: Fault) -> None:
        super().__init__(f"the completion store to {address:#x} was not taken: {fault.reason.name}")
        self.address = address
        self.fault = fault


class AmdIommu(PciFunction):
    """An AMD IOMMU for `endpoints` (RIDs), for the VM whose memory is the IOASID `stage2` of `context`.

    The owner binds the endpoints' devices and this function's own to the context, attaches this function's own to
    `stage2`, and hands `route` and `on_fault` to the engine. Attachments of the endpoints are this front end's: they
    come with an endpoint's first request and go when the guest invalidates.

    `on_enable` is called when the guest has turned the IOMMU on, `on_disable` when it turns it off, before a route
    changes: what is counted between the two passed the guest's device table.
    """

    def __init__(self, context: Context, stage2: int, endpoints: Iterable[int], *, name: str = "amd-iommu") -> None:
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
        self.event_log = EventLog(self._write_memory)
        self.on_enable: Callable[[], None] | None = None
        self.on_disable: Callable[[], None] | None = None
        self.enables = 0
        """Times that the guest turned the IOMMU on."""
        self.commands: Counter[Opcode] = Counter()
        """Commands done, by opcode."""
        self.aborted = 0
        """Requests that were translated to where no memory is: they end there, which is no event of an IOMMU."""
        self._page_faulted: set[int] = set()
        """Endpoints with a page fault since their entry was read, for SE."""
        self._interrupting = 0
        """Status bits whose interrupt was raised and which software has not cleared since."""
        command_run, event_run = Status.CMD_BUF_RUN, Status.EVENT_LOG_RUN
        for register, hook in (
            (COMMAND_BASE, self._base_hook(COMMAND_BASE, COMMAND_HEAD, COMMAND_TAIL, command_run)),
            (COMMAND_HEAD, self._pointer_hook(COMMAND_HEAD, COMMAND_BASE, command_run)),
            (COMMAND_TAIL, self._command_tail_written),
            (EVENT_BASE, self._base_hook(EVENT_BASE, EVENT_HEAD, EVENT_TAIL, event_run)),
            (EVENT_HEAD, self._pointer_hook(EVENT_HEAD, EVENT_BASE, 0)),
            (EVENT_TAIL, self._pointer_hook(EVENT_TAIL, EVENT_BASE, event_run)),
            (CONTROL, self._control_written),
            (STATUS, lambda _new, _old: self._raise_interrupts()),
        ):
            self.registers.on_write(register, hook)

    @property
    def enabled(self) -> bool:
        """Whether the guest has turned the IOMMU on (IommuEn)."""
        return bool(self.registers[CONTROL] & Control.IOMMU_EN)

    @property
    def event_log_range(self) -> tuple[int, int]:
        """GPA and bytes of the guest's event log: the one part of memory that a refused request changes."""
        return ring_address(self.registers[EVENT_BASE]), ring_size(self.registers[EVENT_BASE])

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
        self.device_table.guest_enabled = False
        self._forget_all()
        self._interrupting = 0

    # What the engine asks and tells

    def route(self, rid: int, pasid: int | None = None) -> bool:
        """Attach an endpoint that has no route, as its device table entry says. False: its requests are refused."""
        if rid not in self.endpoints:
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
            self._log_event(raw)
        elif not verdict.suppress_all and not (verdict.suppress_repeated and fault.rid in self._page_faulted):
            self._page_faulted.add(fault.rid)
            self._log_event(raw)

    def _attach(self, rid: int, verdict: Verdict) -> bool:
        try:
            self.domains.route(rid, verdict)
        except IoasidError as error:
            log.warning("%s: no route for RID %#06x: %s", self.name, rid, error)
            return False
        return True

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
            self._run_commands()

    def _control_written(self, new: int, old: int) -> None:
        turned = (new ^ old) & Control.IOMMU_EN
        if turned and not new & Control.IOMMU_EN and self.on_disable is not None:
            self.on_disable()
        if (new ^ old) & (Control.IOMMU_EN | Control.GT_EN):
            self.device_table.guest_enabled = bool(new & Control.GT_EN)
            self._forget_all()
        if turned and new & Control.IOMMU_EN:
            self.enables += 1
            if self.on_enable is not None:
                self.on_enable()
        self._follow(new, old, Control.EVENT_LOG_EN, Status.EVENT_LOG_RUN, EVENT_BASE)
        self._follow(new, old, Control.CMD_BUF_EN, Status.CMD_BUF_RUN, COMMAND_BASE)
        self._raise_interrupts()
        self._run_commands()

    def _follow(self, new: int, old: int, enable: int, run: int, base: str) -> None:
        """A run bit follows its enable bit and IommuEn: a halted ring starts again only when one of them goes 0 to 1.

        A ring of a reserved length never starts.
        """
        needed = enable | Control.IOMMU_EN
        if new & needed != needed:
            self._change_status(clear=run)
        elif old & needed != needed and ring_size(self.registers[base]):
            self._change_status(set_=run)

    def _change_status(self, *, set_: int = 0, clear: int = 0) -> None:
        self.registers[STATUS] = self.registers[STATUS] & ~clear | set_
        self._raise_interrupts()

    def _raise_interrupts(self) -> None:
        """One interrupt when a status bit and its enable bit have come together, the next after software cleared it."""
        control = self.registers[CONTROL]
        wanted = 0
        if control & Control.EVENT_INT_EN:
            wanted |= Status.EVENT_LOG_INT | Status.EVENT_OVERFLOW
        if control & Control.COM_WAIT_INT_EN:
            wanted |= Status.COM_WAIT_INT
        wanted &= self.registers[STATUS]
        if wanted & ~self._interrupting:
            self.interrupt()
        self._interrupting = wanted

    # Commands

    def _run_commands(self) -> None:
        """All commands up to the tail, while the buffer runs: one round of the ring (at most 32,768) a doorbell."""
        if not self.registers[STATUS] & Status.CMD_BUF_RUN:
            return
        base, size = ring_address(self.registers[COMMAND_BASE]), ring_size(self.registers[COMMAND_BASE])
        head, tail = self.registers[COMMAND_HEAD], self.registers[COMMAND_TAIL]
        try:
            for offset, raw in pending_commands(self._read_memory, base, size, head, tail):
                opcode, command = decode(raw, features.EFR)
                self._execute(command)
                self.commands[opcode] += 1
                self.registers[COMMAND_HEAD] = (offset + len(raw)) % size
        except IllegalCommand as error:
            self._halt(EventCode.ILLEGAL_COMMAND_ERROR, base + self.registers[COMMAND_HEAD], 0, error)
        except (UnreadableCommand, StoreFailed) as error:
            self._halt(EventCode.COMMAND_HARDWARE_ERROR, error.address, hardware_error(error.fault), error)

    def _halt(self, code: EventCode, address: int, flags: int, error: Exception) -> None:
        """Stop at the command that the head pointer names (sections 2.5.6, 2.5.7)."""
        log.debug("%s: %s: %s", self.name, code.name, error)
        self._change_status(clear=Status.CMD_BUF_RUN)
        self._log_event(event(code, address=address, flags=flags))

    def _execute(self, command: Command) -> None:
        match command:
            case CompletionWait():
                self._complete(command)
            case InvalidateDeviceEntry():
                self._forget(command.device_id)
            case InvalidatePages(pasid=None):
                self.domains.invalidate(command.domain_id, command.range)
            case InvalidatePages(pasid=int(pasid)):
                self.domains.invalidate_guest(command.domain_id, pasid, command.range)
            case InvalidateAll():
                self._forget_all()
            case InvalidateDeviceTlb() | InvalidateInterruptTable():
                pass  # no endpoint has a device TLB, and interrupts do not pass here: nothing of either is cached

    def _complete(self, command: CompletionWait) -> None:
        """Every command is done before the next one is read, so the flush bit has nothing left to wait for."""
        if command.store_address is not None:
            fault = self.dma.store(command.store_address, command.store_data, 8)
            if fault is not None:
                raise StoreFailed(command.store_address, fault)
        if command.interrupt:
            self._change_status(set_=Status.COM_WAIT_INT)

    # Events

    def _log_event(self, raw: bytes) -> None:
        """Write an event and move the tail; a full log stops, and so does one that guest memory does not take."""
        status = self.registers[STATUS]
        if not status & Status.EVENT_LOG_RUN or status & Status.EVENT_OVERFLOW:
            self.event_log.lost[code_of(raw)] += 1
            return
        base = self.registers[EVENT_BASE]
        head, tail = self.registers[EVENT_HEAD], self.registers[EVENT_TAIL]
        try:
            following = self.event_log.append(raw, ring_address(base), ring_size(base), head, tail)
        except EventNotWritten as error:
            log.debug("%s: %s", self.name, error)
            self._change_status(clear=Status.EVENT_LOG_RUN)
            return
        if following is None:
            self._change_status(set_=Status.EVENT_OVERFLOW, clear=Status.EVENT_LOG_RUN)
        else:
            self.registers[EVENT_TAIL] = following
            self._change_status(set_=Status.EVENT_LOG_INT)

    # Memory

    def _read_memory(self, gpa: int, length: int) -> bytes | Fault:
        return self.dma.read(gpa, length)

    def _write_memory(self, gpa: int, data: bytes) -> Fault | None:
        return self.dma.write(gpa, data)
