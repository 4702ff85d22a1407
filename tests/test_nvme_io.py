"""I/O commands against a plain bytearray: NVM Express 1.4, 4.3 (PRPs) and 6."""

import hashlib
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_ram import PAGE, AmdTables, Ram
from hypothesis import given, settings
from hypothesis import strategies as st
from nvme_driver import (
    BROADCAST,
    COMPARE,
    CSTS,
    DATASET_MANAGEMENT,
    FLUSH,
    READ,
    READY,
    RID,
    SET_FEATURES,
    WRITE,
    WRITE_ZEROES,
    Completion,
    Host,
    Queue,
)
from paged_host import IOVA_BASE, MIB

from backend.core import Access, Fault, Reason
from backend.endpoints.nvme import Namespace, NvmeController, Transfer
from backend.ioasid import Engine, PgtableFormat

BAD_OPCODE, BAD_FIELD, TRANSFER_ERROR, BAD_NAMESPACE, BAD_PRP_OFFSET, OUT_OF_RANGE = 0x01, 0x02, 0x04, 0x0B, 0x13, 0x80
WRITE_FAULT, READ_ERROR, COMPARE_FAILURE = 0x280, 0x281, 0x285
DISK = 4 * MIB
BLOCKS = DISK // 512


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host(namespace=Namespace.in_memory(DISK))
    host.enable()
    yield host
    host.close()


class Buffer:
    """Pages of guest memory in any order, an offset into the first one, and the PRPs that describe them (4.3)."""

    def __init__(
        self, host: Host, pages: list[int], lists: list[int], *, length: int, offset: int = 0, slot: int = 0
    ) -> None:
        """`lists`: pages for PRP lists; `slot`: where in the first of them the list starts."""
        self.host, self.offset, self.length = host, offset, length
        count = (offset + length + PAGE - 1) // PAGE
        self.pages = pages[:count]
        assert len(self.pages) == count
        self.prp1 = self.pages[0] + offset
        self.prp2 = 0
        if count == 2:
            self.prp2 = self.pages[1]
        elif count > 2:
            self.prp2 = lists[0] + 8 * slot
            entries, at, table = self.pages[1:], slot, 0
            while entries:
                if at == 511 and len(entries) > 1:  # the last slot of a page leads to the next one
                    host.poke(lists[table] + 8 * at, struct.pack("<Q", lists[table + 1]))
                    at, table = 0, table + 1
                    continue
                host.poke(lists[table] + 8 * at, struct.pack("<Q", entries.pop(0)))
                at += 1

    def _parts(self) -> Iterator[tuple[int, int]]:
        left, start = self.length, self.offset
        for page in self.pages:
            size = min(left, PAGE - start)
            yield page + start, size
            left, start = left - size, 0

    def fill(self, data: bytes) -> None:
        assert len(data) == self.length
        for iova, size in self._parts():
            self.host.poke(iova, data[:size])
            data = data[size:]

    def content(self) -> bytes:
        return b"".join(self.host.peek(iova, size) for iova, size in self._parts())


