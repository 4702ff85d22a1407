"""A queue: a ring in guest memory, the jobs fetched from it, and the commands that start and end it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from backend.core import Access, Fault
from backend.endpoints.dma_engine.descriptors import DESCRIPTOR_SIZE, Flag, parse
from backend.endpoints.dma_engine.jobs import Job
from backend.endpoints.dma_engine.operations import Scratch
from backend.endpoints.dma_engine.pages import PAGE, Operand, PageDesk, PageWait
from backend.endpoints.dma_engine.registers import (
    DEPTH,
    ERROR_SHIFT,
    ORDER_MAX,
    RING_ALIGNMENT,
    Control,
    Error,
    State,
)
from backend.pci.dma import DmaPort

_MASK32 = 0xFFFF_FFFF
_INTERRUPT = int(Flag.INTERRUPT)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the guest has set for a queue that starts. `ring` is an address, `order` log2 of its descriptors."""

    control: int = 0
    pasid: int = 0
    ring: int = 0
    order: int = 0
    vector: int = 0

    def sound(self, *, vectors: int, pasids: int) -> bool:
        """Whether a queue can start with them, on a device with so many vectors and PASIDs."""
        if self.order > ORDER_MAX or self.ring % RING_ALIGNMENT or self.vector >= vectors:
            return False
        if self.ring + (DESCRIPTOR_SIZE << self.order) > 1 << 64:
            return False
        if self.control & Control.PASID:
            return self.pasid < pasids
        return not self.control & Control.RING_PASID


class Device(Protocol):
    """The engine, as a queue sees it."""

    scratch: Scratch
    desk: PageDesk

    @property
    def memory(self) -> DmaPort: ...

    def ready(self, queue: Queue) -> None:
        """The queue has something to do, in the turn of whoever wrote a register."""

    def woken(self, queue: Queue) -> None:
        """The queue has something to do, out of turn."""

    def raise_vector(self, vector: int) -> None:
        """An interrupt, at the next pause."""

    def count(self, job: Job) -> None:
        """A job has ended."""


