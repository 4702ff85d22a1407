"""The commands: what they do (flows of the RFC, v1 section 5, with its golden numbers) and what they refuse."""

import ctypes
import errno
import mmap
from collections.abc import Callable, Iterator

import pytest
from guest_ram import PAGE, AmdTables, Ram

from backend.core import Access, Fault, LimitError, Reason, Translation
from backend.ioasid import COMMANDS, Context, Engine, Info, IoasidError, Kind, PgtableFormat

RW = Access.READ | Access.WRITE
GIB = 1 << 30
DEV1, DEV2 = 0x0100, 0x0208
AMD = PgtableFormat("amd-v1", 4)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    engine.add_device(DEV1, "dev1")
    engine.add_device(DEV2, "dev2")
    yield engine
    engine.close()


@pytest.fixture
def ctx(engine: Engine) -> Context:
    context = engine.open()
    context.bind_device(DEV1)
    context.bind_device(DEV2)
    return context


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram(64 * PAGE)
    yield ram
    ram.close()


@pytest.fixture
def golden_ram() -> Iterator[Ram]:
    """GPA [0, 64K) really stands at HVA 0x40000000, so that tables can be walked there."""
    ram = Ram(16 * PAGE)
    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    fixed_noreplace = 0x100000
    where = libc.mmap(GIB, ram.size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed_noreplace, ram.fd, 0)
    assert where == GIB
    yield ram
    libc.munmap(where, ram.size)
    ram.close()


def hva_of(engine: Engine, rid: int, iova: int, access: Access = Access.READ) -> int | Reason:
    answer = engine.core.translate(rid, iova, access)
    return answer.reason if isinstance(answer, Fault) else answer.hva


def test_simple_flow(engine: Engine, ctx: Context) -> None:
    gpa = ctx.alloc(Kind.KERNEL)
    ctx.attach(DEV1, gpa)
    ctx.attach(DEV2, gpa)
    ctx.map_dma(gpa, 0, 0x40000000, GIB)
    assert hva_of(engine, DEV1, 0x1000) == hva_of(engine, DEV2, 0x1000) == 0x40001000
    assert hva_of(engine, DEV1, GIB - 1) == 0x7FFFFFFF
    assert hva_of(engine, DEV1, GIB) == Reason.NOT_PRESENT
    ctx.unmap_dma(gpa, 0, GIB)
    assert hva_of(engine, DEV1, 0x1000) == Reason.NOT_PRESENT


def test_several_ioasids_without_nesting(engine: Engine, ctx: Context) -> None:
    gpa, giova = ctx.alloc(), ctx.alloc()
    ctx.attach(DEV1, gpa)
    ctx.attach(DEV2, gpa)
    ctx.map_dma(gpa, 0, 0x40000000, GIB)
    ctx.detach(DEV2)
    assert hva_of(engine, DEV2, 0x1000) == Reason.NO_ROUTE
    ctx.attach(DEV2, giova)
    ctx.map_dma(giova, 0x2000, 0x40001000, 0x1000)
    assert hva_of(engine, DEV2, 0x2000) == 0x40001000
    assert hva_of(engine, DEV2, 0x1000) == Reason.NOT_PRESENT
    assert hva_of(engine, DEV1, 0x1000) == 0x40001000


def test_hardware_nesting(engine: Engine, ctx: Context, golden_ram: Ram) -> None:
    tables = AmdTables(golden_ram, 0x8000)
    tables.map(0x2000, 0x1000)
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, 0x40000000, golden_ram.size)
    ctx.attach(DEV1, gpa)
    ctx.attach(DEV2, gpa)
    giova = ctx.create_nesting(gpa)
    ctx.attach(DEV2, giova)
    assert hva_of(engine, DEV2, 0x2000) == Reason.NOT_BOUND
    ctx.bind_pgtable(giova, tables.root, AMD)
    answer = engine.core.translate(DEV2, 0x2000, Access.READ)
    assert isinstance(answer, Translation)
    assert (answer.gpa, answer.hva) == (0x1000, 0x40001000)
    assert hva_of(engine, DEV1, 0x2000) == 0x40002000

    tables.map(0x2000, 0x3000)
    ctx.invalidate_cache(giova, granularity="range", iova=0x2000, size=0x1000)
    assert hva_of(engine, DEV2, 0x2000) == 0x40003000
    tables.map(0x2000, 0x4000)
    ctx.invalidate_cache(giova)
    assert hva_of(engine, DEV2, 0x2000) == 0x40004000

    ctx.unbind_pgtable(giova)
    assert hva_of(engine, DEV2, 0x2000) == Reason.NOT_BOUND
    ctx.detach(DEV2)
    assert hva_of(engine, DEV2, 0x2000) == 0x40002000
    ctx.detach(DEV2)
    assert hva_of(engine, DEV2, 0x2000) == Reason.NO_ROUTE


