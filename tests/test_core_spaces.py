"""Spaces: map and unmap of the host-managed kind against a dictionary of pages; kinds, limits and errors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from core_guest import CHILD, DIRECT, PAGE, RID, STAGE2, Guest

from backend.core import (
    RW,
    Access,
    BadValueError,
    BusyError,
    ClosedError,
    Core,
    CoreError,
    ExistsError,
    Fault,
    KindError,
    LimitError,
    NotMappedError,
    OverlapError,
    Reason,
    Translation,
    UnknownIdError,
)

READ = Access.READ
MIB2, GIB = 2 << 20, 1 << 30
HVA = 0x40000000
"""Mapped but never touched by these tests: no memory needs to lie there."""


@pytest.fixture
def core() -> Iterator[Core]:
    made = Core(iotlb_entries=64)
    made.create_host_space(STAGE2)
    made.attach(DIRECT, None, STAGE2)
    yield made
    made.close()


def at(core: Core, iova: int) -> tuple[int, int] | Reason:
    """(HVA, bytes to the end of the leaf), or why not."""
    answer = core.translate(DIRECT, iova, READ)
    return answer.reason if isinstance(answer, Fault) else (answer.hva, answer.size)


def test_leaves_are_as_large_as_both_sides_allow(core: Core) -> None:
    core.map(STAGE2, GIB - PAGE, HVA - PAGE, GIB + MIB2 + 2 * PAGE, RW)
    assert core.counters().table_pages < 12
    assert at(core, GIB - PAGE) == (HVA - PAGE, PAGE)
    assert at(core, GIB + 5) == (HVA + 5, GIB - 5)
    assert at(core, 2 * GIB) == (HVA + GIB, MIB2)
    assert at(core, 2 * GIB + MIB2) == (HVA + GIB + MIB2, PAGE)
    core.map(STAGE2, 8 * GIB, HVA + PAGE, 4 * MIB2, RW)
    assert at(core, 8 * GIB + MIB2) == (HVA + PAGE + MIB2, PAGE), "2 MiB apart by a page: no large leaf"


def test_unmap_splits_a_large_leaf(core: Core) -> None:
    core.map(STAGE2, 0, HVA, GIB, RW)
    assert at(core, 0) == (HVA, GIB)
    core.unmap(STAGE2, MIB2 + 3 * PAGE, PAGE)
    assert at(core, MIB2 + 3 * PAGE) == Reason.NOT_PRESENT
    assert at(core, MIB2 + 2 * PAGE + 9) == (HVA + MIB2 + 2 * PAGE + 9, PAGE - 9)
    assert at(core, 2 * MIB2) == (HVA + 2 * MIB2, MIB2)
    assert at(core, GIB - 1) == (HVA + GIB - 1, 1)
    with pytest.raises(NotMappedError):
        core.unmap(STAGE2, 0, GIB)
    core.unmap(STAGE2, 0, MIB2 + 3 * PAGE)
    core.unmap(STAGE2, MIB2 + 4 * PAGE, GIB - MIB2 - 4 * PAGE)
    assert core.counters().table_pages == 1, "the root alone is left"


def test_a_splitted_leaf_keeps_its_permission(core: Core) -> None:
    core.map(STAGE2, 0, HVA, MIB2, READ)
    core.unmap(STAGE2, 0, PAGE)
    answer = core.translate(DIRECT, PAGE, Access.WRITE)
    assert isinstance(answer, Fault)
    assert answer.reason == Reason.PERMISSION


def test_a_refused_map_changes_nothing(core: Core) -> None:
    core.map(STAGE2, 16 * PAGE, HVA, PAGE, RW)
    before = core.counters().table_pages
    with pytest.raises(OverlapError) as caught:
        core.map(STAGE2, 0, HVA, 64 * PAGE, RW)
    assert (caught.value.ioasid, caught.value.iova, caught.value.size) == (STAGE2, 0, 64 * PAGE)
    assert at(core, 0) == Reason.NOT_PRESENT
    assert core.counters().table_pages == before


@pytest.mark.parametrize("levels", [1, 2, 4, 6])
def test_against_a_dictionary_of_pages(levels: int) -> None:
    """Random maps and unmaps around the boundaries of large leaves."""
    chance = random.Random(levels)
    core = Core(iotlb_entries=256)
    core.create_host_space(STAGE2, levels=levels)
    core.attach(DIRECT, None, STAGE2)
    top = 1 << min(64, 12 + 9 * levels)
    bases = [base for base in (0, MIB2, GIB, 1 << 39, top - 8 * PAGE) if base < top]
    pages: dict[int, int] = {}
    for _ in range(400):
        start = chance.choice(bases) // PAGE + chance.randrange(8)
        count = chance.choice((1, 2, 5, 512, 700))
        if (start + count) * PAGE > top:
            count = top // PAGE - start
        covered = [page for page in range(start, start + count) if page in pages]
        if chance.random() < 0.5:
            hva = HVA + chance.choice((start % 512, 3)) * PAGE
            if covered:
                with pytest.raises(OverlapError):
                    core.map(STAGE2, start * PAGE, hva, count * PAGE, RW)
            else:
                core.map(STAGE2, start * PAGE, hva, count * PAGE, RW)
                pages |= {start + i: hva + i * PAGE for i in range(count)}
        elif covered:  # a run of mapped pages, whatever maps made it
            first = chance.choice(covered)
            last = first
            while last + 1 in pages and last - first < count:
                last += 1
            core.unmap(STAGE2, first * PAGE, (last + 1 - first) * PAGE)
            for page in range(first, last + 1):
                del pages[page]
        else:
            with pytest.raises(NotMappedError):
                core.unmap(STAGE2, start * PAGE, count * PAGE)
        for _ in range(20):
            page = chance.choice(bases) // PAGE + chance.choice((chance.randrange(16), chance.randrange(1300)))
            page %= (1 << 64) // PAGE
            found = at(core, page * PAGE)
            expected = pages.get(page)
            assert (found[0] if isinstance(found, tuple) else None) == expected
    for page in list(pages):
        core.unmap(STAGE2, page * PAGE, PAGE)
    assert core.counters().table_pages == 1
    core.close()


def test_top_of_the_address_space() -> None:
    core = Core()
    core.create_host_space(STAGE2, levels=6)
    core.attach(DIRECT, None, STAGE2)
    top = (1 << 64) - MIB2
    core.map(STAGE2, top, HVA, MIB2, RW)
    assert at(core, (1 << 64) - 1) == (HVA + MIB2 - 1, 1)
    core.unmap(STAGE2, (1 << 64) - PAGE, PAGE)
    assert at(core, (1 << 64) - 1) == Reason.NOT_PRESENT
    core.unmap(STAGE2, top, MIB2 - PAGE)
    assert core.counters().table_pages == 1
    core.close()


@pytest.mark.parametrize(
    ("iova", "hva", "size", "access"),
    [
        (1, HVA, PAGE, RW),
        (0, HVA + 1, PAGE, RW),
        (0, HVA, PAGE + 1, RW),
        (0, HVA, 0, RW),
        (0, 0, PAGE, RW),
        (0, 1 << 47, PAGE, RW),
        (0, (1 << 47) - PAGE, 2 * PAGE, RW),
        (1 << 48, HVA, PAGE, RW),
        ((1 << 48) - PAGE, HVA, 2 * PAGE, RW),
        ((1 << 64) - PAGE, HVA, 2 * PAGE, RW),
        (0, HVA, PAGE, Access(0)),
        (0, HVA, PAGE, Access(5)),
        (-PAGE, HVA, PAGE, RW),
        (1 << 64, HVA, PAGE, RW),
    ],
)
def test_values_that_map_refuses(core: Core, iova: int, hva: int, size: int, access: Access) -> None:
    with pytest.raises(BadValueError):
        core.map(STAGE2, iova, hva, size, access)
    assert core.counters().table_pages == 1


@pytest.mark.parametrize(("iova", "size"), [(1, PAGE), (0, 0), (0, 5), ((1 << 64) - PAGE, 2 * PAGE), (1 << 50, PAGE)])
def test_values_that_unmap_refuses(core: Core, iova: int, size: int) -> None:
    with pytest.raises(BadValueError):
        core.unmap(STAGE2, iova, size)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ExistsError, lambda core: core.create_host_space(STAGE2)),
        (ExistsError, lambda core: core.create_nested_space(STAGE2, STAGE2)),
        (BadValueError, lambda core: core.create_host_space(9, levels=0)),
        (BadValueError, lambda core: core.create_host_space(9, levels=7)),
        (BadValueError, lambda core: core.create_host_space(-1)),
        (BadValueError, lambda core: core.create_host_space(1 << 32)),
        (UnknownIdError, lambda core: core.create_host_space(9, fmt="vt-d")),
        (UnknownIdError, lambda core: core.create_nested_space(9, 77)),
        (KindError, lambda core: core.create_nested_space(9, core.create_nested_space(8, CHILD) or 8)),
        (UnknownIdError, lambda core: core.destroy_space(9)),
        (BusyError, lambda core: core.destroy_space(STAGE2)),
        (BusyError, lambda core: core.destroy_space(CHILD)),
        (KindError, lambda core: core.map(CHILD, 0, HVA, PAGE, RW)),
        (KindError, lambda core: core.unmap(CHILD, 0, PAGE)),
        (UnknownIdError, lambda core: core.map(9, 0, HVA, PAGE, RW)),
        (UnknownIdError, lambda core: core.unmap(9, 0, PAGE)),
        (KindError, lambda core: core.bind_table(STAGE2, fmt="amd-v1", root=0, levels=4)),
        (UnknownIdError, lambda core: core.bind_table(9, fmt="amd-v1", root=0, levels=4)),
        (UnknownIdError, lambda core: core.bind_table(CHILD, fmt="sv39", root=0, levels=4)),
        (BadValueError, lambda core: core.bind_table(CHILD, fmt="amd-v1", root=8, levels=4)),
        (BadValueError, lambda core: core.bind_table(CHILD, fmt="amd-v1", root=1 << 52, levels=4)),
        (BadValueError, lambda core: core.bind_table(CHILD, fmt="amd-v1", root=0, levels=0)),
        (BadValueError, lambda core: core.bind_table(CHILD, fmt="amd-v1", root=0, levels=7)),
        (BadValueError, lambda core: core.bind_table(CHILD, fmt="amd-v1", root=0, levels=4, dirty=True)),
        (KindError, lambda core: core.unbind_table(STAGE2)),
        (UnknownIdError, lambda core: core.unbind_table(9)),
        (UnknownIdError, lambda core: core.invalidate(9)),
        (BadValueError, lambda core: core.invalidate(CHILD, 0, 0)),
        (UnknownIdError, lambda core: core.space_counters(9)),
    ],
)
def test_misuse_is_an_error(core: Core, error: type[CoreError], call: Callable[[Core], None]) -> None:
    core.create_nested_space(CHILD, STAGE2)
    core.attach(RID, None, CHILD)
    with pytest.raises(error) as caught:
        call(core)
    assert str(caught.value)


def test_destroyed_spaces_are_gone(core: Core) -> None:
    core.create_nested_space(CHILD, STAGE2)
    core.map(STAGE2, 0, HVA, MIB2 + PAGE, RW)
    core.destroy_space(CHILD)
    core.detach(DIRECT, None)
    core.destroy_space(STAGE2)
    now = core.counters()
    assert (now.spaces, now.table_pages) == (0, 0)
    core.create_host_space(STAGE2)
    core.attach(DIRECT, None, STAGE2)
    assert at(core, 0) == Reason.NOT_PRESENT


def test_unbound_space_answers_not_bound() -> None:
    guest = Guest(iotlb_entries=16)
    guest.map(0, 8 * PAGE)
    answer = guest.core.translate(RID, 0, READ)
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.stage, answer.ioasid, answer.gpa) == (Reason.NOT_BOUND, 0, CHILD, None)
    guest.bind(0, 1)
    guest.set_entry(0, 0x2000 | 1 | 3 << 61)
    assert isinstance(guest.check(0, READ), Translation)
    guest.core.unbind_table(CHILD)
    assert isinstance(guest.core.translate(RID, 0, READ), Fault)
    guest.close()


def test_close() -> None:
    core = Core()
    core.create_host_space(1)
    core.close()
    core.close()
    for call in (
        lambda: core.create_host_space(2),
        core.counters,
        lambda: core.dma_read(8, 0, 4),
        lambda: core.dma_write(8, 0, b"x"),
        lambda: core.store(8, 0, 0, 4),
    ):
        with pytest.raises(ClosedError):
            call()


def test_iotlb_size_is_bounded() -> None:
    with pytest.raises(LimitError):
        Core(iotlb_entries=(1 << 20) + 1)
    with pytest.raises(BadValueError):
        Core(iotlb_entries=-1)
