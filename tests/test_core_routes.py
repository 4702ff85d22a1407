"""Routes: where requests of a (RID, PASID) go, what they may do, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from core_guest import DIRECT, PAGE, STAGE2, Guest

from backend.core import RW, Access, BadValueError, Core, Fault, LimitError, Reason, RouteCounters, UnknownIdError

READ, WRITE = Access.READ, Access.WRITE
ALL_ROUTES = 1 << 16


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(iotlb_entries=64)
    made.map(0, 8 * PAGE)
    yield made
    made.close()


def reason(answer: object) -> Reason | None:
    return answer.reason if isinstance(answer, Fault) else None


def test_unknown_route(guest: Guest) -> None:
    answer = guest.core.dma_write(0x42, 0x1000, b"x", pasid=7)
    assert answer == Fault(
        rid=0x42, pasid=7, ioasid=0, iova=0x1000, access=WRITE, stage=0, level=0, gpa=None, entry=0,
        reason=Reason.NO_ROUTE, done=0,
    )  # fmt: skip
    assert reason(guest.core.load(0x42, 0, 8)) == Reason.NO_ROUTE
    assert reason(guest.core.dma_read(0x42, 0, 0)) == Reason.NO_ROUTE
    assert reason(guest.core.dma_scatter(0x42, [], b"", write=True)) == Reason.NO_ROUTE


def test_pasid_is_part_of_the_route(guest: Guest) -> None:
    guest.core.create_host_space(5)
    guest.core.map(5, 0, guest.ram.hva + PAGE, PAGE, RW)
    guest.core.attach(DIRECT, 0, 5)
    guest.ram.write(0, b"none")
    guest.ram.write(PAGE, b"zero")
    assert guest.core.dma_read(DIRECT, 0, 4) == b"none"
    assert guest.core.dma_read(DIRECT, 0, 4, pasid=0) == b"zero"
    assert reason(guest.core.dma_read(DIRECT, 0, 4, pasid=1)) == Reason.NO_ROUTE


def test_route_bounds_the_access(guest: Guest) -> None:
    guest.core.attach(DIRECT, None, STAGE2, access=READ)
    assert guest.core.dma_read(DIRECT, 0, 4) == bytes(4)
    answer = guest.core.dma_write(DIRECT, 0, b"x")
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.stage, answer.ioasid) == (Reason.PERMISSION, 0, STAGE2)
    found = guest.core.translate(DIRECT, 0, READ)
    assert not isinstance(found, Fault)
    assert found.access == READ | Access.EXECUTE
    guest.core.attach(DIRECT, None, STAGE2, access=Access(0))
    assert reason(guest.core.dma_read(DIRECT, 0, 4)) == Reason.PERMISSION


def test_blocked(guest: Guest) -> None:
    guest.core.block(DIRECT, None)
    assert reason(guest.core.dma_read(DIRECT, 0, 4)) == Reason.BLOCKED
    guest.core.block(DIRECT, None)
    guest.core.attach(DIRECT, None, STAGE2)
    assert guest.core.dma_read(DIRECT, 0, 4) == bytes(4)
    guest.core.block(DIRECT, None)
    guest.core.detach(DIRECT, None)
    assert reason(guest.core.dma_read(DIRECT, 0, 4)) == Reason.NO_ROUTE


def test_detached_route_is_unknown(guest: Guest) -> None:
    guest.core.dma_read(DIRECT, 0, 4)
    guest.core.detach(DIRECT, None)
    assert reason(guest.core.dma_read(DIRECT, 0, 4)) == Reason.NO_ROUTE
    with pytest.raises(UnknownIdError):
        guest.core.detach(DIRECT, None)
    with pytest.raises(UnknownIdError):
        guest.core.detach(0x99, None)


def test_counters_survive_attach_again(guest: Guest) -> None:
    core = guest.core
    core.dma_write(DIRECT, 0, bytes(100))
    core.dma_read(DIRECT, 7 * PAGE, 2 * PAGE)  # one page of two
    core.translate(DIRECT, 0, READ)
    core.dma_read(DIRECT, 0, 0)
    assert core.route_counters(DIRECT) == RouteCounters(4, 100 + PAGE, faults=1, nested=0, direct=4, moved=0)
    core.detach(DIRECT, None)
    assert core.route_counters(DIRECT) == RouteCounters(4, 100 + PAGE, faults=1, nested=0, direct=4, moved=0)
    core.dma_read(DIRECT, 0, 4)  # nobody's, but still this route's fault
    core.attach(DIRECT, None, STAGE2)
    core.store(DIRECT, 0, 5, 4)
    assert core.route_counters(DIRECT) == RouteCounters(6, 104 + PAGE, faults=2, nested=0, direct=5, moved=0)
    with pytest.raises(UnknownIdError):
        core.route_counters(0x77)


@pytest.mark.parametrize(("rid", "pasid"), [(1 << 16, None), (-1, None), (8, 1 << 20), (8, -1)])
def test_identities_out_of_range(guest: Guest, rid: int, pasid: int | None) -> None:
    with pytest.raises(BadValueError):
        guest.core.attach(rid, pasid, STAGE2)
    with pytest.raises(BadValueError):
        guest.core.block(rid, pasid)


def test_attach_to_an_unknown_space_leaves_the_route(guest: Guest) -> None:
    with pytest.raises(UnknownIdError):
        guest.core.attach(DIRECT, None, 99)
    assert guest.core.dma_read(DIRECT, 0, 4) == bytes(4)
    with pytest.raises(BadValueError):
        guest.core.attach(DIRECT, None, STAGE2, access=Access(4))


def test_routes_are_bounded() -> None:
    """2^16 live routes, then none; a detached one makes room, the one detached longest ago first."""
    core = Core(iotlb_entries=0)
    core.create_host_space(1)
    for pasid in range(ALL_ROUTES):
        core.attach(8, pasid, 1)
    with pytest.raises(LimitError):
        core.attach(8, None, 1)
    with pytest.raises(LimitError):
        core.block(8, None)
    core.attach(8, 3, 1)  # the same again takes no room
    for pasid in (30, 10, 20):
        core.detach(8, pasid)
    core.attach(8, 10, 1)
    core.attach(8, None, 1)
    with pytest.raises(UnknownIdError):
        core.route_counters(8, 30)
    assert core.route_counters(8, 20).requests == 0
    core.block(9, None)
    with pytest.raises(LimitError):
        core.attach(9, 1, 1)
    assert core.counters().routes == ALL_ROUTES
    for pasid in range(0, ALL_ROUTES, 2):
        if pasid not in {20, 30}:
            core.detach(8, pasid)
    for pasid in range(1, ALL_ROUTES, 2):
        assert reason(core.translate(8, 0, READ, pasid=pasid)) == Reason.NOT_PRESENT
        assert reason(core.translate(8, 0, READ, pasid=pasid - 1)) == Reason.NO_ROUTE
    core.close()
