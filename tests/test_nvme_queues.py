"""Queues: NVM Express 1.4, 4.1, 4.6, 5.3 to 5.6; their turns, and memory that goes away."""

import asyncio
import struct
from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from nvme_driver import (
    ACQ,
    AQA,
    ASQ,
    CC,
    CREATE_CQ,
    CREATE_SQ,
    CSTS,
    DELETE_CQ,
    DELETE_SQ,
    ENABLE,
    FATAL,
    FLUSH,
    IDENTIFY,
    READ,
    READY,
    SET_FEATURES,
    WRITE,
    Host,
    Queue,
)

from backend.core import Access, Fault

QUEUE_INVALID = 0x100
BAD_ID = 0x101
BAD_SIZE = 0x102
BAD_VECTOR = 0x108
BAD_DELETION = 0x10C
BAD_FIELD = 0x02
BAD_PRP_OFFSET = 0x13


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    host.enable()
    yield host
    host.close()


# Creation and deletion


@pytest.mark.parametrize(
    ("cdw10", "cdw11", "offset", "status"),
    [
        (31 << 16 | 0, 1, 0, BAD_ID),
        (31 << 16 | 17, 1, 0, BAD_ID),  # 16 were granted
        (31 << 16 | 0xFFFF, 1, 0, BAD_ID),
        (0 << 16 | 1, 1, 0, BAD_SIZE),  # one entry
        (1024 << 16 | 1, 1, 0, BAD_SIZE),  # MQES + 1
        (0xFFFF << 16 | 1, 1, 0, BAD_SIZE),
        (31 << 16 | 1, 0, 0, BAD_FIELD),  # not contiguous, against CAP.CQR
        (31 << 16 | 1, 17 << 16 | 3, 0, BAD_VECTOR),
        (31 << 16 | 1, 0xFFFF << 16 | 3, 0, BAD_VECTOR),
        (31 << 16 | 1, 1, 64, BAD_PRP_OFFSET),
    ],
)
def test_create_completion_queue_refuses(host: Host, cdw10: int, cdw11: int, offset: int, status: int) -> None:
    done = host.submit_admin(CREATE_CQ, prp1=host.allocate() + offset, cdw10=cdw10, cdw11=cdw11)
    assert (done.status, done.do_not_retry) == (status, True)
    host.create_queue(1, 32, vector=16)


@pytest.mark.parametrize(
    ("cdw10", "cdw11", "offset", "status"),
    [
        (31 << 16 | 0, 1 << 16 | 1, 0, BAD_ID),
        (31 << 16 | 17, 1 << 16 | 1, 0, BAD_ID),
        (0 << 16 | 2, 1 << 16 | 1, 0, BAD_SIZE),
        (1024 << 16 | 2, 1 << 16 | 1, 0, BAD_SIZE),
        (31 << 16 | 2, 1 << 16 | 0, 0, BAD_FIELD),
        (31 << 16 | 2, 0 << 16 | 1, 0, QUEUE_INVALID),  # the admin completion queue
        (31 << 16 | 2, 3 << 16 | 1, 0, QUEUE_INVALID),  # does not exist
        (31 << 16 | 2, 1 << 16 | 1, 8, BAD_PRP_OFFSET),
        (31 << 16 | 1, 1 << 16 | 1, 0, BAD_ID),  # exists
    ],
)
def test_create_submission_queue_refuses(host: Host, cdw10: int, cdw11: int, offset: int, status: int) -> None:
    host.create_queue(1, 32)
    done = host.submit_admin(CREATE_SQ, prp1=host.allocate() + offset, cdw10=cdw10, cdw11=cdw11)
    assert (done.status, done.do_not_retry) == (status, True)


def test_queues_need_their_entry_sizes_set(host: Host) -> None:
    host.put(CC, 0)
    host.put(CC, 1)  # IOSQES and IOCQES still zero
    host.admin = Queue(host, 0, 32, sq=host.admin.sq, cq=host.admin.cq)
    done = host.submit_admin(CREATE_CQ, prp1=host.allocate(), cdw10=31 << 16 | 1, cdw11=1)
    assert done.status == BAD_SIZE
    host.put(CC, ENABLE)
    host.create_queue(1, 32)


def test_deletion_in_order(host: Host) -> None:
    first = host.create_queue(1, 8)
    done = host.submit_admin(CREATE_SQ, prp1=host.allocate(), cdw10=7 << 16 | 5, cdw11=1 << 16 | 1)
    assert done.status == 0  # two submission queues complete on one completion queue
    assert host.submit_admin(DELETE_CQ, cdw10=1).status == BAD_DELETION
    assert host.submit_admin(DELETE_SQ, cdw10=1).status == 0
    assert host.submit_admin(DELETE_SQ, cdw10=1).status == BAD_ID
    assert host.submit_admin(DELETE_CQ, cdw10=1).status == BAD_DELETION
    assert host.submit_admin(DELETE_SQ, cdw10=5).status == 0
    assert host.submit_admin(DELETE_CQ, cdw10=1).status == 0
    for opcode in (DELETE_CQ, DELETE_SQ):
        for qid in (0, 1, 16, 17, 0xFFFF):
            assert host.submit_admin(opcode, cdw10=qid).status == BAD_ID
    first.push(host.entry(FLUSH, nsid=1))
    first.ring()
    assert first.pop() is None
    host.create_queue(1, 8)


