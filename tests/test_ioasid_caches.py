"""INVALIDATE_CACHE by granularity, cache and array; the TLBs of devices; LOOKUP."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from guest_ram import PAGE, table_entry
from ioasid_guest import DEV1, DEV2, GOLDEN, Guest, gcr3_table, refused, x86_tables

from backend.core import Access, Fault, Reason, Translation
from backend.ioasid import (
    Cache,
    DeviceTlb,
    Granularity,
    Invalidated,
    Invalidation,
    Kind,
    PasidTableFormat,
    PgtableFormat,
)

Told = tuple[int, int | None, int, int | None]


@pytest.fixture
def guest() -> Iterator[Guest]:
    """1: the guest's memory, both devices on it. 2: a child, dev2 on it; its table maps 0x2000 to 0x1000."""
    guest = Guest()
    ctx = guest.ctx
    assert (ctx.alloc(), ctx.create_nesting(1)) == (1, 2)
    ctx.map_dma(1, 0, GOLDEN, guest.ram.size)
    for rid in (DEV1, DEV2):
        ctx.attach(rid, 1)
    ctx.attach(DEV2, 2)
    yield guest
    guest.close()


class Warm:
    """dev2's tables: two pages that were read, so that they are cached, and then changed behind the cache's back."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.tables = guest.tables()
        guest.ctx.bind_pgtable(2, self.tables.root, PgtableFormat())
        self.swap(0x1000, 0x3000)
        assert self.now() == (0x1000, 0x3000)
        self.swap(0x4000, 0x5000)

    def swap(self, one: int, two: int) -> None:
        self.tables.map(0x2000, one)
        self.tables.map(0x6000, two)

    def now(self) -> tuple[int, int]:
        found = [self.guest.found(DEV2, iova).gpa for iova in (0x2000, 0x6000)]
        return found[0], found[1]


def test_of_a_range(guest: Guest) -> None:
    warm = Warm(guest)
    guest.ctx.invalidate_cache(2, granularity="range", iova=0x2000, size=PAGE)
    assert warm.now() == (0x4000, 0x3000), "the other page is cached still"
    guest.ctx.invalidate_cache(2)
    assert warm.now() == (0x4000, 0x5000)


@pytest.mark.parametrize("caches", [("iotlb",), (Cache.IOTLB, Cache.PASID), ()])
def test_of_all_and_of_a_device(guest: Guest, caches: tuple[str, ...]) -> None:
    warm = Warm(guest)
    guest.ctx.invalidate_cache(2, granularity=Granularity.DEVICE, rid=DEV2, caches=caches)
    assert warm.now() == (0x4000, 0x5000)


def test_of_device_tlbs_alone(guest: Guest) -> None:
    warm = Warm(guest)
    guest.ctx.invalidate_cache(2, caches=["device-tlb"])
    assert warm.now() == (0x1000, 0x3000)


def test_an_array(guest: Guest) -> None:
    warm = Warm(guest)
    pages = [Invalidation("range", iova, PAGE) for iova in (0x2000, 0x6000)]
    assert guest.ctx.invalidate_cache(2, entries=pages) == Invalidated(2)
    assert warm.now() == (0x4000, 0x5000)
    assert guest.ctx.invalidate_cache(2, entries=[]) == Invalidated(0)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (Invalidation("range"), errno.EINVAL),
        (Invalidation("half"), errno.EOPNOTSUPP),
        (Invalidation(caches=("l2",)), errno.EOPNOTSUPP),
        (Invalidation("range", (1 << 64) - PAGE, 2 * PAGE), errno.EOVERFLOW),
        (Invalidation("range", 1, PAGE), errno.EINVAL),
        (Invalidation("device", rid=0x777), errno.ENODEV),
        ({"granularity": "all"}, errno.EINVAL),
    ],
)
def test_an_array_ends_at_the_first_bad_entry(guest: Guest, bad: Invalidation, code: int) -> None:
    warm = Warm(guest)
    entries = [Invalidation("range", 0x2000, PAGE), bad, Invalidation("range", 0x6000, PAGE)]
    answer = guest.ctx.invalidate_cache(2, entries=entries)
    assert (answer.done, answer.errno) == (1, code)
    assert answer.sentence is not None and answer.sentence.startswith("INVALIDATE_CACHE: ")
    assert warm.now() == (0x4000, 0x3000), "the first was done, the third was not"


def test_arrays_that_are_refused_as_a_whole(guest: Guest) -> None:
    ctx, one = guest.ctx, [Invalidation()]
    assert refused(lambda: ctx.invalidate_cache(1, entries=one)) == errno.EINVAL
    assert refused(lambda: ctx.invalidate_cache(9, entries=one)) == errno.ENOENT
    assert refused(lambda: ctx.invalidate_cache(2, entries=one * 4097)) == errno.EINVAL
    assert refused(lambda: ctx.invalidate_cache(2, iova=PAGE, entries=one)) == errno.EINVAL  # type: ignore[call-overload]
    assert ctx.invalidate_cache(2, entries=one * 4096).done == 4096


def test_what_does_not_go_together(guest: Guest) -> None:
    ctx = guest.ctx
    for fields in (
        {"granularity": "all", "iova": PAGE}, {"granularity": "all", "size": PAGE}, {"granularity": "range"},
        {"granularity": "pasid"}, {"granularity": "pasid", "pasid": 4}, {"granularity": "all", "pasid": 4},
        {"granularity": "device"}, {"granularity": "device", "rid": DEV1},
        {"granularity": "device", "rid": DEV2, "size": PAGE},
        {"granularity": "device", "rid": DEV2, "pasid": 1}, {"rid": DEV1}, {"pasid": 1 << 20}, {"caches": "iotlb"},
    ):  # fmt: skip
        assert refused(lambda fields=fields: ctx.invalidate_cache(2, **fields)) == errno.EINVAL, fields  # type: ignore[misc]


def test_a_pasid_of_a_pasid_table(guest: Guest) -> None:
    ctx, ram = guest.ctx, guest.ram
    ctx.detach(DEV2)
    space = ctx.create_nesting(1)
    one, two = (x86_tables(ram, base, {0x2000: gpa}) for base, gpa in ((0x8000, 0x1000), (0x10000, 0x3000)))
    ctx.bind_pasid_table(space, gcr3_table(ram, 0x20000, {1: one, 2: one}), PasidTableFormat(levels=1))
    ctx.attach(DEV2, space)

    def now() -> list[int]:
        return [guest.found(DEV2, 0x2000, pasid=pasid).gpa for pasid in (1, 2)]

    assert now() == [0x1000, 0x1000]
    gcr3_table(ram, 0x20000, {1: two, 2: two})
    ctx.invalidate_cache(space, granularity="pasid", pasid=2)
    assert now() == [0x1000, 0x3000]
    ctx.invalidate_cache(space)
    assert now() == [0x3000, 0x3000]
    x86_tables(ram, 0x10000, {0x2000: 0x4000})
    ctx.invalidate_cache(space, granularity="range", iova=0x2000, size=PAGE, pasid=1)
    assert now() == [0x4000, 0x3000]
    assert refused(lambda: ctx.invalidate_cache(space, granularity="pasid", pasid=512)) == errno.EINVAL


def test_a_pasid_that_is_attached_by_itself(guest: Guest) -> None:
    ctx = guest.ctx
    ctx.attach(DEV1, 2, vpasid=5)
    warm = Warm(guest)
    ctx.invalidate_cache(2, granularity="pasid", pasid=5)
    assert warm.now() == (0x4000, 0x5000)


# TLBs of devices


class Tlb:
    """A device's own, which keeps what it was told to forget: (RID, PASID, IOVA, size)."""

    def __init__(self, guest: Guest) -> None:
        self.told: list[Told] = []
        self.waiting: list[Callable[[], None]] = []
        for device in (guest.dev1, guest.dev2):
            guest.engine.set_tlb(device, self._of(device.rid))

    def _of(self, rid: int) -> DeviceTlb:
        def tlb(pasid: int | None, iova: int, size: int | None, done: Callable[[], None]) -> None:
            self.told.append((rid, pasid, iova, size))
            self.waiting.append(done)

        return tlb

    def take(self) -> set[Told]:
        told, self.told = set(self.told), []
        return told


