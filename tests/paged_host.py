"""What drivers of endpoints for tests stand on: guest memory behind a real engine port, and a function's registers.

Guest memory is a memfd. Without PASID every page is mapped on its own at IOVA_BASE + its offset, so that an IOVA is
never the offset in memory and a test can take single pages away.
"""

from __future__ import annotations

from guest_ram import PAGE, Ram

from backend.core import Access
from backend.ioasid import Engine
from backend.pci import PciFunction

IOVA_BASE = 0x12_3400_0000
MIB = 1 << 20


class PagedHost:
    """A machine with one endpoint that masters the bus and sends MSI-X messages. `memory` in bytes, all mapped."""

    function: PciFunction

    def __init__(self, function: PciFunction, rid: int, *, memory: int) -> None:
        self.ram = Ram(memory)
        self.engine = Engine()
        self.context = self.engine.open()
        self.space = self.context.alloc()
        for offset in range(0, memory, PAGE):
            self.context.map_dma(self.space, IOVA_BASE + offset, self.ram.hva + offset, PAGE)
        self.device = self.engine.add_device(rid, function.name)
        self.context.bind_device(rid)
        self.context.attach(rid, self.space)
        self.function = function
        self.function.connect_dma(self.device.port)
        self.interrupts: list[int] = []
        self.function.connect_interrupts(self._interrupted)
        self._next = PAGE  # page 0 stays free: an address of 0 is nobody's buffer
        self.set_bus_master(True)
        self.function.config.write(self.capability(0x11) + 2, 2, 0x8000)

    def close(self) -> None:
        self.engine.close()
        self.ram.close()

    def _interrupted(self, vector: int) -> bool:
        self.interrupts.append(vector)
        return True

    def set_bus_master(self, on: bool) -> None:
        self.function.config.write(0x04, 2, 0x0006 if on else 0x0002)

    def capability(self, wanted: int) -> int:
        """Where a capability of the first 256 bytes lies."""
        offset = self.function.config.read(0x34, 1)
        while self.function.config.read(offset, 1) != wanted:
            offset = self.function.config.read(offset + 1, 1)
        return offset

    # memory

    def allocate(self, pages: int = 1) -> int:
        """IOVA of fresh pages."""
        iova = IOVA_BASE + self._next
        self._next += pages * PAGE
        assert self._next <= self.ram.size
        return iova

    def poke(self, iova: int, data: bytes) -> None:
        self.ram.poke(iova - IOVA_BASE, data)

    def peek(self, iova: int, size: int) -> bytes:
        return self.ram.peek(iova - IOVA_BASE, size)

    def unmap(self, iova: int) -> None:
        self.context.unmap_dma(self.space, iova, PAGE)

    def map(self, iova: int, access: Access = Access.READ | Access.WRITE) -> None:
        self.context.map_dma(self.space, iova, self.ram.hva + iova - IOVA_BASE, PAGE, access)

    # registers

    def get(self, offset: int, size: int = 4) -> int:
        return self.function.bar_read(0, offset, size)

    def put(self, offset: int, value: int, size: int = 4) -> None:
        self.function.bar_write(0, offset, size, value)
        self.function.drained()