def test_what_was_not_fetched_goes_with_its_queue(host: Host) -> None:
    """A full completion queue holds commands back; deleting and making the queue again starts from nothing."""
    queue = host.create_queue(1, 4)
    for _ in range(3):
        queue.push(host.entry(FLUSH, nsid=1))
    queue.ring()
    for _ in range(3):
        queue.push(host.entry(FLUSH, nsid=1))
        queue.ring()
    assert host.submit_admin(DELETE_SQ, cdw10=1).status == 0
    assert host.submit_admin(DELETE_CQ, cdw10=1).status == 0
    queue = host.create_queue(1, 4)
    assert host.submit_io(queue, FLUSH, 0, 1).sq_head == 1


def test_every_queue_with_its_vector(host: Host) -> None:
    queues = [host.create_queue(qid, 8, vector=qid) for qid in range(1, 17)]
    host.interrupts.clear()
    for queue in queues:
        assert host.submit_io(queue, FLUSH, 0, 1).sq_id == queue.qid
    assert host.interrupts == list(range(1, 17))


# Wrap, phase, interrupts


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("shadow", [False, True])
def test_wrap_and_phase(host: Host, size: int, shadow: bool) -> None:
    if shadow:
        host.set_shadow()
    queue = host.create_queue(1, size)
    for turn in range(5 * size + 1):
        done = host.submit_io(queue, FLUSH, 0, 1)
        assert (done.status, done.sq_head) == (0, (turn + 1) % size)


@pytest.mark.parametrize("batch", [2, 3, 7])
def test_batches_across_the_end_of_the_rings(host: Host, batch: int) -> None:
    queue = host.create_queue(1, 8)
    host.poke(queue.sq + 8 * 64, b"\xff" * 64 * 8)  # what lies behind the ring is no command
    for _ in range(8):
        entries = [host.entry(FLUSH, nsid=1) for _ in range(batch)]
        for entry in entries:
            queue.push(entry)
        queue.ring()
        done = queue.pop_all()
        assert [completion.cid for completion in done] == [struct.unpack_from("<H", entry, 2)[0] for entry in entries]
        assert {completion.status for completion in done} == {0}
        assert done[-1].sq_head == queue.tail


