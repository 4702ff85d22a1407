"""IOASIDs that follow the VM's memory: what EPT is to the CPU, and walked as such."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from backend.core._native import ffi, lib
from guest_ram import PAGE, AmdTables, Ram
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from reference import ept
from reference.common import Access as Asked
from reference.common import Fault as Stopped
from reference.common import Kind as AskedKind
from reference.common import Result

from backend.core import Access, Fault, Reason
from backend.ioasid import COMMANDS, Engine, IoasidError, Kind, PgtableFormat

RID = 8
R, RW = Access.READ, Access.READ | Access.WRITE
RAM_PAGES = 64


class OwnMemory:
    """This process's memory, as the reference reads tables."""

    def read64(self, address: int) -> int:
        return ctypes.c_uint64.from_address(address).value


class Vm:
    """An engine, RAM whose page n begins with n, and a device."""

    def __init__(self) -> None:
        self.ram = Ram(RAM_PAGES * PAGE)
        for page in range(RAM_PAGES):
            self.ram.poke(page * PAGE, page.to_bytes(8, "little"))
        self.engine = Engine()
        self.memory = self.engine.vm_memory
        self.ctx = self.engine.open()
        self.port = self.engine.add_device(RID, "device").port
        self.ctx.bind_device(RID)

    def comes(self, gpa: int, page: int, pages: int = 1, access: Access = RW) -> None:
        self.memory.map(gpa * PAGE, self.ram.hva + page * PAGE, pages * PAGE, access)

    def goes(self, gpa: int, pages: int = 1) -> None:
        self.memory.unmap(gpa * PAGE, pages * PAGE)

    def sees(self, *pages: int) -> list[int | None]:
        answers = (self.port.load(page * PAGE, 8) for page in pages)
        return [None if isinstance(answer, Fault) else answer for answer in answers]

    def ept(self, ioasid: int, gpa: int) -> Result | Stopped:
        """Walk an IOASID's table as a processor does: what a write to a GPA comes to."""
        table = ffi.new("vio_table *")
        core_id = next(each for each in self.engine._spaces.values() if each.ioasid == ioasid).core_id
        assert lib.vio_space_table_get(self.engine.core._engine, core_id, table) == 0
        config = ept.Config(table.tree.root, table.tree.levels)
        return ept.walk(OwnMemory(), config, gpa, Asked(AskedKind.WRITE))

    def close(self) -> None:
        self.ctx.close()
        counters = self.engine.core.counters()
        assert (counters.spaces, counters.table_pages) == (0, 0)
        self.engine.close()
        self.ram.close()


@pytest.fixture
def vm() -> Iterator[Vm]:
    with closing(Vm()) as vm:
        yield vm


def test_it_follows_what_comes_and_goes(vm: Vm) -> None:
    vm.comes(0, 10, 4)
    ioasid = vm.ctx.alloc(Kind.VM)  # finds what is there already
    vm.ctx.attach(RID, ioasid)
    assert vm.sees(0, 3, 4) == [10, 13, None]
    vm.comes(8, 20, 2, R)
    assert vm.sees(0, 8, 9) == [10, 20, 21]
    answer = vm.port.write(8 * PAGE, b"1")
    assert isinstance(answer, Fault) and answer.reason is Reason.PERMISSION
    vm.goes(0, 4)
    assert vm.sees(0, 3, 8) == [None, None, 20]
    vm.comes(0, 30)
    assert vm.sees(0, 1, 8) == [30, None, 20]
    info = vm.ctx.get_info(ioasid)
    assert (info.kind, info.mappings, info.mapped) == (Kind.VM, 2, 3 * PAGE)


