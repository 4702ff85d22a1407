"""The RFC's flows (v1, section 5) with its golden numbers: GIOVA 0x2000 -> GPA 0x1000 -> HVA 0x40001000."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1, DEV2, GOLDEN, Guest, gcr3_table, x86_tables

from backend.core import Access, Reason
from backend.ioasid import Code, Kind, PageResponse, PasidTableFormat, PgtableFormat

GIB = 1 << 30
GIOVA, GPA, HVA = 0x2000, 0x1000, 0x40001000
AMD = PgtableFormat("amd-v1", 4)
X86 = PgtableFormat("x86", 4)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def test_5_1_simple(guest: Guest) -> None:
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.attach(DEV1, gpa)
    ctx.attach(DEV2, gpa)
    ctx.map_dma(gpa, 0, GOLDEN, GIB)
    assert guest.hva(DEV1, GPA) == guest.hva(DEV2, GPA) == HVA
    assert guest.hva(DEV1, GIB) == Reason.NOT_PRESENT
    assert guest.dev1.port.write(GPA, b"simple") is None
    assert guest.ram.peek(GPA, 6) == b"simple"


def test_5_2_several_ioasids_without_nesting(guest: Guest) -> None:
    ctx = guest.ctx
    gpa, giova = ctx.alloc(), ctx.alloc()
    ctx.attach(DEV1, gpa)
    ctx.attach(DEV2, gpa)
    ctx.map_dma(gpa, 0, GOLDEN, GIB)
    ctx.detach(DEV2)
    ctx.attach(DEV2, giova)
    ctx.map_dma(giova, GIOVA, HVA, PAGE)
    assert guest.hva(DEV2, GIOVA) == HVA
    assert guest.hva(DEV2, GPA) == Reason.NOT_PRESENT
    assert guest.hva(DEV1, GPA) == HVA


def test_5_3_software_nesting(guest: Guest) -> None:
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.attach(DEV1, gpa)
    ctx.attach(DEV2, gpa)
    ctx.map_dma(gpa, 0, GOLDEN, GIB)
    giova = ctx.create_nesting(gpa, Kind.KERNEL)
    ctx.attach(DEV2, giova)
    ctx.map_dma(giova, GIOVA, GPA, PAGE)
    assert guest.hva(DEV2, GIOVA) == HVA
    assert guest.hva(DEV2, GPA) == Reason.NOT_PRESENT
    ctx.unmap_dma(gpa, 0, GIB)
    assert guest.hva(DEV2, GIOVA) == Reason.NOT_PRESENT
    ctx.map_dma(gpa, 0, GOLDEN, 16 * PAGE)
    assert guest.hva(DEV2, GIOVA) == HVA


@pytest.mark.parametrize("at_once", [False, True], ids=["v1 sequence", "all in ALLOC"])
def test_5_4_hardware_nesting(guest: Guest, at_once: bool) -> None:
    ctx, tables = guest.ctx, guest.tables()
    tables.map(GIOVA, GPA)
    gpa = ctx.alloc()
    ctx.attach(DEV1, gpa)
    ctx.attach(DEV2, gpa)
    ctx.map_dma(gpa, 0, GOLDEN, guest.ram.size)
    if at_once:
        giova = ctx.alloc(Kind.USER, parent=gpa, root=tables.root)
        ctx.attach(DEV2, giova)
    else:
        giova = ctx.create_nesting(gpa)
        ctx.attach(DEV2, giova)
        ctx.bind_pgtable(giova, tables.root, AMD)
    found = guest.found(DEV2, GIOVA)
    assert (found.gpa, found.hva) == (GPA, HVA)
    tables.map(GIOVA, 0x3000)
    ctx.invalidate_cache(giova, granularity="range", iova=GIOVA, size=PAGE)
    assert guest.hva(DEV2, GIOVA) == GOLDEN + 0x3000
    assert guest.hva(DEV1, GIOVA) == GOLDEN + GIOVA
    info = ctx.get_info(giova)
    assert (info.parent, info.root, info.kind) == (gpa, tables.root, Kind.USER)


def test_5_5_vsva(guest: Guest) -> None:
    """dev1's requests without PASID stay on gpa, those with the guest's PASID go through the process's table."""
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, GOLDEN, guest.ram.size)
    ctx.attach(DEV1, gpa)
    root = x86_tables(guest.ram, 0x8000, {GIOVA: GPA})
    gva = ctx.create_nesting(gpa)
    ctx.attach(DEV1, gva, vpasid=7)
    ctx.bind_pgtable(gva, root, X86)
    assert guest.hva(DEV1, GIOVA, pasid=7) == HVA
    assert guest.hva(DEV1, GIOVA) == GOLDEN + GIOVA
    assert guest.hva(DEV1, GIOVA, pasid=8) == Reason.NO_ROUTE


