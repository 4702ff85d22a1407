"""A driver of the DMA engine for tests, written against its header: it imports nothing of the device but its class."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from dma_header import VDMA
from guest_ram import PAGE
from paged_host import MIB, PagedHost

from backend.endpoints.dma_engine import DmaEngine

RID = 0x0028

PASID_CONTROL, ATS_CONTROL, PRI_CONTROL, PRI_STATUS, PRI_ALLOCATION = 6, 6, 4, 6, 12


@dataclass(frozen=True)
class Record:
    """struct vdma_completion."""

    status: int
    reason: int
    access: int
    tag: int
    done: int
    result: int
    last: int

    @property
    def fault_address(self) -> int:
        return self.last


class Ring:
    """A queue from the driver's side: a ring, and a page of records."""

    def __init__(self, host: Host, number: int, order: int, *, base: int | None = None) -> None:
        self.host = host
        self.number = number
        self.size = 1 << order
        self.order = order
        self.base = host.allocate(-(-64 * self.size // PAGE)) if base is None else base
        self.tail = 0
        self._tag = 0

    def get(self, name: str, size: int = 4) -> int:
        return self.host.get(VDMA["QUEUE_BASE"] + self.number * VDMA["QUEUE_STRIDE"] + VDMA["Q_" + name], size)

    def set(self, name: str, value: int, size: int = 4) -> None:
        self.host.put(VDMA["QUEUE_BASE"] + self.number * VDMA["QUEUE_STRIDE"] + VDMA["Q_" + name], value, size)

    @property
    def state(self) -> int:
        return self.get("STATUS") & VDMA["STATE_MASK"]

    @property
    def error(self) -> int:
        return self.get("STATUS") >> VDMA["ERROR_SHIFT"]

    def start(self, control: int | None = None, *, pasid: int = 0, vector: int | None = None) -> None:
        """Set up and START; without `control` for addresses without PASID."""
        self.set("CONTROL", VDMA["CONTROL_UNTAGGED"] if control is None else control)
        self.set("PASID", pasid)
        self.set("RING", self.base, 8)
        self.set("ORDER", self.order)
        self.set("VECTOR", self.number if vector is None else vector)
        self.tail = 0
        self.set("COMMAND", VDMA["COMMAND_START"])

    def put(self, image: bytes) -> None:
        """A descriptor into the next slot; the device is not told."""
        self.host.poke_ring(self.base + 64 * (self.tail % self.size), image)
        self.tail = self.tail + 1 & 0xFFFF_FFFF

    def doorbell(self, tail: int | None = None) -> None:
        at = VDMA["DOORBELL_BASE"] + self.number * VDMA["DOORBELL_STRIDE"] + VDMA["DB_TAIL"]
        self.host.put(at, self.tail if tail is None else tail)

    def push(
        self,
        operation: str,
        *,
        flags: int = 0,
        target: int = 0,
        source: int = 0,
        length: int = 0,
        value: int = 0,
        value_high: int = 0,
        compare_high: int = 0,
        record: int | None = None,
    ) -> int:
        """Put a descriptor with a record of its own into the ring; where the record will be."""
        self._tag += 1
        where = self.host.new_record() if record is None else record
        flags |= VDMA["FLAG_COMPLETION"]
        words = (where, target, source, length, value, value_high, compare_high)
        self.put(struct.pack("<BBHI7Q", VDMA["OP_" + operation], 0, flags, self._tag, *words))
        return where

    def do(self, operation: str, **fields: int) -> Record:
        """One job, and its record, which must be there at once."""
        where = self.push(operation, **fields)
        self.doorbell()
        record = self.host.record(where)
        assert record.status != VDMA["STATUS_NONE"]
        assert record.tag == self._tag
        return record


class Host(PagedHost):
    """A machine with one engine."""

    function: DmaEngine

    def __init__(self, *, memory: int = 8 * MIB, queues: int = 8, pasids: bool = True) -> None:
        super().__init__(DmaEngine(name="dma", queues=queues, pasids=pasids), RID, memory=memory)
        self._records = 0

    def extended(self, wanted: int) -> int:
        """Where an extended capability lies."""
        offset = 0x100
        while self.function.config.read(offset, 2) != wanted:
            offset = self.function.config.read(offset + 2, 2) >> 4
        return offset

    # memory

    def new_record(self) -> int:
        """IOVA of a record, zeroed."""
        if self._records % PAGE == 0:
            self._records = self.allocate()
        self._records += 32
        return self._records - 32

    def record(self, iova: int) -> Record:
        return Record(*struct.unpack("<BBHI3Q", self.peek(iova, 32)))

    def poke_ring(self, iova: int, data: bytes) -> None:
        self.poke(iova, data)

    # registers

    def reg(self, name: str, size: int = 4) -> int:
        return self.get(VDMA["REG_" + name], size)
