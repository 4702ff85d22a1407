"""Doorbells, shadowed and hostile: NVM Express 1.4, 3.1.24, 3.1.25, 5.7 and 7.13."""

import struct
from collections.abc import Iterator

import pytest
from nvme_driver import (
    ASYNC_EVENT,
    BROADCAST,
    CREATE_CQ,
    CREATE_SQ,
    CSTS,
    DOORBELL_BUFFERS,
    FATAL,
    FLUSH,
    READY,
    Host,
    Queue,
)

QUEUE_INVALID = 0x100
BAD_FIELD = 0x02
TRANSFER_ERROR = 0x04


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    host.enable()
    yield host
    host.close()


# Shadow doorbells


def test_shadow_doorbells_are_for_whole_pages(host: Host) -> None:
    page = host.allocate()
    assert host.submit_admin(DOORBELL_BUFFERS, prp1=page + 8, prp2=page).status == BAD_FIELD
    assert host.submit_admin(DOORBELL_BUFFERS, prp1=page, prp2=page + 2048).status == BAD_FIELD
    lost = host.allocate()
    host.unmap(lost)
    host.create_queue(1, 8)
    assert host.submit_admin(DOORBELL_BUFFERS, prp1=lost, prp2=page).status == TRANSFER_ERROR
    assert host.submit_admin(DOORBELL_BUFFERS, prp1=page, prp2=lost).status == TRANSFER_ERROR
    assert host.get(CSTS) == READY


@pytest.mark.parametrize("page", [0, 1])
def test_a_queue_that_cannot_be_shadowed_is_not_made(host: Host, page: int) -> None:
    host.set_shadow()
    assert host.shadow is not None
    host.unmap(host.shadow[page])
    queue = host.allocate()
    for opcode in (CREATE_CQ, CREATE_SQ):
        done = host.submit_admin(opcode, prp1=queue, cdw10=7 << 16 | 1, cdw11=1 << 16 | 1)
        assert done.status == (TRANSFER_ERROR if opcode == CREATE_CQ else QUEUE_INVALID)
    host.map(host.shadow[page])
    assert host.submit_io(host.create_queue(1, 8), FLUSH, 0, 1).status == 0


def test_shadow_doorbells_take_over_a_queue_in_use(host: Host) -> None:
    queue = host.create_queue(1, 8)
    for _ in range(3):
        host.submit_io(queue, FLUSH, 0, 1)
    host.set_shadow()
    for turn in range(20):
        assert host.submit_io(queue, FLUSH, 0, 1).sq_head == (turn + 4) % 8


def test_shadow_doorbells_save_completion_rings(host: Host) -> None:
    host.set_shadow()
    queue = host.create_queue(1, 16, vector=1)
    for _ in range(200):
        for _ in range(3):
            queue.push(host.entry(FLUSH, nsid=1))
        queue.ring()
        assert len(queue.pop_all()) == 3
    assert queue.rings == 200  # each batch finds the controller asleep
    assert queue.completion_rings == 0


def test_shadow_tail_that_moves_while_the_controller_looks_away(host: Host) -> None:
    """The guest adds entries after the doorbell was rung and before EventIdx was written: no ring comes for those."""
    host.set_shadow()
    queue = host.create_queue(1, 16)
    shadow = host.shadow
    assert shadow is not None
    for _ in range(2):
        queue.push(host.entry(FLUSH, nsid=1))
    # Like a second CPU: it stores its tail just when the controller has fetched what it knew of.
    fetched = host.device.port.read
    late: list[bytes] = []

    def read(iova: int, length: int, pasid: int | None = None) -> object:
        answer = fetched(iova, length, pasid)
        if iova == queue.sq and not late:
            for _ in range(3):
                entry = host.entry(FLUSH, nsid=1)
                late.append(entry)
                queue.push(entry)
            host.poke(shadow[0] + 8, struct.pack("<I", queue.tail))
        return answer

    host.device.port.read = read  # type: ignore[method-assign, assignment]
    queue.ring()
    assert len(queue.pop_all()) == 5


