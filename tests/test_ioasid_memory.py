"""Registered memory and its account, dirty tracking, and IOVAs that devices reserve."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from hypothesis import given, settings
from hypothesis import strategies as st
from ioasid_guest import DEV1, DEV2, GOLDEN, Guest, refused

from backend.core import Access, LimitError, NoMemoryError
from backend.ioasid import MSI_WINDOW, Engine, Kind, PgtableFormat, Traits, Window
from backend.ioasid.pinned_memory import PinnedMemory

FAR = 0x7000_0000


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


# Registered memory


def test_registered_memory_is_counted_once(guest: Guest) -> None:
    ctx = guest.ctx
    one, two = ctx.alloc(), ctx.alloc()
    ctx.map_dma(one, 0, FAR, 4 * PAGE)
    ctx.map_dma(two, 0, FAR, 4 * PAGE)
    assert ctx.pinned.pinned == 8 * PAGE, "without registering, once a mapping"
    ctx.register_memory(GOLDEN, 16 * PAGE)
    assert ctx.pinned.pinned == 24 * PAGE
    ctx.map_dma(one, 0x10000, GOLDEN, 16 * PAGE)
    ctx.map_dma(two, 0x10000, GOLDEN + PAGE, PAGE)
    assert ctx.pinned.pinned == 24 * PAGE
    assert refused(lambda: ctx.unregister_memory(GOLDEN, 16 * PAGE)) == errno.EBUSY
    ctx.unmap_dma(one, 0x10000, 16 * PAGE)
    ctx.unmap_dma(two, 0x10000, PAGE)
    ctx.unregister_memory(GOLDEN, 16 * PAGE)
    ctx.unmap_dma(one, 0, 4 * PAGE)
    ctx.free(two)
    assert ctx.pinned.pinned == 0


def test_once_used_nothing_else_can_be_mapped(guest: Guest) -> None:
    ctx = guest.ctx
    one = ctx.alloc()
    ctx.register_memory(GOLDEN, 4 * PAGE)
    ctx.register_memory(GOLDEN + 4 * PAGE, 4 * PAGE)
    for vaddr, size in ((FAR, PAGE), (GOLDEN - PAGE, 2 * PAGE), (GOLDEN + 7 * PAGE, 2 * PAGE), (GOLDEN, 9 * PAGE)):
        assert refused(lambda vaddr=vaddr, size=size: ctx.map_dma(one, 0, vaddr, size)) == errno.EINVAL  # type: ignore[misc]
    ctx.map_dma(one, 0, GOLDEN + 3 * PAGE, 2 * PAGE)  # across two that touch
    assert refused(lambda: ctx.unregister_memory(GOLDEN, 4 * PAGE)) == errno.EBUSY
    assert refused(lambda: ctx.unregister_memory(GOLDEN + 4 * PAGE, 4 * PAGE)) == errno.EBUSY
    ctx.unmap_dma(one, 0, 2 * PAGE)
    ctx.unregister_memory(GOLDEN, 4 * PAGE)
    ctx.unregister_memory(GOLDEN + 4 * PAGE, 4 * PAGE)
    assert refused(lambda: ctx.map_dma(one, 0, GOLDEN, PAGE)) == errno.EINVAL, "it was used once"


def test_what_cannot_be_registered(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = guest.ctx
    ctx.register_memory(GOLDEN, 4 * PAGE)
    assert refused(lambda: ctx.register_memory(GOLDEN + 3 * PAGE, PAGE)) == errno.EEXIST
    assert refused(lambda: ctx.register_memory(GOLDEN - PAGE, 2 * PAGE)) == errno.EEXIST
    assert refused(lambda: ctx.register_memory(0, PAGE)) == errno.EFAULT
    assert refused(lambda: ctx.register_memory((1 << 64) - PAGE, 2 * PAGE)) == errno.EOVERFLOW
    assert refused(lambda: ctx.register_memory(GOLDEN + 1, PAGE)) == errno.EINVAL
    assert refused(lambda: ctx.unregister_memory(FAR, PAGE)) == errno.ENOENT
    assert refused(lambda: ctx.unregister_memory(GOLDEN, PAGE)) == errno.EINVAL
    assert refused(lambda: ctx.unregister_memory((1 << 64) - PAGE, 2 * PAGE)) == errno.EOVERFLOW
    monkeypatch.setattr("backend.ioasid.memory.MAX_REGISTERED", 1)
    assert refused(lambda: ctx.register_memory(FAR, PAGE)) == errno.ENOSPC
    assert ctx.pinned.pinned == 4 * PAGE


def test_a_limit_can_be_set(guest: Guest) -> None:
    ctx = guest.ctx
    ctx.pinned.limit = 4 * PAGE
    one = ctx.alloc()
    ctx.map_dma(one, 0, FAR, 3 * PAGE)
    assert refused(lambda: ctx.map_dma(one, 0x10000, FAR, 2 * PAGE)) == errno.ENOMEM
    assert refused(lambda: ctx.register_memory(GOLDEN, 2 * PAGE)) == errno.ENOMEM
    ctx.register_memory(GOLDEN, PAGE)
    for iova in range(0x10000, 0x20000, PAGE):
        ctx.map_dma(one, iova, GOLDEN, PAGE)
    assert ctx.pinned.pinned == 4 * PAGE


def test_the_parents_addresses_are_no_memory_of_the_user(guest: Guest) -> None:
    ctx = guest.ctx
    ctx.register_memory(GOLDEN, 16 * PAGE)
    parent = ctx.alloc()
    ctx.map_dma(parent, 0, GOLDEN, 16 * PAGE)
    child = ctx.create_nesting(parent, Kind.KERNEL)
    ctx.map_dma(child, 0, 0x1000, PAGE)
    assert ctx.pinned.pinned == 16 * PAGE
    ctx.unmap_dma(child, 0, PAGE)


def test_a_refused_mapping_is_not_counted(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = guest.ctx
    one = ctx.alloc()

    def full(*_: object, **__: object) -> None:
        raise LimitError

    with monkeypatch.context() as patch:
        patch.setattr(guest.engine.core, "map", full)
        assert refused(lambda: ctx.map_dma(one, 0, FAR, PAGE)) == errno.ENOSPC
    assert ctx.pinned.pinned == 0 and ctx.get_info(one).mappings == 0
    ctx.map_dma(one, 0, FAR, PAGE)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=12), st.integers(0, 45), st.integers(1, 20))
def test_registered_ranges_against_a_set_of_pages(ranges: list[tuple[int, int]], start: int, size: int) -> None:
    pinned, pages = PinnedMemory(), set[int]()
    for first, length in ranges:
        mine = set(range(first, first + length))
        assert (pinned.overlapping(first, length) is not None) == bool(mine & pages)
        if not mine & pages:
            pinned.register(first, length)
            pages |= mine
    assert pinned.pinned == len(pages)
    asked = set(range(start, start + size))
    found = pinned.covering(start, size)
    assert (found is not None) == (asked <= pages)
    if found is not None:
        assert asked <= {page for each in found for page in range(each.vaddr, each.end)}
        assert all(asked & set(range(each.vaddr, each.end)) for each in found)


# Dirty tracking


def test_dirty_pages(guest: Guest) -> None:
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, GOLDEN, guest.ram.size)
    ctx.attach(DEV1, gpa)
    tables = guest.tables()
    tables.map(0x2000, 0x5000)
    child = ctx.alloc(Kind.USER, parent=gpa, root=tables.root)
    ctx.attach(DEV1, child, pasid=1)
    assert refused(lambda: ctx.get_dirty_bitmap(gpa, 0, 16 * PAGE)) == errno.EINVAL
    ctx.set_dirty_tracking(gpa, True)
    guest.dev1.port.write(0x1FFF, b"12")  # pages 1 and 2
    guest.dev1.port.read(0x3000, 8)
    guest.dev1.port.write(0x2000, b"x", 1)  # page 5, through the guest's table
    pages = 1 << 1 | 1 << 2 | 1 << 5
    assert ctx.get_dirty_bitmap(gpa, 0, 16 * PAGE, clear=False) == pages.to_bytes(2, "little")
    assert ctx.get_dirty_bitmap(gpa, 0, 16 * PAGE, page_size=4 * PAGE, clear=False) == b"\3"
    assert ctx.get_dirty_bitmap(gpa, 0x1000, 0x4000) == b"\3"
    assert ctx.get_dirty_bitmap(gpa, 0, 16 * PAGE) == b"\x20\0", "of the range alone it was forgotten"
    ctx.set_dirty_tracking(gpa, False)
    assert refused(lambda: ctx.get_dirty_bitmap(gpa, 0, PAGE)) == errno.EINVAL


def test_bitmaps_that_cannot_be(guest: Guest) -> None:
    ctx = guest.ctx
    gpa = ctx.alloc()
    child = ctx.create_nesting(gpa)
    ctx.set_dirty_tracking(gpa, True)
    for size in (0, 3 * PAGE, PAGE // 2):
        assert refused(lambda size=size: ctx.get_dirty_bitmap(gpa, 0, 16 * PAGE, page_size=size)) == errno.EINVAL  # type: ignore[misc]
    assert refused(lambda: ctx.get_dirty_bitmap(gpa, PAGE, 4 * PAGE, page_size=4 * PAGE)) == errno.EINVAL
    assert refused(lambda: ctx.get_dirty_bitmap(gpa, (1 << 64) - PAGE, 2 * PAGE)) == errno.EOVERFLOW
    assert refused(lambda: ctx.get_dirty_bitmap(gpa, 0, 1 << 36)) == errno.ENOMEM
    assert refused(lambda: ctx.get_dirty_bitmap(9, 0, PAGE)) == errno.ENOENT
    assert refused(lambda: ctx.set_dirty_tracking(child, True)) == errno.EINVAL
    assert refused(lambda: ctx.set_dirty_tracking(gpa, 1)) == errno.EINVAL  # type: ignore[arg-type]


def test_no_room_to_track(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    gpa = guest.ctx.alloc()

    def full(*_: object, **__: object) -> None:
        raise NoMemoryError

    monkeypatch.setattr(guest.engine.core, "set_dirty_tracking", full)
    assert refused(lambda: guest.ctx.set_dirty_tracking(gpa, True)) == errno.ENOMEM


# IOVAs that devices reserve


def test_reserved_iovas() -> None:
    guest = Guest(Traits(reserved=(MSI_WINDOW,), address_width=36))
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0xFEE00000, FAR, PAGE)
    assert refused(lambda: ctx.attach(DEV1, gpa)) == errno.EADDRINUSE
    ctx.unmap_dma(gpa, 0xFEE00000, PAGE)
    ctx.attach(DEV1, gpa)
    ctx.attach(DEV2, gpa)
    for iova, size in ((0xFEE00000, PAGE), (0xFEDFF000, 2 * PAGE), (0xFEEFF000, PAGE), (0, 1 << 32), (1 << 36, PAGE)):
        assert refused(lambda iova=iova, size=size: ctx.map_dma(gpa, iova, FAR, size)) == errno.EADDRINUSE  # type: ignore[misc]
    ctx.map_dma(gpa, 0xFEDFF000, FAR, PAGE)
    ctx.map_dma(gpa, 0xFEF00000, FAR, PAGE)
    assert [(each.first, each.last + 1) for each in ctx.get_info(gpa).reserved] == [
        (0xFEE00000, 0xFEF00000),
        (1 << 36, 1 << 64),
    ]
    info = ctx.get_info(rid=DEV1)
    assert [(each.first, each.last) for each in info.permitted] == [
        (0, 0xFEDFFFFF), (0xFEF00000, (1 << 36) - 1),
    ]  # fmt: skip
    ctx.detach(DEV1)
    assert refused(lambda: ctx.map_dma(gpa, 0xFEE00000, FAR, PAGE)) == errno.EADDRINUSE, "dev2 is still there"
    ctx.detach(DEV2)
    ctx.map_dma(gpa, 0xFEE00000, FAR, PAGE)
    guest.close()


def test_a_guests_own_table_may_use_them() -> None:
    guest = Guest(Traits(reserved=(MSI_WINDOW,)))
    gpa = guest.ctx.alloc()
    guest.ctx.map_dma(gpa, 0, GOLDEN, guest.ram.size)
    guest.ctx.attach(DEV1, gpa)
    child = guest.ctx.create_nesting(gpa)
    guest.ctx.bind_pgtable(child, 0, PgtableFormat())
    guest.ctx.attach(DEV1, child)
    guest.close()


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5), st.integers(5, 6))
def test_permitted_is_what_is_left(windows: list[tuple[int, int]], width: int) -> None:
    traits = Traits(reserved=tuple(Window(start, start + size) for start, size in windows), address_width=width)
    permitted = {each for start, end in traits.permitted() for each in range(start, end)}
    reserved = {each for start, size in windows for each in range(start, start + size)}
    assert permitted == set(range(1 << width)) - reserved
    assert all(start < end for start, end in traits.permitted())


# Accesses and pages that a format does not have


def test_writes_alone_where_a_format_has_none(guest: Guest) -> None:
    ctx = guest.ctx
    for vendor, legal in (("amd-v1", True), ("vtd-second-stage", True), ("arm-s2", True), ("x86", False),
                          ("ept", False), ("arm-s1", False), ("riscv", False), ("riscv-x4", False)):  # fmt: skip
        ioasid = ctx.alloc(vendor=vendor)
        if legal:
            ctx.map_dma(ioasid, 0, GOLDEN, PAGE, Access.WRITE)
        else:
            code = refused(lambda ioasid=ioasid: ctx.map_dma(ioasid, 0, GOLDEN, PAGE, Access.WRITE))  # type: ignore[misc]
            assert code == errno.EINVAL


@pytest.mark.parametrize("granule", [16384, 65536])
def test_larger_pages(guest: Guest, granule: int) -> None:
    ctx = guest.ctx
    ioasid = ctx.alloc(vendor="arm-s2", granule=granule, address_width=40)
    assert ctx.get_info(ioasid).page_sizes[0] == granule
    for iova, vaddr, size in ((PAGE, GOLDEN, granule), (0, GOLDEN + PAGE, granule), (0, GOLDEN, PAGE)):
        code = refused(lambda iova=iova, vaddr=vaddr, size=size: ctx.map_dma(ioasid, iova, vaddr, size))  # type: ignore[misc]
        assert code == errno.EINVAL
    ctx.map_dma(ioasid, granule, GOLDEN + granule, granule)
    ctx.attach(DEV1, ioasid)
    assert guest.hva(DEV1, granule + 5) == GOLDEN + granule + 5


def test_contexts_count_apart() -> None:
    engine = Engine()
    one, other = engine.open(), engine.open()
    one.pinned.limit = PAGE
    one.map_dma(one.alloc(), 0, FAR, PAGE)
    other.map_dma(other.alloc(), 0, FAR, 100 * PAGE)
    assert (one.pinned.pinned, other.pinned.pinned) == (PAGE, 100 * PAGE)
    engine.close()