def test_devices_are_told(guest: Guest) -> None:
    ctx, tlb = guest.ctx, Tlb(guest)
    ctx.bind_pgtable(2, 0x8000, PgtableFormat())
    ctx.attach(DEV1, 2, vpasid=5)
    assert tlb.take() == {(DEV1, 5, 0, None)}
    ctx.invalidate_cache(2, granularity="range", iova=0x2000, size=PAGE)
    assert tlb.take() == {(DEV1, 5, 0x2000, PAGE), (DEV2, None, 0x2000, PAGE)}
    ctx.invalidate_cache(2, granularity="device", rid=DEV1)
    assert tlb.take() == {(DEV1, 5, 0, None)}
    ctx.invalidate_cache(2, granularity="pasid", pasid=5)
    assert tlb.take() == {(DEV1, 5, 0, None)}
    ctx.invalidate_cache(2, granularity="range", iova=0, size=PAGE, rid=DEV2, caches=["device-tlb"])
    assert tlb.take() == {(DEV2, None, 0, PAGE)}
    ctx.invalidate_cache(2, caches=["iotlb"])
    assert tlb.take() == set()
    ctx.unmap_dma(1, 0, guest.ram.size)
    assert tlb.take() == {(DEV1, None, 0, guest.ram.size), (DEV2, None, 0, guest.ram.size), (DEV1, 5, 0, None),
                          (DEV2, None, 0, None)}  # fmt: skip
    ctx.unbind_pgtable(2)
    assert tlb.take() == {(DEV1, 5, 0, None), (DEV2, None, 0, None)}
    ctx.detach(DEV2)
    assert tlb.take() == {(DEV2, None, 0, None)}
    guest.engine.set_tlb(guest.dev1, None)
    ctx.detach(DEV1, vpasid=5)
    assert tlb.take() == set()