def test_child_per_pasid(engine: Engine, ctx: Context, golden_ram: Ram) -> None:
    tables = AmdTables(golden_ram, 0x8000)
    tables.map(0x2000, 0x1000)
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, 0x40000000, golden_ram.size)
    ctx.attach(DEV1, gpa)
    gva = ctx.create_nesting(gpa)
    ctx.bind_pgtable(gva, tables.root, AMD)
    ctx.attach(DEV1, gva, pasid=5)
    answer = engine.core.translate(DEV1, 0x2000, Access.READ, pasid=5)
    assert isinstance(answer, Translation)
    assert answer.hva == 0x40001000
    assert hva_of(engine, DEV1, 0x2000) == 0x40002000
    with pytest.raises(IoasidError, match="PASID 5 of dev1") as refused:
        ctx.detach(DEV1)
    assert refused.value.errno == errno.EBUSY
    ctx.detach(DEV1, pasid=5)
    assert isinstance(engine.core.translate(DEV1, 0x2000, Access.READ, pasid=5), Fault)
    ctx.detach(DEV1)


def test_attachment_bounds_access(engine: Engine, ctx: Context, ram: Ram) -> None:
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, ram.hva, ram.size)
    ctx.attach(DEV1, gpa, access=Access.READ)
    assert hva_of(engine, DEV1, 0) == ram.hva
    assert isinstance(hva_of(engine, DEV1, 0, Access.WRITE), Reason)
    ctx.detach(DEV1)
    ctx.attach(DEV1, gpa, access=Access(0))
    assert isinstance(hva_of(engine, DEV1, 0), Reason)


def test_read_only_mapping(engine: Engine, ctx: Context, ram: Ram) -> None:
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, ram.hva, PAGE, Access.READ)
    ctx.attach(DEV1, gpa)
    assert hva_of(engine, DEV1, 0) == ram.hva
    assert hva_of(engine, DEV1, 0, Access.WRITE) == Reason.PERMISSION


def test_get_info(ctx: Context, ram: Ram) -> None:
    gpa = ctx.alloc(levels=3)
    ctx.map_dma(gpa, 0, ram.hva, 2 * PAGE)
    ctx.map_dma(gpa, 4 * PAGE, ram.hva, PAGE)
    ctx.attach(DEV1, gpa)
    child = ctx.create_nesting(gpa)
    info = ctx.get_info(gpa)
    assert (info.ioasid, info.kind, info.parent) == (gpa, Kind.KERNEL, None)
    assert info.format == PgtableFormat("amd-v1", 3, address_width=39, granule=4096)
    assert info.address_width == 39
    assert info.page_sizes == (1 << 12, 1 << 21, 1 << 30)
    assert (info.children, info.attachments, info.mappings, info.mapped) == (1, 1, 2, 3 * PAGE)
    assert "MAP_DMA" in info.commands and "INVALIDATE_CACHE" not in info.commands
    assert info.bindable[0].vendor == "amd-v1"
    # 48882, 2.2.3: each level takes 9 bits above the 12 of a page; six levels reach all 64.
    assert dict(zip(info.bindable[0].levels, info.bindable[0].address_widths, strict=True)) == {
        1: 21,
        2: 30,
        3: 39,
        4: 48,
        5: 57,
        6: 64,
    }
    unbound = ctx.get_info(child)
    assert (unbound.kind, unbound.format, unbound.address_width, unbound.parent) == (Kind.USER, None, None, gpa)
    assert "MAP_DMA" not in unbound.commands and "BIND_PGTABLE" in unbound.commands
    ctx.bind_pgtable(child, 0x1000, AMD)
    bound = ctx.get_info(child)
    assert bound.format == PgtableFormat("amd-v1", 4, address_width=48, granule=4096)
    assert (bound.root, bound.address_width) == (0x1000, 48)


