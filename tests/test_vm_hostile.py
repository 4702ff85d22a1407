"""A whole machine without its QEMU, wired as for a guest, which does anything: nothing raises, nothing hangs.

The IOMMU's registers and rings, device tables, page tables of both kinds, the DMA engines' queues, config space, resets
and guest memory that goes, all at random and half of it nearly right, from one seed.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from amd_driver import (
    COMMAND_EN,
    COMMAND_TAIL,
    COMMANDS,
    CONTROL,
    DATA,
    DEVICE_TABLE,
    EVENT_LOG_EN,
    EVENTS,
    GT_EN,
    IOMMU_EN,
    MEMORY,
    NOWHERE,
    PPR_BASE,
    PPR_EN,
    PPR_LOG_EN,
    PPRS,
    READ,
    SEMAPHORE,
    TABLES,
    WRITE,
    Gcr3Table,
    GuestTable,
    PageTable,
    complete_ppr,
    completion_wait,
    device_entry,
    guest_entry,
    invalidate_all,
    invalidate_device_tlb,
    invalidate_entry,
    invalidate_pages,
    prefetch,
)
from dma_header import VDMA
from guest_ram import PAGE, Ram
from pci_sva import Registers

from backend.core import RW, Access
from backend.endpoints.dma_engine import DmaEngine
from backend.endpoints.nvme import Namespace
from backend.pci import PciFunction, ResetKind
from backend.vm import machine
from backend.vm.backend import Backend

STEPS = 400
MASK64 = (1 << 64) - 1
PASIDS = (0, 1, 5)
IOVAS = 0x7000_0000
"""Of a process's 16 pages, one in four of which has no page."""
RINGS = DATA
"""GPA of the queues' rings, two pages each; the kernel's own addresses are GPAs."""
RECORDS = DATA + 0x4_0000
EDGES = (0, 1, 3, 4095, 4096, (1 << 32) - 1, 1 << 32, (1 << 63) + 5, MASK64 - 4095, MASK64, NOWHERE, MEMORY - 8)
PPR, ATS = 1 << 52, 1 << 32  # of a device table entry: bits 52 and 96


@dataclass(frozen=True)
class Region:
    """The guest's memory, as a function is told of it."""

    gpa: int
    size: int
    hva: int
    access: Access = RW


class Config:
    """Config space as pci_sva's Registers take it."""

    def __init__(self, function: PciFunction) -> None:
        self._config = function.config

    def read(self, offset: int, size: int) -> int:
        return self._config.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._config.write(offset, size, value)


