"""A guest-managed IOASID beneath a guest-managed one: AMD-Vi's guest and host table together; what reaches what."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from guest_ram import PAGE, AmdTables
from ioasid_guest import DEV1, GOLDEN, Guest, gcr3_table, refused, x86_tables

from backend.core import RW, Access, Fault, Reason, Translation
from backend.ioasid import Kind, PasidTableFormat, PgtableFormat, Untagged

READ, WRITE = Access.READ, Access.WRITE
X86 = PgtableFormat("x86", 4)
ROOT, MIDDLE, TOP = 1, 2, 3
IOVA = 0x7000_0000
SHIFT = 0x10_0000_0000
"""What the table in the middle adds: an address of its space lies at that less SHIFT of memory."""
A, D = 1 << 5, 1 << 6
"""Of AMD's host tables (48882, table 16) and of x86-64 alike."""
PAGES = 96


class Stack(Guest):
    """1: memory. 2: the table in the middle leads [SHIFT, SHIFT + memory) to it. 3: a table of x86's above."""

    def __init__(self) -> None:
        super().__init__(pages=PAGES)
        ctx = self.ctx
        assert (ctx.alloc(), ctx.create_nesting(ROOT), ctx.create_nesting(MIDDLE)) == (ROOT, MIDDLE, TOP)
        ctx.map_dma(ROOT, 0, GOLDEN, self.ram.size)
        self.middle = AmdTables(self.ram, 0x40000)
        for page in range(PAGES):
            self.middle.map(SHIFT + page * PAGE, page * PAGE)

    def bind_middle(self, *, used: bool = False) -> None:
        self.ctx.bind_pgtable(MIDDLE, self.middle.root, PgtableFormat(accessed=used, dirty=used))

    def lay(self, base: int, mappings: dict[int, int]) -> int:
        """Tables of x86's at `base` of memory, whose addresses are those of the middle; the root's."""
        x86_tables(self.ram, base, mappings)
        tables = [base]
        for table in tables:
            for slot in range(table, table + PAGE, 8):
                entry = self.entry(slot)
                if entry:
                    self.ram.poke(slot, struct.pack("<Q", entry + SHIFT))
                    if entry & -PAGE not in mappings.values():
                        tables.append(entry & -PAGE)
        return base + SHIFT

    def attach(self) -> None:
        for ioasid in (ROOT, MIDDLE, TOP):
            self.ctx.attach(DEV1, ioasid)

    def entry(self, at: int) -> int:
        return int(struct.unpack("<Q", self.ram.peek(at, 8))[0])

    def middle_leaf(self, gpa: int) -> int:
        """Where the leaf of the middle's table for SHIFT + gpa lies."""
        address, table = SHIFT + gpa, self.middle.root
        for level in (4, 3, 2):
            table = self.entry(table + (address >> (12 + 9 * (level - 1)) & 511) * 8) & 0x000FFFFFFFFFF000
        return table + (address >> 12 & 511) * 8


@pytest.fixture
def stack() -> Iterator[Stack]:
    stack = Stack()
    yield stack
    stack.close()


@pytest.fixture
def walked(stack: Stack) -> Stack:
    """IOVA leads to 0x4000 of memory, the next page to 0x6000."""
    root = stack.lay(0x10000, {IOVA: 0x4000, IOVA + PAGE: 0x6000})
    stack.bind_middle()
    stack.ctx.bind_pgtable(TOP, root, X86)
    stack.attach()
    return stack


def test_three_tables(walked: Stack) -> None:
    found = walked.found(DEV1, IOVA + 0x123)
    assert (found.hva, found.gpa, found.size) == (GOLDEN + 0x4123, 0x4123, PAGE - 0x123)
    assert walked.dev1.port.write(IOVA, b"through three") is None
    assert walked.ram.peek(0x4000, 13) == b"through three"
    path = walked.ctx.lookup(TOP, IOVA)
    assert (path.parent, path.stage1, path.middle, path.stage2) == (MIDDLE, "x86", "amd-v1", "amd-v1")
    assert isinstance(path.result, Translation) and path.result.gpa == 0x4000
    assert [step.level for step in path.steps if step.stage == 1 and not step.middle] == [4, 3, 2, 1]
    assert [step.level for step in path.steps if step.stage == 1 and step.middle] == [4, 3, 2, 1] * 5
    assert [step.table_of for step in path.steps if step.middle and step.stage == 1][-4:] == [None] * 4


