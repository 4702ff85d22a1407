"""The DMA engine in the addresses of processes: PASIDs, and pages that must be asked for."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from random import Random

import pytest
from dma_driver import PRI_ALLOCATION, PRI_CONTROL, PRI_STATUS, Record, Ring
from dma_header import VDMA
from dma_process import ACCESSED, DIRTY, PASID, PRESENT, PRI, USER, WRITABLE, Kernel, Process
from guest_ram import PAGE
from paged_host import MIB

from backend.core import Access
from backend.ioasid import Code

SUCCESS, INVALID, FAULT, ABORTED, NONE = (
    VDMA["STATUS_" + name] for name in ("SUCCESS", "INVALID", "FAULT", "ABORTED", "NONE")
)
DISABLED, RUNNING, ERROR = (VDMA["STATE_" + name] for name in ("DISABLED", "RUNNING", "ERROR"))
READ, WRITE, TAGGED = (VDMA["ACCESS_" + name] for name in ("READ", "WRITE", "PASID"))
SOURCE, TARGET, RECORD = (VDMA["FLAG_" + name + "_PASID"] for name in ("SOURCE", "TARGET", "COMPLETION"))
BOTH = SOURCE | TARGET


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


@pytest.fixture
def process(kernel: Kernel) -> Process:
    return kernel.process(1)


@pytest.fixture
def ring(kernel: Kernel, process: Process) -> Ring:
    return kernel.ring(0, process.pasid)


def noise(size: int) -> bytes:
    return Random(size).randbytes(size)


def run(kernel: Kernel, ring: Ring, operation: str, **fields: int) -> Record:
    """One job, with its page requests served."""
    where = ring.push(operation, **fields)
    ring.doorbell()
    kernel.serve()
    record = kernel.record(where)
    assert record.status != NONE
    return record


def asked(kernel: Kernel) -> list[int]:
    """Pages of each group."""
    return [len(group) for group in kernel.groups]


# Memory that is there


def test_resident_memory_of_a_process(kernel: Kernel, process: Process, ring: Ring) -> None:
    source, target = process.mmap(64, populate=True), process.mmap(64, populate=True)
    data = noise(60 * PAGE)
    process.poke(source + 5, data)
    record = run(kernel, ring, "COPY", flags=BOTH, source=source + 5, target=target + 9, length=len(data))
    assert (record.status, record.done) == (SUCCESS, len(data))
    assert process.peek(target + 9, len(data)) == data
    assert kernel.groups == []
    assert kernel.reg("FEATURES") == 7


def test_eight_processes_at_the_same_addresses(kernel: Kernel) -> None:
    processes = [kernel.process(pasid) for pasid in range(1, 9)]
    places = {(each.mmap(4), each.mmap(4)) for each in processes}
    ((source, target),) = places
    rings = [kernel.ring(number, each.pasid) for number, each in enumerate(processes)]
    for process in processes:
        process.poke(source, bytes([process.pasid]) * 4 * PAGE)
    for ring in rings:
        ring.push("COPY", flags=BOTH, source=source, target=target, length=4 * PAGE)
        ring.doorbell()
    kernel.serve()
    for process in processes:
        assert process.peek(target, 4 * PAGE) == bytes([process.pasid]) * 4 * PAGE


def test_between_a_process_and_the_kernel(kernel: Kernel, process: Process, ring: Ring) -> None:
    """The PASID is a matter of each operand; the same number is another place without it."""
    buffer, area = kernel.allocate(2), process.mmap(2)
    kernel.poke(buffer, b"from the kernel")
    assert run(kernel, ring, "COPY", flags=TARGET, source=buffer, target=area + 3, length=15).status == SUCCESS
    assert process.peek(area + 3, 15) == b"from the kernel"
    process.poke(area, b"from a process!")
    assert run(kernel, ring, "COPY", flags=SOURCE, source=area, target=buffer, length=15).status == SUCCESS
    assert kernel.peek(buffer, 15) == b"from a process!"
    record = run(kernel, ring, "CRC32", source=area, length=8)
    assert (record.status, record.reason, record.access) == (FAULT, VDMA["REASON_NOT_PRESENT"], READ)


def test_equal_numbers_in_two_address_spaces_do_not_overlap(kernel: Kernel, process: Process, ring: Ring) -> None:
    """Source and target of a copy, one page apart by number: each byte is read before, whatever the numbers say."""
    buffer = kernel.allocate(4)
    data = noise(3 * PAGE)
    for number in range(3):
        process.set(buffer + number * PAGE, kernel.page() | PRESENT | WRITABLE | USER)
    process.poke(buffer, data)
    fields = {"source": buffer, "target": buffer + PAGE, "length": len(data)}
    record = run(kernel, ring, "COPY", flags=SOURCE, **fields)
    assert (record.status, record.done) == (SUCCESS, len(data))
    assert kernel.peek(buffer, 4 * PAGE) == bytes(PAGE) + data
    process.unmap(buffer + 2 * PAGE)
    kernel.poke(buffer, bytes(4 * PAGE))
    record = run(kernel, ring, "COPY", flags=SOURCE, **fields)
    assert (record.status, record.done, record.fault_address) == (FAULT, 2 * PAGE, buffer + 2 * PAGE)
    assert kernel.peek(buffer, 4 * PAGE) == bytes(PAGE) + data[: 2 * PAGE] + bytes(PAGE)


def test_what_a_device_reads_is_accessed_and_what_it_writes_is_dirty(
    kernel: Kernel, process: Process, ring: Ring
) -> None:
    source, target = process.mmap(1, populate=True), process.mmap(1, populate=True)
    assert run(kernel, ring, "COPY", flags=BOTH, source=source, target=target, length=8).status == SUCCESS
    assert process.entry(source) & (ACCESSED | DIRTY) == ACCESSED
    assert process.entry(target) & (ACCESSED | DIRTY) == ACCESSED | DIRTY


def test_a_page_of_the_kernel_s_is_out_of_reach(kernel: Kernel, process: Process, ring: Ring) -> None:
    """U/S clear: requests of a process have no privilege."""
    area = process.mmap(1, populate=True)
    process.set(area, process.entry(area) & ~USER)
    process.forget(area)
    process._areas.clear()
    record = run(kernel, ring, "CRC32", flags=SOURCE, source=area, length=8)
    assert (record.status, record.fault_address) == (FAULT, area)


# Pages that are asked for


def test_untouched_source_and_target(kernel: Kernel, process: Process, ring: Ring) -> None:
    """1 MiB of either: every page is faulted in once, in a few groups; read for the source, written for the target."""
    source, target = process.mmap(256), process.mmap(256)
    process.poke(source + 100 * PAGE, b"present already")
    record = run(kernel, ring, "COPY", flags=BOTH, source=source, target=target, length=MIB)
    assert (record.status, record.done) == (SUCCESS, MIB)
    assert process.peek(target, MIB) == process.peek(source, MIB)
    pages = {source + number * PAGE: Access.READ for number in range(256) if number != 100}
    pages |= {target + number * PAGE: Access.WRITE for number in range(256)}
    assert len(process.faults) == len(pages) + 1
    assert dict(process.faults[1:]) == pages
    assert len(kernel.groups) <= 4
    assert kernel.reg("PAGE_REQUESTS", 8) == len(pages) == sum(asked(kernel))
    assert kernel.reg("PAGE_GROUPS", 8) == kernel.reg("PAGE_ANSWERS", 8) == len(kernel.groups)


@pytest.mark.parametrize("operation", ["FILL", "COMPARE", "CRC32", "FETCH_ADD", "SWAP", "CAS"])
def test_each_operation_waits_for_its_pages(kernel: Kernel, process: Process, ring: Ring, operation: str) -> None:
    area, other = process.mmap(3), process.mmap(3)
    length = 16 if operation == "CAS" else 8 if operation in {"SWAP", "FETCH_ADD"} else 2 * PAGE + 8
    record = run(kernel, ring, operation, flags=BOTH, source=other, target=area, length=length, value=77)
    assert (record.status, record.done) == (SUCCESS, length)
    assert process.faults
    if operation == "FILL":
        assert process.peek(area, length) == struct.pack("<Q", 77) * (length // 8)
    if operation in {"SWAP", "FETCH_ADD"}:
        assert process.peek(area, 8) == struct.pack("<Q", 77)
        assert process.faults == [(area, Access.READ | Access.WRITE)]


def test_a_write_protected_page_is_asked_for_writing(kernel: Kernel, process: Process, ring: Ring) -> None:
    """Copy on write after a fork: present, not writable."""
    area = process.mmap(4, populate=True)
    for number in range(4):
        process.set(area + number * PAGE, process.entry(area + number * PAGE) & ~WRITABLE)
    process.forget(area, 4)
    record = run(kernel, ring, "FILL", flags=TARGET, target=area, length=4 * PAGE, value=3)
    assert record.status == SUCCESS
    assert process.faults == [(area + number * PAGE, Access.WRITE) for number in range(4)]
    assert process.peek(area, 8) == struct.pack("<Q", 3)


def test_records_and_rings_in_a_process(kernel: Kernel, process: Process) -> None:
    """A queue that a process owns but for its settings: ring and records are in the PASID, and not there yet."""
    ring = Ring(kernel, 3, 7, base=process.mmap(2))
    records = process.mmap(1)
    kernel.poke_ring = process.poke  # type: ignore[method-assign]
    target = process.mmap(1)
    for number in range(70):
        ring.push("FETCH_ADD", flags=TARGET | RECORD, target=target, length=8, value=1, record=records + 32 * number)
    ring.start(VDMA["CONTROL_PASID"] | VDMA["CONTROL_RING_PASID"], pasid=process.pasid)
    ring.tail = 70
    process.unmap(ring.base)  # swapped out, as it were; what was in it is lost, and reads as NOPs
    ring.doorbell()
    kernel.serve()
    assert (ring.state, ring.get("COMPLETED")) == (RUNNING, 70)
    assert process.peek(target, 8) == struct.pack("<Q", 6)
    heads = [process.peek(records + 32 * number, 1)[0] for number in range(70)]
    assert heads == [0] * 64 + [SUCCESS] * 6
    assert (ring.base, Access.READ) in process.faults
    assert (records, Access.WRITE) in process.faults


def test_others_run_while_a_job_waits(kernel: Kernel, process: Process, ring: Ring) -> None:
    """In the same queue, and in another one: only what is behind a fence waits, too."""
    area, here = process.mmap(1), process.mmap(1, populate=True)
    other = kernel.ring(1, process.pasid)
    waits = ring.push("CRC32", flags=SOURCE, source=area, length=8)
    ring.doorbell()
    groups = kernel.requests()
    assert ring.get("WAITING") == 1
    passes = ring.push("FILL", flags=TARGET, target=here, length=8, value=1)
    fenced = ring.push("NOP", flags=VDMA["FLAG_FENCE"])
    ring.doorbell()
    assert other.do("FILL", flags=TARGET, target=here + 8, length=8).status == SUCCESS
    assert [kernel.record(each).status for each in (waits, passes, fenced)] == [NONE, SUCCESS, NONE]
    assert process.fault(area, Access.READ)
    kernel.answer(groups[0], Code.SUCCESS)
    assert [kernel.record(each).status for each in (waits, passes, fenced)] == [SUCCESS] * 3
    assert ring.get("WAITING") == 0


def test_the_answer_wakes_the_job_by_the_loop(kernel: Kernel, process: Process, ring: Ring) -> None:
    async def main() -> None:
        area = process.mmap(1)
        where = ring.push("CRC32", flags=SOURCE, source=area, length=8)
        ring.doorbell()
        kernel.serve()
        assert kernel.record(where).status == NONE  # not from within the answer: the front end is at work there
        await asyncio.sleep(0)
        assert kernel.record(where).status == SUCCESS

    asyncio.run(main())


def test_answers_to_several_groups_wake_a_job_once(kernel: Kernel, process: Process, ring: Ring) -> None:
    async def main() -> None:
        source, target = process.mmap(1), process.mmap(1)
        where = ring.push("COPY", flags=BOTH, source=source, target=target, length=8)
        ring.doorbell()
        assert kernel.serve() == 2  # the source's and the target's, before the loop goes round
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert kernel.record(where).status == SUCCESS
        assert ring.get("COMPLETED") == 1
        kernel.function.drained()  # what the loop's callbacks raised is raised here

    asyncio.run(main())


def test_the_source_is_translated_again_after_the_target_was_waited_for(
    kernel: Kernel, process: Process, ring: Ring
) -> None:
    """The page that was read through before moves while the target is faulted in."""
    source, target = process.mmap(1), process.mmap(1)
    process.poke(source, b"old" + bytes(5))

    def moved(iova: int) -> None:
        if iova == target:
            new = kernel.page()
            kernel.ram.poke(new, b"new")
            process.set(source, new | PRESENT | WRITABLE | USER)
            process.forget(source)

    process.on_fault = moved
    assert run(kernel, ring, "COPY", flags=BOTH, source=source, target=target, length=8).status == SUCCESS
    assert process.peek(target, 3) == b"new"


def test_a_page_that_is_taken_back_once_is_asked_for_again(kernel: Kernel, process: Process, ring: Ring) -> None:
    source, target = process.mmap(1), process.mmap(1)
    taken: list[int] = []

    def moved(iova: int) -> None:
        if iova == target and not taken:
            taken.append(source)
            process.unmap(source)

    process.on_fault = moved
    assert run(kernel, ring, "COPY", flags=BOTH, source=source, target=target, length=8).status == SUCCESS
    assert taken


def test_what_is_unmapped_is_not_reached_any_more(kernel: Kernel, process: Process, ring: Ring) -> None:
    area = process.mmap(2, populate=True)
    run(kernel, ring, "FILL", flags=TARGET, target=area, length=2 * PAGE, value=1)
    gone = process.entry(area + PAGE) & ~0xFFF & (1 << 52) - 1
    process._areas = [(area, area + PAGE, True)]
    process.unmap(area + PAGE)
    record = run(kernel, ring, "FILL", flags=TARGET, target=area, length=2 * PAGE, value=2)
    assert (record.status, record.done, record.fault_address) == (FAULT, PAGE, area + PAGE)
    assert kernel.ram.peek(gone, 8) == struct.pack("<Q", 1)


# Answers that are not success


@pytest.mark.parametrize("pages", [1, 2, 5, 100, 255])
@pytest.mark.parametrize("operation", ["FILL", "CRC32"])
def test_beyond_the_end_of_an_area_the_address_is_precise(
    kernel: Kernel, process: Process, ring: Ring, operation: str, pages: int
) -> None:
    """The group that reaches beyond is refused as a whole; the job finds out which page it was."""
    area = process.mmap(pages)
    record = run(kernel, ring, operation, flags=BOTH, source=area + 1, target=area + 1, length=MIB)
    assert (record.status, record.reason) == (FAULT, VDMA["REASON_PRI_INVALID"])
    assert (record.done, record.fault_address) == (pages * PAGE - 1, area + pages * PAGE)
    assert record.access == (WRITE if operation == "FILL" else READ) | TAGGED
    assert asked(kernel)[-1] == 1
    assert len(kernel.groups) <= 12


def test_an_address_where_nothing_is(kernel: Kernel, process: Process, ring: Ring) -> None:
    record = run(kernel, ring, "FILL", flags=TARGET, target=0x1234_5678, length=8)
    assert (record.reason, record.fault_address, record.done) == (VDMA["REASON_PRI_INVALID"], 0x1234_5678, 0)
    assert asked(kernel) == [1, 1]


def test_a_page_alone_is_asked_for_twice_before_it_is_given_up(kernel: Kernel, process: Process, ring: Ring) -> None:
    """Linux answers a group by what it still keeps of an older one of that index as well."""
    area = process.mmap(1)
    where = ring.push("FILL", flags=TARGET, target=area, length=8, value=3)
    ring.doorbell()
    (first,) = kernel.requests()
    kernel.answer(first, Code.INVALID)
    assert kernel.record(where).status == NONE
    (second,) = kernel.requests()
    assert second[0].group != first[0].group
    assert process.fault(area, second[0].access)
    kernel.answer(second, Code.SUCCESS)
    assert kernel.record(where).status == SUCCESS


def test_an_area_that_may_only_be_read(kernel: Kernel, process: Process, ring: Ring) -> None:
    area = process.mmap(2, writable=False)
    assert run(kernel, ring, "CRC32", flags=SOURCE, source=area, length=2 * PAGE).status == SUCCESS
    record = run(kernel, ring, "FILL", flags=TARGET, target=area, length=2 * PAGE)
    assert (record.status, record.reason) == (FAULT, VDMA["REASON_PRI_INVALID"])
    assert (record.fault_address, record.access) == (area, WRITE | TAGGED)


def test_failure_ends_page_requests_until_they_are_enabled_again(kernel: Kernel, process: Process, ring: Ring) -> None:
    """Response failure (PCIe 5.0, 10.4.2): what waits fails, what comes behind is not asked for."""
    area = process.mmap(2)
    other = kernel.ring(1, process.pasid)
    first = ring.push("FILL", flags=TARGET, target=area, length=8)
    ring.doorbell()
    second = other.push("FILL", flags=TARGET, target=area + PAGE, length=8)
    other.doorbell()
    kernel.answer(kernel.requests()[0], Code.FAILURE)
    for where in (first, second):
        assert (kernel.record(where).status, kernel.record(where).reason) == (FAULT, VDMA["REASON_PRI_FAILURE"])
    assert kernel.reg("FEATURES") == 3
    base = kernel.extended(PRI)
    assert kernel.function.config.read(base + PRI_STATUS, 2) & 1
    record = run(kernel, ring, "FILL", flags=TARGET, target=area, length=8)
    assert (record.reason, record.fault_address) == (VDMA["REASON_NOT_PRESENT"], area)
    kernel.function.config.write(base + PRI_CONTROL, 2, 0)
    kernel.function.config.write(base + PRI_CONTROL, 2, 1)
    assert run(kernel, ring, "FILL", flags=TARGET, target=area, length=8).status == SUCCESS


def test_success_for_ever_and_never_a_page(kernel: Kernel, process: Process, ring: Ring) -> None:
    area = process.mmap(4)
    where = ring.push("FILL", flags=TARGET, target=area, length=4 * PAGE)
    ring.doorbell()
    rounds = 0
    while groups := kernel.requests():
        rounds += 1
        assert rounds < 50
        for group in groups:
            kernel.answer(group, Code.SUCCESS)
    record = kernel.record(where)
    assert (record.status, record.reason, record.fault_address) == (FAULT, VDMA["REASON_UNRESOLVED"], area)
    assert rounds > 2


@pytest.mark.parametrize("off", ["PRI", "ATS", "flag", "allocation"])
def test_where_pages_cannot_be_asked_for_it_is_an_error_at_once(
    kernel: Kernel, process: Process, ring: Ring, off: str
) -> None:
    area = process.mmap(2)
    process.poke(area, b"here")
    flags = TARGET
    if off == "PRI":
        kernel.function.config.write(kernel.extended(PRI) + PRI_CONTROL, 2, 0)
    elif off == "ATS":
        kernel.set_ats(False)
    elif off == "allocation":
        kernel.function.config.write(kernel.extended(PRI) + PRI_ALLOCATION, 4, 0)
    else:
        flags |= VDMA["FLAG_NO_PAGE_REQUESTS"]
    record = ring.do("FILL", flags=flags, target=area, length=2 * PAGE)
    reason = "PRI_FAILURE" if off == "allocation" else "NOT_PRESENT"
    assert (record.status, record.reason) == (FAULT, VDMA["REASON_" + reason])
    assert (record.done, record.fault_address) == (PAGE, area + PAGE)
    assert kernel.reg("PAGE_GROUPS", 8) == 0


def test_pasids_that_are_not_enabled(kernel: Kernel, process: Process, ring: Ring) -> None:
    area = process.mmap(1, populate=True)
    kernel.function.config.write(kernel.extended(PASID) + 6, 2, 0)
    record = ring.do("FILL", flags=TARGET, target=area, length=8)
    assert (record.status, record.reason) == (FAULT, VDMA["REASON_PASID_OFF"])
    assert ring.do("NOP").status == SUCCESS


def test_a_record_in_a_process_that_cannot_be_written(kernel: Kernel, process: Process, ring: Ring) -> None:
    area = process.mmap(1)
    ring.push("FILL", flags=TARGET | RECORD, target=area, length=8, value=1, record=0x5000)
    ring.doorbell()
    assert ring.state == RUNNING
    kernel.serve()
    assert (ring.state, ring.error) == (ERROR, VDMA["ERROR_COMPLETION"])
    assert ring.get("ERROR_ADDRESS", 8) == 0x5008


def test_a_ring_in_a_process_that_is_not_there(kernel: Kernel, process: Process) -> None:
    ring = Ring(kernel, 0, 6, base=0x5000)
    ring.start(VDMA["CONTROL_PASID"] | VDMA["CONTROL_RING_PASID"], pasid=process.pasid)
    ring.doorbell(1)
    assert ring.state == RUNNING
    kernel.serve()
    assert (ring.state, ring.error, ring.get("ERROR_ADDRESS", 8)) == (ERROR, VDMA["ERROR_RING"], 0x5000)


# Credits


@pytest.mark.parametrize("allocation", [1, 2, 7, 32])
def test_no_more_is_outstanding_than_was_granted(allocation: int) -> None:
    kernel = Kernel(allocation=allocation)
    processes = [kernel.process(pasid) for pasid in range(1, 9)]
    rings = [kernel.ring(number, each.pasid) for number, each in enumerate(processes)]
    targets = [each.mmap(40) for each in processes]
    records = []
    for ring, target in zip(rings, targets, strict=True):
        for part in range(4):
            fields = {"target": target + part * 10 * PAGE, "length": 10 * PAGE, "value": ring.number + 1}
            records.append(ring.push("FILL", flags=TARGET, **fields))
        ring.doorbell()
    waiting = kernel.requests()
    while waiting:
        assert sum(len(group) for group in waiting) <= allocation
        group = waiting.pop(0)
        assert group[0].pasid is not None
        assert all(kernel.processes[group[0].pasid].fault(each.iova, each.access) for each in group)
        kernel.answer(group, Code.SUCCESS)
        waiting += kernel.requests()
    assert {kernel.record(where).status for where in records} == {SUCCESS}
    for process, target in zip(processes, targets, strict=True):
        assert process.peek(target, 40 * PAGE) == struct.pack("<Q", process.pasid) * (40 * PAGE // 8)
    kernel.close()


def test_a_process_whose_pages_never_come_starves_nobody() -> None:
    """Its pager does not answer. It has all credits but one for each other queue that runs."""
    kernel = Kernel(allocation=32)
    slow, fast = kernel.process(1), kernel.process(2)
    rings = [kernel.ring(0, 1), kernel.ring(1, 2), kernel.ring(2, 2)]
    area = slow.mmap(512)
    for part in range(16):
        rings[0].push("FILL", flags=TARGET, target=area + part * 32 * PAGE, length=32 * PAGE)
    rings[0].doorbell()
    unanswered = kernel.requests()
    assert sum(len(group) for group in unanswered) == 30
    target = fast.mmap(20)
    for ring in rings[1:]:
        assert run(kernel, ring, "FILL", flags=TARGET, target=target, length=20 * PAGE, value=9).status == SUCCESS
    assert fast.peek(target, 20 * PAGE) == struct.pack("<Q", 9) * (20 * PAGE // 8)
    assert rings[0].get("COMPLETED") == 0
    kernel.close()


def test_a_fill_goes_on_in_step_behind_each_page() -> None:
    """Pages end in the middle of the pattern, and few are asked for at a time."""
    kernel = Kernel(allocation=4)
    process = kernel.process(1)
    target, length, value = process.mmap(41) + 3, 40 * PAGE, 0x0807_0605_0403_0201
    record = run(kernel, kernel.ring(0, 1), "FILL", flags=TARGET, target=target, length=length, value=value)
    assert (record.status, record.done) == (SUCCESS, length)
    assert process.peek(target, length) == struct.pack("<Q", value) * (length // 8)
    kernel.close()


# Ends


def test_abort_in_the_middle_of_a_wait(kernel: Kernel, process: Process, ring: Ring) -> None:
    """The slot is another process's at once. The late answer belongs to nobody."""
    area = process.mmap(2)
    where = ring.push("FILL", flags=TARGET, target=area, length=2 * PAGE, value=1)
    ring.doorbell()
    groups = kernel.requests()
    ring.set("COMMAND", VDMA["COMMAND_ABORT"])
    assert ring.state == DISABLED
    assert kernel.record(where).status == ABORTED
    process.exit()
    again = kernel.process(1)  # the same PASID
    assert again.mmap(2) == area
    ring.start(VDMA["CONTROL_UNTAGGED"] | VDMA["CONTROL_PASID"], pasid=1)
    where = ring.push("FILL", flags=TARGET, target=area, length=2 * PAGE, value=2)
    ring.doorbell()
    new = kernel.requests()
    assert {group[0].group for group in groups}.isdisjoint(group[0].group for group in new)
    kernel.answer(groups[0], Code.INVALID)
    assert kernel.record(where).status == NONE
    for group in new:
        assert all(again.fault(each.iova, each.access) for each in group)
        kernel.answer(group, Code.SUCCESS)
    kernel.serve()
    assert kernel.record(where).status == SUCCESS
    assert again.peek(area, 8) == struct.pack("<Q", 2)