def test_numbers_are_local_and_lowest_first(engine: Engine) -> None:
    one, other = engine.open(), engine.open()
    assert [one.alloc() for _ in range(3)] == [1, 2, 3]
    assert other.alloc() == 1
    one.free(2)
    one.free(1)
    assert [one.alloc() for _ in range(3)] == [1, 2, 4]
    with pytest.raises(IoasidError):
        other.get_info(2)


def test_close_gives_all_back(engine: Engine, ram: Ram) -> None:
    before = engine.core.counters()
    context = engine.open()
    context.bind_device(DEV1)
    gpa = context.alloc()
    context.map_dma(gpa, 0, ram.hva, PAGE)
    child = context.create_nesting(gpa)
    context.attach(DEV1, gpa)
    context.attach(DEV1, child)
    context.attach(DEV1, child, pasid=1)
    context.close()
    context.close()
    assert hva_of(engine, DEV1, 0) == Reason.NO_ROUTE
    assert engine.core.counters().spaces == before.spaces
    assert context not in engine.contexts
    with pytest.raises(IoasidError, match="closed") as refused:
        context.alloc()
    assert refused.value.errno == errno.EBADF
    engine.open().bind_device(DEV1)


# Refusals. `ctx` has: 1, a kernel IOASID of 48 bits with [0x10000, 0x14000) mapped and dev1 attached; 2, a child of it
# with dev1 attached; 3, a child with a bound table; 4, an empty kernel IOASID. dev2 is bound and attached to nothing.

