"""Translation requests and translated requests (ATS): what is answered, what an answer may serve, who may ask."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1, DEV2, GOLDEN, Guest, gcr3_table, refused, x86_tables

from backend.core import RW, Access, AddressType, AtsReply, Fault, Reason, Translated
from backend.ioasid import Engine, Kind, PasidTableFormat, PgtableFormat, Traits, Untagged

READ, WRITE = Access.READ, Access.WRITE
X86 = PgtableFormat("x86", 4)
IOVA = 0x7000_0000
A, D = 1 << 5, 1 << 6
"""Of x86-64 (SDM 3, 4.5.4)."""


@pytest.fixture
def guest() -> Iterator[Guest]:
    """1: the guest's memory, both devices on it. 2: a child, dev2 on it with ATS."""
    guest = Guest()
    ctx = guest.ctx
    assert (ctx.alloc(), ctx.create_nesting(1)) == (1, 2)
    ctx.map_dma(1, 0, GOLDEN, guest.ram.size)
    for rid in (DEV1, DEV2):
        ctx.attach(rid, 1)
    ctx.attach(DEV2, 2, ats=True)
    yield guest
    guest.close()


def leaf(guest: Guest, base: int, iova: int) -> int:
    """GPA of the last entry on the way, by the layout of the tables (SDM 3, figure 4-8)."""
    table = base
    for level in (4, 3, 2):
        slot = table + (iova >> (12 + 9 * (level - 1)) & 511) * 8
        table = struct.unpack("<Q", guest.ram.peek(slot, 8))[0] & 0x000FFFFFFFFFF000
    return table + (iova >> 12 & 511) * 8


def pages(guest: Guest, base: int, mappings: dict[int, int], flags: dict[int, int] | None = None) -> int:
    """x86 tables; `flags`: of the leaf of an IOVA, in place of present, writable and user."""
    root = x86_tables(guest.ram, base, mappings)
    for iova, bits in (flags or {}).items():
        guest.ram.poke(leaf(guest, root, iova), struct.pack("<Q", mappings[iova] | bits))
    return root


def entry(guest: Guest, base: int, iova: int) -> int:
    return int(struct.unpack("<Q", guest.ram.peek(leaf(guest, base, iova), 8))[0])


def missing(reply: AtsReply) -> tuple[Reason, int] | None:
    return None if reply.fault is None else (reply.fault.reason, reply.fault.iova)


def told(guest: Guest) -> list[Fault]:
    found: list[Fault] = []
    guest.engine.on_fault(found.append)
    return found


# Answers


def test_pages_that_go_on_are_one(guest: Guest) -> None:
    at = {0: 0x4000, 1: 0x5000, 2: 0x7000, 3: 0x8000}
    root = pages(guest, 0x10000, {IOVA + page * PAGE: gpa for page, gpa in at.items()})
    guest.ctx.bind_pgtable(2, root, X86)
    heard = told(guest)
    reply = guest.dev2.port.translate(IOVA + 100, 5 * PAGE, RW)
    assert [each[:3] for each in reply.translations] == [(IOVA, 0x2000, 0x4000), (IOVA + 0x2000, 0x2000, 0x7000)]
    assert all(each.access & RW == RW for each in reply.translations)
    assert missing(reply) == (Reason.NOT_PRESENT, IOVA + 4 * PAGE)
    assert reply.fault is not None and reply.fault.type == AddressType.TRANSLATION_REQUEST
    assert (reply.fault.ioasid, reply.fault.stage, reply.fault.level) == (2, 1, 1)
    assert heard == [] and guest.ctx.read_faults().records == () and guest.engine.core.faults() == []
    assert guest.engine.core.counters().faults == 0
    assert guest.dev2.port.translate(IOVA, 4 * PAGE, RW).fault is None
    assert guest.dev2.port.translate(IOVA, 0, RW) == AtsReply((), None)


def test_what_may_be_kept_for_writes_is_dirty(guest: Guest) -> None:
    """A page that was asked for by a read may serve no writes from then on: nobody would set its dirty bit."""
    guest.ctx.bind_pgtable(2, pages(guest, 0x10000, {IOVA: 0x4000}), X86)
    port = guest.dev2.port
    assert not port.translate(IOVA, PAGE, READ).translations[0].access & WRITE
    assert entry(guest, 0x10000, IOVA) & (A | D) == A
    assert port.translate(IOVA, PAGE, WRITE).translations[0].access & RW == RW
    assert entry(guest, 0x10000, IOVA) & (A | D) == A | D
    assert port.translate(IOVA, PAGE, READ).translations[0].access & RW == RW, "it is dirty now"


