"""A log: a ring in guest memory that the IOMMU writes entries of 16 bytes to (sections 2.5 and 2.6)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from backend.core import Fault
from backend.pci.registers import RegisterTable
from backend.viommu.amd.registers import ring_address, ring_size
from backend.viommu.amd.status import StatusRegister

log = logging.getLogger(__name__)

ENTRY_SIZE = 16


@dataclass(frozen=True, slots=True)
class LogRegisters:
    """Where a log stands: the names of its registers, and its bits of the status register."""

    base: str
    head: str
    tail: str
    running: int
    interrupt: int
    overflow: int


class LogRing:
    """One log. `write(gpa, data)` is the IOMMU's own DMA."""

    def __init__(
        self,
        registers: RegisterTable,
        status: StatusRegister,
        names: LogRegisters,
        write: Callable[[int, bytes], Fault | None],
    ) -> None:
        self._registers = registers
        self._status = status
        self._names = names
        self._write = write

    @property
    def range(self) -> tuple[int, int]:
        """GPA and bytes."""
        base = self._registers[self._names.base]
        return ring_address(base), ring_size(base)

    def append(self, raw: bytes) -> bool:
        """Write an entry and move the tail; False: it is discarded.

        A full log stops and says so, and one that guest memory does not take stops. One entry always stays free: head
        equal to tail means empty.
        """
        names = self._names
        if not self._status & names.running or self._status & names.overflow:
            return False
        base, size = self.range
        tail = self._registers[names.tail]
        following = (tail + ENTRY_SIZE) % size
        if following == self._registers[names.head]:
            self._status.change(set_=names.overflow, clear=names.running)
            return False
        fault = self._write(base + tail, raw)
        if fault is not None:
            log.debug("the %s takes no entry at %#x: %s", names.base, base + tail, fault.reason.name)
            self._status.change(clear=names.running)
            return False
        self._registers[names.tail] = following
        self._status.change(set_=names.interrupt)
        return True
