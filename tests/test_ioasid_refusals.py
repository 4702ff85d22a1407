"""Every errno of every command's row, provoked once at least; and whatever is refused changes nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1, DEV2, GOLDEN, Guest
from test_ioasid_context import REFUSED

from backend.core import Access, LimitError, NoMemoryError
from backend.ioasid import (
    COMMANDS,
    Code,
    Context,
    IoasidError,
    Kind,
    PasidMode,
    PasidTableFormat,
    PgtableFormat,
    Traits,
    Window,
)

TOP = (1 << 64) - PAGE
GCR3 = PasidTableFormat()
X86 = PgtableFormat("x86")


def _detach_beneath_a_pasid(ctx: Context) -> None:
    ctx.attach(DEV1, 3, pasid=1)
    ctx.detach(DEV1)
    ctx.detach(DEV1)


# `ctx` has: 1, a kernel IOASID with [0x10000, 0x14000) mapped and dev1 attached; 2, a child of it with dev1 attached;
# 3, a child with a bound page table; 4, an empty kernel IOASID; 5, a child of 1 with a bound PASID table; 6, of kind
# vm; 7, a kernel child of 1. dev2 is bound, reserves [0, 4096) and has a global pool. Memory at GOLDEN is registered.
MORE: list[tuple[str, int, str, Callable[[Context], object]]] = [
    ("CHECK_EXTENSION", errno.EINVAL, "no name", lambda c: c.check_extension("")),
    ("REGISTER_MEMORY", errno.EINVAL, "at least one page", lambda c: c.register_memory(GOLDEN, 0)),
    ("REGISTER_MEMORY", errno.EOVERFLOW, "2\\^64", lambda c: c.register_memory(TOP, 2 * PAGE)),
    ("REGISTER_MEMORY", errno.EFAULT, "no memory of this", lambda c: c.register_memory(0, PAGE)),
    ("REGISTER_MEMORY", errno.EEXIST, "overlaps", lambda c: c.register_memory(GOLDEN + PAGE, PAGE)),
    ("UNREGISTER_MEMORY", errno.EINVAL, "were registered", lambda c: c.unregister_memory(GOLDEN, PAGE)),
    ("UNREGISTER_MEMORY", errno.EOVERFLOW, "2\\^64", lambda c: c.unregister_memory(TOP, 2 * PAGE)),
    ("UNREGISTER_MEMORY", errno.ENOENT, "begins at", lambda c: c.unregister_memory(GOLDEN + PAGE, PAGE)),
    ("UNREGISTER_MEMORY", errno.EBUSY, "1 mappings", lambda c: c.unregister_memory(GOLDEN, 16 * PAGE)),
    ("ALLOC", errno.ENOENT, "no IOASID 9", lambda c: c.alloc(Kind.USER, parent=9)),
    ("ALLOC", errno.ESRCH, "no process", lambda c: c.alloc(Kind.SVA, pid=0)),
    ("ALLOC", errno.EINVAL, "kind sva", lambda c: c.alloc(Kind.KERNEL, pid=1)),
    ("ALLOC", errno.EINVAL, "kind sva", lambda c: c.alloc(Kind.SVA)),
    ("ALLOC", errno.EINVAL, "beneath no other", lambda c: c.alloc(Kind.VM, parent=1)),
    ("ALLOC", errno.EINVAL, "guest-managed", lambda c: c.alloc(Kind.KERNEL, parent=2)),
    ("ALLOC", errno.EINVAL, "leave root out", lambda c: c.alloc(Kind.KERNEL, root=PAGE)),
    ("ALLOC", errno.EINVAL, "without root", lambda c: c.alloc(Kind.USER, parent=1, vendor="x86")),
    ("ALLOC", errno.EINVAL, "larger than the memory's", lambda c: c.alloc(Kind.VM, vendor="arm-s2", granule=16384)),
    ("ALLOC", errno.EINVAL, "larger than", lambda c: c.alloc(parent=1, vendor="arm-s2", granule=65536)),
    ("ALLOC", errno.EOPNOTSUPP, "no kind 'ept'", lambda c: c.alloc("ept")),  # type: ignore[arg-type]
    ("FREE", errno.EINVAL, "ioasid -0x1", lambda c: c.free(-1)),
    ("GET_INFO", errno.ENODEV, "0x0777", lambda c: c.get_info(rid=0x777)),
    ("CREATE_NESTING", errno.EOPNOTSUPP, "no nesting of kind", lambda c: c.create_nesting(1, Kind.SVA)),
    ("MAP_DMA", errno.EADDRINUSE, "reserves", lambda c: c.map_dma(4, 0, GOLDEN, PAGE)),
    ("MAP_DMA", errno.EINVAL, "not all registered", lambda c: c.map_dma(1, 0, GOLDEN + 15 * PAGE, 2 * PAGE)),
    ("MAP_DMA", errno.EINVAL, "kind vm", lambda c: c.map_dma(6, 0, GOLDEN, PAGE)),
    ("UNMAP_DMA", errno.EINVAL, "kind vm", lambda c: c.unmap_dma(6, 0, PAGE)),
    ("SET_DIRTY_TRACKING", errno.EINVAL, "kind user", lambda c: c.set_dirty_tracking(2, True)),
    ("SET_DIRTY_TRACKING", errno.ENOENT, "no IOASID 9", lambda c: c.set_dirty_tracking(9, True)),
    ("GET_DIRTY_BITMAP", errno.EINVAL, "not tracked", lambda c: c.get_dirty_bitmap(1, 0, PAGE)),
    ("GET_DIRTY_BITMAP", errno.ENOENT, "no IOASID 9", lambda c: c.get_dirty_bitmap(9, 0, PAGE)),
    ("GET_DIRTY_BITMAP", errno.EOVERFLOW, "2\\^64", lambda c: c.get_dirty_bitmap(1, TOP, 2 * PAGE)),
    ("GET_DIRTY_BITMAP", errno.ENOMEM, "in one answer", lambda c: c.get_dirty_bitmap(1, 0, 1 << 40)),
    ("BIND_PGTABLE", errno.ENOENT, "no IOASID 9", lambda c: c.bind_pgtable(9, 0, X86)),
    ("BIND_PGTABLE", errno.EBUSY, "UNBIND_PASID_TABLE first", lambda c: c.bind_pgtable(5, 0, X86)),
    ("UNBIND_PGTABLE", errno.ENOENT, "no IOASID 9", lambda c: c.unbind_pgtable(9)),
    ("BIND_PASID_TABLE", errno.EINVAL, "kind kernel", lambda c: c.bind_pasid_table(1, 0, GCR3)),
    ("BIND_PASID_TABLE", errno.ENOENT, "no IOASID 9", lambda c: c.bind_pasid_table(9, 0, GCR3)),
    ("BIND_PASID_TABLE", errno.EBUSY, "UNBIND_PGTABLE first", lambda c: c.bind_pasid_table(3, 0, GCR3)),
    ("BIND_PASID_TABLE", errno.EOPNOTSUPP, "no PASID table", lambda c: c.bind_pasid_table(2, 0, PasidTableFormat("x"))),
    ("UNBIND_PASID_TABLE", errno.EINVAL, "no PASID table", lambda c: c.unbind_pasid_table(3)),
    ("UNBIND_PASID_TABLE", errno.ENOENT, "no IOASID 9", lambda c: c.unbind_pasid_table(9)),
    ("INVALIDATE_CACHE", errno.ENOENT, "no IOASID 9", lambda c: c.invalidate_cache(9)),
    (
        *("INVALIDATE_CACHE", errno.ENODEV, "0x0777"),
        lambda c: c.invalidate_cache(2, granularity="device", rid=0x777),
    ),
    ("INVALIDATE_CACHE", errno.EOPNOTSUPP, "no cache 'l2'", lambda c: c.invalidate_cache(2, caches=["l2"])),
    ("PREFETCH", errno.EINVAL, "at most", lambda c: c.prefetch(DEV1, 0, 2 << 20)),
    ("PREFETCH", errno.ENODEV, "no device", lambda c: c.prefetch(0x777, 0, PAGE)),
    ("PREFETCH", errno.EOVERFLOW, "2\\^64", lambda c: c.prefetch(DEV1, TOP, 2 * PAGE)),
    ("LOOKUP", errno.EINVAL, "no PASID table", lambda c: c.lookup(2, 0, pasid=1)),
    ("LOOKUP", errno.ENOENT, "no IOASID 9", lambda c: c.lookup(9, 0)),
    ("UNBIND_IOASID_FD", errno.ENODEV, "0x0777", lambda c: c.unbind_device(0x777)),
    ("ATTACH_IOASID", errno.EADDRINUSE, "reserves", lambda c: c.attach(DEV2, 1, pasid=None)),
    ("ATTACH_IOASID", errno.EINVAL, "not bound to this", lambda c: c.attach(0x50, 1)),
    ("ATTACH_IOASID", errno.EOVERFLOW, "2\\^64", lambda c: c.attach(DEV2, 4, direct_iova=TOP, direct_size=2 * PAGE)),
    ("ATTACH_IOASID", errno.EINVAL, "physical|not shown", lambda c: c.attach(DEV2, 4, pasid=1)),
    ("DETACH_IOASID", errno.EINVAL, "and not both", lambda c: c.detach(DEV1, pasid=1, vpasid=1)),
    ("DETACH_IOASID", errno.EBUSY, "detach it first", _detach_beneath_a_pasid),
    ("MAP_PASID", errno.EINVAL, "global pool", lambda c: c.map_pasid(1, 1)),
    ("MAP_PASID", errno.ENOENT, "no IOASID 9", lambda c: c.map_pasid(1, 9)),
    ("MAP_PASID", errno.EEXIST, "UNMAP_PASID first", lambda c: c.map_pasid(7, 4)),
    ("UNMAP_PASID", errno.EINVAL, "pasid", lambda c: c.unmap_pasid(1 << 20)),
    ("UNMAP_PASID", errno.ENOENT, "not mapped", lambda c: c.unmap_pasid(1)),
    ("READ_FAULTS", errno.EINVAL, "count", lambda c: c.read_faults(-1)),
    ("PAGE_RESPONSE", errno.EINVAL, "group", lambda c: c.page_response(DEV1, 512, Code.SUCCESS)),
    ("PAGE_RESPONSE", errno.ENODEV, "0x0777", lambda c: c.page_response(0x777, 1, Code.SUCCESS)),
    ("PAGE_RESPONSE", errno.ENOENT, "waits for no answer", lambda c: c.page_response(DEV1, 1, Code.SUCCESS)),
    ("PAGE_RESPONSE", errno.EOPNOTSUPP, "no code", lambda c: c.page_response(DEV1, 1, "x")),  # type: ignore[arg-type]
]  # fmt: skip


UNDONE = ("DETACH_IOASID", errno.EBUSY)
"""The row whose call first does something that is not refused."""


class Selfish:
    """Memory of a user who does not let us touch it."""

    def hva(self, vaddr: int, size: int, access: Access) -> int:
        raise IoasidError(errno.EPERM, "not yours")

    def vaddr(self, hva: int) -> int | None:
        return None


def _full(method: str, error: type[Exception]) -> Callable[[Context, pytest.MonkeyPatch], None]:
    """The core has no room: its limits are too far to reach here, so its answer is put in."""

    def full(*_: object, **__: object) -> None:
        raise error

    return lambda ctx, monkeypatch: monkeypatch.setattr(ctx.engine.core, method, full)


def _once(method: str, error: type[Exception]) -> Callable[[Context, pytest.MonkeyPatch], None]:
    """No room for what is new; what replaces something takes none."""

    def prepare(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
        real, left = getattr(ctx.engine.core, method), [error]

        def first(*args: object, **named: object) -> None:
            if left:
                raise left.pop()
            real(*args, **named)

        monkeypatch.setattr(ctx.engine.core, method, first)

    return prepare


def _limit(where: str) -> Callable[[Context, pytest.MonkeyPatch], None]:
    return lambda ctx, monkeypatch: monkeypatch.setattr(f"backend.ioasid.{where}", 0)


def _selfish(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctx, "memory", Selfish())


def _poor(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx.pinned.limit = ctx.pinned.pinned


def _foreign(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> None:
        raise IoasidError(errno.EPERM, f"process {pid} may not be touched")

    monkeypatch.setattr("backend.ioasid.bodies.open_process", refuse)


def _track(ctx: Context) -> None:
    ctx.set_dirty_tracking(1, True)


def _delegate(ctx: Context) -> None:
    ctx.bind_pasid_table(2, 0, GCR3)


Prepare = Callable[[Context, pytest.MonkeyPatch], None]
SHORT: list[tuple[str, int, Prepare, Callable[[Context], object]]] = [
    ("REGISTER_MEMORY", errno.EPERM, _selfish, lambda c: c.register_memory(0x7000_0000, PAGE)),
    ("REGISTER_MEMORY", errno.ENOMEM, _poor, lambda c: c.register_memory(0x7000_0000, PAGE)),
    ("REGISTER_MEMORY", errno.ENOSPC, _limit("memory.MAX_REGISTERED"), lambda c: c.register_memory(0x7000_0000, PAGE)),
    ("ALLOC", errno.EPERM, _foreign, lambda c: c.alloc(Kind.SVA, pid=1)),
    ("ALLOC", errno.ENOSPC, _limit("allocation.MAX_IOASIDS"), lambda c: c.alloc()),
    ("ALLOC", errno.ENOMEM, _full("create_host_space", NoMemoryError), lambda c: c.alloc()),
    ("CREATE_NESTING", errno.ENOSPC, _limit("allocation.MAX_CHILDREN"), lambda c: c.create_nesting(1)),
    ("CREATE_NESTING", errno.ENOMEM, _full("create_nested_space", NoMemoryError), lambda c: c.create_nesting(1)),
    ("MAP_DMA", errno.EPERM, _selfish, lambda c: c.map_dma(1, 0, GOLDEN, PAGE)),
    ("MAP_DMA", errno.ENOSPC, _limit("memory.MAX_MAPPINGS"), lambda c: c.map_dma(1, 0, GOLDEN, PAGE)),
    ("MAP_DMA", errno.ENOMEM, _full("map", MemoryError), lambda c: c.map_dma(1, 0, GOLDEN, PAGE)),
    ("SET_DIRTY_TRACKING", errno.ENOSPC, _full("set_dirty_tracking", LimitError), _track),
    ("SET_DIRTY_TRACKING", errno.ENOMEM, _full("set_dirty_tracking", NoMemoryError), _track),
    ("BIND_PGTABLE", errno.ENOSPC, _full("bind_table", LimitError), lambda c: c.bind_pgtable(2, 0, X86)),
    ("BIND_PGTABLE", errno.ENOMEM, _full("bind_table", NoMemoryError), lambda c: c.bind_pgtable(2, 0, X86)),
    ("BIND_PASID_TABLE", errno.ENOSPC, _once("attach", LimitError), _delegate),
    ("BIND_PASID_TABLE", errno.ENOMEM, _full("bind_pasid_table", NoMemoryError), _delegate),
    ("LOOKUP", errno.ENOSPC, _full("attach", LimitError), lambda c: c.lookup(1, 0)),
    ("LOOKUP", errno.ENOMEM, _full("attach", NoMemoryError), lambda c: c.lookup(1, 0)),
    ("ATTACH_IOASID", errno.ENOSPC, _limit("attachments.MAX_ATTACHMENTS"), lambda c: c.attach(DEV1, 3, pasid=1)),
    ("ATTACH_IOASID", errno.ENOMEM, _full("attach", NoMemoryError), lambda c: c.attach(DEV1, 3, pasid=1)),
    ("MAP_PASID", errno.ENOSPC, _limit("kvm_pasids.MAX_KVM_PASIDS"), lambda c: c.map_pasid(8, 4)),
]  # fmt: skip


RIDS = (DEV1, DEV2)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    ctx = guest.ctx
    ctx.unbind_device(DEV2)
    del guest.engine.devices[DEV2]
    traits = Traits(reserved=(Window(0, PAGE), Window(0x10000, 0x11000)), pasid_mode=PasidMode.GLOBAL)
    guest.dev2 = guest.engine.add_device(DEV2, "dev2", traits)
    guest.engine.add_device(0x50, "unbound")
    ctx.bind_device(DEV2)
    ctx.register_memory(GOLDEN, 16 * PAGE)
    made = [ctx.alloc(), ctx.create_nesting(1), ctx.create_nesting(1), ctx.alloc(), ctx.create_nesting(1),
            ctx.alloc(Kind.VM), ctx.create_nesting(1, Kind.KERNEL)]  # fmt: skip
    assert made == [1, 2, 3, 4, 5, 6, 7]
    ctx.map_dma(1, 0x10000, GOLDEN, 0x4000)
    ctx.bind_pgtable(3, 0x1000, PgtableFormat())
    ctx.bind_pasid_table(5, 0x1000, GCR3)
    ctx.attach(DEV1, 1)
    ctx.attach(DEV1, 2)
    ctx.attach(DEV2, 4, vpasid=7)
    ctx.map_pasid(7, 4)
    yield guest
    guest.close()


def state(guest: Guest) -> object:
    """All that can be told about it, but for what counts on."""
    ctx, engine = guest.ctx, guest.engine
    found = [*(asdict(ctx.get_info(each)) for each in ctx.ioasids), *(asdict(ctx.get_info(rid=each)) for each in RIDS)]
    infos = [{name: value for name, value in each.items() if name != "counters"} for each in found]
    core = engine.core.counters()
    held = [(space.body, space.pasid_table) for space in ctx._spaces.values()]
    pinned = (ctx.pinned.pinned, len(ctx.pinned), [ctx.pinned.at(GOLDEN)])
    translated = [guest.hva(rid, iova) for rid in (DEV1, DEV2) for iova in (0, 0x10000, 0x13000)]
    faults = (ctx.faults.waiting, ctx.faults.unread)
    return infos, core.spaces, held, str(pinned), translated, faults, len(engine.kvm), len(engine.shared_pasids)


@pytest.mark.parametrize(("command", "code", "words", "call"), MORE, ids=[f"{row[0]}-{row[2]}" for row in MORE])
def test_refused_and_nothing_changed(
    guest: Guest, command: str, code: int, words: str, call: Callable[[Context], object]
) -> None:
    before = state(guest)
    with pytest.raises(IoasidError, match=words) as refusal:
        call(guest.ctx)
    assert refusal.value.errno == code
    assert refusal.value.sentence.startswith(f"{command}: ")
    if (command, code) != UNDONE:
        assert state(guest) == before


@pytest.mark.parametrize("row", SHORT, ids=[f"{row[0]}-{errno.errorcode[row[1]]}" for row in SHORT])
def test_without_room_or_leave(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, row: tuple[str, int, Prepare, Callable[[Context], object]]
) -> None:
    command, code, prepare, call = row
    before = state(guest)
    with monkeypatch.context() as patch:
        prepare(guest.ctx, patch)
        with pytest.raises(IoasidError) as refusal:
            call(guest.ctx)
    assert refusal.value.errno == code
    assert refusal.value.sentence.startswith(f"{command}: ")
    assert state(guest) == before


def test_every_errno_of_the_table_was_provoked() -> None:
    provoked = {(row[0], row[1]) for rows in (REFUSED, MORE, SHORT) for row in rows}
    declared = {(command.name, code) for command in COMMANDS.values() for code in command.errors}
    assert declared - provoked == set()
    assert provoked - declared == set()


def test_a_closed_context_takes_no_command(guest: Guest) -> None:
    ctx = guest.ctx
    ctx.close()
    for _, _, _, call in MORE:
        with pytest.raises(IoasidError, match="closed") as refusal:
            call(ctx)
        assert refusal.value.errno == errno.EBADF


def test_nesting_across_contexts(guest: Guest) -> None:
    other = guest.engine.open()
    calls: list[Callable[[], object]] = [
        lambda: other.create_nesting(1),
        lambda: other.alloc(Kind.USER, parent=1),
        lambda: other.alloc(Kind.KERNEL, parent=1),
    ]
    for call in calls:
        with pytest.raises(IoasidError, match="in this context") as refusal:
            call()
        assert refusal.value.errno == errno.ENOENT