def test_part_of_what_is_asked_is_better_than_nothing(guest: Guest) -> None:
    read_only = 0x5
    root = pages(guest, 0x10000, {IOVA: 0x4000, IOVA + PAGE: 0x5000}, {IOVA + PAGE: read_only})
    guest.ctx.bind_pgtable(2, root, X86)
    port = guest.dev2.port
    reply = port.translate(IOVA, 2 * PAGE, RW)
    assert reply.fault is None
    assert [(each.address, each.access & RW) for each in reply.translations] == [(0x4000, RW), (0x5000, READ)]
    assert entry(guest, 0x10000, IOVA + PAGE) & (A | D) == A
    reply = port.translate(IOVA, 2 * PAGE, WRITE)
    assert [each.address for each in reply.translations] == [0x4000]
    assert missing(reply) == (Reason.PERMISSION, IOVA + PAGE)
    assert reply.fault is not None and reply.fault.access == WRITE


def test_what_may_be_written_and_not_read(guest: Guest) -> None:
    """AMD's tables of the host have such pages (48882, table 17: IR and IW)."""
    tables = guest.tables(0x10000)
    tables.map(IOVA, 0x4000)
    slot = 0x10000 + 3 * PAGE + (IOVA >> 12 & 511) * 8
    (raw,) = struct.unpack("<Q", guest.ram.peek(slot, 8))
    assert raw & 0xFFFFFFFFFF000 == 0x4000
    guest.ram.poke(slot, struct.pack("<Q", raw & ~(1 << 61)))
    guest.ctx.bind_pgtable(2, tables.root, PgtableFormat())
    (found,) = guest.dev2.port.translate(IOVA, PAGE, RW).translations
    assert found.access == WRITE


def test_the_attachment_bounds_what_is_answered(guest: Guest) -> None:
    ctx, port = guest.ctx, guest.dev2.port
    ctx.bind_pgtable(2, pages(guest, 0x10000, {IOVA: 0x4000}), X86)
    port.translate(IOVA, PAGE, WRITE)
    ctx.detach(DEV2)
    ctx.attach(DEV2, 2, access=READ, ats=True)
    (found,) = port.translate(IOVA, PAGE, RW).translations
    assert found.access & RW == READ
    reply, heard = port.translate(IOVA, PAGE, WRITE), told(guest)
    assert reply.translations == () and missing(reply) == (Reason.PERMISSION, IOVA)
    assert heard == []


def test_leaves_are_told_whole(guest: Guest) -> None:
    """A page of 2 MiB over one of 4 KiB pages of ours would end with ours: here ours are one piece, so it goes on."""
    root = 0x10000
    x86_tables(guest.ram, root, {IOVA: 0x4000})
    slot = root + 2 * PAGE + (IOVA >> 21 & 511) * 8
    guest.ram.poke(slot, struct.pack("<Q", 0 | 0x87))  # GPA 0, PS
    guest.ctx.bind_pgtable(2, root, X86)
    (found,) = guest.dev2.port.translate(IOVA + PAGE, PAGE, READ).translations
    assert found[:3] == (IOVA + PAGE, PAGE, PAGE)
    (found,) = guest.dev2.port.translate(IOVA, 32 * PAGE, READ).translations
    assert found[:3] == (IOVA, 32 * PAGE, 0)


def test_without_a_table_of_the_guests_addresses_stay(guest: Guest) -> None:
    guest.ctx.detach(DEV1)
    guest.ctx.attach(DEV1, 1, ats=True)
    reply = guest.dev1.port.translate(0, 1 << 40, RW)
    assert [each[:3] for each in reply.translations] == [(0, guest.ram.size, 0)]
    assert missing(reply) == (Reason.NOT_PRESENT, guest.ram.size)


def test_a_range_that_wraps_and_one_beyond(guest: Guest) -> None:
    guest.ctx.bind_pgtable(2, pages(guest, 0x10000, {IOVA: 0x4000}), X86)
    for iova, length in (((1 << 64) - PAGE, 2 * PAGE), (1 << 64, PAGE)):
        reply = guest.dev2.port.translate(iova, length, READ)
        assert reply.translations == () and missing(reply) == (Reason.ADDRESS_WIDTH, iova)


