"""The page request interface of a function, with the engine's fault queue behind it (PCIe 5.0, 10.4 and 10.5.2)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1, Guest
from pci_sva import (
    EXP_DEVCTL,
    EXP_FLR,
    EXT_PASID,
    EXT_PRI,
    PRI_ALLOC_REQ,
    PRI_CTRL,
    PRI_ENABLE,
    PRI_MAX_REQ,
    PRI_RESET,
    PRI_RF,
    PRI_STATUS,
    PRI_STOPPED,
    PRI_UPRGI,
    Asked,
    connected,
)

from backend.core import Access
from backend.ioasid import Code, FaultRecord, PasidMode, PgtableFormat, Traits
from backend.pci import Ats, Pasid, Pri, ResetKind

READ, WRITE = Access.READ, Access.WRITE


class Sva:
    """A function with everything enabled; its PASIDs 5 and 6 have tables of the guest's, without a page in them."""

    def __init__(self) -> None:
        self.guest = Guest()
        ctx = self.guest.ctx
        assert (ctx.alloc(), ctx.create_nesting(1)) == (1, 2)
        ctx.bind_pgtable(2, 0x8000, PgtableFormat())
        ctx.attach(DEV1, 1)
        for pasid in (5, 6):
            ctx.attach(DEV1, 2, vpasid=pasid)
        self.function, self.registers = connected(self.guest, Ats(), Pasid(width=8), Pri(outstanding=32))
        self.registers.enable_all()
        self.asked = Asked(self.function)

    def records(self) -> list[FaultRecord]:
        return list(self.guest.ctx.read_faults().records)

    def respond(self, group: int, code: Code = Code.SUCCESS) -> None:
        self.guest.ctx.page_response(DEV1, group, code)


@pytest.fixture
def sva() -> Iterator[Sva]:
    sva = Sva()
    yield sva
    sva.guest.close()


def test_a_group_goes_out_under_one_index_and_is_answered_once(sva: Sva) -> None:
    assert sva.asked.ask("a", [(0x1234, READ), (0x5000, READ | WRITE), (0x7FFF, WRITE)], pasid=6)
    records = sva.records()
    assert [(each.iova, each.access, each.pasid, each.last) for each in records] == [
        (0x1000, READ, 6, False),
        (0x5000, READ | WRITE, 6, False),
        (0x7000, WRITE, 6, True),
    ]
    assert len({each.group for each in records}) == 1
    assert sva.asked.answers == []
    assert records[0].group is not None
    sva.respond(records[0].group, Code.INVALID)
    assert sva.asked.answers == [("a", Code.INVALID)]


def test_the_allocation_is_honoured_and_groups_wait_in_line(sva: Sva) -> None:
    registers, asked = sva.registers, sva.asked
    registers.disable_pri()
    registers.enable_pri(8)
    assert asked.requests.capacity == 8
    assert not asked.ask("nine", 9)
    assert asked.ask("five", 5) and asked.requests.capacity == 3
    assert asked.ask("four", 4) and asked.ask("one", 1) and asked.requests.capacity == 0
    first = sva.records()
    assert len(first) == 5, "one has room but it is not its turn"
    assert first[0].group is not None
    sva.respond(first[0].group)
    assert asked.answers == [("five", Code.SUCCESS)]
    second = sva.records()
    assert [each.last for each in second] == [False] * 3 + [True, True]
    assert {each.group for each in second}.isdisjoint({first[0].group}) and second[3].group != second[4].group
    assert asked.requests.capacity == 3


@pytest.mark.parametrize(("allocation", "capacity"), [(0, 0), (1, 1), (32, 32), (33, 32), (0xFFFF_FFFF, 32)])
def test_what_the_guest_may_allocate(sva: Sva, allocation: int, capacity: int) -> None:
    assert sva.registers.read(EXT_PRI, PRI_MAX_REQ, 4) == 32
    sva.registers.write(EXT_PRI, PRI_ALLOC_REQ, allocation, 4)
    assert sva.asked.requests.capacity == capacity
    assert sva.asked.ask("a", 1) is bool(capacity)
    assert not sva.asked.ask("b", 33)


def test_an_allocation_taken_back_fails_what_can_never_be_sent(sva: Sva) -> None:
    registers, asked = sva.registers, sva.asked
    assert asked.ask("sent", 30) and asked.ask("large", 20) and asked.ask("small", 2)
    registers.write(EXT_PRI, PRI_ALLOC_REQ, 4, 4)
    assert asked.answers == [("large", Code.FAILURE)]
    assert asked.requests.capacity == 0
    group = sva.records()[0].group
    assert group is not None
    sva.respond(group)
    assert asked.answers[1:] == [("sent", Code.SUCCESS)]
    assert len(sva.records()) == 2