class Chaos:
    """One guest. All is drawn from one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        found = machine.load("q35-amd-sva")
        self.disk = Namespace.in_memory(1 << 20)
        self.backend = Backend(found, {each.name: folder / each.name for each in found.functions}, {"nvme0": self.disk})
        self.ram = Ram(MEMORY)
        self.iommu = self.backend.iommus["iommu"]
        self.engines = [each for each in self.backend.endpoints.values() if isinstance(each, DmaEngine)]
        self.functions: list[PciFunction] = [self.iommu, *self.backend.endpoints.values()]
        self.tails: dict[tuple[DmaEngine, int], int] = {}
        self.clean()

    def close(self) -> None:
        self.backend.memory.close()
        self.backend.engine.close()
        self.disk.close()
        self.ram.close()

    # A good driver

    def clean(self) -> None:
        """Everything as a driver sets it up that knows what it does."""
        self.ram.poke(0, bytes(RECORDS))
        for server in self.backend.servers:
            self.backend.memory.map(server.function.name, Region(0, MEMORY, self.ram.hva))
        self.tables()
        for offset, value in ((0x00, DEVICE_TABLE | 1), (0x08, COMMANDS | 8 << 56), (0x10, EVENTS | 8 << 56)):
            self.register(offset, value)
        self.register(PPR_BASE, PPRS | 8 << 56)
        self.iommu.config.write(4, 2, 6)
        self.register(CONTROL, IOMMU_EN | EVENT_LOG_EN | COMMAND_EN | GT_EN | PPR_LOG_EN | PPR_EN)
        for engine in self.engines:
            self.enable(engine)

    def tables(self) -> None:
        """Device table, GCR3 table, the tables of processes and one of the kernel's."""
        gcr3 = Gcr3Table(self.ram, TABLES, 2)
        for number, pasid in enumerate(PASIDS):
            table = GuestTable(self.ram, TABLES + (number + 1) * 16 * PAGE)
            gcr3.set(pasid, table.root | 1)
            for page in range(16):
                table.set(IOVAS + page * PAGE, 0 if page % 4 == 3 else (DATA + (16 + page) * PAGE) | 7)
        self.host = PageTable(self.ram, TABLES + 0x4_0000, 4)
        for page in range(0, MEMORY - DATA, PAGE):
            self.host.set(RINGS + page, (DATA + page) | 1 | READ | WRITE)
        for each in self.backend.endpoints.values():
            self.ram.poke(DEVICE_TABLE + each.rid * 32, self.entry(gcr3.root))

    def entry(self, root: int) -> bytes:
        """A device table entry that a driver could have meant."""
        low = 3 | READ | WRITE | PPR
        kind = self.random.randrange(4)
        if kind == 0:
            return device_entry(self.host.root, 4, 7)
        mode, host = (4, self.host.root) if kind == 1 else (0, 0)
        return guest_entry(root, glx=1, domain=9, mode=mode, root=host, low=low, high=ATS, giov=kind == 2)

    def enable(self, function: PciFunction) -> None:
        registers = Registers(Config(function))
        if function.page_requests is None:
            registers.set_master()
            return
        registers.disable_pri()
        registers.disable_ats()
        registers.disable_pasid()
        registers.reset_pri()
        registers.enable_all()

    def start(self) -> None:
        """A queue of an engine, with a ring of 32."""
        engine, queue = self.random.choice(self.engines), self.random.randrange(4)
        self.tails[engine, queue] = 0
        fields = {
            "COMMAND": VDMA["COMMAND_ABORT"],
            "CONTROL": self.random.choice((4, 5, 5, 5, 1, 7)) if engine.page_requests else 4,
            "PASID": self.random.choice(PASIDS),
            "RING": RINGS + queue * 2 * PAGE,
            "ORDER": 5,
        }
        for name, value in (*fields.items(), ("COMMAND", VDMA["COMMAND_START"])):
            at = VDMA["QUEUE_BASE"] + queue * VDMA["QUEUE_STRIDE"] + VDMA["Q_" + name]
            engine.bar_write(0, at, 8 if name == "RING" else 4, value)

    # Anything

    def register(self, offset: int, value: int) -> None:
        self.iommu.bar_write(0, offset, 8, value)

    def address(self) -> int:
        draw = self.random.random()
        if draw < 0.1:
            return self.random.choice(EDGES)
        base = IOVAS if draw < 0.6 else DATA
        return base + self.random.choice((0, 0, 8, 4095, 3 * PAGE, self.random.randrange(16 * PAGE)))

    def submit(self) -> None:
        """Jobs, most of them sound."""
        engine, queue = self.random.choice(list(self.tails) or [(self.engines[0], 0)])
        tail = self.tails.get((engine, queue), 0)
        for _ in range(self.random.randrange(1, 8)):
            flags = self.random.choice((1, 1, 3, 0x31, 0x31, 0x35, 0x11, 0x39, self.random.randrange(1 << 16)))
            length = self.random.choice((4, 8, 16, self.random.randrange(3 * PAGE), self.random.choice(EDGES)))
            where = RECORDS + 32 * self.random.randrange(64)
            words = (where, self.address(), self.address(), length, *(self.random.choice(EDGES) for _ in range(3)))
            raw = struct.pack("<BBHI7Q", self.random.randrange(9), 0, flags, tail, *words)
            if self.random.random() < 0.02:
                raw = self.random.randbytes(64)
            self.ram.poke(RINGS + queue * 2 * PAGE + tail % 32 * 64, raw)
            tail = tail + 1 & 0xFFFF_FFFF
        self.tails[engine, queue] = tail
        doorbell = VDMA["DOORBELL_BASE"] + queue * VDMA["DOORBELL_STRIDE"] + VDMA["DB_TAIL"]
        engine.bar_write(0, doorbell, 4, tail if self.random.random() < 0.97 else self.random.randrange(1 << 32))
        engine.drained()

    def commands(self) -> None:
        """Of the IOMMU; wherever its ring is by now."""
        base = self.iommu.bar_read(0, 0x08, 8)
        size, at = 16 << (base >> 56), self.iommu.bar_read(0, COMMAND_TAIL, 8)
        rid = self.random.choice(self.functions).rid
        pasid = self.random.choice((None, *PASIDS, 0xFFFF, 0xFFFFF))
        everything = 0x7FFF_FFFF_FFFF_F000
        known = [
            completion_wait(SEMAPHORE, 1),
            invalidate_all(),
            invalidate_entry(rid),
            invalidate_pages(9, self.address() & ~0xFFF, size=False, pasid=pasid),
            invalidate_pages(self.random.choice((7, 9)), everything, size=True, pasid=pasid),
            invalidate_device_tlb(rid, self.address() & ~0xFFF, pasid=pasid),
            invalidate_device_tlb(rid, everything, size=True, pasid=pasid, most=0),
            *(complete_ppr(rid, self.random.randrange(4), self.random.choice((0, 1, 15)), pasid) for _ in range(3)),
            prefetch(rid, self.address() & ~0xFFF, self.random.randrange(256), pasid=pasid, anew=True),
            self.random.randbytes(16),
            struct.pack("<QQ", self.random.randrange(10) << 60 | self.random.randrange(1 << 40), self.address()),
        ]
        for raw in self.random.choices(known, [8] * 11 + [1, 1], k=self.random.randrange(1, 6)):
            where = (base & 0x000F_FFFF_FFFF_F000) + at
            if where + 16 <= MEMORY:
                self.ram.poke(where, raw)
            at = (at + 16) % size
        self.register(COMMAND_TAIL, at)

    def answer(self) -> None:
        """What the PPR log holds is answered, as Linux does it: by the tag, and with the PASID."""
        head, tail = self.iommu.bar_read(0, 0x2030, 8), self.iommu.bar_read(0, 0x2038, 8)
        size, at = 16 << 8, self.iommu.bar_read(0, COMMAND_TAIL, 8)
        base = self.iommu.bar_read(0, 0x08, 8) & 0x000F_FFFF_FFFF_F000
        if self.iommu.bar_read(0, PPR_BASE, 8) != PPRS | 8 << 56 or base != COMMANDS:
            return
        while head % size != tail % size:
            low, _ = struct.unpack("<QQ", self.ram.peek(PPRS + head % size, 16))
            head += 16
            if low >> 41 & 1:
                code = self.random.choice((0, 0, 0, 0, 1, 1, 15))
                self.ram.poke(base + at, complete_ppr(low & 0xFFFF, low >> 32 & 0x1FF, code, low >> 16 & 0xFFFF))
                at = (at + 16) % size
        self.register(0x2030, tail)
        self.register(COMMAND_TAIL, at)

    def anywhere(self) -> None:
        """Any register of any function, any width."""
        function = self.random.choice([self.iommu, *self.functions])
        value = self.random.choice((*EDGES, self.random.randrange(1 << 64), self.random.randrange(1 << 12)))
        size = self.random.choice((1, 2, 4, 8))
        bar = self.random.choice(list(function.bars))
        offset = self.random.randrange(0, function.bars[bar].size, size)
        if function is self.iommu:
            offset = self.random.choice((0, 8, 0x10, 0x18, 0x20, 0x28, 0x38, *range(0x2000, 0x2040, 8)))
        function.bar_write(bar, offset, size, value & (1 << 8 * size) - 1)
        function.bar_read(bar, offset, size)
        function.drained()

    def config(self) -> None:
        """Any of config space."""
        function = self.random.choice(self.functions)
        size = self.random.choice((1, 2, 4))
        offset = self.random.choice((4, 0x48, self.random.randrange(0x40, 0x200))) & -size
        function.config.write(offset, size, self.random.choice((0, 4, 7, self.random.randrange(1 << 8 * size))))
        function.drained()

    def memory(self) -> None:
        """A word of a table, of a ring, of anything."""
        at = self.random.choice(
            (DEVICE_TABLE + self.random.choice(self.functions).rid * 32, TABLES, TABLES + PAGE, RINGS, COMMANDS)
        )
        at += self.random.choice((self.random.randrange(32), self.random.randrange(0x6_0000))) & ~7
        value = self.random.choice(
            (0, TABLES | 1, TABLES | READ | WRITE | 1 | 3 << 9, TABLES | 7, NOWHERE | 7, self.random.randrange(1 << 64))
        )
        self.ram.poke(at, struct.pack("<Q", value))

    def upheaval(self) -> None:
        """Resets, memory that goes while everything is under way, time that passes; and all well again, most times."""
        match self.random.randrange(6):
            case 0:
                self.random.choice(self.functions).reset(self.random.choice(list(ResetKind)))
            case 1:
                for server in self.backend.servers:
                    self.backend.memory.unmap(server.function.name, Region(0, MEMORY, self.ram.hva))
                self.submit()
                self.commands()
                for server in self.backend.servers:
                    self.backend.memory.map(server.function.name, Region(0, MEMORY, self.ram.hva))
            case 2:
                self.backend.engine.expire()
            case 3:
                self.enable(self.random.choice(self.engines))
            case _:
                for function in self.functions:
                    function.reset(ResetKind.FLR)
                self.clean()
                self.start()

    def check(self) -> None:
        """What a guest can make grow."""
        context = self.backend.context
        assert len(self.iommu.domains.ioasids) <= 2 * len(self.backend.endpoints)
        assert context.get_info(self.backend.stage2).children <= 2 * len(self.backend.endpoints)
        for engine in self.engines:
            assert len(engine.tlb or ()) <= 8192


