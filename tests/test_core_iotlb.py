"""IOTLB: what may be cached, and that nothing is used once its invalidation has returned."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from amd_v1_reference import index, leaf, pointer, sized_leaf
from core_guest import CHILD, DIRECT, PAGE, RID, STAGE2, Guest

from backend.core import RW, Access, BadValueError, Core, Fault, Reason, Translation

READ, WRITE = Access.READ, Access.WRITE
OTHER, OTHER_RID = 3, 0x0118
ROOT, MIDDLE, TABLE = PAGE, 2 * PAGE, 3 * PAGE
A, B = 0x20000, 0x30000
IOVA = 0x5000


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(iotlb_entries=1024)
    made.map(0, 64 * PAGE)
    made.bind(ROOT, 3)
    made.set_entry(ROOT, pointer(MIDDLE, 2))
    made.set_entry(MIDDLE, pointer(TABLE, 1))
    yield made
    made.close()


def lead(guest: Guest, iova: int, entry: int) -> None:
    """Change the guest's leaf, as a guest does before it invalidates."""
    guest.set_entry(TABLE + 8 * index(iova, 1), entry)


def gpa(guest: Guest, iova: int = IOVA, access: Access = READ, rid: int = RID) -> int | Reason:
    answer = guest.core.translate(rid, iova, access)
    return answer.reason if isinstance(answer, Fault) else answer.gpa


def test_hits_and_misses_are_counted(guest: Guest) -> None:
    lead(guest, IOVA, leaf(A))
    for _ in range(3):
        assert gpa(guest) == A
    counters = guest.core.counters()
    assert (counters.iotlb_misses, counters.iotlb_hits, counters.walks) == (1, 2, 1)
    space = guest.core.space_counters(CHILD)
    assert (space.iotlb_misses, space.iotlb_hits) == (1, 2)


def test_a_cached_translation_is_used_until_the_guest_invalidates(guest: Guest) -> None:
    lead(guest, IOVA, leaf(A))
    assert gpa(guest) == A
    lead(guest, IOVA, leaf(B))
    assert gpa(guest) == A
    guest.core.invalidate(CHILD, IOVA, PAGE)
    assert gpa(guest) == B


def rebind(guest: Guest) -> None:
    guest.core.unbind_table(CHILD)
    guest.bind(ROOT, 3)


def remap(guest: Guest, gpa: int) -> None:
    guest.core.unmap(STAGE2, gpa, PAGE)
    guest.core.map(STAGE2, gpa, guest.ram.hva + gpa, PAGE, RW)


INVALIDATIONS: dict[str, Callable[[Guest], None]] = {
    "all": lambda guest: guest.core.invalidate(CHILD),
    "page": lambda guest: guest.core.invalidate(CHILD, IOVA, PAGE),
    "one byte of it": lambda guest: guest.core.invalidate(CHILD, IOVA + 0xFFF, 1),
    "range around": lambda guest: guest.core.invalidate(CHILD, 0, 1 << 20),
    "huge range": lambda guest: guest.core.invalidate(CHILD, 0, 1 << 40),
    "to beyond the end": lambda guest: guest.core.invalidate(CHILD, PAGE, 1 << 64),
    "everything": lambda guest: guest.core.invalidate_all(),
    "the device": lambda guest: guest.core.invalidate_device(RID),
    "bind again": lambda guest: guest.bind(ROOT, 3),
    "unbind and bind": rebind,
    "parent unmaps the page": lambda guest: remap(guest, A),
    "parent unmaps another page": lambda guest: remap(guest, 60 * PAGE),
}


@pytest.mark.parametrize("how", INVALIDATIONS)
def test_nothing_stale_afterwards(guest: Guest, how: str) -> None:
    lead(guest, IOVA, leaf(A))
    assert gpa(guest) == A
    lead(guest, IOVA, leaf(B))
    INVALIDATIONS[how](guest)
    assert gpa(guest) == B
    lead(guest, IOVA, 0)
    INVALIDATIONS[how](guest)
    assert gpa(guest) == Reason.NOT_PRESENT


def test_a_device_is_invalidated_with_all_its_pasids_and_without_the_others(guest: Guest) -> None:
    """Three spaces over one table: of RID, of a PASID of RID, and of another device."""
    core = guest.core
    routes = {(RID, None): CHILD, (RID, 7): 11, (OTHER_RID, None): 12}
    for (rid, pasid), ioasid in routes.items():
        if ioasid != CHILD:
            core.create_nested_space(ioasid, STAGE2)
            core.bind_table(ioasid, fmt="amd-v1", root=ROOT, levels=3)
            core.attach(rid, pasid, ioasid)

    def found() -> list[int]:
        answers = [core.translate(rid, IOVA, READ, pasid=pasid) for rid, pasid in routes]
        return [answer.gpa for answer in answers if isinstance(answer, Translation)]

    lead(guest, IOVA, leaf(A))
    assert found() == [A, A, A]
    lead(guest, IOVA, leaf(B))
    core.invalidate_device(0x7777)
    assert found() == [A, A, A]
    core.invalidate_device(RID)
    assert found() == [B, B, A]
    lead(guest, IOVA, leaf(A))
    core.detach(RID, 7)
    core.invalidate_device(RID)
    core.attach(RID, 7, 11)
    assert found() == [A, B, A]
    with pytest.raises(BadValueError):
        core.invalidate_device(1 << 16)


