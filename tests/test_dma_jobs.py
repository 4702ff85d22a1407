"""What the DMA engine's operations do to memory, on addresses without PASID."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from dma_driver import Host, Ring
from dma_header import VDMA
from guest_ram import PAGE
from paged_host import IOVA_BASE, MIB

from backend.core import Access

SUCCESS, DIFFERENT, INVALID, FAULT = (VDMA["STATUS_" + name] for name in ("SUCCESS", "DIFFERENT", "INVALID", "FAULT"))
READ, WRITE = VDMA["ACCESS_READ"], VDMA["ACCESS_WRITE"]
MASK64 = (1 << 64) - 1


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def ring(host: Host) -> Ring:
    ring = Ring(host, 0, 6)
    ring.start()
    return ring


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def crc32(data: bytes, crc: int = 0) -> int:
    """IEEE 802.3, bit by bit: the polynomial 0x04C11DB7 with its bits reversed."""
    crc ^= 0xFFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB8_8320 if crc & 1 else 0)
    return crc ^ 0xFFFF_FFFF


def test_nop_does_nothing_and_says_so(ring: Ring) -> None:
    record = ring.do("NOP", target=MASK64, source=MASK64, length=MASK64)
    assert (record.status, record.reason, record.done, record.result, record.last) == (SUCCESS, 0, 0, 0, 0)


@pytest.mark.parametrize("length", [1, 7, 4096, 5000, 256 * 1024, 256 * 1024 + 1, MIB])
@pytest.mark.parametrize("offsets", [(0, 0), (1, 4095)])
def test_copy(host: Host, ring: Ring, length: int, offsets: tuple[int, int]) -> None:
    source, target = (host.allocate(length // PAGE + 3) + offset for offset in offsets)
    data = noise(length)
    host.poke(source, data)
    host.poke(target - 1, b"\xaa" * (length + 2))
    record = ring.do("COPY", source=source, target=target, length=length)
    assert (record.status, record.done) == (SUCCESS, length)
    assert host.peek(target - 1, length + 2) == b"\xaa" + data + b"\xaa"
    assert host.peek(source, length) == data


def test_copy_onto_a_place_before_it_that_overlaps(host: Host, ring: Ring) -> None:
    length = MIB
    target = host.allocate(length // PAGE + 1)
    data = noise(length)
    for distance in (0, 1, 4096):
        host.poke(target + distance, data)
        assert ring.do("COPY", source=target + distance, target=target, length=length).status == SUCCESS
        assert host.peek(target, length) == data


def test_copy_onto_a_place_behind_it_that_overlaps_is_refused(host: Host, ring: Ring) -> None:
    source = host.allocate(2)
    data = noise(PAGE)
    host.poke(source, data)
    record = ring.do("COPY", source=source, target=source + PAGE - 1, length=PAGE)
    assert (record.status, record.reason, record.done) == (INVALID, VDMA["REASON_OVERLAP"], 0)
    assert host.peek(source, PAGE) == data
    assert ring.do("COPY", source=source, target=source + PAGE, length=PAGE).status == SUCCESS


@pytest.mark.parametrize("length", [1, 8, 4099, 256 * 1024 + 12])
def test_fill(host: Host, ring: Ring, length: int) -> None:
    target = host.allocate(length // PAGE + 2) + 3
    value = 0x0123_4567_89AB_CDEF
    record = ring.do("FILL", target=target, length=length, value=value)
    assert (record.status, record.done) == (SUCCESS, length)
    expected = (struct.pack("<Q", value) * (length // 8 + 1))[:length]
    assert host.peek(target - 3, length + 4) == bytes(3) + expected + bytes(1)


@pytest.mark.parametrize("length", [1, 4096, 300_000, MIB])
@pytest.mark.parametrize("place", ["first", "last", "none", "slice"])
def test_compare(host: Host, ring: Ring, length: int, place: str) -> None:
    source, target = (host.allocate(length // PAGE + 1) for _ in range(2))
    data = bytearray(noise(length))
    host.poke(source, bytes(data))
    where = {"first": 0, "last": length - 1, "none": length, "slice": 262_144}[place]
    if where < length:
        data[where] ^= 1
    host.poke(target, bytes(data))
    record = ring.do("COMPARE", source=source, target=target, length=length)
    assert record.status == (DIFFERENT if where < length else SUCCESS)
    assert record.done == min(where, length)


def test_crc32_of_the_check_string(host: Host, ring: Ring) -> None:
    """The check value that every catalogue of CRCs gives for CRC-32."""
    source = host.allocate()
    host.poke(source, b"123456789")
    assert ring.do("CRC32", source=source, length=9).result == 0xCBF4_3926


def test_crc32_goes_on_from_a_result(host: Host, ring: Ring) -> None:
    source = host.allocate(80)
    data = noise(300_000)
    host.poke(source, data)
    whole = ring.do("CRC32", source=source, length=len(data))
    assert (whole.status, whole.done, whole.result) == (SUCCESS, len(data), crc32(data))
    first = ring.do("CRC32", source=source, length=1001).result
    assert ring.do("CRC32", source=source + 1001, length=len(data) - 1001, value=first).result == whole.result


@pytest.mark.parametrize("width", [4, 8])
def test_fetch_add_and_swap(host: Host, ring: Ring, width: int) -> None:
    target = host.allocate() + 8
    top = (1 << 8 * width) - 1
    host.poke(target, b"\xee" * 16)
    host.poke(target, top.to_bytes(width, "little"))
    record = ring.do("FETCH_ADD", target=target, length=width, value=3 | 1 << 60)
    assert (record.status, record.done, record.result) == (SUCCESS, width, top)
    added = (top + (3 | 1 << 60)) & top
    record = ring.do("SWAP", target=target, length=width, value=MASK64 - 1)
    assert (record.status, record.result) == (SUCCESS, added)
    assert host.peek(target, 16) == ((MASK64 - 1) & top).to_bytes(width, "little") + b"\xee" * (16 - width)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_compare_and_swap(host: Host, ring: Ring, width: int) -> None:
    target = host.allocate() + 16
    old, new = noise(width), noise(width + 1)[:width]
    host.poke(target, old + b"\xee" * 16)

    def swap(compare: bytes) -> tuple[int, bytes]:
        low, high = struct.unpack("<2Q", compare.ljust(16, b"\x55"))  # bytes beyond the width do not count
        value, value_high = struct.unpack("<2Q", new.ljust(16, b"\x55"))
        fields = {"source": low, "compare_high": high, "value": value, "value_high": value_high}
        record = ring.do("CAS", target=target, length=width, **fields)
        return record.status, struct.pack("<2Q", record.result, record.last)[:width]

    assert swap(bytes([old[0] ^ 1]) + old[1:]) == (SUCCESS, old)
    assert host.peek(target, width) == old
    assert swap(old[:-1] + bytes([old[-1] ^ 0x80])) == (SUCCESS, old)
    assert host.peek(target, width) == old
    assert swap(old) == (SUCCESS, old)
    assert host.peek(target, width + 16) == new + b"\xee" * 16


@pytest.mark.parametrize("operation", ["COPY", "FILL", "COMPARE", "CRC32"])
def test_nothing_of_nothing(ring: Ring, operation: str) -> None:
    """Length 0: no address is touched, so any will do."""
    record = ring.do(operation, source=MASK64, target=MASK64, value=0x1_2345_6789)
    assert (record.status, record.done) == (SUCCESS, 0)
    assert record.result == (0x2345_6789 if operation == "CRC32" else 0)


@pytest.mark.parametrize(
    ("operation", "fields", "reason"),
    [
        ("COPY", {"length": (4 << 30) + 1}, "LENGTH"),
        ("FILL", {"length": MASK64}, "LENGTH"),
        ("SWAP", {"length": 0}, "LENGTH"),
        ("SWAP", {"length": 2}, "LENGTH"),
        ("FETCH_ADD", {"length": 16}, "LENGTH"),
        ("CAS", {"length": 32}, "LENGTH"),
        ("CAS", {"length": 8, "target": IOVA_BASE + 4}, "ALIGNMENT"),
        ("CAS", {"length": 16, "target": IOVA_BASE + 8}, "ALIGNMENT"),
        ("FILL", {"length": 2, "target": MASK64}, "WRAP"),
        ("COPY", {"length": 4096, "source": MASK64 - 4094}, "WRAP"),
        ("COMPARE", {"length": 4 << 30, "target": MASK64 - 5}, "WRAP"),
        ("NOP", {"flags": 0x80}, "FLAGS"),
        ("NOP", {"flags": 0x8000}, "FLAGS"),
        ("COPY", {"length": 1, "flags": 0x10}, "FLAGS"),  # a PASID on a queue that has none
    ],
)
def test_a_wrong_descriptor_is_refused_and_nothing_is_touched(
    host: Host, ring: Ring, operation: str, fields: dict[str, int], reason: str
) -> None:
    before = host.device.port.counters
    ring.push(operation, **fields)
    where = ring.push(operation, **fields)
    ring.doorbell()
    record = host.record(where)
    assert (record.status, record.reason) == (INVALID, VDMA["REASON_" + reason])
    assert (record.done, record.result) == (0, 0)
    # two descriptors in one read, and two requests for each record
    assert host.device.port.counters.requests - before.requests == 5
    assert ring.state == VDMA["STATE_RUNNING"]


@pytest.mark.parametrize("opcode", [8, 0x80, 0xFF])
def test_an_unknown_opcode_is_refused(host: Host, ring: Ring, opcode: int) -> None:
    where = host.new_record()
    ring.put(struct.pack("<BBHI7Q", opcode, 0, VDMA["FLAG_COMPLETION"], 77, where, *(MASK64,) * 6))
    ring.put(struct.pack("<BBHI7Q", 0, 1, VDMA["FLAG_COMPLETION"], 78, where + 32, *(0,) * 6))
    ring.doorbell()
    assert host.record(where).reason == VDMA["REASON_OPCODE"]
    assert host.record(where + 32).reason == VDMA["REASON_FLAGS"]


# Faults


@pytest.mark.parametrize("operation", ["COPY", "FILL", "COMPARE", "CRC32"])
@pytest.mark.parametrize("page", [0, 1, 70, 255])
def test_a_hole_is_told_with_its_address_and_what_was_done(host: Host, ring: Ring, operation: str, page: int) -> None:
    """What precedes the hole has been done, also where a slice ended in between."""
    length = MIB
    source, target = (host.allocate(length // PAGE + 1) + 5 for _ in range(2))
    data = noise(length)
    host.poke(source, data)
    if operation == "COMPARE":
        host.poke(target, data)
    reads = operation == "CRC32"
    hole = (source if reads else target) - 5 + page * PAGE
    host.unmap(hole)
    record = ring.do(operation, source=source, target=target, length=length, value=0 if reads else 0x1122334455667788)
    done = max(0, page * PAGE - 5)
    access = READ if operation in {"COMPARE", "CRC32"} else WRITE
    assert (record.status, record.reason) == (FAULT, VDMA["REASON_NOT_PRESENT"])
    assert record.fault_address == max(hole, source if reads else target)
    assert (record.done, record.access) == (done, access)
    if operation == "COPY":
        assert host.peek(target, done) == data[:done]
        assert host.peek(hole + PAGE, PAGE) == bytes(PAGE)
    if operation == "FILL":
        assert host.peek(target, done) == (struct.pack("<Q", 0x1122334455667788) * (done // 8 + 1))[:done]
    if reads:
        assert record.result == crc32(data[:done])
    assert host.reg("FAULTS", 8) == 1
    assert host.reg("BYTES", 8) == done


def test_a_difference_before_a_hole_is_a_difference(host: Host, ring: Ring) -> None:
    source, target = host.allocate(2), host.allocate(2)
    host.poke(source + 9, b"x")
    host.unmap(source + PAGE)
    record = ring.do("COMPARE", source=source, target=target, length=2 * PAGE)
    assert (record.status, record.done) == (DIFFERENT, 9)
    host.poke(source + 9, b"\0")
    record = ring.do("COMPARE", source=source, target=target, length=2 * PAGE)
    assert (record.status, record.done, record.fault_address) == (FAULT, PAGE, source + PAGE)


@pytest.mark.parametrize("operation", ["COPY", "FILL", "SWAP", "FETCH_ADD", "CAS"])
def test_memory_that_may_only_be_read(host: Host, ring: Ring, operation: str) -> None:
    target = host.allocate()
    host.unmap(target)
    host.map(target, Access.READ)
    record = ring.do(operation, source=host.allocate(), target=target, length=8)
    assert (record.status, record.reason, record.fault_address) == (FAULT, VDMA["REASON_PERMISSION"], target)
    assert record.access & WRITE
    assert host.peek(target, 8) == bytes(8)


def test_a_fault_in_the_middle_of_a_fill_s_pattern(host: Host, ring: Ring) -> None:
    """A driver that goes on from `done` gives the pattern turned; the device itself goes on after a slice in step."""
    target = host.allocate(130) + 3
    assert ring.do("FILL", target=target, length=129 * PAGE, value=0x0807060504030201).status == SUCCESS
    expected = (bytes(range(1, 9)) * (129 * PAGE // 8))[: 129 * PAGE]
    assert host.peek(target, 129 * PAGE) == expected


def test_without_bus_mastering_nothing_moves(host: Host, ring: Ring) -> None:
    """Neither can the descriptor be read: the queue says so."""
    ring.push("NOP")
    host.set_bus_master(False)
    ring.doorbell()
    assert (ring.state, ring.error) == (VDMA["STATE_ERROR"], VDMA["ERROR_RING"])
    assert ring.get("ERROR_ADDRESS", 8) == ring.base
    assert host.device.port.counters.requests == 0
