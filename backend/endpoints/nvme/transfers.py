"""Data of commands on its way between guest memory and this process, and a record of where it went."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from backend.core import BufferGoneError, Fault
from backend.endpoints.nvme.commands import BYTE_CDW10, BYTE_PRP1, Command
from backend.endpoints.nvme.prp import scatter_list
from backend.endpoints.nvme.status import CommandFailed, Status
from backend.pci.dma import DmaPort

# Identify's MDTS: 2^8 pages of 4 KiB, 1 MiB, so a command occupies the loop for about 100 us and a PRP list is short.
MDTS = 8
MAX_TRANSFER = 4096 << MDTS
# Enough to find a buffer that has been unmapped since: the driver of a strict IOMMU unmaps each one when it completes.
_REMEMBERED = 4096


class Transfer(NamedTuple):
    """One contiguous part of a data transfer, in bytes of the function's IOVAs; `write`: guest memory was written."""

    iova: int
    length: int
    write: bool


@dataclass(slots=True)
class TransferCounters:
    """Data of commands, in bytes, seen from the guest: `read` is what it read from the controller."""

    read: int = 0
    written: int = 0
    faults: int = 0


class Transfers:
    """Moves the data that a command's PRPs describe: one scatter call a command."""

    def __init__(self, port: Callable[[], DmaPort]) -> None:
        self._port = port
        self.page_size = 4096
        self.recent: deque[Transfer] = deque(maxlen=_REMEMBERED)
        self.counters = TransferCounters()
        self.effort = 0
        """Work done so far in units of 64 KiB moved or cleared, for whoever shares out the loop's time."""

    def to_guest(self, command: Command, data: bytes | bytearray | memoryview) -> None:
        """Write `data` to the command's buffer. Raises CommandFailed."""
        self._move(command, data, write=True)
        self.counters.read += len(data)

    def into(self, command: Command, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from the command's buffer. Raises CommandFailed."""
        self._move(command, buffer, write=False)
        self.counters.written += len(buffer)

    def _move(self, command: Command, buffer: bytes | bytearray | memoryview, *, write: bool) -> None:
        length = len(buffer)
        if length > MAX_TRANSFER:
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW10)
        self.effort += 1 + (length >> 16)
        port = self._port()
        try:
            parts = scatter_list(port, command.prp1, command.prp2, length, self.page_size)
            fault = port.scatter(parts, buffer, write=write)
        except CommandFailed as failed:
            self.counters.faults += failed.fault is not None
            raise
        except BufferGoneError:  # the namespace's file was truncated, or its file system has no space left
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR if write else Status.WRITE_FAULT) from None
        if fault is not None:
            self.counters.faults += 1
            raise CommandFailed(Status.DATA_TRANSFER_ERROR, byte=BYTE_PRP1, fault=fault)
        self.recent.extend(Transfer(iova, size, write) for iova, size in parts)

    # By order of the control path, never of the guest: what the isolation check asks for.

    def probe_write(self, iova: int, data: bytes) -> Fault | None:
        """DMA `data` to guest memory at `iova`; the Fault if it did not get there."""
        return self._port().write(iova, data)

    def probe_read(self, iova: int, length: int) -> bytes | Fault:
        """DMA `length` bytes from guest memory at `iova`, or the Fault."""
        return self._port().read(iova, length)
