"""A host driver for tests, written from NVM Express 1.4: its own structures, none of the device's."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from guest_ram import PAGE
from paged_host import MIB, PagedHost

from backend.endpoints.nvme import Namespace, NvmeController

RID = 0x0018

CAP, VS, INTMS, INTMC, CC, CSTS, AQA, ASQ, ACQ = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x1C, 0x24, 0x28, 0x30
DOORBELLS = 0x1000
ENABLE = 0x0046_0001  # EN, IOSQES 6, IOCQES 4, pages of 4 KiB, round robin, NVM command set
READY, FATAL = 1, 2

DELETE_SQ, CREATE_SQ, GET_LOG, DELETE_CQ, CREATE_CQ, IDENTIFY, ABORT = 0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08
SET_FEATURES, GET_FEATURES, ASYNC_EVENT, DOORBELL_BUFFERS = 0x09, 0x0A, 0x0C, 0x7C
FLUSH, WRITE, READ, COMPARE, WRITE_ZEROES, DATASET_MANAGEMENT = 0x00, 0x01, 0x02, 0x05, 0x08, 0x09
BROADCAST = 0xFFFF_FFFF


@dataclass(frozen=True)
class Completion:
    """Figure 122: dwords 0, 2 and 3. `status` is status code type << 8 | status code."""

    result: int
    sq_head: int
    sq_id: int
    cid: int
    status: int
    more: bool
    do_not_retry: bool


class Queue:
    """A submission queue and the completion queue it uses, from the host's side."""

    def __init__(self, host: Host, qid: int, size: int, *, sq: int = 0, cq: int = 0) -> None:
        self.host = host
        self.qid = qid
        self.size = size
        self.sq = sq or host.allocate(-(-size * 64 // PAGE))
        self.cq = cq or host.allocate(-(-size * 16 // PAGE))
        host.poke(self.cq, bytes(size * 16))
        self.tail = 0
        self.head = 0
        self.phase = 1
        self.rings = 0
        self.completion_rings = 0

    def push(self, entry: bytes) -> None:
        """Place an entry; nobody is told."""
        self.host.poke(self.sq + 64 * self.tail, entry)
        self.tail = (self.tail + 1) % self.size

    def ring(self) -> None:
        self._doorbell(2 * self.qid, self.tail)

    def _doorbell(self, index: int, value: int) -> None:
        """7.13: with shadow doorbells the register is written only when the value passes EventIdx, in 16 bits."""
        shadow = self.host.shadow
        if shadow is not None and self.qid:
            slot = 4 * index
            (old,) = struct.unpack("<I", self.host.peek(shadow[0] + slot, 4))
            self.host.poke(shadow[0] + slot, struct.pack("<I", value))
            (event,) = struct.unpack("<I", self.host.peek(shadow[1] + slot, 4))
            if not (value - event - 1) & 0xFFFF < (value - old) & 0xFFFF:
                return
        if index & 1:
            self.completion_rings += 1
        else:
            self.rings += 1
        self.host.doorbell(index, value)

    def pop(self, *, release: bool = True) -> Completion | None:
        """The next completion if its phase says it is there; `release` writes the head doorbell."""
        dw0, dw1, dw2, dw3 = struct.unpack("<4I", self.host.peek(self.cq + 16 * self.head, 16))
        if dw3 >> 16 & 1 != self.phase:
            return None
        assert dw1 == 0
        self.head = (self.head + 1) % self.size
        if self.head == 0:
            self.phase ^= 1
        if release:
            self.release()
        return Completion(
            dw0, dw2 & 0xFFFF, dw2 >> 16, dw3 & 0xFFFF, dw3 >> 17 & 0x7FF, bool(dw3 >> 30 & 1), bool(dw3 >> 31)
        )

    def release(self) -> None:
        self._doorbell(2 * self.qid + 1, self.head)

    def pop_all(self, *, release: bool = True) -> list[Completion]:
        found = []
        while (completion := self.pop(release=False)) is not None:
            found.append(completion)
        if found and release:
            self.release()
        return found


class Host(PagedHost):
    """A machine with one controller, and the driver's state."""

    def __init__(self, *, memory: int = 8 * MIB, namespace: Namespace | None = None) -> None:
        self.namespace = namespace or Namespace.in_memory(2 * MIB)
        self.controller = NvmeController(self.namespace)
        super().__init__(self.controller, RID, memory=memory)
        self.shadow: tuple[int, int] | None = None
        self._cid = 0

    def close(self) -> None:
        super().close()
        self.namespace.close()

    def doorbell(self, index: int, value: int) -> None:
        self.put(DOORBELLS + 4 * index, value)

    # life

    def enable(self, *, entries: int = 32) -> Queue:
        """7.6.1: the admin queue is set up, the controller enabled."""
        self.shadow = None
        self.admin = Queue(self, 0, entries)
        self.put(AQA, entries - 1 << 16 | entries - 1)
        self.put(ASQ, self.admin.sq, 8)
        self.put(ACQ, self.admin.cq, 8)
        self.put(CC, ENABLE)
        assert self.get(CSTS) == READY
        return self.admin

    def create_queue(self, qid: int, size: int, *, vector: int | None = None) -> Queue:
        queue = Queue(self, qid, size)
        interrupts = 0 if vector is None else vector << 16 | 2
        done = self.submit_admin(CREATE_CQ, prp1=queue.cq, cdw10=size - 1 << 16 | qid, cdw11=interrupts | 1)
        assert done.status == 0
        done = self.submit_admin(CREATE_SQ, prp1=queue.sq, cdw10=size - 1 << 16 | qid, cdw11=qid << 16 | 1)
        assert done.status == 0
        return queue

    # commands

    def entry(
        self,
        opcode: int,
        *,
        nsid: int = 0,
        prp1: int = 0,
        prp2: int = 0,
        flags: int = 0,
        cdw10: int = 0,
        cdw11: int = 0,
        cdw12: int = 0,
        cdw13: int = 0,
    ) -> bytes:
        """Figure 104: sixteen dwords."""
        self._cid = self._cid % 0xFFF0 + 1
        dwords = [opcode | flags << 8 | self._cid << 16, nsid, 0, 0, 0, 0]
        dwords += [prp1 & 0xFFFF_FFFF, prp1 >> 32, prp2 & 0xFFFF_FFFF, prp2 >> 32]
        return struct.pack("<16I", *dwords, cdw10, cdw11, cdw12, cdw13, 0, 0)

    def submit(self, queue: Queue, opcode: int, **fields: int) -> Completion:
        """One command, and its completion."""
        entry = self.entry(opcode, **fields)
        queue.push(entry)
        queue.ring()
        done = queue.pop()
        assert done is not None
        assert done.cid == entry[2] | entry[3] << 8
        assert done.sq_id == queue.qid
        assert queue.pop() is None
        return done

    def submit_admin(self, opcode: int, **fields: int) -> Completion:
        return self.submit(self.admin, opcode, **fields)

    def submit_io(self, queue: Queue, opcode: int, lba: int, blocks: int, **fields: int) -> Completion:
        cdw12 = fields.pop("cdw12", 0) | blocks - 1
        nsid = fields.pop("nsid", 1)
        return self.submit(queue, opcode, nsid=nsid, cdw10=lba & BROADCAST, cdw11=lba >> 32, cdw12=cdw12, **fields)

    def identify(self, cns: int, nsid: int = 0) -> bytes:
        buffer = self.allocate()
        done = self.submit_admin(IDENTIFY, nsid=nsid, prp1=buffer, cdw10=cns)
        assert done.status == 0
        return self.peek(buffer, PAGE)

    def log(self, page: int, length: int, *, retain: bool = False, offset: int = 0) -> bytes:
        buffer = self.allocate(2)
        dwords = length // 4 - 1
        cdw10 = page | (dwords & 0xFFFF) << 16 | (0x8000 if retain else 0)
        done = self.submit_admin(
            GET_LOG, nsid=BROADCAST, prp1=buffer, prp2=buffer + PAGE, cdw10=cdw10, cdw11=dwords >> 16, cdw12=offset
        )
        assert done.status == 0
        return self.peek(buffer, length)

    def set_shadow(self) -> None:
        """5.7: one page each, zeroed."""
        pages = self.allocate(), self.allocate()
        for page in pages:
            self.poke(page, bytes(PAGE))
        assert self.submit_admin(DOORBELL_BUFFERS, prp1=pages[0], prp2=pages[1]).status == 0
        self.shadow = pages
