"""Fill and copy: what is written, where ranges overlap, and what a fault in the middle leaves."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from amd_v1_reference import leaf
from core_guest import CHILD, DIRECT, PAGE, RID, STAGE2, Guest, Ram
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.core import RW, Access, BadValueError, Core, Fault, Reason

READ, WRITE = Access.READ, Access.WRITE
PAGES = 24
ORDER = random.Random(5).sample(range(8, 60), PAGES)
"""GPA page of each IOVA page; IOVA page 24 is read-only, 25 is nowhere."""
OTHER, OTHER_RID, PASID = 5, 0x0118, 0xFFFFF


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    made = Guest(iotlb_entries=64, ram=64 * PAGE)
    made.map(0, 64 * PAGE)
    made.bind(0, 1)
    for page, target in enumerate(ORDER):
        made.set_entry(8 * page, leaf(target * PAGE))
    made.set_entry(8 * PAGES, leaf(62 * PAGE, write=False))
    made.core.create_nested_space(OTHER, STAGE2)
    made.core.bind_table(OTHER, fmt="amd-v1", root=0, levels=1)
    made.core.attach(OTHER_RID, PASID, OTHER)
    yield made
    made.close()


def memory(guest: Guest) -> bytearray:
    """All IOVA pages in a row, read from RAM."""
    return bytearray(b"".join(guest.ram.read(page * PAGE, PAGE) for page in ORDER))


def scramble(guest: Guest, seed: int) -> bytearray:
    chance = random.Random(seed)
    for page in ORDER:
        guest.ram.write(page * PAGE, chance.randbytes(PAGE))
    return memory(guest)


SPAN = PAGES * PAGE
PLACES = st.one_of(st.integers(0, SPAN), st.integers(0, PAGES).map(lambda page: page * PAGE), st.integers(0, 3 * PAGE))


@settings(deadline=None)
@given(at=PLACES, size=PLACES, width=st.sampled_from([1, 2, 4, 8]), seed=st.integers(-9, 99))
def test_fill(guest: Guest, at: int, size: int, width: int, seed: int) -> None:
    size = min(size, SPAN - at)
    expected = scramble(guest, seed)
    pattern = b"\0" * width if seed < 0 else random.Random(seed).randbytes(width)
    assert guest.core.dma_fill(RID, at, size, int.from_bytes(pattern, "little"), width) is None
    expected[at : at + size] = (pattern * (size // width + 1))[:size]
    assert memory(guest) == expected


@settings(deadline=None)
@given(source=PLACES, target=PLACES, size=PLACES, other=st.booleans())
def test_copy(guest: Guest, source: int, target: int, size: int, other: bool) -> None:
    """Also by two devices whose addresses lead to the same memory: then ranges overlap the same way."""
    size = min(size, SPAN - source, SPAN - target)
    expected = scramble(guest, source + size)
    writer = (OTHER_RID, PASID) if other else None
    assert guest.core.dma_copy(RID, source, target, size, writer=writer) is None
    expected[target : target + size] = expected[source : source + size]
    assert memory(guest) == expected


@pytest.mark.parametrize(("pattern", "width"), [(256, 1), (1, 3), (1 << 32, 4), (0, 0), (-1, 8), (1 << 64, 8), (0, 16)])
def test_patterns_that_are_none(guest: Guest, pattern: int, width: int) -> None:
    before = memory(guest)
    with pytest.raises(BadValueError):
        guest.core.dma_fill(RID, 0, 64, pattern, width)
    assert memory(guest) == before


def test_fill_faults_in_the_middle(guest: Guest) -> None:
    at = (PAGES - 2) * PAGE + 0x801
    expected = scramble(guest, 1)
    answer = guest.core.dma_fill(RID, at, 3 * PAGE, 0x0201, 2)
    assert answer == Fault(
        rid=RID, pasid=None, ioasid=CHILD, iova=PAGES * PAGE, access=WRITE, stage=1, level=1, gpa=8 * PAGES,
        entry=leaf(62 * PAGE, write=False), reason=Reason.PERMISSION, done=2 * PAGE - 0x801,
    )  # fmt: skip
    expected[at:] = (b"\1\2" * PAGE)[: 2 * PAGE - 0x801]
    assert memory(guest) == expected


@pytest.mark.parametrize(
    ("source", "target", "stop"),
    [
        ((PAGES - 1) * PAGE + 16, 0, (READ, (PAGES + 1) * PAGE, 2 * PAGE - 16)),
        (0, (PAGES - 1) * PAGE + 16, (WRITE, PAGES * PAGE, PAGE - 16)),
        ((PAGES + 1) * PAGE, (PAGES + 1) * PAGE, (READ, (PAGES + 1) * PAGE, 0)),
    ],
)
def test_copy_faults_at_either_end(guest: Guest, source: int, target: int, stop: tuple[Access, int, int]) -> None:
    expected = scramble(guest, 2) + guest.ram.read(62 * PAGE, PAGE)
    answer = guest.core.dma_copy(RID, source, target, 3 * PAGE)
    assert isinstance(answer, Fault)
    assert (answer.access, answer.iova, answer.done) == stop
    done = answer.done
    expected[target : target + done] = expected[source : source + done]
    assert memory(guest) == expected[:SPAN]


def test_copy_from_the_end_down_counts_from_there(guest: Guest) -> None:
    """The target overlaps the source from behind and reaches into the page that may not be written: nothing moved."""
    expected = scramble(guest, 3)
    answer = guest.core.dma_copy(RID, (PAGES - 4) * PAGE, (PAGES - 3) * PAGE, 4 * PAGE)
    assert isinstance(answer, Fault)
    assert (answer.access, answer.iova, answer.done) == (WRITE, (PAGES + 1) * PAGE - 1, 0)
    assert memory(guest) == expected


def test_copy_between_devices(guest: Guest) -> None:
    scramble(guest, 4)
    answer = guest.core.dma_copy(RID, 0, 0, 16, writer=(0x7777, 3))
    assert isinstance(answer, Fault)
    assert (answer.rid, answer.pasid, answer.reason, answer.access) == (0x7777, 3, Reason.NO_ROUTE, WRITE)
    answer = guest.core.dma_copy(0x7777, 0, 0, 16, pasid=3, writer=(RID, None))
    assert isinstance(answer, Fault)
    assert (answer.rid, answer.pasid, answer.reason, answer.access) == (0x7777, 3, Reason.NO_ROUTE, READ)

    def counted() -> list[tuple[int, int]]:
        routes = guest.core.route_counters(RID), guest.core.route_counters(OTHER_RID, PASID)
        total = guest.core.counters()
        return [*((each.requests, each.bytes) for each in routes), (total.requests, total.bytes)]

    before = counted()
    assert guest.core.dma_copy(RID, 0, PAGE, 100, writer=(OTHER_RID, PASID)) is None
    more = [(new[0] - old[0], new[1] - old[1]) for old, new in zip(before, counted(), strict=True)]
    assert more == [(1, 100), (1, 100), (2, 200)]


@pytest.mark.parametrize("end", [1 << 64, (1 << 64) + 1])
def test_ranges_that_leave_the_address_space(guest: Guest, end: int) -> None:
    far = end - 1
    for answer, access in (
        (guest.core.dma_fill(RID, far, 8), WRITE),
        (guest.core.dma_copy(RID, far, 0, 8), READ),
        (guest.core.dma_copy(RID, 0, far, 8), WRITE),
    ):
        assert isinstance(answer, Fault)
        assert (answer.reason, answer.iova, answer.access, answer.done) == (Reason.ADDRESS_WIDTH, far, access, 0)
    with pytest.raises(BadValueError):
        guest.core.dma_fill(RID, 0, -1)
    with pytest.raises(BadValueError):
        guest.core.dma_copy(RID, 0, -4, 4)


def test_nothing_to_do(guest: Guest) -> None:
    assert guest.core.dma_fill(RID, 1 << 63, 0) is None
    assert guest.core.dma_copy(RID, 1 << 63, (1 << 64) - 1, 0) is None


# Memory that goes away


@pytest.mark.parametrize(("source", "target"), [(0, 16), (16, 0), (12, 14), (14, 12), (14, 15)])
def test_truncated_memfd(source: int, target: int) -> None:
    """Pages 20 and up are gone: a fault at the end that lies there, telling what was moved before, and we live."""
    ram = Ram(32 * PAGE, memfd=True)
    core = Core(iotlb_entries=64)
    core.create_host_space(STAGE2)
    core.map(STAGE2, 0, ram.hva, 32 * PAGE, RW)
    core.attach(DIRECT, None, STAGE2)
    content = random.Random(6).randbytes(20 * PAGE)
    ram.write(0, content)
    os.ftruncate(ram.fd, 20 * PAGE)
    count, down = 8, source < target < source + 8
    for _ in range(2):
        answer = core.dma_copy(DIRECT, source * PAGE, target * PAGE, count * PAGE)
        assert isinstance(answer, Fault)
        assert answer.reason == Reason.MEMORY_GONE and answer.stage == 2
        if down:  # the last pages come first
            assert answer.done == 0
        else:
            moved = 20 - max(source, target)
            gone = target + moved if target > source else source + moved
            assert (answer.done, answer.iova, answer.gpa) == (moved * PAGE, gone * PAGE, gone * PAGE)
            assert answer.access == (WRITE if target > source else READ)
    answer = core.dma_fill(DIRECT, 18 * PAGE + 5, 4 * PAGE, 0x11)
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.iova, answer.done) == (Reason.MEMORY_GONE, 20 * PAGE, 2 * PAGE - 5)
    os.ftruncate(ram.fd, 32 * PAGE)
    core.close()
    ram.close()
