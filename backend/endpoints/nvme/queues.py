"""Submission and completion queues (NVM Express 1.4, 4.1, 4.6, 5.3 to 5.6).

A queue of n entries is full with n - 1 of them in use. Completions wait in `CompletionQueue.waiting` until the batch is
published: their bytes first, then each phase word by one aligned release store.
"""

from __future__ import annotations

import struct
from collections import deque

from backend.core import Fault
from backend.endpoints.nvme.commands import BYTE_CDW10, BYTE_CDW11, BYTE_PRP1, ENTRY_SIZE
from backend.endpoints.nvme.registers import MAX_QUEUE_ENTRIES
from backend.endpoints.nvme.status import CommandFailed, Status
from backend.pci.dma import DmaPort

COMPLETION_SIZE = 16  # bytes, CC.IOCQES = 4
_COMPLETION = struct.Struct("<IIHHI")  # result, reserved, SQ head, SQ id, phase word
assert _COMPLETION.size == COMPLETION_SIZE
_PHASE_WORD = 12  # offset of command id, phase and status in a completion
_PHASE_SHIFT = 16

# A queue pair each for 16 CPUs; the driver shares them where there are more.
MAX_IO_QUEUES = 16
VECTORS = MAX_IO_QUEUES + 1  # one each and one for the admin queue

_CONTIGUOUS = 1 << 0  # PC, dword 11 of both Create commands
_INTERRUPTS = 1 << 1  # IEN, dword 11 of Create I/O Completion Queue


class CompletionQueue:
    """Completions from the controller to the guest. `base` is an IOVA, `size` counts entries."""

    def __init__(self, qid: int, base: int, size: int, *, vector: int, interrupts: bool) -> None:
        self.qid = qid
        self.base = base
        self.size = size
        self.vector = vector
        self.interrupts = interrupts
        self.head = 0
        self.tail = 0
        self.phase = 1
        self.waiting: deque[tuple[int, int, int, int]] = deque()
        self.submitters: set[int] = set()
        """Ids of the submission queues that complete here."""

    @property
    def used(self) -> int:
        """Entries that the guest has not released."""
        return (self.tail - self.head) % self.size

    @property
    def room(self) -> int:
        """Commands that may still be fetched: each owes this queue a completion."""
        return self.size - 1 - self.used - len(self.waiting)

    def move_head(self, head: int) -> bool:
        """Take the guest's word that it has read up to `head`; False if it names entries that it cannot have read."""
        if head >= self.size or (head - self.head) % self.size > self.used:
            return False
        self.head = head
        return True

    def post(self, sq: SubmissionQueue, cid: int, field: int, result: int = 0) -> None:
        """Queue a completion; `field` is the status without its phase bit."""
        self.waiting.append((result, sq.head | sq.qid << 16, cid, field))

    def publish(self, dma: DmaPort) -> int | Fault:
        """Write what waits, as far as there is room; the number published. A fault leaves the rest waiting."""
        published = 0
        while self.waiting and (free := self.size - 1 - self.used) > 0:
            count = min(len(self.waiting), free, self.size - self.tail)
            image, words = bytearray(), []
            for _ in range(count):
                result, queue, cid, field = self.waiting.popleft()
                word = cid | field << _PHASE_SHIFT + 1
                # The phase bit stays as it was until the store below, so the guest cannot see half an entry.
                old = word | (self.phase ^ 1) << _PHASE_SHIFT
                image += _COMPLETION.pack(result, 0, queue & 0xFFFF, queue >> 16, old)
                words.append(word | self.phase << _PHASE_SHIFT)
            start = self.base + self.tail * COMPLETION_SIZE
            fault = dma.write(start, image)
            for index, word in enumerate(words):
                if fault is None:
                    fault = dma.store(start + index * COMPLETION_SIZE + _PHASE_WORD, word, 4)
            if fault is not None:
                return fault
            published += count
            self.tail += count
            if self.tail == self.size:
                self.tail = 0
                self.phase ^= 1
        return published


class SubmissionQueue:
    """Commands from the guest to the controller. `base` is an IOVA, `size` counts entries."""

    def __init__(self, qid: int, base: int, size: int, completions: CompletionQueue) -> None:
        self.qid = qid
        self.base = base
        self.size = size
        self.completions = completions
        self.head = 0
        self.tail = 0

    @property
    def pending(self) -> int:
        """Commands submitted and not fetched."""
        return (self.tail - self.head) % self.size

    def move_tail(self, tail: int) -> bool:
        """Take the guest's word that it has submitted up to `tail`; False if there is no room for that many."""
        if tail >= self.size or (tail - self.tail) % self.size > self.size - 1 - self.pending:
            return False
        self.tail = tail
        return True

    def fetch(self, dma: DmaPort, most: int) -> bytes | Fault:
        """Up to `most` entries by one DMA read (fewer at the end of the ring), and the head moved past them."""
        count = min(most, self.pending, self.size - self.head)
        entries = dma.read(self.base + self.head * ENTRY_SIZE, count * ENTRY_SIZE)
        if not isinstance(entries, Fault):
            self.head = (self.head + count) % self.size
        return entries


