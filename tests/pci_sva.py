"""A function with PASID, ATS and PRI over a real engine, and what Linux writes to its config space.

Register numbers are those of <linux/pci_regs.h>; nothing here is taken from the code under test.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Protocol

from guest_ram import PAGE, Ram
from ioasid_guest import DEV1, GOLDEN, Guest, gcr3_table

from backend.core import Access, Fault
from backend.ioasid import Code, PasidTableFormat, Untagged
from backend.pci import Ats, Capability, Pasid, PciExpress, PciFunction, PciIds, Pri

EXT_ATS, EXT_PRI, EXT_PASID = 0x0F, 0x13, 0x1B
COMMAND, MASTER = 0x04, 0x4
ATS_CTRL, ATS_ENABLE = 6, 0x8000
PRI_CTRL, PRI_STATUS, PRI_MAX_REQ, PRI_ALLOC_REQ = 4, 6, 8, 12
PRI_ENABLE, PRI_RESET = 1, 2
PRI_RF, PRI_UPRGI, PRI_STOPPED, PRI_PASID = 0x1, 0x2, 0x100, 0x8000
PASID_CAP, PASID_CTRL = 4, 6
PASID_ENABLE, PASID_EXEC, PASID_PRIV = 1, 2, 4
EXP_DEVCTL, EXP_FLR = 8, 0x8000

READ = Access.READ


class Config(Protocol):
    """What reads and writes config space."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class Registers:
    """Config space by capability and register, as a driver sees it."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def find(self, capability: int) -> int:
        """pci_find_ext_capability: walk the chain from 0x100."""
        position = 0x100
        while position:
            header = self._config.read(position, 4)
            if header & 0xFFFF == capability:
                return position
            position = header >> 20
        raise LookupError(f"extended capability {capability:#x}")

    def read(self, capability: int, register: int, size: int = 2) -> int:
        return self._config.read(self.find(capability) + register, size)

    def write(self, capability: int, register: int, value: int, size: int = 2) -> None:
        self._config.write(self.find(capability) + register, size, value)

    def set_master(self, on: bool = True) -> None:
        command = self._config.read(COMMAND, 2)
        self._config.write(COMMAND, 2, command | MASTER if on else command & ~MASTER)

    # drivers/pci/ats.c

    def enable_ats(self, shift: int = 12) -> None:
        self.write(EXT_ATS, ATS_CTRL, ATS_ENABLE | shift - 12)

    def disable_ats(self) -> None:
        self.write(EXT_ATS, ATS_CTRL, self.read(EXT_ATS, ATS_CTRL) & ~ATS_ENABLE)

    def enable_pasid(self, features: int = 0) -> None:
        assert not self.read(EXT_PASID, PASID_CTRL) & PASID_ENABLE
        assert self.read(EXT_PASID, PASID_CAP) & features == features
        self.write(EXT_PASID, PASID_CTRL, PASID_ENABLE | features)

    def disable_pasid(self) -> None:
        self.write(EXT_PASID, PASID_CTRL, 0)

    def reset_pri(self) -> None:
        control = self.read(EXT_PRI, PRI_CTRL)
        assert not control & PRI_ENABLE
        self.write(EXT_PRI, PRI_CTRL, control | PRI_RESET)

    def enable_pri(self, requests: int = 32) -> None:
        control = self.read(EXT_PRI, PRI_CTRL)
        assert not control & PRI_ENABLE
        assert self.read(EXT_PRI, PRI_STATUS) & PRI_STOPPED
        self.write(EXT_PRI, PRI_ALLOC_REQ, min(self.read(EXT_PRI, PRI_MAX_REQ, 4), requests), 4)
        self.write(EXT_PRI, PRI_CTRL, control | PRI_ENABLE)

    def disable_pri(self) -> None:
        self.write(EXT_PRI, PRI_CTRL, self.read(EXT_PRI, PRI_CTRL) & ~PRI_ENABLE)

    @property
    def pri_status(self) -> int:
        """As pci_pri_status: Stopped means nothing while the interface is enabled."""
        status = self.read(EXT_PRI, PRI_STATUS)
        return status & ~PRI_STOPPED if self.read(EXT_PRI, PRI_CTRL) & PRI_ENABLE else status

    def enable_all(self) -> None:
        """Bus mastering by the driver; before that, in the order of the AMD driver's pdev_enable_caps."""
        self.enable_ats()
        self.enable_pasid()
        self.reset_pri()
        self.enable_pri()
        self.set_master()


