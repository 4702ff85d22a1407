"""Submission queue entries and opcodes (NVM Express 1.4, 4.2, 5 and 6)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

ENTRY_SIZE = 64  # bytes of a submission queue entry, CC.IOSQES = 6
_ENTRY = struct.Struct("<BBHIQQQQIIIIII")
assert _ENTRY.size == ENTRY_SIZE

NSID_BROADCAST = 0xFFFF_FFFF
FUSE_MASK = 0x03  # bits 9:8 of dword 0: part of a fused operation
PSDT_MASK = 0xC0  # bits 15:14 of dword 0: SGLs in place of PRPs

# Where a field lies in the command, for the Parameter Error Location of the error log.
BYTE_FLAGS, BYTE_NSID, BYTE_PRP1, BYTE_PRP2, BYTE_CDW10, BYTE_CDW11, BYTE_CDW12 = 1, 4, 24, 32, 40, 44, 48


class AdminOpcode(IntEnum):
    """Figure 139 of NVM Express 1.4: those this controller carries out."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C
    DOORBELL_BUFFER_CONFIG = 0x7C


class IoOpcode(IntEnum):
    """Figure 346 of NVM Express 1.4: those this controller carries out."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09


class Command(NamedTuple):
    """A submission queue entry as it stands in guest memory. `flags` is bits 15:8 of dword 0 (FUSE and PSDT)."""

    opcode: int
    flags: int
    cid: int
    nsid: int
    cdw2_3: int
    mptr: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int

    @property
    def slba(self) -> int:
        """First block of an I/O command: dwords 10 and 11."""
        return self.cdw10 | self.cdw11 << 32

    @property
    def block_count(self) -> int:
        """Blocks of an I/O command: dword 12, bits 15:0, where 0 stands for 1."""
        return (self.cdw12 & 0xFFFF) + 1


def parse(entries: bytes) -> Iterator[Command]:
    """The commands in `entries`, whose length is a multiple of 64 bytes."""
    return map(Command._make, _ENTRY.iter_unpack(entries))
