"""A guest that does anything: registers, descriptors, page tables and answers at random; and what must hold."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Iterator

import pytest
from dma_driver import PRI_ALLOCATION, PRI_CONTROL, Ring
from dma_header import VDMA, group
from dma_process import PASID, PRESENT, PRI, USER, WRITABLE, Kernel
from guest_ram import PAGE
from paged_host import IOVA_BASE

from backend.ioasid import Code, FaultRecord, IoasidError

MASK64 = (1 << 64) - 1
STEPS = 400
NOWHERE = (1 << 32, 1 << 47, (1 << 63) + 5, MASK64 - 4095, MASK64)
EDGES = (0, 1, 3, 31, 4095, 4096, (1 << 32) - 1, 1 << 32, (1 << 63) + 5, MASK64 - 4095, MASK64)
QUEUES = 3


class Chaos:
    """One guest with three queues and two processes. All is drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kernel = Kernel(queues=QUEUES, memory=4 << 20, allocation=self.random.choice((1, 2, 32, 512)))
        self.processes = [self.kernel.process(pasid) for pasid in (1, 2)]
        self.areas = [[process.mmap(8) for _ in range(3)] for process in self.processes]
        self.rings = [Ring(self.kernel, number, 4) for number in range(QUEUES)]
        self.unanswered: list[list[FaultRecord]] = []
        self.buffers = [self._fenced() for _ in range(3)]

    def _fenced(self) -> int:
        """Pages for jobs without a PASID, and one that is not there: the tables behind them must not be written."""
        start = self.kernel.allocate(14)
        self.kernel.unmap(start + 13 * PAGE)
        return start

    def address(self) -> int:
        draw = self.random.random()
        if draw < 0.15:
            return self.random.choice(NOWHERE)
        place = self.random.choice(self.buffers if draw < 0.4 else self.random.choice(self.areas))
        return place + self.random.choice((0, 0, 32, 8, 4096, 4095, self.random.randrange(8 * PAGE)))

    def length(self) -> int:
        return self.random.choice((4, 8, 16, self.random.randrange(1, 5 * PAGE), self.random.choice(EDGES)))

    def descriptor(self) -> bytes:
        draw = self.random
        if draw.random() < 0.1:
            return draw.randbytes(64)
        flags = draw.randrange(0x80) if draw.random() < 0.95 else draw.randrange(1 << 16)
        record = self.address()
        if draw.random() < 0.9:  # most records are good ones: a bad one ends all jobs of its queue
            record, flags = self.buffers[2] + 32 * draw.randrange(64), flags & ~VDMA["FLAG_COMPLETION_PASID"]
        words = [record, self.address(), self.address()]
        words += [self.length(), draw.choice(EDGES), draw.choice(EDGES), draw.choice(EDGES)]
        return struct.pack("<BBHI7Q", draw.randrange(10), 0, flags, draw.randrange(1 << 32), *words)

    def submit(self) -> None:
        ring = self.random.choice(self.rings)
        for _ in range(self.random.randrange(1, 10)):
            ring.put(self.descriptor())
        ring.doorbell(None if self.random.random() < 0.95 else self.random.randrange(1 << 32))

    def start(self) -> None:
        ring = self.random.choice(self.rings)
        ring.set("COMMAND", VDMA["COMMAND_ABORT"])
        ring.start(self.random.choice((4, 5, 5, 1, 7, 3)), pasid=self.random.choice((1, 2, 2, 3, 1 << 16)))

    def command(self) -> None:
        self.random.choice(self.rings).set("COMMAND", self.random.choice((1, 2, 3, 9)))

    def anywhere(self) -> None:
        """Any register, any width."""
        size = self.random.choice((1, 2, 4, 8))
        offset = self.random.choice(
            (self.random.randrange(0x1000), VDMA["DOORBELL_BASE"] + self.random.randrange(0x3000))
        )
        offset = min(offset, 0x20000 - size)
        self.kernel.get(offset, size)
        self.kernel.put(
            offset, self.random.choice((*EDGES, self.random.randrange(1 << 64))) & (1 << 8 * size) - 1, size
        )

    def pages(self) -> None:
        """Change a page table, with or without telling."""
        index = self.random.randrange(2)
        process, area = self.processes[index], self.random.choice(self.areas[index]) + self.random.randrange(8) * PAGE
        process.set(
            area, self.random.choice((0, 0, self.kernel.table | PRESENT | USER, self.random.randrange(1 << 64)))
        )
        page = self.random.choice(self.buffers) - IOVA_BASE
        if self.random.random() < 0.5:
            process.set(area, page | PRESENT | USER | self.random.choice((0, WRITABLE)))
        if self.random.random() < 0.8:
            process.forget(area)

    def answer(self) -> None:
        self.unanswered += self.kernel.requests()
        self.random.shuffle(self.unanswered)
        for _ in range(self.random.randrange(4)):
            if self.unanswered:
                group = self.unanswered.pop()
                for record in group:
                    if self.random.random() < 0.7:
                        assert record.pasid is not None
                        process = self.kernel.processes.get(record.pasid)
                        page = self.random.choice(self.buffers) - IOVA_BASE
                        if process is not None:
                            process.set(record.iova, page | PRESENT | USER | WRITABLE)
                self.reply(group, self.random.choice((*[Code.SUCCESS] * 6, Code.INVALID, Code.INVALID, Code.FAILURE)))

    def reply(self, group: list[FaultRecord], code: Code) -> None:
        try:
            self.kernel.answer(group, code)
        except IoasidError:
            assert code  # it was answered for the guest: a process had gone

    def settings(self) -> None:
        """Capabilities and the command register."""
        config, kernel = self.kernel.function.config, self.kernel
        self.normal()
        match self.random.randrange(8):
            case 0:
                kernel.set_bus_master(self.random.random() < 0.8)
            case 1:
                kernel.set_ats(self.random.random() < 0.8)
            case 2:
                config.write(kernel.extended(PRI) + PRI_CONTROL, 2, self.random.choice((0, 1, 1, 2, 3)))
            case 3:
                config.write(kernel.extended(PRI) + PRI_ALLOCATION, 4, self.random.choice((0, 1, 8, 512, 0xFFFF_FFFF)))
            case 4:
                config.write(kernel.extended(PASID) + 6, 2, self.random.choice((0, 1, 1, 1)))
            case 5:
                config.write(kernel.capability(0x10) + 8, 2, 0x8000)
                self.normal()

    def normal(self) -> None:
        """As a guest sets it up."""
        config, kernel = self.kernel.function.config, self.kernel
        kernel.set_bus_master(True)
        config.write(kernel.extended(PASID) + 6, 2, 1)
        config.write(kernel.extended(PRI) + PRI_CONTROL, 2, 0)
        config.write(kernel.extended(PRI) + PRI_ALLOCATION, 4, 32)
        config.write(kernel.extended(PRI) + PRI_CONTROL, 2, 1)
        kernel.set_ats(True)

    def check(self) -> None:
        """What holds at every moment."""
        states = set(group("STATE_").values()) - {VDMA["STATE_MASK"]}
        for ring in self.rings:
            tail, head, completed = (ring.get(name) for name in ("TAIL", "HEAD", "COMPLETED"))
            assert ring.state in states
            assert (tail - head) & 0xFFFF_FFFF <= 1 << 12
            assert (head - completed) & 0xFFFF_FFFF <= 16
            assert ring.get("WAITING") <= 16
            if ring.state == VDMA["STATE_DISABLED"]:
                assert ring.get("WAITING") == 0


