"""Asynchronous events and Abort: NVM Express 1.4, 5.1 and 5.2."""

import struct
from collections.abc import Iterator

import pytest
from nvme_driver import ABORT, ASYNC_EVENT, BROADCAST, CC, SET_FEATURES, Host

EVENT_LIMIT = 0x105
BAD_FIELD = 0x02
ID_CONFLICT = 0x03
ABORTED = 0x07


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    host.enable()
    yield host
    host.close()


def event_requests(host: Host, count: int) -> list[int]:
    cids = []
    for _ in range(count):
        entry = host.entry(ASYNC_EVENT)
        cids.append(struct.unpack_from("<H", entry, 2)[0])
        host.admin.push(entry)
    host.admin.ring()
    return cids


def test_more_event_requests_than_the_limit(host: Host) -> None:
    cids = event_requests(host, 5)  # AERL 3 means 4
    done = host.admin.pop()
    assert done is not None
    assert (done.cid, done.status) == (cids[4], EVENT_LIMIT)
    assert host.admin.pop() is None


def test_event_request_id_used_twice(host: Host) -> None:
    entry = host.entry(ASYNC_EVENT)
    host.admin.push(entry)
    host.admin.push(entry)
    host.admin.ring()
    done = host.admin.pop()
    assert done is not None
    assert done.status == ID_CONFLICT


def test_an_event_is_masked_until_its_log_is_read(host: Host) -> None:
    event_requests(host, 4)
    host.doorbell(40, 1)
    first = host.admin.pop()
    assert first is not None
    assert first.result == 1 << 16
    for _ in range(100):
        host.doorbell(40, 1)
        host.doorbell(1, 31)
    assert host.admin.pop() is None
    host.log(0x01, 64, retain=True)
    assert host.admin.pop() is None
    buffer = host.allocate()
    host.admin.push(host.entry(0x02, nsid=BROADCAST, prp1=buffer, cdw10=0x01 | 15 << 16))
    host.admin.ring()
    kinds = [completion.result for completion in host.admin.pop_all()]
    assert kinds == [0, 1 << 16]  # the log page, then one event; the type is masked again
    told = []
    for _ in range(4):
        host.admin.push(host.entry(0x02, nsid=BROADCAST, prp1=buffer, cdw10=0x01 | 15 << 16))
        host.admin.ring()
        told += [completion.result for completion in host.admin.pop_all()]
    assert told == [0, 1 << 8 | 1 << 16, 0, 0, 0]  # of a hundred rings of each kind, one waited


def test_a_controller_reset_forgets_requests_and_events(host: Host) -> None:
    event_requests(host, 4)
    host.doorbell(40, 1)
    host.doorbell(40, 1)
    host.put(CC, 0)
    host.enable()
    event_requests(host, 4)  # none is one too many, and none has anything to tell
    assert host.admin.pop() is None


def test_temperature_threshold_raises_an_event(host: Host) -> None:
    event_requests(host, 1)
    assert host.submit_admin(SET_FEATURES, cdw10=0x0B, cdw11=0x02).status == 0
    host.admin.push(host.entry(SET_FEATURES, cdw10=0x04, cdw11=280))  # over 280 K is too hot
    host.admin.ring()
    done = host.admin.pop_all()
    assert [completion.result for completion in done] == [0, 1 | 1 << 8 | 2 << 16]
    assert host.log(0x02, 512)[0] == 1 << 1


def test_abort_of_an_event_request(host: Host) -> None:
    cids = event_requests(host, 4)
    host.admin.push(host.entry(ABORT, cdw10=cids[2] << 16))
    host.admin.ring()
    aborted, abort = host.admin.pop_all()
    assert (aborted.cid, aborted.status) == (cids[2], ABORTED)
    assert (abort.status, abort.result) == (0, 0)
    assert len(event_requests(host, 1)) == 1
    assert host.admin.pop() is None  # its place is free again


def test_abort_of_what_is_not_there(host: Host) -> None:
    host.create_queue(1, 8)
    (event,) = event_requests(host, 1)
    for sqid, cid in ((0, 77), (1, 1), (1, 0xFFFF), (1, event)):
        done = host.submit_admin(ABORT, cdw10=cid << 16 | sqid)
        assert (done.status, done.result) == (0, 1)
    assert host.submit_admin(ABORT, cdw10=9).status == BAD_FIELD


def test_events_wait_for_room_in_the_admin_queue() -> None:
    host = Host()
    host.enable(entries=4)
    event_requests(host, 3)
    event_requests(host, 1)
    for _ in range(3):
        host.admin.push(host.entry(ABORT, cdw10=77 << 16))
    host.admin.ring()  # three completions: full
    host.doorbell(40, 1)  # an event, which has to wait
    found = host.admin.pop_all()
    assert [completion.result for completion in found] == [1, 1, 1]
    done = host.admin.pop()
    assert done is not None
    assert done.result == 1 << 16
    host.close()
