"""PASID virtualisation: delegated, per-RID and global; what the CPU translates; and what is refused."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from ioasid_guest import DEV1, DEV2, GOLDEN, Guest, gcr3_table, refused, x86_tables

from backend.core import Reason
from backend.ioasid import Context, Device, Engine, IoasidError, PasidMode, PasidTableFormat, PgtableFormat, Traits
from backend.ioasid.pasid_pool import PasidPool

X86 = PgtableFormat("x86", 4)


def mediated(mode: PasidMode) -> Iterator[Guest]:
    """Both devices on 1, which holds the guest's memory; 2, a child of it, maps 0x2000 to 0x1000."""
    guest = Guest(Traits(pasid_mode=mode))
    ctx = guest.ctx
    assert (ctx.alloc(), ctx.create_nesting(1)) == (1, 2)
    ctx.map_dma(1, 0, GOLDEN, guest.ram.size)
    ctx.bind_pgtable(2, x86_tables(guest.ram, 0x8000, {0x2000: 0x1000}), X86)
    ctx.attach(DEV1, 1)
    ctx.attach(DEV2, 1)
    yield guest
    guest.close()


@pytest.fixture
def whole() -> Iterator[Guest]:
    yield from mediated(PasidMode.WHOLE)


@pytest.fixture
def per_rid() -> Iterator[Guest]:
    yield from mediated(PasidMode.PER_RID)


@pytest.fixture
def shared() -> Iterator[Guest]:
    yield from mediated(PasidMode.GLOBAL)


def seen(context: Context, rid: int) -> list[tuple[int | None, int]]:
    return [(each.pasid, each.ioasid) for each in context.get_info(rid=rid).attachments]


def physical(device: Device, vpasid: int) -> int:
    found = device.physical(vpasid)
    assert found is not None
    assert device.virtual(found) == vpasid, "and back"
    return found


def test_of_a_whole_device_both_are_one(whole: Guest) -> None:
    whole.ctx.attach(DEV1, 2, vpasid=7)
    assert physical(whole.dev1, 7) == 7
    assert whole.hva(DEV1, 0x2000, pasid=7) == GOLDEN + 0x1000
    whole.ctx.detach(DEV1, pasid=7)
    assert whole.hva(DEV1, 0x2000, pasid=7) == Reason.NO_ROUTE


def test_per_rid(per_rid: Guest) -> None:
    ctx = per_rid.ctx
    ctx.attach(DEV1, 2, vpasid=7)
    ctx.attach(DEV2, 2, vpasid=7)
    ctx.attach(DEV1, 2, vpasid=8)
    one, two = physical(per_rid.dev1, 7), physical(per_rid.dev1, 8)
    assert len({one, two, 7, 8}) == 4
    assert per_rid.hva(DEV1, 0x2000, pasid=one) == per_rid.hva(DEV1, 0x2000, pasid=two) == GOLDEN + 0x1000
    assert per_rid.hva(DEV1, 0x2000, pasid=7) == Reason.NO_ROUTE, "the guest's own number leads nowhere"
    assert seen(ctx, DEV1) == [(None, 1), (7, 2), (8, 2)], "the physical one is not shown"
    ctx.detach(DEV1, vpasid=7)
    assert per_rid.dev1.physical(7) is None
    assert per_rid.hva(DEV1, 0x2000, pasid=one) == Reason.NO_ROUTE
    assert physical(per_rid.dev2, 7) and physical(per_rid.dev1, 8) == two


def test_global_one_for_each_vm_and_pasid(shared: Guest) -> None:
    ctx = shared.ctx
    ctx.attach(DEV1, 2, vpasid=7)
    ctx.attach(DEV2, 2, vpasid=7)
    ctx.attach(DEV1, 2, vpasid=8)
    one = physical(shared.dev1, 7)
    assert one == physical(shared.dev2, 7) and one not in {7, physical(shared.dev1, 8)}
    ctx.detach(DEV1, vpasid=7)
    assert shared.hva(DEV2, 0x2000, pasid=one) == GOLDEN + 0x1000
    ctx.attach(DEV1, 2, vpasid=7)
    assert physical(shared.dev1, 7) == one, "dev2 has kept it"
    for rid in (DEV1, DEV2):
        ctx.detach(rid, vpasid=7)
    assert len(shared.engine.shared_pasids) == 1