def test_parent_unmap_reaches_children(guest: Guest) -> None:
    """Cached in the child under its IOVA; the parent's unmap names the GPA."""
    lead(guest, IOVA, leaf(A))
    assert gpa(guest) == A
    guest.core.unmap(STAGE2, A, PAGE)
    answer = guest.core.translate(RID, IOVA, READ)
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.gpa, answer.reason) == (2, A, Reason.NOT_PRESENT)


def test_parent_unmap_of_a_table_page(guest: Guest) -> None:
    lead(guest, IOVA, leaf(A))
    assert gpa(guest) == A
    guest.core.unmap(STAGE2, TABLE, PAGE)
    answer = guest.core.translate(RID, IOVA, READ)
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.gpa) == (2, TABLE + 8 * index(IOVA, 1))


def test_parent_map_again_elsewhere(guest: Guest) -> None:
    lead(guest, IOVA, leaf(A))
    guest.ram.write(A, b"old!")
    guest.ram.write(B, b"new!")
    assert guest.core.dma_read(RID, IOVA, 4) == b"old!"
    assert guest.core.dma_read(DIRECT, A, 4) == b"old!"
    guest.core.unmap(STAGE2, A, PAGE)
    guest.core.map(STAGE2, A, guest.ram.hva + B, PAGE, RW)
    assert guest.core.dma_read(RID, IOVA, 4) == b"new!"
    assert guest.core.dma_read(DIRECT, A, 4) == b"new!"


def test_range_invalidation_leaves_the_rest(guest: Guest) -> None:
    for page in range(8):
        lead(guest, page * PAGE, leaf(A + page * PAGE))
        gpa(guest, page * PAGE)
    before = guest.core.counters().iotlb_misses
    guest.core.invalidate(CHILD, 2 * PAGE, 3 * PAGE)
    for page in range(8):
        gpa(guest, page * PAGE)
    assert guest.core.counters().iotlb_misses - before == 3


def test_invalidating_one_space_does_not_cost_another(guest: Guest) -> None:
    guest.core.create_nested_space(OTHER, STAGE2)
    guest.core.bind_table(OTHER, fmt="amd-v1", root=ROOT, levels=3)
    guest.core.attach(OTHER_RID, None, OTHER)
    lead(guest, IOVA, leaf(A))
    assert gpa(guest) == gpa(guest, rid=OTHER_RID) == A
    lead(guest, IOVA, leaf(B))
    guest.core.invalidate(CHILD)
    assert gpa(guest) == B
    assert gpa(guest, rid=OTHER_RID) == A, "its own entry stays"
    assert guest.core.space_counters(OTHER).iotlb_hits == 1


def test_space_created_anew_inherits_nothing(guest: Guest) -> None:
    lead(guest, IOVA, leaf(A))
    assert gpa(guest) == A
    guest.core.detach(RID, None)
    guest.core.destroy_space(CHILD)
    guest.core.create_nested_space(CHILD, STAGE2)
    guest.core.attach(RID, None, CHILD)
    assert gpa(guest) == Reason.NOT_BOUND
    lead(guest, IOVA, leaf(B))
    guest.bind(ROOT, 3)
    assert gpa(guest) == B


def test_detach_and_attach_elsewhere(guest: Guest) -> None:
    lead(guest, IOVA, leaf(A))
    assert gpa(guest) == A
    guest.core.attach(RID, None, STAGE2)
    assert gpa(guest) == IOVA
    guest.core.attach(RID, None, CHILD)
    assert gpa(guest) == A


def test_a_page_cached_for_reading_is_walked_for_a_write(guest: Guest) -> None:
    """A read-only entry in the IOTLB does not answer for a write: the table may permit it by now."""
    lead(guest, IOVA, leaf(A, write=False))
    assert gpa(guest) == A
    answer = guest.core.translate(RID, IOVA, WRITE)
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.stage, answer.level) == (Reason.PERMISSION, 1, 1)
    lead(guest, IOVA, leaf(A))
    assert gpa(guest, access=WRITE) == A
    hits = guest.core.counters().iotlb_hits
    assert gpa(guest, access=WRITE) == A
    assert guest.core.counters().iotlb_hits == hits + 1


def test_partial_invalidation_of_a_large_page(guest: Guest) -> None:
    """One page of a 64 KiB leaf named: the whole translation goes, from whichever of its pages it came."""
    for slot in range(16):
        lead(guest, slot * PAGE, sized_leaf(A, 16))
    guest.core.unmap(STAGE2, 0, 64 * PAGE)
    guest.regions.clear()
    for page in range(64):
        guest.map(page * PAGE, PAGE, page * PAGE)
    assert [gpa(guest, slot * PAGE) for slot in (0, 7)] == [A, A + 7 * PAGE]
    for slot in range(16):
        lead(guest, slot * PAGE, sized_leaf(B, 16))
    guest.core.invalidate(CHILD, 15 * PAGE, 1)
    assert gpa(guest, 15 * PAGE) == B + 15 * PAGE


