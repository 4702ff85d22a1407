"""The nested walk over AMD v1 tables, against the brute-force reference: valid, broken and hostile tables."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from amd_v1_reference import default_size_lg2, index, leaf, pointer, sized_leaf
from core_guest import CHILD, DIRECT, PAGE, RID, STAGE2, Guest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.core import RW, Access, Fault, Reason, Translation

READ, WRITE = Access.READ, Access.WRITE
TOP = 1 << 47
"""GPA of data far above the tables, reached by upper-level leaves of stage 1 in tests of stage 2 alone."""


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    made.map(0, 48 * PAGE)
    made.map(48 * PAGE, 8 * PAGE, 48 * PAGE, READ)  # ROM
    yield made
    made.close()


def path_of(guest: Guest, iova: int, levels: int, last: int) -> list[int]:
    """Bind tables at pages 1, 2, ... that translate `iova` down to level 1, whose entry is `last`; their GPAs."""
    tables = [PAGE * (1 + step) for step in range(levels)]
    entries = [pointer(tables[step + 1], levels - step - 1) for step in range(levels - 1)] + [last]
    guest.lay(iova, tables, entries)
    guest.bind(tables[0], levels)
    return [table + 8 * index(iova, levels - step) for step, table in enumerate(tables)]


@pytest.mark.parametrize("levels", range(1, 7))
def test_every_depth(guest: Guest, levels: int) -> None:
    iova = 0xFEDC_BA98_7654_3210 & ((1 << {1: 21, 2: 30, 3: 39, 4: 48, 5: 57, 6: 64}[levels]) - 1)
    path_of(guest, iova, levels, leaf(0x20000))
    answer = guest.check(iova, READ)
    assert answer == Translation(guest.ram.hva + 0x20210, PAGE - 0x210, 0x20210, RW | Access.EXECUTE)


@pytest.mark.parametrize("levels", range(1, 6))
def test_address_beyond_the_root(guest: Guest, levels: int) -> None:
    path_of(guest, 0, levels, leaf(0x20000))
    reach = {1: 21, 2: 30, 3: 39, 4: 48, 5: 57}[levels]
    answer = guest.check(1 << reach, READ)
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.stage, answer.entry) == (Reason.ADDRESS_WIDTH, 1, 0)
    guest.check((1 << 64) - 1, WRITE)


@pytest.mark.parametrize("levels", [1, 3, 4, 6])
def test_every_bit_flip_of_a_valid_path(guest: Guest, levels: int) -> None:
    iova = 0x5000 if levels == 1 else 0x1234_5000 & ((1 << 39) - 1)
    for at in path_of(guest, iova, levels, leaf(0x21000)):
        entry = guest.entry(at)
        for bit in range(64):
            guest.set_entry(at, entry ^ 1 << bit)
            guest.check(iova, READ)
            guest.check(iova | 0xFF8, WRITE)
        guest.set_entry(at, entry)
    assert isinstance(guest.check(iova, READ), Translation)


def test_reserved_bits_come_before_permission_and_level(guest: Guest) -> None:
    at = path_of(guest, 0, 2, leaf(0x20000))
    guest.set_entry(at[1], leaf(0x20000, read=False, write=False) | 1 << 55)
    assert_fault(guest.check(0, READ), Reason.RESERVED_BITS, 1, at[1])
    guest.set_entry(at[0], pointer(0x2000, 2) | 1 << 59)  # reserved in a pointer, not in a leaf
    assert_fault(guest.check(0, READ), Reason.RESERVED_BITS, 2, at[0])
    guest.set_entry(at[0], pointer(0x2000, 1))
    guest.set_entry(at[1], leaf(0x20000) | 1 << 59 | 1 << 60 | 1 << 63 | 0x1FE & ~(3 << 5))
    assert isinstance(guest.check(0, READ), Translation)


def assert_fault(answer: Translation | Fault, reason: Reason, level: int, gpa: int) -> None:
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.stage, answer.level, answer.gpa) == (reason, 1, level, gpa)


@pytest.mark.parametrize("level", range(1, 7))
@pytest.mark.parametrize("next_level", range(8))
def test_every_next_level_at_every_level(guest: Guest, level: int, next_level: int) -> None:
    """A root of each level whose first entry names each next level; page 2 then is a table of leaves."""
    guest.bind(PAGE, level)
    guest.set_entry(PAGE, pointer(0x2000, next_level))
    for entry in range(8):
        guest.set_entry(0x2000 + 8 * entry, leaf(0) if entry % 2 else sized_leaf(0, 13))
    for iova in (0, 0x1000, 0x1234, 1 << 21, 3 << 30, 5 << 39):
        guest.check(iova, READ)


@pytest.mark.parametrize("level", range(1, 6))
def test_sized_leaves_of_every_size(guest: Guest, level: int) -> None:
    """Sizes between the level's own and the next level's are legal, all others are not."""
    guest.bind(PAGE, level)
    legal = 0
    for size_lg2 in range(13, 54):
        guest.set_entry(PAGE, sized_leaf(0, size_lg2))
        offset = 0xFF8 if level == 1 else 0x7FF8
        answer = guest.check(offset, READ)
        if isinstance(answer, Translation):
            legal += 1
            assert default_size_lg2(level) < size_lg2 < default_size_lg2(level + 1)
            assert answer.gpa == offset
        else:
            assert answer.reason == Reason.BAD_LEVEL
    assert legal == (8 if level < 5 else 4)  # output addresses have 52 bits


def test_sized_leaf_is_aligned_to_its_size(guest: Guest) -> None:
    """32 KiB at GPA 0x8000, the entry repeated in eight slots as the specification asks."""
    guest.bind(PAGE, 1)
    for slot in range(8):
        guest.set_entry(PAGE + 8 * slot, sized_leaf(0x8000, 15))
    for slot in range(8):
        answer = guest.check(slot * PAGE + 0x10, READ)
        assert isinstance(answer, Translation)
        assert answer.gpa == 0x8000 + slot * PAGE + 0x10


@pytest.mark.parametrize("level", [2, 3, 4, 5])
def test_misaligned_leaf(guest: Guest, level: int) -> None:
    guest.bind(PAGE, level)
    for bit in range(12, default_size_lg2(level) + 1):
        guest.set_entry(PAGE, leaf(1 << bit))
        answer = guest.check(0, READ)
        if bit < default_size_lg2(level):
            assert_fault(answer, Reason.MISALIGNED, level, PAGE)


def test_skipped_levels_must_not_be_addressed(guest: Guest) -> None:
    """Level 6 leads straight to level 1: only 57 zero bits above the last index reach it."""
    guest.bind(PAGE, 6)
    guest.set_entry(PAGE, pointer(0x2000, 1))
    guest.set_entry(PAGE + 8, pointer(0x2000, 1))
    guest.set_entry(0x2000 + 8 * 5, leaf(0x20000))
    assert isinstance(guest.check(0x5000, READ), Translation)
    assert isinstance(guest.check(1 << 57 | 0x5000, READ), Translation)
    for bit in range(21, 57):
        assert_fault(guest.check(1 << bit | 0x5000, READ), Reason.ADDRESS_WIDTH, 6, PAGE)


@pytest.mark.parametrize("denied", range(4))
def test_permission_is_the_and_of_all_levels(guest: Guest, denied: int) -> None:
    iova = 0x1234_5000
    at = path_of(guest, iova, 4, leaf(0x20000))
    guest.set_entry(at[denied], guest.entry(at[denied]) & ~(1 << 62))
    answer = guest.check(iova, READ)
    assert isinstance(answer, Translation)
    assert answer.access == READ | Access.EXECUTE
    assert_fault(guest.check(iova, WRITE), Reason.PERMISSION, 1, at[3])
    guest.set_entry(at[denied], guest.entry(at[denied]) & ~(1 << 61))
    assert_fault(guest.check(iova, READ), Reason.PERMISSION, 1, at[3])


def test_permission_of_stage_2(guest: Guest) -> None:
    """A leaf that leads to ROM reads, and faults in stage 2 when written; tables may lie in ROM."""
    path_of(guest, 0, 4, leaf(48 * PAGE))
    assert isinstance(guest.check(0, READ), Translation)
    answer = guest.check(0x10, WRITE)
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.gpa, answer.reason) == (2, 48 * PAGE + 0x10, Reason.PERMISSION)
    guest.bind(49 * PAGE, 1)
    guest.set_entry(49 * PAGE, leaf(0x3000))
    assert isinstance(guest.check(0, WRITE), Translation)


def test_cycles_end(guest: Guest) -> None:
    """Tables that name themselves, or each other: a level never rises, so the walk stops at once."""
    for levels in range(1, 7):
        guest.bind(PAGE, levels)
        for slot in range(512):
            guest.set_entry(PAGE + 8 * slot, pointer(PAGE, 1 + slot % 6))
        for slot in range(8):
            guest.check(slot << 12, READ)
            guest.check(slot << default_size_lg2(levels), WRITE)


@pytest.mark.parametrize("gpa", [56 * PAGE, 1 << 47, 1 << 48, (1 << 52) - PAGE])
def test_tables_beyond_memory(guest: Guest, gpa: int) -> None:
    guest.bind(PAGE, 4)
    guest.set_entry(PAGE, pointer(gpa, 3))
    answer = guest.check(3 << 30, READ)
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.gpa) == (2, gpa + 24)
    guest.bind(gpa, 4)
    guest.check(0, READ)


def test_random_tables(guest: Guest) -> None:
    """Pages full of plausible and of random entries, read as tables of every level."""
    chance = random.Random(20)

    def entry() -> int:
        kind = chance.random()
        page = chance.choice([chance.randrange(48), chance.randrange(60), chance.randrange(1 << 40)]) << 12
        if kind < 0.55:
            made = pointer(page, chance.randrange(1, 7), read=chance.random() < 0.9, write=chance.random() < 0.8)
        elif kind < 0.7:
            made = leaf(page, read=chance.random() < 0.8, write=chance.random() < 0.8)
        elif kind < 0.85:
            made = sized_leaf(page, chance.randrange(13, 53))
        elif kind < 0.95:
            return chance.getrandbits(64)
        else:
            return 0
        return made ^ (1 << chance.randrange(64) if chance.random() < 0.1 else 0)

    seen: set[str] = set()
    for _ in range(60):
        filled = chance.sample(range(1, 48), 12)
        for page in filled:
            for slot in range(8):
                guest.set_entry(page * PAGE + 8 * slot, entry())
        for _ in range(60):
            guest.bind(chance.choice(filled) * PAGE, chance.randrange(1, 7))
            iova = sum(
                chance.choice((0, 0, 1, chance.randrange(8))) << default_size_lg2(level) for level in range(1, 7)
            )
            answer = guest.check((iova | chance.randrange(PAGE)) & (1 << 64) - 1, chance.choice((READ, WRITE)))
            seen.add("found" if isinstance(answer, Translation) else f"{answer.stage} {answer.reason.name}")
    assert len(seen) >= 8, f"the tables were too tame: {seen}"


@settings(deadline=None)
@given(entries=st.lists(st.integers(0, (1 << 64) - 1), min_size=4, max_size=4), iova=st.integers(0, (1 << 64) - 1))
def test_random_entries_on_a_path(shared: Guest, entries: list[int], iova: int) -> None:
    """Four tables in a row, the entry on the path of each made valid but for some bits."""
    iova &= (1 << 48) - 1
    for step, raw in enumerate(entries):
        noise = raw if raw & 0xF == 0 else 1 << (raw >> 4 & 63) if raw & 0xF == 1 else 0
        good = leaf(0x20000) if step == 3 else pointer(PAGE * (step + 2), 3 - step)
        shared.set_entry(PAGE * (step + 1) + 8 * index(iova, 4 - step), good ^ noise)
    shared.bind(PAGE, 4)
    shared.check(iova, READ)
    shared.check(iova, WRITE)


@pytest.fixture(scope="module")
def shared() -> Iterator[Guest]:
    """For hypothesis, which runs a test many times within one set-up: each run lays what it reads."""
    made = Guest()
    made.map(0, 48 * PAGE)
    yield made
    made.close()


def test_size_is_the_smaller_stage() -> None:
    """Stage 2 of 2 MiB leaves and of 4 KiB ones, under stage-1 leaves of 4 KiB, 64 KiB, 2 MiB and 1 GiB."""
    guest = Guest(ram=8 << 20, align=2 << 20)
    guest.map(0, 2 << 20)
    guest.map(2 << 20, 2 << 20, (2 << 20) + PAGE)  # not aligned alike: 4 KiB leaves
    guest.map(1 << 30, 2 << 20, 6 << 20)
    for base, stage2 in ((1 << 30, 2 << 20), (2 << 20, PAGE)):
        for level, entry, stage1 in (
            (1, leaf(base), PAGE),
            (1, sized_leaf(base, 16), 64 << 10),
            (2, leaf(base), 2 << 20),
            (3, leaf(base >> 30 << 30), 1 << 30),
        ):
            guest.bind(0, level)
            guest.set_entry(0, entry)
            iova = base % (1 << 30) if level == 3 else 0
            answer = guest.check(iova + 0x10, READ)
            assert isinstance(answer, Translation)
            assert answer.size == min(stage1, stage2) - 0x10
    guest.close()


@pytest.mark.parametrize("levels", [3, 4, 5, 6])
def test_host_space_alone(levels: int) -> None:
    """A device on stage 2: GPA == IOVA, faults of stage 2, and the levels' reach."""
    guest = Guest(stage2_levels=levels)
    guest.map(5 * PAGE, PAGE, 0, READ)
    found = guest.core.translate(DIRECT, 5 * PAGE + 3, READ)
    assert found == Translation(guest.ram.hva + 3, PAGE - 3, 5 * PAGE + 3, READ | Access.EXECUTE)
    for iova, access, reason in (
        (6 * PAGE, READ, Reason.NOT_PRESENT),
        (5 * PAGE, WRITE, Reason.PERMISSION),
        (1 << {3: 39, 4: 48, 5: 57, 6: 63}[levels], READ, Reason.NOT_PRESENT if levels == 6 else Reason.ADDRESS_WIDTH),
    ):
        answer = guest.core.translate(DIRECT, iova, access)
        assert isinstance(answer, Fault)
        assert (answer.stage, answer.gpa, answer.reason, answer.ioasid) == (2, iova, reason, STAGE2)
    guest.close()