def test_global_two_vms_and_two_contexts_of_one() -> None:
    engine = Engine()
    traits = Traits(pasid_mode=PasidMode.GLOBAL)
    devices = [engine.add_device(rid, f"d{rid}", traits) for rid in range(3)]
    one, again, other = engine.open(vm="one"), engine.open(vm="one"), engine.open()
    for context, device in zip((one, again, other), devices, strict=True):
        context.bind_device(device.rid)
        context.attach(device.rid, context.alloc(), vpasid=5)
    assert devices[0].physical(5) == devices[1].physical(5) != devices[2].physical(5)
    engine.close()
    assert len(engine.shared_pasids) == 0


def test_what_the_cpu_translates(shared: Guest) -> None:
    ctx, kvm = shared.ctx, shared.engine.kvm
    assert refused(lambda: ctx.map_pasid(7, 2)) == errno.EINVAL, "nothing is attached under a PASID"
    ctx.attach(DEV1, 2, vpasid=7)
    ctx.attach(DEV2, 2, vpasid=7)
    ctx.map_pasid(7, 2)
    assert kvm.translate(ctx.vm, 7) == physical(shared.dev1, 7)
    assert kvm.translate(object(), 7) is None, "another VM's PASID"
    assert refused(lambda: ctx.map_pasid(7, 2)) == errno.EEXIST
    assert refused(lambda: ctx.map_pasid(8, 9)) == errno.ENOENT
    ctx.map_pasid(9, 2)
    ctx.unmap_pasid(9)
    assert refused(lambda: ctx.unmap_pasid(9)) == errno.ENOENT
    ctx.detach(DEV1, vpasid=7)
    assert kvm.translate(ctx.vm, 7) is not None, "dev2 is still reached"
    ctx.detach(DEV2, vpasid=7)
    assert kvm.translate(ctx.vm, 7) is None and len(kvm) == 0
    ctx.attach(DEV1, 2, vpasid=1)
    ctx.attach(DEV1, 2, vpasid=2)
    assert refused(lambda: ctx.map_pasid(1, 2)) == errno.EINVAL, "one IOASID, two PASIDs"
    ctx.detach(DEV1, vpasid=2)
    ctx.map_pasid(1, 2)
    ctx.close()
    assert len(kvm) == 0


def test_the_cpu_translates_nothing_for_other_devices(whole: Guest) -> None:
    whole.ctx.attach(DEV1, 2, vpasid=7)
    assert refused(lambda: whole.ctx.map_pasid(7, 2)) == errno.EINVAL


