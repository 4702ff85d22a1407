"""The NVMe controller as a PCI function: its life by registers, its work by doorbells."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from backend.core import Fault
from backend.endpoints.nvme import registers
from backend.endpoints.nvme.admin import AdminCommands
from backend.endpoints.nvme.arbitration import Arbiter, QueueMemoryLost
from backend.endpoints.nvme.commands import Command
from backend.endpoints.nvme.events import AsyncEvents, Event
from backend.endpoints.nvme.features import Features
from backend.endpoints.nvme.identity import PCI_IDS, Identity
from backend.endpoints.nvme.io import IoCommands
from backend.endpoints.nvme.logs import NO_COMMAND, ErrorLog, Health
from backend.endpoints.nvme.namespace import Namespace
from backend.endpoints.nvme.queues import COMPLETION_SIZE, VECTORS, QueueTable, SubmissionQueue
from backend.endpoints.nvme.status import CommandFailed
from backend.endpoints.nvme.transfers import Transfers
from backend.pci import Bar, DmaPort, Msix, PciExpress, PciFunction, PowerManagement, ResetKind, Turns

_log = logging.getLogger(__name__)
# A guest can make the controller fail as often as it likes; the log tells of the first ones.
_REPORTED_FAILURES = 16


@dataclass(slots=True)
class NvmeCounters:
    """Since the controller was made. Commands by opcode (256 at most each)."""

    admin: Counter[int] = field(default_factory=Counter)
    io: Counter[int] = field(default_factory=Counter)
    errors: int = 0
    interrupts: int = 0
    doorbells: int = 0
    failures: int = 0
    """Times that CSTS.CFS was set."""


class NvmeController(PciFunction):
    """An I/O controller of NVM Express 1.4 with one namespace, up to 16 I/O queue pairs and 17 MSI-X vectors.

    BAR0 is a 32-bit one: firmware that runs in 32-bit mode can drive the controller wherever it was put.
    Guest memory is reached through `self.dma` alone.
    """

    def __init__(
        self,
        namespace: Namespace,
        *,
        name: str = "nvme",
        identity: Identity | None = None,
        force_bus_master: bool = False,
    ) -> None:
        self._registers = registers.new_table()
        super().__init__(
            name=name,
            ids=PCI_IDS,
            bars={0: Bar(registers.BAR_SIZE, self._registers)},
            capabilities=(
                PowerManagement(),
                PciExpress(),
                Msix(
                    vectors=VECTORS, table_bar=0, table_offset=registers.MSIX_TABLE, pba_offset=registers.MSIX_PENDING
                ),
            ),
            force_bus_master=force_bus_master,
        )
        self.namespace = namespace
        self.counters = NvmeCounters()
        self.last_failure = ""
        """Why CSTS.CFS was set last, in a sentence."""
        self.transfers = Transfers(self._port)
        self.queues = QueueTable()
        self.errors = ErrorLog()
        self.health = Health()
        self._interrupt_mask = 0
        self._turns = Turns(self.drained)
        self._features = Features()
        self._events = AsyncEvents()
        self._arbiter = Arbiter(
            port=self._port,
            queues=self.queues,
            transfers=self.transfers,
            features=self._features,
            events=self._events,
            execute=self._execute,
            misrung=self._misrung,
        )
        self._io = IoCommands(namespace, self.transfers, self._features, self.health)
        self._admin = AdminCommands(
            identity=identity or Identity.named(name),
            namespace=namespace,
            port=self._port,
            transfers=self.transfers,
            queues=self.queues,
            arbiter=self._arbiter,
            features=self._features,
            events=self._events,
            errors=self.errors,
            health=self.health,
        )
        self._registers.on_write("CC", self._configuration_written)
        self._registers.on_write("INTMS", lambda new, _old: self._mask(self._interrupt_mask | new))
        self._registers.on_write("INTMC", lambda new, _old: self._mask(self._interrupt_mask & ~new))

    # BAR

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Doorbells are noted here and served in drained(); everything else goes to the register table."""
        if offset < registers.DOORBELLS:
            super().bar_write(bar, offset, size, value)
        elif offset < registers.MSIX_TABLE:
            self.counters.doorbells += 1
            # A doorbell is one aligned dword (3.1: anything else is undefined), and means nothing while disabled.
            if size == 4 and offset % 4 == 0 and self.ready and not self.failed:
                self._arbiter.ring(offset - registers.DOORBELLS, value)

    def drained(self) -> None:
        """Serve what was rung, then raise one interrupt for each completion queue that got something."""
        self._turns.check()
        while not self._arbiter.idle and self.bus_master:
            more = self._serve()
            if more and self._turns.defer():
                return

    def reset(self, kind: ResetKind) -> None:
        """All as at power on, but for the blocks and the error log."""
        if self.ready and kind is not ResetKind.FLR:
            self.health.unsafe_shutdowns += not self._registers["CSTS"] & registers.CSTS_SHUTDOWN_MASK
        self.health.power_cycles += kind is ResetKind.LOST_CONNECTION
        super().reset(kind)
        self._stop()
        self._mask(0)

    # State

    @property
    def ready(self) -> bool:
        """Whether the guest has enabled the controller and may ring doorbells."""
        return bool(self._registers["CSTS"] & registers.CSTS_READY)

    @property
    def failed(self) -> bool:
        """Whether the controller gave up (CSTS.CFS) and waits for a reset by the guest."""
        return bool(self._registers["CSTS"] & registers.CSTS_FATAL)

    @property
    def admin_queue(self) -> int:
        """IOVA of the admin submission queue (ASQ): memory that stays mapped as long as the controller is enabled."""
        return self._registers["ASQ"]

    def probe_write(self, iova: int, data: bytes) -> Fault | None:
        """DMA `data` to guest memory by order of the control path; the Fault if it did not get there."""
        return self.transfers.probe_write(iova, data)

    def probe_read(self, iova: int, length: int) -> bytes | Fault:
        """DMA `length` bytes from guest memory by order of the control path, or the Fault."""
        return self.transfers.probe_read(iova, length)

    def _port(self) -> DmaPort:
        return self.dma

    # Registers

    def _configuration_written(self, new: int, old: int) -> None:
        """CC, 3.1.5: enable, disable, shut down."""
        sizes = (
            new >> registers.CC_IOSQES_SHIFT & registers.CC_ENTRY_SIZE_MASK,
            new >> registers.CC_IOCQES_SHIFT & registers.CC_ENTRY_SIZE_MASK,
        )
        self.queues.entry_sizes_set = sizes == (6, COMPLETION_SIZE.bit_length() - 1)
        if new & ~old & registers.CC_ENABLE:
            self._enable(new)
        elif old & ~new & registers.CC_ENABLE:
            # Controller Reset, 7.3.2: all but AQA, ASQ and ACQ.
            self._stop()
            self._registers["CSTS"] = 0
        status = self._registers["CSTS"] & ~registers.CSTS_SHUTDOWN_MASK
        if new & registers.CC_SHN_MASK:
            # Normal or abrupt, 7.6.2: every command fetched has completed, so only the blocks are left to settle.
            self.namespace.flush()
            status |= registers.CSTS_SHUTDOWN_COMPLETE
        self._registers["CSTS"] = status

    def _enable(self, cc: int) -> None:
        shift = registers.page_shift(cc)
        aqa, sq_base, cq_base = (self._registers[name] for name in ("AQA", "ASQ", "ACQ"))
        sq_size, cq_size = (aqa & 0xFFF) + 1, (aqa >> 16 & 0xFFF) + 1
        wrong = None
        if cc >> registers.CC_CSS_SHIFT & registers.CC_CSS_MASK:
            wrong = "CC.CSS selects a command set that CAP.CSS does not offer"
        elif cc >> registers.CC_AMS_SHIFT & registers.CC_AMS_MASK:
            wrong = "CC.AMS selects an arbitration that CAP.AMS does not offer"
        elif shift > registers.MAX_PAGE_SHIFT:
            wrong = f"CC.MPS selects pages of {1 << shift} bytes, beyond CAP.MPSMAX"
        elif sq_size < 2 or cq_size < 2:
            wrong = f"AQA sets admin queues of {sq_size} and {cq_size} entries: each needs at least 2"
        elif (sq_base | cq_base) % (1 << shift):
            wrong = f"ASQ {sq_base:#x} or ACQ {cq_base:#x} is not aligned to pages of {1 << shift} bytes"
        if wrong is not None:
            self._fail(wrong)
            return
        self.transfers.page_size = self.queues.page_size = 1 << shift
        self.queues.create_admin(sq_base, sq_size, cq_base, cq_size)
        self._registers["CSTS"] = registers.CSTS_READY

    def _stop(self) -> None:
        """No queue, nothing rung, features and events at their defaults."""
        self.queues.clear()
        self._arbiter.reset()
        self._features.reset()
        self._events.reset()

    def _fail(self, why: str) -> None:
        """Controller Fatal Status, 9.5: nothing more is done until the guest resets the controller."""
        self.queues.clear()
        self._arbiter.reset()
        self._registers["CSTS"] |= registers.CSTS_FATAL
        self.last_failure = why
        self.counters.failures += 1
        if self.counters.failures <= _REPORTED_FAILURES:
            _log.warning("%s: controller fatal status: %s", self.name, why)

    def _mask(self, value: int) -> None:
        """INTMS and INTMC read as the mask. It concerns pin interrupts and MSI only, and there are none."""
        self._interrupt_mask = self._registers["INTMS"] = self._registers["INTMC"] = value

    # Work

    def _serve(self) -> bool:
        """One bounded run of the arbiter; whether there is more to do."""
        try:
            more = self._arbiter.run()
        except QueueMemoryLost as lost:
            self._fail(str(lost))
            more = False
        for vector in sorted(self._arbiter.vectors):
            self.counters.interrupts += 1
            self.interrupt(vector)
        self._arbiter.vectors.clear()
        return more

    def _execute(self, sq: SubmissionQueue, command: Command) -> None:
        """Carry out one command and post its completion, unless it completes later."""
        commands, counter = (self._io, self.counters.io) if sq.qid else (self._admin, self.counters.admin)
        counter[command.opcode] += 1
        try:
            result = commands.execute(command)
        except CommandFailed as failed:
            self._note(sq.qid, command, failed)
            sq.completions.post(sq, command.cid, failed.field)
        else:
            if result is not None:
                sq.completions.post(sq, command.cid, 0, result)

    def _note(self, sqid: int, command: Command, failed: CommandFailed) -> None:
        self.counters.errors += 1
        self.errors.add(
            sqid=sqid,
            cid=command.cid,
            status_field=failed.field,
            byte=failed.byte,
            lba=command.slba if sqid else 0,
            nsid=command.nsid,
            fault_iova=failed.fault.iova if failed.fault is not None else 0,
        )

    def _misrung(self, event: Event, qid: int) -> None:
        """A doorbell that no queue has, or a value that it cannot take."""
        self.errors.add(sqid=qid, cid=NO_COMMAND, status_field=0, byte=None)
        self._events.report(event)