def test_an_index_is_reserved_until_it_is_answered(sva: Sva) -> None:
    """512 indices; each new group takes the one that was free longest."""
    seen: list[int] = []
    for _ in range(600):
        assert sva.asked.ask("held" if len(seen) == 3 else "a", 1)
        group = sva.records()[0].group
        assert group is not None
        seen.append(group)
        if len(seen) != 4:
            sva.respond(group)
    assert sorted(seen[:512]) == list(range(512))
    assert seen[3] not in seen[4:] and ("held", Code.SUCCESS) not in sva.asked.answers
    sva.respond(seen[3])
    assert sva.asked.answers[-1] == ("held", Code.SUCCESS)


def test_the_line_is_bounded(sva: Sva) -> None:
    sva.registers.write(EXT_PRI, PRI_ALLOC_REQ, 1, 4)
    count = 0
    while sva.asked.ask("a", 1):
        count += 1
        assert count < 1000
    assert len(sva.records()) == 1
    sva.registers.write(EXT_PRI, PRI_CTRL, 0)
    assert sva.asked.answers == [("a", Code.FAILURE)] * (count - 1), "all but the one that was sent"


@pytest.mark.parametrize("what", ["master", "pri", "pasid", "width", "negative", "execute", "privileged", "empty"])
def test_what_cannot_be_asked(sva: Sva, what: str) -> None:
    pasid, pages = 5, [(0, READ)]
    match what:
        case "master":
            sva.registers.set_master(False)
        case "pri":
            sva.registers.disable_pri()
        case "pasid":
            sva.registers.disable_pasid()
        case "width":
            pasid = 256
        case "negative":
            pasid = -1
        case "execute":
            pages = [(0, READ | Access.EXECUTE)]
        case "privileged":
            pages = [(0, READ | Access.PRIVILEGED)]
        case "empty":
            pages = []
    assert not sva.asked.ask("a", pages, pasid=pasid)
    assert sva.records() == [] and sva.asked.answers == []


def test_a_response_failure_stops_the_interface_until_it_is_enabled_anew(sva: Sva) -> None:
    registers, asked = sva.registers, sva.asked
    assert asked.ask("a", 20) and asked.ask("b", 12) and asked.ask("c", 1)
    groups = sorted({each.group for each in sva.records() if each.group is not None})
    assert len(groups) == 2
    sva.respond(groups[0], Code.FAILURE)
    assert sorted(asked.answers) == [(name, Code.FAILURE) for name in "abc"]
    assert registers.pri_status & PRI_RF and not asked.requests.usable and not asked.ask("d")
    sva.respond(groups[1])
    assert len(asked.answers) == 3, "responses are ignored from then on"
    assert not registers.pri_status & PRI_UPRGI
    registers.write(EXT_PRI, PRI_STATUS, PRI_RF)
    assert not registers.pri_status & PRI_RF and not asked.requests.usable
    registers.disable_pri()
    assert registers.pri_status & PRI_STOPPED
    registers.enable_pri()
    assert asked.requests.usable and asked.requests.capacity == 32 and asked.ask("e")


def test_stopped_tells_that_nothing_is_outstanding(sva: Sva) -> None:
    registers, asked = sva.registers, sva.asked
    assert asked.ask("a", 32) and asked.ask("waits", 1)
    group = sva.records()[0].group
    assert group is not None
    registers.disable_pri()
    assert asked.answers == [("waits", Code.FAILURE)]
    assert not registers.pri_status & PRI_STOPPED
    sva.respond(group)
    assert asked.answers[1:] == [("a", Code.SUCCESS)]
    assert registers.pri_status & PRI_STOPPED


def test_a_failure_while_stopping_ends_it(sva: Sva) -> None:
    assert sva.asked.ask("a", 16) and sva.asked.ask("b", 16)
    group = sva.records()[0].group
    assert group is not None
    sva.registers.disable_pri()
    sva.respond(group, Code.FAILURE)
    assert sva.registers.pri_status & (PRI_STOPPED | PRI_RF) == PRI_STOPPED | PRI_RF
    assert sorted(sva.asked.answers) == [("a", Code.FAILURE), ("b", Code.FAILURE)]


