"""The NVM command set (NVM Express 1.4, 6): what arrives on I/O submission queues."""

from __future__ import annotations

import struct
from collections.abc import Callable

from backend.endpoints.nvme.commands import (
    BYTE_CDW10,
    BYTE_CDW12,
    BYTE_FLAGS,
    BYTE_NSID,
    FUSE_MASK,
    NSID_BROADCAST,
    PSDT_MASK,
    Command,
    IoOpcode,
)
from backend.endpoints.nvme.features import Features
from backend.endpoints.nvme.logs import Health
from backend.endpoints.nvme.namespace import Namespace
from backend.endpoints.nvme.status import CommandFailed, Status
from backend.endpoints.nvme.transfers import MAX_TRANSFER, Transfers

_FORCE_UNIT_ACCESS = 1 << 30  # dword 12 of Write and Write Zeroes
_DEALLOCATE = 1 << 2  # dword 11 of Dataset Management
_MEDIA_ERRORS = (Status.WRITE_FAULT, Status.UNRECOVERED_READ_ERROR)
_RANGE = struct.Struct("<IIQ")  # context attributes, blocks, first block (6.7.1)


class IoCommands:
    """Carries out one I/O command at a time, wholly: a command has ended before the next one starts."""

    def __init__(self, namespace: Namespace, transfers: Transfers, features: Features, health: Health) -> None:
        self._namespace = namespace
        self._transfers = transfers
        self._features = features
        self._health = health
        self._handlers: dict[int, Callable[[Command], None]] = {
            IoOpcode.FLUSH: self._flush,
            IoOpcode.WRITE: self._write,
            IoOpcode.READ: self._read,
            IoOpcode.COMPARE: self._compare,
            IoOpcode.WRITE_ZEROES: self._write_zeroes,
        }
        if namespace.holes:
            self._handlers[IoOpcode.DATASET_MANAGEMENT] = self._dataset_management

    def execute(self, command: Command) -> int:
        """Dword 0 of the completion. Raises CommandFailed."""
        handler = self._handlers.get(command.opcode)
        if handler is None:
            raise CommandFailed(Status.INVALID_OPCODE, byte=0)
        if command.flags & (FUSE_MASK | PSDT_MASK):
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_FLAGS)
        if command.nsid != 1 and not (command.opcode == IoOpcode.FLUSH and command.nsid == NSID_BROADCAST):
            raise CommandFailed(Status.INVALID_NAMESPACE_OR_FORMAT, byte=BYTE_NSID)
        try:
            handler(command)
        except CommandFailed as failed:
            self._health.media_errors += failed.status in _MEDIA_ERRORS
            raise
        return 0

    def _read(self, command: Command) -> None:
        start, length = self._range(command)
        self._bounded(length)
        self._health.read_commands += 1
        self._transfers.to_guest(command, self._namespace.view[start : start + length])
        self._health.bytes_read += length

    def _write(self, command: Command) -> None:
        start, length = self._range(command)
        self._bounded(length)
        self._health.write_commands += 1
        self._transfers.into(command, self._namespace.view[start : start + length])
        self._health.bytes_written += length
        self._settle(command)

    def _compare(self, command: Command) -> None:
        start, length = self._range(command)
        self._bounded(length)
        self._health.read_commands += 1
        theirs = bytearray(length)
        self._transfers.into(command, theirs)
        ours = self._namespace.read(start, length)
        if len(ours) < length:
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR)
        if ours != theirs:
            raise CommandFailed(Status.COMPARE_FAILURE)

    def _write_zeroes(self, command: Command) -> None:
        start, length = self._range(command)
        self._transfers.effort += length >> 16
        self._health.write_commands += 1
        self._zero(start, length)
        self._settle(command)

    def _flush(self, command: Command) -> None:
        if not self._namespace.flush():
            raise CommandFailed(Status.WRITE_FAULT)

    def _dataset_management(self, command: Command) -> None:
        count = (command.cdw10 & 0xFF) + 1
        ranges = bytearray(count * _RANGE.size)
        self._transfers.into(command, ranges)
        extents = [(first, blocks) for _, blocks, first in _RANGE.iter_unpack(ranges)]
        for first, blocks in extents:
            if first + blocks > self._namespace.blocks:
                raise CommandFailed(Status.LBA_OUT_OF_RANGE, byte=BYTE_CDW10)
        if not command.cdw11 & _DEALLOCATE:
            return  # hints on how the blocks will be used: nothing here depends on them
        self._transfers.effort += count
        for first, blocks in extents:
            if blocks:
                self._zero(first * self._namespace.block_size, blocks * self._namespace.block_size)

    def _range(self, command: Command) -> tuple[int, int]:
        """Start and length in bytes of the blocks that a command names."""
        first, count = command.slba, command.block_count
        if first + count > self._namespace.blocks:
            raise CommandFailed(Status.LBA_OUT_OF_RANGE, byte=BYTE_CDW10)
        return first * self._namespace.block_size, count * self._namespace.block_size

    @staticmethod
    def _bounded(length: int) -> None:
        if length > MAX_TRANSFER:
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW12)

    def _zero(self, start: int, length: int) -> None:
        if not self._namespace.zero(start, length):
            raise CommandFailed(Status.WRITE_FAULT)

    def _settle(self, command: Command) -> None:
        """What was written is on stable storage before the completion, where the guest wants it so."""
        if command.cdw12 & _FORCE_UNIT_ACCESS or not self._features.write_cache:
            self._flush(command)