@pytest.mark.parametrize("value", [8, 0xFFFF, 0x1_0001, BROADCAST])
def test_shadow_values_out_of_range(host: Host, value: int) -> None:
    host.set_shadow()
    queue = host.create_queue(1, 8)
    assert host.shadow is not None
    host.poke(host.shadow[0] + 8, struct.pack("<I", value))
    host.doorbell(2, value & 0xFFFF)
    assert queue.pop() is None
    assert host.get(CSTS) == READY
    host.poke(host.shadow[0] + 8, bytes(4))
    assert host.submit_io(queue, FLUSH, 0, 1).status == 0
    assert struct.unpack_from("<QHH", host.log(0x01, 64), 0)[1:] == (1, 0xFFFF)


def test_shadow_page_taken_away_is_fatal(host: Host) -> None:
    host.set_shadow()
    queue = host.create_queue(1, 8)
    assert host.shadow is not None
    host.unmap(host.shadow[0])
    queue.push(host.entry(FLUSH, nsid=1))
    host.doorbell(2, 1)
    assert host.get(CSTS) == READY | FATAL


# Hostile doorbells


def error_of(host: Host) -> tuple[int, int]:
    """SQ id and command id of the newest error."""
    sqid, cid = struct.unpack_from("<QHH", host.log(0x01, 64, retain=True), 0)[1:]
    return sqid, cid


@pytest.mark.parametrize(
    ("index", "value", "information", "sqid"),
    [
        (2 * 1, 8, 1, 1),  # tail beyond the queue
        (2 * 1, 0xFFFF, 1, 1),
        (2 * 1, 0, 1, 1),  # the same as before
        (2 * 1 + 1, 8, 1, 1),  # head beyond the queue
        (2 * 1 + 1, 1, 1, 1),  # releases what was never posted
        (2 * 1 + 1, 0, 1, 1),
        (2 * 2, 1, 0, 2),  # no such queue
        (2 * 2 + 1, 1, 0, 2),
        (2 * 300, 1, 0, 300),
        (1, 31, 1, 0),  # admin head beyond its tail
    ],
)
def test_bad_doorbells_become_an_event(host: Host, index: int, value: int, information: int, sqid: int) -> None:
    queue = host.create_queue(1, 8)
    event = host.entry(ASYNC_EVENT)
    host.admin.push(event)
    host.admin.ring()
    assert host.admin.pop() is None
    host.doorbell(index, value)
    done = host.admin.pop()
    assert done is not None
    assert (done.cid, done.status) == (struct.unpack_from("<H", event, 2)[0], 0)
    assert done.result == information << 8 | 1 << 16  # error status; error information log page
    assert error_of(host) == (sqid, 0xFFFF)
    assert host.submit_io(queue, FLUSH, 0, 1).status == 0


def test_a_tail_that_would_overrun_the_queue(host: Host) -> None:
    """With 6 of 7 places pending, moving the tail by more than one would overwrite what was not fetched."""
    completions = Queue(host, 1, 2)
    assert host.submit_admin(CREATE_CQ, prp1=completions.cq, cdw10=1 << 16 | 1, cdw11=1).status == 0
    queue = Queue(host, 1, 8, cq=completions.cq)
    assert host.submit_admin(CREATE_SQ, prp1=queue.sq, cdw10=7 << 16 | 1, cdw11=1 << 16 | 1).status == 0
    for _ in range(7):
        queue.push(host.entry(FLUSH, nsid=1))
    queue.ring()  # one is fetched, for there is one place for its completion
    host.doorbell(2, 1)  # tail 7 -> 1 adds two where one place is free
    assert error_of(host) == (1, 0xFFFF)
    count = 0
    while completions.pop() is not None:
        count += 1
    assert count == 7
