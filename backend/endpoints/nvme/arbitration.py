"""Which queue is served next, and how its commands become completions (NVM Express 1.4, 4.13.1 round robin).

A ring only notes that a queue has work. `run` then serves the queues in turn, a burst each, so that all that a batch of
messages brought is done together: one read of entries, one publication and at most one interrupt a completion queue.
"""

from __future__ import annotations

from collections.abc import Callable

from backend.core import Fault
from backend.endpoints.nvme.commands import Command, parse
from backend.endpoints.nvme.doorbells import ShadowDoorbells, queue_of
from backend.endpoints.nvme.events import AsyncEvents, Event
from backend.endpoints.nvme.features import Features
from backend.endpoints.nvme.queues import CompletionQueue, QueueTable, SubmissionQueue
from backend.endpoints.nvme.status import Status
from backend.endpoints.nvme.transfers import Transfers
from backend.pci.dma import DmaPort

# Effort (commands, and units of 64 KiB moved) of one run: a few milliseconds, then the loop serves everyone else.
_EFFORT = 256
# Entries of one turn where the guest set no limit: as large as a page of them.
_LARGEST_BURST = 64


class QueueMemoryLost(Exception):
    """A queue or a doorbell page could not be reached: there is no completion to tell it by."""

    def __init__(self, what: str, fault: Fault) -> None:
        super().__init__(f"{what} at IOVA {fault.iova:#x}: {fault.reason.name}")
        self.fault = fault


class Arbiter:
    """Serves the submission queues of an enabled controller."""

    def __init__(
        self,
        *,
        port: Callable[[], DmaPort],
        queues: QueueTable,
        transfers: Transfers,
        features: Features,
        events: AsyncEvents,
        execute: Callable[[SubmissionQueue, Command], None],
        misrung: Callable[[Event, int], None],
    ) -> None:
        self._port = port
        self._queues = queues
        self._transfers = transfers
        self._features = features
        self._events = events
        self._execute = execute
        self._misrung = misrung
        self._ready: dict[int, SubmissionQueue] = {}
        self._rung = False
        self.shadow: ShadowDoorbells | None = None
        self.vectors: set[int] = set()
        """Interrupt vectors of the completion queues that got something since this set was last emptied."""

    @property
    def idle(self) -> bool:
        """Whether nothing has been rung since the last run ended with nothing left to do."""
        return not self._rung

    def reset(self) -> None:
        """Forget what was rung; the queues themselves are the table's."""
        self._ready.clear()
        self._rung = False
        self.shadow = None
        self.vectors.clear()

    def ring(self, offset: int, value: int) -> None:
        """A doorbell `offset` bytes behind the first one was written (3.1.24, 3.1.25)."""
        self._rung = True
        value &= 0xFFFF
        qid, completion = queue_of(offset)
        shadowed = self.shadow is not None and qid != 0
        if completion:
            cq = self._queues.completion.get(qid)
            if cq is None:
                self._misrung(Event.INVALID_DOORBELL_REGISTER, qid)
            elif not shadowed and (value == cq.head or not cq.move_head(value)):
                self._misrung(Event.INVALID_DOORBELL_VALUE, qid)
            return
        sq = self._queues.submission.get(qid)
        if sq is None:
            self._misrung(Event.INVALID_DOORBELL_REGISTER, qid)
        elif shadowed or (value != sq.tail and sq.move_tail(value)):
            self._ready[qid] = sq
        else:
            self._misrung(Event.INVALID_DOORBELL_VALUE, qid)

    def run(self) -> bool:
        """Serve what is ready, up to a bound; True if the bound ended it. Raises QueueMemoryLost."""
        limit = self._transfers.effort + _EFFORT
        served = True
        while served:
            served = False
            for sq in tuple(self._ready.values()):
                if self._queues.submission.get(sq.qid) is not sq:  # deleted since it was rung
                    if self._ready.get(sq.qid) is sq:
                        del self._ready[sq.qid]
                    continue
                served |= self._turn(sq)
                if self._transfers.effort >= limit:
                    return True
        self._tell_events()
        self._rung = False
        return False

    def _turn(self, sq: SubmissionQueue) -> bool:
        """One burst of one queue; whether anything was done."""
        # To the end of the line, so that a run that stops here goes on with the others.
        del self._ready[sq.qid]
        cq = sq.completions
        if not self._has_work(sq):
            return False
        self._ready[sq.qid] = sq
        if cq.waiting:
            self._publish(cq)
        room = self._room(cq)
        if room <= 0:
            return False  # served again when the guest has released completions
        burst = self._features.burst or _LARGEST_BURST
        entries = sq.fetch(self._port(), min(burst, room))
        if isinstance(entries, Fault):
            raise QueueMemoryLost(f"submission queue {sq.qid}", entries)
        for command in parse(entries):
            self._transfers.effort += 1
            self._execute(sq, command)
        self._publish(cq)
        return True

    def _has_work(self, sq: SubmissionQueue) -> bool:
        """Whether commands are pending; a shadowed queue without any is asked to ring before it is let go."""
        shadow = self.shadow if sq.qid else None
        if shadow is None:
            return sq.pending > 0
        if sq.pending == 0:
            if shadow.watched(sq) != sq.tail:
                self._check("event index", shadow.watch(sq))
            self._read_tail(shadow, sq)
        return sq.pending > 0

    def _read_tail(self, shadow: ShadowDoorbells, sq: SubmissionQueue) -> None:
        value = shadow.doorbell(sq)
        if isinstance(value, Fault):
            raise QueueMemoryLost("shadow doorbell", value)
        if value != sq.tail and not sq.move_tail(value):
            self._misrung(Event.INVALID_DOORBELL_VALUE, sq.qid)

    def _room(self, cq: CompletionQueue) -> int:
        """Free completion entries. The shadow is read once half of them are gone, well before it must ring again."""
        shadow = self.shadow if cq.qid else None
        if shadow is None or cq.room >= cq.size // 2:
            return cq.room
        self._read_head(shadow, cq)
        if cq.room <= 0:
            self._check("event index", shadow.watch(cq))
            self._read_head(shadow, cq)
        if cq.room > 0:
            self._check("event index", shadow.ignore(cq))
        return cq.room

    def _read_head(self, shadow: ShadowDoorbells, cq: CompletionQueue) -> None:
        value = shadow.doorbell(cq)
        if isinstance(value, Fault):
            raise QueueMemoryLost("shadow doorbell", value)
        if not cq.move_head(value):
            self._misrung(Event.INVALID_DOORBELL_VALUE, cq.qid)

    def _tell_events(self) -> None:
        """Complete event requests that have something to tell, and what waited for room in the admin queue."""
        sq = self._queues.submission.get(0)
        if sq is None:
            return

        def complete(cid: int, result: int) -> None:
            sq.completions.post(sq, cid, Status.SUCCESS, result)

        self._events.deliver(complete, sq.completions.room)
        if sq.completions.waiting:
            self._publish(sq.completions)

    def _publish(self, cq: CompletionQueue) -> None:
        published = cq.publish(self._port())
        if isinstance(published, Fault):
            raise QueueMemoryLost(f"completion queue {cq.qid}", published)
        if published and cq.interrupts:
            self.vectors.add(cq.vector)

    @staticmethod
    def _check(what: str, fault: Fault | None) -> None:
        if fault is not None:
            raise QueueMemoryLost(what, fault)
