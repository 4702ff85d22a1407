"""DMA: what is moved, what a fault in the middle leaves, and memory that goes away."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest
from amd_v1_reference import leaf
from core_guest import CHILD, DIRECT, PAGE, RID, STAGE2, Guest, Ram
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.core import (
    RW,
    Access,
    BadValueError,
    BufferGoneError,
    ClosedError,
    Core,
    Fault,
    Reason,
    SpaceCounters,
)

READ, WRITE = Access.READ, Access.WRITE
ORDER = random.Random(4).sample(range(8, 40), 32)
"""GPA page of each IOVA page."""


@pytest.fixture
def guest() -> Iterator[Guest]:
    """Thirty-two IOVA pages onto shuffled GPA pages; page 32 read-only, page 33 not mapped, 34 in ROM."""
    made = Guest(iotlb_entries=64, ram=64 * PAGE)
    made.map(0, 60 * PAGE)
    made.map(60 * PAGE, 4 * PAGE, 60 * PAGE, READ)
    made.bind(0, 1)
    for page, target in enumerate(ORDER):
        made.set_entry(8 * page, leaf(target * PAGE))
    made.set_entry(8 * 32, leaf(50 * PAGE, write=False))
    made.set_entry(8 * 34, leaf(61 * PAGE))
    yield made
    made.close()


def content(guest: Guest, iova: int, size: int) -> bytes:
    """What a device must see at `iova`, read from RAM page by page."""
    parts = []
    while size:
        part = min(size, PAGE - iova % PAGE)
        parts.append(guest.ram.read(ORDER[iova // PAGE] * PAGE + iova % PAGE, part))
        iova, size = iova + part, size - part
    return b"".join(parts)


@pytest.mark.parametrize(("iova", "size"), [(0, 1), (0, PAGE), (0xFFF, 2), (0x123, 5 * PAGE), (0, 32 * PAGE)])
def test_write_and_read(guest: Guest, iova: int, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert guest.core.dma_write(RID, iova, data) is None
    assert content(guest, iova, size) == data
    assert guest.core.dma_read(RID, iova, size) == data
    into = bytearray(size + 8)
    assert guest.core.dma_read_into(RID, iova, memoryview(into)[4:-4]) is None
    assert into == bytes(4) + data + bytes(4)


def test_buffers_of_every_kind(guest: Guest) -> None:
    with mmap.mmap(-1, 2 * PAGE) as area:
        area[:] = bytes(range(256)) * 32
        assert guest.core.dma_write(RID, 0x800, area) is None
        assert content(guest, 0x800, 2 * PAGE) == bytes(range(256)) * 32
        area[:] = bytes(2 * PAGE)
        assert guest.core.dma_read_into(RID, 0x800, memoryview(area)[PAGE:]) is None
        assert area[:PAGE] == bytes(PAGE)
        assert area[PAGE:] == bytes(range(256)) * 16
    words = memoryview(bytearray(16)).cast("I")
    words[1] = 0xAABBCCDD
    assert guest.core.dma_write(RID, 0, words) is None
    assert content(guest, 4, 4) == bytes.fromhex("ddccbbaa")
    with pytest.raises((TypeError, BufferError, ValueError)):
        guest.core.dma_read_into(RID, 0, b"read-only")  # type: ignore[arg-type, unused-ignore]


def test_zero_length(guest: Guest) -> None:
    """Nothing is translated, so nothing can be wrong with the address."""
    assert guest.core.dma_read(RID, 33 * PAGE, 0) == b""
    assert guest.core.dma_write(RID, (1 << 64) - 1, b"") is None
    assert guest.core.dma_scatter(RID, [(5, 0), (33 * PAGE, 0)], b"", write=True) is None
    assert guest.core.dma_scatter(RID, [], bytearray(), write=False) is None


def test_wrapping_request(guest: Guest) -> None:
    for answer in (
        guest.core.dma_read(RID, (1 << 64) - 4, 8),
        guest.core.dma_write(RID, (1 << 64) - 1, b"ab"),
        guest.core.dma_scatter(RID, [((1 << 64) - 1, 2)], b"ab", write=True),
    ):
        assert isinstance(answer, Fault)
        assert (answer.reason, answer.stage, answer.done) == (Reason.ADDRESS_WIDTH, 0, 0)
    answer = guest.core.dma_scatter(RID, [(0, 4), ((1 << 64) - 1, 2)], b"abcdef", write=True)
    assert isinstance(answer, Fault)
    assert (answer.iova, answer.done) == ((1 << 64) - 1, 4)


@pytest.mark.parametrize("iova", [1 << 64, (1 << 64) + 0x1000, 1 << 70])
def test_address_that_left_64_bits(guest: Guest, iova: int) -> None:
    """A device that adds to a guest's address gets a fault, not an exception."""
    for answer in (
        guest.core.dma_read(RID, iova, 8),
        guest.core.dma_write(RID, iova, b"ab"),
        guest.core.dma_scatter(RID, [(0, 1), (iova, 1)], b"ab", write=True),
        guest.core.store(RID, iova, 1, 8),
        guest.core.load(RID, iova, 8),
        guest.core.translate(RID, iova, READ),
    ):
        assert isinstance(answer, Fault)
        assert (answer.reason, answer.stage, answer.iova) == (Reason.ADDRESS_WIDTH, 0, iova)
    with pytest.raises(BadValueError):
        guest.core.dma_read(RID, -1, 8)
    with pytest.raises(BadValueError):
        guest.core.dma_scatter(RID, [(-1, 1)], b"a", write=True)


