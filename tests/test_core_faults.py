"""The ring of faults: what is in it, in order, and what it drops."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from core_guest import DIRECT, PAGE, RID, Guest

from backend.core import Access, Fault, Reason

RING = 1024


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(ram=4 * PAGE)
    made.map(0, 4 * PAGE)
    yield made
    made.close()


def test_every_kind_of_request_leaves_its_fault(guest: Guest) -> None:
    core, gone = guest.core, 9 * PAGE
    answers = [
        core.translate(DIRECT, gone, Access.READ),
        core.dma_read(DIRECT, gone, 8),
        core.dma_write(DIRECT, 4 * PAGE - 4, b"12345678"),
        core.dma_scatter(DIRECT, [(0, 4), (gone, 4)], b"12345678", write=True),
        core.dma_fill(DIRECT, gone, 8),
        core.dma_copy(DIRECT, 0, gone, 8),
        core.store(DIRECT, 1, 0, 8),
        core.load(DIRECT, gone, 8),
        core.fetch_add(DIRECT, gone, 1, 8),
        core.swap(DIRECT, gone, 1, 8),
        core.compare_exchange(DIRECT, gone, 1, 2, 16),
        core.dma_read(RID, 0, 8),
        core.dma_read(0x7777, 0, 8, pasid=4),
    ]
    assert core.dma_read(DIRECT, 64, 8) == bytes(8)
    assert all(isinstance(answer, Fault) for answer in answers)
    assert core.faults() == answers
    assert core.faults() == []
    assert core.counters().faults_dropped == 0


def test_the_ring_keeps_the_first_and_counts_the_rest(guest: Guest) -> None:
    core = guest.core
    for turn in range(3):
        first = 1000 * turn
        for number in range(first, first + RING + 7):
            core.load(DIRECT, (16 + number) * PAGE, 8)
        found = core.faults()
        assert [fault.iova // PAGE - 16 for fault in found] == list(range(first, first + RING))
        assert core.counters().faults_dropped == 7 * (turn + 1)
    core.load(DIRECT, 99 * PAGE, 8)
    assert [fault.iova for fault in core.faults()] == [99 * PAGE]


def test_read_while_threads_fault(guest: Guest) -> None:
    core, each, threads = guest.core, 3000, 3

    def device(number: int) -> None:
        for step in range(each):
            core.load(DIRECT, (16 + step) * PAGE + 8 * number, 8)

    devices = [threading.Thread(target=device, args=(number,)) for number in range(threads)]
    for thread in devices:
        thread.start()
    found: list[Fault] = []
    while any(thread.is_alive() for thread in devices):
        found += core.faults()
    found += core.faults()
    assert len(found) + core.counters().faults_dropped == each * threads
    for number in range(threads):
        own = [fault.iova for fault in found if fault.iova % PAGE == 8 * number]
        assert own == sorted(set(own)), "once each, in the order of the device's requests"


def test_every_reason_explains_itself() -> None:
    texts = [reason.explain for reason in Reason]
    assert len(set(texts)) == len(texts)
    assert all(text.endswith(".") and len(text) > 10 for text in texts)
    assert Reason(Reason.BLOCKED.value) is Reason.BLOCKED
