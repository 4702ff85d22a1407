"""The DMA engine as a PCI function: its registers, its queues in turn, its interrupts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from backend.endpoints.dma_engine import registers
from backend.endpoints.dma_engine.descriptors import Opcode, Status
from backend.endpoints.dma_engine.jobs import Job
from backend.endpoints.dma_engine.operations import Scratch
from backend.endpoints.dma_engine.pages import PageDesk
from backend.endpoints.dma_engine.queues import Queue, Settings
from backend.endpoints.dma_engine.registers import Command, Feature, of_queue
from backend.pci import (
    Ats,
    Bar,
    Msix,
    Pasid,
    PciExpress,
    PciFunction,
    PciIds,
    PowerManagement,
    Pri,
    ResetKind,
    Turns,
)

# 0x1234 belongs to no member of the PCI-SIG, and the id is that of no other endpoint here: its driver binds by both.
PCI_IDS = PciIds(vendor=0x1234, device=0x10A6, class_code=0x088000)

PASID_WIDTH = 16  # as wide as the AMD driver uses them
PAGE_REQUESTS_MAX = 512
"""PRI capacity: source and target of 1 MiB. How much of it is used is the guest's decision (the allocation)."""

# Effort (units of 64 KiB copied, or small jobs) of one run: a millisecond or two, then the loop serves everyone else.
_EFFORT = 64


@dataclass(slots=True)
class DmaCounters:
    """Since the last reset; what the counter registers show."""

    jobs: int = 0
    bytes: int = 0
    faults: int = 0
    interrupts: int = 0
    doorbells: int = 0


