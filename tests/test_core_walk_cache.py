"""Walk caches: walks come by them, and nothing stale is used after what should have ended it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from amd_v1_reference import leaf, pointer
from core_guest import CHILD, PAGE, RID, STAGE2, Guest

from backend.core import RW, Access, Core, Fault, Reason, Translation

READ, WRITE = Access.READ, Access.WRITE
TABLES = [PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE]
OTHER, THIRD = 3, 4


@pytest.fixture
def guest() -> Iterator[Guest]:
    """Pages 0 to 15 of one 2 MiB, which lead to pages 16 to 31, by four levels."""
    made = Guest(iotlb_entries=64)
    made.map(0, 48 * PAGE)
    made.lay(0, TABLES, [pointer(TABLES[1], 3), pointer(TABLES[2], 2), pointer(TABLES[3], 1), leaf(16 * PAGE)])
    for page in range(16):
        made.set_entry(TABLES[3] + 8 * page, leaf((16 + page) * PAGE))
    made.bind(TABLES[0], 4)
    yield made
    made.close()


def hits(core: Core) -> int:
    return core.counters().walk_cache_hits


def gpa(guest: Guest, page: int, access: Access = READ) -> int:
    found = guest.core.translate(RID, page * PAGE, access)
    assert isinstance(found, Translation), found
    return found.gpa // PAGE


def test_the_second_walk_knows_the_way(guest: Guest) -> None:
    assert gpa(guest, 0) == 16
    assert hits(guest.core) == 0
    assert [gpa(guest, page) for page in range(1, 16)] == list(range(17, 32))
    assert hits(guest.core) == 15


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_changed_table_after_its_invalidation(guest: Guest, level: int) -> None:
    """A pointer of each level turned to a copy of what was below, whose last table leads elsewhere."""
    assert gpa(guest, 0) == 16
    copies = [pointer((12 - below) * PAGE, below) for below in range(level, 0, -1)]
    guest.set_entry(TABLES[3 - level], copies[0])
    for below, entry in zip(range(level, 1, -1), copies[1:], strict=True):
        guest.set_entry((12 - below) * PAGE, entry)
    guest.set_entry(11 * PAGE + 8 * 5, leaf(40 * PAGE))
    guest.core.invalidate(CHILD, 9 * PAGE, PAGE)
    assert gpa(guest, 5) == 40


def test_stage_2_under_a_table_changes(guest: Guest) -> None:
    """The page of the last table unmapped and mapped to other memory: the old one is not read again."""
    assert gpa(guest, 0) == 16
    guest.core.unmap(STAGE2, TABLES[3], PAGE)
    gone = guest.core.translate(RID, 3 * PAGE, READ)
    assert isinstance(gone, Fault)
    assert (gone.stage, gone.table, gone.reason, gone.gpa) == (2, True, Reason.NOT_PRESENT, TABLES[3] + 8 * 3)
    guest.core.map(STAGE2, TABLES[3], guest.ram.hva + 50 * PAGE, PAGE, RW)
    guest.ram.write(50 * PAGE + 8 * 3, leaf(33 * PAGE).to_bytes(8, "little"))
    assert gpa(guest, 3) == 33


def test_stage_2_makes_a_table_read_only(guest: Guest) -> None:
    guest.core.bind_table(CHILD, fmt="amd-v1", root=TABLES[0], levels=4, accessed=True)
    assert gpa(guest, 0) == 16
    guest.core.protect(STAGE2, TABLES[3], PAGE, READ)
    stopped = guest.core.translate(RID, PAGE, READ)
    assert isinstance(stopped, Fault)
    assert (stopped.stage, stopped.table, stopped.reason) == (2, True, Reason.PERMISSION)


def test_what_becomes_permitted_needs_no_invalidation(guest: Guest) -> None:
    guest.set_entry(TABLES[1], pointer(TABLES[2], 2, write=False))
    assert gpa(guest, 0) == 16
    assert isinstance(guest.core.translate(RID, PAGE, WRITE), Fault)
    guest.set_entry(TABLES[1], pointer(TABLES[2], 2))
    assert gpa(guest, 1, WRITE) == 17


def test_spaces_are_apart(guest: Guest) -> None:
    """Another table for the same IOVAs in another space; invalidating one leaves the other its way."""
    core = guest.core
    guest.set_entry(20 * PAGE + 8 * 2, leaf(44 * PAGE))
    guest.lay(
        0, [5 * PAGE, 6 * PAGE, 7 * PAGE], [pointer(6 * PAGE, 3), pointer(7 * PAGE, 2), pointer(20 * PAGE, 1)], levels=4
    )
    core.create_nested_space(OTHER, STAGE2)
    core.bind_table(OTHER, fmt="amd-v1", root=5 * PAGE, levels=4)
    core.attach(RID + 1, None, OTHER)
    assert gpa(guest, 0) == 16
    found = core.translate(RID + 1, 2 * PAGE, READ)
    assert isinstance(found, Translation)
    assert found.gpa == 44 * PAGE
    core.invalidate(OTHER)
    before = hits(core)
    assert gpa(guest, 2) == 18
    assert hits(core) == before + 1


def test_a_space_made_anew_remembers_nothing(guest: Guest) -> None:
    core = guest.core
    assert gpa(guest, 0) == 16
    core.detach(RID, None)
    core.destroy_space(CHILD)
    core.create_nested_space(CHILD, STAGE2)
    guest.set_entry(TABLES[2], 0)
    guest.bind(TABLES[0], 4)
    core.attach(RID, None, CHILD)
    gone = core.translate(RID, PAGE, READ)
    assert isinstance(gone, Fault)
    assert (gone.stage, gone.level) == (1, 2)


@pytest.mark.parametrize(
    ("entries", "caches", "on"), [(0, None, False), (64, None, True), (64, False, False), (0, True, True)]
)
def test_on_and_off(entries: int, caches: bool | None, on: bool) -> None:
    core = Core(iotlb_entries=entries, walk_caches=caches)
    guest = Guest(iotlb_entries=0)
    guest.core.close()
    guest.core = core
    core.create_host_space(STAGE2)
    core.create_nested_space(CHILD, STAGE2)
    core.attach(RID, None, CHILD)
    guest.map(0, 48 * PAGE)
    guest.lay(0, TABLES[:2], [pointer(TABLES[1], 1), leaf(16 * PAGE)])
    guest.set_entry(TABLES[1] + 8, leaf(17 * PAGE))
    guest.bind(TABLES[0], 2)
    assert [gpa(guest, page) for page in (0, 1)] == [16, 17]
    assert hits(core) == on
    guest.close()