def test_who_invalidates_hears_when_all_devices_have_answered(guest: Guest) -> None:
    ctx, tlb, heard = guest.ctx, Tlb(guest), list[str]()
    ctx.bind_pgtable(2, 0x8000, PgtableFormat())
    ctx.attach(DEV1, 2, vpasid=5)
    tlb.waiting.clear()
    ctx.invalidate_cache(2, answered=lambda: heard.append("both"))
    first, second = tlb.waiting
    first()
    first()
    assert heard == [], "one of them answered twice"
    second()
    assert heard == ["both"]
    second()
    assert heard == ["both"]
    ctx.invalidate_cache(2, caches=["iotlb"], answered=lambda: heard.append("nobody to ask"))
    assert heard.pop() == "nobody to ask"
    entries = [Invalidation(rid=DEV1), Invalidation(rid=DEV2), Invalidation("range"), Invalidation()]
    tlb.waiting.clear()
    assert ctx.invalidate_cache(2, entries=entries, answered=lambda: heard.append("array")).done == 2
    assert len(tlb.waiting) == 2 and heard == ["both"]
    for done in tlb.waiting:
        done()
    assert heard == ["both", "array"]
    assert refused(lambda: ctx.invalidate_cache(1, answered=lambda: heard.append("refused"))) == errno.EINVAL
    assert heard == ["both", "array"]


def test_devices_are_told_when_the_vms_memory_goes(guest: Guest) -> None:
    vm = guest.ctx.alloc(Kind.VM)
    guest.ctx.attach(DEV1, vm, pasid=3)
    guest.engine.vm_memory.map(0, GOLDEN, 4 * PAGE, Access.READ)
    tlb = Tlb(guest)
    guest.engine.vm_memory.unmap(0, 4 * PAGE)
    assert tlb.take() == {(DEV1, 3, 0, 4 * PAGE)}