def test_mixed_sizes() -> None:
    """2 MiB leaves in both stages: one entry serves all of it, and any byte of it invalidates it."""
    guest = Guest(ram=8 << 20, align=2 << 20, iotlb_entries=64)
    guest.map(0, 8 << 20)
    guest.bind(0, 2)
    for slot in range(3):
        guest.set_entry(8 * slot, leaf((slot + 1) << 21))
    guest.set_entry(8 * 3, pointer(PAGE, 1))
    guest.set_entry(PAGE, leaf(0x300000))
    for iova in (0, 0x1FFFFF, 0x123000, 0x200000, 0x400000, 0x600000, 0x600FFF):
        guest.check(iova, READ)
    counters = guest.core.counters()
    assert (counters.iotlb_misses, counters.iotlb_hits) == (4, 3)
    guest.set_entry(0, leaf(3 << 21))
    assert gpa(guest, 0) == 1 << 21
    guest.core.invalidate(CHILD, 0x1FF000, PAGE)
    assert gpa(guest, 0) == 3 << 21
    guest.close()


def test_bounded_and_evictions_counted() -> None:
    """Sixteen entries, sixty-four pages: no more than sixteen stay."""
    guest = Guest(iotlb_entries=16)
    for page in range(64):
        guest.map(page * PAGE, PAGE, page * PAGE)
    for page in range(64):
        guest.core.translate(DIRECT, page * PAGE, READ)
    before = guest.core.counters()
    assert before.iotlb_misses == 64
    assert before.iotlb_evictions == 64 - 16
    for page in range(64):
        guest.core.translate(DIRECT, page * PAGE, READ)
    assert guest.core.counters().iotlb_hits <= 16
    guest.close()


def test_switched_off() -> None:
    guest = Guest(iotlb_entries=0)
    guest.map(0, PAGE)
    for _ in range(3):
        guest.core.translate(DIRECT, 0, READ)
    counters = guest.core.counters()
    assert (counters.iotlb_hits, counters.iotlb_misses, counters.iotlb_evictions, counters.walks) == (0, 0, 0, 3)
    guest.core.invalidate(STAGE2, 0, 1)
    guest.close()


@pytest.mark.parametrize("entries", [1, 16, 1024])
def test_random_changes_and_invalidations(entries: int) -> None:
    """A model of what may be seen: after an invalidation the table's word alone; before it, the old word too."""
    chance = random.Random(entries)
    guest = Guest(iotlb_entries=entries)
    guest.map(0, 64 * PAGE)
    guest.bind(ROOT, 1)
    words: list[set[int | Reason]] = [{Reason.NOT_PRESENT} for _ in range(8)]
    unmapped: set[int] = set()

    def truth(page: int) -> int | Reason:
        entry = guest.entry(ROOT + 8 * page)
        target = entry & 0xFFFFF000
        return target if entry & 1 and target not in unmapped else Reason.NOT_PRESENT

    for _ in range(3000):
        page, kind = chance.randrange(8), chance.random()
        target = (32 + chance.randrange(8)) * PAGE
        if kind < 0.3:
            guest.set_entry(ROOT + 8 * page, chance.choice((0, leaf(target))))
            words[page].add(truth(page))
        elif kind < 0.4:
            last = chance.randrange(page, 8)
            guest.core.invalidate(CHILD, page * PAGE, (last + 1 - page) * PAGE)
            for one in range(page, last + 1):
                words[one] = {truth(one)}
        elif kind < 0.45:
            if target in unmapped:
                guest.core.map(STAGE2, target, guest.ram.hva + target, PAGE, RW)
                unmapped.remove(target)
                for one in range(8):  # what was not there is never remembered
                    words[one].add(truth(one))
            else:
                guest.core.unmap(STAGE2, target, PAGE)
                unmapped.add(target)
                words = [{truth(one)} for one in range(8)]
        else:
            seen = gpa(guest, page * PAGE)
            assert seen in words[page]
            if seen == Reason.NOT_PRESENT:
                assert truth(page) == Reason.NOT_PRESENT, "a fault was cached"
    guest.close()


def test_many_spaces_do_not_share(guest: Guest) -> None:
    """The same IOVA in a hundred spaces, each with a table of its own."""
    core = guest.core
    for number in range(40):
        core.create_nested_space(100 + number, STAGE2)
        core.bind_table(100 + number, fmt="amd-v1", root=(20 + number) * PAGE, levels=1)
        core.attach(0x1000 + number, None, 100 + number)
        guest.set_entry((20 + number) * PAGE, leaf((10 + number) * PAGE))
    for _ in range(2):
        for number in range(40):
            found = core.translate(0x1000 + number, 0, READ)
            assert isinstance(found, Translation)
            assert found.gpa == (10 + number) * PAGE
    assert core.counters().iotlb_hits >= 35


def test_iotlb_size_is_rounded_up() -> None:
    for entries in (1, 2, 3, 4, 5, 1 << 20):
        Core(iotlb_entries=entries).close()
