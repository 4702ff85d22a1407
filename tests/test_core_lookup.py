"""Look-up: every entry on a path, what is decoded of it, the end that a request would come to, and no trace of it."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from amd_v1_reference import index, leaf, pointer
from core_guest import CHILD, DIRECT, PAGE, RID, STAGE2, Guest, Ram

from backend.core import (
    ANY_PASID,
    RW,
    Access,
    AmdGcr3,
    BadValueError,
    Core,
    Fault,
    Path,
    PlainMemory,
    Reason,
    Step,
    TableBuilder,
    Translation,
)

READ, WRITE = Access.READ, Access.WRITE
ROOT, MIDDLE, TABLE = PAGE, 2 * PAGE, 3 * PAGE
DATA = 0x20000
IOVA = 5 << 30 | 6 << 21 | 7 << 12 | 0x123
ACCESSED, DIRTY = 1 << 5, 1 << 6


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(iotlb_entries=64, ram=64 * PAGE)
    made.map(0, 64 * PAGE)
    made.bind(ROOT, 3)
    made.lay(IOVA, [ROOT, MIDDLE, TABLE], [pointer(MIDDLE, 2), pointer(TABLE, 1), leaf(DATA)])
    yield made
    made.close()


def word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def trace(guest: Guest) -> tuple[object, ...]:
    core = guest.core
    return core.counters(), core.space_counters(CHILD), core.route_counters(RID), core.faults(), bytes(guest.ram.map)


def test_every_entry_of_both_stages(guest: Guest) -> None:
    before = trace(guest)
    path = guest.core.lookup(RID, IOVA, access=WRITE)
    assert trace(guest) == before
    assert (path.ioasid, path.parent, path.stage1, path.stage2) == (CHILD, STAGE2, "amd-v1", "amd-v1")
    assert path.result == Translation(guest.ram.hva + DATA + 0x123, PAGE - 0x123, DATA + 0x123, RW | Access.EXECUTE)
    tables = (ROOT, MIDDLE, TABLE)
    entries = [
        (3, ROOT + 8 * 5, pointer(MIDDLE, 2)),
        (2, MIDDLE + 8 * 6, pointer(TABLE, 1)),
        (1, TABLE + 56, leaf(DATA)),
    ]
    assert [(step.level, step.address, step.entry) for step in path.steps if step.stage == 1] == entries
    assert [step.output for step in path.steps if step.stage == 1] == [*tables[1:], DATA]
    assert [(step.stage, step.level, step.table_of) for step in path.steps] == [
        *((2, level, 3) for level in (4, 3, 2, 1)), (1, 3, None),
        *((2, level, 2) for level in (4, 3, 2, 1)), (1, 2, None),
        *((2, level, 1) for level in (4, 3, 2, 1)), (1, 1, None),
        *((2, level, None) for level in (4, 3, 2, 1)),
    ]  # fmt: skip
    for step in path.steps:
        assert step.present and step.reason is None and step.access is not None
        assert step.leaf == (step.level == 1)
        assert step.size == (PAGE if step.leaf else None)
        if step.stage == 1:
            assert step.input == IOVA and step.accessed is False and step.dirty is (False if step.leaf else None)
            continue
        gpa = {3: ROOT + 40, 2: MIDDLE + 48, 1: TABLE + 56, None: DATA + 0x123}[step.table_of]
        assert step.input == gpa and step.accessed is None and step.dirty is None
        assert step.entry == word(step.address)
        assert step.address % PAGE == 8 * index(gpa, step.level)
        if step.leaf:
            assert step.output == guest.ram.hva + gpa // PAGE * PAGE
    for step, following in zip(path.steps, path.steps[1:], strict=False):
        if step.stage == following.stage == 2 and not step.leaf:
            assert following.address // PAGE * PAGE == step.output


def test_a_host_managed_space(guest: Guest) -> None:
    path = guest.core.lookup(DIRECT, 5 * PAGE + 1)
    assert (path.ioasid, path.parent, path.stage1, path.stage2) == (STAGE2, None, None, "amd-v1")
    assert [(step.stage, step.level, step.table_of) for step in path.steps] == [(2, n, None) for n in (4, 3, 2, 1)]
    assert path.result == guest.core.translate(DIRECT, 5 * PAGE + 1, READ)


def test_what_each_entry_permits(guest: Guest) -> None:
    guest.lay(IOVA, [ROOT, MIDDLE, TABLE], [pointer(MIDDLE, 2, write=False), pointer(TABLE, 1), leaf(DATA)])
    path = guest.core.lookup(RID, IOVA)
    rights = [step.access for step in path.steps if step.stage == 1]
    reads = READ | Access.EXECUTE
    assert rights == [reads, reads | WRITE, reads | WRITE]
    refused = guest.core.lookup(RID, IOVA, access=WRITE)
    assert isinstance(refused.result, Fault)
    assert (refused.result.reason, refused.result.stage, refused.result.level) == (Reason.PERMISSION, 1, 1)
    assert refused.steps[-1].reason == Reason.PERMISSION
    assert refused.steps[-1].address == refused.result.gpa == TABLE + 56


@pytest.mark.parametrize("accessed", [False, True])
@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("updating", [False, True])
def test_accessed_and_dirty_are_told_and_left_alone(guest: Guest, accessed: bool, dirty: bool, updating: bool) -> None:
    bits = ACCESSED * accessed | DIRTY * dirty
    guest.lay(
        IOVA,
        [ROOT, MIDDLE, TABLE],
        [pointer(MIDDLE, 2) | ACCESSED * accessed, pointer(TABLE, 1) | ACCESSED, leaf(DATA) | bits],
    )
    guest.bind(ROOT, 3, accessed=updating, dirty=updating)
    before = trace(guest)
    path = guest.core.lookup(RID, IOVA, access=WRITE)
    assert trace(guest) == before
    states = [(step.accessed, step.dirty) for step in path.steps if step.stage == 1]
    assert states == [(accessed, None), (True, None), (accessed, dirty)]
    assert isinstance(path.result, Translation)


def test_a_bit_to_set_where_stage_2_forbids_writing(guest: Guest) -> None:
    """The request would fault there: so does the look-up; and not once the bit is set."""
    guest.core.protect(STAGE2, MIDDLE, PAGE, READ)
    guest.bind(ROOT, 3, accessed=True)
    path = guest.core.lookup(RID, IOVA)
    answer = guest.core.translate(RID, IOVA, READ)
    assert path.result == answer
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.gpa, answer.reason, answer.table) == (2, MIDDLE + 48, Reason.PERMISSION, True)
    assert (path.steps[-1].table_of, path.steps[-1].reason) == (2, Reason.PERMISSION)
    guest.set_entry(MIDDLE + 48, pointer(TABLE, 1) | ACCESSED)
    assert isinstance(guest.core.lookup(RID, IOVA).result, Translation)


def test_routes_that_lead_nowhere(guest: Guest) -> None:
    core = guest.core
    path = core.lookup(0x7777, IOVA, pasid=9)
    assert (path.ioasid, path.parent, path.stage1, path.stage2, path.steps) == (None, None, None, None, ())
    assert isinstance(path.result, Fault)
    assert (path.result.reason, path.result.pasid) == (Reason.NO_ROUTE, 9)
    core.block(0x7777, None)
    assert replace(path.result, reason=Reason.BLOCKED, pasid=None) == core.lookup(0x7777, IOVA).result
    core.unbind_table(CHILD)
    path = core.lookup(RID, IOVA)
    assert (path.ioasid, path.parent, path.stage1, path.steps) == (CHILD, STAGE2, None, ())
    assert isinstance(path.result, Fault) and path.result.reason == Reason.NOT_BOUND
    far = core.lookup(RID, 1 << 64)
    assert isinstance(far.result, Fault) and far.result.reason == Reason.ADDRESS_WIDTH
    assert core.faults() == []
    for access in (Access(0), Access(16), Access.PRIVILEGED):
        with pytest.raises(BadValueError):
            core.lookup(RID, IOVA, access=access)


def test_a_table_whose_memory_is_gone() -> None:
    ram = Ram(8 * PAGE, memfd=True)
    core = Core()
    core.create_host_space(STAGE2)
    core.map(STAGE2, 0, ram.hva, 8 * PAGE, RW)
    core.create_nested_space(CHILD, STAGE2)
    core.bind_table(CHILD, fmt="amd-v1", root=0, levels=2)
    core.attach(RID, None, CHILD)
    ram.write(0, pointer(6 * PAGE, 1).to_bytes(8, "little"))
    os.ftruncate(ram.fd, 4 * PAGE)
    for _ in range(2):
        path = core.lookup(RID, 0x3000)
        assert path.result == core.translate(RID, 0x3000, READ)
        last = path.steps[-1]
        assert (last.stage, last.level, last.address, last.entry) == (1, 1, 6 * PAGE + 24, None)
        assert last.reason == Reason.MEMORY_GONE and not last.present
    core.close()
    ram.close()


def random_entry(chance: random.Random) -> int:
    following = chance.choice((0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7))
    entry = 1 | chance.randrange(62) << 12 | following << 9 | chance.choice((3, 3, 3, 3, 0, 1, 2)) << 61
    if following == 7:
        entry |= ((1 << chance.randrange(20)) - 1) << 12
    if not chance.randrange(12):
        entry ^= 1 << chance.randrange(64)
    return entry


def check_path(path: Path) -> None:
    """What holds of every path."""
    reasons = [step.reason for step in path.steps]
    assert all(reason is None for reason in reasons[:-1])
    if isinstance(path.result, Fault) and path.result.level:
        last: Step = path.steps[-1]
        found = (last.stage, last.level, last.entry or 0, last.reason)
        assert found == (path.result.stage, path.result.level, path.result.entry, path.result.reason)
        assert path.result.gpa == (last.address if last.stage == 1 else last.input)


@pytest.mark.parametrize("updating", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_it_ends_as_a_request_would(seed: int, updating: bool) -> None:
    """Hostile tables: the result is that of the request made afterwards, to the last field."""
    chance = random.Random(seed)
    guest = Guest(ram=64 * PAGE)
    guest.map(0, 40 * PAGE)
    guest.map(44 * PAGE, 16 * PAGE, 44 * PAGE, READ)
    results = set[str]()
    for _ in range(300):
        for page in range(64):
            for slot in (0, 1, 2, chance.randrange(512)):
                guest.ram.write(page * PAGE + 8 * slot, random_entry(chance).to_bytes(8, "little"))
        levels = chance.choice((1, 2, 2, 3, 3, 4, 5, 6))
        guest.bind(chance.randrange(60) * PAGE, levels, accessed=updating, dirty=updating)
        slots = levels if chance.randrange(8) else 6
        iova = sum(chance.choice((0, 0, 1, 2)) << 12 + 9 * level for level in range(slots)) % (1 << 64)
        iova += chance.randrange(PAGE)
        access = chance.choice((READ, WRITE, RW, Access.EXECUTE, READ | Access.PRIVILEGED))
        guest.core.faults()
        before = trace(guest)
        path = guest.core.lookup(RID, iova, access=access)
        assert trace(guest) == before
        check_path(path)
        assert path.result == guest.core.translate(RID, iova, access)
        results.add(path.result.reason.name if isinstance(path.result, Fault) else "found")
    assert results >= {"found", "NOT_PRESENT", "RESERVED_BITS", "BAD_LEVEL", "PERMISSION", "ADDRESS_WIDTH"}
    guest.close()


FORMATS = {
    "amd-v1": 3, "x86": 4, "vtd-second-stage": 4, "ept": 4, "arm-s1": 4, "arm-s2": 4, "riscv": 4, "riscv-x4": 3,
}  # fmt: skip
"""Format of the guest's table -> levels."""
ALWAYS_UPDATING = {"x86"}