def life(chaos: Chaos) -> Iterator[None]:
    """Anything, step by step; then everything is stopped, and stays so."""
    kernel = chaos.kernel
    acts = [chaos.submit] * 6 + [chaos.answer] * 6 + [chaos.start] * 2
    acts += [chaos.command, chaos.anywhere, chaos.anywhere, chaos.pages, chaos.settings]
    for ring in chaos.rings:
        ring.start(5, pasid=1 + ring.number % 2)
    for _ in range(STEPS):
        chaos.random.choice(acts)()
        chaos.check()
        yield
    for ring in chaos.rings:
        ring.set("COMMAND", VDMA["COMMAND_ABORT"])
        assert ring.state == VDMA["STATE_DISABLED"]
    requests = kernel.device.port.counters.requests, kernel.device.port.translated.counters.requests
    for late in (*chaos.unanswered, *kernel.requests()):
        chaos.reply(late, Code.SUCCESS)
    yield
    assert (kernel.device.port.counters.requests, kernel.device.port.translated.counters.requests) == requests


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("looped", [False, True], ids=["calls", "loop"])
def test_anything_at_random(seed: int, looped: bool) -> None:
    chaos = Chaos(seed)
    kernel = chaos.kernel

    async def main() -> None:
        for _ in life(chaos):
            await asyncio.sleep(0)
            kernel.function.drained()  # raises what a callback of the loop has raised

    if looped:
        asyncio.run(main())
    else:
        for _ in life(chaos):
            pass
    kernel.put(VDMA["REG_RESET"], VDMA["RESET"])
    chaos.normal()
    ring, area = Ring(kernel, 0, 4), chaos.processes[0].mmap(4)
    ring.start(VDMA["CONTROL_UNTAGGED"] | VDMA["CONTROL_PASID"], pasid=1)
    where = ring.push("FILL", flags=VDMA["FLAG_TARGET_PASID"], target=area, length=4 * PAGE, value=seed)
    ring.doorbell()
    kernel.serve()
    assert kernel.record(where).status == VDMA["STATUS_SUCCESS"]
    assert chaos.processes[0].peek(area, 4 * PAGE) == struct.pack("<Q", seed) * (4 * PAGE // 8)
    kernel.close()
