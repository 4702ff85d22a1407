"""Nothing stale is used: once an invalidation, an unmap or a detach has returned, no device touches what it took away.

Threads move data without pause while others change translations. VIOASID_STALE_SECONDS=60 looks that long, each test.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
from amd_v1_reference import leaf, pointer
from core_guest import PAGE, STAGE2, Ram
from core_sanitizers import build, run

from backend.core import RW, Core, Fault, Reason

SECONDS = float(os.environ.get("VIOASID_STALE_SECONDS", "1.5"))


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_in_c(tmp_path: Path, sanitizers: str) -> None:
    """core_stale_driver.c: every kind of request against every way of taking a translation away."""
    driver = build(tmp_path, sanitizers, "core_stale_driver.c")
    changes, served = 0, 0
    for seed in (1, 3):  # an IOTLB of 64 entries, and one of a single set
        words = run(driver, str(seed), str(int(SECONDS * 500)), seconds=60 + SECONDS).split()
        changes, served = changes + int(words[0]), served + int(words[2])
    assert changes > 50 and served > 500, "too little happened to tell"


CANARY = b"\xc5" * 8
DEVICES, SLOTS, SPARE = 2, 4, 4
ROOT, TABLES = 0, PAGE
FIRST = 1 + DEVICES  # page of the first data page; before it the root and a leaf table of each device
PAGES = FIRST + DEVICES * SLOTS + SPARE
ALLOWED = {Reason.NOT_PRESENT, Reason.NO_ROUTE, Reason.BLOCKED, Reason.NOT_BOUND}


class Stage:
    """RAM, a space for each device, and a shadow of where each of its IOVA pages leads."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.ram = Ram(PAGES * PAGE)
        self.core = Core(iotlb_entries=16)
        self.core.create_host_space(STAGE2)
        for page in range(PAGES):
            self.core.map(STAGE2, page * PAGE, self.ram.hva + page * PAGE, PAGE, RW)
        pages = list(range(FIRST, PAGES))
        self.shadow = {(rid, slot): pages.pop() for rid in range(DEVICES) for slot in range(SLOTS)}
        self.retired = pages
        for page in pages:
            self.ram.write(page * PAGE, CANARY * 512)
        for (rid, slot), page in self.shadow.items():
            self.lead(rid, slot, page)
        for rid in range(DEVICES):
            self.ram.write(ROOT + 8 * rid, pointer(TABLES + rid * PAGE, 1).to_bytes(8, "little"))
            self.core.create_nested_space(self.space(rid), STAGE2)
            self.core.bind_table(self.space(rid), fmt="amd-v1", root=ROOT, levels=2)
            self.core.attach(rid, None, self.space(rid))

    @staticmethod
    def space(rid: int) -> int:
        return 10 + rid

    @staticmethod
    def iova(rid: int, slot: int) -> int:
        return rid << 21 | slot * PAGE

    def lead(self, rid: int, slot: int, page: int) -> None:
        self.ram.write(TABLES + rid * PAGE + 8 * slot, leaf(page * PAGE).to_bytes(8, "little"))

    def take(self) -> int:
        """A page that nothing leads to, still as it was retired, and now cleared for use."""
        page = self.retired.pop(self.chance.randrange(len(self.retired)))
        self.check(page)
        self.ram.write(page * PAGE, bytes(PAGE))
        return page

    def retire(self, page: int) -> None:
        self.ram.write(page * PAGE, CANARY * 512)
        self.retired.append(page)

    def check(self, page: int) -> None:
        assert self.ram.read(page * PAGE, PAGE) == CANARY * 512, f"page {page} was written after it had been taken away"

    def change(self) -> None:
        (rid, slot), core, space = self.chance.choice(list(self.shadow)), self.core, 0
        old, space = self.shadow[rid, slot], self.space(rid)
        kind = self.chance.randrange(8)
        if kind < 5:  # the guest leads the page elsewhere, and invalidates
            new = self.take()
            self.lead(rid, slot, new)
            invalidations = (
                lambda: core.invalidate(space, self.iova(rid, slot), PAGE),
                lambda: core.invalidate(space, 0, 1 << 40),
                lambda: core.invalidate(space),
                lambda: core.invalidate_device(rid),
                core.invalidate_all,
            )
            invalidations[kind]()
            self.shadow[rid, slot] = new
            self.retire(old)
        elif kind == 5:  # the host takes the page away for a while
            core.unmap(STAGE2, old * PAGE, PAGE)
            self.ram.write(old * PAGE, CANARY * 512)
            self.check(old)
            self.ram.write(old * PAGE, bytes(PAGE))
            core.map(STAGE2, old * PAGE, self.ram.hva + old * PAGE, PAGE, RW)
        else:  # the device is cut off
            if kind == 6:
                core.detach(rid, None)
            else:
                core.unbind_table(space)
            pages = [self.shadow[rid, slot] for slot in range(SLOTS)]
            before = [self.ram.read(page * PAGE, PAGE) for page in pages]
            assert before == [self.ram.read(page * PAGE, PAGE) for page in pages], (
                "written by a device that was cut off"
            )
            if kind == 6:
                core.attach(rid, None, space)
            else:
                core.bind_table(space, fmt="amd-v1", root=ROOT, levels=2)


def device(stage: Stage, rid: int, stop: threading.Event, wrong: list[str]) -> None:
    """Move data in every way until told to stop; what it reads, it or another such device wrote, or nobody."""
    chance, core, span, end = random.Random(rid), stage.core, SLOTS * PAGE, stage.iova(rid, SLOTS)
    while not stop.is_set():
        at, size = stage.iova(rid, 0) + chance.randrange(0, span, 16), 8 * chance.randrange(1, 900)
        size = min(size, end - at)
        answers = (
            core.dma_write(rid, at, bytes([rid + 1]) * size),
            core.dma_read(rid, at, size),
            core.dma_fill(rid, at, size, rid + 1, 8),
            core.dma_copy(rid, at, stage.iova(rid, 0), size),
            core.store(rid, at, rid, 8),
            core.load(rid, at, 8),
            core.fetch_add(rid, at, 1, 8),
            core.compare_exchange(rid, at, 0, 1, 16),
        )
        for answer in answers:
            if isinstance(answer, Fault):
                if answer.reason not in ALLOWED:
                    wrong.append(str(answer))
            elif CANARY in (answer if isinstance(answer, bytes) else (answer or 0).to_bytes(16, "little")):
                wrong.append(f"device {rid} read what had been taken away from it")


def test_in_python() -> None:
    """The same by the Python API, against a shadow of where every page leads."""
    stage, stop, wrong = Stage(1), threading.Event(), list[str]()
    threads = [threading.Thread(target=device, args=(stage, rid, stop, wrong)) for rid in range(DEVICES)]
    for thread in threads:
        thread.start()
    until, changes = time.monotonic() + SECONDS, 0
    try:
        while time.monotonic() < until and not wrong:
            stage.change()
            changes += 1
            if changes % 8 == 0:
                time.sleep(0.0005)  # let the devices in
        for page in stage.retired:
            stage.check(page)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    counters = stage.core.counters()
    assert changes > 20 and counters.bytes > 1000 and counters.iotlb_hits, "too little happened to tell"
    stage.core.close()
    stage.ram.close()