def test_fault_in_the_middle(guest: Guest) -> None:
    answer = guest.core.dma_write(RID, 30 * PAGE + 0x10, b"x" * (3 * PAGE))
    assert answer == Fault(
        rid=RID, pasid=None, ioasid=CHILD, iova=32 * PAGE, access=WRITE, stage=1, level=1, gpa=8 * 32,
        entry=leaf(50 * PAGE, write=False), reason=Reason.PERMISSION, done=2 * PAGE - 0x10,
    )  # fmt: skip
    assert content(guest, 30 * PAGE + 0x10, 2 * PAGE - 0x10) == b"x" * (2 * PAGE - 0x10)
    assert guest.ram.read(50 * PAGE, PAGE) == bytes(PAGE)
    answer = guest.core.dma_read_into(RID, 31 * PAGE, bytearray(3 * PAGE))
    assert isinstance(answer, Fault)
    assert (answer.iova, answer.reason, answer.done) == (33 * PAGE, Reason.NOT_PRESENT, 2 * PAGE)


def test_read_only_memory(guest: Guest) -> None:
    guest.ram.write(61 * PAGE, b"firmware")
    assert guest.core.dma_read(RID, 34 * PAGE, 8) == b"firmware"
    answer = guest.core.dma_write(RID, 34 * PAGE, b"evil")
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.gpa, answer.reason, answer.done) == (2, 61 * PAGE, Reason.PERMISSION, 0)
    assert isinstance(guest.core.store(DIRECT, 61 * PAGE, 1, 8), Fault)
    assert guest.ram.read(61 * PAGE, 8) == b"firmware"


@settings(deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 24 * PAGE), st.integers(0, 2 * PAGE)), max_size=6),
    seed=st.integers(0, 1000),
)
def test_scatter(shared: Guest, pieces: list[tuple[int, int]], seed: int) -> None:
    data = random.Random(seed).randbytes(sum(size for _, size in pieces))
    assert shared.core.dma_scatter(RID, pieces, data, write=True) is None
    back = bytearray(len(data))
    assert shared.core.dma_scatter(RID, pieces, back, write=False) is None
    assert back == b"".join(content(shared, iova, size) for iova, size in pieces)
    if pieces and pieces[-1][1]:
        iova, size = pieces[-1]
        assert content(shared, iova, size) == data[len(data) - size :], "pieces are moved in order"


@pytest.fixture(scope="module")
def shared() -> Iterator[Guest]:
    made = Guest(iotlb_entries=64, ram=64 * PAGE)
    made.map(0, 60 * PAGE)
    made.bind(0, 1)
    for page, target in enumerate(ORDER):
        made.set_entry(8 * page, leaf(target * PAGE))
    yield made
    made.close()


def test_scatter_fault_counts_all_pieces(guest: Guest) -> None:
    answer = guest.core.dma_scatter(RID, [(0, 100), (PAGE, 50), (33 * PAGE, 10), (0, 5)], bytes(165), write=True)
    assert isinstance(answer, Fault)
    assert (answer.iova, answer.done) == (33 * PAGE, 150)


