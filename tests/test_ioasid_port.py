"""The DMA port: bus mastering, the question for a route, and who hears of a fault."""

import struct
from collections.abc import Callable, Iterator

import pytest
from guest_ram import PAGE, AmdTables, Ram

from backend.core import RW, Access, Fault, Reason
from backend.ioasid import Context, DevicePort, Engine, Kind, PgtableFormat
from backend.pci.dma import DmaPort

EP, IOMMU = 0x0018, 0x0002


class Machine:
    """An endpoint and an IOMMU function over 64 pages of RAM. The IOMMU function is attached to stage 2."""

    def __init__(self) -> None:
        self.ram = Ram(64 * PAGE)
        self.engine = Engine()
        self.ep: DevicePort = self.engine.add_device(EP, "endpoint").port
        self.iommu: DevicePort = self.engine.add_device(IOMMU, "iommu").port
        self.ctx: Context = self.engine.open()
        self.ctx.alloc()  # so that numbers in the context and in the core differ
        self.ctx.free(1)
        other = self.engine.open()
        other.alloc()
        self.stage2 = self.ctx.alloc()
        self.ctx.map_dma(self.stage2, 0, self.ram.hva, self.ram.size)
        for rid in (EP, IOMMU):
            self.ctx.bind_device(rid)
        self.ctx.attach(IOMMU, self.stage2)
        self.heard: list[Fault] = []
        self.engine.on_fault(self.heard.append)

    def close(self) -> None:
        self.engine.close()
        self.ram.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def every_request(port: DmaPort, iova: int) -> list[tuple[Access, Callable[[], object]]]:
    into = bytearray(8)
    return [
        (Access.READ, lambda: port.read(iova, 8)),
        (Access.READ, lambda: port.read_into(iova, into)),
        (Access.WRITE, lambda: port.write(iova, b"written!")),
        (Access.READ, lambda: port.scatter([(iova, 4), (iova + 4, 4)], into, write=False)),
        (Access.WRITE, lambda: port.scatter([(iova, 4), (iova + 4, 4)], into, write=True)),
        (Access.WRITE, lambda: port.store(iova, 7, 8)),
        (Access.READ, lambda: port.load(iova, 8)),
        (Access.WRITE, lambda: port.fill(iova, 8, 0x1234, 2)),
        (Access.READ, lambda: port.copy(iova, iova + 8, 8)),
        (RW, lambda: port.fetch_add(iova, 1, 8)),
        (RW, lambda: port.swap(iova, 1, 4)),
        (RW, lambda: port.compare_exchange(iova, 0, 1, 16)),
    ]


def answering(asked: list[tuple[int, int | None]], answer: bool) -> Callable[[int, int | None], bool]:
    """A router that notes what it is asked, and attaches nothing."""

    def route(rid: int, pasid: int | None) -> bool:
        asked.append((rid, pasid))
        return answer

    return route


def test_requests_move_data(machine: Machine) -> None:
    port = machine.ep
    assert (port.counters.requests, port.counters.bytes) == (0, 0)
    machine.ctx.attach(EP, machine.stage2)
    machine.ram.poke(0x5000, b"abcdefgh")
    into = bytearray(8)
    assert port.read(0x5000, 8) == b"abcdefgh"
    assert port.read_into(0x5000, into) is None and into == b"abcdefgh"
    assert port.load(0x5000, 8) == struct.unpack("<Q", b"abcdefgh")[0]
    assert port.write(0x6000, b"12345678") is None
    assert machine.ram.peek(0x6000, 8) == b"12345678"
    assert port.store(0x6004, 0x41424344, 4) is None
    assert machine.ram.peek(0x6000, 8) == b"1234DCBA"
    assert port.scatter([(0x7FFE, 4), (0x6000, 4)], b"xy!!1111", write=True) is None
    assert machine.ram.peek(0x7FFE, 4) + machine.ram.peek(0x6000, 4) == b"xy!!1111"
    assert port.scatter([(0x6000, 4), (0x7FFE, 4)], into, write=False) is None
    assert into == b"1111xy!!"
    assert machine.heard == []
    assert port.counters.bytes == 3 * 8 + 8 + 4 + 8 + 8


@pytest.mark.parametrize("which", range(12))
def test_bus_master_off_moves_nothing_and_nobody_hears(machine: Machine, which: int) -> None:
    machine.ctx.attach(EP, machine.stage2)
    asked: list[tuple[int, int | None]] = []
    machine.engine.set_router(answering(asked, False))
    machine.ep.enabled = lambda: False
    access, request = every_request(machine.ep, 0x5000)[which]
    before = machine.ram.peek(0, machine.ram.size)
    answer = request()
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.rid, answer.iova, answer.access) == (Reason.BUS_MASTER_OFF, EP, 0x5000, access)
    assert (answer.done, answer.stage, answer.gpa, answer.ioasid) == (0, 0, None, 0)
    assert machine.ram.peek(0, machine.ram.size) == before
    assert not asked and not machine.heard