def life(chaos: Chaos) -> Iterator[None]:
    """Anything, step by step; then all is reset, and nothing of it is left."""
    acts = [chaos.submit] * 8 + [chaos.commands] * 5 + [chaos.answer] * 5 + [chaos.start] * 3
    acts += [chaos.anywhere, chaos.config, chaos.memory, chaos.memory, chaos.upheaval]
    for _ in range(6):
        chaos.start()
    for _ in range(STEPS):
        chaos.random.choice(acts)()
        chaos.check()
        yield
    for function in chaos.functions:
        function.reset(ResetKind.LOST_CONNECTION)
    yield
    context = chaos.backend.context
    assert (context.faults.waiting, len(chaos.iommu.domains.ioasids)) == (0, 0)
    assert context.get_info(chaos.backend.stage2).children == 0


@pytest.mark.parametrize("looped", [False, True], ids=["calls", "loop"])
@pytest.mark.parametrize("seed", range(8))
def test_anything_at_random(seed: int, looped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chaos = Chaos(seed, tmp_path)

    async def main() -> None:
        for _ in life(chaos):
            await asyncio.sleep(0)
            for function in chaos.functions:
                function.drained()  # raises what a callback of the loop has raised

    try:
        if looped:
            asyncio.run(main())
        else:
            for _ in life(chaos):
                pass
        assert "EBUSY" not in caplog.text  # nobody but the IOMMU routes these devices
    finally:
        chaos.close()