def test_scatter_lengths_must_agree(guest: Guest) -> None:
    with pytest.raises(BadValueError):
        guest.core.dma_scatter(RID, [(0, 4)], b"12345", write=True)
    with pytest.raises(BadValueError):
        guest.core.dma_scatter(RID, [(0, 8), (0, -3)], b"12345", write=True)
    with pytest.raises(BadValueError):
        guest.core.dma_read(RID, 0, -1)
    with pytest.raises(BadValueError):
        guest.core.dma_read(RID, 0, 1 << 40)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_store_and_load(guest: Guest, width: int) -> None:
    value = int.from_bytes(bytes(range(0xF1, 0xF1 + width)), "little")
    at = 2 * PAGE + 0x40
    assert guest.core.store(RID, at, value, width) is None
    assert content(guest, at, 8) == value.to_bytes(width, "little") + bytes(8 - width)
    assert guest.core.load(RID, at, width) == value
    last = 3 * PAGE - width
    assert guest.core.store(RID, last, value, width) is None
    assert content(guest, last, width) == value.to_bytes(width, "little")
    for off in range(1, width):
        answer = guest.core.store(RID, at + off, 0, width)
        assert isinstance(answer, Fault)
        assert (answer.reason, answer.stage, answer.done) == (Reason.MISALIGNED, 0, 0)
        assert isinstance(guest.core.load(RID, at + off, width), Fault)
    with pytest.raises(BadValueError):
        guest.core.store(RID, at, 1 << 8 * width, width)
    with pytest.raises(BadValueError):
        guest.core.store(RID, at, -1, width)
    assert guest.core.load(RID, at, width) == value


@pytest.mark.parametrize("width", [0, 3, 16])
def test_widths_that_are_none(guest: Guest, width: int) -> None:
    with pytest.raises(BadValueError):
        guest.core.store(RID, 0, 0, width)
    with pytest.raises(BadValueError):
        guest.core.load(RID, 0, width)


def test_space_counters(guest: Guest) -> None:
    core = guest.core
    before = core.space_counters(CHILD)
    assert before == SpaceCounters(requests=0, bytes=0, faults=0, moved=0, iotlb_hits=0, iotlb_misses=0)
    core.dma_write(RID, 0, bytes(2 * PAGE))
    core.dma_read(RID, 0, 2 * PAGE)
    core.dma_read(RID, 33 * PAGE, 1)
    assert core.space_counters(CHILD) == SpaceCounters(
        requests=3, bytes=4 * PAGE, faults=1, moved=2, iotlb_hits=2, iotlb_misses=2
    )
    core.dma_read(DIRECT, 0, 16)
    assert core.space_counters(STAGE2).moved == 0
    total = core.counters()
    assert (total.requests, total.bytes, total.faults) == (4, 4 * PAGE + 16, 1)


# Memory that goes away


def memfd_core(pages: int) -> tuple[Core, Ram]:
    ram = Ram(pages * PAGE, memfd=True)
    core = Core(iotlb_entries=64)
    core.create_host_space(STAGE2)
    core.map(STAGE2, 0, ram.hva, pages * PAGE, RW)
    core.attach(DIRECT, None, STAGE2)
    return core, ram


@pytest.mark.parametrize("write", [False, True])
def test_truncated_memfd(write: bool) -> None:
    """Half of the memory is gone under a mapping that stays: a fault with what was moved, and the process lives."""
    core, ram = memfd_core(16)
    os.ftruncate(ram.fd, 8 * PAGE)

    def move(iova: int, size: int) -> object:
        if write:
            return core.dma_write(DIRECT, iova, b"x" * size)
        return core.dma_read_into(DIRECT, iova, bytearray(size))

    for _ in range(3):
        assert move(0, 8 * PAGE) is None
        answer = move(5 * PAGE + 0x100, 6 * PAGE)
        assert isinstance(answer, Fault)
        assert (answer.reason, answer.stage, answer.gpa) == (Reason.MEMORY_GONE, 2, 8 * PAGE)
        assert (answer.iova, answer.done, answer.ioasid) == (8 * PAGE, 3 * PAGE - 0x100, STAGE2)
    for single in (core.store(DIRECT, 9 * PAGE, 1, 8), core.load(DIRECT, 9 * PAGE, 4)):
        assert isinstance(single, Fault)
        assert (single.reason, single.gpa, single.done) == (Reason.MEMORY_GONE, 9 * PAGE, 0)
    os.ftruncate(ram.fd, 16 * PAGE)
    assert move(0, 16 * PAGE) is None
    core.close()
    ram.close()


def test_table_in_truncated_memory() -> None:
    core, ram = memfd_core(4)
    core.create_nested_space(CHILD, STAGE2)
    core.bind_table(CHILD, fmt="amd-v1", root=3 * PAGE, levels=3)
    core.attach(RID, None, CHILD)
    os.ftruncate(ram.fd, 2 * PAGE)
    answer = core.dma_read(RID, 5 << 30, 4)
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.stage, answer.level, answer.gpa) == (Reason.MEMORY_GONE, 1, 3, 3 * PAGE + 40)
    assert isinstance(core.translate(RID, 0, READ), Fault)
    core.close()
    ram.close()


