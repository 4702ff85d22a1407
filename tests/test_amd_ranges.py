"""Addresses that the AMD IOMMU does not translate: the interrupt range and the exclusion range."""

import struct

import pytest
from amd_driver import (
    DATA,
    ENDPOINT,
    GN,
    INVALID_REQUEST,
    NOWHERE,
    PAGE_FAULT,
    PE,
    PR,
    READ,
    RW,
    SECOND,
    TABLES,
    WRITE,
    Event,
    Gcr3Table,
    GuestTable,
    PageTable,
    Vm,
    device_entry,
    guest_entry,
    invalidate_all,
)
from guest_ram import PAGE

from backend.core import Access, Fault

MSI = 0xFEE0_0000
"""To 0xFEEF_FFFF (section 2.1.4.2)."""
TR = 1 << 8
TYPE_001, TYPE_101 = 1 << 9, 5 << 9
BASE, LIMIT = 0x20, 0x28
EX_EN, ALLOW = 1, 2
EX = 1 << 39  # bit 103 of an entry


def entry_with_interrupts(control: int, *, valid: bool, low: int = 3 | READ | WRITE) -> bytes:
    """IV 128, IntCtl 189:188."""
    return struct.pack("<4Q", low, 7, valid | control << 60, 0)


class TestInterruptRange:
    """Section 2.1.4: requests there are interrupts, and do not pass through page tables."""

    @pytest.mark.parametrize("address", [MSI, MSI + 0xF_FFF8])
    def test_no_table_leads_there(self, started: Vm, address: int) -> None:
        table = started.translate()
        table.map(address & ~0xFFF, DATA)
        assert isinstance(started.endpoint.read(address, 8), Fault)
        assert isinstance(started.endpoint.load(address, 4), Fault)
        assert isinstance(started.endpoint.fetch_add(address, 1, 4), Fault)
        assert started.events() == [Event(INVALID_REQUEST, ENDPOINT, 0, 0, address)] * 3
        assert isinstance(started.endpoint.write(address, b"\0\0\0\0"), Fault)
        assert started.ram.peek(DATA, PAGE) == bytes(PAGE)
        assert started.events() == []
        assert started.iommu.aborted == 1

    @pytest.mark.parametrize("address", [MSI - PAGE, MSI + 0x10_0000])
    def test_its_neighbours_are_ordinary(self, started: Vm, address: int) -> None:
        started.translate().map(address, DATA)
        assert isinstance(started.endpoint.read(address, 8), bytes)

    @pytest.mark.parametrize(
        ("control", "valid", "blocked"), [(0, True, True), (1, True, False), (2, True, False), (0, False, False)]
    )
    def test_interrupt_control(self, started: Vm, control: int, valid: bool, blocked: bool) -> None:
        started.set_entry(ENDPOINT, entry_with_interrupts(control, valid=valid))
        assert isinstance(started.endpoint.store(MSI + 0x10, 0x41, 4), Fault)
        expected = [Event(INVALID_REQUEST, ENDPOINT, 0, TYPE_101, MSI + 0x10)] if blocked else []
        assert started.events() == expected

    def test_without_v_nothing_is_judged(self, started: Vm) -> None:
        assert isinstance(started.endpoint.read(MSI, 4), Fault)
        assert started.events() == []

    def test_a_translation_request(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, device_entry(high=1 << 32))
        assert started.endpoint.translate(MSI, PAGE, Access.WRITE).translations == ()
        assert started.events() == [Event(INVALID_REQUEST, ENDPOINT, 0, TR | TYPE_001, MSI)]

    def test_a_request_with_a_pasid_is_no_interrupt(self, started: Vm) -> None:
        gcr3 = Gcr3Table(started.ram, TABLES, 1)
        table = GuestTable(started.ram, TABLES + 16 * PAGE)
        table.map(MSI, DATA)
        gcr3.set(5, table.root | 1)
        started.set_entry(ENDPOINT, guest_entry(gcr3.root, domain=9))
        assert isinstance(started.endpoint.read(MSI, 4, 5), bytes)
        assert isinstance(started.endpoint.read(MSI + PAGE, 4, 5), Fault)
        assert [(event.code, event.flags & GN) for event in started.events()] == [(PAGE_FAULT, GN)]