def test_accessed_and_dirty_bits_of_both(stack: Stack) -> None:
    root = stack.lay(0x10000, {IOVA: 0x4000, IOVA + PAGE: 0x6000})
    stack.bind_middle(used=True)
    stack.ctx.bind_pgtable(TOP, root, X86)
    stack.attach()
    stack.ctx.set_dirty_tracking(ROOT, True)
    data, table = stack.middle_leaf(0x4000), stack.middle_leaf(0x13000)
    assert stack.dev1.port.read(IOVA, 1) == b"\0"
    assert stack.entry(data) & (A | D) == A, "read"
    assert stack.entry(table) & (A | D) == A | D, "the accessed bit of the table above was written through it"
    assert stack.dev1.port.write(IOVA, b"w") is None
    assert stack.entry(data) & (A | D) == A | D
    assert stack.entry(stack.middle_leaf(0x6000)) & (A | D) == 0
    dirty = stack.ctx.get_dirty_bitmap(ROOT, 0, stack.ram.size)
    written = {page * PAGE for page in range(PAGES) if dirty[page // 8] >> page % 8 & 1}
    assert {0x4000, 0x10000, 0x11000, 0x12000, 0x13000, data & -PAGE} <= written, "the tables of both are memory, too"
    assert 0x6000 not in written


def test_a_page_that_is_dirty_above_and_clean_in_the_middle(stack: Stack) -> None:
    """What a read left in the IOTLB serves no write: the middle's dirty bit is to be set. Of data, and of a table whose
    own entry is to become dirty."""
    root = stack.lay(0x10000, {IOVA: 0x4000, IOVA + PAGE: 0x6000})
    used = 0x13000 + (IOVA >> 12 & 511) * 8
    stack.ram.poke(used, struct.pack("<Q", stack.entry(used) | A | D))
    stack.bind_middle(used=True)
    stack.ctx.bind_pgtable(TOP, root, X86)
    stack.attach()
    data = stack.middle_leaf(0x4000)
    assert stack.dev1.port.read(IOVA, 1) == b"\0" and stack.entry(data) & (A | D) == A
    assert stack.dev1.port.write(IOVA, b"w") is None and stack.entry(data) & (A | D) == A | D
    assert stack.entry(stack.middle_leaf(0x13000)) & (A | D) == A, "no entry of that page has changed"
    assert stack.dev1.port.write(IOVA + PAGE, b"w") is None
    assert stack.entry(stack.middle_leaf(0x13000)) & (A | D) == A | D


def test_faults_tell_which_table(walked: Stack) -> None:
    ram, port = walked.ram, walked.dev1.port
    heard: list[Fault] = []
    walked.engine.on_fault(heard.append)

    def fault(iova: int = IOVA, access: Access = READ) -> Fault:
        walked.ctx.invalidate_cache(MIDDLE)
        answer = port.read(iova, 1) if access == READ else port.write(iova, b"x")
        assert isinstance(answer, Fault) and heard[-1] == answer and answer.ioasid == TOP
        (record,) = walked.ctx.read_faults().records
        assert (record.stage, record.level, record.gpa, record.middle) == (
            answer.stage, answer.level, answer.gpa, answer.middle,
        )  # fmt: skip
        told = walked.ctx.lookup(TOP, iova, access=access).result
        assert isinstance(told, Fault) and replace(told, rid=DEV1) == answer
        return answer

    top = fault(IOVA + 2 * PAGE)
    assert (top.stage, top.middle, top.level, top.reason) == (1, None, 1, Reason.NOT_PRESENT)
    assert top.gpa == SHIFT + 0x13000 + ((IOVA >> 12 & 511) + 2) * 8
    slot = walked.middle_leaf(0x4000)
    raw = walked.entry(slot)
    ram.poke(slot, bytes(8))
    data = fault()
    assert (data.stage, data.middle, data.level, data.reason, data.gpa, data.table) == (
        1, SHIFT + 0x4000, 1, Reason.NOT_PRESENT, slot, False,
    )  # fmt: skip
    ram.poke(slot, struct.pack("<Q", raw & ~(1 << 62)))
    refused_write = fault(access=WRITE)
    assert (refused_write.stage, refused_write.middle, refused_write.reason) == (1, SHIFT + 0x4000, Reason.PERMISSION)
    ram.poke(slot, struct.pack("<Q", raw & ~0xFFFFFFFFFF000 | 1 << 40))
    host = fault()
    assert (host.stage, host.middle, host.gpa, host.reason, host.table) == (
        2, SHIFT + 0x4000, 1 << 40, Reason.NOT_PRESENT, False,
    )  # fmt: skip
    ram.poke(slot, struct.pack("<Q", raw))
    table = walked.middle_leaf(0x12000)
    raw = walked.entry(table)
    ram.poke(table, bytes(8))
    above = fault()
    assert (above.stage, above.table, above.gpa, above.level) == (1, True, table, 1)
    assert above.middle == SHIFT + 0x12000 + (IOVA >> 21 & 511) * 8
    ram.poke(table, struct.pack("<Q", raw))
    walked.ctx.invalidate_cache(MIDDLE)
    assert port.read(IOVA, 1) == b"\0"
    walked.ctx.unbind_pgtable(MIDDLE)
    nowhere = fault_of(port.read(IOVA, 1))
    assert (nowhere.stage, nowhere.reason) == (0, Reason.NOT_BOUND) and nowhere.middle is not None


def fault_of(answer: object) -> Fault:
    assert isinstance(answer, Fault)
    return answer


def rebind(stack: Stack) -> None:
    stack.ctx.unbind_pgtable(MIDDLE)
    stack.bind_middle()


@pytest.mark.parametrize("lost", ["middle", "top"])
def test_tables_whose_memory_is_taken_away(stack: Stack, lost: str) -> None:
    root = stack.lay(0x58000, {IOVA: 0x4000})
    stack.bind_middle()
    stack.ctx.bind_pgtable(TOP, root, X86)
    stack.attach()
    os.ftruncate(stack.ram.fd, 0x40000 if lost == "middle" else 0x58000)
    answer = fault_of(stack.dev1.port.read(IOVA, 1))
    assert (answer.reason, answer.stage, answer.level, answer.table) == (Reason.MEMORY_GONE, 1, 4, True)
    top = SHIFT + 0x58000 + (IOVA >> 39) * 8
    if lost == "middle":
        assert (answer.middle, answer.gpa) == (top, stack.middle.root + (top >> 39 & 511) * 8)
    else:
        assert (answer.middle, answer.gpa) == (None, top)
    told = fault_of(stack.ctx.lookup(TOP, IOVA).result)
    assert replace(told, rid=DEV1) == answer


CHANGES: list[tuple[str, Callable[[Stack], None]]] = [
    ("all", lambda s: s.ctx.invalidate_cache(MIDDLE)),
    ("range", lambda s: s.ctx.invalidate_cache(MIDDLE, granularity="range", iova=SHIFT + 0x4000, size=PAGE)),
    ("rebound", rebind),
    ("device", lambda s: s.ctx.invalidate_cache(MIDDLE, granularity="device", rid=DEV1)),
]


@pytest.mark.parametrize("change", [call for _, call in CHANGES], ids=[name for name, _ in CHANGES])
def test_what_ends_in_the_middle_ends_above(walked: Stack, change: Callable[[Stack], None]) -> None:
    """The IOTLB and the walk caches have all of it; then the middle leads elsewhere, and says so."""
    told: list[tuple[int | None, int, int | None]] = []

    def tlb(pasid: int | None, iova: int, size: int | None, done: Callable[[], None]) -> None:
        told.append((pasid, iova, size))
        done()

    walked.engine.set_tlb(walked.dev1, tlb)
    for iova in (IOVA, IOVA + PAGE):
        assert walked.found(DEV1, iova).gpa in {0x4000, 0x6000}
    walked.middle.map(SHIFT + 0x4000, 0x8000)
    assert walked.found(DEV1, IOVA).gpa == 0x4000, "cached"
    change(walked)
    assert walked.found(DEV1, IOVA).gpa == 0x8000
    assert walked.found(DEV1, IOVA + PAGE).gpa == 0x6000
    assert (None, 0, None) in told


def test_memory_that_goes_and_comes_elsewhere(walked: Stack) -> None:
    """A change of ours reaches all tables above, and what walks of the middle remember."""
    ctx = walked.ctx
    assert walked.found(DEV1, IOVA).hva == GOLDEN + 0x4000
    ctx.unmap_dma(ROOT, 0, walked.ram.size)
    assert walked.hva(DEV1, IOVA) == Reason.NOT_PRESENT
    copy = walked.ram.size // 2
    ctx.map_dma(ROOT, 0, GOLDEN, copy)
    assert walked.hva(DEV1, IOVA) == Reason.NOT_PRESENT, "the middle's tables lie beyond"
    ctx.map_dma(ROOT, copy, GOLDEN + copy, copy)
    assert walked.found(DEV1, IOVA).hva == GOLDEN + 0x4000
    ctx.detach(DEV1)
    assert walked.found(DEV1, SHIFT + 0x4000).gpa == 0x4000, "the middle routes by itself"
    ctx.detach(DEV1)
    assert walked.found(DEV1, 0x4000).gpa == 0x4000


def test_translations_for_devices(stack: Stack) -> None:
    root = stack.lay(0x10000, {IOVA: 0x4000, IOVA + PAGE: 0x5000, IOVA + 2 * PAGE: 0x8000})
    stack.bind_middle(used=True)
    stack.ctx.bind_pgtable(TOP, root, X86)
    for ioasid in (ROOT, MIDDLE):
        stack.ctx.attach(DEV1, ioasid)
    stack.ctx.attach(DEV1, TOP, ats=True)
    port = stack.dev1.port
    reply = port.translate(IOVA, 3 * PAGE, READ)
    assert [each[:3] for each in reply.translations] == [(IOVA, 2 * PAGE, 0x4000), (IOVA + 2 * PAGE, PAGE, 0x8000)]
    assert not any(each.access & WRITE for each in reply.translations), "the middle's pages are clean"
    assert all(each.access & RW == RW for each in port.translate(IOVA, 3 * PAGE, WRITE).translations)
    assert stack.entry(stack.middle_leaf(0x5000)) & D
    assert port.translated.read(0x8000, 1) == b"\0"


def test_a_pasid_table_above_a_table_of_the_guests(stack: Stack) -> None:
    """The GCR3 table lies at addresses of memory, what it leads to at those of the middle; without PASID, the middle
    alone translates (DTE with GV set, GIOV clear and Mode not 0)."""
    ctx = stack.ctx
    roots = {1: stack.lay(0x10000, {IOVA: 0x4000}), 2: stack.lay(0x18000, {IOVA: 0x6000})}
    stack.bind_middle()
    ctx.bind_pasid_table(TOP, gcr3_table(stack.ram, 0x20000, roots), PasidTableFormat(levels=1), Untagged.PARENT)
    stack.attach()
    assert [stack.found(DEV1, IOVA, pasid=pasid).gpa for pasid in (1, 2)] == [0x4000, 0x6000]
    assert stack.found(DEV1, SHIFT + 0x5000).gpa == 0x5000
    missing = stack.engine.core.translate(DEV1, IOVA, READ, pasid=3)
    assert isinstance(missing, Fault) and missing.pasid_table and missing.gpa == 0x20000 + 3 * 8
    stack.middle.map(SHIFT + 0x4000, 0x9000)
    ctx.invalidate_cache(MIDDLE, granularity="range", iova=SHIFT + 0x4000, size=PAGE)
    assert [stack.found(DEV1, IOVA, pasid=pasid).gpa for pasid in (1, 2)] == [0x9000, 0x6000]
    gcr3_table(stack.ram, 0x20000, {1: roots[2]})
    ctx.invalidate_cache(TOP, granularity="pasid", pasid=1)
    assert stack.found(DEV1, IOVA, pasid=1).gpa == 0x6000
    path = ctx.lookup(TOP, IOVA, pasid=1)
    assert isinstance(path.result, Translation) and path.result.gpa == 0x6000
    first = next(step for step in path.steps if step.stage == 1)
    assert first.pasid_table and first.address == 0x20000 + 8 and path.middle == "amd-v1"
    ctx.detach(DEV1)
    assert stack.hva(DEV1, IOVA, pasid=1) == Reason.NO_ROUTE


def test_what_is_refused(walked: Stack) -> None:
    ctx = walked.ctx
    fmt = PasidTableFormat(levels=1)
    assert refused(lambda: ctx.create_nesting(TOP)) == errno.EINVAL, "two tables of guests, and no more"
    assert refused(lambda: ctx.alloc(Kind.USER, parent=TOP)) == errno.EINVAL
    assert refused(lambda: ctx.create_nesting(MIDDLE, Kind.KERNEL)) == errno.EINVAL
    assert refused(lambda: ctx.free(MIDDLE)) == errno.EBUSY
    ctx.unbind_pgtable(MIDDLE)
    assert refused(lambda: ctx.bind_pasid_table(MIDDLE, 0x20000, fmt)) == errno.EINVAL
    lone = ctx.create_nesting(ROOT)
    ctx.bind_pasid_table(lone, 0x20000, fmt)
    assert refused(lambda: ctx.create_nesting(lone)) == errno.EINVAL
    assert ctx.get_info(lone).nesting == () == ctx.get_info(TOP).nesting
    assert ctx.get_info(MIDDLE).nesting == ("hardware",)
    assert refused(lambda: ctx.attach(DEV1, lone)) == errno.EBUSY