def test_what_a_stopped_queue_has_asked_is_told_until_it_is_answered(
    kernel: Kernel, process: Process, ring: Ring
) -> None:
    """A driver must not give a PASID back while its kernel works on that process's page requests."""
    assert ring.get("UNANSWERED") == 0
    ring.push("FILL", flags=TARGET, target=process.mmap(5), length=5 * PAGE)
    ring.doorbell()
    groups = kernel.requests()
    assert ring.get("UNANSWERED") == sum(len(group) for group in groups) == 5
    ring.set("COMMAND", VDMA["COMMAND_ABORT"])
    assert (ring.state, ring.get("WAITING"), ring.get("UNANSWERED")) == (DISABLED, 0, 5)
    for group in groups:
        kernel.answer(group, Code.INVALID)
    assert ring.get("UNANSWERED") == 0


def test_a_process_that_exits_in_the_middle_of_its_job(kernel: Kernel, process: Process, ring: Ring) -> None:
    area = process.mmap(2)
    where = ring.push("FILL", flags=TARGET, target=area, length=2 * PAGE)
    ring.doorbell()
    process.exit()
    kernel.serve()
    record = kernel.record(where)
    assert (record.status, record.reason, record.fault_address) == (FAULT, VDMA["REASON_PRI_INVALID"], area)
    assert ring.state == RUNNING