A, D = 1 << 5, 1 << 6


@pytest.mark.parametrize(
    ("accessed", "dirty", "access", "pointers", "last"),
    [
        (False, False, WRITE, 0, 0),
        (True, False, READ, A, A),
        (True, False, WRITE, A, A),
        (True, True, READ, A, A),
        (True, True, WRITE, A, A | D),
    ],
)
def test_accessed_and_dirty(  # noqa: PLR0917  (one column each)
    guest: Guest, accessed: bool, dirty: bool, access: Access, pointers: int, last: int
) -> None:
    at = path_of(guest, 0x7000, 4, leaf(0x20000))
    before = [guest.entry(one) for one in at]
    guest.bind(guest.root, 4, accessed=accessed, dirty=dirty)
    answer = guest.core.translate(RID, 0x7000, access)
    assert isinstance(answer, Translation)
    expected = [entry | pointers for entry in before[:-1]] + [before[-1] | last]
    assert [guest.entry(one) for one in at] == expected


def test_no_accessed_bit_where_the_walk_fails(guest: Guest) -> None:
    at = path_of(guest, 0x7000, 2, leaf(0x20000, write=False))
    guest.bind(guest.root, 2, accessed=True, dirty=True)
    assert isinstance(guest.core.translate(RID, 0x7000, WRITE), Fault)
    assert guest.entry(at[1]) == leaf(0x20000, write=False)


