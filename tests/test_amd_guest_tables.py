"""Guest (v2) tables behind the AMD IOMMU: GCR3 tables of each depth, PASIDs, their invalidations and events."""

import struct

import pytest
from amd_driver import (
    ALL_PAGES,
    DATA,
    ENDPOINT,
    GN,
    GT_EN,
    ILLEGAL_ENTRY,
    IOMMU_EN,
    MASTER_ABORT,
    NOWHERE,
    NX,
    PAGE_FAULT,
    PAGE_TABLE_ERROR,
    PE,
    PR,
    READ,
    RW,
    RZ,
    SECOND,
    TABLES,
    US,
    Event,
    Gcr3Table,
    GuestTable,
    Vm,
    device_entry,
    guest_entry,
    invalidate_all,
    invalidate_entry,
    invalidate_pages,
    reason,
)
from guest_ram import PAGE

from backend.core import Access, Fault, Reason

GCR3 = TABLES
GUEST = TABLES + 16 * PAGE
OTHER = TABLES + 32 * PAGE
PASID = 5
ADDRESS = 0x7F12_3456_7000  # of a process
DOMAIN = 0x2A


def bound(vm: Vm, pasid: int = PASID, *, glx: int = 0, giov: bool = False, five: bool = False) -> GuestTable:
    """Give the endpoint a GCR3 table that leads one PASID to an empty guest table."""
    gcr3 = Gcr3Table(vm.ram, GCR3, glx + 1)
    table = GuestTable(vm.ram, GUEST, 5 if five else 4)
    gcr3.set(pasid, table.root | 1)
    vm.set_entry(ENDPOINT, guest_entry(gcr3.root, glx=glx, giov=giov, five=five, domain=DOMAIN))
    return table


