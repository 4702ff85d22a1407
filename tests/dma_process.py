"""Processes of a guest for tests of the DMA engine: page tables laid by hand, and a kernel that answers page requests.

Nothing here imports what walks tables. x86-64 tables of four levels (SDM 3, 4.5.4) under a PASID table of AMD's (48882,
2.2.6.3), as a kernel with shared virtual addressing has them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from dma_driver import PASID_CONTROL, PRI_ALLOCATION, PRI_CONTROL, RID, Host, Ring
from dma_header import VDMA
from guest_ram import PAGE
from paged_host import IOVA_BASE

from backend.core import Access
from backend.ioasid import Code, FaultRecord, PasidTableFormat, Untagged

PRESENT, WRITABLE, USER, ACCESSED, DIRTY = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6
FRAME = 0x000F_FFFF_FFFF_F000

ATS, PRI, PASID = 0x0F, 0x13, 0x1B


class Kernel(Host):
    """A Host whose guest binds processes: PASID n has the address space of its nth process."""

    def __init__(self, *, memory: int = 16 << 20, queues: int = 8, allocation: int = 512) -> None:
        super().__init__(memory=memory, queues=queues)
        self.context.map_dma(self.space, 0, self.ram.hva, memory)
        self.table = self.page()
        self.child = self.context.create_nesting(self.space)
        self.context.attach(RID, self.child, ats=True)
        self.context.bind_pasid_table(self.child, self.table, PasidTableFormat(levels=1), Untagged.PARENT)
        self.function.rid = RID
        self.function.connect_page_requests(self.device.page_request)
        self.function.connect_tlb(lambda tlb: self.engine.set_tlb(self.device, tlb))
        self.processes: dict[int, Process] = {}
        self.groups: list[list[FaultRecord]] = []
        """Page request groups seen, each complete."""
        self._partial: dict[int, list[FaultRecord]] = {}
        config = self.function.config
        config.write(self.extended(PASID) + PASID_CONTROL, 2, 1)
        config.write(self.extended(PRI) + PRI_ALLOCATION, 4, allocation)
        config.write(self.extended(PRI) + PRI_CONTROL, 2, 1)
        self.set_ats(True)

    def set_ats(self, on: bool) -> None:
        self.function.config.write(self.extended(ATS) + 6, 2, 0x8000 if on else 0)

    def page(self) -> int:
        """GPA of a zeroed page."""
        gpa = self.allocate() - IOVA_BASE
        self.ram.poke(gpa, bytes(PAGE))
        return gpa

    def process(self, pasid: int) -> Process:
        """A new process, bound."""
        process = self.processes[pasid] = Process(self, pasid)
        self.ram.poke(self.table + 8 * pasid, struct.pack("<Q", process.root | 1))
        return process

    def ring(self, number: int, pasid: int, *, order: int = 6) -> Ring:
        """A queue of a process, started; ring and records are the kernel's."""
        ring = Ring(self, number, order)
        ring.start(VDMA["CONTROL_UNTAGGED"] | VDMA["CONTROL_PASID"], pasid=pasid)
        return ring

    def requests(self) -> list[list[FaultRecord]]:
        """Groups that have become complete; they wait for `answer`."""
        found = []
        for record in self.context.read_faults().records:
            if record.group is None:
                continue  # a fault that is over
            pages = self._partial.setdefault(record.group, [])
            pages.append(record)
            if record.last:
                found.append(self._partial.pop(record.group))
        self.groups += found
        return found

    def answer(self, group: list[FaultRecord], code: Code) -> None:
        assert group[0].group is not None
        self.context.page_response(RID, group[0].group, code, group[0].pasid)

    def serve(self, most: int = 10_000) -> int:
        """Do what a kernel does about page requests until there are none: every page of a group is faulted in, up to
        the first that cannot be. How many groups that were."""
        served = 0
        while groups := self.requests():
            for group in groups:
                served += 1
                assert served <= most
                assert group[0].pasid is not None
                process = self.processes.get(group[0].pasid)
                good = process is not None and all(process.fault(each.iova, each.access) for each in group)
                self.answer(group, Code.SUCCESS if good else Code.INVALID)
        return served