HVA = 0x40000000
Refusal = tuple[str, int, str, Callable[[Context], object]]
REFUSED: list[Refusal] = [
    ("ALLOC", errno.EINVAL, "on a root", lambda c: c.alloc(Kind.USER)),
    ("ALLOC", errno.EOPNOTSUPP, "no-such-format", lambda c: c.alloc(vendor="no-such-format")),
    ("ALLOC", errno.EOPNOTSUPP, "7 levels", lambda c: c.alloc(levels=7)),
    ("ALLOC", errno.EINVAL, "levels", lambda c: c.alloc(levels=-1)),
    ("FREE", errno.ENOENT, "no IOASID 9", lambda c: c.free(9)),
    ("FREE", errno.EBUSY, "2 children", lambda c: c.free(1)),
    ("FREE", errno.EBUSY, "1 attachments", lambda c: c.free(2)),
    ("GET_INFO", errno.ENOENT, "no IOASID 0", lambda c: c.get_info(0)),
    ("GET_INFO", errno.EINVAL, "does not lie in", lambda c: c.get_info(-1)),
    ("MAP_DMA", errno.ENOENT, "no IOASID 9", lambda c: c.map_dma(9, 0, HVA, PAGE)),
    ("MAP_DMA", errno.EINVAL, "kind user", lambda c: c.map_dma(2, 0, HVA, PAGE)),
    ("MAP_DMA", errno.EINVAL, "iova 0x800 is not a multiple", lambda c: c.map_dma(1, 0x800, HVA, PAGE)),
    ("MAP_DMA", errno.EINVAL, "vaddr 0x40000001 is not a multiple", lambda c: c.map_dma(1, 0, HVA + 1, PAGE)),
    ("MAP_DMA", errno.EINVAL, "size 0x1fff is not a multiple", lambda c: c.map_dma(1, 0, HVA, 0x1FFF)),
    ("MAP_DMA", errno.EINVAL, "at least one page", lambda c: c.map_dma(1, 0, HVA, 0)),
    ("MAP_DMA", errno.EINVAL, "neither read nor write", lambda c: c.map_dma(1, 0, HVA, PAGE, Access(0))),
    ("MAP_DMA", errno.EFAULT, "no memory of this process", lambda c: c.map_dma(1, 0, 0, PAGE)),
    ("MAP_DMA", errno.EFAULT, "no memory of this process", lambda c: c.map_dma(1, 0, (1 << 47) - PAGE, 2 * PAGE)),
    ("MAP_DMA", errno.EOVERFLOW, "iova", lambda c: c.map_dma(1, (1 << 64) - PAGE, HVA, 2 * PAGE)),
    ("MAP_DMA", errno.EOVERFLOW, "vaddr", lambda c: c.map_dma(1, 0, (1 << 64) - PAGE, 2 * PAGE)),
    ("MAP_DMA", errno.EINVAL, "48 bits", lambda c: c.map_dma(1, 1 << 48, HVA, PAGE)),
    ("MAP_DMA", errno.EINVAL, "48 bits", lambda c: c.map_dma(1, (1 << 48) - PAGE, HVA, 2 * PAGE)),
    ("MAP_DMA", errno.EEXIST, r"\[0x10000, 0x14000\)", lambda c: c.map_dma(1, 0x13000, HVA, PAGE)),
    ("MAP_DMA", errno.EEXIST, "overlaps", lambda c: c.map_dma(1, 0xF000, HVA, 2 * PAGE)),
    ("MAP_DMA", errno.EEXIST, "overlaps", lambda c: c.map_dma(1, 0, HVA, 1 << 20)),
    ("UNMAP_DMA", errno.EINVAL, "kind user", lambda c: c.unmap_dma(2, 0, PAGE)),
    ("UNMAP_DMA", errno.EINVAL, "0x4000 were mapped", lambda c: c.unmap_dma(1, 0x10000, PAGE)),
    ("UNMAP_DMA", errno.EINVAL, "0x4000 were mapped", lambda c: c.unmap_dma(1, 0x10000, 0x5000)),
    ("UNMAP_DMA", errno.ENOENT, "begins at 0x11000", lambda c: c.unmap_dma(1, 0x11000, 0x3000)),
    ("UNMAP_DMA", errno.EOVERFLOW, "2\\^64", lambda c: c.unmap_dma(1, (1 << 64) - PAGE, 2 * PAGE)),
    ("CREATE_NESTING", errno.ENOENT, "no IOASID 9", lambda c: c.create_nesting(9)),
    ("CREATE_NESTING", errno.EINVAL, "guest-managed", lambda c: c.create_nesting(2, Kind.KERNEL)),
    ("BIND_PGTABLE", errno.EINVAL, "kind kernel", lambda c: c.bind_pgtable(1, 0, AMD)),
    ("BIND_PGTABLE", errno.EINVAL, "root 0x8", lambda c: c.bind_pgtable(2, 8, AMD)),
    ("BIND_PGTABLE", errno.EINVAL, "52 bits", lambda c: c.bind_pgtable(2, 1 << 52, AMD)),
    ("BIND_PGTABLE", errno.EBUSY, "UNBIND_PGTABLE first", lambda c: c.bind_pgtable(3, 0, AMD)),
    ("BIND_PGTABLE", errno.EOPNOTSUPP, "amd-v1", lambda c: c.bind_pgtable(2, 0, PgtableFormat("vtd-s1", 4))),
    ("BIND_PGTABLE", errno.EOPNOTSUPP, "7 levels", lambda c: c.bind_pgtable(2, 0, PgtableFormat("amd-v1", 7))),
    ("BIND_PGTABLE", errno.EINVAL, "ask for both", lambda c: c.bind_pgtable(2, 0, PgtableFormat(dirty=True))),
    ("UNBIND_PGTABLE", errno.EINVAL, "no page table is bound", lambda c: c.unbind_pgtable(2)),
    ("UNBIND_PGTABLE", errno.EINVAL, "kind kernel", lambda c: c.unbind_pgtable(1)),
    ("INVALIDATE_CACHE", errno.EINVAL, "kind kernel", lambda c: c.invalidate_cache(1)),
    ("INVALIDATE_CACHE", errno.EINVAL, "takes no range", lambda c: c.invalidate_cache(2, iova=PAGE)),
    ("INVALIDATE_CACHE", errno.EINVAL, "at least one page", lambda c: c.invalidate_cache(2, granularity="range")),
    (
        *("INVALIDATE_CACHE", errno.EOVERFLOW, "2\\^64"),
        lambda c: c.invalidate_cache(2, granularity="range", iova=(1 << 64) - PAGE, size=2 * PAGE),
    ),
    (
        "INVALIDATE_CACHE",
        errno.EOPNOTSUPP,
        "no granularity 'half'",
        lambda c: c.invalidate_cache(2, granularity="half"),
    ),
    ("BIND_IOASID_FD", errno.ENODEV, "0x0777", lambda c: c.bind_device(0x777)),
    ("BIND_IOASID_FD", errno.EINVAL, "rid 0x10000", lambda c: c.bind_device(0x10000)),
    ("BIND_IOASID_FD", errno.EINVAL, "cookie", lambda c: c.bind_device(DEV1, 1 << 64)),
    ("BIND_IOASID_FD", errno.EBUSY, "this context", lambda c: c.bind_device(DEV1)),
    ("BIND_IOASID_FD", errno.EBUSY, "another context", lambda c: c.engine.open().bind_device(DEV1)),
    ("UNBIND_IOASID_FD", errno.EBUSY, "attached 2 times", lambda c: c.unbind_device(DEV1)),
    ("UNBIND_IOASID_FD", errno.EINVAL, "not bound to this", lambda c: c.engine.open().unbind_device(DEV1)),
    ("ATTACH_IOASID", errno.ENODEV, "0x0777", lambda c: c.attach(0x777, 1)),
    ("ATTACH_IOASID", errno.ENOENT, "no IOASID 9", lambda c: c.attach(DEV2, 9)),
    ("ATTACH_IOASID", errno.EBUSY, "already", lambda c: c.attach(DEV1, 1)),
    ("ATTACH_IOASID", errno.EBUSY, "already", lambda c: c.attach(DEV1, 2)),
    ("ATTACH_IOASID", errno.EBUSY, "already", lambda c: c.attach(DEV1, 3)),
    ("ATTACH_IOASID", errno.EBUSY, "already", lambda c: c.attach(DEV1, 4)),
    ("ATTACH_IOASID", errno.EINVAL, "not attached to IOASID 1, the parent of 2", lambda c: c.attach(DEV2, 2)),
    ("ATTACH_IOASID", errno.EINVAL, "the parent of 2", lambda c: c.attach(DEV2, 2, pasid=1)),
    ("ATTACH_IOASID", errno.EINVAL, "pasid 0x100000", lambda c: c.attach(DEV1, 2, pasid=1 << 20)),
    ("ATTACH_IOASID", errno.EINVAL, "access", lambda c: c.attach(DEV2, 1, access=Access(8))),
    ("DETACH_IOASID", errno.ENOENT, "dev2 (02:01.0) is not attached", lambda c: c.detach(DEV2)),
    ("DETACH_IOASID", errno.ENOENT, "PASID 3 of dev1", lambda c: c.detach(DEV1, pasid=3)),
    ("DETACH_IOASID", errno.ENODEV, "0x0777", lambda c: c.detach(0x777)),
]


