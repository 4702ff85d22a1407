"""The faults of a context: page requests that wait for an answer, and what releases them; unrecoverable ones."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1, DEV2, GOLDEN, Guest, refused

from backend.core import Access, Fault, Reason
from backend.ioasid import Code, Device, FaultRecord, Kind, PageResponse, PasidMode, PgtableFormat, Traits

READ = Access.READ


@pytest.fixture
def guest() -> Iterator[Guest]:
    """dev1 and dev2 on 1, a kernel IOASID; dev1's PASIDs 5 and 6 on 2, a child of it."""
    guest = Guest()
    ctx = guest.ctx
    assert (ctx.alloc(), ctx.create_nesting(1)) == (1, 2)
    ctx.bind_pgtable(2, 0x8000, PgtableFormat())
    for rid in (DEV1, DEV2):
        ctx.attach(rid, 1)
    for pasid in (5, 6):
        ctx.attach(DEV1, 2, vpasid=pasid)
    yield guest
    guest.close()


class Asking:
    """Page requests of one device, and what it was answered."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.answers: list[tuple[int, Code]] = []

    def ask(self, group: int, *, pasid: int | None = 5, iova: int = 0x7000, last: bool = True) -> None:
        self.device.page_request(pasid, iova, READ, group=group, last=last, answer=self.hear)

    def hear(self, response: PageResponse) -> None:
        assert response.rid == self.device.rid
        self.answers.append((response.group, response.code))


def test_a_group_is_answered_once_and_as_a_whole(guest: Guest) -> None:
    asking = Asking(guest.dev1)
    for index, last in enumerate((False, False, True)):
        asking.ask(9, iova=index * PAGE, last=last)
    records = guest.ctx.read_faults().records
    assert [(each.iova, each.group, each.last, each.ioasid) for each in records] == [
        (0, 9, False, 2), (PAGE, 9, False, 2), (2 * PAGE, 9, True, 2),
    ]  # fmt: skip
    guest.ctx.page_response(DEV1, 9, Code.INVALID)
    assert asking.answers == [(9, Code.INVALID)]
    assert refused(lambda: guest.ctx.page_response(DEV1, 9, Code.SUCCESS)) == errno.ENOENT
    assert guest.ctx.faults.waiting == 0


@pytest.mark.parametrize("code", list(Code))
def test_every_code(guest: Guest, code: Code) -> None:
    asking = Asking(guest.dev1)
    asking.ask(0)
    guest.ctx.page_response(DEV1, 0, code)
    assert asking.answers == [(0, code)]


def test_what_is_no_answer(guest: Guest) -> None:
    ctx, asking = guest.ctx, Asking(guest.dev1)
    asking.ask(1, last=False)
    assert refused(lambda: ctx.page_response(DEV1, 1, Code.SUCCESS)) == errno.ENOENT, "its last page is to come"
    asking.ask(1)
    assert refused(lambda: ctx.page_response(DEV1, 2, Code.SUCCESS)) == errno.ENOENT
    assert refused(lambda: ctx.page_response(DEV2, 1, Code.SUCCESS)) == errno.ENOENT
    assert refused(lambda: ctx.page_response(DEV1, 1, Code.SUCCESS, pasid=6)) == errno.ENOENT
    assert refused(lambda: ctx.page_response(DEV1, 1, "maybe")) == errno.EOPNOTSUPP  # type: ignore[arg-type]
    assert refused(lambda: ctx.page_response(DEV1, 512, Code.SUCCESS)) == errno.EINVAL
    assert refused(lambda: ctx.page_response(0x777, 1, Code.SUCCESS)) == errno.ENODEV
    assert refused(lambda: guest.engine.open().page_response(DEV1, 1, Code.SUCCESS)) == errno.EINVAL
    assert not asking.answers
    ctx.page_response(DEV1, 1, Code.SUCCESS, pasid=5)
    assert asking.answers == [(1, Code.SUCCESS)]


def test_an_index_is_taken_until_it_is_answered(guest: Guest) -> None:
    asking = Asking(guest.dev1)
    asking.ask(4)
    asking.ask(4)
    assert asking.answers == [(4, Code.INVALID)], "the second one, for the first group is complete"
    asking.ask(5, pasid=5, last=False)
    asking.ask(5, pasid=6)
    assert asking.answers[1:] == [(5, Code.INVALID)], "a group is of one PASID"
    guest.ctx.page_response(DEV1, 4, Code.SUCCESS)
    assert asking.answers[2:] == [(4, Code.SUCCESS)]
    other = Asking(guest.dev2)
    other.ask(5, pasid=None)
    assert not other.answers, "another device's indices are its own"


def test_nobody_answers(guest: Guest) -> None:
    ctx, asking = guest.ctx, Asking(guest.dev1)
    asking.ask(1)
    guest.clock.now += 6
    asking.ask(2, last=False)
    assert guest.engine.expire() == 1010.0
    guest.clock.now = 1009.99
    assert guest.engine.expire() == 1010.0 and not asking.answers
    guest.clock.now = 1010.0
    assert guest.engine.expire() == 1016.0
    assert asking.answers == [(1, Code.INVALID)]
    assert refused(lambda: ctx.page_response(DEV1, 1, Code.SUCCESS)) == errno.ENOENT
    assert [each.group for each in ctx.read_faults().records] == [2], "what is over need not be read"
    guest.clock.now = 1016.0
    assert ctx.read_faults().records == ()
    assert asking.answers == [(1, Code.INVALID), (2, Code.INVALID)]
    assert guest.engine.expire() is None


def test_late_answers_need_no_timer(guest: Guest) -> None:
    """Whoever answers too late is told, even where nobody called `expire`."""
    asking = Asking(guest.dev1)
    asking.ask(1)
    guest.clock.now += 11
    assert refused(lambda: guest.ctx.page_response(DEV1, 1, Code.SUCCESS)) == errno.ENOENT
    assert asking.answers == [(1, Code.INVALID)]


def test_detach_releases_what_it_was_asked_for(guest: Guest) -> None:
    asking = Asking(guest.dev1)
    asking.ask(1, pasid=5)
    asking.ask(2, pasid=6)
    asking.ask(3, pasid=None)
    guest.ctx.detach(DEV1, vpasid=5)
    assert asking.answers == [(1, Code.INVALID)]
    assert [each.group for each in guest.ctx.read_faults().records] == [2, 3]
    guest.ctx.detach(DEV1, vpasid=6)
    guest.ctx.detach(DEV1)
    assert asking.answers[1:] == [(2, Code.INVALID), (3, Code.INVALID)]


def test_unbinding_a_table_releases(guest: Guest) -> None:
    asking = Asking(guest.dev1)
    asking.ask(1, pasid=5)
    asking.ask(2, pasid=None)
    guest.ctx.unbind_pgtable(2)
    assert asking.answers == [(1, Code.INVALID)]


def test_a_disconnect_releases(guest: Guest) -> None:
    asking = Asking(guest.dev1)
    asking.ask(1, pasid=5)
    asking.ask(3, pasid=None)
    guest.ctx.close()
    assert sorted(asking.answers) == [(1, Code.INVALID), (3, Code.INVALID)]
    asking.ask(4)
    assert asking.answers[2:] == [(4, Code.INVALID)]


def test_nobody_to_ask(guest: Guest) -> None:
    asking = Asking(guest.dev1)
    asking.ask(1, pasid=9)
    assert asking.answers == [(1, Code.INVALID)], "attached to nothing"
    vm = guest.ctx.alloc(Kind.VM)
    guest.ctx.attach(DEV2, vm, pasid=3)
    other = Asking(guest.dev2)
    other.ask(1, pasid=3)
    assert other.answers == [(1, Code.INVALID)], "nobody maps into it"


def test_page_requests_are_bounded(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.ioasid.fault_queue.MAX_PAGE_REQUESTS", 3)
    asking = Asking(guest.dev1)
    asking.ask(1)
    asking.ask(2, last=False)
    asking.ask(2, last=False)
    asking.ask(3)
    assert asking.answers == [(3, Code.FAILURE)], "no room for it"
    asking.ask(2)
    assert asking.answers[1:] == [(2, Code.FAILURE)], "a group that cannot be complete any more"
    asking.ask(4)
    assert asking.answers[2:] == [] and guest.ctx.faults.waiting == 2
    guest.ctx.read_faults()
    asking.ask(5)
    asking.ask(6)
    assert asking.answers[2:] == [(6, Code.FAILURE)], "read or not, it waits for its answer"


def test_a_group_without_room_is_answered_through_its_newest_request(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.ioasid.fault_queue.MAX_PAGE_REQUESTS", 1)
    first, newest = Asking(guest.dev1), Asking(guest.dev1)
    first.ask(2, last=False)
    newest.ask(2)
    assert (first.answers, newest.answers) == ([], [(2, Code.FAILURE)]), "as of any other group"


def test_a_device_leaves_the_others_their_room(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.ioasid.fault_queue.MAX_DEVICE_PAGE_REQUESTS", 2)
    guest.ctx.attach(DEV2, guest.ctx.alloc(Kind.KERNEL), pasid=5)
    greedy, other = Asking(guest.dev1), Asking(guest.dev2)
    for group in range(1, 5):
        greedy.ask(group, pasid=5)
    assert greedy.answers == [(3, Code.FAILURE), (4, Code.FAILURE)]
    other.ask(1, pasid=5)
    assert other.answers == []
    guest.ctx.page_response(DEV1, 1, Code.SUCCESS)
    greedy.ask(5, pasid=5)
    assert greedy.answers[2:] == [(1, Code.SUCCESS)], "what was answered has given its room back"
    guest.ctx.detach(DEV1, pasid=5)
    assert guest.ctx.faults.waiting == 1, "the other one's"


def test_answers_may_ask_again(guest: Guest) -> None:
    """A device that, when it hears, sends its next request: also while a context goes."""
    heard: list[Code] = []

    def again(response: PageResponse) -> None:
        heard.append(response.code)
        if len(heard) < 5:
            guest.dev1.page_request(5, 0, READ, group=1, last=True, answer=again)

    guest.dev1.page_request(5, 0, READ, group=1, last=True, answer=again)
    guest.ctx.page_response(DEV1, 1, Code.SUCCESS)
    guest.clock.now += 10
    guest.engine.expire()
    assert heard == [Code.SUCCESS, Code.INVALID]
    guest.ctx.close()
    assert heard[2:] == [Code.INVALID] * len(heard[2:]) and len(heard) > 2


def test_unrecoverable_faults_are_told_once(guest: Guest) -> None:
    told: list[Fault] = []
    guest.engine.on_fault(told.append)
    answer = guest.dev2.port.read(0x9000, 8)
    assert isinstance(answer, Fault)
    (record,) = guest.ctx.read_faults().records
    assert record == FaultRecord(
        recoverable=False, ioasid=1, rid=DEV2, cookie=None, pasid=None, iova=0x9000, access=READ, group=None,
        last=False, reason=Reason.NOT_PRESENT, stage=2, level=record.level, gpa=record.gpa,
    )  # fmt: skip
    assert guest.ctx.read_faults().records == ()
    assert told == [answer]


def test_unrecoverable_faults_are_bounded_apart(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.ioasid.fault_queue.MAX_FAULTS", 2)
    asking = Asking(guest.dev1)
    for iova in range(0x10000, 0x15000, PAGE):
        guest.dev2.port.read(iova, 8)
    asking.ask(1)
    assert not asking.answers, "a flood of them takes no room from page requests"
    first = guest.ctx.read_faults(1)
    assert [each.iova for each in first.records] == [0x10000] and first.lost == 3
    rest = guest.ctx.read_faults()
    assert [(each.iova, each.recoverable) for each in rest.records] == [(0x11000, False), (0x7000, True)]
    assert rest.lost == 0
    guest.dev2.port.read(0x16000, 8)
    assert [each.iova for each in guest.ctx.read_faults().records] == [0x16000]


def test_faults_go_to_the_context_of_the_device(guest: Guest) -> None:
    other = guest.engine.open()
    guest.ctx.detach(DEV2)
    guest.ctx.unbind_device(DEV2)
    other.bind_device(DEV2, 77)
    guest.dev2.port.read(0, 8)
    assert guest.ctx.read_faults().records == ()
    (record,) = other.read_faults().records
    assert (record.reason, record.ioasid, record.cookie) == (Reason.NO_ROUTE, 0, 77)


def test_only_the_guests_pasids_are_seen() -> None:
    guest = Guest(Traits(pasid_mode=PasidMode.PER_RID))
    ctx = guest.ctx
    gpa = ctx.alloc()
    ctx.attach(DEV1, gpa)
    child = ctx.create_nesting(gpa)
    ctx.bind_pgtable(child, 0x8000, PgtableFormat())
    ctx.attach(DEV1, child, vpasid=5)
    physical = guest.dev1.physical(5)
    assert physical not in {None, 5}
    asking = Asking(guest.dev1)
    asking.ask(1, pasid=physical)
    answer = guest.dev1.port.read(0x1000, 8, pasid=physical)
    assert isinstance(answer, Fault) and answer.pasid == 5
    assert [each.pasid for each in ctx.read_faults().records] == [5, 5]
    ctx.page_response(DEV1, 1, Code.SUCCESS, pasid=5)
    assert asking.answers == [(1, Code.SUCCESS)]
    guest.close()


def test_addresses_of_the_guest_reach_no_further(guest: Guest) -> None:
    guest.ctx.map_dma(1, 0, GOLDEN, guest.ram.size)
    answer = guest.dev1.port.read(0x7000, 8, pasid=5)
    assert isinstance(answer, Fault)
    (record,) = guest.ctx.read_faults().records
    assert (record.stage, record.ioasid, record.pasid) == (1, 2, 5)


def test_a_device_that_asks_again_at_once_keeps_nothing_waiting(guest: Guest) -> None:
    heard: list[Code] = []

    def again(response: PageResponse) -> None:
        heard.append(response.code)
        if len(heard) < 3:
            guest.dev1.page_request(5, 0, READ, group=1, last=True, answer=again)

    guest.dev1.page_request(5, 0, READ, group=1, last=True, answer=again)
    guest.ctx.detach(DEV1, vpasid=5)
    assert heard == [Code.INVALID] * 3
    assert guest.ctx.faults.waiting == 0