def test_the_reset_bit_forgets_what_is_outstanding(sva: Sva) -> None:
    registers, asked = sva.registers, sva.asked
    assert asked.ask("a", 32)
    old = sva.records()[0].group
    assert old is not None
    registers.write(EXT_PRI, PRI_CTRL, PRI_ENABLE | PRI_RESET)
    assert asked.answers == [] and asked.requests.capacity == 0, "nothing happens while it is enabled"
    registers.write(EXT_PRI, PRI_CTRL, PRI_RESET)
    assert registers.read(EXT_PRI, PRI_CTRL) == 0
    assert asked.answers == [("a", Code.FAILURE)] and registers.pri_status & PRI_STOPPED
    registers.enable_pri()
    assert asked.requests.capacity == 32 and asked.ask("b")
    assert sva.records()[0].group != old
    sva.respond(old)
    assert registers.pri_status & PRI_UPRGI, "it waits for that one no longer"
    assert asked.answers == [("a", Code.FAILURE)]


@pytest.mark.parametrize("by", ["flr", "device", "connection"])
def test_a_reset_ends_every_group_and_keeps_their_indices(sva: Sva, by: str) -> None:
    function, registers, asked = sva.function, sva.registers, sva.asked
    assert asked.ask("a", 32) and asked.ask("b", 1)
    old = sva.records()[0].group
    assert old is not None
    match by:
        case "flr":
            offset = function.config.find(0x10)
            assert offset is not None
            function.config.write(offset + EXP_DEVCTL, 2, EXP_FLR)
        case "device":
            function.reset(ResetKind.DEVICE)
        case "connection":
            function.reset(ResetKind.LOST_CONNECTION)
    assert asked.answers == [("a", Code.FAILURE), ("b", Code.FAILURE)]
    assert not asked.requests.usable and registers.pri_status == 0x8000 | PRI_STOPPED
    registers.enable_all()
    for _ in range(600):
        assert asked.ask("c")
        group = sva.records()[0].group
        assert group is not None and group != old
        sva.respond(group)
    sva.respond(old)
    assert asked.answers.count(("a", Code.FAILURE)) == 1 and len(asked.answers) == 2 + 600


def test_bus_mastering_off_keeps_what_was_sent(sva: Sva) -> None:
    assert sva.asked.ask("sent", 32) and sva.asked.ask("waits", 1)
    group = sva.records()[0].group
    assert group is not None
    sva.registers.set_master(False)
    assert sva.asked.answers == [("waits", Code.FAILURE)]
    sva.respond(group)
    assert sva.asked.answers[1:] == [("sent", Code.SUCCESS)]


def test_cancelled_answers_are_dropped_and_their_indices_kept(sva: Sva) -> None:
    asked = sva.asked
    assert asked.ask("five", 16, pasid=5) and asked.ask("six", 16, pasid=6) and asked.ask("more", 10, pasid=5)
    groups = [each.group for each in sva.records() if each.last]
    asked.requests.cancel(5)
    assert asked.requests.capacity == 0, "the guest has still to answer"
    for group in groups:
        assert group is not None
        sva.respond(group)
    assert asked.answers == [("six", Code.SUCCESS)]
    assert asked.requests.capacity == 32 and sva.records() == []


def test_nobody_to_answer_is_invalid(sva: Sva) -> None:
    assert sva.asked.ask("a", 3, pasid=7), "nothing is attached as PASID 7"
    assert sva.asked.answers == [("a", Code.INVALID)] and sva.asked.requests.capacity == 32
    sva.guest.ctx.detach(DEV1, vpasid=6)
    assert sva.asked.ask("b", 3, pasid=6)
    assert sva.asked.answers[1:] == [("b", Code.INVALID)]


def test_a_guest_that_never_answers_is_timed_out(sva: Sva) -> None:
    assert sva.asked.ask("a", 3)
    sva.guest.clock.now += 11
    sva.guest.engine.expire()
    assert sva.asked.answers == [("a", Code.INVALID)]


def test_a_queue_without_room_fails(sva: Sva) -> None:
    """512 page requests of a device wait at the most; what comes on top is answered by a response failure."""
    for _ in range(512 - 1):
        sva.guest.dev1.page_request(5, 0, READ, group=511, last=False, answer=lambda _: None)
    assert sva.asked.ask("a", 2)
    assert sva.asked.answers == [("a", Code.FAILURE)] and sva.registers.pri_status & PRI_RF