def test_5_6_io_page_fault(guest: Guest) -> None:
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, GOLDEN, guest.ram.size)
    ctx.attach(DEV1, gpa)
    root = x86_tables(guest.ram, 0x8000, {0x5000: 0x6000})  # so that there are tables to put GIOVA into
    gva = ctx.create_nesting(gpa)
    ctx.bind_pgtable(gva, root, X86)
    ctx.attach(DEV1, gva, vpasid=7)
    assert guest.hva(DEV1, GIOVA, pasid=7, access=Access.WRITE) == Reason.NOT_PRESENT

    answers: list[PageResponse] = []
    signals: list[int] = []
    ctx.faults.on_ready(lambda: signals.append(1))
    guest.dev1.page_request(7, GIOVA, Access.WRITE, group=3, last=True, answer=answers.append)
    assert signals == [1] and not answers
    (record,) = ctx.read_faults().records
    assert (record.ioasid, record.rid, record.cookie, record.pasid) == (gva, DEV1, 0xC0, 7)
    assert (record.iova, record.access, record.group, record.last) == (GIOVA, Access.WRITE, 3, True)
    assert record.recoverable and record.reason is None

    guest.ram.poke(
        0xB000 + GIOVA // PAGE * 8, struct.pack("<Q", GPA | 7)
    )  # the guest fixes it: level 1 is the 4th page
    ctx.page_response(DEV1, 3, Code.SUCCESS, pasid=7)
    assert answers == [PageResponse(DEV1, 7, 3, Code.SUCCESS)]
    assert guest.hva(DEV1, GIOVA, pasid=7, access=Access.WRITE) == HVA
    assert ctx.read_faults().records == ()


def test_5_7_bind_pasid_table(guest: Guest) -> None:
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, GOLDEN, guest.ram.size)
    ctx.attach(DEV1, gpa)
    one = x86_tables(guest.ram, 0x8000, {GIOVA: GPA})
    two = x86_tables(guest.ram, 0x10000, {GIOVA: 0x3000})
    table = gcr3_table(guest.ram, 0x20000, {1: one, 2: two})
    space = ctx.create_nesting(gpa)
    ctx.attach(DEV1, space)
    assert guest.hva(DEV1, GIOVA, pasid=1) == Reason.NO_ROUTE
    ctx.bind_pasid_table(space, table, PasidTableFormat("amd-gcr3", levels=1))
    assert guest.hva(DEV1, GIOVA, pasid=1) == HVA
    assert guest.hva(DEV1, GIOVA, pasid=2) == GOLDEN + 0x3000
    assert guest.hva(DEV1, GIOVA, pasid=3) == Reason.NOT_PRESENT
    assert guest.hva(DEV1, GIOVA) == Reason.BLOCKED

    gcr3_table(guest.ram, 0x20000, {1: two, 2: two})
    ctx.invalidate_cache(space, granularity="pasid", pasid=1)
    assert guest.hva(DEV1, GIOVA, pasid=1) == GOLDEN + 0x3000
    ctx.unbind_pasid_table(space)
    assert guest.hva(DEV1, GIOVA, pasid=1) == Reason.NO_ROUTE
    ctx.detach(DEV1)
    assert guest.hva(DEV1, GIOVA) == GOLDEN + GIOVA


@pytest.mark.parametrize(
    ("untagged", "pasid", "ends"),
    [("blocked", None, Reason.BLOCKED), ("parent", None, GOLDEN + GIOVA), ("pasid", 1, HVA)],
)
@pytest.mark.parametrize("bound_first", [False, True])
def test_requests_without_a_pasid_beside_a_pasid_table(
    guest: Guest, untagged: str, pasid: int | None, ends: object, bound_first: bool
) -> None:
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.map_dma(gpa, 0, GOLDEN, guest.ram.size)
    ctx.attach(DEV1, gpa)
    table = gcr3_table(guest.ram, 0x20000, {1: x86_tables(guest.ram, 0x8000, {GIOVA: GPA})})
    space = ctx.create_nesting(gpa)
    if not bound_first:
        ctx.attach(DEV1, space)
    ctx.bind_pasid_table(space, table, PasidTableFormat(), untagged, pasid)  # type: ignore[arg-type]
    if bound_first:
        ctx.attach(DEV1, space)
    assert guest.hva(DEV1, GIOVA, pasid=1) == HVA
    assert guest.hva(DEV1, GIOVA) == ends
    ctx.detach(DEV1)
    assert guest.hva(DEV1, GIOVA, pasid=1) == Reason.NO_ROUTE
    assert guest.hva(DEV1, GIOVA) == GOLDEN + GIOVA
