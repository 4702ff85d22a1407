"""Descriptors as a guest writes them, and the records it gets back (docs/dma-engine.md)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from backend.endpoints.dma_engine.registers import LENGTH_MAX, Control

DESCRIPTOR = struct.Struct("<BBHI7Q")
DESCRIPTOR_SIZE = 64
assert DESCRIPTOR.size == DESCRIPTOR_SIZE

RECORD_SIZE = 32  # and its alignment, so that it lies in one page
_RECORD_BODY = struct.Struct("<3Q")
RECORD_BODY_OFFSET = 8
_RECORD_HEAD = struct.Struct("<BBHI")

_ADDRESS_SPACE = 1 << 64


class Opcode(IntEnum):
    """What a descriptor asks for."""

    NOP = 0
    COPY = 1
    FILL = 2
    COMPARE = 3
    CRC32 = 4
    FETCH_ADD = 5
    SWAP = 6
    CAS = 7


class Flag(IntFlag):
    """Of a descriptor."""

    COMPLETION = 0x0001
    INTERRUPT = 0x0002
    FENCE = 0x0004
    NO_PAGE_REQUESTS = 0x0008
    SOURCE_PASID = 0x0010
    TARGET_PASID = 0x0020
    COMPLETION_PASID = 0x0040


class Status(IntEnum):
    """Of a job that has ended."""

    NONE = 0
    SUCCESS = 1
    DIFFERENT = 2
    INVALID = 3
    FAULT = 4
    ABORTED = 5


class Cause(IntEnum):
    """Why a job is INVALID (below 16) or has met a FAULT; the record's `reason`."""

    OPCODE = 1
    FLAGS = 2
    UNTAGGED = 3
    LENGTH = 4
    ALIGNMENT = 5
    WRAP = 6
    OVERLAP = 7
    NOT_PRESENT = 16
    PERMISSION = 17
    PRI_INVALID = 18
    PRI_FAILURE = 19
    UNRESOLVED = 20
    BUS_MASTER = 21
    PASID_OFF = 22
    TRANSLATION = 23


# Plain ints: these are tested for every descriptor, and enumerations are slow at it.
_COMPLETION, _COMPLETION_PASID = int(Flag.COMPLETION), int(Flag.COMPLETION_PASID)
_SOURCE_PASID, _TARGET_PASID = int(Flag.SOURCE_PASID), int(Flag.TARGET_PASID)
_PASIDS = _SOURCE_PASID | _TARGET_PASID | _COMPLETION_PASID
_ALL_FLAGS = sum(Flag)
_HAS_PASID, _UNTAGGED = int(Control.PASID), int(Control.UNTAGGED)

_READS = {Opcode.COPY, Opcode.COMPARE, Opcode.CRC32}
_TARGETS = {Opcode.COPY, Opcode.FILL, Opcode.COMPARE, Opcode.FETCH_ADD, Opcode.SWAP, Opcode.CAS}
_WIDTHS: dict[int, frozenset[int]] = {
    Opcode.FETCH_ADD: frozenset((4, 8)),
    Opcode.SWAP: frozenset((4, 8)),
    Opcode.CAS: frozenset((4, 8, 16)),
}


@dataclass(slots=True)
class Descriptor:
    """One, as it was when it was fetched. Addresses and lengths are bytes; `source` is `compare` for a CAS."""

    opcode: int
    reserved: int
    flags: int
    tag: int
    completion: int
    target: int
    source: int
    length: int
    value: int
    value_high: int
    compare_high: int

    @property
    def uses_source(self) -> bool:
        """Whether the operation reads [source, source + length)."""
        return self.opcode in _READS

    @property
    def uses_target(self) -> bool:
        """Whether the operation reads or writes [target, target + length)."""
        return self.opcode in _TARGETS

    def check_record(self, control: int) -> bool:
        """Whether the record may be written where the descriptor says, by a queue with this CONTROL."""
        if self.completion % RECORD_SIZE:
            return False
        return bool(control & (_HAS_PASID if self.flags & _COMPLETION_PASID else _UNTAGGED))

    def check(self, control: int) -> Cause | None:
        """What is wrong with it, for a queue with this CONTROL; None: it can be carried out."""
        if self.opcode > Opcode.CAS:
            return Cause.OPCODE
        if self.reserved or self.flags & ~_ALL_FLAGS or (self.flags & _PASIDS and not control & _HAS_PASID):
            return Cause.FLAGS
        if self.opcode == Opcode.NOP:
            return None
        source, target = self.uses_source, self.uses_target
        if not control & _UNTAGGED:
            untagged = ~self.flags & ((source and _SOURCE_PASID) | (target and _TARGET_PASID))
            if untagged:
                return Cause.UNTAGGED
        widths = _WIDTHS.get(self.opcode)
        if self.length > LENGTH_MAX or (widths is not None and self.length not in widths):
            return Cause.LENGTH
        if widths is not None and self.target % self.length:
            return Cause.ALIGNMENT
        if (source and self.source + self.length > _ADDRESS_SPACE) or (
            target and self.target + self.length > _ADDRESS_SPACE
        ):
            return Cause.WRAP
        if self.opcode == Opcode.COPY and self.source < self.target < self.source + self.length:
            one_space = bool(self.flags & _SOURCE_PASID) == bool(self.flags & _TARGET_PASID)
            if one_space:
                return Cause.OVERLAP
        return None


def parse(image: bytes) -> list[Descriptor]:
    """The descriptors that a part of a ring holds."""
    return [Descriptor(*fields) for fields in DESCRIPTOR.iter_unpack(image)]


def record_body(done: int, result: int, last: int) -> bytes:
    """What follows a record's first 8 bytes; `last`: the result's high half, or the address at fault."""
    return _RECORD_BODY.pack(done, result, last)


def record_head(status: int, reason: int, access: int, tag: int) -> int:
    """A record's first 8 bytes, as the number to store last."""
    return int.from_bytes(_RECORD_HEAD.pack(status, reason, access, tag), "little")