def test_one_answer_has_a_bound() -> None:
    """Pages that lie anywhere are 65,536 at most, and the rest is for the asking."""
    engine = Engine()
    device = engine.add_device(DEV1, "dev")
    ctx = engine.open()
    ctx.bind_device(DEV1)
    ctx.alloc()
    ctx.map_dma(1, 0, GOLDEN + PAGE, 65537 * PAGE)  # as it lies, in leaves of 4 KiB
    ctx.attach(DEV1, 1, ats=True)
    (found,), none = (reply := device.port.translate(0, 1 << 50, READ)).translations, reply.fault
    assert found.size == 65536 * PAGE and none is None
    reply = device.port.translate(found.size, 1 << 50, READ)
    assert [each[:3] for each in reply.translations] == [(65536 * PAGE, PAGE, 65536 * PAGE)]
    assert missing(reply) == (Reason.NOT_PRESENT, 65537 * PAGE)
    engine.close()


# Translated requests


def test_translated_requests(guest: Guest) -> None:
    ctx, port = guest.ctx, guest.dev2.port
    ctx.bind_pgtable(2, pages(guest, 0x10000, {IOVA: 0x4000, IOVA + PAGE: 0x6000}), X86)
    data = os.urandom(2 * PAGE)
    assert port.write(IOVA, data) is None
    one, two = port.translate(IOVA, 2 * PAGE, RW).translations
    moved = port.translated
    assert moved.read(one.address, PAGE) == data[:PAGE] == guest.ram.peek(0x4000, PAGE)
    assert moved.read(two.address + 8, 8, pasid=9) == data[PAGE + 8 : PAGE + 16], "a PASID does not count"
    assert moved.store(two.address, 0x1234, 8) is None
    assert port.load(IOVA + PAGE, 8) == 0x1234 == moved.load(0x6000, 8)
    assert moved.fetch_add(0x6000, 1, 8) == 0x1234
    assert moved.swap(0x6000, 7, 8) == 0x1235 and moved.compare_exchange(0x6000, 7, 8, 8) == 7
    assert moved.fill(0x6000, 16, 0xAB) is None and moved.copy(0x6000, 0x6020, 16) is None
    buffer = bytearray(32)
    assert moved.scatter([(0x6020, 16), (0x6000, 16)], buffer, write=False) is None and buffer == b"\xab" * 32
    assert moved.read_into(0x4000, buffer) is None and buffer == data[:32]
    assert moved.write(0x4000, b"more") is None and guest.ram.peek(0x4000, 4) == b"more"
    heard = told(guest)
    beyond = moved.read(guest.ram.size, 8)
    assert isinstance(beyond, Fault) and [beyond] == heard
    assert (beyond.reason, beyond.type, beyond.pasid, beyond.ioasid) == (
        Reason.NOT_PRESENT, AddressType.TRANSLATED, None, 1,
    )  # fmt: skip
    assert moved.counters.requests > 10 and port.counters.requests < 10


def test_writes_with_translated_addresses_are_tracked(guest: Guest) -> None:
    guest.ctx.set_dirty_tracking(1, True)
    guest.dev2.port.translated.write(0x6000, b"x")
    assert guest.ctx.get_dirty_bitmap(1, 0, 8 * PAGE) == bytes([1 << 6])


def test_while_ats_is_off_both_are_refused(guest: Guest) -> None:
    heard = told(guest)
    reply = guest.dev1.port.translate(0x1000, PAGE, READ)
    assert missing(reply) == (Reason.ATS_OFF, 0x1000) and reply.translations == ()
    answer = guest.dev1.port.translated.read(0x1000, 8)
    assert isinstance(answer, Fault) and answer.reason == Reason.ATS_OFF
    assert heard == [reply.fault, answer]
    assert [each.type for each in heard] == [AddressType.TRANSLATION_REQUEST, AddressType.TRANSLATED]
    guest.ctx.bind_pgtable(2, pages(guest, 0x10000, {IOVA: 0x4000}), X86)
    assert guest.dev2.port.translated.read(0x4000, 1) == b"\0"
    guest.ctx.detach(DEV2)
    answer = guest.dev2.port.translated.read(0x4000, 1)
    assert isinstance(answer, Fault) and answer.reason == Reason.ATS_OFF


