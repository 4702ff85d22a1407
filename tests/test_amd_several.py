"""Several AMD IOMMUs over one context: each knows its endpoints, its tables and its logs, and nothing of the others."""

from collections.abc import Iterator

import pytest
from amd_driver import (
    ALL_PAGES,
    DATA,
    ENDPOINT,
    IOMMU_EN,
    MEMORY,
    PAGE_FAULT,
    READ,
    SECOND,
    SEMAPHORE,
    TABLES,
    WRITE,
    Driver,
    Event,
    Gcr3Table,
    GuestTable,
    PageTable,
    Tlb,
    Vm,
    complete_ppr,
    completion_wait,
    device_entry,
    guest_entry,
    invalidate_all,
    invalidate_device_tlb,
    invalidate_entry,
    invalidate_pages,
    reason,
)
from guest_ram import PAGE

from backend.core import Access, Fault, Reason
from backend.ioasid import Code, FaultRecord, PageResponse

OTHER_IOMMU = 0x0100  # 01:00.0
BASE = MEMORY  # the second IOMMU's structures
FAR = 0x0180  # an endpoint on bus 1, entry 384: beyond a table of one or two pages
ADDRESS = 0x7F12_3456_7000


class TwoIommus(Vm):
    """The endpoint behind the first IOMMU, the second endpoint and one on bus 1 behind the other."""

    def __init__(self) -> None:
        super().__init__(memory=2 * MEMORY)
        self.iommu.endpoints = frozenset([ENDPOINT])
        self.add_device(FAR, "far")
        self.other = Driver(self.ram, self.make_iommu(OTHER_IOMMU, [SECOND, FAR]), BASE)
        self.iommus = (self.iommu, self.other.iommu)
        self.engine.set_router(lambda rid, pasid: any(each.route(rid, pasid) for each in self.iommus))
        self.engine.on_fault(self.other.iommu.on_fault)
        self.far = self.engine.devices[FAR].port
        self.start()
        self.other.start(pages=4)

    def _faults_ready(self) -> None:
        for record in self.context.read_faults().records:
            self.told(record)

    def told(self, record: FaultRecord) -> None:
        for iommu in self.iommus:
            iommu.page_request(record)


@pytest.fixture
def two() -> Iterator[TwoIommus]:
    vm = TwoIommus()
    yield vm
    vm.close()


def table_of(driver: Driver, device: int, page: int, domain: int = 7) -> PageTable:
    """One mapping at 0x5000."""
    table = PageTable(driver.ram, driver.base + TABLES, 4)
    table.map(0x5000, page)
    driver.set_entry(device, device_entry(table.root, 4, domain))
    return table


def test_one_domain_id_is_two_domains(two: TwoIommus) -> None:
    two.ram.poke(DATA, b"one")
    two.ram.poke(DATA + PAGE, b"two")
    mine, theirs = table_of(two, ENDPOINT, DATA), table_of(two.other, SECOND, DATA + PAGE)
    assert (two.endpoint.read(0x5000, 3), two.second.read(0x5000, 3)) == (b"one", b"two")
    for table in (mine, theirs):
        table.set(0x5000, 0)
    two.submit(invalidate_pages(7, ALL_PAGES, size=True))
    assert isinstance(two.endpoint.read(0x5000, 3), Fault)
    assert two.second.read(0x5000, 3) == b"two"  # that IOMMU was told nothing
    two.submit(invalidate_entry(SECOND), invalidate_all())
    assert two.second.read(0x5000, 3) == b"two"
    two.other.submit(invalidate_pages(7, ALL_PAGES, size=True))
    assert isinstance(two.second.read(0x5000, 3), Fault)
    assert two.events() == [Event(PAGE_FAULT, ENDPOINT, 7, 0, 0x5000)]
    assert two.other.events() == [Event(PAGE_FAULT, SECOND, 7, 0, 0x5000)]