def test_nobody_maps_into_it(vm: Vm) -> None:
    ioasid = vm.ctx.alloc(Kind.VM)
    assert not {"MAP_DMA", "UNMAP_DMA", "BIND_PGTABLE", "INVALIDATE_CACHE"} & set(vm.ctx.get_info(ioasid).commands)
    assert Kind.VM in COMMANDS["CREATE_NESTING"].kinds
    calls: list[Callable[[], None]] = [
        lambda: vm.ctx.map_dma(ioasid, 0, vm.ram.hva, PAGE),
        lambda: vm.ctx.unmap_dma(ioasid, 0, PAGE),
        lambda: vm.ctx.bind_pgtable(ioasid, 0, PgtableFormat()),
        lambda: vm.ctx.invalidate_cache(ioasid),
    ]
    for call in calls:
        with pytest.raises(IoasidError) as refused:
            call()
        assert refused.value.errno == errno.EINVAL


def test_the_table_is_an_ept(vm: Vm) -> None:
    ioasid = vm.ctx.alloc(Kind.VM, vendor="ept")
    large = Ram(6 << 20)
    aligned = -large.hva % (2 << 20)
    vm.memory.map(1 << 32, large.hva + aligned, 4 << 20, RW)
    vm.comes(3, 5, 2)
    vm.comes(7, 9, 1, R)
    for gpa, hva, size in (
        (3 * PAGE + 8, vm.ram.hva + 5 * PAGE + 8, PAGE),
        (4 * PAGE, vm.ram.hva + 6 * PAGE, PAGE),
        ((1 << 32) + 12345, large.hva + aligned + 12345, 2 << 20),
        ((1 << 32) + (4 << 20) - 1, large.hva + aligned + (4 << 20) - 1, 2 << 20),
    ):
        found = vm.ept(ioasid, gpa)
        assert isinstance(found, Result)
        assert (found.output, found.size, found.write) == (hva, size, True)
    for gpa, reason in ((5 * PAGE, "NOT_PRESENT"), (7 * PAGE, "PERMISSION"), (1 << 48, "ADDRESS_WIDTH")):
        lost = vm.ept(ioasid, gpa)
        assert not isinstance(lost, Result) and lost.reason.name == reason
    vm.memory.unmap(1 << 32, 4 << 20)
    assert not isinstance(vm.ept(ioasid, 1 << 32), Result)
    large.close()


def test_several_follow_each_in_its_own_format(vm: Vm) -> None:
    narrow = vm.ctx.alloc(Kind.VM, levels=1)  # 2 MiB
    wide = vm.ctx.alloc(Kind.VM, levels=4)
    vm.comes(508, 0, 8)
    vm.comes(600, 20)
    vm.ctx.attach(RID, narrow)
    assert vm.sees(507, 508, 511, 512) == [None, 0, 3, None], "what it cannot reach it does not have"
    vm.ctx.detach(RID)
    vm.ctx.attach(RID, wide)
    assert vm.sees(508, 512, 515, 600) == [0, 4, 7, 20]
    vm.ctx.free(narrow)
    vm.goes(508, 8)
    vm.goes(600)
    assert vm.sees(508, 600) == [None, None]


def test_guests_tables_and_merged_ones_beneath_it(vm: Vm) -> None:
    vm.comes(0, 0, RAM_PAGES)
    ioasid = vm.ctx.alloc(Kind.VM)
    vm.ctx.attach(RID, ioasid)
    child = vm.ctx.create_nesting(ioasid)
    tables = AmdTables(vm.ram, 48 * PAGE)
    tables.map(5 * PAGE, 3 * PAGE)
    vm.ctx.bind_pgtable(child, tables.root, PgtableFormat())
    merged = vm.ctx.alloc(Kind.KERNEL, parent=ioasid)
    vm.ctx.map_dma(merged, 7 * PAGE, 2 * PAGE, 2 * PAGE)
    for ioasid, page, expected in ((child, 5, 3), (merged, 8, 3)):
        vm.ctx.attach(RID, ioasid)
        assert vm.sees(page) == [expected]
        vm.goes(0, RAM_PAGES)
        assert vm.sees(page) == [None]
        vm.comes(0, 0, RAM_PAGES)
        assert vm.sees(page) == [expected]
        vm.ctx.detach(RID)


