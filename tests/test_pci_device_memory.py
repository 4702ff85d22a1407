"""Guest memory as a function reaches it: untranslated, or by ATS through a device TLB, over a real engine."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1
from pci_sva import (
    ATS_CTRL,
    ATS_ENABLE,
    EXP_DEVCTL,
    EXP_FLR,
    EXT_ATS,
    EXT_PASID,
    PASID_CTRL,
    PASID_ENABLE,
    PASID_EXEC,
    PASID_PRIV,
    Machine,
    connected,
    sva_function,
)

from backend.core import RW, Access, BadValueError, Fault, Reason
from backend.pci import Ats, DeviceMemory, Pasid, ResetKind

READ, WRITE = Access.READ, Access.WRITE
AT = 0x7F12_3456_7000
OTHER = 0x5500_0000_0000
ACCESSED, DIRTY = 1 << 5, 1 << 6
"""Bits of an x86-64 leaf (SDM 3, 4.8)."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    """PASID 1: four pages at AT, out of order, and two read-only ones behind; PASID 2: one page at AT."""
    machine = Machine()
    for index, page in enumerate((3, 1, 0, 2)):
        machine.processes[1].map(AT + index * PAGE, machine.data + page * PAGE)
    for index in (4, 5):
        machine.processes[1].map(AT + index * PAGE, machine.data + (10 + index) * PAGE, writable=False)
    machine.processes[2].map(AT, machine.data + 20 * PAGE)
    for page in range(32):
        machine.ram.poke(machine.data + page * PAGE, bytes([page]) * PAGE)
    yield machine
    machine.close()


def fault(answer: object) -> Fault:
    assert isinstance(answer, Fault)
    return answer


def facts(answer: object) -> tuple[Reason, int, int, int | None]:
    found = fault(answer)
    return found.reason, found.iova, found.done, found.pasid


def leaf(machine: Machine, pasid: int, iova: int) -> int:
    return int(struct.unpack("<Q", machine.ram.peek(machine.processes[pasid].leaf(iova), 8))[0])


def every_access(memory: DeviceMemory, iova: int, pasid: int | None) -> list[tuple[Access, Callable[[], object]]]:
    into = bytearray(8)
    return [
        (READ, lambda: memory.read(iova, 8, pasid)),
        (READ, lambda: memory.read_into(iova, into, pasid)),
        (WRITE, lambda: memory.write(iova, b"written!", pasid)),
        (READ, lambda: memory.scatter([(iova, 4), (iova + 4, 4)], into, write=False, pasid=pasid)),
        (WRITE, lambda: memory.scatter([(iova, 4), (iova + 4, 4)], into, write=True, pasid=pasid)),
        (WRITE, lambda: memory.store(iova, 7, 8, pasid)),
        (READ, lambda: memory.load(iova, 8, pasid)),
        (WRITE, lambda: memory.fill(iova, 8, 0x1234, 2, pasid)),
        (READ, lambda: memory.copy(iova, iova + 8, 8, pasid, target_pasid=pasid)),
        (READ, lambda: memory.copy(iova, iova + 1, 2, pasid, target_pasid=pasid)),  # from the end
        (RW, lambda: memory.fetch_add(iova, 1, 8, pasid)),
        (RW, lambda: memory.swap(iova, 1, 4, pasid)),
        (RW, lambda: memory.compare_exchange(iova, 0, 1, 16, pasid)),
    ]


# What moves


def test_transfers_by_translations_of_its_own(machine: Machine) -> None:
    memory, ram, data = machine.memory, machine.ram, machine.data
    assert memory.read(AT + PAGE - 2, 4, 1) == b"\3\3\1\1"
    into = bytearray(3 * PAGE)
    assert memory.read_into(AT + PAGE, into, 1) is None
    assert into == bytes([1]) * PAGE + bytes([0]) * PAGE + bytes([2]) * PAGE
    assert memory.write(AT + 2 * PAGE - 3, b"abcdef", 1) is None
    assert (ram.peek(data + 2 * PAGE - 3, 3), ram.peek(data, 3)) == (b"abc", b"def")
    assert memory.scatter([(AT, 2), (AT + 3 * PAGE, 0), (AT + 3 * PAGE + 1, 3)], b"12345", write=True, pasid=1) is None
    assert (ram.peek(data + 3 * PAGE, 3), ram.peek(data + 2 * PAGE, 4)) == (b"12\3", b"\x02345")
    assert memory.fill(AT + 4 * PAGE - 5, 5, 0x0201, 2, 1) is None
    assert ram.peek(data + 3 * PAGE - 5, 5) == bytes([1, 2, 1, 2, 1])
    assert memory.store(AT + 8, 0x1122334455667788, 8, 1) is None
    assert memory.load(AT + 8, 8, 1) == 0x1122334455667788 and memory.load(AT + 12, 2, 1) == 0x3344
    assert memory.fetch_add(AT + 8, 1, 8, 1) == 0x1122334455667788
    assert memory.swap(AT + 8, 5, 8, 1) == 0x1122334455667789
    assert memory.compare_exchange(AT + 8, 5, 6, 8, 1) == 5
    assert struct.unpack("<Q", ram.peek(data + 3 * PAGE + 8, 8)) == (6,)
    assert machine.heard == [] and machine.kept() == 4


def test_a_transfer_is_of_translated_requests_alone(machine: Machine) -> None:
    port = machine.function.dma
    before = port.counters.requests
    for _, act in every_access(machine.memory, AT, 1):
        assert not isinstance(act(), Fault)
    assert machine.guest.engine.core.route_counters(DEV1).requests == before


def test_copies_between_address_spaces(machine: Machine) -> None:
    memory, ram, data = machine.memory, machine.ram, machine.data
    assert memory.copy(AT + PAGE - 1, AT + 100, 2, 1, target_pasid=2) is None
    assert ram.peek(data + 20 * PAGE + 100, 2) == b"\3\1"
    assert memory.copy(data + 7 * PAGE, AT + PAGE - 2, 4, None, target_pasid=1) is None
    assert (ram.peek(data + 4 * PAGE - 2, 2), ram.peek(data + PAGE, 2)) == (b"\7\7", b"\7\7")
    assert memory.copy(AT + PAGE - 2, data + 8 * PAGE, 4, 1) is None
    assert ram.peek(data + 8 * PAGE, 5) == b"\7\7\7\7\x08"
    assert memory.copy(AT, AT + 5, 0, 1, target_pasid=1) is None


@pytest.mark.parametrize("shift", [1, 7, PAGE - 1, PAGE, PAGE + 5, -3, -PAGE])
def test_a_copy_that_overlaps_is_a_memmove(machine: Machine, shift: int) -> None:
    content = bytes(number * 7 & 0xFF for number in range(4 * PAGE))
    assert machine.memory.write(AT, content, 1) is None
    start = max(0, -shift) + 10
    length = 4 * PAGE - abs(shift) - 20
    assert machine.memory.copy(AT + start, AT + start + shift, length, 1, target_pasid=1) is None
    expected = bytearray(content)
    expected[start + shift : start + shift + length] = content[start : start + length]
    assert machine.memory.read(AT, 4 * PAGE, 1) == bytes(expected)


def test_more_than_one_piece(machine: Machine) -> None:
    """Six MiB that lie in 16 pages, over and over."""
    process, data = machine.processes[1], machine.data
    pages = 3 << 9
    for index in range(pages):
        process.map(OTHER + index * PAGE, data + (index * 5 & 15) * PAGE)
    expected = b"".join(bytes([index * 5 & 15]) * PAGE for index in range(pages))
    assert machine.memory.read(OTHER, pages * PAGE, 1) == expected
    assert machine.memory.read(OTHER + 5, pages * PAGE - 9, 1) == expected[5:-4]
    into = bytearray(len(expected))
    parts = [(OTHER + 17, (2 << 20) - 17), (OTHER + (2 << 20), 1), (OTHER + (2 << 20) + 1, (4 << 20) - 1), (OTHER, 17)]
    assert machine.memory.scatter(parts, into, write=False, pasid=1) is None
    assert into == expected[17:] + expected[:17]
    process.unmap(OTHER + (pages - 1) * PAGE)
    machine.invalidate(1)
    into[:] = bytes(len(into))
    last = OTHER + (pages - 1) * PAGE
    assert facts(machine.memory.read_into(OTHER, into, 1)) == (Reason.NOT_PRESENT, last, (pages - 1) * PAGE, 1)
    assert into == expected[:-PAGE] + bytes(PAGE)
    found = machine.memory.copy(OTHER + PAGE, OTHER, (pages - 1) * PAGE, 1, target_pasid=1)
    assert facts(found) == (Reason.NOT_PRESENT, last, (pages - 2) * PAGE, 1)
    found = machine.memory.fill(OTHER, pages * PAGE, 7, 1, 1)
    assert facts(found) == (Reason.NOT_PRESENT, last, (pages - 1) * PAGE, 1)
    assert machine.ram.peek(data, 16 * PAGE) == bytes([7]) * 16 * PAGE


def test_buffers_of_other_items(machine: Machine) -> None:
    words = memoryview(bytearray(16)).cast("I")
    assert machine.memory.read_into(AT, words, 1) is None and words[0] == 0x03030303
    assert machine.memory.write(AT + PAGE, words, 1) is None
    assert machine.memory.read(AT + PAGE, 17, 1) == b"\3" * 16 + b"\1"
    with pytest.raises(BadValueError, match="differ in length"):
        machine.memory.scatter([(AT, 8)], words, write=True, pasid=1)
    with pytest.raises(BadValueError, match="2\\^30"):
        machine.memory.read(AT, -1, 1)
    with pytest.raises(BadValueError, match="pattern"):
        machine.memory.fill(AT, 8, 256, 1, 1)
    with pytest.raises(BadValueError):
        machine.memory.load(AT, 3, 1)


# What does not


def test_a_missing_page_is_told_to_the_endpoint_alone(machine: Machine) -> None:
    memory = machine.memory
    for _, act in every_access(memory, OTHER, 1):
        reason, iova, done, pasid = facts(act())
        assert (reason, iova & -8, done, pasid) == (Reason.NOT_PRESENT, OTHER, 0, 1)
    machine.processes[1].unmap(AT + 2 * PAGE)
    into = bytearray(3 * PAGE)
    assert facts(memory.read_into(AT + 10, into, 1)) == (Reason.NOT_PRESENT, AT + 2 * PAGE, 2 * PAGE - 10, 1)
    assert into[PAGE - 11 : PAGE - 9] == b"\3\1"
    assert facts(memory.copy(AT, OTHER, 8, 1, target_pasid=1)) == (Reason.NOT_PRESENT, OTHER, 0, 1)
    found = memory.copy(AT + 2 * PAGE - 3, AT + PAGE, 8, 1, target_pasid=1)
    assert facts(found) == (Reason.NOT_PRESENT, AT + 2 * PAGE, 3, 1)
    found = memory.copy(AT + 3 * PAGE, AT + 2 * PAGE - 3, 8, 1, target_pasid=1)
    assert facts(found) == (Reason.NOT_PRESENT, AT + 2 * PAGE, 3, 1)
    assert machine.ram.peek(machine.data + 2 * PAGE - 3, 3) == b"\2\2\2", "what could be moved was"
    found = memory.copy(AT, AT + PAGE + 8, 2 * PAGE, 1, target_pasid=1)
    assert facts(found) == (Reason.NOT_PRESENT, AT + 3 * PAGE - 1, 8, 1), "from the end"
    assert machine.heard == []


def test_a_read_only_page(machine: Machine) -> None:
    memory, page = machine.memory, AT + 4 * PAGE
    assert memory.read(page, 4, 1) == b"\x0e" * 4
    for access, act in every_access(memory, page, 1):
        answer = act()
        if access == READ and not isinstance(answer, Fault):
            continue
        assert facts(answer)[:3] == (Reason.PERMISSION, fault(answer).iova, 0) and fault(answer).access & WRITE
    assert machine.ram.peek(machine.data + 14 * PAGE, PAGE) == b"\x0e" * PAGE
    assert machine.heard == []


def test_a_word_that_is_not_aligned(machine: Machine) -> None:
    for iova in (AT + 4, AT + PAGE - 4):
        found = fault(machine.memory.store(iova, 1, 8, 1))
        assert (found.reason, found.iova, found.pasid) == (Reason.MISALIGNED, iova, 1)


@pytest.mark.parametrize("iova", [(1 << 64) - 4, 1 << 64, (1 << 64) + AT])
def test_beyond_the_last_address(machine: Machine, iova: int) -> None:
    for pasid in (None, 1):
        for _, act in every_access(machine.memory, iova, pasid):
            answer = act()
            assert isinstance(answer, Fault) and answer.done == 0, (pasid, answer)
    assert machine.memory.missing(1, iova, PAGE, READ, 10) == ([] if iova >> 64 else [(1 << 64) - PAGE])


# PASIDs and bus mastering


@pytest.mark.parametrize("ats", [False, True])
def test_pasids_need_the_guests_leave(machine: Machine, ats: bool) -> None:
    if not ats:
        machine.registers.disable_ats()
    refused = [1 << 8, -1, 1 << 20, 1 << 21]
    for pasid in refused:
        for _, act in every_access(machine.memory, AT, pasid):
            assert facts(act()) == (Reason.PASID_OFF, AT, 0, pasid)
    machine.registers.disable_pasid()
    for _, act in every_access(machine.memory, AT, 1):
        assert facts(act()) == (Reason.PASID_OFF, AT, 0, 1)
    assert machine.memory.copy(machine.data, AT, 8, None, target_pasid=1) is not None
    assert machine.memory.missing(1, AT, PAGE, READ, 9) == []
    assert machine.memory.read(machine.data, 2) == b"\0\0"
    assert machine.heard == [] and machine.ram.peek(machine.data + 3 * PAGE, PAGE) == b"\3" * PAGE


def test_without_the_capability_there_are_no_pasids(machine: Machine) -> None:
    function, registers = connected(machine.guest, Ats())
    registers.enable_ats()
    registers.set_master()
    assert facts(function.memory.read(AT, 8, 0)) == (Reason.PASID_OFF, AT, 0, 0)
    assert function.memory.read(machine.data + PAGE, 2) == b"\1\1"


@pytest.mark.parametrize("ats", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_bus_mastering_gates_every_request(machine: Machine, ats: bool, warm: bool) -> None:
    if not ats:
        machine.registers.disable_ats()
    if warm:
        assert machine.memory.read(AT, 2 * PAGE, 1) == b"\3" * PAGE + b"\1" * PAGE
        assert machine.memory.write(AT, b"\3", 1) is None
    machine.registers.set_master(False)
    before = machine.ram.peek(0, machine.ram.size)
    requests = machine.guest.engine.core.counters().requests
    for pasid in (None, 1):
        for _, act in every_access(machine.memory, AT, pasid):
            reason, iova, done, carried = facts(act())
            assert (reason, iova & -8, done, carried) == (Reason.BUS_MASTER_OFF, AT, 0, pasid)
    assert machine.memory.missing(1, OTHER, PAGE, READ, 9) == []
    assert machine.guest.engine.core.counters().requests == requests, "not even a translation request"
    assert machine.ram.peek(0, machine.ram.size) == before and machine.heard == []
    machine.registers.set_master()
    assert machine.memory.read(AT, 2, 1) == b"\3\3"


# Translations


def test_what_is_kept_is_not_asked_again(machine: Machine) -> None:
    """The table says something else behind the function's back; it is not to notice until it is told."""
    memory, process = machine.memory, machine.processes[1]
    assert memory.read(AT, 2, 1) == b"\3\3"
    process.map(AT, machine.data + 9 * PAGE)
    process.map(AT + PAGE, machine.data + 8 * PAGE)
    machine.guest.ctx.invalidate_cache(machine.table_ioasid, caches=["iotlb"])
    assert memory.read(AT, 2, 1) == b"\3\3"
    assert memory.read(AT + PAGE - 1, 2, 1) == b"\3\x08"
    machine.invalidate(1, AT)
    assert memory.read(AT + PAGE - 1, 2, 1) == b"\x09\x08"