@pytest.mark.parametrize("updating", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(fmt: str, updating: bool) -> None:
    """A table as a guest builds it, then any bit of the entries on the path flipped: each ends as a request does."""
    chance, levels, size = random.Random(fmt), FORMATS[fmt], 32 * PAGE
    options = {} if fmt in ALWAYS_UPDATING else {"accessed": updating, "dirty": updating}
    seen = set[str]()
    with PlainMemory(size) as memory:
        core = Core(iotlb_entries=0)
        stage2 = chance.choice(("amd-v1", "ept", "x86"))
        core.create_host_space(STAGE2, fmt=stage2)
        core.map(STAGE2, 0, memory.hva, size, RW)
        core.create_nested_space(CHILD, STAGE2)
        core.attach(RID, None, CHILD)
        builder = TableBuilder(fmt, memory, levels=levels, first=16 * PAGE, **options)
        iova = chance.randrange(1 << 38) // PAGE * PAGE
        builder.map(iova, 5 * PAGE, PAGE, RW)
        core.bind_table(CHILD, **builder.binding)
        path = core.lookup(RID, iova)
        own = [step for step in path.steps if step.stage == 1]
        assert (path.stage1, path.stage2, len(own)) == (fmt, stage2, levels)
        for step, bit in ((step, bit) for step in own for bit in range(64)):
            assert step.entry is not None
            memory[step.address : step.address + 8] = (step.entry ^ 1 << bit).to_bytes(8, "little")
            for access in chance.sample((READ, WRITE, Access.EXECUTE, WRITE | Access.PRIVILEGED), 2):
                before = bytes(memory[0:size])
                ended = core.lookup(RID, iova, access=access)
                assert memory[0:size] == before
                check_path(ended)
                assert ended.result == core.translate(RID, iova, access), f"bit {bit} of level {step.level}"
                seen.add(ended.result.reason.name if isinstance(ended.result, Fault) else "found")
                memory[0:size] = before
            memory[step.address : step.address + 8] = step.entry.to_bytes(8, "little")
        core.close()
    assert seen >= {"found", "NOT_PRESENT"}


DBM = 1 << 51 | 1 << 10  # and AF
# Bits of a leaf (set, cleared) and what it then tells of accessed and dirty.
STATES: dict[str, list[tuple[int, int, bool, bool | None]]] = {
    "amd-v1": [(0, 0, False, False), (1 << 5, 0, True, False), (3 << 5, 0, True, True)],
    "x86": [(0, 0, False, False), (1 << 5, 0, True, False), (3 << 5, 0, True, True)],
    "vtd-second-stage": [(0, 0, False, False), (1 << 8, 0, True, False), (3 << 8, 0, True, True)],
    "ept": [(0, 0, False, False), (1 << 8, 0, True, False), (3 << 8, 0, True, True)],
    # AF; DBM with AP[2] set: clean, clear: dirty; without DBM there is no dirty state
    "arm-s1": [(0, DBM | 1 << 10, False, None), (DBM | 1 << 7, 0, True, False), (DBM, 1 << 7, True, True)],
    # ... and S2AP[1] the other way round
    "arm-s2": [(0, DBM | 1 << 10, False, None), (DBM, 1 << 7, True, False), (DBM | 1 << 7, 0, True, True)],
    "riscv": [(0, 3 << 6, False, False), (1 << 6, 1 << 7, True, False), (3 << 6, 0, True, True)],
    "riscv-x4": [(0, 3 << 6, False, False), (1 << 6, 1 << 7, True, False), (3 << 6, 0, True, True)],
}


@pytest.mark.parametrize("updating", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_accessed_and_dirty_of_every_format(fmt: str, updating: bool) -> None:
    """Whether walks update them or not. Tables have an accessed bit in some formats, no entry but a leaf is dirty."""
    in_tables = fmt in {"amd-v1", "x86", "vtd-second-stage", "ept"}
    with PlainMemory(32 * PAGE) as memory:
        core = Core()
        core.create_host_space(STAGE2)
        core.map(STAGE2, 0, memory.hva, 32 * PAGE, RW)
        core.create_nested_space(CHILD, STAGE2)
        core.attach(RID, None, CHILD)
        options = {} if fmt in ALWAYS_UPDATING else {"accessed": updating, "dirty": updating}
        builder = TableBuilder(fmt, memory, levels=FORMATS[fmt], first=16 * PAGE, **options)
        builder.map(0x7000, 5 * PAGE, PAGE, RW)
        core.bind_table(CHILD, **builder.binding)
        for bits, cleared, accessed, dirty in STATES[fmt]:
            own = [step for step in core.lookup(RID, 0x7000).steps if step.stage == 1]
            at, entry = own[-1].address, own[-1].entry
            assert entry is not None
            memory[at : at + 8] = (entry & ~cleared | bits).to_bytes(8, "little")
            own = [step for step in core.lookup(RID, 0x7000).steps if step.stage == 1]
            for step in own[:-1]:
                assert (step.accessed, step.dirty) == (False if in_tables else None, None)
            assert (own[-1].accessed, own[-1].dirty, own[-1].output) == (accessed, dirty, 5 * PAGE)
        core.close()


def test_through_a_pasid_table() -> None:
    """GCR3 of two levels (AMD 48882, 2.2.6.2): root entry, then the one of the PASID, then its x86 table."""
    with PlainMemory(64 * PAGE) as memory:
        core = Core()
        core.create_host_space(STAGE2)
        core.map(STAGE2, 0, memory.hva, 64 * PAGE, RW)
        core.create_nested_space(CHILD, STAGE2)
        core.attach(RID, ANY_PASID, CHILD)
        builder = TableBuilder("x86", memory, first=32 * PAGE)
        builder.map(0x7000, 5 * PAGE, PAGE, RW)
        root, inner, pasid = 3 * PAGE, 4 * PAGE, 0x203
        memory[root + 8 : root + 16] = (inner | 1).to_bytes(8, "little")
        memory[inner + 24 : inner + 32] = (builder.root | 1).to_bytes(8, "little")
        core.bind_pasid_table(CHILD, fmt=AmdGcr3(levels=2), root=root)
        before = bytes(memory[0 : 64 * PAGE]), core.counters()
        path = core.lookup(RID, 0x7008, pasid=pasid)
        assert (bytes(memory[0 : 64 * PAGE]), core.counters()) == before
        assert (path.ioasid, path.parent, path.stage1) == (CHILD, STAGE2, "x86")
        assert isinstance(path.result, Translation) and path.result.gpa == 5 * PAGE + 8
        own = [(step.pasid_table, step.level, step.address, step.input) for step in path.steps if step.stage == 1]
        assert own[:2] == [(True, 2, root + 8, pasid), (True, 1, inner + 24, pasid)]
        assert [(table, level, iova) for table, level, _, iova in own[2:]] == [(False, n, 0x7008) for n in (4, 3, 2, 1)]
        leading = [(step.pasid_table, step.table_of) for step in path.steps if step.stage == 2 and step.level == 1]
        assert leading == [(True, 2), (True, 1), (False, 4), (False, 3), (False, 2), (False, 1), (False, None)]
        assert path.result == core.translate(RID, 0x7008, READ, pasid=pasid)
        memory[inner + 24 : inner + 32] = bytes(8)
        assert isinstance(core.translate(RID, 0x7008, READ, pasid=pasid), Translation), "it is kept until invalidated"
        gone = core.lookup(RID, 0x7008, pasid=pasid)
        assert isinstance(gone.result, Fault) and gone.steps[-1].reason == gone.result.reason == Reason.NOT_PRESENT
        assert gone.result.pasid_table and gone.result.gpa == inner + 24
        core.invalidate(CHILD, pasid=pasid)
        assert core.translate(RID, 0x7008, READ, pasid=pasid) == gone.result
        assert isinstance(core.lookup(RID, 0x7008).result, Fault)
        core.close()