def test_a_table_too_short_for_one_of_them(two: TwoIommus) -> None:
    table_of(two.other, FAR, DATA)
    assert isinstance(two.far.read(0x5000, 1), bytes)
    two.other.write(0x00, BASE | 2)  # three pages: 384 entries, and the device is number 384
    two.other.submit(invalidate_all())
    assert reason(two.far.read(0x5000, 1)) == Reason.NO_ROUTE
    assert two.other.events() == [Event(PAGE_FAULT, FAR, 0, 0, 0x5000)]
    assert isinstance(two.second.read(DATA, 1), bytes)
    two.other.write(0x00, BASE | 3)
    assert reason(two.far.read(0x5000, 1)) == Reason.NO_ROUTE  # as it was read
    two.other.submit(invalidate_entry(FAR))
    assert isinstance(two.far.read(0x5000, 1), bytes)


def test_one_off_and_one_on(two: TwoIommus) -> None:
    table_of(two, ENDPOINT, DATA)
    table_of(two.other, SECOND, DATA)
    two.control(clear=IOMMU_EN)
    assert isinstance(two.endpoint.read(DATA, 1), bytes)
    assert isinstance(two.second.read(DATA, 1), Fault)
    assert isinstance(two.second.read(0x5000, 1), bytes)
    assert (two.iommu.enabled, two.other.iommu.enabled) == (False, True)


def test_page_requests_and_answers(two: TwoIommus) -> None:
    answers: list[PageResponse] = []
    for driver, device in ((two, ENDPOINT), (two.other, SECOND)):
        gcr3 = Gcr3Table(two.ram, driver.base + TABLES, 1)
        gcr3.set(5, GuestTable(two.ram, driver.base + TABLES + 16 * PAGE).root | 1)
        driver.set_entry(device, guest_entry(gcr3.root, domain=9, low=3 | READ | WRITE | 1 << 52))
        driver.start_pprs()
        two.engine.devices[device].port.read(ADDRESS, 1, 5)
        two.engine.devices[device].page_request(
            5, ADDRESS, Access.READ, group=4, last=True, answer=answers.append
        )
    assert [each.device for each in two.page_requests()] == [ENDPOINT]
    assert [each.device for each in two.other.page_requests()] == [SECOND]
    two.submit(complete_ppr(SECOND, 4))  # not a device of this one's
    two.other.submit(complete_ppr(ENDPOINT, 4))
    assert answers == []
    two.submit(complete_ppr(ENDPOINT, 4))
    two.other.submit(complete_ppr(SECOND, 4, 1))
    assert [(each.rid, each.code) for each in answers] == [(ENDPOINT, Code.SUCCESS), (SECOND, Code.INVALID)]


def test_one_waits_for_a_device_and_the_other_does_not(two: TwoIommus) -> None:
    tlb = Tlb()
    two.engine.set_tlb(two.engine.devices[ENDPOINT], tlb)
    table = PageTable(two.ram, TABLES, 4)
    two.set_entry(ENDPOINT, device_entry(table.root, 4, 7, high=1 << 32))
    two.endpoint.read(0x5000, 1)
    tlb.unanswered.clear()
    two.submit(invalidate_device_tlb(ENDPOINT, 0x5000), completion_wait(SEMAPHORE, 0x99))
    two.other.submit(invalidate_device_tlb(ENDPOINT, 0x5000))  # not behind it
    assert two.other.wait()
    assert two.ram.peek(SEMAPHORE, 1) != b"\x99"
    tlb.unanswered[0]()
    assert two.ram.peek(SEMAPHORE, 1) == b"\x99"


def test_devices_of_neither_are_left_alone(two: TwoIommus) -> None:
    two.add_device(0x300, "stranger")
    assert reason(two.engine.devices[0x300].port.read(DATA, 1)) == Reason.NO_ROUTE
    assert (two.events(), two.other.events()) == ([], [])