class Asked:
    """Groups that were asked, and what became of them."""

    def __init__(self, function: PciFunction) -> None:
        assert function.page_requests is not None
        self.requests = function.page_requests
        self.answers: list[tuple[str, Code]] = []

    def ask(self, name: str, pages: int | Sequence[tuple[int, Access]] = 1, pasid: int | None = 5) -> bool:
        if isinstance(pages, int):
            pages = [(index * PAGE, READ) for index in range(pages)]
        return self.requests.ask(pasid, pages, lambda code: self.answers.append((name, code)))


def sva_function(*capabilities: Capability) -> PciFunction:
    chain = capabilities or (Ats(), Pasid(width=8), Pri())
    return PciFunction(
        name="sva",
        ids=PciIds(0x1234, 0x10A5),
        capabilities=[PciExpress(integrated=True, prefixes=True), *chain],
    )


def connected(guest: Guest, *capabilities: Capability) -> tuple[PciFunction, Registers]:
    """A function in place of dev1 of the guest."""
    function = sva_function(*capabilities)
    function.rid = DEV1
    function.connect_dma(guest.dev1.port)
    function.connect_page_requests(guest.dev1.page_request)
    function.connect_tlb(lambda tlb: guest.engine.set_tlb(guest.dev1, tlb))
    return function, Registers(function.config)


class Process:
    """Four levels of x86-64 tables (SDM 3, 4.5.4: P 0, R/W 1, U/S 2) in pages that `take` gives the GPA of."""

    def __init__(self, ram: Ram, take: Iterator[int]) -> None:
        self._ram = ram
        self._take = take
        self.root = next(take)

    def map(self, iova: int, gpa: int, *, writable: bool = True) -> None:
        self._ram.poke(self.leaf(iova), struct.pack("<Q", gpa | (7 if writable else 5)))

    def unmap(self, iova: int) -> None:
        self._ram.poke(self.leaf(iova), bytes(8))

    def leaf(self, iova: int) -> int:
        """GPA of the last entry; tables on the way to it are made."""
        table = self.root
        for level in (4, 3, 2):
            slot = table + (iova >> (12 + 9 * (level - 1)) & 511) * 8
            (entry,) = struct.unpack("<Q", self._ram.peek(slot, 8))
            if not entry:
                entry = next(self._take) | 7
                self._ram.poke(slot, struct.pack("<Q", entry))
            table = entry & 0x000FFFFFFFFFF000
        return table + (iova >> 12 & 511) * 8


class Machine:
    """A function whose PASIDs lead to processes by a PASID table of the guest's; without a PASID, to guest memory.

    RAM: GPA 0 holds the PASID table, tables follow from 0x1000 to `data`; what is behind is for the test.
    """

    def __init__(self, *, pages: int = 256, tables: int = 64, pasids: Sequence[int] = (1, 2)) -> None:
        self.guest = Guest(pages=pages)
        self.ram = self.guest.ram
        self.data = tables * PAGE
        take = iter(range(PAGE, self.data, PAGE))
        self.processes = {pasid: Process(self.ram, take) for pasid in pasids}
        self.table = gcr3_table(self.ram, 0, {pasid: each.root for pasid, each in self.processes.items()})
        ctx = self.guest.ctx
        self.memory_ioasid, self.table_ioasid = ctx.alloc(), ctx.create_nesting(1)
        ctx.map_dma(self.memory_ioasid, 0, GOLDEN, self.ram.size)
        ctx.bind_pasid_table(self.table_ioasid, self.table, PasidTableFormat(levels=1), Untagged.PARENT)
        ctx.attach(DEV1, self.memory_ioasid)
        ctx.attach(DEV1, self.table_ioasid, ats=True)
        self.function, self.registers = connected(self.guest)
        self.registers.enable_all()
        self.memory = self.function.memory
        self.heard: list[Fault] = []
        self.guest.engine.on_fault(self.heard.append)

    def invalidate(self, pasid: int, iova: int | None = None, size: int = PAGE) -> None:
        """As a front end does for the guest: of a range, or of the whole PASID."""
        ctx = self.guest.ctx
        if iova is None:
            ctx.invalidate_cache(self.table_ioasid, granularity="pasid", pasid=pasid)
        else:
            ctx.invalidate_cache(self.table_ioasid, granularity="range", iova=iova, size=size, pasid=pasid)

    def kept(self) -> int:
        """Translations that the function keeps."""
        return len(self.function.tlb or ())

    def close(self) -> None:
        self.guest.close()