def test_reads_do_not_make_writes_possible(machine: Machine) -> None:
    """A translation kept of a read must not serve a write before the dirty bit is set (SDM 3, 4.8)."""
    memory = machine.memory
    assert memory.read(AT, 8, 1) == b"\3" * 8
    assert leaf(machine, 1, AT) & (ACCESSED | DIRTY) == ACCESSED
    assert memory.write(AT, b"x", 1) is None
    assert leaf(machine, 1, AT) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    assert machine.kept() == 1


def test_an_atomic_operation_needs_both(machine: Machine) -> None:
    assert machine.memory.read(AT + 4 * PAGE, 8, 1) == b"\x0e" * 8
    found = fault(machine.memory.fetch_add(AT + 4 * PAGE, 1, 8, 1))
    assert (found.reason, found.iova) == (Reason.PERMISSION, AT + 4 * PAGE)


def test_missing_pages(machine: Machine) -> None:
    memory = machine.memory
    machine.processes[1].unmap(AT + PAGE)
    assert memory.missing(1, AT, 4 * PAGE, READ, 10) == [AT + PAGE]
    assert memory.missing(1, AT + 5, 6 * PAGE, WRITE, 10) == [AT + page * PAGE for page in (1, 4, 5, 6)]
    assert memory.missing(1, AT + 5, 6 * PAGE, WRITE, 2) == [AT + page * PAGE for page in (1, 4)]
    assert memory.missing(1, AT + 2 * PAGE - 1, 1, READ, 10) == [AT + PAGE]
    assert memory.missing(1, AT, 0, READ, 10) == memory.missing(1, AT, PAGE, READ, 0) == []
    assert memory.missing(3, AT + 1, PAGE, READ, 10) == [AT, AT + PAGE], "no such process"
    assert memory.missing(1, OTHER + 3, 1 << 40, WRITE, 3) == [OTHER, OTHER + PAGE, OTHER + 2 * PAGE]
    machine.registers.disable_ats()
    assert memory.missing(1, AT, 4 * PAGE, READ, 10) == []