def test_devices_are_told_of_what_lies_two_parents_above(guest: Guest) -> None:
    ctx = guest.ctx
    middle = ctx.create_nesting(1, Kind.KERNEL)
    ctx.map_dma(middle, 0, 0, 4 * PAGE)
    low = ctx.create_nesting(middle)
    for ioasid in (middle, low):
        ctx.attach(DEV1, ioasid)
    tlb = Tlb(guest)
    ctx.unmap_dma(1, 0, guest.ram.size)
    assert (DEV1, None, 0, None) in tlb.take()


# LOOKUP


def test_lookup_in_a_guests_table(guest: Guest) -> None:
    ctx, tables = guest.ctx, guest.tables()
    tables.map(0x2000, 0x1000)
    child = ctx.alloc(Kind.USER, parent=1, root=tables.root)  # nothing is attached to it
    before = guest.engine.core.counters()
    path = ctx.lookup(child, 0x2345)
    assert (path.ioasid, path.parent, path.stage1, path.stage2) == (child, 1, "amd-v1", "amd-v1")
    assert isinstance(path.result, Translation)
    assert (path.result.gpa, path.result.hva) == (0x1345, GOLDEN + 0x1345)
    entries = [(step.level, step.entry) for step in path.steps if step.stage == 1]
    assert [level for level, _ in entries] == [4, 3, 2, 1]
    assert entries[-1] == (1, table_entry(0x1000, 0))
    after = guest.engine.core.counters()
    assert (before.walks, before.requests, before.faults) == (after.walks, after.requests, after.faults)
    assert ctx.get_info(child).attachments == 0
    fault = ctx.lookup(child, 0x9000, access=Access.WRITE).result
    assert isinstance(fault, Fault)
    assert (fault.ioasid, fault.stage, fault.level, fault.reason) == (child, 1, 1, Reason.NOT_PRESENT)
    assert ctx.read_faults().records == ()


def test_lookup_in_every_kind(guest: Guest) -> None:
    ctx = guest.ctx
    assert isinstance(ctx.lookup(1, 0x1234).result, Translation)
    child = ctx.create_nesting(1, Kind.KERNEL)
    ctx.map_dma(child, 0x2000, 0x1000, PAGE)
    found = ctx.lookup(child, 0x2000).result
    assert isinstance(found, Translation) and found.hva == GOLDEN + 0x1000
    unbound = ctx.lookup(2, 0x2000).result
    assert isinstance(unbound, Fault) and unbound.reason == Reason.NOT_BOUND


def test_lookup_through_a_pasid_table(guest: Guest) -> None:
    ctx = guest.ctx
    space = ctx.create_nesting(1)
    root = x86_tables(guest.ram, 0x8000, {0x2000: 0x1000})
    ctx.bind_pasid_table(space, gcr3_table(guest.ram, 0x20000, {3: root}), PasidTableFormat(levels=1))
    found = ctx.lookup(space, 0x2000, pasid=3).result
    assert isinstance(found, Translation) and found.gpa == 0x1000
    missing = ctx.lookup(space, 0x2000, pasid=4).result
    assert isinstance(missing, Fault) and missing.pasid_table
    untagged = ctx.lookup(space, 0x2000).result
    assert isinstance(untagged, Fault) and untagged.reason == Reason.BLOCKED
    assert refused(lambda: ctx.lookup(2, 0x2000, pasid=3)) == errno.EINVAL


def test_lookups_that_cannot_be(guest: Guest) -> None:
    ctx = guest.ctx
    assert refused(lambda: ctx.lookup(9, 0)) == errno.ENOENT
    assert refused(lambda: ctx.lookup(1, 1 << 64)) == errno.EINVAL
    assert refused(lambda: ctx.lookup(1, 0, access=Access(0))) == errno.EINVAL
    for rid in range(1 << 16):
        if rid not in guest.engine.devices:
            guest.engine.devices[rid] = guest.dev1
    assert refused(lambda: ctx.lookup(1, 0)) == errno.ENOSPC