@pytest.mark.parametrize("refusal", REFUSED, ids=[f"{row[0]}-{row[2]}" for row in REFUSED])
def test_refused_and_nothing_changed(engine: Engine, ctx: Context, refusal: Refusal) -> None:
    command, code, words, call = refusal
    assert [ctx.alloc(), ctx.create_nesting(1), ctx.create_nesting(1), ctx.alloc()] == [1, 2, 3, 4]
    ctx.map_dma(1, 0x10000, HVA, 0x4000)
    ctx.bind_pgtable(3, 0x1000, AMD)
    ctx.attach(DEV1, 1)
    ctx.attach(DEV1, 2)

    def state() -> tuple[list[Info], object]:
        devices = [(d.context, d.cookie, {p: list(s) for p, s in d.stacks.items()}) for d in engine.devices.values()]
        core = engine.core.counters()
        translated = [hva_of(engine, rid, iova) for rid in (DEV1, DEV2) for iova in (0, 0x10000, 0x13000)]
        return [ctx.get_info(each) for each in range(1, 5)], (devices, core.spaces, core.routes, translated)

    before = state()
    words = words.replace("(02:01.0)", r"\(02:01.0\)")
    with pytest.raises(IoasidError, match=words) as refused:
        call(ctx)
    assert refused.value.errno == code
    assert refused.value.sentence.startswith(f"{command}: ")
    assert code in COMMANDS[command].errors
    assert without_counters(state()) == without_counters(before)
    with pytest.raises(IoasidError):
        ctx.get_info(5)