@pytest.mark.parametrize("which", range(12))
def test_router_is_asked_once_and_the_request_repeated(machine: Machine, which: int) -> None:
    asked: list[tuple[int, int | None]] = []

    def route(rid: int, pasid: int | None) -> bool:
        asked.append((rid, pasid))
        machine.ctx.attach(rid, machine.stage2)
        return True

    machine.engine.set_router(route)
    for _, request in every_request(machine.ep, 0x5000)[which], every_request(machine.ep, 0x6000)[which]:
        assert not isinstance(request(), Fault)
    assert asked == [(EP, None)]
    assert machine.heard == []


@pytest.mark.parametrize("which", range(12))
@pytest.mark.parametrize("lies", [False, True])
def test_no_route_faults_once(machine: Machine, which: int, lies: bool) -> None:
    asked: list[tuple[int, int | None]] = []
    machine.engine.set_router(answering(asked, lies))
    access, request = every_request(machine.ep, 0x5000)[which]
    answer = request()
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.rid, answer.access, answer.ioasid) == (Reason.NO_ROUTE, EP, access, 0)
    assert asked == [(EP, None)]
    assert machine.heard == [answer]


def test_without_a_router(machine: Machine) -> None:
    answer = machine.ep.read(0x5000, 8)
    assert isinstance(answer, Fault) and answer.reason == Reason.NO_ROUTE
    assert machine.heard == [answer]


def test_pasid_is_part_of_the_question(machine: Machine) -> None:
    asked: list[tuple[int, int | None]] = []
    machine.engine.set_router(answering(asked, False))
    machine.ctx.attach(EP, machine.stage2)
    answer = machine.ep.read(0x5000, 8, pasid=9)
    assert isinstance(answer, Fault) and answer.pasid == 9
    assert asked == [(EP, 9)]


def test_router_that_reads_its_tables_by_dma(machine: Machine) -> None:
    """As an IOMMU reads the guest's device table: by its own port, while the endpoint's request waits."""
    tables = AmdTables(machine.ram, 0x10000)
    tables.map(0x2000, 0x1000)
    machine.ram.poke(0x1000, b"found it")
    machine.ram.poke(0x3000, struct.pack("<Q", tables.root))
    seen: list[object] = []

    def route(rid: int, pasid: int | None) -> bool:
        root = machine.iommu.load(0x3000, 8)
        seen.append(machine.iommu.load(1 << 40, 8))  # and one that faults
        assert isinstance(root, int)
        child = machine.ctx.create_nesting(machine.stage2)
        machine.ctx.bind_pgtable(child, root, PgtableFormat())
        machine.ctx.attach(rid, machine.stage2)
        machine.ctx.attach(rid, child)
        return True

    machine.engine.set_router(route)
    assert machine.ep.read(0x2000, 8) == b"found it"
    assert machine.heard == seen
    fault = machine.ep.read(0x7000, 8)
    assert isinstance(fault, Fault)
    assert (fault.reason, fault.stage, fault.iova) == (Reason.NOT_PRESENT, 1, 0x7000)
    assert fault.ioasid == 2, "the number that its context knows"
    assert machine.ctx.get_info(fault.ioasid).parent == machine.stage2


def test_router_without_a_route_of_its_own(machine: Machine) -> None:
    """Its DMA misses too: it is asked about itself once, and then its request faults; nothing recurses."""
    machine.ctx.detach(IOMMU)
    asked: list[int] = []
    answers: list[object] = []

    def route(rid: int, pasid: int | None) -> bool:
        asked.append(rid)
        answers.append(machine.iommu.read(0x3000, 8))
        return False

    machine.engine.set_router(route)
    assert isinstance(machine.ep.read(0, 8), Fault)
    assert asked == [EP, IOMMU]
    assert all(isinstance(each, Fault) and each.rid == IOMMU and each.reason == Reason.NO_ROUTE for each in answers)
    asked.clear()
    machine.ctx.attach(IOMMU, machine.stage2)
    assert isinstance(machine.ep.read(0, 8), Fault)
    assert asked == [EP], "the guard does not outlive the question"