def test_an_answer_may_ask_again(sva: Sva) -> None:
    rounds: list[Code] = []

    def again(code: Code) -> None:
        rounds.append(code)
        if len(rounds) < 100:
            assert sva.asked.requests.ask(7, [(0, READ)], again)

    assert sva.asked.requests.ask(7, [(0, READ)], again)
    assert rounds == [Code.INVALID] * 100


def test_a_response_that_nobody_waits_for_is_noted(sva: Sva) -> None:
    """UPRGI, which the guest clears by writing 1 (10.5.2.3)."""
    assert sva.asked.ask("a")
    sva.asked.requests.unexpected()
    assert sva.registers.pri_status & PRI_UPRGI and sva.asked.answers == []
    sva.registers.write(EXT_PRI, PRI_STATUS, PRI_UPRGI)
    assert not sva.registers.pri_status & PRI_UPRGI
    group = sva.records()[0].group
    assert group is not None
    sva.respond(group)
    assert sva.asked.answers == [("a", Code.SUCCESS)]
    sva.registers.disable_pri()
    sva.asked.requests.unexpected()
    assert not sva.registers.pri_status & PRI_UPRGI


def test_a_pasid_taken_back_fails_what_waits_with_it(sva: Sva) -> None:
    assert sva.asked.ask("sent", 32) and sva.asked.ask("waits", 1, pasid=6) and sva.asked.ask("none", 1, pasid=None)
    sva.registers.write(EXT_PASID, 6, 0)
    assert sva.asked.answers == [("waits", Code.FAILURE)]


def test_a_function_without_the_capability_has_no_interface() -> None:
    guest = Guest()
    try:
        function, _ = connected(guest, Pasid())
        assert function.page_requests is None
    finally:
        guest.close()


def test_bits_in_any_order_do_no_harm(sva: Sva) -> None:
    """Every sequence of three writes to PRI control, with a group outstanding: each answer comes once."""
    for number in range(4**3):
        name = str(number)
        sva.registers.write(EXT_PRI, PRI_CTRL, 0)
        sva.registers.write(EXT_PRI, PRI_CTRL, PRI_RESET)
        sva.registers.enable_pri()
        assert sva.asked.ask(name, 2)
        for write in (number & 3, number >> 2 & 3, number >> 4 & 3):
            sva.registers.write(EXT_PRI, PRI_CTRL, write)
        for group in {each.group for each in sva.records()}:
            assert group is not None
            sva.respond(group)
        assert [each for each, _ in sva.asked.answers].count(name) == 1


def test_pages_are_whole(sva: Sva) -> None:
    assert sva.asked.ask("a", [(PAGE + 1, READ)])
    assert [each.iova for each in sva.records()] == [PAGE]


def test_pasids_that_the_guest_numbers_otherwise() -> None:
    """Where PASIDs come from a pool, a response names the guest's; the function is answered all the same."""
    guest = Guest(Traits(pasid_mode=PasidMode.PER_RID))
    try:
        ctx = guest.ctx
        assert (ctx.alloc(), ctx.create_nesting(1)) == (1, 2)
        ctx.bind_pgtable(2, 0x8000, PgtableFormat())
        ctx.attach(DEV1, 1)
        ctx.attach(DEV1, 2, vpasid=99)
        function, registers = connected(guest, Ats(), Pasid(width=20), Pri())
        registers.enable_all()
        physical = guest.dev1.physical(99)
        assert physical not in {None, 99}
        asked = Asked(function)
        for _ in range(3):
            assert asked.ask("a", 32, pasid=physical)
            record = ctx.read_faults().records[-1]
            assert record.pasid == 99 and record.group is not None
            ctx.page_response(DEV1, record.group, Code.SUCCESS, 99)
        assert asked.answers == [("a", Code.SUCCESS)] * 3 and not registers.pri_status & PRI_UPRGI
    finally:
        guest.close()


def test_a_guest_that_resets_and_never_answers_runs_out_of_indices_for_a_while(sva: Sva) -> None:
    """512 groups wait in the guest's IOMMU; one more goes out when their time is over, and not before."""
    for _ in range(16):
        for _ in range(32):
            assert sva.asked.ask("lost")
        sva.function.reset(ResetKind.FLR)
        sva.registers.enable_all()
    assert sva.asked.answers == [("lost", Code.FAILURE)] * 512
    assert sva.asked.requests.capacity == 0 and sva.asked.ask("waits")
    assert len(sva.records()) == 512 and sva.records() == []
    sva.guest.clock.now += 11
    sva.guest.engine.expire()
    assert len(sva.records()) == 1 and sva.asked.requests.capacity == 31
    assert len(sva.asked.answers) == 512, "nobody is answered twice"