def without_counters(state: tuple[list[Info], object]) -> object:
    infos, rest = state
    names = ("kind", "format", "root", "parent", "children", "attachments", "mappings", "mapped")
    return [[getattr(info, name) for name in names] for info in infos], rest


def test_one_context_cannot_use_what_another_owns(engine: Engine, ctx: Context) -> None:
    ctx.alloc()
    other = engine.open()
    for call in (lambda: other.create_nesting(1), lambda: other.free(1), lambda: other.attach(DEV1, 1)):
        with pytest.raises(IoasidError):
            call()


def test_devices_of_the_engine(engine: Engine) -> None:
    with pytest.raises(IoasidError, match="dev1") as taken:
        engine.add_device(DEV1, "twin")
    assert taken.value.errno == errno.EEXIST
    with pytest.raises(IoasidError) as wide:
        engine.add_device(0x10000, "wide")
    assert wide.value.errno == errno.EINVAL


def test_bounds(engine: Engine, ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.ioasid.allocation.MAX_IOASIDS", 4)
    monkeypatch.setattr("backend.ioasid.allocation.MAX_CHILDREN", 2)
    monkeypatch.setattr("backend.ioasid.memory.MAX_MAPPINGS", 2)
    monkeypatch.setattr("backend.ioasid.attachments.MAX_ATTACHMENTS", 2)
    monkeypatch.setattr("backend.ioasid.engine.MAX_CONTEXTS", 2)
    ctx.alloc()
    ctx.create_nesting(1)
    ctx.create_nesting(1)
    ctx.map_dma(1, 0, HVA, PAGE)
    ctx.map_dma(1, PAGE, HVA, PAGE)
    ctx.attach(DEV1, 1)
    ctx.attach(DEV1, 2)
    engine.open()
    full: list[Callable[[], object]] = [
        lambda: ctx.create_nesting(1),
        lambda: ctx.map_dma(1, 2 * PAGE, HVA, PAGE),
        lambda: ctx.attach(DEV1, 2, pasid=1),
        engine.open,
    ]
    for call in full:
        with pytest.raises(IoasidError) as refused:
            call()
        assert refused.value.errno == errno.ENOSPC
    ctx.alloc()
    with pytest.raises(IoasidError, match="4 IOASIDs") as refused:
        ctx.alloc()
    assert refused.value.errno == errno.ENOSPC


def test_core_without_room_is_an_answer(engine: Engine, ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core bounds what all contexts take together; its limit is too far to reach here, so its answer is put in."""
    ctx.alloc()

    def full(*_: object, **__: object) -> None:
        raise LimitError

    for method, call in (
        ("map", lambda: ctx.map_dma(1, 0, HVA, PAGE)),
        ("attach", lambda: ctx.attach(DEV1, 1)),
        ("create_nested_space", lambda: ctx.create_nesting(1)),
        ("create_host_space", ctx.alloc),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(engine.core, method, full)
            with pytest.raises(IoasidError, match="no room left") as refused:
                call()
        assert refused.value.errno == errno.ENOSPC
        info = ctx.get_info(1)
        assert (info.mappings, info.attachments, info.children) == (0, 0, 0)
    assert ctx.alloc() == 2
