"""What the operations do: each moves one slice of its job per call, and says what it could not reach.

An operation advances `job.done` by what it has moved and returns the Fault that ended it, or None. The job calls again
until `done` is the length. Slices are bounded, so a job of 4 GiB holds nobody up.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Protocol

from backend.core import Fault
from backend.endpoints.dma_engine.descriptors import Descriptor, Opcode, Status
from backend.pci.dma import DmaPort

SLICE = 256 << 10
"""Bytes of one call: some 30 us of copying, and 64 pages of which each may need a walk."""
EFFORT_UNIT = 64 << 10
"""Bytes that count as much as one small job does."""

_MASK = (1 << 64) - 1


class Work(Protocol):
    """A job, as an operation sees it. Its PASIDs are None for an operand without one."""

    descriptor: Descriptor
    source_pasid: int | None
    target_pasid: int | None
    done: int
    result: int
    status: int


class Scratch:
    """Two buffers of a slice, for operations that look at bytes. One pair serves all jobs: a call leaves nothing."""

    def __init__(self) -> None:
        self.first = bytearray(SLICE)
        self.second = bytearray(SLICE)


def _copy(job: Work, memory: DmaPort, scratch: Scratch) -> Fault | None:
    descriptor = job.descriptor
    source, target = descriptor.source + job.done, descriptor.target + job.done
    size = min(SLICE, descriptor.length - job.done)
    if source < target < source + size:
        # Two address spaces, or it would have been refused: the port takes the numbers for an overlap, and would go
        # from the end down.
        return _copy_by_buffer(job, memory, memoryview(scratch.first)[:size])
    fault = memory.copy(source, target, size, job.source_pasid, target_pasid=job.target_pasid)
    job.done += size if fault is None else fault.done
    return fault


def _copy_by_buffer(job: Work, memory: DmaPort, buffer: memoryview) -> Fault | None:
    descriptor = job.descriptor
    unread = memory.read_into(descriptor.source + job.done, buffer, job.source_pasid)
    size = len(buffer) if unread is None else unread.done
    if size:
        unwritten = memory.write(descriptor.target + job.done, buffer[:size], job.target_pasid)
        job.done += size if unwritten is None else unwritten.done
        if unwritten is not None:
            return unwritten
    return unread


def _fill(job: Work, memory: DmaPort, scratch: Scratch) -> Fault | None:
    descriptor = job.descriptor
    size = min(SLICE, descriptor.length - job.done)
    turned = job.done % 8 * 8  # after a fault in the middle of the pattern
    pattern = (descriptor.value >> turned | descriptor.value << 64 - turned) & _MASK
    fault = memory.fill(descriptor.target + job.done, size, pattern, 8, job.target_pasid)
    job.done += size if fault is None else fault.done
    return fault


def _compare(job: Work, memory: DmaPort, scratch: Scratch) -> Fault | None:
    descriptor = job.descriptor
    size = min(SLICE, descriptor.length - job.done)
    fault = memory.read_into(descriptor.source + job.done, memoryview(scratch.first)[:size], job.source_pasid)
    size = size if fault is None else fault.done
    if size:
        second = memory.read_into(descriptor.target + job.done, memoryview(scratch.second)[:size], job.target_pasid)
        if second is not None:
            size, fault = second.done, second
    equal = _equal(scratch.first, scratch.second, size)
    job.done += equal
    if equal < size:
        job.status = Status.DIFFERENT
        return None
    return fault


def _equal(first: bytearray, second: bytearray, size: int) -> int:
    """How many bytes agree, of the first `size`."""
    if first[:size] == second[:size]:
        return size
    low, high = 0, size - 1
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _crc32(job: Work, memory: DmaPort, scratch: Scratch) -> Fault | None:
    descriptor = job.descriptor
    if not job.done:
        job.result = descriptor.value & 0xFFFF_FFFF
    size = min(SLICE, descriptor.length - job.done)
    view = memoryview(scratch.first)
    fault = memory.read_into(descriptor.source + job.done, view[:size], job.source_pasid)
    size = size if fault is None else fault.done
    job.result = zlib.crc32(view[:size], job.result)
    job.done += size
    return fault


def _fetch_add(job: Work, memory: DmaPort, scratch: Scratch) -> Fault | None:
    descriptor = job.descriptor
    value = descriptor.value & (1 << 8 * descriptor.length) - 1
    return _atomic(job, memory.fetch_add(descriptor.target, value, descriptor.length, job.target_pasid))


def _swap(job: Work, memory: DmaPort, scratch: Scratch) -> Fault | None:
    descriptor = job.descriptor
    value = descriptor.value & (1 << 8 * descriptor.length) - 1
    return _atomic(job, memory.swap(descriptor.target, value, descriptor.length, job.target_pasid))


def _compare_and_swap(job: Work, memory: DmaPort, scratch: Scratch) -> Fault | None:
    descriptor = job.descriptor
    mask = (1 << 8 * descriptor.length) - 1
    compare = (descriptor.source | descriptor.compare_high << 64) & mask
    value = (descriptor.value | descriptor.value_high << 64) & mask
    answer = memory.compare_exchange(descriptor.target, compare, value, descriptor.length, job.target_pasid)
    return _atomic(job, answer)


def _atomic(job: Work, before: int | Fault) -> Fault | None:
    if isinstance(before, Fault):
        return before
    job.result = before
    job.done = job.descriptor.length
    return None


Operation = Callable[[Work, DmaPort, Scratch], Fault | None]

OPERATIONS: dict[int, tuple[Operation, int]] = {
    Opcode.COPY: (_copy, 1),
    Opcode.FILL: (_fill, 1),
    Opcode.COMPARE: (_compare, 3),
    Opcode.CRC32: (_crc32, 4),
    Opcode.FETCH_ADD: (_fetch_add, 1),
    Opcode.SWAP: (_swap, 1),
    Opcode.CAS: (_compare_and_swap, 1),
}
"""By opcode: the operation, and what it costs against a copy. NOP does nothing, and is not here."""