def test_drain_waits_for_pages(kernel: Kernel, process: Process, ring: Ring) -> None:
    area = process.mmap(1)
    where = ring.push("FILL", flags=TARGET, target=area, length=8)
    ring.doorbell()
    ring.set("COMMAND", VDMA["COMMAND_DRAIN"])
    assert ring.state == VDMA["STATE_DRAINING"]
    kernel.serve()
    assert (ring.state, kernel.record(where).status) == (DISABLED, SUCCESS)


@pytest.mark.parametrize("how", ["register", "flr"])
def test_reset_in_the_middle_of_a_wait(kernel: Kernel, process: Process, ring: Ring, how: str) -> None:
    where = ring.push("FILL", flags=TARGET, target=process.mmap(1), length=8)
    ring.doorbell()
    groups = kernel.requests()
    if how == "register":
        kernel.put(VDMA["REG_RESET"], VDMA["RESET"])
    else:
        kernel.function.config.write(kernel.capability(0x10) + 8, 2, 0x8000)
    kernel.answer(groups[0], Code.SUCCESS)
    assert (ring.state, kernel.record(where).status) == (DISABLED, NONE)
    assert kernel.reg("JOBS", 8) == kernel.reg("PAGE_GROUPS", 8) == kernel.reg("PAGE_ANSWERS", 8) == 0
    assert kernel.interrupts == []


def test_a_pasid_that_nobody_is_bound_to(kernel: Kernel) -> None:
    ring = kernel.ring(0, 7)
    record = run(kernel, ring, "FILL", flags=TARGET, target=0x1000, length=8)
    assert (record.status, record.reason) == (FAULT, VDMA["REASON_PRI_INVALID"])