def test_dirty_is_set_by_the_first_write_after_a_cached_read() -> None:
    guest = Guest(iotlb_entries=64)
    guest.map(0, 48 * PAGE)
    at = path_of(guest, 0x7000, 4, leaf(0x20000))
    guest.bind(guest.root, 4, accessed=True, dirty=True)
    assert guest.core.dma_read(RID, 0x7000, 4) == bytes(4)
    assert not guest.entry(at[3]) & D
    assert guest.core.dma_write(RID, 0x7000, b"data") is None
    assert guest.entry(at[3]) & D
    guest.set_entry(at[3], guest.entry(at[3]) & ~D)
    assert guest.core.dma_write(RID, 0x7000, b"more") is None
    assert not guest.entry(at[3]) & D, "cached as writable and dirty until the guest invalidates"
    guest.core.invalidate(CHILD)
    assert guest.core.dma_write(RID, 0x7000, b"last") is None
    assert guest.entry(at[3]) & D
    guest.close()


def test_accessed_bit_in_read_only_memory(guest: Guest) -> None:
    """The update needs stage 2's permission to write where the entry lies."""
    guest.bind(49 * PAGE, 1, accessed=True)
    guest.set_entry(49 * PAGE, leaf(0x3000))
    answer = guest.core.translate(RID, 0, READ)
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.gpa, answer.reason) == (2, 49 * PAGE, Reason.PERMISSION)
    guest.set_entry(49 * PAGE, leaf(0x3000) | A)
    assert isinstance(guest.core.translate(RID, 0, READ), Translation)