def test_while_the_function_may_not_master_the_bus_nothing_goes(guest: Guest) -> None:
    port, heard = guest.dev2.port, told(guest)
    moved = port.translated
    port.enabled = lambda: False
    reply, answer = port.translate(0x1000, PAGE, READ), moved.read(0x1000, 8)
    assert reply.translations == () and missing(reply) == (Reason.BUS_MASTER_OFF, 0x1000)
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.type) == (Reason.BUS_MASTER_OFF, AddressType.TRANSLATED)
    assert heard == []


def test_a_malformed_table_is_told(guest: Guest) -> None:
    root = pages(guest, 0x10000, {IOVA: 0x4000}, {IOVA: 7 | 1 << 51})
    guest.ctx.bind_pgtable(2, root, PgtableFormat("x86", 4, output_width=40))
    heard = told(guest)
    reply = guest.dev2.port.translate(IOVA, PAGE, READ)
    assert missing(reply) == (Reason.RESERVED_BITS, IOVA) and heard == [reply.fault]


def test_the_router_is_asked_once() -> None:
    engine = Engine()
    device, asked = engine.add_device(DEV1, "dev"), list[tuple[int, int | None]]()
    ctx = engine.open()
    ctx.bind_device(DEV1)
    ctx.alloc()
    ctx.map_dma(1, 0, GOLDEN, PAGE)

    def route(rid: int, pasid: int | None) -> bool:
        asked.append((rid, pasid))
        if len(asked) == 1:
            return False
        ctx.attach(rid, 1, ats=True)
        return True

    engine.set_router(route)
    assert missing(device.port.translate(0, PAGE, READ)) == (Reason.NO_ROUTE, 0)
    assert device.port.translate(0, PAGE, READ) == AtsReply((Translated(0, PAGE, 0, Access(7)),), None)
    assert asked == [(DEV1, None)] * 2
    ctx.detach(DEV1)
    answer = device.port.translated.read(1 << 40, 1)
    assert isinstance(answer, Fault) and answer.reason == Reason.NOT_PRESENT
    assert asked == [(DEV1, None)] * 3
    engine.close()


# PASIDs


def test_pasids_one_by_one(guest: Guest) -> None:
    ctx = guest.ctx
    ctx.bind_pgtable(2, pages(guest, 0x10000, {IOVA: 0x4000}), X86)
    ctx.attach(DEV1, 2, pasid=5, ats=True)
    ctx.attach(DEV1, 2, pasid=6)
    port = guest.dev1.port
    assert port.translate(IOVA, PAGE, READ, 5).translations[0].address == 0x4000
    assert missing(port.translate(IOVA, PAGE, READ, 6)) == (Reason.ATS_OFF, IOVA)
    assert missing(port.translate(IOVA, PAGE, READ)) == (Reason.ATS_OFF, IOVA)
    assert port.translated.read(0x4000, 1) == b"\0"
    ctx.detach(DEV1, pasid=5)
    answer = port.translated.read(0x4000, 1)
    assert isinstance(answer, Fault) and answer.reason == Reason.ATS_OFF


@pytest.mark.parametrize("untagged", Untagged)
def test_pasids_of_a_table(guest: Guest, untagged: Untagged) -> None:
    ctx, ram, port = guest.ctx, guest.ram, guest.dev2.port
    one, two = (pages(guest, base, {IOVA: gpa}) for base, gpa in ((0x10000, 0x4000), (0x18000, 0x5000)))
    table = gcr3_table(ram, 0x20000, {1: one, 2: two})
    pasid = 2 if untagged == Untagged.PASID else None
    ctx.bind_pasid_table(2, table, PasidTableFormat(levels=1), untagged, pasid)
    found = [port.translate(IOVA, PAGE, READ, pasid).translations[0].address for pasid in (1, 2)]
    assert found == [0x4000, 0x5000]
    heard = told(guest)
    reply = port.translate(IOVA, PAGE, READ, 3)
    assert missing(reply) == (Reason.NOT_PRESENT, IOVA) and heard == []
    assert reply.fault is not None and reply.fault.pasid_table
    bare = port.translate(0x3000, PAGE, READ)
    match untagged:
        case Untagged.BLOCKED:
            assert missing(bare) == (Reason.BLOCKED, 0x3000)
        case Untagged.PARENT:
            assert [each[:3] for each in bare.translations] == [(0x3000, PAGE, 0x3000)]
        case Untagged.PASID:
            assert port.translate(IOVA, PAGE, READ).translations[0].address == 0x5000