def test_kvm_is_bounded(shared: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.ioasid.kvm_pasids.MAX_KVM_PASIDS", 2)
    shared.ctx.attach(DEV1, 2, vpasid=7)
    shared.ctx.map_pasid(1, 2)
    shared.ctx.map_pasid(2, 2)
    assert refused(lambda: shared.ctx.map_pasid(3, 2)) == errno.ENOSPC


def test_pools_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(Traits(pasid_mode=PasidMode.PER_RID, pasid_bits=2))
    ioasid = guest.ctx.alloc()
    for vpasid in (100, 200, 300):
        guest.ctx.attach(DEV1, ioasid, vpasid=vpasid)
    assert sorted(physical(guest.dev1, each) for each in (100, 200, 300)) == [1, 2, 3]
    assert refused(lambda: guest.ctx.attach(DEV1, ioasid, vpasid=400)) == errno.ENOSPC
    guest.ctx.detach(DEV1, vpasid=200)
    guest.ctx.attach(DEV1, ioasid, vpasid=400)

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    guest.ctx.detach(DEV1, vpasid=400)
    with monkeypatch.context() as patch:
        patch.setattr(guest.engine.core, "attach", full)
        assert refused(lambda: guest.ctx.attach(DEV1, ioasid, vpasid=500)) == errno.ENOMEM
    assert guest.dev1.physical(500) is None and guest.dev1.attachments == 2
    guest.ctx.attach(DEV1, ioasid, vpasid=500)
    guest.close()


def test_a_pasid_where_the_table_is_the_guests_own(whole: Guest) -> None:
    ctx = whole.ctx
    table = gcr3_table(whole.ram, 0x20000, {})
    space = ctx.create_nesting(1)
    ctx.bind_pasid_table(space, table, PasidTableFormat())
    assert refused(lambda: ctx.attach(DEV1, space, vpasid=7)) == errno.EINVAL
    assert refused(lambda: ctx.attach(DEV1, space, pasid=7)) == errno.EINVAL
    ctx.attach(DEV1, space)
    assert refused(lambda: ctx.attach(DEV1, 2, vpasid=7)) == errno.EINVAL, "this device's PASIDs are all delegated"
    ctx.attach(DEV2, 2, vpasid=7)
    assert refused(lambda: ctx.attach(DEV2, space)) == errno.EINVAL, "this one's are registered one by one"
    other = ctx.create_nesting(1)
    ctx.attach(DEV2, other, vpasid=8)
    assert refused(lambda: ctx.bind_pasid_table(other, table, PasidTableFormat())) == errno.EINVAL


@pytest.mark.parametrize("mode", [PasidMode.PER_RID, PasidMode.GLOBAL])
def test_none_where_every_request_carries_one(mode: PasidMode) -> None:
    for guest in mediated(mode):
        ctx = guest.ctx
        assert refused(lambda ctx=ctx: ctx.attach(DEV1, 2)) == errno.EINVAL  # type: ignore[misc]
        assert refused(lambda ctx=ctx: ctx.attach(DEV1, 2, pasid=7)) == errno.EINVAL, "physical ones are the host's"  # type: ignore[misc]
        space = ctx.create_nesting(1)
        ctx.bind_pasid_table(space, 0x20000, PasidTableFormat())
        assert refused(lambda ctx=ctx, space=space: ctx.attach(DEV1, space)) == errno.EINVAL  # type: ignore[misc]


def test_pasids_that_a_device_does_not_have() -> None:
    guest = Guest(Traits(pasid_bits=4))
    ioasid = guest.ctx.alloc()
    guest.ctx.attach(DEV1, ioasid, pasid=15)
    assert refused(lambda: guest.ctx.attach(DEV1, ioasid, pasid=16)) == errno.EINVAL
    assert refused(lambda: guest.ctx.attach(DEV1, ioasid, pasid=1, vpasid=1)) == errno.EINVAL
    assert refused(lambda: guest.ctx.detach(DEV1, pasid=15, vpasid=15)) == errno.EINVAL
    assert refused(lambda: guest.ctx.detach(DEV1, vpasid=3)) == errno.ENOENT
    bare = guest.engine.add_device(3, "bare", Traits(pasid_bits=0))
    guest.ctx.bind_device(bare.rid)
    assert refused(lambda: guest.ctx.attach(bare.rid, ioasid, pasid=0)) == errno.EINVAL
    guest.ctx.attach(bare.rid, ioasid)
    child = guest.ctx.create_nesting(ioasid)
    guest.ctx.attach(bare.rid, child)
    assert refused(lambda: guest.ctx.bind_pasid_table(child, PAGE, PasidTableFormat())) == errno.EINVAL
    with pytest.raises(IoasidError, match="20"):
        guest.engine.add_device(4, "narrow", Traits(pasid_bits=10, pasid_mode=PasidMode.GLOBAL))
    guest.close()


def test_pasid_tables_that_cannot_be(whole: Guest) -> None:
    ctx = whole.ctx
    space = ctx.create_nesting(1)

    def bind(root: int = 0x20000, *, untagged: object = "blocked", pasid: int | None = None, **fields: object) -> int:
        fmt = PasidTableFormat(**fields)  # type: ignore[arg-type]
        return refused(lambda: ctx.bind_pasid_table(space, root, fmt, untagged, pasid))  # type: ignore[arg-type]

    assert bind(vendor="none") == errno.EOPNOTSUPP
    assert bind(leaf=4096) == errno.EOPNOTSUPP, "GCR3 tables have none"
    assert bind(options=("fast",)) == errno.EOPNOTSUPP
    assert bind(levels=4) == errno.EINVAL
    assert bind(root=0x20040) == errno.EINVAL
    assert bind(root=0x20008) == errno.EINVAL
    assert bind(root=1 << 52) == errno.EINVAL
    assert bind(untagged="somewhere") == errno.EINVAL
    assert bind(untagged="pasid") == errno.EINVAL
    assert bind(pasid=3) == errno.EINVAL
    assert refused(lambda: ctx.bind_pasid_table(1, 0x20000, PasidTableFormat())) == errno.EINVAL
    assert refused(lambda: ctx.bind_pasid_table(2, 0x20000, PasidTableFormat())) == errno.EBUSY
    assert refused(lambda: ctx.unbind_pasid_table(2)) == errno.EINVAL, "a page table is bound there"
    assert refused(lambda: ctx.unbind_pasid_table(space)) == errno.EINVAL
    ctx.bind_pasid_table(space, 0x20000, PasidTableFormat())
    assert refused(lambda: ctx.unbind_pgtable(space)) == errno.EINVAL
    assert refused(lambda: ctx.bind_pgtable(space, 0x8000, X86)) == errno.EBUSY
    info = ctx.get_info(space)
    assert (info.format, info.pasid_table, info.root) == (None, PasidTableFormat(), 0x20000)


@pytest.mark.parametrize(
    "fmt",
    [
        PasidTableFormat("amd-gcr3", levels=2, table_levels=5, options=("smep",)),
        PasidTableFormat("vtd-pasid", pasid_bits=15, options=("no-snoop-control",)),
        PasidTableFormat("arm-cd", pasid_bits=10, leaf=4096, output_width=52),
        PasidTableFormat("riscv-pdt", levels=3, options=("accessed-dirty", "no-svnapot")),
    ],
)
def test_every_pasid_table(whole: Guest, fmt: PasidTableFormat) -> None:
    space = whole.ctx.create_nesting(1)
    whole.ctx.bind_pasid_table(space, 0x20000, fmt)
    whole.ctx.attach(DEV1, space)
    assert whole.hva(DEV1, 0x2000, pasid=1) == Reason.NOT_PRESENT, "an empty table"
    offers = {each.vendor: each for each in whole.ctx.get_info(space).pasid_tables}
    assert set(fmt.options) <= set(offers[fmt.vendor].options)


def test_no_room_for_the_routes_of_a_table(whole: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    space = whole.ctx.create_nesting(1)
    whole.ctx.attach(DEV1, space)
    real, calls = whole.engine.core.attach, [0]

    def once(*args: object, **named: object) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise MemoryError
        real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(whole.engine.core, "attach", once)
    assert refused(lambda: whole.ctx.bind_pasid_table(space, 0x20000, PasidTableFormat())) == errno.ENOMEM
    assert whole.ctx.get_info(space).root is None
    assert whole.hva(DEV1, 0x2000) == Reason.NOT_BOUND
    whole.ctx.bind_pasid_table(space, 0x20000, PasidTableFormat())


class Pool(RuleBasedStateMachine):
    """Numbers are given once, until they come back; all of them can be had."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PasidPool(3)
        self.out: set[int] = set()

    @rule()
    def take(self) -> None:
        found = self.pool.take()
        if found is None:
            assert len(self.out) == 7
        else:
            assert 1 <= found <= 7 and found not in self.out
            self.out.add(found)

    @rule(index=st.integers(0, 6))
    def give(self, index: int) -> None:
        if self.out:
            pasid = sorted(self.out)[index % len(self.out)]
            self.out.remove(pasid)
            self.pool.give(pasid)

    @invariant()
    def never_zero(self) -> None:
        assert 0 not in self.out


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
