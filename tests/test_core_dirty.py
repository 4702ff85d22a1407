"""Dirty tracking: which pages DMA wrote, against a set of page numbers kept by the test; and a live copy of a guest."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from core_guest import CHILD, DIRECT, PAGE, RID, STAGE2, Guest, Ram

from backend.core import (
    RW,
    Access,
    BadValueError,
    Core,
    Fault,
    KindError,
    LimitError,
    OverlapError,
    Reason,
    UnknownIdError,
    UntrackedError,
)

MIB2 = 2 << 20
CHUNK = 128 << 20
"""What one page of bits stands for."""


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(ram=2 * MIB2, iotlb_entries=64, align=MIB2)
    yield made
    made.close()


def pages(bitmap: bytes) -> set[int]:
    """The numbers of the bits that are set."""
    return {i for i in range(8 * len(bitmap)) if bitmap[i // 8] >> i % 8 & 1}


def dirty(core: Core, size: int, *, at: int = 0, page_size: int = PAGE, clear: bool = True) -> set[int]:
    return pages(core.read_dirty(STAGE2, at, size, page_size, clear=clear))


def test_a_page_of_a_large_leaf_is_dirty_alone(guest: Guest) -> None:
    guest.map(0, 2 * MIB2)
    core = guest.core
    core.set_dirty_tracking(STAGE2, True)
    assert dirty(core, 2 * MIB2) == set()
    assert core.dma_read(DIRECT, 0, MIB2) == bytes(MIB2)
    assert dirty(core, 2 * MIB2) == set(), "reads leave no mark"
    core.dma_write(DIRECT, 5 * PAGE + 4095, b"ab")
    core.dma_scatter(DIRECT, [(9 * PAGE, 1), (600 * PAGE + 1, 2 * PAGE)], bytes(2 * PAGE + 1), write=True)
    core.store(DIRECT, 1023 * PAGE + 8, 1, 8)
    assert dirty(core, 2 * MIB2, clear=False) == {5, 6, 9, 600, 601, 602, 1023}
    assert dirty(core, 2 * MIB2, page_size=4 * PAGE, clear=False) == {1, 2, 150, 255}
    assert dirty(core, 2 * MIB2, page_size=MIB2, clear=False) == {0, 1}
    assert dirty(core, 7 * PAGE, at=3 * PAGE) == {2, 3, 6}
    assert dirty(core, 2 * MIB2) == {600, 601, 602, 1023}
    assert dirty(core, 2 * MIB2) == set()


def test_writes_by_the_iotlb_are_seen_after_each_clear(guest: Guest) -> None:
    guest.map(0, MIB2)
    core = guest.core
    core.dma_write(DIRECT, 0, b"x")
    core.set_dirty_tracking(STAGE2, True)
    hits = core.space_counters(STAGE2).iotlb_hits
    for turn in range(5):
        core.dma_write(DIRECT, turn * PAGE, b"x")
        assert dirty(core, MIB2) == {turn}
    assert core.space_counters(STAGE2).iotlb_hits == hits + 5


def test_writes_of_a_nested_space_count_for_the_pages_of_its_parent(guest: Guest) -> None:
    guest.map(0, 64 * PAGE)
    core = guest.core
    guest.lay(0x7000, [8 * PAGE], [1 | 3 << 61 | 20 * PAGE])
    guest.bind(8 * PAGE, 1)
    core.set_dirty_tracking(STAGE2, True)
    for _ in range(2):
        assert core.dma_write(RID, 0x7123, b"nested") is None
        assert dirty(core, 64 * PAGE) == {20}
    assert core.dma_read(RID, 0x7123, 6) == b"nested"
    assert dirty(core, 64 * PAGE) == set()
    guest.bind(8 * PAGE, 1, accessed=True, dirty=True)
    assert core.dma_read(RID, 0x7123, 6) == b"nested"
    assert dirty(core, 64 * PAGE) == {8}, "the accessed bit is written to the guest's table"
    assert core.dma_write(RID, 0x7123, b"again") is None
    assert dirty(core, 64 * PAGE) == {8, 20}
    assert core.dma_write(RID, 0x7123, b"again") is None
    assert dirty(core, 64 * PAGE) == {20}, "its bits are set already"


def test_what_is_mapped_later_is_tracked_and_what_is_unmapped_stays_dirty(guest: Guest) -> None:
    core, ram = guest.core, guest.ram.hva
    core.map(STAGE2, 0, ram, PAGE, RW)
    before = core.counters().table_pages
    core.set_dirty_tracking(STAGE2, True)
    core.map(STAGE2, 5 * CHUNK, ram, 8 * PAGE, RW)
    core.dma_write(DIRECT, 5 * CHUNK + 3 * PAGE, b"x")
    core.unmap(STAGE2, 5 * CHUNK, 8 * PAGE)
    assert dirty(core, 6 * CHUNK) == {5 * CHUNK // PAGE + 3}
    assert core.counters().table_pages == before + 1, "bits of what is neither mapped nor dirty are given back"
    core.unmap(STAGE2, 0, PAGE)
    core.set_dirty_tracking(STAGE2, False)
    assert core.counters().table_pages == 1


def test_bits_cost_one_page_for_128_mib(guest: Guest) -> None:
    core = guest.core
    core.map(STAGE2, 0, 1 << 40, 1 << 30, RW)
    before = core.counters().table_pages
    core.set_dirty_tracking(STAGE2, True)
    assert core.counters().table_pages == before + 8
    core.map(STAGE2, 1 << 40, 1 << 40, 1 << 30, RW)
    core.set_dirty_tracking(STAGE2, True)
    assert core.counters().table_pages == before + 16 + 1, "one more table, too"
    core.set_dirty_tracking(STAGE2, False)
    assert core.counters().table_pages == before + 1


def test_a_map_that_cannot_be_takes_no_bits(guest: Guest) -> None:
    core = guest.core
    core.map(STAGE2, 1 << 46, 1 << 20, PAGE, RW)
    core.set_dirty_tracking(STAGE2, True)
    before = core.counters().table_pages
    with pytest.raises(OverlapError):
        core.map(STAGE2, 1 << 45, PAGE, (1 << 46) - PAGE, RW)
    with pytest.raises(BadValueError):
        core.map(STAGE2, (1 << 48) - PAGE, PAGE, (1 << 46) - PAGE, RW)
    with pytest.raises(LimitError):  # bits for 70 TiB would be more than all tables may take
        core.map(STAGE2, 1 << 47, PAGE, (1 << 46) - PAGE, RW)
    assert core.counters().table_pages == before


def test_off_forgets(guest: Guest) -> None:
    guest.map(0, MIB2)
    core = guest.core
    core.set_dirty_tracking(STAGE2, True)
    core.dma_write(DIRECT, 0, b"x")
    core.set_dirty_tracking(STAGE2, True)
    assert dirty(core, MIB2, clear=False) == {0}
    core.set_dirty_tracking(STAGE2, False)
    core.set_dirty_tracking(STAGE2, False)
    core.set_dirty_tracking(STAGE2, True)
    assert dirty(core, MIB2) == set()


def test_memory_that_goes_away_under_a_write() -> None:
    guest = Guest(iotlb_entries=64)
    try:
        ram = Ram(8 * PAGE, memfd=True)
        guest.core.map(STAGE2, 0, ram.hva, 8 * PAGE, RW)
        guest.core.set_dirty_tracking(STAGE2, True)
        os.ftruncate(ram.fd, 4 * PAGE)
        answer = guest.core.dma_write(DIRECT, 0, bytes(8 * PAGE))
        assert isinstance(answer, Fault)
        assert (answer.reason, answer.done) == (Reason.MEMORY_GONE, 4 * PAGE)
        assert dirty(guest.core, 8 * PAGE) >= {0, 1, 2, 3}
        ram.close()
    finally:
        guest.close()


def test_errors_tell_what_was_wrong(guest: Guest) -> None:
    core = guest.core
    guest.map(0, MIB2)
    with pytest.raises(UntrackedError, match="switch that on first"):
        core.read_dirty(STAGE2, 0, PAGE)
    with pytest.raises(KindError):
        core.set_dirty_tracking(CHILD, True)
    with pytest.raises(KindError):
        core.read_dirty(CHILD, 0, PAGE)
    with pytest.raises(UnknownIdError):
        core.set_dirty_tracking(77, True)
    core.set_dirty_tracking(STAGE2, True)
    for iova, size, page_size in (
        (0, 0, PAGE), (1, PAGE, PAGE), (0, PAGE + 1, PAGE), (0, PAGE, 2 * PAGE), (PAGE, 2 * PAGE, 2 * PAGE),
        (0, PAGE, 2048), (0, 3 * PAGE, 3 * PAGE), (0, 1 << 63, PAGE), (1 << 63, 1 << 64, 1 << 62), (0, -PAGE, PAGE),
    ):  # fmt: skip
        with pytest.raises(BadValueError):
            core.read_dirty(STAGE2, iova, size, page_size)
    assert core.read_dirty(STAGE2, 0, 1 << 48, 1 << 47) == b"\0"


@pytest.mark.parametrize("seed", range(4))
def test_random_writes_against_a_set(seed: int) -> None:
    """Two pieces of memory far apart, straddling a boundary of 128 MiB, written from both spaces."""
    chance = random.Random(seed)
    guest = Guest(ram=256 * PAGE, iotlb_entries=16)
    base = CHUNK - 128 * PAGE
    try:
        guest.map(base, 256 * PAGE)
        core, expected = guest.core, set[int]()
        core.set_dirty_tracking(STAGE2, True)
        for _ in range(600):
            if chance.random() < 0.7:
                offset = chance.randrange(256 * PAGE)
                size = min(chance.choice((1, 8, PAGE, 70 * PAGE)), 256 * PAGE - offset)
                assert core.dma_write(DIRECT, base + offset, bytes(size)) is None
                expected |= set(range(offset // PAGE, (offset + size - 1) // PAGE + 1))
                continue
            page_size = PAGE << chance.choice((0, 0, 1, 3, 6))
            first = chance.randrange(0, 256 * PAGE, page_size)
            size = chance.randrange(page_size, 256 * PAGE - first + 1, page_size)
            clear = chance.random() < 0.6
            within = {page for page in expected if first <= page * PAGE < first + size}
            found = dirty(core, size, at=base + first, page_size=page_size, clear=clear)
            assert found == {(page * PAGE - first) // page_size for page in within}
            if clear:
                expected -= within
    finally:
        guest.close()


def test_a_live_copy_loses_no_write() -> None:
    """As live migration does: copy what is dirty while devices write, and the rest when they stopped."""
    count, devices = 256, 3
    guest = Guest(ram=count * PAGE, iotlb_entries=64)
    core = guest.core
    try:
        guest.map(0, count * PAGE)
        guest.lay(0, [0], [1 | 3 << 61])
        for page in range(count):
            guest.set_entry(8 * page, 1 | 3 << 61 | page * PAGE)
        guest.bind(0, 1)
        core.set_dirty_tracking(STAGE2, True)
        copy = bytearray(guest.ram.read(0, count * PAGE))
        stop = threading.Event()
        faults: list[object] = []

        def device(rid: int, seed: int) -> None:
            chance, serial = random.Random(seed), 0
            while not stop.is_set():
                serial += 1
                at = chance.randrange(1, count - 3) * PAGE + chance.randrange(0, PAGE, 8)
                faults.append(core.dma_write(rid, at, struct.pack("<Q", serial) * chance.choice((1, 2, 900))))
                faults.append(core.store(rid, at, serial, 8))

        def take() -> int:
            found = dirty(core, count * PAGE)
            for page in found:
                copy[page * PAGE : (page + 1) * PAGE] = guest.ram.read(page * PAGE, PAGE)
            return len(found)

        threads = [threading.Thread(target=device, args=((RID, DIRECT)[i % 2], i)) for i in range(devices)]
        for thread in threads:
            thread.start()
        rounds, deadline = 0, time.monotonic() + 10
        while rounds < 50 and time.monotonic() < deadline:
            rounds += take() > 0
        stop.set()
        for thread in threads:
            thread.join()
        take()
        assert not any(faults)
        assert rounds > 10, "the devices wrote while the copy was made"
        assert bytes(copy) == guest.ram.read(0, count * PAGE)
        assert take() == 0
    finally:
        guest.close()


def test_protect_splits_and_is_obeyed_at_once(guest: Guest) -> None:
    guest.map(0, 2 * MIB2)
    core = guest.core
    assert core.dma_write(DIRECT, 7 * PAGE, b"x") is None
    core.protect(STAGE2, 7 * PAGE, MIB2, Access.READ)
    answer = core.dma_write(DIRECT, 7 * PAGE, b"y")
    assert isinstance(answer, Fault)
    assert answer.reason == Reason.PERMISSION