class TestTranslation:
    @pytest.mark.parametrize(
        ("glx", "pasid"), [(0, 0), (0, 1), (0, 511), (1, 512), (1, 0xFFFF), (2, 1), (2, 0xFFFF), (2, 0x0200)]
    )
    def test_gcr3_tables_of_each_depth(self, started: Vm, glx: int, pasid: int) -> None:
        bound(started, pasid, glx=glx).map(ADDRESS, DATA)
        assert started.endpoint.write(ADDRESS + 8, b"process", pasid) is None
        assert started.ram.peek(DATA + 8, 7) == b"process"
        assert started.endpoint.read(ADDRESS + 8, 7, pasid) == b"process"
        assert started.events() == []

    @pytest.mark.parametrize(("five", "address"), [(True, 0x00AB_CDEF_1234_5000), (True, ADDRESS), (False, ADDRESS)])
    def test_four_and_five_levels(self, started: Vm, five: bool, address: int) -> None:
        bound(started, five=five).map(address, DATA)
        assert isinstance(started.endpoint.read(address, 8, PASID), bytes)

    def test_addresses_of_a_process_are_canonical_those_of_pasid_0_are_not(self, started: Vm) -> None:
        upper = 0xFFFF_8000_0000_1000
        bound(started).map(upper, DATA)
        assert isinstance(started.endpoint.read(upper, 8, PASID), bytes)
        assert reason(started.endpoint.read(1 << 48, 8, PASID)) == Reason.ADDRESS_WIDTH
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, PASID, GN | US, 1 << 48)]
        bound(started, 0, giov=True).map(0x8000_0000_1000, DATA)
        assert isinstance(started.endpoint.read(0x8000_0000_1000, 8), bytes)
        assert reason(started.endpoint.read(upper, 8)) == Reason.ADDRESS_WIDTH

    def test_pasids_do_not_mix(self, started: Vm) -> None:
        one = bound(started)
        other = GuestTable(started.ram, OTHER)
        started.ram.poke(GCR3 + 8 * 6, struct.pack("<Q", other.root | 1))
        one.map(ADDRESS, DATA)
        other.map(ADDRESS, DATA + PAGE)
        started.ram.poke(DATA, b"five")
        started.ram.poke(DATA + PAGE, b"six ")
        assert started.endpoint.read(ADDRESS, 4, 5) == b"five"
        assert started.endpoint.read(ADDRESS, 4, 6) == b"six "
        assert reason(started.endpoint.read(ADDRESS, 4, 7)) == Reason.NOT_PRESENT
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 7, GN | US, ADDRESS)]

    def test_accessed_and_dirty_bits_are_set(self, started: Vm) -> None:
        table = bound(started)
        table.map(ADDRESS, DATA)
        started.endpoint.read(ADDRESS, 1, PASID)
        assert [table.get(ADDRESS, level) & 0x60 for level in (1, 2, 3, 4)] == [0x20] * 4
        started.endpoint.write(ADDRESS, b"x", PASID)
        assert [table.get(ADDRESS, level) & 0x60 for level in (1, 2, 3, 4)] == [0x60, 0x20, 0x20, 0x20]

    def test_requests_without_a_pasid(self, started: Vm) -> None:
        """GIoV clear: they pass as the host part says, which is Mode 0 here. GIoV set: the table of PASID 0."""
        bound(started)
        started.ram.poke(DATA, b"bypassed")
        assert started.endpoint.read(DATA, 8) == b"bypassed"
        bound(started, 0, giov=True).map(ADDRESS, DATA)
        assert started.endpoint.read(ADDRESS, 8) == b"bypassed"
        assert started.endpoint.read(ADDRESS, 8, 0) == b"bypassed"
        assert isinstance(started.endpoint.read(DATA, 8), Fault)
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 0, GN | US, DATA)]

    def test_ir_and_iw_bound_requests_with_and_without_pasid(self, started: Vm) -> None:
        bound(started).map(ADDRESS, DATA)
        started.set_entry(ENDPOINT, guest_entry(GCR3, domain=DOMAIN, low=3 | READ))
        assert isinstance(started.endpoint.read(ADDRESS, 8, PASID), bytes)
        assert isinstance(started.endpoint.read(DATA, 8), bytes)
        assert isinstance(started.endpoint.write(ADDRESS, b"x", PASID), Fault)
        assert isinstance(started.endpoint.write(DATA, b"x"), Fault)
        assert started.events() == [
            Event(PAGE_FAULT, ENDPOINT, PASID, GN | US | PR | PE | RW, ADDRESS),
            Event(PAGE_FAULT, ENDPOINT, DOMAIN, PR | PE | RW, DATA),
        ]

    def test_devices_of_one_domain_share_an_ioasid(self, started: Vm) -> None:
        bound(started).map(ADDRESS, DATA)
        started.set_entry(SECOND, guest_entry(GCR3, domain=DOMAIN))
        assert isinstance(started.second.read(ADDRESS, 1, PASID), bytes)
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), bytes)
        (ioasid,) = started.iommu.domains.ioasids.values()
        assert started.context.get_info(ioasid).attachments == 2
        started.submit(invalidate_all())
        assert not started.iommu.domains.ioasids
        assert started.context.get_info(started.stage2).children == 0

    def test_guest_translation_counts_while_it_is_enabled(self, started: Vm) -> None:
        bound(started, 0, giov=True).map(ADDRESS, DATA)
        assert isinstance(started.endpoint.read(ADDRESS, 1), bytes)
        started.control(clear=GT_EN)
        assert isinstance(started.endpoint.read(ADDRESS, 1), Fault)  # Mode 0: it passes to where no memory is
        assert isinstance(started.endpoint.read(DATA, 1), bytes)
        started.control(set_=GT_EN)
        assert isinstance(started.endpoint.read(ADDRESS, 1), bytes)

    def test_while_the_iommu_is_off_a_pasid_leads_nowhere(self, started: Vm) -> None:
        bound(started).map(ADDRESS, DATA)
        started.control(clear=IOMMU_EN)
        assert reason(started.endpoint.read(ADDRESS, 1, PASID)) == Reason.NO_ROUTE
        assert isinstance(started.endpoint.read(DATA, 1), bytes)


