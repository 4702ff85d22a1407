"""Devices that must move together, and devices that an IOASID cannot have."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial

import pytest
from guest_ram import PAGE
from ioasid_guest import GOLDEN, Guest, refused

from backend.core import Reason
from backend.ioasid import IoasidError, PasidTableFormat, PgtableFormat, Traits

A, B, ALONE = 1, 2, 3


@pytest.fixture
def guest() -> Iterator[Guest]:
    """A and B are one group; 1 and 2 are kernel IOASIDs over the same memory, 3 a child of 1."""
    guest = Guest()
    engine, ctx = guest.engine, guest.ctx
    engine.add_device(A, "a", group="slot")
    engine.add_device(B, "b", group="slot")
    engine.add_device(ALONE, "alone")
    assert (ctx.alloc(), ctx.alloc(), ctx.create_nesting(1)) == (1, 2, 3)
    ctx.map_dma(1, 0, GOLDEN, guest.ram.size)
    ctx.map_dma(2, 0, GOLDEN, guest.ram.size)
    tables = guest.tables()
    tables.map(0x2000, 0x1000)
    ctx.bind_pgtable(3, tables.root, PgtableFormat())
    yield guest
    guest.close()


def bound(guest: Guest) -> None:
    for rid in (A, B, ALONE):
        guest.ctx.bind_device(rid)


def test_a_group_has_one_context(guest: Guest) -> None:
    guest.ctx.bind_device(A)
    other = guest.engine.open()
    assert refused(lambda: other.bind_device(B)) == errno.EBUSY
    other.bind_device(ALONE)
    assert refused(lambda: guest.ctx.attach(A, 1)) == errno.EINVAL, "only partly bound"
    guest.ctx.unbind_device(A)
    other.bind_device(B)


def test_dma_is_blocked_until_all_are_attached_to_the_same(guest: Guest) -> None:
    bound(guest)
    ctx = guest.ctx
    ctx.attach(A, 1)
    assert guest.hva(A, 0x2000) == Reason.BLOCKED
    assert guest.hva(B, 0x2000) == Reason.NO_ROUTE
    assert refused(lambda: ctx.attach(B, 2)) == errno.EINVAL
    ctx.attach(B, 1)
    assert guest.hva(A, 0x2000) == guest.hva(B, 0x2000) == GOLDEN + 0x2000
    ctx.detach(A)
    assert guest.hva(A, 0x2000) == Reason.NO_ROUTE
    assert guest.hva(B, 0x2000) == Reason.BLOCKED
    assert refused(lambda: ctx.attach(A, 2)) == errno.EINVAL
    assert refused(lambda: ctx.unbind_device(A)) == errno.EBUSY
    ctx.detach(B)
    ctx.attach(A, 2)
    ctx.attach(B, 2)
    assert guest.hva(A, 0x2000) == GOLDEN + 0x2000


def test_a_child_needs_the_whole_group_at_its_parent(guest: Guest) -> None:
    bound(guest)
    ctx = guest.ctx
    ctx.attach(A, 1)
    assert refused(lambda: ctx.attach(A, 3)) == errno.EINVAL
    assert refused(lambda: ctx.attach(A, 3, pasid=1)) == errno.EINVAL
    assert refused(lambda: ctx.attach(A, 2, pasid=1)) == errno.EINVAL
    ctx.attach(B, 1)
    ctx.attach(A, 3)
    assert guest.hva(A, 0x2000) == guest.hva(B, 0x2000) == Reason.BLOCKED
    assert refused(lambda: ctx.attach(B, 3, pasid=1)) == errno.EINVAL
    ctx.attach(B, 3)
    assert guest.hva(A, 0x2000) == guest.hva(B, 0x2000) == GOLDEN + 0x1000
    ctx.detach(B)
    assert guest.hva(A, 0x2000) == Reason.BLOCKED
    ctx.detach(A)
    assert guest.hva(A, 0x2000) == guest.hva(B, 0x2000) == GOLDEN + 0x2000


def test_pasids_of_a_group(guest: Guest) -> None:
    bound(guest)
    ctx = guest.ctx
    ctx.attach(A, 1)
    ctx.attach(B, 1)
    ctx.attach(A, 3, pasid=1)
    assert guest.hva(A, 0x2000, pasid=1) == GOLDEN + 0x1000
    ctx.attach(A, 2, pasid=2)
    assert refused(lambda: ctx.detach(B)) == errno.EBUSY, "A's PASID would be all that is left of the group"
    ctx.detach(A, pasid=1)
    assert refused(lambda: ctx.detach(B)) == errno.EBUSY
    ctx.detach(A, pasid=2)
    ctx.detach(B)


def test_a_pasid_table_of_a_group(guest: Guest) -> None:
    bound(guest)
    ctx = guest.ctx
    space = ctx.create_nesting(1)
    for ioasid in (1, space):
        ctx.attach(A, ioasid)
        ctx.attach(B, ioasid)
    ctx.bind_pasid_table(space, 0x20000, PasidTableFormat())
    assert guest.hva(A, 0, pasid=1) == guest.hva(B, 0, pasid=1) == Reason.NOT_PRESENT
    ctx.detach(A)
    assert guest.hva(B, 0, pasid=1) == Reason.NO_ROUTE
    assert guest.hva(B, 0) == Reason.BLOCKED


def test_groups_of_the_engine(guest: Guest) -> None:
    bound(guest)
    with pytest.raises(IoasidError, match="in use") as refusal:
        guest.engine.add_device(9, "late", group="slot")
    assert refusal.value.errno == errno.EBUSY
    assert guest.ctx.get_info(rid=A).group_rids == (A, B)
    assert guest.ctx.get_info(rid=ALONE).group_rids == (ALONE,)


def test_close_takes_a_group_apart(guest: Guest) -> None:
    bound(guest)
    ctx = guest.ctx
    for ioasid in (1, 3):
        ctx.attach(A, ioasid)
        ctx.attach(B, ioasid)
    ctx.attach(ALONE, 1)
    ctx.attach(ALONE, 3, pasid=1)
    ctx.close()
    assert guest.hva(A, 0) == guest.hva(ALONE, 0) == Reason.NO_ROUTE
    assert guest.engine.core.counters().spaces == 0


# Devices that an IOASID cannot have


def test_enforced_snooping(guest: Guest) -> None:
    engine, ctx = guest.engine, guest.ctx
    engine.add_device(7, "coherent")
    engine.add_device(8, "noncoherent", Traits(snoop=False))
    ctx.bind_device(7)
    ctx.bind_device(8)
    strict = ctx.alloc(enforce_snoop=True)
    ctx.attach(7, strict)
    assert refused(lambda: ctx.attach(8, strict)) == errno.EINVAL
    child = ctx.create_nesting(strict)
    assert ctx.get_info(child).enforce_snoop
    ctx.attach(8, 1)
    late = ctx.alloc("user", parent=1, root=PAGE, enforce_snoop=True)  # type: ignore[arg-type]
    assert refused(lambda: ctx.attach(8, late)) == errno.EINVAL
    assert refused(lambda: ctx.alloc(enforce_snoop=1)) == errno.EINVAL  # type: ignore[arg-type]


def test_formats_that_the_devices_iommu_cannot_walk(guest: Guest) -> None:
    engine, ctx = guest.engine, guest.ctx
    engine.add_device(7, "arm", Traits(formats=frozenset({"arm-s1", "arm-s2"})))
    ctx.bind_device(7)
    assert refused(lambda: ctx.attach(7, 1)) == errno.EINVAL
    parent = ctx.alloc(vendor="arm-s2")
    ctx.attach(7, parent)
    child = ctx.create_nesting(parent)
    ctx.attach(7, child)
    assert refused(lambda: ctx.bind_pgtable(child, PAGE, PgtableFormat("x86"))) == errno.EINVAL
    assert refused(lambda: ctx.bind_pasid_table(child, PAGE, PasidTableFormat("amd-gcr3"))) == errno.EINVAL
    ctx.bind_pgtable(child, PAGE, PgtableFormat("arm-s1"))
    ctx.detach(7)
    other = ctx.alloc("user", parent=parent, root=PAGE, vendor="x86")  # type: ignore[arg-type]
    assert refused(lambda: ctx.attach(7, other)) == errno.EINVAL
    info = ctx.get_info(rid=7)
    assert [each.vendor for each in info.formats] == ["arm-s1", "arm-s2"]
    assert [each.vendor for each in info.pasid_tables] == ["arm-cd"]


def test_info_of_a_device(guest: Guest) -> None:
    ctx = guest.ctx
    info = ctx.get_info(rid=0x0100)
    assert (info.rid, info.name, info.cookie, info.group) == (0x0100, "dev1", 0xC0, "dev1")
    assert (info.pasid_bits, info.pasid_mode, info.snoop, info.attachments) == (20, "whole", True, ())
    assert [(each.first, each.last) for each in info.permitted] == [(0, (1 << 64) - 1)]
    assert (info.reserved, info.nesting) == ((), ("hardware", "software"))
    assert refused(lambda: ctx.get_info(rid=A)) == errno.EINVAL, "not bound yet"
    assert refused(lambda: ctx.get_info(rid=0x777)) == errno.ENODEV
    assert refused(lambda: ctx.get_info(1, rid=A)) == errno.EINVAL  # type: ignore[call-overload]
    assert refused(partial(ctx.get_info, None)) == errno.EINVAL