def test_a_users_children_do_not_keep_the_vm_from_its_memory(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    stage2 = vm.ctx.alloc(Kind.VM)
    merged = vm.ctx.alloc(Kind.KERNEL, parent=stage2)
    for at in range(4):
        vm.ctx.map_dma(merged, at * PAGE, 0, PAGE)
    vm.ctx.merged_room.left = 2
    vm.comes(0, 9)
    vm.ctx.attach(RID, stage2)
    assert vm.sees(0) == [9]
    vm.ctx.attach(RID, merged)
    assert sorted(vm.sees(0, 1, 2, 3), key=str) == [9, 9, None, None]
    vm.goes(0)
    assert vm.sees(0, 1, 2, 3) == [None] * 4
    assert vm.ctx.merged_room.left == 2


def test_memory_that_cannot_be(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.comes(4, 0, 2)
    hva = vm.ram.hva
    for code, arguments in (
        (errno.EINVAL, (1, hva, PAGE)),
        (errno.EINVAL, (0, hva + 1, PAGE)),
        (errno.EINVAL, (0, hva, 0)),
        (errno.EINVAL, (-PAGE, hva, PAGE)),
        (errno.EINVAL, ((1 << 64) - PAGE, hva, 2 * PAGE)),
        (errno.EINVAL, (0, 0, PAGE)),
        (errno.EINVAL, (0, (1 << 47) - PAGE, 2 * PAGE)),
        (errno.EEXIST, (5 * PAGE, hva, PAGE)),
        (errno.EEXIST, (0, hva, 16 * PAGE)),
    ):
        with pytest.raises(IoasidError) as refused:
            vm.memory.map(*arguments, RW)
        assert refused.value.errno == code
    with pytest.raises(IoasidError) as refused:
        vm.goes(4)
    assert refused.value.errno == errno.ENOENT
    monkeypatch.setattr("backend.ioasid.vm_memory.MAX_MAPPINGS", 1)
    with pytest.raises(IoasidError) as refused:
        vm.comes(0, 0)
    assert refused.value.errno == errno.ENOSPC
    assert len(vm.memory.extents) == 1


class Following(RuleBasedStateMachine):
    """IOASIDs of kind vm are all alike, whenever they were made, against a dictionary."""

    pages = st.integers(0, 7)

    def __init__(self) -> None:
        super().__init__()
        self.vm = Vm()
        self.model: dict[int, tuple[int, int]] = {}
        self.ioasids: list[int] = []

    @rule(gpa=pages, page=pages, count=st.integers(1, 3))
    def comes(self, gpa: int, page: int, count: int) -> None:
        if all(gpa + count <= at or at + pages <= gpa for at, (_, pages) in self.model.items()):
            self.vm.comes(gpa, page, count)
            self.model[gpa] = page, count

    @rule(which=pages)
    def goes(self, which: int) -> None:
        if self.model:
            gpa = list(self.model)[which % len(self.model)]
            self.vm.goes(gpa, self.model.pop(gpa)[1])

    @rule()
    def alloc(self) -> None:
        if len(self.ioasids) < 3:
            self.ioasids.append(self.vm.ctx.alloc(Kind.VM))

    @rule(which=pages)
    def free(self, which: int) -> None:
        if self.ioasids:
            self.vm.ctx.free(self.ioasids.pop(which % len(self.ioasids)))

    @invariant()
    def all_see_the_same(self) -> None:
        expected: list[int | None] = [None] * 10
        for gpa, (page, count) in self.model.items():
            expected[gpa : gpa + count] = range(page, page + count)
        for ioasid in self.ioasids:
            self.vm.ctx.attach(RID, ioasid)
            assert self.vm.sees(*range(10)) == expected
            self.vm.ctx.detach(RID)

    def teardown(self) -> None:
        self.vm.close()


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