def test_memory_that_may_not_be_touched() -> None:
    """No access to the pages any more, as after munmap (SIGSEGV, not SIGBUS); the addresses stay reserved."""
    core, ram = memfd_core(16)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(ram.hva + 8 * PAGE, 8 * PAGE, 0) == 0
    for _ in range(2):
        answer = core.dma_read(DIRECT, 6 * PAGE, 4 * PAGE)
        assert isinstance(answer, Fault)
        assert (answer.reason, answer.gpa, answer.done) == (Reason.MEMORY_GONE, 8 * PAGE, 2 * PAGE)
    assert protect(ram.hva + 8 * PAGE, 8 * PAGE, mmap.PROT_READ) == 0
    assert core.dma_read(DIRECT, 8 * PAGE, 4) == bytes(4)
    refused = core.dma_write(DIRECT, 8 * PAGE, b"x")
    assert refused is not None
    assert refused.reason == Reason.MEMORY_GONE
    core.close()
    ram.close()


def test_own_buffer_that_goes_away() -> None:
    """A buffer that is a mapped file, truncated: the caller's trouble, told apart from the guest's."""
    core, ram = memfd_core(4)
    disk = Ram(4 * PAGE, memfd=True)
    os.ftruncate(disk.fd, PAGE)
    with pytest.raises(BufferGoneError):
        core.dma_write(DIRECT, 0, disk.map)
    with pytest.raises(BufferGoneError):
        core.dma_scatter(DIRECT, [(PAGE, 2 * PAGE), (0, 2 * PAGE)], disk.map, write=False)
    assert core.dma_write(DIRECT, 0, b"fine") is None
    core.close()
    ram.close()
    disk.close()


# Threads


def test_no_dma_after_unmap_has_returned() -> None:
    """Devices write without pause while a page's mapping moves: once unmap returned, its old memory is still."""
    ram = Ram(2 * PAGE)
    core = Core(iotlb_entries=64)
    core.create_host_space(STAGE2)
    core.create_nested_space(CHILD, STAGE2)
    tables = Ram(PAGE)
    core.map(STAGE2, 0, tables.hva, PAGE, RW)
    tables.write(0, leaf(PAGE).to_bytes(8, "little"))
    core.bind_table(CHILD, fmt="amd-v1", root=0, levels=1)
    core.attach(RID, None, CHILD)
    core.attach(DIRECT, None, STAGE2)
    stop = threading.Event()
    wrong: list[Fault] = []

    def device(rid: int, iova: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            answer = core.dma_write(rid, iova, number.to_bytes(8, "little") * 512)
            if answer is not None and answer.reason != Reason.NOT_PRESENT:
                wrong.append(answer)

    threads = [threading.Thread(target=device, args=args) for args in ((RID, 0), (DIRECT, PAGE))]
    for thread in threads:
        thread.start()
    try:
        moved = 0
        for turn in range(300):
            here = turn % 2 * PAGE
            core.map(STAGE2, PAGE, ram.hva + here, PAGE, RW)
            before = ram.read(here, 8)
            deadline = time.monotonic() + 5
            while turn % 10 == 0 and ram.read(here, 8) == before and time.monotonic() < deadline:
                time.sleep(0.0002)  # let the devices in
            core.unmap(STAGE2, PAGE, PAGE)
            still = ram.read(here, PAGE)
            moved += still[:8] != before
            for _ in range(20):
                assert ram.read(here, PAGE) == still
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert moved, "no device ever wrote: the test saw nothing"
    core.close()
    ram.close()
    tables.close()


def test_threads_each_get_their_own_fault() -> None:
    core = Core()
    core.create_host_space(STAGE2)
    wrong: list[Fault | bytes] = []

    def device(rid: int) -> None:
        for step in range(500):
            answer = core.dma_read(rid, step * PAGE, 8)
            if not isinstance(answer, Fault) or (answer.rid, answer.iova) != (rid, step * PAGE):
                wrong.append(answer)

    for rid in range(4):
        core.attach(rid, None, STAGE2)
    threads = [threading.Thread(target=device, args=(rid,)) for rid in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert core.counters().faults == 2000
    core.close()


def test_close_while_a_request_is_under_way() -> None:
    ram = Ram(64 * PAGE)
    core = Core()
    core.create_host_space(STAGE2)
    core.map(STAGE2, 0, ram.hva, 64 * PAGE, RW)
    core.attach(DIRECT, None, STAGE2)
    ended = threading.Event()

    def device() -> None:
        with contextlib.suppress(ClosedError):
            while True:
                core.dma_write(DIRECT, 0, bytes(64 * PAGE))
        ended.set()

    thread = threading.Thread(target=device)
    thread.start()
    core.close()
    thread.join(10)
    assert ended.is_set()
    ram.close()