class TestEvents:
    def test_page_faults_name_the_pasid_and_the_request(self, started: Vm) -> None:
        table = bound(started)
        read_only, supervisor = ADDRESS + PAGE, ADDRESS + 2 * PAGE
        table.map(read_only, DATA, writable=False)
        table.map(supervisor, DATA, user=False)
        table.set(0x4000_0000_0000, 0x80 | 7 | DATA, 4)  # PS is reserved there
        port, core = started.endpoint, started.engine.core
        assert isinstance(port.write(read_only + 4, b"x", PASID), Fault)
        assert isinstance(port.read(supervisor, 1, PASID), Fault)
        assert isinstance(port.read(0x4000_0000_0000, 1, PASID), Fault)
        assert isinstance(port.write(0x10_0000, b"x", PASID), Fault)
        assert [(event.domain, event.flags, event.address) for event in started.events()] == [
            (PASID, GN | US | PR | PE | RW, read_only + 4),
            (PASID, GN | US | PR | PE, supervisor),
            (PASID, GN | US | PR | RZ, 0x4000_0000_0000),
            (PASID, GN | US | RW, 0x10_0000),
        ]
        # What no port can ask for yet: instruction fetches and privileged requests.
        for access, flags in (
            (Access.READ | Access.EXECUTE, GN | US | NX),
            (Access.READ | Access.PRIVILEGED, GN),
        ):
            fault = core.translate(ENDPOINT, 0x20_0000, access, pasid=PASID)
            assert isinstance(fault, Fault)
            started.iommu.on_fault(fault)
            assert started.events() == [Event(PAGE_FAULT, ENDPOINT, PASID, flags, 0x20_0000)]

    def test_gcr3_entries(self, started: Vm) -> None:
        bound(started)
        started.ram.poke(GCR3 + 8 * 6, struct.pack("<Q", GUEST | 3))  # bit 1 is reserved
        assert reason(started.endpoint.read(ADDRESS, 1, 6)) == Reason.RESERVED_BITS
        assert reason(started.endpoint.write(ADDRESS, b"x", 512)) == Reason.ADDRESS_WIDTH  # one level resolves 9 bits
        started.ram.poke(GCR3 + 8 * 7, struct.pack("<Q", NOWHERE | 1))
        assert isinstance(started.endpoint.read(ADDRESS, 1, 7), Fault)
        slot = NOWHERE + (ADDRESS >> 39 & 0x1FF) * 8
        assert started.events() == [
            Event(PAGE_FAULT, ENDPOINT, 6, GN | US | PR | RZ, ADDRESS),
            Event(PAGE_FAULT, ENDPOINT, 512, GN | US | RW, ADDRESS),
            Event(PAGE_TABLE_ERROR, ENDPOINT, 7, GN | MASTER_ABORT, slot),
        ]

    def test_a_pasid_wider_than_offered(self, started: Vm) -> None:
        """PASmax is 15, though a GCR3 table of three levels could resolve more."""
        gcr3 = Gcr3Table(started.ram, GCR3, 3)
        table = GuestTable(started.ram, GUEST)
        table.map(ADDRESS, DATA)
        for pasid in (0xFFFF, 0x1_0000):
            gcr3.set(pasid, table.root | 1)
        started.set_entry(ENDPOINT, guest_entry(gcr3.root, glx=2, domain=DOMAIN))
        assert isinstance(started.endpoint.read(ADDRESS, 1, 0xFFFF), bytes)
        assert reason(started.endpoint.read(ADDRESS, 1, 0x1_0000)) == Reason.ADDRESS_WIDTH
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 0x1_0000, GN | US, ADDRESS)]

    def test_a_gcr3_table_where_no_memory_is(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, guest_entry(NOWHERE, domain=DOMAIN))
        assert isinstance(started.endpoint.write(ADDRESS, b"x", PASID), Fault)
        assert started.events() == [
            Event(PAGE_TABLE_ERROR, ENDPOINT, PASID, GN | RW | MASTER_ABORT, NOWHERE + 8 * PASID)
        ]

    def test_a_pasid_without_guest_translation(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, device_entry(domain=DOMAIN))
        assert isinstance(started.endpoint.read(DATA, 1), bytes)
        assert reason(started.endpoint.read(DATA, 1, PASID)) == Reason.NO_ROUTE
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, PASID, GN | US, DATA)]
        assert isinstance(started.endpoint.read(DATA, 1), bytes)

    def test_levels_that_are_not_offered(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, guest_entry(GCR3, glx=3, domain=DOMAIN))
        assert reason(started.endpoint.read(ADDRESS, 1, PASID)) == Reason.NO_ROUTE
        assert reason(started.endpoint.write(ADDRESS, b"x")) == Reason.NO_ROUTE
        assert started.events() == [
            Event(ILLEGAL_ENTRY, ENDPOINT, PASID, GN, ADDRESS),
            Event(ILLEGAL_ENTRY, ENDPOINT, 0, RW, ADDRESS),
        ]