def simple(host: Host, blocks: int) -> Buffer:
    pages = [host.allocate() for _ in range(blocks * 512 // PAGE + 2)]
    return Buffer(host, pages, [host.allocate()], length=blocks * 512)


def transfer(host: Host, queue: Queue, opcode: int, lba: int, buffer: Buffer) -> Completion:
    return host.submit_io(queue, opcode, lba, buffer.length // 512, prp1=buffer.prp1, prp2=buffer.prp2)


# Random commands against a model


operations = st.lists(
    st.tuples(
        st.sampled_from([READ, WRITE, COMPARE, WRITE_ZEROES, DATASET_MANAGEMENT]),
        st.integers(0, BLOCKS - 1),  # first block
        st.one_of(st.integers(1, 40), st.integers(1, 2048)),  # blocks
        st.integers(0, PAGE // 4 - 1).map(lambda dword: 4 * dword),  # offset in the first page
        st.one_of(st.integers(0, 511), st.integers(500, 511)),  # slot where the list starts
        st.integers(0, 2**32),  # seed of data and page order
        st.booleans(),  # pages in a row
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(operations)
def test_random_commands_match_a_bytearray(commands: list[tuple[int, int, int, int, int, int, bool]]) -> None:
    host = Host(namespace=Namespace.in_memory(DISK))
    try:
        host.enable()
        queue = host.create_queue(1, 16)
        pages = [host.allocate() for _ in range(260)]
        lists = [host.allocate() for _ in range(3)]
        model = bytearray(DISK)
        for opcode, lba, wanted, offset, slot, seed, in_a_row in commands:
            rng = random.Random(seed)
            count = min(wanted, BLOCKS - lba)
            start, length = 512 * lba, 512 * count
            order = pages if in_a_row else rng.sample(pages, len(pages))
            if opcode == DATASET_MANAGEMENT:
                ranges = Buffer(host, order, lists, length=16, offset=offset, slot=slot)
                ranges.fill(struct.pack("<IIQ", 0, count, lba))
                done = host.submit(queue, opcode, nsid=1, prp1=ranges.prp1, prp2=ranges.prp2, cdw10=0, cdw11=4)
                model[start : start + length] = bytes(length)
            elif opcode == WRITE_ZEROES:
                done = host.submit_io(queue, opcode, lba, count)
                model[start : start + length] = bytes(length)
            else:
                buffer = Buffer(host, order, lists, length=length, offset=offset, slot=slot)
                data = rng.randbytes(length) if opcode == WRITE or rng.random() < 0.5 else bytes(model[start:][:length])
                buffer.fill(data)
                done = transfer(host, queue, opcode, lba, buffer)
                if opcode == WRITE:
                    model[start : start + length] = data
                elif opcode == READ:
                    assert buffer.content() == model[start : start + length]
                elif data != model[start : start + length]:
                    assert done.status == COMPARE_FAILURE
                    continue
            assert done.status == 0
        assert host.namespace.digest() == hashlib.sha256(model).hexdigest()
    finally:
        host.close()


# PRP lists


@pytest.mark.parametrize("slot", [0, 1, 255, 256, 257, 510, 511])
@pytest.mark.parametrize("offset", [0, 4, 512, 4092])
def test_lists_that_end_at_every_place_of_a_page(host: Host, slot: int, offset: int) -> None:
    """With 1 MiB and an offset a list has 256 entries: from slot 256 on it chains, and at 255 it must not."""
    queue = host.create_queue(1, 8)
    pages = [host.allocate() for _ in range(258)]
    random.Random(slot).shuffle(pages)
    buffer = Buffer(host, pages, [host.allocate(), host.allocate()], length=MIB, offset=offset, slot=slot)
    data = os.urandom(MIB)
    buffer.fill(data)
    assert transfer(host, queue, WRITE, 0, buffer).status == 0
    assert host.namespace.read(0, MIB) == data
    buffer.fill(bytes(MIB))
    assert transfer(host, queue, READ, 0, buffer).status == 0
    assert buffer.content() == data


def test_nothing_beside_the_buffer_is_written(host: Host) -> None:
    queue = host.create_queue(1, 8)
    host.namespace.view[:] = b"\xaa" * DISK
    pages = [host.allocate() for _ in range(4)]
    buffer = Buffer(host, [pages[3], pages[1], pages[0]], [host.allocate()], length=5 * 512, offset=0x604, slot=9)
    before = host.ram.peek(0, host.ram.size)
    assert transfer(host, queue, READ, 0, buffer).status == 0
    after = host.ram.peek(0, host.ram.size)
    changed = {index for index in range(len(after)) if after[index] != before[index]}
    allowed = {iova - IOVA_BASE + index for iova, size in buffer._parts() for index in range(size)}
    for queue_memory in (queue.sq, queue.cq):
        allowed |= set(range(queue_memory - IOVA_BASE, queue_memory - IOVA_BASE + PAGE))
    assert changed <= allowed
    assert buffer.content() == b"\xaa" * 2560


@pytest.mark.parametrize(
    ("prp1", "prp2", "blocks"),
    [
        (2, 0, 1),  # not on a dword
        (1, 0, 1),
        (0, 512, 16),  # second page with an offset
        (8, 8, 8),
        (0, 4, 24),  # list not on a qword
        (0, 1, 24),
    ],
)
def test_misaligned_prps(host: Host, prp1: int, prp2: int, blocks: int) -> None:
    queue = host.create_queue(1, 8)
    first, second = host.allocate(), host.allocate()
    for opcode in (READ, WRITE, COMPARE):
        done = host.submit_io(queue, opcode, 0, blocks, prp1=first + prp1, prp2=second + prp2)
        assert (done.status, done.do_not_retry) == (BAD_PRP_OFFSET, True)
    assert host.namespace.digest() == hashlib.sha256(bytes(DISK)).hexdigest()


def test_misaligned_entries_and_chains(host: Host) -> None:
    queue = host.create_queue(1, 8)
    page, table = host.allocate(), host.allocate()
    host.poke(table, struct.pack("<3Q", page, page + 8, page))
    assert host.submit_io(queue, READ, 0, 32, prp1=page, prp2=table).status == BAD_PRP_OFFSET
    # only the link is misaligned: what it leads to would do as entries
    host.poke(table, struct.pack("<4Q", *[page] * 4))
    host.poke(table + 8 * 510, struct.pack("<2Q", page, table + 8))
    assert host.submit_io(queue, READ, 0, 32, prp1=page, prp2=table + 8 * 510).status == BAD_PRP_OFFSET


def test_a_list_that_leads_to_itself_ends(host: Host) -> None:
    """A chain's last slot names its own page: it is read once more as entries, and no further."""
    queue = host.create_queue(1, 8)
    page, table = host.allocate(), host.allocate()
    host.poke(table, struct.pack("<512Q", *[page] * 511, table))
    requests = host.device.port.counters.requests
    assert host.submit_io(queue, READ, 0, 2048, prp1=page, prp2=table + 8 * 511).status == 0
    # entries of the queue, two parts of the list, the data in one call, the completion in two
    assert host.device.port.counters.requests - requests == 6


def test_a_list_behind_an_unmapped_page(host: Host) -> None:
    queue = host.create_queue(1, 8)
    page, table, lost = host.allocate(), host.allocate(), host.allocate()
    host.unmap(lost)
    assert host.submit_io(queue, READ, 0, 32, prp1=page, prp2=lost).status == TRANSFER_ERROR
    host.poke(table + 8 * 511, struct.pack("<Q", lost))
    assert host.submit_io(queue, READ, 0, 32, prp1=page, prp2=table + 8 * 511).status == TRANSFER_ERROR
    assert host.get(CSTS) == READY


def test_adjacent_pages_are_one_part(host: Host) -> None:
    queue = host.create_queue(1, 8)
    base = host.allocate(256)
    pages = [base + PAGE * index for index in range(256)]
    buffer = Buffer(host, pages, [host.allocate()], length=MIB)
    host.controller.transfers.recent.clear()
    assert transfer(host, queue, READ, 0, buffer).status == 0
    assert list(host.controller.transfers.recent) == [Transfer(base, MIB, write=True)]
    requests = host.device.port.counters.requests
    assert transfer(host, queue, WRITE, 0, buffer).status == 0
    assert host.controller.transfers.recent[-1] == Transfer(base, MIB, write=False)
    assert host.device.port.counters.requests - requests == 5  # entry, list, data, completion in two


def test_largest_transfer(host: Host) -> None:
    queue = host.create_queue(1, 8)
    buffer = simple(host, 2048)
    assert transfer(host, queue, READ, 0, buffer).status == 0
    for opcode in (READ, WRITE, COMPARE):
        for blocks in (2049, 0x1000):
            done = host.submit_io(queue, opcode, 0, blocks, prp1=buffer.prp1, prp2=buffer.prp2)
            assert done.status == BAD_FIELD


def test_pages_of_64k() -> None:
    """CC.MPS 4: a PRP's page is 64 KiB, and so is the alignment of queues."""
    host = Host(namespace=Namespace.in_memory(DISK))
    big = 0x10000
    host.allocate((-host._next % big) // PAGE)
    sq, cq = host.allocate(16), host.allocate(16)
    host.admin = Queue(host, 0, 32, sq=sq, cq=cq)
    host.put(0x24, 31 << 16 | 31)
    host.put(0x28, sq, 8)
    host.put(0x30, cq, 8)
    host.put(0x14, 0x0046_0001 | 4 << 7)
    assert host.get(CSTS) == READY
    queue = Queue(host, 1, 8, sq=host.allocate(16), cq=host.allocate(16))
    assert host.submit_admin(0x05, prp1=queue.cq, cdw10=7 << 16 | 1, cdw11=1).status == 0
    assert host.submit_admin(0x01, prp1=queue.sq, cdw10=7 << 16 | 1, cdw11=1 << 16 | 1).status == 0
    data = os.urandom(3 * big)
    pages = [host.allocate(16) for _ in range(3)]
    table = host.allocate(16)
    host.poke(table, struct.pack("<2Q", pages[2], pages[1]))
    host.poke(pages[0], data[:big])
    host.poke(pages[2], data[big : 2 * big])
    host.poke(pages[1], data[2 * big :])
    assert host.submit_io(queue, WRITE, 0, 3 * big // 512, prp1=pages[0], prp2=table).status == 0
    assert host.namespace.read(0, 3 * big) == data
    assert host.submit_io(queue, READ, 0, 2 * big // 512, prp1=pages[0], prp2=pages[1] + PAGE).status == BAD_PRP_OFFSET
    host.close()


# Errors


@pytest.mark.parametrize("opcode", [READ, WRITE, COMPARE, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("lba", "blocks"), [(BLOCKS, 1), (BLOCKS - 1, 2), (BLOCKS - 7, 8), (2**64 - 1, 1), (2**64 - 8, 16), (2**32, 1)]
)
def test_blocks_that_are_not_there(host: Host, opcode: int, lba: int, blocks: int) -> None:
    queue = host.create_queue(1, 8)
    done = host.submit_io(queue, opcode, lba, blocks, prp1=host.allocate(), prp2=host.allocate())
    assert (done.status, done.do_not_retry) == (OUT_OF_RANGE, True)


def test_the_last_block(host: Host) -> None:
    queue = host.create_queue(1, 8)
    buffer = simple(host, 1)
    buffer.fill(b"\x5a" * 512)
    assert transfer(host, queue, WRITE, BLOCKS - 1, buffer).status == 0
    assert host.namespace.read(DISK - 1024, 1024) == bytes(512) + b"\x5a" * 512


@pytest.mark.parametrize("opcode", [FLUSH, READ, WRITE, COMPARE, WRITE_ZEROES, DATASET_MANAGEMENT])
def test_namespace_ids_and_flags(host: Host, opcode: int) -> None:
    queue = host.create_queue(1, 8)
    page = host.allocate()
    for nsid in (0, 2, BROADCAST - 1):
        assert host.submit_io(queue, opcode, 0, 1, nsid=nsid, prp1=page).status == BAD_NAMESPACE
    expected = 0 if opcode == FLUSH else BAD_NAMESPACE
    assert host.submit_io(queue, opcode, 0, 1, nsid=BROADCAST, prp1=page).status == expected
    for flags in (1, 2, 0x40, 0x80, 0xC0):
        assert host.submit_io(queue, opcode, 0, 1, flags=flags, prp1=page).status == BAD_FIELD


@pytest.mark.parametrize("opcode", [0x04, 0x0C, 0x0D, 0x7D, 0x80, 0xFF])
def test_unknown_opcodes(host: Host, opcode: int) -> None:
    assert host.submit(host.create_queue(1, 8), opcode, nsid=1).status == BAD_OPCODE


def test_a_fault_fails_its_command_alone(host: Host) -> None:
    queue = host.create_queue(1, 8)
    faults: list[Fault] = []
    host.engine.on_fault(faults.append)
    good, bad = host.allocate(), host.allocate()
    host.unmap(bad)
    for page in (good, bad, good):
        queue.push(host.entry(READ, nsid=1, prp1=page))
    queue.push(host.entry(WRITE, nsid=1, prp1=good, prp2=bad, cdw12=15))
    queue.push(host.entry(READ, nsid=1, prp1=good))
    queue.ring()
    assert [done.status for done in queue.pop_all()] == [0, TRANSFER_ERROR, 0, TRANSFER_ERROR, 0]
    assert [(fault.rid, fault.iova, fault.access) for fault in faults] == [
        (RID, bad, Access.WRITE),
        (RID, bad, Access.READ),
    ]
    assert host.controller.transfers.counters.faults == 2
    assert host.get(CSTS) == READY


def test_a_read_only_mapping_takes_no_data(host: Host) -> None:
    queue = host.create_queue(1, 8)
    page = host.allocate()
    host.unmap(page)
    host.map(page, Access.READ)
    host.poke(page, b"\x11" * PAGE)
    assert host.submit_io(queue, READ, 0, 8, prp1=page).status == TRANSFER_ERROR
    assert host.peek(page, PAGE) == b"\x11" * PAGE
    assert host.submit_io(queue, WRITE, 0, 8, prp1=page).status == 0
    assert host.namespace.read(0, PAGE) == b"\x11" * PAGE


# Single commands


def test_dataset_management(host: Host) -> None:
    queue = host.create_queue(1, 8)
    host.namespace.view[:] = b"\xff" * DISK
    page = host.allocate()
    ranges = [(0, 3, 1), (7, 0, 5), (0, 1, BLOCKS - 1), (0, 8, 100), (0, 8, 104)]
    host.poke(page + 64, b"".join(struct.pack("<IIQ", *each) for each in ranges))
    fields = {"nsid": 1, "prp1": page + 64, "cdw10": len(ranges) - 1}
    assert host.submit(queue, DATASET_MANAGEMENT, cdw11=3, **fields).status == 0  # hints alone
    assert host.namespace.digest() == hashlib.sha256(b"\xff" * DISK).hexdigest()
    assert host.submit(queue, DATASET_MANAGEMENT, cdw11=4, **fields).status == 0
    model = bytearray(b"\xff" * DISK)
    for _, count, first in ranges:
        model[512 * first : 512 * (first + count)] = bytes(512 * count)
    assert host.namespace.digest() == hashlib.sha256(model).hexdigest()
    host.poke(page + 64, struct.pack("<IIQ", 0, 1, 0) + struct.pack("<IIQ", 0, 2, BLOCKS - 1))
    assert host.submit(queue, DATASET_MANAGEMENT, cdw11=4, **fields | {"cdw10": 1}).status == OUT_OF_RANGE
    assert host.namespace.digest() == hashlib.sha256(model).hexdigest()  # none of it was done
    host.poke(page, struct.pack("<IIQ", 0, 1, 2**64 - 1) * 256)
    for prp1 in (page, page + 64):
        done = host.submit(queue, DATASET_MANAGEMENT, nsid=1, prp1=prp1, prp2=page, cdw10=255, cdw11=4)
        assert done.status == OUT_OF_RANGE


def test_flush_and_forced_unit_access_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(namespace=Namespace.open(tmp_path / "disk.img", size=DISK))
    host.enable()
    queue = host.create_queue(1, 8)
    buffer = simple(host, 1)
    synced = []
    sync = os.fdatasync

    def count(fd: int) -> None:
        synced.append(fd)
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", count)
    assert transfer(host, queue, WRITE, 0, buffer).status == 0
    assert len(synced) == 0
    assert host.submit_io(queue, FLUSH, 0, 1).status == 0
    assert len(synced) == 1
    assert host.submit_io(queue, WRITE, 0, 1, prp1=buffer.prp1, cdw12=1 << 30).status == 0
    assert len(synced) == 2
    assert host.submit_admin(SET_FEATURES, cdw10=0x06, cdw11=0).status == 0  # write cache off
    assert transfer(host, queue, WRITE, 0, buffer).status == 0
    assert host.submit_io(queue, WRITE_ZEROES, 0, 1).status == 0
    assert len(synced) == 4
    host.put(0x14, 0x0046_4001)  # shutdown
    assert len(synced) == 5
    host.close()


def test_a_file_truncated_under_the_controller(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    host = Host(namespace=Namespace.open(path, size=DISK))
    host.enable()
    queue = host.create_queue(1, 8)
    buffer = simple(host, 8)
    os.truncate(path, MIB)
    assert transfer(host, queue, READ, 0, buffer).status == 0
    gone = 2 * MIB // 512
    assert transfer(host, queue, READ, gone, buffer).status == READ_ERROR
    assert transfer(host, queue, COMPARE, gone, buffer).status == READ_ERROR
    assert transfer(host, queue, WRITE, gone, buffer).status == WRITE_FAULT
    assert host.submit_io(queue, WRITE_ZEROES, gone, 8).status == WRITE_FAULT
    assert int.from_bytes(host.log(0x02, 512)[160:176], "little") == 4  # media errors
    assert host.get(CSTS) == READY
    os.truncate(path, DISK)
    assert transfer(host, queue, READ, gone, buffer).status == 0
    host.close()


def test_blocks_of_4k() -> None:
    host = Host(namespace=Namespace.in_memory(DISK, block_size=4096))
    host.enable()
    queue = host.create_queue(1, 8)
    pages = [host.allocate() for _ in range(2)]
    data = os.urandom(8192)
    for page, part in zip(pages, (data[:4096], data[4096:]), strict=True):
        host.poke(page, part)
    assert host.submit_io(queue, WRITE, 5, 2, prp1=pages[0], prp2=pages[1]).status == 0
    assert host.namespace.read(5 * 4096, 8192) == data
    assert host.submit_io(queue, READ, DISK // 4096, 1, prp1=pages[0]).status == OUT_OF_RANGE
    assert host.submit_io(queue, READ, 0, 257, prp1=pages[0], prp2=pages[1]).status == BAD_FIELD
    host.close()


# The control path


def test_probes_answer_with_the_fault(host: Host) -> None:
    page = host.allocate()
    assert host.controller.probe_write(page, b"probe") is None
    assert host.peek(page, 5) == b"probe"
    assert host.controller.probe_read(page, 5) == b"probe"
    host.unmap(page)
    fault = host.controller.probe_write(page, b"again")
    assert isinstance(fault, Fault)
    assert (fault.rid, fault.iova, fault.access, fault.reason) == (RID, page, Access.WRITE, Reason.NOT_PRESENT)
    assert host.peek(page, 5) == b"probe"
    assert isinstance(host.controller.probe_read(page, 5), Fault)
    assert host.get(CSTS) == READY


def test_the_record_of_transfers_is_bounded(host: Host) -> None:
    queue = host.create_queue(1, 8)
    pages = host.allocate(2), host.allocate(2)
    table = host.allocate()
    host.poke(table, struct.pack("<256Q", *[pages[index & 1] for index in range(256)]))
    for _ in range(20):
        assert host.submit_io(queue, READ, 0, 2048, prp1=pages[1], prp2=table).status == 0
    recent = host.controller.transfers.recent
    assert len(recent) == recent.maxlen == 4096
    counters = host.controller.counters
    assert (counters.io[READ], host.controller.transfers.counters.read) == (20, 20 * MIB)


def test_behind_nested_tables() -> None:
    """IOVA -> guest's AMD v1 table -> stage 2: the controller sees IOVAs alone, and unmapping takes them away."""
    ram = Ram(256 * PAGE)
    engine = Engine()
    context = engine.open()
    stage2 = context.alloc()
    context.map_dma(stage2, 0, ram.hva, ram.size)
    child = context.create_nesting(stage2)
    tables = AmdTables(ram, 128 * PAGE)
    controller = NvmeController(Namespace.in_memory(MIB))
    controller.connect_dma(engine.add_device(RID, "nvme").port)
    controller.config.write(4, 2, 6)
    context.bind_device(RID)
    context.attach(RID, stage2)
    context.bind_pgtable(child, tables.root, PgtableFormat("amd-v1", levels=4))
    context.attach(RID, child)
    high = 0x00FF_FFFF_0000
    for index in range(4):  # admin queues, buffer: in reverse order in memory
        tables.map(high + index * PAGE, (32 - index) * PAGE)
    controller.bar_write(0, 0x24, 4, 7 << 16 | 7)
    controller.bar_write(0, 0x28, 8, high)
    controller.bar_write(0, 0x30, 8, high + PAGE)
    controller.bar_write(0, 0x14, 4, 0x0046_0001)
    dwords = [0x06 | 5 << 16, 0, 0, 0, 0, 0, (high + 3 * PAGE) & BROADCAST, (high + 3 * PAGE) >> 32, 0, 0, 1]
    ram.poke(32 * PAGE, struct.pack("<16I", *dwords, *[0] * 5))
    controller.bar_write(0, 0x1000, 4, 1)
    controller.drained()
    assert struct.unpack("<4I", ram.peek(31 * PAGE, 16)) == (0, 0, 1, 5 | 1 << 16)
    assert ram.peek(29 * PAGE + 24, 6) == b"vioasi"
    assert controller.admin_queue == high
    engine.close()
    ram.close()
    controller.namespace.close()
