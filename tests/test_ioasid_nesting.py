"""Software nesting: kernel IOASIDs beneath kernel IOASIDs, merged, following what their parents do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import closing

import pytest
from guest_ram import PAGE, AmdTables, Ram

from backend.core import Access, Core, Fault, Reason
from backend.ioasid import Engine, IoasidError, Kind, PgtableFormat

R, W, RW = Access.READ, Access.WRITE, Access.READ | Access.WRITE
RAM_PAGES = 64


class Counted(Core):
    """Counts changes of tables."""

    changes = 0

    def map(self, ioasid: int, iova: int, hva: int, size: int, access: Access) -> None:
        self.changes += 1
        super().map(ioasid, iova, hva, size, access)

    def unmap(self, ioasid: int, iova: int, size: int) -> None:
        self.changes += 1
        super().unmap(ioasid, iova, size)


class Nest:
    """A root over RAM whose page n begins with n, and a device for each IOASID."""

    def __init__(self) -> None:
        self.ram = Ram(RAM_PAGES * PAGE)
        for page in range(RAM_PAGES):
            self.ram.poke(page * PAGE, page.to_bytes(8, "little"))
        self.core = Counted()
        self.engine = Engine(self.core)
        self.ctx = self.engine.open()
        self.chains: dict[int, list[int]] = {}
        self.root = self.ctx.alloc()
        self.reach(self.root, None)

    def reach(self, ioasid: int, parent: int | None) -> None:
        """Attach a device of its own to all that stands above an IOASID, and to it."""
        self.chains[ioasid] = [*(self.chains[parent] if parent is not None else []), ioasid]
        self.engine.add_device(ioasid, f"device of {ioasid}")
        self.ctx.bind_device(ioasid)
        for each in self.chains[ioasid]:
            self.ctx.attach(ioasid, each)

    def beneath(self, parent: int) -> int:
        child = self.ctx.create_nesting(parent, Kind.KERNEL)
        self.reach(child, parent)
        return child

    def map_ram(self, iova: int, page: int, pages: int = 1, access: Access = RW) -> None:
        self.ctx.map_dma(self.root, iova * PAGE, self.ram.hva + page * PAGE, pages * PAGE, access)

    def map(self, ioasid: int, iova: int, target: int, pages: int = 1, access: Access = RW) -> None:
        self.ctx.map_dma(ioasid, iova * PAGE, target * PAGE, pages * PAGE, access)

    def unmap(self, ioasid: int, iova: int, pages: int = 1) -> None:
        self.ctx.unmap_dma(ioasid, iova * PAGE, pages * PAGE)

    def sees(self, ioasid: int, *pages: int) -> list[int | None]:
        """The page of RAM that each page of an IOASID leads to."""
        answers = (self.engine.devices[ioasid].port.load(page * PAGE, 8) for page in pages)
        return [None if isinstance(answer, Fault) else answer for answer in answers]

    def writable(self, ioasid: int, page: int) -> bool:
        return not isinstance(self.core.translate(ioasid, page * PAGE, W), Fault)

    def close(self) -> None:
        self.ctx.close()
        counters = self.core.counters()
        assert (counters.spaces, counters.table_pages) == (0, 0)
        self.engine.close()
        self.ram.close()


@pytest.fixture
def nest() -> Iterator[Nest]:
    with closing(Nest()) as nest:
        yield nest


def test_the_flow_of_the_rfc() -> None:
    """v1 section 5.3: GPA [0, 1G) stands at HVA 0x40000000, the guest maps GIOVA 0x2000 -> GPA 0x1000."""
    with closing(Engine()) as engine:
        ctx = engine.open()
        engine.add_device(2, "dev2")
        ctx.bind_device(2)
        gpa = ctx.alloc()
        ctx.attach(2, gpa)
        ctx.map_dma(gpa, 0, 0x40000000, 1 << 30)
        giova = ctx.create_nesting(gpa, Kind.KERNEL)
        ctx.attach(2, giova)  # attached without detaching
        ctx.map_dma(giova, 0x2000, 0x1000, PAGE)
        answer = engine.core.translate(2, 0x2000, RW)
        assert not isinstance(answer, Fault)
        assert (answer.hva, answer.size, answer.access & RW) == (0x40001000, PAGE, RW)
        assert ctx.get_info(giova).parent == gpa
        ctx.detach(2)
        answer = engine.core.translate(2, 0x1000, RW)
        assert not isinstance(answer, Fault) and answer.hva == 0x40001000, "the parent routes again"


def test_a_child_leads_where_its_parent_does(nest: Nest) -> None:
    nest.map_ram(0, 10, 4)
    child = nest.beneath(nest.root)
    nest.map(child, 100, 2, 2)
    nest.map(child, 200, 0)
    assert nest.sees(child, 99, 100, 101, 102, 200) == [None, 12, 13, None, 10]
    assert nest.engine.devices[child].port.store(101 * PAGE + 8, 77, 8) is None
    assert nest.ram.peek(13 * PAGE + 8, 8) == (77).to_bytes(8, "little")
    nest.unmap(child, 100, 2)
    assert nest.sees(child, 100, 101, 200) == [None, None, 10]


def test_what_the_parent_loses_and_gains_again_so_do_all_beneath(nest: Nest) -> None:
    child = nest.beneath(nest.root)
    grandchild = nest.beneath(child)
    deepest = nest.beneath(grandchild)
    nest.map(deepest, 7, 31, 2)  # the last one first: nothing is there yet
    nest.map(grandchild, 31, 21, 2)
    nest.map(child, 20, 4, 8)
    assert nest.sees(deepest, 7, 8) == [None, None]
    nest.map_ram(5, 40)
    nest.map_ram(6, 50)
    assert nest.sees(deepest, 7, 8) == [40, 50]
    assert nest.sees(grandchild, 31, 32) == nest.sees(child, 21, 22) == [40, 50]
    nest.unmap(nest.root, 6)
    assert nest.sees(deepest, 7, 8) == [40, None], "cached translations included"
    nest.map_ram(6, 51)
    assert nest.sees(deepest, 7, 8) == [40, 51]
    nest.unmap(child, 20, 8)
    assert nest.sees(deepest, 7, 8) == nest.sees(grandchild, 31, 32) == [None, None]
    assert nest.sees(nest.root, 5, 6) == [40, 51]


def test_mappings_that_meet_the_parents_in_parts(nest: Nest) -> None:
    for iova, page, pages in ((0, 0, 3), (4, 20, 1), (6, 30, 4)):
        nest.map_ram(iova, page, pages)
    child = nest.beneath(nest.root)
    nest.map(child, 50, 1, 7)
    expected: list[int | None] = [None, 1, 2, None, 20, None, 30, 31, None]
    assert nest.sees(child, *range(49, 58)) == expected
    nest.map_ram(3, 60)
    assert nest.sees(child, 52) == [60]
    nest.unmap(nest.root, 0, 3)
    assert nest.sees(child, *range(50, 57)) == [None, None, 60, 20, None, 30, 31]


def test_one_place_of_the_parent_shown_many_times(nest: Nest) -> None:
    child = nest.beneath(nest.root)
    for at in range(8):
        nest.map(child, 10 * at, at // 2, 3)
    nest.map_ram(0, 8, 6)
    assert nest.sees(child, 0, 10, 21, 32, 70, 72) == [8, 8, 10, 11, 11, 13]
    nest.unmap(nest.root, 0, 6)
    assert nest.sees(child, 0, 10, 21, 32, 70, 72) == [None] * 6


def test_rights_are_those_of_all_above(nest: Nest) -> None:
    nest.map_ram(0, 1, 1, R)
    nest.map_ram(1, 2, 1, RW)
    nest.map_ram(2, 3, 1, W)
    child = nest.beneath(nest.root)
    nest.map(child, 0, 0, 3, RW)
    nest.map(child, 4, 0, 3, R)
    grandchild = nest.beneath(child)
    nest.map(grandchild, 0, 0, 8)
    for ioasid in (child, grandchild):
        assert nest.sees(ioasid, 0, 1, 2) == [1, 2, None]
        assert [nest.writable(ioasid, page) for page in range(3)] == [False, True, True]
        assert nest.sees(ioasid, 4, 5, 6) == [1, 2, None], "nothing is left of what neither permits"
        assert not any(nest.writable(ioasid, page) for page in range(4, 7))


def test_a_guests_table_beneath_a_merged_one(nest: Nest) -> None:
    """The guest of a guest: its table, in its GPAs, over a table of the host's that follows its host's."""
    nest.map_ram(0, 0, RAM_PAGES)
    inner = nest.beneath(nest.root)
    nest.map(inner, 0, 32, 32)  # the inner guest's memory: the upper half of the outer one's
    tables = AmdTables(nest.ram, 48 * PAGE)  # laid by its place in RAM, and addressed by it
    nest.map(inner, 48, 48, 16)
    tables.map(5 * PAGE, 3 * PAGE)
    child = nest.ctx.create_nesting(inner)
    nest.ctx.bind_pgtable(child, tables.root, PgtableFormat())
    nest.reach(child, inner)
    assert nest.sees(child, 5, 6) == [35, None]
    assert nest.ctx.get_info(child).parent == inner
    nest.unmap(nest.root, 0, RAM_PAGES)
    assert nest.sees(child, 5) == [None]
    nest.map_ram(0, 0, RAM_PAGES)
    assert nest.sees(child, 5) == [35]
    nest.unmap(inner, 0, 32)
    answer = nest.engine.devices[child].port.load(5 * PAGE, 8)
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.gpa, answer.reason) == (2, 3 * PAGE, Reason.NOT_PRESENT)


def test_a_change_costs_what_it_changes_and_no_more(nest: Nest) -> None:
    children = [nest.beneath(nest.root) for _ in range(20)]
    for child in children:
        for at in range(20):
            nest.map(child, at, at)
    nest.core.changes = 0
    nest.map_ram(63, 1)
    nest.unmap(nest.root, 63)
    assert nest.core.changes == 2, "nobody maps it"
    nest.map_ram(7, 1)
    assert nest.core.changes == 3 + 20
    nest.unmap(children[0], 7)
    nest.unmap(nest.root, 7)
    assert nest.core.changes == 23 + 1 + 20


def test_no_room_in_a_child_refuses_the_whole(nest: Nest, monkeypatch: pytest.MonkeyPatch) -> None:
    children = [nest.beneath(nest.root) for _ in range(3)]
    for child in children:
        nest.map(child, 0, 0, 4)
        nest.map(child, 10, 0, 4)
    monkeypatch.setattr("backend.ioasid.merged.MAX_MAPPINGS", 3)
    nest.map_ram(0, 1)
    before = nest.core.counters().table_pages
    with pytest.raises(IoasidError) as refused:
        nest.map_ram(1, 2)
    assert refused.value.errno == errno.ENOSPC
    assert all(nest.sees(each, 0, 1, 11) == [1, None, None] for each in children)
    assert nest.sees(nest.root, 0, 1) == [1, None]
    assert nest.core.counters().table_pages == before
    nest.map(children[0], 20, 0)
    with pytest.raises(IoasidError):
        nest.map(children[0], 21, 0)
    assert nest.sees(children[0], 20, 21) == [1, None]
    monkeypatch.undo()
    nest.map_ram(1, 2)
    assert all(nest.sees(each, 0, 1, 11) == [1, 2, 2] for each in children)


def test_room_is_given_back(nest: Nest) -> None:
    left = nest.ctx.merged_room.left
    child = nest.beneath(nest.root)
    nest.map(child, 0, 0, 8)
    for page in range(8):
        nest.map_ram(page, page)
    assert nest.ctx.merged_room.left == left - 8
    nest.unmap(nest.root, 3)
    assert nest.ctx.merged_room.left == left - 7
    nest.ctx.merged_room.left = 0
    with pytest.raises(IoasidError) as refused:
        nest.map_ram(3, 3)
    assert refused.value.errno == errno.ENOSPC
    assert nest.sees(nest.root, 3) == [None]
    nest.ctx.merged_room.left = left - 7
    while len(nest.engine.devices[child].stacks.get(None, [])):
        nest.ctx.detach(child)
    nest.ctx.free(child)
    assert nest.ctx.merged_room.left == left
    nest.map_ram(3, 3)  # and nobody follows any more


def test_refusals(nest: Nest) -> None:
    child = nest.beneath(nest.root)
    nest.map(child, 4, 0, 2)
    deep = child
    for _ in range(6):
        deep = nest.ctx.create_nesting(deep, Kind.KERNEL)
    for code, call in (
        (errno.EEXIST, lambda: nest.map(child, 5, 40)),
        (errno.EINVAL, lambda: nest.unmap(child, 4)),
        (errno.ENOENT, lambda: nest.unmap(child, 5)),
        (errno.EBUSY, lambda: nest.ctx.free(nest.root)),
        (errno.ENOSPC, lambda: nest.ctx.create_nesting(deep, Kind.KERNEL)),
        (errno.EINVAL, lambda: nest.ctx.create_nesting(nest.ctx.create_nesting(child), Kind.KERNEL)),
        (errno.EOPNOTSUPP, lambda: nest.ctx.create_nesting(child, Kind.VM)),
        (errno.EINVAL, lambda: nest.ctx.alloc(Kind.VM, parent=nest.root)),
        (errno.EINVAL, lambda: nest.ctx.bind_pgtable(child, 0, PgtableFormat())),
    ):
        with pytest.raises(IoasidError) as refused:
            call()
        assert refused.value.errno == code, refused.value