class TestInvalidation:
    def cached(self, vm: Vm, pasid: int = PASID) -> list[int]:
        """Four pages, read through a table whose leaves are gone by now."""
        table = bound(vm, pasid)
        pages = [0x10_0000 + n * PAGE for n in range(4)]
        for page in pages:
            table.map(page, DATA)
            assert isinstance(vm.endpoint.read(page, 1, pasid), bytes)
        for page in pages:
            table.set(page, 0)
        return pages

    def readable(self, vm: Vm, pages: list[int]) -> list[bool]:
        found = [isinstance(vm.endpoint.read(page, 1, PASID), bytes) for page in pages]
        vm.events()
        return found

    def test_by_page_range_and_pasid(self, started: Vm) -> None:
        pages = self.cached(started)
        started.submit(invalidate_pages(DOMAIN, pages[0], size=False, pasid=PASID + 1))
        started.submit(invalidate_pages(DOMAIN + 1, ALL_PAGES, size=True, pasid=PASID))
        assert self.readable(started, pages) == [True] * 4
        started.submit(invalidate_pages(DOMAIN, pages[0], size=False, pasid=PASID))
        assert self.readable(started, pages) == [False, True, True, True]
        started.submit(invalidate_pages(DOMAIN, pages[2], size=True, pasid=PASID))  # bit 12 clear: two pages
        assert self.readable(started, pages) == [False, True, False, False]
        started.submit(invalidate_pages(DOMAIN, ALL_PAGES, size=True, pasid=PASID))
        assert self.readable(started, pages) == [False] * 4
        assert started.wait()

    def test_of_all_takes_the_gcr3_entry_with_it(self, started: Vm) -> None:
        bound(started).map(ADDRESS, DATA)
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), bytes)
        other = GuestTable(started.ram, OTHER)
        other.map(ADDRESS, DATA + PAGE)
        started.ram.poke(DATA + PAGE, b"other")
        started.ram.poke(GCR3 + 8 * PASID, struct.pack("<Q", other.root | 1))
        started.submit(invalidate_pages(DOMAIN, ALL_PAGES, size=True, pasid=PASID))
        assert started.endpoint.read(ADDRESS, 5, PASID) == b"other"
        started.ram.poke(GCR3 + 8 * PASID, bytes(8))
        started.submit(invalidate_pages(DOMAIN, ALL_PAGES, size=True, pasid=PASID))
        assert reason(started.endpoint.read(ADDRESS, 5, PASID)) == Reason.NOT_PRESENT

    @pytest.mark.parametrize("command", [invalidate_all(), invalidate_entry(ENDPOINT)])
    def test_by_other_commands(self, started: Vm, command: bytes) -> None:
        pages = self.cached(started)
        started.submit(command)
        assert self.readable(started, pages) == [False] * 4

    @pytest.mark.parametrize("pasid", [0x1_0000, 0xF_FFFF, 512])
    def test_of_a_pasid_that_there_is_not(self, started: Vm, pasid: int) -> None:
        pages = self.cached(started)
        started.submit(invalidate_pages(DOMAIN, ALL_PAGES, size=True, pasid=pasid))
        started.submit(invalidate_pages(DOMAIN, pages[0], size=False, pasid=pasid))
        assert self.readable(started, pages) == [True] * 4
        assert started.wait()