class QueueTable:
    """Every queue of an enabled controller by its id, the admin pair at 0."""

    def __init__(self) -> None:
        self.submission: dict[int, SubmissionQueue] = {}
        self.completion: dict[int, CompletionQueue] = {}
        self.page_size = 4096
        self.entry_sizes_set = False
        """Whether CC.IOSQES and CC.IOCQES hold the sizes that Identify asks for."""

    def clear(self) -> None:
        self.submission.clear()
        self.completion.clear()

    def create_admin(self, sq_base: int, sq_size: int, cq_base: int, cq_size: int) -> None:
        """The pair that AQA, ASQ and ACQ describe; its completions always interrupt on vector 0."""
        queue = CompletionQueue(0, cq_base, cq_size, vector=0, interrupts=True)
        self._add(queue)
        self._add(SubmissionQueue(0, sq_base, sq_size, queue))

    def create_completion(self, prp1: int, cdw10: int, cdw11: int) -> CompletionQueue:
        """Create I/O Completion Queue, 5.3. Raises CommandFailed."""
        qid, size = self._check(prp1, cdw10, cdw11, self.completion)
        vector = cdw11 >> 16
        if vector >= VECTORS:
            raise CommandFailed(Status.INVALID_INTERRUPT_VECTOR, byte=BYTE_CDW11 + 2)
        queue = CompletionQueue(qid, prp1, size, vector=vector, interrupts=bool(cdw11 & _INTERRUPTS))
        self._add(queue)
        return queue

    def create_submission(self, prp1: int, cdw10: int, cdw11: int) -> SubmissionQueue:
        """Create I/O Submission Queue, 5.4. Raises CommandFailed. Its priority class has no meaning in round robin."""
        completions = self.completion.get(cdw11 >> 16)
        if completions is None or completions.qid == 0:
            raise CommandFailed(Status.COMPLETION_QUEUE_INVALID, byte=BYTE_CDW11 + 2)
        qid, size = self._check(prp1, cdw10, cdw11, self.submission)
        queue = SubmissionQueue(qid, prp1, size, completions)
        self._add(queue)
        return queue

    def delete_submission(self, qid: int) -> None:
        """Delete I/O Submission Queue, 5.6. What was fetched has completed; the rest goes unfetched."""
        if qid == 0 or qid not in self.submission:
            raise CommandFailed(Status.INVALID_QUEUE_IDENTIFIER, byte=BYTE_CDW10)
        queue = self.submission.pop(qid)
        queue.completions.submitters.discard(qid)

    def delete_completion(self, qid: int) -> None:
        """Delete I/O Completion Queue, 5.5: after every submission queue that uses it."""
        if qid == 0 or qid not in self.completion:
            raise CommandFailed(Status.INVALID_QUEUE_IDENTIFIER, byte=BYTE_CDW10)
        if self.completion[qid].submitters:
            raise CommandFailed(Status.INVALID_QUEUE_DELETION, byte=BYTE_CDW10)
        del self.completion[qid]

    def _check(
        self, prp1: int, cdw10: int, cdw11: int, existing: dict[int, SubmissionQueue] | dict[int, CompletionQueue]
    ) -> tuple[int, int]:
        """The queue id and the number of entries, where both Create commands ask the same."""
        qid, size = cdw10 & 0xFFFF, (cdw10 >> 16) + 1
        if not 1 <= qid <= MAX_IO_QUEUES or qid in existing:
            raise CommandFailed(Status.INVALID_QUEUE_IDENTIFIER, byte=BYTE_CDW10)
        if not 2 <= size <= MAX_QUEUE_ENTRIES or not self.entry_sizes_set:
            raise CommandFailed(Status.INVALID_QUEUE_SIZE, byte=BYTE_CDW10 + 2)
        if not cdw11 & _CONTIGUOUS:  # CAP.CQR
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW11)
        if prp1 % self.page_size:
            raise CommandFailed(Status.INVALID_PRP_OFFSET, byte=BYTE_PRP1)
        return qid, size

    def _add(self, queue: SubmissionQueue | CompletionQueue) -> None:
        if isinstance(queue, SubmissionQueue):
            self.submission[queue.qid] = queue
            queue.completions.submitters.add(queue.qid)
        else:
            self.completion[queue.qid] = queue