@pytest.mark.parametrize("seed", range(4))
def test_missing_pages_by_brute_force(machine: Machine, seed: int) -> None:
    """Against what the tables were made to say: runs, holes, read-only pages, large steps between them."""
    rnd, process = random.Random(seed), machine.processes[1]
    rights: dict[int, Access] = {}
    for page in range(512):
        kind = rnd.choice(("none", "none", "read", "write", "next"))
        if kind != "none":
            gpa = machine.data + (page if kind == "next" else rnd.randrange(100)) % 100 * PAGE
            process.map(OTHER + page * PAGE, gpa, writable=kind != "read")
            rights[page] = READ if kind == "read" else RW
    for _ in range(200):
        first, most, access = rnd.randrange(520), rnd.choice((1, 3, 32, 1000)), rnd.choice((READ, WRITE, RW))
        start, length = first * PAGE + rnd.randrange(PAGE), rnd.choice((1, PAGE, rnd.randrange(1, 600 * PAGE)))
        pages = range(first, (start + length - 1) // PAGE + 1)
        expected = [OTHER + page * PAGE for page in pages if access & ~rights.get(page, Access(0))]
        assert machine.memory.missing(1, OTHER + start, length, access, most) == expected[:most]
    assert machine.heard == []


def test_missing_pages_of_a_large_one() -> None:
    """2 MiB that may only be read (SDM 3, table 4-16: PS is bit 7); no more is told than what was asked about."""
    machine = Machine(pages=1024)
    try:
        leaf = machine.processes[1].leaf(OTHER)  # makes the tables on the way
        table = next(
            gpa for gpa in range(0, machine.data, 8) if machine.ram.peek(gpa, 8) == struct.pack("<Q", leaf | 7)
        )
        machine.ram.poke(table, struct.pack("<Q", (2 << 20) | 0x85))
        machine.ram.poke(3 << 20, b"large")
        missing = machine.memory.missing
        assert machine.memory.read(OTHER + (1 << 20), 5, 1) == b"large" and machine.kept() == 1
        assert missing(1, OTHER, 2 << 20, READ, 9) == []
        assert missing(1, OTHER + PAGE + 5, 2 * PAGE, RW, 9) == [OTHER + page * PAGE for page in (1, 2, 3)]
        assert missing(1, OTHER + PAGE, PAGE + 1, RW, 9) == [OTHER + page * PAGE for page in (1, 2)]
        assert missing(1, OTHER + PAGE, 1, WRITE, 9) == [OTHER + PAGE]
        assert len(missing(1, OTHER, 1 << 30, WRITE, 600)) == 600
    finally:
        machine.close()


def test_ats_that_the_iommu_does_not_serve(machine: Machine) -> None:
    """Requests go untranslated then, and every fault is the IOMMU's to tell."""
    ctx = machine.guest.ctx
    ctx.detach(DEV1)
    ctx.attach(DEV1, machine.table_ioasid)
    for pasid in (None, 1):
        iova = AT if pasid else machine.data
        for _, act in every_access(machine.memory, iova, pasid):
            assert not isinstance(act(), Fault)
        assert [each.reason for each in machine.heard] == [Reason.ATS_OFF], "asked once"
        machine.heard.clear()
    assert machine.memory.read(AT + PAGE, 2, 1) == b"\1\1" and machine.kept() == 0
    assert machine.memory.missing(1, OTHER, PAGE, READ, 9) == []
    assert facts(machine.memory.read(OTHER, 8, 1)) == (Reason.NOT_PRESENT, OTHER, 0, 1)
    assert [each.reason for each in machine.heard] == [Reason.NOT_PRESENT]
    ctx.detach(DEV1)
    ctx.attach(DEV1, machine.table_ioasid, ats=True)
    assert machine.memory.read(AT, 2, 1) != b"" and machine.kept() == 1


def test_invalidation_by_whom_it_concerns(machine: Machine) -> None:
    memory = machine.memory
    memory.read(AT, 4 * PAGE, 1)
    memory.read(AT, PAGE, 2)
    memory.read(machine.data, 8)
    assert machine.kept() == 6
    machine.invalidate(1, AT + PAGE, 2 * PAGE)
    assert machine.kept() == 4
    machine.invalidate(2)
    assert machine.kept() == 3
    machine.guest.ctx.invalidate_cache(machine.table_ioasid)
    assert machine.kept() == 0


def test_a_front_end_is_answered(machine: Machine) -> None:
    answers: list[int] = []
    machine.memory.read(AT, 4 * PAGE, 1)
    machine.guest.ctx.invalidate_cache(machine.table_ioasid, answered=lambda: answers.append(machine.kept()))
    assert answers == [0]


def test_memory_that_the_vm_loses_is_gone_for_translated_requests(machine: Machine) -> None:
    memory, ctx = machine.memory, machine.guest.ctx
    assert memory.read(AT, 8, 1) == b"\3" * 8
    ctx.unmap_dma(machine.memory_ioasid, 0, machine.ram.size)
    assert machine.kept() == 0
    assert isinstance(memory.read(AT, 8, 1), Fault)


# The capabilities' registers


def test_the_order_of_linux(machine: Machine) -> None:
    """The AMD driver enables ATS before PASID; others the other way round."""
    for order in (("ats", "pasid"), ("pasid", "ats")):
        machine.registers.disable_ats()
        machine.registers.disable_pasid()
        for each in order:
            getattr(machine.registers, f"enable_{each}")()
        assert machine.memory.read(AT, 2, 1) == b"\3\3" and machine.kept() == 1


def test_switching_ats_forgets_all(machine: Machine) -> None:
    registers, device = machine.registers, machine.guest.dev1
    assert device.tlb is machine.function.tlb is not None
    machine.memory.read(AT, 4 * PAGE, 1)
    machine.processes[1].map(AT, machine.data + 9 * PAGE)
    registers.disable_ats()
    assert device.tlb is None and machine.function.tlb is None
    machine.guest.ctx.invalidate_cache(machine.table_ioasid)
    assert machine.memory.read(AT, 2, 1) == b"\x09\x09"
    machine.processes[1].map(AT, machine.data + 8 * PAGE)
    machine.guest.ctx.invalidate_cache(machine.table_ioasid)
    registers.enable_ats()
    assert machine.kept() == 0 and machine.memory.read(AT, 2, 1) == b"\x08\x08"


def test_a_change_of_pasid_control_forgets_all(machine: Machine) -> None:
    machine.memory.read(AT, 4 * PAGE, 1)
    machine.registers.write(EXT_PASID, PASID_CTRL, PASID_ENABLE)
    assert machine.kept() == 4, "nothing has changed"
    machine.registers.disable_pasid()
    assert machine.kept() == 0


def test_only_what_the_capability_offers_can_be_enabled(machine: Machine) -> None:
    machine.registers.write(EXT_PASID, PASID_CTRL, 0xFFFF)
    assert machine.registers.read(EXT_PASID, PASID_CTRL) == PASID_ENABLE
    assert machine.memory.missing(1, AT, PAGE, READ | Access.EXECUTE, 9) == []
    function, registers = connected(machine.guest, Ats(), Pasid(width=20, execute=True, privileged=True))
    registers.enable_ats()
    registers.set_master()
    registers.enable_pasid(PASID_EXEC)
    assert function.memory.missing(1, OTHER, PAGE, READ | Access.EXECUTE, 9) == [OTHER]
    assert function.memory.missing(1, OTHER, PAGE, READ | Access.PRIVILEGED, 9) == []
    registers.disable_pasid()
    registers.enable_pasid(PASID_EXEC | PASID_PRIV)
    assert function.memory.missing(1, OTHER, PAGE, READ | Access.PRIVILEGED, 9) == [OTHER]
    assert function.memory.missing(None, OTHER, PAGE, READ | Access.PRIVILEGED, 9) == [], "it takes a PASID"


@pytest.mark.parametrize("stu", range(32))
def test_the_smallest_translation_unit(machine: Machine, stu: int) -> None:
    """4096 << STU bytes: what is invalidated is of whole units, up to 8 TiB; what is used is as good as ever."""
    machine.registers.enable_ats(12 + stu)
    assert machine.registers.read(EXT_ATS, ATS_CTRL) == ATS_ENABLE | stu
    assert machine.memory.read(AT, 4 * PAGE, 1) == b"".join(bytes([page]) * PAGE for page in (3, 1, 0, 2))
    unit = 4096 << stu
    gone = sum(AT // unit == (AT + index * PAGE) // unit for index in range(4))
    machine.invalidate(1, AT)
    assert machine.kept() == 4 - gone


@pytest.mark.parametrize("by", ["flr", "device", "connection"])
def test_a_reset_switches_all_off(machine: Machine, by: str) -> None:
    function = machine.function
    machine.registers.enable_ats(15)
    machine.memory.read(AT, 4 * PAGE, 1)
    match by:
        case "flr":
            offset = function.config.find(0x10)
            assert offset is not None
            function.config.write(offset + EXP_DEVCTL, 2, EXP_FLR)
        case "device":
            function.reset(ResetKind.DEVICE)
        case "connection":
            function.reset(ResetKind.LOST_CONNECTION)
    assert function.tlb is None and machine.guest.dev1.tlb is None and not function.bus_master
    assert machine.registers.read(EXT_ATS, ATS_CTRL) == machine.registers.read(EXT_PASID, PASID_CTRL) == 0
    machine.processes[1].map(AT, machine.data + 9 * PAGE)
    machine.guest.ctx.invalidate_cache(machine.table_ioasid)
    machine.registers.set_master()
    assert facts(machine.memory.read(AT, 2, 1)) == (Reason.PASID_OFF, AT, 0, 1)
    machine.registers.enable_all()
    assert machine.kept() == 0 and machine.memory.read(AT, 2, 1) == b"\x09\x09"


def test_no_memory_without_a_port() -> None:
    with pytest.raises(RuntimeError, match="sva: no DMA port is connected"):
        _ = sva_function().memory
