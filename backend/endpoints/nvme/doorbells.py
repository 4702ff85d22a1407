"""Doorbells, and their shadows in guest memory (NVM Express 1.4, 3.1.24, 3.1.25, 5.7, 7.13).

With Doorbell Buffer Config the guest leaves its doorbell values in a page of its own and writes the register only when
it passes the EventIdx that the controller left beside it. For a submission queue EventIdx is the tail seen last, so
anything new rings. For a completion queue it is head - 1, which nothing new passes: the guest rings only while the
controller waits for room. Admin doorbells stay registers: the stock driver never shadows them.
"""

from __future__ import annotations

from backend.core import Fault
from backend.endpoints.nvme.queues import CompletionQueue, SubmissionQueue
from backend.pci.dma import DmaPort

STRIDE = 4  # bytes, CAP.DSTRD = 0


def queue_of(offset: int) -> tuple[int, bool]:
    """(queue id, whether it is the completion queue) of a doorbell `offset` bytes behind the first one."""
    index = offset // STRIDE
    return index >> 1, bool(index & 1)


class ShadowDoorbells:
    """The two pages of Doorbell Buffer Config. Every method answers with the Fault that its access met."""

    def __init__(self, dma: DmaPort, doorbells: int, event_indices: int) -> None:
        self._dma = dma
        self._doorbells = doorbells
        self._events = event_indices
        self._watched: dict[int, int] = {}

    def adopt(self, queue: SubmissionQueue | CompletionQueue) -> Fault | None:
        """Take a queue into the pages: its doorbell as the controller knows it, its EventIdx so that news ring."""
        value = queue.tail if isinstance(queue, SubmissionQueue) else queue.head
        # The page may hold what an earlier queue of this id left there.
        fault = self._dma.store(self._doorbells + _slot(queue), value, 4)
        if fault is None:
            fault = self.watch(queue) if isinstance(queue, SubmissionQueue) else self.ignore(queue)
        return fault

    def doorbell(self, queue: SubmissionQueue | CompletionQueue) -> int | Fault:
        """What the guest left as the queue's doorbell; any 32-bit value."""
        return self._dma.load(self._doorbells + _slot(queue), 4)

    def watch(self, queue: SubmissionQueue | CompletionQueue) -> Fault | None:
        """Ask for a ring at the next change. Read the doorbell once more afterwards: it may have changed before.

        No fence stands between the two here: each request takes and gives back the core's lock, which is one.
        """
        if isinstance(queue, CompletionQueue):
            return self._dma.store(self._events + _slot(queue), queue.head, 4)
        self._watched[queue.qid] = queue.tail
        return self._dma.store(self._events + _slot(queue), queue.tail, 4)

    def watched(self, queue: SubmissionQueue) -> int | None:
        """The tail for which the guest was last asked to ring."""
        return self._watched.get(queue.qid)

    def ignore(self, queue: CompletionQueue) -> Fault | None:
        """Ask for no ring: the controller reads the doorbell when it needs to."""
        return self._dma.store(self._events + _slot(queue), (queue.head - 1) & 0xFFFF, 4)


def _slot(queue: SubmissionQueue | CompletionQueue) -> int:
    """Offset of the queue's word in both pages: laid out as the registers are."""
    return (2 * queue.qid + isinstance(queue, CompletionQueue)) * STRIDE