class TestExclusion:
    @pytest.fixture
    def tables(self, started: Vm) -> Vm:
        """Both devices have tables that map three pages from DATA on elsewhere; the first one's entry has EX."""
        started.ram.poke(DATA, b"".join(bytes([number]) * PAGE for number in range(4)))
        table = PageTable(started.ram, TABLES, 4)
        for page in range(4):
            table.map(DATA + page * PAGE, DATA + 3 * PAGE)
        started.set_entry(ENDPOINT, device_entry(table.root, 4, 7, high=EX))
        started.set_entry(SECOND, device_entry(table.root, 4, 7))
        return started

    def seen(self, vm: Vm, device: int = ENDPOINT) -> list[int]:
        """The first byte of each of the four pages."""
        found = []
        for page in range(4):
            answer = vm.engine.devices[device].port.read(DATA + page * PAGE, 1)
            assert isinstance(answer, bytes)
            found.append(answer[0])
        return found

    def test_for_devices_whose_entry_has_ex(self, tables: Vm) -> None:
        assert self.seen(tables) == [3, 3, 3, 3]
        tables.write(LIMIT, DATA + 2 * PAGE)
        tables.write(BASE, DATA + PAGE | EX_EN)  # pages 1 and 2: the limit is the last one
        assert self.seen(tables) == [3, 1, 2, 3]
        assert self.seen(tables, SECOND) == [3, 3, 3, 3]
        found = tables.endpoint.read(DATA + PAGE - 1, 2 * PAGE + 2)
        assert found == b"\3" + b"\1" * PAGE + b"\2" * PAGE + b"\3"
        tables.write(BASE, DATA + PAGE)
        assert self.seen(tables) == [3, 3, 3, 3]

    def test_for_all_devices(self, tables: Vm) -> None:
        tables.write(LIMIT, DATA)
        tables.write(BASE, DATA | EX_EN | ALLOW)
        assert (self.seen(tables), self.seen(tables, SECOND)) == ([0, 3, 3, 3], [0, 3, 3, 3])
        tables.submit(invalidate_all())
        assert self.seen(tables) == [0, 3, 3, 3]

    def test_what_nothing_maps_is_reached_as_well(self, tables: Vm) -> None:
        tables.write(LIMIT, 0x5000)
        tables.write(BASE, 0x5000 | EX_EN)
        assert tables.endpoint.write(0x5000, b"excluded") is None
        assert tables.ram.peek(0x5000, 8) == b"excluded"
        assert isinstance(tables.second.write(0x5000, b"x"), Fault)
        assert [event.device for event in tables.events()] == [SECOND]

    def test_ir_and_iw_hold(self, tables: Vm) -> None:
        tables.write(LIMIT, DATA)
        tables.write(BASE, DATA | EX_EN)
        tables.set_entry(ENDPOINT, device_entry(TABLES, 4, 7, low=3 | READ, high=EX))
        assert isinstance(tables.endpoint.read(DATA, 1), bytes)
        assert isinstance(tables.endpoint.write(DATA, b"x"), Fault)
        assert tables.events() == [Event(PAGE_FAULT, ENDPOINT, 7, PR | PE | RW, DATA)]

    @pytest.mark.parametrize(
        ("base", "limit"),
        [
            (DATA + PAGE, DATA),
            (0x000F_FFFF_FFFF_F000, 0x000F_FFFF_FFFF_F000),
            (0, 0x000F_FFFF_FFFF_F000),
            (NOWHERE, NOWHERE),
        ],
    )
    def test_ranges_that_are_odd(self, tables: Vm, base: int, limit: int) -> None:
        tables.write(LIMIT, limit)
        tables.write(BASE, base | EX_EN)
        whole = base == 0
        assert self.seen(tables) == ([0, 1, 2, 3] if whole else [3, 3, 3, 3])
        assert isinstance(tables.endpoint.read(NOWHERE, 1), Fault)
        assert tables.wait()

    def test_requests_with_a_pasid_are_translated(self, tables: Vm) -> None:
        gcr3 = Gcr3Table(tables.ram, TABLES + 32 * PAGE, 1)
        table = GuestTable(tables.ram, TABLES + 48 * PAGE)
        table.map(DATA, DATA + 3 * PAGE)
        for pasid in (0, 5):
            gcr3.set(pasid, table.root | 1)
        tables.write(LIMIT, DATA)
        tables.write(BASE, DATA | EX_EN)
        tables.set_entry(ENDPOINT, guest_entry(gcr3.root, domain=9, giov=True, high=EX))
        assert tables.endpoint.read(DATA, 1, 5) == b"\3"
        assert tables.endpoint.read(DATA, 1) == b"\0"