class Process:
    """An address space. Areas are what mmap gives: nothing is in them until a fault brings it."""

    def __init__(self, kernel: Kernel, pasid: int) -> None:
        self._kernel = kernel
        self.pasid = pasid
        self.root = kernel.page()
        self._areas: list[tuple[int, int, bool]] = []
        self._next = 0x7F00_0000_0000
        self.faults: list[tuple[int, Access]] = []
        self.on_fault: Callable[[int], None] = lambda iova: None
        """Called behind each fault that was served."""

    def mmap(self, pages: int, *, writable: bool = True, populate: bool = False) -> int:
        """An area's address; behind it there is nothing."""
        start = self._next
        self._next += (pages + 16) * PAGE
        self._areas.append((start, start + pages * PAGE, writable))
        if populate:
            for number in range(pages):
                assert self.fault(start + number * PAGE, Access.WRITE if writable else Access.READ)
            self.faults.clear()
        return start

    def fault(self, iova: int, access: Access) -> bool:
        """Bring a page: False where there is no area for the access."""
        for start, end, writable in self._areas:
            if start <= iova < end and (writable or not access & Access.WRITE):
                if not self.entry(iova) & PRESENT:
                    self.set(iova, self._kernel.page() | PRESENT | USER | (WRITABLE if writable else 0))
                elif access & Access.WRITE and not self.entry(iova) & WRITABLE:  # copy on write
                    self.set(iova, self.entry(iova) | WRITABLE)
                self.faults.append((iova, access))
                self.on_fault(iova)
                return True
        return False

    def entry(self, iova: int) -> int:
        return int(struct.unpack("<Q", self._kernel.ram.peek(self._slot(iova), 8))[0])

    def set(self, iova: int, entry: int) -> None:
        """Change a leaf; `forget` is another matter."""
        self._kernel.ram.poke(self._slot(iova), struct.pack("<Q", entry))

    def forget(self, iova: int, pages: int = 1) -> None:
        """Invalidate translations of a range."""
        kernel = self._kernel
        kernel.context.invalidate_cache(
            kernel.child, granularity="range", iova=iova, size=pages * PAGE, pasid=self.pasid
        )

    def unmap(self, iova: int) -> None:
        """Take a page away; the area stays."""
        self.set(iova, 0)
        self.forget(iova)

    def poke(self, iova: int, data: bytes) -> None:
        """As the CPU writes: faults are served."""
        for at, size, offset in _pages(iova, len(data)):
            assert self.entry(at) & PRESENT or self.fault(at & -PAGE, Access.WRITE)
            self._kernel.ram.poke((self.entry(at) & FRAME) + at % PAGE, data[offset : offset + size])

    def peek(self, iova: int, size: int) -> bytes:
        """As the CPU reads; what is not there is zero."""
        parts = []
        for at, length, _ in _pages(iova, size):
            here = self.entry(at)
            parts.append(self._kernel.ram.peek((here & FRAME) + at % PAGE, length) if here & PRESENT else bytes(length))
        return b"".join(parts)

    def exit(self) -> None:
        """The address space is gone: the PASID's entry is cleared and invalidated."""
        self._kernel.ram.poke(self._kernel.table + 8 * self.pasid, bytes(8))
        self._kernel.context.invalidate_cache(self._kernel.child, granularity="pasid", pasid=self.pasid)
        del self._kernel.processes[self.pasid]

    def _slot(self, iova: int) -> int:
        """GPA of the leaf's entry; tables above it are made."""
        table, ram = self.root, self._kernel.ram
        for level in (4, 3, 2):
            slot = table + (iova >> (12 + 9 * (level - 1)) & 511) * 8
            (entry,) = struct.unpack("<Q", ram.peek(slot, 8))
            if not entry:
                entry = self._kernel.page() | PRESENT | WRITABLE | USER
                ram.poke(slot, struct.pack("<Q", entry))
            table = entry & FRAME
        return table + (iova >> 12 & 511) * 8


def _pages(iova: int, size: int) -> list[tuple[int, int, int]]:
    """(address, bytes, offset in the whole) of each page that a range touches."""
    found, offset = [], 0
    while offset < size:
        length = min(PAGE - (iova + offset) % PAGE, size - offset)
        found.append((iova + offset, length, offset))
        offset += length
    return found