class DmaEngine(PciFunction):
    """A DMA engine with so many queues (1 to 16), a doorbell page and an MSI-X vector each.

    Guest memory is reached through `self.memory` alone. A job that misses pages waits for the guest's answer while
    others run; work is done in slices, queue by queue, and after a bounded run the event loop has its turn.
    """

    def __init__(
        self, *, name: str = "dma", queues: int = 8, pasids: bool = True, force_bus_master: bool = False
    ) -> None:
        """`pasids`: with what serves processes, PASID, ATS and PRI; else its DMA is the kernel's alone."""
        if not 1 <= queues <= registers.QUEUES_MAX:
            raise ValueError(f"{name}: {queues} queues: give 1 to {registers.QUEUES_MAX}")
        self._registers = registers.new_table(queues, sum(1 << opcode for opcode in Opcode))
        super().__init__(
            name=name,
            ids=PCI_IDS,
            bars={0: Bar(registers.BAR_SIZE, self._registers), registers.MSIX_BAR: Bar(registers.MSIX_BAR_SIZE)},
            capabilities=(
                PowerManagement(),
                PciExpress(prefixes=True),
                Msix(
                    vectors=queues,
                    table_bar=registers.MSIX_BAR,
                    table_offset=registers.MSIX_TABLE,
                    pba_offset=registers.MSIX_PENDING,
                ),
                *((Ats(), Pri(outstanding=PAGE_REQUESTS_MAX), Pasid(width=PASID_WIDTH)) if pasids else ()),
            ),
            force_bus_master=force_bus_master,
        )
        self.counters = DmaCounters()
        self.scratch = Scratch()
        self.desk = PageDesk(self)
        self.queues = tuple(Queue(self) for _ in range(queues))
        self._ready: dict[Queue, None] = {}
        """In the order of their turns."""
        self._vectors: set[int] = set()
        self._running = False
        self._turns = Turns(self.drained)
        self._connect_registers()

    # What queues ask for

    def ready(self, queue: Queue) -> None:
        """A queue has something to do, as the transport will ask by `drained`."""
        self._ready[queue] = None

    def woken(self, queue: Queue) -> None:
        """A queue has something to do: an answer came, by a way of which the transport knows nothing."""
        self._ready[queue] = None
        if not self._running and not self._turns.defer():
            self.drained()

    def raise_vector(self, vector: int) -> None:
        """Interrupt at the next pause: one for all that asked since the last."""
        self._vectors.add(vector)

    def count(self, job: Job) -> None:
        """A job has ended."""
        self.counters.jobs += 1
        self.counters.bytes += job.done
        self.counters.faults += job.status == Status.FAULT

    # Life

    def drained(self) -> None:
        """Serve the queues that have something to do."""
        self._turns.check()
        if self._running:
            return  # an answer to a page request that a job asks at this moment
        while self._serve() and not self._turns.defer():
            pass

    def reset(self, kind: ResetKind) -> None:
        """All as at power on. Jobs end first, so that nothing is left to be told of what the reset takes away."""
        self._reset_queues()
        super().reset(kind)

    def _reset_queues(self) -> None:
        for queue in self.queues:
            queue.reset()
        self._ready.clear()
        self._vectors.clear()
        self.counters = DmaCounters()
        self.desk.clear_counts()

    # Work

    def _serve(self) -> bool:
        """Turns of the queues up to a bound, then the interrupts; whether there is more to do."""
        effort = 0
        self._running = True
        try:
            while self._ready and effort < _EFFORT:
                queue = next(iter(self._ready))
                del self._ready[queue]
                if queue.runnable:
                    effort += queue.turn()
                    if queue.runnable:
                        self._ready[queue] = None  # behind the others
        finally:
            self._running = False
        vectors, self._vectors = self._vectors, set()
        for vector in sorted(vectors):
            self.counters.interrupts += 1
            self.interrupt(vector)
        return bool(self._ready)

    # Registers

    def _connect_registers(self) -> None:
        table = self._registers
        table.on_write("RESET", self._reset_written)
        table.on_read("FEATURES", self._features)
        table.on_read("JOBS", lambda: self.counters.jobs)
        table.on_read("BYTES", lambda: self.counters.bytes)
        table.on_read("FAULTS", lambda: self.counters.faults)
        table.on_read("PAGE_GROUPS", lambda: self.desk.groups)
        table.on_read("PAGE_REQUESTS", lambda: self.desk.pages)
        table.on_read("PAGE_ANSWERS", lambda: self.desk.answers)
        for number, queue in enumerate(self.queues):
            for name in registers.SETTINGS:
                table.on_write(of_queue(name, number), partial(self._setting_written, queue, of_queue(name, number)))
            table.on_write(of_queue("COMMAND", number), partial(self._queue_command_written, number))
            table.on_write(of_queue("DB_TAIL", number), partial(self._doorbell_written, queue))
            for name, attribute in _LIVE.items():
                table.on_read(of_queue(name, number), partial(getattr, queue, attribute))

    def _features(self) -> int:
        features = Feature.PASID if self.pasids.enabled else Feature(0)
        if self.tlb is not None:
            features |= Feature.ATS
        if self.desk.usable is not None:
            features |= Feature.PAGE_REQUESTS
        return int(features)

    def _reset_written(self, new: int, _old: int) -> None:
        self._registers["RESET"] = 0
        if new == registers.RESET:
            self._reset_queues()
            self._registers.reset()

    def _setting_written(self, queue: Queue, name: str, _new: int, old: int) -> None:
        if queue.state is not registers.State.DISABLED:
            self._registers[name] = old

    def _queue_command_written(self, number: int, new: int, _old: int) -> None:
        queue = self.queues[number]
        self._registers[of_queue("COMMAND", number)] = 0
        if new == Command.START:
            values = (self._registers[of_queue(name, number)] for name in registers.SETTINGS)
            queue.start(Settings(*values), vectors=len(self.queues), pasids=1 << PASID_WIDTH)
        elif new == Command.DRAIN:
            queue.drain()
        elif new == Command.ABORT:
            queue.abort()

    def _doorbell_written(self, queue: Queue, new: int, _old: int) -> None:
        self.counters.doorbells += 1
        queue.ring(new)


_LIVE = {
    "STATUS": "status",
    "TAIL": "tail",
    "HEAD": "head",
    "COMPLETED": "completed",
    "WAITING": "waiting",
    "ERROR_ADDRESS": "error_address",
    "UNANSWERED": "unanswered",
    "DB_TAIL": "tail",
    "DB_HEAD": "head",
    "DB_COMPLETED": "completed",
    "DB_STATUS": "status",
}
"""Registers that show a queue as it is."""