def test_a_phase_turns_by_one_store_after_the_rest(host: Host) -> None:
    """What the device does to the ring, in order: whole entries with the old phase, then each phase word by itself."""
    queue = host.create_queue(1, 4)
    ring = bytearray(64)
    stores: list[tuple[int, int]] = []
    write, store = host.device.port.write, host.device.port.store

    def see_write(iova: int, data: bytes, pasid: int | None = None) -> Fault | None:
        if queue.cq <= iova < queue.cq + 64:
            for at in range(iova - queue.cq, iova - queue.cq + len(data), 16):
                image = data[at - (iova - queue.cq) :][:16]
                assert image[14] & 1 == ring[at + 14] & 1  # phase as it was
                ring[at : at + 16] = image
        return write(iova, data, pasid)

    def see_store(iova: int, value: int, width: int, pasid: int | None = None) -> Fault | None:
        if queue.cq <= iova < queue.cq + 64:
            at = iova - queue.cq
            assert (at % 16, width) == (12, 4)
            assert value ^ struct.unpack_from("<I", ring, at)[0] == 1 << 16  # the phase bit and nothing else
            struct.pack_into("<I", ring, at, value)
            stores.append((at // 16, value >> 16 & 1))
        return store(iova, value, width, pasid)

    host.device.port.write, host.device.port.store = see_write, see_store  # type: ignore[method-assign, assignment]
    for _ in range(5):
        for _ in range(3):
            queue.push(host.entry(FLUSH, nsid=1))
        queue.ring()
        assert len(queue.pop_all()) == 3
    assert stores == [(index % 4, 1 - index // 4 % 2) for index in range(15)]
    assert bytes(ring) == host.peek(queue.cq, 64)


def test_one_interrupt_for_a_batch(host: Host) -> None:
    queue = host.create_queue(1, 32, vector=3)
    quiet = host.create_queue(2, 32)
    for _ in range(20):
        queue.push(host.entry(FLUSH, nsid=1))
        quiet.push(host.entry(FLUSH, nsid=1))
    host.interrupts.clear()
    bar = host.controller.bar_write
    bar(0, 0x1000 + 8, 4, 5)  # several doorbells are at hand before the transport has drained
    bar(0, 0x1000 + 16, 4, 20)
    bar(0, 0x1000 + 8, 4, 20)
    assert host.interrupts == []
    assert queue.pop() is None
    host.controller.drained()
    assert host.interrupts == [3]
    assert len(queue.pop_all()) == len(quiet.pop_all()) == 20
    host.controller.drained()
    assert host.interrupts == [3]


def test_two_submission_queues_share_a_completion_queue(host: Host) -> None:
    queue = host.create_queue(1, 8)
    second = Queue(host, 2, 8, cq=queue.cq)
    assert host.submit_admin(CREATE_SQ, prp1=second.sq, cdw10=7 << 16 | 2, cdw11=1 << 16 | 1).status == 0
    for each in (queue, second):
        for _ in range(5):
            each.push(host.entry(FLUSH, nsid=1))
    queue.ring()
    second.ring()  # ten commands, seven entries
    found = [completion.sq_id for completion in queue.pop_all()]
    assert len(found) == 7
    found += [completion.sq_id for completion in queue.pop_all()]
    assert sorted(found) == [1] * 5 + [2] * 5
    assert host.get(CSTS) == READY


@pytest.mark.parametrize("shadow", [False, True])
def test_a_full_completion_queue_holds_back(host: Host, shadow: bool) -> None:
    if shadow:
        host.set_shadow()
    completions = Queue(host, 1, 4)
    assert host.submit_admin(CREATE_CQ, prp1=completions.cq, cdw10=3 << 16 | 1, cdw11=1).status == 0
    queue = Queue(host, 1, 32, cq=completions.cq)
    assert host.submit_admin(CREATE_SQ, prp1=queue.sq, cdw10=31 << 16 | 1, cdw11=1 << 16 | 1).status == 0
    cids = []
    for _ in range(20):
        entry = host.entry(FLUSH, nsid=1)
        cids.append(struct.unpack_from("<H", entry, 2)[0])
        queue.push(entry)
    queue.ring()
    seen = []
    for _ in range(20):
        batch = []
        while (done := completions.pop(release=False)) is not None:
            batch.append(done.cid)
        assert 0 < len(batch) <= 3
        seen += batch
        completions.release()
        if len(seen) == 20:
            break
    assert seen == cids
    assert completions.pop() is None


# Queue memory that goes away


def test_submission_queue_taken_away_is_fatal(host: Host) -> None:
    queue = host.create_queue(1, 8)
    host.unmap(queue.sq)
    queue.push(host.entry(FLUSH, nsid=1))
    queue.ring()
    assert host.get(CSTS) == READY | FATAL
    assert f"{queue.sq:#x}" in host.controller.last_failure
    host.admin.push(host.entry(IDENTIFY, prp1=host.allocate(), cdw10=1))
    host.admin.ring()
    assert host.admin.pop() is None
    host.doorbell(2, 5)
    host.map(queue.sq)
    host.put(CC, 0)
    assert host.get(CSTS) == 0
    host.enable()
    host.identify(1)
    assert host.log(0x01, 64) == bytes(64)  # rings of a controller that gave up are no errors of their own


@pytest.mark.parametrize("access", [Access(0), Access.READ])
def test_completion_queue_that_cannot_be_written_is_fatal(host: Host, access: Access) -> None:
    queue = host.create_queue(1, 8)
    host.unmap(queue.cq)
    if access:
        host.map(queue.cq, access)
    queue.push(host.entry(FLUSH, nsid=1))
    queue.ring()
    assert host.get(CSTS) == READY | FATAL
    assert host.controller.failed


def test_queues_in_odd_places(host: Host) -> None:
    """An admin queue at the end of the address space, a queue upon itself: nothing but fatal status or garbage in."""
    host.put(CC, 0)
    for base in (0xFFFF_FFFF_FFFF_F000, 0, 1 << 63):
        host.put(AQA, 0x0FFF_0FFF)
        host.put(ASQ, base, 8)
        host.put(ACQ, base, 8)
        host.put(CC, ENABLE)
        host.doorbell(0, 100)
        assert host.get(CSTS) == READY | FATAL
        host.put(CC, 0)
    both = host.allocate(4)
    host.put(AQA, 31 << 16 | 31)
    host.put(ASQ, both, 8)
    host.put(ACQ, both, 8)
    host.put(CC, ENABLE)
    host.doorbell(0, 20)
    assert host.get(CSTS) == READY
    host.put(CC, 0)
    host.enable()
    host.identify(1)


def test_failures_are_reported_a_bounded_number_of_times(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        host.put(CC, 0)
        host.put(ASQ, 0, 8)
        host.put(CC, ENABLE)
        host.doorbell(0, 1)
        assert host.get(CSTS) == READY | FATAL
    assert host.controller.counters.failures == 50
    assert len(caplog.records) == 16


# Shares of the loop


def test_queues_take_turns(host: Host) -> None:
    """Burst 2^0: one command a turn, so the completion order shows the turns."""
    assert host.submit_admin(SET_FEATURES, cdw10=0x01, cdw11=0).status == 0
    queue = host.create_queue(1, 8)
    second = Queue(host, 2, 8, cq=queue.cq)
    assert host.submit_admin(CREATE_SQ, prp1=second.sq, cdw10=7 << 16 | 2, cdw11=1 << 16 | 1).status == 0
    for each in (queue, second):
        for _ in range(3):
            each.push(host.entry(FLUSH, nsid=1))
    host.controller.bar_write(0, 0x1000 + 8, 4, 3)
    host.controller.bar_write(0, 0x1000 + 16, 4, 3)
    host.controller.drained()
    assert [completion.sq_id for completion in queue.pop_all()] == [1, 2, 1, 2, 1, 2]


async def test_a_long_batch_leaves_the_loop_to_others(host: Host) -> None:
    queues = [host.create_queue(qid, 1024, vector=qid) for qid in (1, 2)]
    buffer = host.allocate()
    for queue in queues:
        for _ in range(1000):
            queue.push(host.entry(READ, nsid=1, prp1=buffer, cdw12=7))
        host.controller.bar_write(0, 0x1000 + 8 * queue.qid, 4, queue.tail)
    host.controller.drained()
    turns = 0
    done = [len(queue.pop_all()) for queue in queues]
    assert min(done) > 0 and sum(done) < 1000  # both were served, and neither to its end
    while sum(done) < 2000:
        await asyncio.sleep(0)
        turns += 1
        assert turns < 1000
        done = [count + len(queue.pop_all()) for count, queue in zip(done, queues, strict=True)]
    assert turns >= 2
    assert done == [1000, 1000]


async def test_a_run_goes_on_where_the_last_one_stopped(host: Host) -> None:
    """Eight queues with more work than one run does: none waits until the others are empty."""
    assert host.submit_admin(SET_FEATURES, cdw10=0x01, cdw11=7).status == 0  # no limit of a burst
    queues = [host.create_queue(qid, 512) for qid in range(1, 9)]
    for queue in queues:
        for _ in range(500):
            queue.push(host.entry(FLUSH, nsid=1))
        host.controller.bar_write(0, 0x1000 + 8 * queue.qid, 4, queue.tail)
    host.controller.drained()
    await asyncio.sleep(0)
    done = [len(queue.pop_all(release=False)) for queue in queues]
    assert min(done) > 0
    assert max(done) < 500


async def test_an_error_in_work_put_off_reaches_the_transport(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = host.create_queue(1, 1024)
    for _ in range(1000):
        queue.push(host.entry(FLUSH, nsid=1))
    queue.ring()
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
    with monkeypatch.context() as patch:
        patch.setattr(host.device.port, "read", None)  # a bug of ours
        await asyncio.sleep(0)
    assert len(told) == 1
    with pytest.raises(TypeError):
        host.controller.drained()


async def test_a_deleted_queue_is_served_no_more(host: Host) -> None:
    queue = host.create_queue(1, 1024)
    for _ in range(1000):
        queue.push(host.entry(FLUSH, nsid=1))
    queue.ring()
    assert host.submit_admin(DELETE_SQ, cdw10=1).status == 0
    served = host.controller.counters.io[FLUSH]
    assert 0 < served < 1000
    for _ in range(20):
        await asyncio.sleep(0)
    assert host.controller.counters.io[FLUSH] == served
    assert host.submit_admin(DELETE_CQ, cdw10=1).status == 0


async def test_a_reset_ends_what_was_put_off(host: Host) -> None:
    queue = host.create_queue(1, 1024)
    for _ in range(1000):
        queue.push(host.entry(FLUSH, nsid=1))
    queue.ring()
    host.put(CC, 0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert sum(host.controller.counters.io.values()) < 1000
    host.enable()
    host.identify(1)


def test_large_transfers_count_for_more(host: Host) -> None:
    queue = host.create_queue(1, 8)
    pages = host.allocate(1)
    entries = host.allocate(1)
    host.poke(entries, struct.pack("<256Q", *[pages] * 256))
    before = host.controller.transfers.effort
    done = host.submit_io(queue, READ, 0, 2048, prp1=pages, prp2=entries)
    assert done.status == 0
    assert host.controller.transfers.effort - before >= 16  # 1 MiB in units of 64 KiB
    assert host.submit_io(queue, WRITE, 0, 1, prp1=pages).status == 0
    assert PAGE == 4096
