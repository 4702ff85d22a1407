"""Queues of the DMA engine: rings, order, commands, interrupts, and guests that do not mean well."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from dma_driver import Host, Ring
from dma_header import VDMA
from guest_ram import PAGE
from paged_host import IOVA_BASE, MIB

from backend.core import Access, Fault

SUCCESS, ABORTED, NONE = (VDMA["STATUS_" + name] for name in ("SUCCESS", "ABORTED", "NONE"))
DISABLED, RUNNING, DRAINING, ERROR = (VDMA["STATE_" + name] for name in ("DISABLED", "RUNNING", "DRAINING", "ERROR"))
FENCE, INTERRUPT = VDMA["FLAG_FENCE"], VDMA["FLAG_INTERRUPT"]
GIB = 1 << 30


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def started(host: Host, number: int = 0, order: int = 6) -> Ring:
    ring = Ring(host, number, order)
    ring.start()
    return ring


def endless(ring: Ring, count: int) -> list[int]:
    """Jobs that would run for minutes; where their records will be. They need `wide`."""
    return [ring.push("CRC32", source=0, length=4 * GIB) for _ in range(count)]


@pytest.fixture
def wide(host: Host) -> Host:
    """IOVA [0, 4 GiB) and beyond leads to the same two MiB again and again."""
    for gpa in range(0, 4 * GIB + 2 * MIB, 2 * MIB):
        host.context.map_dma(host.space, gpa, host.ram.hva + 4 * MIB, 2 * MIB)
    return host


# The ring


@pytest.mark.parametrize("order", [0, 1, 6, 7, 12])
def test_a_ring_can_be_full_and_goes_round(host: Host, order: int) -> None:
    ring = started(host, order=order)
    count = min(1 << order, 100)
    for _ in range(3):
        records = [ring.push("FILL", target=ring.base, length=0) for _ in range(count)]
        ring.doorbell()
        assert [host.record(where).status for where in records] == [SUCCESS] * count
        assert [host.record(where).tag for where in records] == list(range(ring._tag - count + 1, ring._tag + 1))
    assert ring.get("HEAD") == ring.get("COMPLETED") == ring.get("TAIL") == 3 * count
    page = VDMA["DOORBELL_BASE"]
    assert [host.get(page + VDMA["DB_" + name]) for name in ("TAIL", "HEAD", "COMPLETED")] == [3 * count] * 3
    assert host.get(page + VDMA["DB_STATUS"]) == RUNNING


@pytest.mark.parametrize("tail", [65, 64 + 1, 0xFFFF_FFFF, 1 << 31])
def test_a_tail_that_jumps_is_an_error_of_its_queue(host: Host, tail: int) -> None:
    ring, other = started(host), started(host, 1)
    ring.doorbell(tail)
    assert (ring.state, ring.error) == (ERROR, VDMA["ERROR_DOORBELL"])
    assert host.interrupts == [0]
    assert ring.get("HEAD") == 0
    assert other.do("NOP").status == SUCCESS


def test_a_tail_never_goes_back(host: Host) -> None:
    ring = started(host)
    ring.do("NOP")
    ring.do("NOP")
    ring.doorbell(1)
    assert (ring.state, ring.error) == (ERROR, VDMA["ERROR_DOORBELL"])


def test_a_ring_outside_memory(host: Host) -> None:
    ring = Ring(host, 4, 6, base=IOVA_BASE - PAGE)
    ring.start()
    ring.doorbell(1)
    assert (ring.state, ring.error) == (ERROR, VDMA["ERROR_RING"])
    assert ring.get("ERROR_ADDRESS", 8) == IOVA_BASE - PAGE
    assert host.interrupts == [4]
    ring.set("COMMAND", VDMA["COMMAND_ABORT"])
    assert (ring.state, ring.error, ring.get("ERROR_ADDRESS", 8)) == (DISABLED, 0, 0)


def test_a_ring_whose_second_page_is_gone(host: Host) -> None:
    ring = started(host, order=7)
    host.unmap(ring.base + PAGE)
    records = [ring.push("NOP") for _ in range(65)]
    ring.doorbell()
    assert [host.record(where).status for where in records[:64]] == [SUCCESS] * 64
    assert (ring.error, ring.get("ERROR_ADDRESS", 8)) == (VDMA["ERROR_RING"], ring.base + PAGE)
    assert ring.get("COMPLETED") == 64


def test_a_descriptor_counts_as_it_was_when_it_was_fetched(host: Host) -> None:
    """The first job of the ring overwrites all that come behind it, itself as well."""
    ring = started(host)
    records = [ring.push("FILL", target=ring.base, length=64 * 64, value=(1 << 64) - 1)]
    records += [ring.push("FILL", target=ring.base, length=8) for _ in range(7)]
    ring.doorbell()
    assert [host.record(where).status for where in records] == [SUCCESS] * 8


def test_doorbells_of_a_queue_that_does_not_run_do_nothing(host: Host) -> None:
    ring = Ring(host, 0, 6)
    ring.push("NOP")
    ring.doorbell()
    assert (ring.state, ring.get("TAIL")) == (DISABLED, 0)
    ring.start()
    assert ring.get("HEAD") == 0


# Records


@pytest.mark.parametrize("offset", [1, 8, 16, 31])
def test_a_record_at_an_odd_place_is_an_error_of_its_queue(host: Host, offset: int) -> None:
    ring = started(host)
    buffer = host.allocate()
    good = ring.push("NOP")
    ring.push("FILL", target=buffer, length=8, value=1, record=host.new_record() + offset)
    after = ring.push("NOP")
    ring.doorbell()
    assert (ring.state, ring.error) == (ERROR, VDMA["ERROR_COMPLETION"])
    assert ring.get("ERROR_ADDRESS", 8) % 32 == offset
    assert host.peek(buffer, 8) == bytes(8)  # refused before anything was done
    assert [host.record(where).status for where in (good, after)] == [SUCCESS, ABORTED]
    assert ring.get("COMPLETED") == 3


@pytest.mark.parametrize("way", ["gone", "read-only"])
def test_a_record_that_cannot_be_written(host: Host, way: str) -> None:
    ring, other = started(host), started(host, 1)
    page, buffer = host.allocate(), host.allocate()
    host.unmap(page)
    if way == "read-only":
        host.map(page, Access.READ)
    ring.push("FILL", target=buffer, length=8, value=7, record=page + 64)
    ring.doorbell()
    assert (ring.state, ring.error, ring.get("ERROR_ADDRESS", 8)) == (ERROR, VDMA["ERROR_COMPLETION"], page + 64 + 8)
    assert host.peek(buffer, 8) == struct.pack("<Q", 7)
    assert host.interrupts == [0]
    assert other.do("NOP").status == SUCCESS


def test_a_job_may_go_without_a_record(host: Host) -> None:
    ring = started(host)
    buffer = host.allocate()
    ring.put(
        struct.pack("<BBHI7Q", VDMA["OP_FILL"], 0, 0, 1, 1, buffer, 0, 8, 5, 0, 0)
    )  # a record's address is ignored
    ring.doorbell()
    assert ring.get("COMPLETED") == 1
    assert host.peek(buffer, 8) == struct.pack("<Q", 5)


def test_the_status_is_stored_last(host: Host) -> None:
    """All else of a record is there before, with a status of 0; then 8 bytes at once, released."""
    ring = started(host)
    port = host.device.port
    seen: list[bytes] = []
    store = port.store

    def watched(iova: int, value: int, width: int, pasid: int | None = None) -> Fault | None:
        seen.append(host.peek(iova, 32))
        assert width == 8
        fault = store(iova, value, width, pasid)
        seen.append(host.peek(iova, 32))
        return fault

    port.store = watched  # type: ignore[method-assign]
    buffer = host.allocate()
    host.poke(buffer, struct.pack("<Q", 99))
    ring.do("SWAP", target=buffer, length=8, value=1)
    before, after = seen
    assert before[:8] == bytes(8)
    assert before[8:] == after[8:] == struct.pack("<3Q", 8, 99, 0)
    assert after[0] == SUCCESS


# Order


def test_a_small_job_overtakes_a_large_one_but_for_a_fence(wide: Host) -> None:
    async def main() -> None:
        ring = started(wide)
        large = ring.push("CRC32", source=0, length=64 * MIB)
        small = ring.push("NOP")
        fenced = ring.push("NOP", flags=FENCE)
        behind = ring.push("NOP")
        ring.doorbell()
        assert wide.record(small).status == SUCCESS
        assert [wide.record(each).status for each in (large, fenced, behind)] == [NONE] * 3
        assert ring.get("HEAD") == 4
        while wide.record(large).status == NONE:
            assert [wide.record(each).status for each in (fenced, behind)] == [NONE] * 2
            await asyncio.sleep(0)
        while ring.get("COMPLETED") != 4:
            await asyncio.sleep(0)
        assert [wide.record(each).status for each in (large, fenced, behind)] == [SUCCESS] * 3

    asyncio.run(main())


def test_jobs_chained_by_fences_see_what_came_before(host: Host) -> None:
    ring = started(host)
    buffers = [host.allocate() for _ in range(40)]
    host.poke(buffers[0], b"handed on")
    records = [
        ring.push("COPY", flags=FENCE, source=source, target=target, length=9) for source, target in pairwise(buffers)
    ]
    ring.doorbell()
    assert {host.record(where).status for where in records} == {SUCCESS}
    assert host.peek(buffers[-1], 9) == b"handed on"


# Others have their turn


def test_endless_jobs_of_every_queue_hold_up_neither_the_loop_nor_each_other(wide: Host) -> None:
    """16 jobs of 4 GiB in each of eight queues: the loop goes round between bounded runs, and a small job of any queue
    ends while they last."""

    async def main() -> None:
        rings = [started(wide, number) for number in range(8)]
        large = [where for ring in rings for where in endless(ring, 8)]
        for ring in rings:
            ring.doorbell()
        for ring in rings:
            small = ring.push("NOP")
            ring.doorbell()
            turns = 0
            while wide.record(small).status == NONE:
                turns += 1
                await asyncio.sleep(0)
            assert turns < 40
        assert {wide.record(where).status for where in large} == {NONE}
        for ring in rings:
            ring.set("COMMAND", VDMA["COMMAND_ABORT"])
            assert ring.state == DISABLED
        bytes_done = wide.reg("BYTES", 8)
        assert [wide.record(where).status for where in large] == [ABORTED] * len(large)
        shares = [sum(wide.record(where).done for where in large[at : at + 8]) for at in range(0, len(large), 8)]
        assert sum(shares) == bytes_done
        assert 0 < max(shares) <= 2 * min(shares)
        await asyncio.sleep(0.01)
        assert wide.reg("BYTES", 8) == bytes_done

    asyncio.run(main())


def test_a_flood_of_doorbells_and_of_the_smallest_jobs(host: Host) -> None:
    async def main() -> None:
        ring, other = started(host, order=12), started(host, 1)
        image = struct.pack("<BBHI7Q", VDMA["OP_NOP"], 0, INTERRUPT, 0, *(0,) * 7)
        for _ in range(4096):
            ring.put(image)
        for tail in range(1, 4097):
            ring.doorbell(tail)
        small = other.push("NOP")
        other.doorbell()
        while host.record(small).status == NONE:
            await asyncio.sleep(0)
        while ring.get("COMPLETED") != 4096:
            await asyncio.sleep(0)
        assert 1 <= len(host.interrupts) <= 4096

    asyncio.run(main())


# Interrupts


def test_interrupts_where_they_are_asked_for(host: Host) -> None:
    ring = Ring(host, 0, 6)
    ring.start(vector=5)
    ring.do("NOP")
    assert host.interrupts == []
    ring.do("NOP", flags=INTERRUPT)
    assert host.interrupts == [5]


def test_many_jobs_of_a_batch_share_one_interrupt(host: Host) -> None:
    rings = [started(host, 0), started(host, 1)]
    for ring in rings:
        for _ in range(20):
            ring.push("NOP", flags=INTERRUPT)
        at = VDMA["DOORBELL_BASE"] + ring.number * VDMA["DOORBELL_STRIDE"]
        host.function.bar_write(0, at, 4, ring.tail)
    host.function.drained()
    assert host.interrupts == [0, 1]


def test_an_interrupt_follows_its_record(host: Host) -> None:
    ring = started(host)
    seen: list[int] = []
    where = ring.push("NOP", flags=INTERRUPT)

    def interrupted(vector: int) -> bool:
        seen.append(host.record(where).status)
        return True

    host.function.connect_interrupts(interrupted)
    ring.doorbell()
    assert seen == [SUCCESS]


def test_every_vector_again_and_again(host: Host) -> None:
    """No storm: one interrupt for a vector at each pause, and masked ones are only kept."""
    host.function.config.write(host.capability(0x11) + 2, 2, 0xC000)
    for number in range(8):
        ring = started(host, number)
        for _ in range(50):
            ring.do("NOP", flags=INTERRUPT)
    assert host.interrupts == []
    host.function.config.write(host.capability(0x11) + 2, 2, 0x8000)
    assert sorted(host.interrupts) == list(range(8))


# Commands


def test_drain_lets_what_was_fetched_end(wide: Host) -> None:
    async def main() -> None:
        ring = started(wide)
        records = [ring.push("CRC32", source=0, length=32 * MIB) for _ in range(20)]
        ring.doorbell()
        ring.set("COMMAND", VDMA["COMMAND_DRAIN"])
        assert ring.state == DRAINING
        fetched = ring.get("HEAD")
        ring.doorbell(30)
        assert ring.get("TAIL") == 20
        while ring.state != DISABLED:
            await asyncio.sleep(0)
        assert ring.get("HEAD") == ring.get("COMPLETED") == fetched < 20
        assert [wide.record(where).status for where in records] == [SUCCESS] * fetched + [NONE] * (20 - fetched)
        wide.function.drained()
        assert wide.interrupts == [0]

    asyncio.run(main())


def test_drain_of_an_idle_queue_is_over_at_once(host: Host) -> None:
    ring = started(host)
    ring.set("COMMAND", VDMA["COMMAND_DRAIN"])
    assert ring.state == DISABLED
    assert host.interrupts == [0]


def test_after_abort_no_request_follows(wide: Host) -> None:
    async def main() -> None:
        ring = started(wide)
        records = endless(ring, 10)
        ring.doorbell()
        await asyncio.sleep(0)
        ring.set("COMMAND", VDMA["COMMAND_ABORT"])
        requests = wide.device.port.counters.requests
        assert ring.state == DISABLED
        assert [wide.record(where).status for where in records] == [ABORTED] * 10
        for _ in range(5):
            await asyncio.sleep(0)
            wide.function.drained()
        assert wide.device.port.counters.requests == requests

    asyncio.run(main())


def test_commands_that_do_not_fit_the_state_do_nothing(host: Host) -> None:
    ring = Ring(host, 0, 6)
    for command in (0, VDMA["COMMAND_DRAIN"], VDMA["COMMAND_ABORT"], 4, 0xFFFF_FFFF):
        ring.set("COMMAND", command)
        assert ring.state == DISABLED
    ring.start()
    ring.do("NOP")
    ring.set("COMMAND", VDMA["COMMAND_START"])
    assert (ring.state, ring.get("HEAD")) == (RUNNING, 1)


def test_a_queue_starts_again_from_nothing(host: Host) -> None:
    ring = started(host)
    ring.do("NOP")
    ring.set("COMMAND", VDMA["COMMAND_ABORT"])
    ring.start()
    assert ring.get("HEAD") == ring.get("COMPLETED") == ring.get("TAIL") == 0
    assert ring.do("NOP").status == SUCCESS


# Privilege


def test_a_process_s_ring_cannot_name_the_kernel_s_addresses(host: Host) -> None:
    """CONTROL without UNTAGGED: operands and records without PASID are refused, before anything is touched."""
    ring = Ring(host, 0, 6)
    ring.start(VDMA["CONTROL_PASID"], pasid=1)
    buffer = host.allocate()
    ring.put(struct.pack("<BBHI7Q", VDMA["OP_FILL"], 0, 0, 1, 0, buffer, 0, 8, 5, 0, 0))
    ring.doorbell()
    assert (ring.state, ring.get("COMPLETED"), host.peek(buffer, 8)) == (RUNNING, 1, bytes(8))
    ring.push("NOP")
    ring.doorbell()
    assert (ring.state, ring.error) == (ERROR, VDMA["ERROR_COMPLETION"])