def test_after_an_invalidation_nothing_is_stale(guest: Guest) -> None:
    ctx, ram, port = guest.ctx, guest.ram, guest.dev2.port
    one, two = (pages(guest, base, {IOVA: gpa}) for base, gpa in ((0x10000, 0x4000), (0x18000, 0x5000)))
    ctx.bind_pasid_table(2, gcr3_table(ram, 0x20000, {1: one}), PasidTableFormat(levels=1))

    def now() -> int | Reason:
        reply = port.translate(IOVA, PAGE, READ, 1)
        return reply.fault.reason if reply.fault is not None else reply.translations[0].address

    assert now() == 0x4000
    pages(guest, 0x10000, {IOVA: 0x6000})
    ctx.invalidate_cache(2, granularity="range", iova=IOVA, size=PAGE, pasid=1)
    assert now() == 0x6000
    gcr3_table(ram, 0x20000, {1: two})
    ctx.invalidate_cache(2, granularity="pasid", pasid=1)
    assert now() == 0x5000
    ctx.unmap_dma(1, 0, ram.size)
    assert now() == Reason.NOT_PRESENT
    ctx.map_dma(1, 0, GOLDEN, ram.size)
    assert now() == 0x5000
    ctx.unbind_pasid_table(2)
    assert now() == Reason.NO_ROUTE


# Commands


def test_what_get_info_tells(guest: Guest) -> None:
    info = guest.ctx.get_info(rid=DEV2)
    assert info.ats and [(each.ioasid, each.ats) for each in info.attachments] == [(1, False), (2, True)]


def test_what_is_refused(guest: Guest) -> None:
    ctx = guest.ctx
    other = ctx.alloc()
    process = ctx.alloc(Kind.SVA, pid=os.getpid())
    assert refused(lambda: ctx.attach(DEV2, process, pasid=1, ats=True)) == errno.EINVAL
    assert refused(lambda: ctx.attach(DEV2, other, pasid=1, ats=True)) == errno.EINVAL
    ctx.attach(DEV2, other, pasid=1)
    ctx.detach(DEV2)
    ctx.detach(DEV2, pasid=1)
    ctx.attach(DEV2, other, pasid=1, ats=True)
    assert refused(lambda: ctx.attach(DEV2, 2, ats=True)) == errno.EINVAL
    child = ctx.create_nesting(other, Kind.KERNEL)
    assert refused(lambda: ctx.attach(DEV2, child, pasid=1, ats=True)) == errno.EINVAL
    guest.engine.add_device(0x300, "plain", Traits(ats=False))
    ctx.bind_device(0x300)
    assert refused(lambda: ctx.attach(0x300, 1, ats=True)) == errno.EINVAL
    assert refused(lambda: ctx.attach(0x300, 1, ats=1)) == errno.EINVAL  # type: ignore[arg-type]
    ctx.attach(0x300, 1)
    assert not ctx.get_info(rid=0x300).ats


def test_devices_that_move_together() -> None:
    """While one of a group is attached elsewhere, nothing of the other's passes, translated or not."""
    engine = Engine()
    one, two = (engine.add_device(rid, f"d{rid}", group="both") for rid in (DEV1, DEV2))
    ctx = engine.open()
    for rid in (DEV1, DEV2):
        ctx.bind_device(rid)
    ctx.alloc()
    ctx.attach(DEV1, 1, ats=True)
    for answer in (one.port.translated.read(0, 1), one.port.translate(0, PAGE, READ).fault):
        assert isinstance(answer, Fault) and answer.reason in {Reason.ATS_OFF, Reason.BLOCKED}
    ctx.attach(DEV2, 1)
    for answer in (one.port.translated.read(0, 1), one.port.translate(0, PAGE, READ).fault):
        assert isinstance(answer, Fault) and answer.reason == Reason.NOT_PRESENT
    answer = two.port.translated.read(0, 1)
    assert isinstance(answer, Fault) and answer.reason == Reason.ATS_OFF
    engine.close()
