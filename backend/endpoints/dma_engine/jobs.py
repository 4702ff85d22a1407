"""A job: one descriptor on its way from the ring to its record."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from backend.core import RW, Access, Fault
from backend.endpoints.dma_engine.descriptors import (
    RECORD_BODY_OFFSET,
    RECORD_SIZE,
    Cause,
    Descriptor,
    Flag,
    Opcode,
    Status,
    record_body,
    record_head,
)
from backend.endpoints.dma_engine.operations import EFFORT_UNIT, OPERATIONS, Scratch
from backend.endpoints.dma_engine.pages import Operand, PageWait, cause_of
from backend.endpoints.dma_engine.registers import Error
from backend.pci.dma import DmaPort

if TYPE_CHECKING:
    from backend.endpoints.dma_engine.queues import Queue

_COMPLETION, _FENCE, _NO_PAGE_REQUESTS = int(Flag.COMPLETION), int(Flag.FENCE), int(Flag.NO_PAGE_REQUESTS)
_SOURCE_PASID, _TARGET_PASID = int(Flag.SOURCE_PASID), int(Flag.TARGET_PASID)
_COMPLETION_PASID = int(Flag.COMPLETION_PASID)
_ACCESS_PASID = 0x4
_MASK = (1 << 64) - 1
_RECORDING = -2  # progress of a job whose record is being written


class Phase(Enum):
    """Where a job stands."""

    HELD = "held"
    """Behind a fence."""
    MOVING = "moving"
    RECORDING = "recording"
    ENDED = "ended"


class Job:
    """One descriptor. It goes on by `step`, a slice at a time, and may wait for pages in between."""

    __slots__ = (
        "access",
        "descriptor",
        "done",
        "fault_address",
        "phase",
        "queue",
        "reason",
        "result",
        "source_pasid",
        "status",
        "target_pasid",
        "wait",
        "waiting",
    )

    def __init__(self, queue: Queue, descriptor: Descriptor) -> None:
        self.queue = queue
        self.descriptor = descriptor
        self.source_pasid = queue.pasid if descriptor.flags & _SOURCE_PASID else None
        self.target_pasid = queue.pasid if descriptor.flags & _TARGET_PASID else None
        self.phase = Phase.HELD
        self.waiting = False
        self.wait: PageWait | None = None
        self.done = 0
        self.result = 0
        self.status: int = Status.NONE
        self.reason: int = 0
        self.access: int = 0
        self.fault_address = 0

    @property
    def fence(self) -> bool:
        """Whether it begins only when all before it have ended."""
        return bool(self.descriptor.flags & _FENCE)

    def begin(self) -> None:
        """Look at the descriptor; from now on `step` is called."""
        cause = self.descriptor.check(self.queue.control)
        if cause is not None:
            self._conclude(Status.INVALID, cause)
        elif self.descriptor.opcode == Opcode.NOP or (not self.descriptor.length):
            self.result = self.descriptor.value & 0xFFFF_FFFF if self.descriptor.opcode == Opcode.CRC32 else 0
            self._conclude(Status.SUCCESS)
        else:
            self.phase = Phase.MOVING

    def step(self, memory: DmaPort, scratch: Scratch) -> tuple[bool, int]:
        """One slice: whether to call again at once, and the effort it took. Not called while it waits, or has ended."""
        effort = 1
        if self.phase is Phase.MOVING:
            operation, cost = OPERATIONS[self.descriptor.opcode]
            before = self.done
            fault = operation(self, memory, scratch)
            effort += cost * ((self.done - before) // EFFORT_UNIT)
            if fault is not None:
                return self._faulted(fault), effort
            if self.status == Status.NONE:
                if self.done < self.descriptor.length:
                    return True, effort
                self.status = Status.SUCCESS
            self._conclude(self.status)
        return self._record(memory), effort

    def abort(self, memory: DmaPort) -> None:
        """End it now. The record is written if it can be at once."""
        if self.phase is not Phase.RECORDING:
            self._conclude(Status.ABORTED)
        if self.descriptor.flags & _COMPLETION and self.descriptor.check_record(self.queue.control):
            self._write_record(memory)
        self.drop()

    def drop(self) -> None:
        """Nothing more of it is done, whoever answers whatever."""
        self.phase = Phase.ENDED
        self.waiting = False
        if self.wait is not None:
            self.wait.close()

    def woken(self) -> None:
        """What it waited for may have come."""
        if self.waiting:
            self.waiting = False
            self.queue.woken(self)

    def _conclude(self, status: int, reason: int = 0) -> None:
        self.status, self.reason = status, reason
        self.phase = Phase.RECORDING

    def _faulted(self, fault: Fault) -> bool:
        """Wait for pages, or conclude; whether to go on at once."""
        if self.descriptor.flags & _NO_PAGE_REQUESTS:
            cause: Cause | None = cause_of(fault)
        else:
            operands = sorted(self._operands(), key=lambda operand: not operand.met(fault))
            cause = self._meet(fault, operands, self.done)
        if cause is None:
            return False
        self.access = int(fault.access & RW) | (_ACCESS_PASID if fault.pasid is not None else 0)
        self.fault_address = fault.iova
        self._conclude(Status.FAULT, cause)
        return True

    def _meet(self, fault: Fault, operands: list[Operand], progress: int) -> Cause | None:
        if self.wait is None:
            self.wait = self.queue.new_wait(self.woken)
        self.waiting = True
        cause = self.wait.meet(fault, operands, progress)
        if cause is not None:
            self.waiting = False
        return cause

    def _operands(self) -> list[Operand]:
        """What is left to be reached."""
        descriptor = self.descriptor
        left = descriptor.length - self.done
        operands = []
        if descriptor.uses_source:
            operands.append(Operand(descriptor.source + self.done, left, Access.READ, self.source_pasid))
        if descriptor.uses_target:
            access = {Opcode.COPY: Access.WRITE, Opcode.FILL: Access.WRITE, Opcode.COMPARE: Access.READ}
            needed = access.get(Opcode(descriptor.opcode), RW)
            operands.append(Operand(descriptor.target + self.done, left, needed, self.target_pasid))
        return operands

    def _record(self, memory: DmaPort) -> bool:
        """Write the record and end; whether to go on at once (it is not over yet)."""
        if self.descriptor.flags & _COMPLETION:
            fault = self._write_record(memory)
            if fault is not None:
                operand = Operand(self.descriptor.completion, RECORD_SIZE, Access.WRITE, self._record_pasid)
                if self._meet(fault, [operand], _RECORDING) is not None:
                    self.queue.fail(Error.COMPLETION, fault.iova)
                return False
        self.queue.ended(self)
        return False

    def _write_record(self, memory: DmaPort) -> Fault | None:
        """All but its first 8 bytes, then these by one release store."""
        last = self.fault_address if self.status == Status.FAULT else self.result >> 64
        body = record_body(self.done, self.result & _MASK, last)
        at, pasid = self.descriptor.completion, self._record_pasid
        fault = memory.write(at + RECORD_BODY_OFFSET, body, pasid)
        if fault is None:
            head = record_head(self.status, self.reason, self.access, self.descriptor.tag)
            fault = memory.store(at, head, 8, pasid)
        return fault

    @property
    def _record_pasid(self) -> int | None:
        return self.queue.pasid if self.descriptor.flags & _COMPLETION_PASID else None