def test_router_that_raises_is_asked_again(machine: Machine) -> None:
    def broken(rid: int, pasid: int | None) -> bool:
        raise RuntimeError("bug")

    machine.engine.set_router(broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bug"):
            machine.ep.read(0, 8)


def test_fault_reaches_each_listener_once(machine: Machine) -> None:
    machine.ctx.attach(EP, machine.stage2)
    second: list[Fault] = []
    machine.engine.on_fault(second.append)
    answer = machine.ep.write(machine.ram.size, b"beyond")
    assert isinstance(answer, Fault)
    assert (answer.rid, answer.iova, answer.access) == (EP, machine.ram.size, Access.WRITE)
    assert (answer.reason, answer.ioasid) == (Reason.NOT_PRESENT, machine.stage2)
    assert machine.heard == second == [answer]


def test_listener_whose_own_dma_faults(machine: Machine) -> None:
    """As an event log that lies where nothing is mapped: the listener gets its fault as an answer and is not called
    again."""
    machine.ctx.attach(EP, machine.stage2)
    answers: list[object] = []
    machine.engine.on_fault(lambda fault: answers.append(machine.iommu.write(1 << 40, b"event")))
    for _ in range(2):
        assert isinstance(machine.ep.read(1 << 40, 8), Fault)
    assert [fault.rid for fault in machine.heard] == [EP, EP]
    assert len(answers) == 2 and all(isinstance(each, Fault) and each.rid == IOMMU for each in answers)


def test_partial_transfer_says_how_much_moved(machine: Machine) -> None:
    machine.ctx.attach(EP, machine.stage2)
    end = machine.ram.size
    answer = machine.ep.scatter([(0x5000, 16), (end - 8, 16)], b"x" * 32, write=True)
    assert isinstance(answer, Fault)
    assert (answer.iova, answer.done) == (end, 24)
    assert machine.ram.peek(0x5000, 16) == b"x" * 16


def test_totals_outlive_what_counted_them(machine: Machine) -> None:
    """Five requests of the endpoint: one bypasses, four go through children (one of them to its own GPA, one
    faults)."""
    tables = AmdTables(machine.ram, 0x10000)
    tables.map(0x2000, 0x1000)
    tables.map(0x3000, 0x3000)
    machine.ctx.attach(EP, machine.stage2)
    machine.ep.read(0x2000, 8)
    for iovas in ((0x2000, 0x2008), (0x3000, 0x4000)):
        child = machine.ctx.create_nesting(machine.stage2)
        machine.ctx.bind_pgtable(child, tables.root, PgtableFormat())
        machine.ctx.attach(EP, child)
        for iova in iovas:
            machine.ep.read(iova, 8)
        machine.ctx.detach(EP)
        machine.ctx.free(child)
    totals = machine.engine.totals(Kind.USER)
    assert (totals.requests, totals.moved, totals.faults) == (4, 2, 1)
    assert machine.engine.totals(Kind.KERNEL).requests == 1
    assert machine.ep.counters.requests == 5


def test_new_kinds_of_requests_move_data(machine: Machine) -> None:
    port = machine.ep
    machine.ctx.attach(EP, machine.stage2)
    assert port.fill(0x5001, 7, 0x4241, 2) is None
    assert machine.ram.peek(0x5000, 9) == b"\0ABABABA\0"
    assert port.copy(0x5001, 0x5003, 6) is None
    assert machine.ram.peek(0x5000, 9) == b"\0ABABABAB"
    assert port.fetch_add(0x6000, 5, 4) == 0 and port.swap(0x6000, 9, 8) == 5
    assert port.compare_exchange(0x6000, 9, 1 << 127, 16) == 9
    assert machine.ram.peek(0x6000, 16) == bytes(15) + b"\x80"
    assert machine.heard == []


@pytest.mark.parametrize("target", [0x5004, 0x4FFC, 0x7000])
def test_a_copy_goes_on_where_routes_were_missing(machine: Machine, target: int) -> None:
    """Both PASIDs are asked for, once each, and what overlaps is not copied twice."""
    machine.ram.poke(0x5000, b"0123456789abcdef")
    asked: list[tuple[int, int | None]] = []

    def route(rid: int, pasid: int | None) -> bool:
        asked.append((rid, pasid))
        machine.ctx.attach(rid, machine.stage2, pasid=pasid)
        return True

    machine.ctx.attach(EP, machine.stage2)
    machine.engine.set_router(route)
    assert machine.ep.copy(0x5000, target, 16, 7, target_pasid=8) is None
    assert machine.ram.peek(target, 16) == b"0123456789abcdef"
    assert asked == [(EP, 7), (EP, 8)]
    assert machine.heard == []
