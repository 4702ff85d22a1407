"""Addresses that are not translated: those that a device reserves, and those that an attachment leaves direct."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator

import pytest
from guest_ram import PAGE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ioasid_guest import DEV1, GOLDEN, Guest, gcr3_table, refused, x86_tables

from backend.core import RW, Access, BadValueError, Fault, KindError, LimitError, Reason, Translation, UnknownIdError
from backend.ioasid import DevicePort, PasidTableFormat, PgtableFormat, Traits, Untagged, Window

HOLE = Window(0x10000, 0x12000, "a hole")
DIRECT = 0x20000
"""Two pages."""
RAM_PAGES = 1024


@pytest.fixture
def guest() -> Iterator[Guest]:
    """1: the guest's memory. 2: a child whose x86 table maps [0x8000, 0x30000) to the page 0x3000, over and over."""
    guest = Guest(Traits(reserved=(HOLE,)), pages=RAM_PAGES)
    ctx = guest.ctx
    assert (ctx.alloc(), ctx.create_nesting(1)) == (1, 2)
    ctx.map_dma(1, 0, GOLDEN, 0x10000)  # nothing is to be mapped where the device has its hole
    ctx.map_dma(1, 0x12000, GOLDEN + 0x12000, guest.ram.size - 0x12000)
    mappings = dict.fromkeys(range(32768, 196608, PAGE), 12288)
    ctx.bind_pgtable(2, x86_tables(guest.ram, 0x30000, mappings), PgtableFormat("x86", 4))
    ctx.attach(DEV1, 1)
    ctx.attach(DEV1, 2, direct_iova=DIRECT, direct_size=2 * PAGE)
    for page in range(0x30):
        guest.ram.poke(page * PAGE, struct.pack("<Q", page) * (PAGE // 8))
    yield guest
    guest.close()


OPERATIONS: dict[str, Callable[[DevicePort, int], object]] = {
    "read": lambda port, iova: port.read(iova, 8),
    "read_into": lambda port, iova: port.read_into(iova, bytearray(8)),
    "write": lambda port, iova: port.write(iova, bytes(8)),
    "scatter": lambda port, iova: port.scatter([(iova, 8)], bytes(8), write=True),
    "store": lambda port, iova: port.store(iova, 1, 8),
    "load": lambda port, iova: port.load(iova, 8),
    "fill": lambda port, iova: port.fill(iova, 8),
    "copy from": lambda port, iova: port.copy(iova, 0x9000, 8),
    "copy to": lambda port, iova: port.copy(0x9000, iova, 8),
    "fetch_add": lambda port, iova: port.fetch_add(iova, 1, 8),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("iova", [HOLE.start, HOLE.end - 8])
def test_what_is_reserved_is_not_reached(guest: Guest, operation: str, iova: int) -> None:
    told: list[Fault] = []
    guest.engine.on_fault(told.append)
    fault = OPERATIONS[operation](guest.dev1.port, iova)
    assert isinstance(fault, Fault)
    assert (fault.reason, fault.stage, fault.level, fault.gpa, fault.iova) == (Reason.RESERVED_RANGE, 0, 0, None, iova)
    assert told == [fault]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("iova", [HOLE.start - 8, HOLE.end, DIRECT, DIRECT + 2 * PAGE])
def test_what_lies_beside_it_is(guest: Guest, operation: str, iova: int) -> None:
    assert not isinstance(OPERATIONS[operation](guest.dev1.port, iova), Fault)


def test_a_transfer_ends_where_the_reserved_addresses_begin(guest: Guest) -> None:
    answers = (guest.dev1.port.write(HOLE.start - 24, bytes(64)), guest.dev1.port.read(HOLE.start - 24, 64))
    for fault in answers:
        assert isinstance(fault, Fault)
        assert (fault.done, fault.iova, fault.reason) == (24, HOLE.start, Reason.RESERVED_RANGE)


def test_direct_addresses_are_the_parents(guest: Guest) -> None:
    """A transfer over both ends of them is in three parts: the table's page 3, pages 0x20 and 0x21, page 3."""
    found = guest.dev1.port.read(DIRECT - 8, 2 * PAGE + 16)
    assert isinstance(found, bytes)
    numbers = struct.unpack(f"<{len(found) // 8}Q", found)
    assert numbers == (3, *[0x20] * 512, *[0x21] * 512, 3)
    assert guest.dev1.port.write(DIRECT + PAGE - 4, b"abcdefgh") is None
    assert guest.ram.peek(DIRECT + PAGE - 4, 8) == b"abcdefgh"
    for iova, gpa in ((DIRECT, DIRECT), (DIRECT + 2 * PAGE - 1, DIRECT + 2 * PAGE - 1), (DIRECT - PAGE, 0x3000)):
        answer = guest.engine.core.translate(DEV1, iova, Access.READ)
        assert isinstance(answer, Translation)
        assert answer.gpa == gpa
        looked = guest.engine.core.lookup(DEV1, iova).result
        assert isinstance(looked, Translation)
        assert looked.gpa == gpa


def test_large_pages_end_where_a_window_begins(guest: Guest) -> None:
    """An entry of the IOTLB covers 2 MiB, read-only: the window in its middle is not served by it, nor serves it."""
    guest.ram.poke(0x32000 + 8, struct.pack("<Q", 0x200000 | 0x80 | 5))  # at the third level: see x86_tables
    window = 0x300000
    guest.ctx.detach(DEV1)
    guest.ctx.attach(DEV1, 2, direct_iova=window, direct_size=PAGE)
    port = guest.dev1.port
    for _ in range(2):
        answer = guest.engine.core.translate(DEV1, window - 0x4000, Access.READ)
        assert isinstance(answer, Translation)
        assert (answer.gpa, answer.size) == (window - 0x4000, 0x4000)
        assert isinstance(port.write(window - 1, b"x"), Fault)
        assert port.write(window, bytes(PAGE)) is None
        assert isinstance(port.write(window + PAGE, b"x"), Fault)
        assert isinstance(port.read(0x200000, 0x200000), bytes)
    fault = port.write(window, bytes(2 * PAGE))
    assert isinstance(fault, Fault)
    assert (fault.done, fault.iova, fault.reason) == (PAGE, window + PAGE, Reason.PERMISSION)


def test_a_translation_request_is_answered_alike(guest: Guest) -> None:
    guest.ctx.detach(DEV1)
    guest.ctx.attach(DEV1, 2, ats=True, direct_iova=DIRECT, direct_size=2 * PAGE)
    reply = guest.dev1.port.translate(DIRECT, 2 * PAGE, RW)
    assert [(each.iova, each.size, each.address) for each in reply.translations] == [(DIRECT, 2 * PAGE, DIRECT)]
    reply = guest.dev1.port.translate(HOLE.start, PAGE, Access.READ)
    assert reply.fault is not None
    assert (reply.translations, reply.fault.reason) == ((), Reason.RESERVED_RANGE)


def test_requests_with_a_pasid_know_of_none(guest: Guest) -> None:
    guest.ctx.detach(DEV1)
    child = guest.ctx.create_nesting(1)
    root = x86_tables(guest.ram, 0x38000, {HOLE.start: 0x3000, DIRECT: 0x3000})
    guest.ctx.bind_pasid_table(
        child, gcr3_table(guest.ram, 0x37000, {5: root}), PasidTableFormat("amd-gcr3", levels=1), Untagged.PARENT
    )
    guest.ctx.attach(DEV1, child, direct_iova=DIRECT, direct_size=PAGE)
    for iova in (HOLE.start, DIRECT):
        assert guest.dev1.port.read(iova, 8, 5) == struct.pack("<Q", 3)
    assert guest.dev1.port.read(DIRECT, 8) == struct.pack("<Q", 0x20)
    assert isinstance(guest.dev1.port.read(HOLE.start, 8), Fault)


def test_what_is_direct_ends_with_its_attachment(guest: Guest) -> None:
    guest.ctx.detach(DEV1)
    guest.ctx.attach(DEV1, 2)
    assert guest.dev1.port.read(DIRECT, 8) == struct.pack("<Q", 3)
    assert isinstance(guest.dev1.port.read(HOLE.start, 8), Fault)


def test_permission_of_the_attachment_holds(guest: Guest) -> None:
    guest.ctx.detach(DEV1)
    guest.ctx.attach(DEV1, 2, access=Access.READ, direct_iova=DIRECT, direct_size=PAGE)
    assert isinstance(guest.dev1.port.write(DIRECT, b"x"), Fault)
    assert isinstance(guest.dev1.port.read(DIRECT, 1), bytes)


def test_refusals(guest: Guest) -> None:
    ctx = guest.ctx
    ctx.detach(DEV1)
    top = (1 << 64) - PAGE
    for call, number in (
        (lambda: ctx.attach(DEV1, 2, direct_iova=PAGE), errno.EINVAL),
        (lambda: ctx.attach(DEV1, 2, direct_size=12), errno.EINVAL),
        (lambda: ctx.attach(DEV1, 2, pasid=5, direct_size=PAGE), errno.EINVAL),
        (lambda: ctx.attach(DEV1, 2, direct_iova=top, direct_size=2 * PAGE), errno.EOVERFLOW),
    ):
        assert refused(call) == number
    ctx.attach(DEV1, 2, direct_iova=top, direct_size=PAGE)


def test_of_the_core(guest: Guest) -> None:
    core = guest.engine.core
    with pytest.raises(UnknownIdError):
        core.set_windows(0x777, [(0, 1, None)])
    with pytest.raises(BadValueError):
        core.set_windows(DEV1, [(1, 0, None)])
    with pytest.raises(LimitError):
        core.set_windows(DEV1, [(0, 1, None)] * 33)
    with pytest.raises(UnknownIdError):
        core.set_windows(DEV1, [(0, 1, 12345)])
    with pytest.raises(KindError):  # neither itself nor beneath it: a space that may go before the route does
        core.set_windows(DEV1, [(0, 1, 2)])
    assert isinstance(guest.dev1.port.read(HOLE.start, 1), Fault)  # as before
    core.set_windows(DEV1, [(page * PAGE, page * PAGE, None) for page in range(8, 40)])
    assert isinstance(guest.dev1.port.read(0x8000, 1), Fault)
    assert isinstance(guest.dev1.port.read(0x8001, 1), bytes)
    core.set_windows(DEV1, [])
    assert isinstance(guest.dev1.port.read(0x8000, 1), bytes)


WINDOWS = st.lists(
    st.tuples(st.integers(0x7800, 0x2FFFF), st.integers(1, 0x9000), st.booleans()), min_size=1, max_size=6
)
TRANSFERS = st.lists(st.tuples(st.integers(0x8000, 0x2FFF0), st.integers(1, 0x5000)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WINDOWS, TRANSFERS)
def test_against_a_model_of_single_bytes(
    guest: Guest, windows: list[tuple[int, int, bool]], transfers: list[tuple[int, int]]
) -> None:
    """Any windows, at any bytes, over one another: the first one that holds a byte says what becomes of it."""
    core = guest.engine.core
    host = guest.ctx._spaces[1].core_id
    core.set_windows(DEV1, [(first, first + size - 1, None if blocked else host) for first, size, blocked in windows])
    memory = guest.ram.peek(0, 0x40000)

    def byte(iova: int) -> int | None:
        for first, size, blocked in windows:
            if first <= iova < first + size:
                gone = blocked or HOLE.start <= iova < HOLE.end  # no memory there, either
                return None if gone else memory[iova]
        return memory[0x3000 + iova % PAGE] if iova < 0x30000 else None

    for iova, size in transfers:
        expected = bytearray()
        for at in range(iova, iova + size):
            value = byte(at)
            if value is None:
                break
            expected.append(value)
        buffer = bytearray(size)
        fault = core.dma_read_into(DEV1, iova, buffer)
        assert (fault is None) == (len(expected) == size)
        assert buffer[: len(expected)] == expected
        if fault is not None:
            assert (fault.done, fault.iova) == (len(expected), iova + len(expected))