class Queue:
    """One queue of a device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._settings = Settings()
        self.state = State.DISABLED
        self.error = Error.NONE
        self.error_address = 0
        self.tail = 0
        self.head = 0
        self.completed = 0
        self._started: dict[Job, None] = {}
        self._held: deque[Job] = deque()
        """Fetched, and not begun: one with a fence, and what comes behind it."""
        self._ready: deque[Job] = deque()
        self._ring_wait: PageWait | None = None
        self._ring_waits = False

    @property
    def control(self) -> int:
        """CONTROL as it was at START; so are all settings."""
        return self._settings.control

    @property
    def pasid(self) -> int | None:
        """Of its requests, where they carry one."""
        return self._settings.pasid if self._settings.control & Control.PASID else None

    @property
    def status(self) -> int:
        """The STATUS register."""
        return self.state | self.error << ERROR_SHIFT

    @property
    def waiting(self) -> int:
        """Jobs that wait for pages."""
        return sum(job.waiting for job in self._started)

    @property
    def unanswered(self) -> int:
        """Pages asked for and not answered, whatever became of the job that asked."""
        return self._device.desk.outstanding(self)

    @property
    def runnable(self) -> bool:
        """Whether `turn` has something to do."""
        return bool(self._ready) or self._may_fetch

    # Commands

    def start(self, settings: Settings, *, vectors: int, pasids: int) -> None:
        """START: DISABLED to RUNNING, or to ERROR."""
        if self.state is not State.DISABLED:
            return
        self._settings = settings
        self.tail = self.head = self.completed = 0
        self.error, self.error_address = Error.NONE, 0
        if settings.sound(vectors=vectors, pasids=pasids):
            self.state = State.RUNNING
            self._device.desk.enter(self)
        else:
            self._settings = Settings(vector=settings.vector if settings.vector < vectors else 0)
            self.fail(Error.SETTING, 0)

    def drain(self) -> None:
        """DRAIN: what was fetched ends as usual, then the queue is DISABLED."""
        if self.state is State.RUNNING:
            self.state = State.DRAINING
            self._leave_ring()
            self._drained_yet()

    def abort(self) -> None:
        """ABORT: everything ends now, and the queue is DISABLED."""
        self._end_all()
        self.error, self.error_address = Error.NONE, 0
        self.state = State.DISABLED

    def fail(self, error: Error, address: int) -> None:
        """Everything ends now, and the queue is in ERROR."""
        self._end_all()
        self.error, self.error_address = error, address
        self.state = State.ERROR
        self._device.raise_vector(self._settings.vector)

    def reset(self) -> None:
        """As new: no record, no interrupt."""
        for job in (*self._started, *self._held):
            job.drop()
        self._forget()
        self._settings = Settings()
        self.state, self.error, self.error_address = State.DISABLED, Error.NONE, 0
        self.tail = self.head = self.completed = 0

    def ring(self, tail: int) -> None:
        """The doorbell: descriptors up to `tail` are there."""
        if self.state is not State.RUNNING:
            return
        pending = (self.tail - self.head) & _MASK32
        if pending + ((tail - self.tail) & _MASK32) > 1 << self._settings.order:
            self.fail(Error.DOORBELL, 0)
            return
        self.tail = tail
        self._device.ready(self)

    # Work

    def turn(self) -> int:
        """One slice of one job, and what must be fetched before; the effort that it took."""
        effort = 0
        if self._may_fetch:
            effort += 1
            self._fetch()
        if self._ready:
            job = self._ready.popleft()
            more, cost = job.step(self._device.memory, self._device.scratch)
            effort += cost
            if more:
                self._ready.append(job)
        return effort

    def woken(self, job: Job) -> None:
        """A job need not wait any longer."""
        self._ready.append(job)
        self._device.woken(self)

    def ended(self, job: Job) -> None:
        """A job's record is written."""
        job.drop()
        del self._started[job]
        self._count(job)
        self._begin()
        self._drained_yet()

    def new_wait(self, wake: Callable[[], None]) -> PageWait:
        """For a job that misses pages."""
        return PageWait(self._device.desk, self, wake)

    # Fetching

    @property
    def _may_fetch(self) -> bool:
        """Whether there are descriptors, and enough room to read several at once."""
        if self.state is not State.RUNNING or self.head == self.tail or self._ring_waits:
            return False
        jobs = len(self._started) + len(self._held)
        return jobs <= DEPTH // 2 or (jobs < DEPTH and not self._ready)

    def _fetch(self) -> None:
        """Read descriptors, of one page at the most, and begin what may begin."""
        settings = self._settings
        room = DEPTH - len(self._started) - len(self._held)
        offset = self.head % (1 << settings.order) * DESCRIPTOR_SIZE
        rest = min(PAGE, DESCRIPTOR_SIZE << settings.order) - offset % PAGE
        count = min(room, (self.tail - self.head) & _MASK32, rest // DESCRIPTOR_SIZE)
        pasid = self.pasid if settings.control & Control.RING_PASID else None
        image = self._device.memory.read(settings.ring + offset, count * DESCRIPTOR_SIZE, pasid)
        if isinstance(image, Fault):
            self._ring_missing(image, Operand(settings.ring + offset, count * DESCRIPTOR_SIZE, Access.READ, pasid))
            return
        self.head = (self.head + count) & _MASK32
        self._held.extend(Job(self, descriptor) for descriptor in parse(image))
        self._begin()

    def _ring_missing(self, fault: Fault, operand: Operand) -> None:
        if self._ring_wait is None:
            self._ring_wait = self.new_wait(self._ring_woken)
        self._ring_waits = True
        if self._ring_wait.meet(fault, [operand], self.head) is not None:
            self.fail(Error.RING, fault.iova)

    def _ring_woken(self) -> None:
        self._ring_waits = False
        self._device.woken(self)

    def _begin(self) -> None:
        """Begin what was fetched, as far as fences let it."""
        while self._held and not (self._held[0].fence and self._started):
            job = self._held.popleft()
            self._started[job] = None
            descriptor = job.descriptor
            if descriptor.flags & Flag.COMPLETION and not descriptor.check_record(self.control):
                self.fail(Error.COMPLETION, descriptor.completion)
                return
            job.begin()
            self._ready.append(job)

    # Ends

    def _drained_yet(self) -> None:
        if self.state is State.DRAINING and not self._started and not self._held:
            self._forget()
            self.state = State.DISABLED
            self._device.raise_vector(self._settings.vector)

    def _end_all(self) -> None:
        jobs = (*self._started, *self._held)
        self._forget()
        for job in jobs:
            job.abort(self._device.memory)
            self._count(job)

    def _forget(self) -> None:
        self._leave_ring()
        self._started.clear()
        self._held.clear()
        self._ready.clear()
        self._device.desk.leave(self)

    def _leave_ring(self) -> None:
        if self._ring_wait is not None:
            self._ring_wait.close()
            self._ring_wait = None
        self._ring_waits = False

    def _count(self, job: Job) -> None:
        self.completed = (self.completed + 1) & _MASK32
        self._device.count(job)
        if job.descriptor.flags & _INTERRUPT:
            self._device.raise_vector(self._settings.vector)
