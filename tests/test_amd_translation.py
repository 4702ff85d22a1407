"""DMA behind the AMD IOMMU: guest tables in real guest memory, walked by the real engine, and the events of faults."""

import os

import pytest
from amd_driver import (
    ALL_PAGES,
    COMMAND_ERROR,
    DATA,
    DATA_ERROR,
    DEVICE_TABLE_ERROR,
    ENDPOINT,
    EVERY_PAGE,
    IOVA,
    MASTER_ABORT,
    MEMORY,
    NOWHERE,
    PAGE_FAULT,
    PAGE_TABLE_ERROR,
    PE,
    PR,
    READ,
    RW,
    RZ,
    SECOND,
    TABLES,
    WRITE,
    Event,
    Gcr3Table,
    GuestTable,
    Vm,
    completion_wait,
    device_entry,
    guest_entry,
    invalidate_all,
    invalidate_entry,
    invalidate_pages,
    prefetch,
    reason,
)
from guest_ram import PAGE

from backend.core import Access, Fault, Reason


class TestTranslation:
    @pytest.mark.parametrize("levels", range(1, 7))
    def test_every_depth(self, started: Vm, levels: int) -> None:
        iova = IOVA & (1 << min(12 + 9 * levels, 64)) - 1
        table = started.translate(levels=levels)
        table.map(iova, DATA + PAGE)
        table.map(iova + PAGE & (1 << 12 + 9 * levels) - 1, DATA)
        assert started.endpoint.write(iova + PAGE - 4, b"abcdEFGH") is None
        assert started.ram.peek(DATA + 2 * PAGE - 4, 4) == b"abcd"
        assert started.ram.peek(DATA, 4) == b"EFGH"
        assert started.endpoint.read(iova + PAGE - 4, 8) == b"abcdEFGH"
        assert started.events() == []

    @pytest.mark.parametrize("levels", range(1, 6))
    def test_an_address_wider_than_the_table(self, started: Vm, levels: int) -> None:
        started.translate(levels=levels)
        iova = 1 << 12 + 9 * levels
        assert reason(started.endpoint.read(iova, 8)) == Reason.ADDRESS_WIDTH
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 7, 0, iova)]

    def test_page_faults(self, started: Vm) -> None:
        table = started.translate(domain=0xABCD)
        table.map(IOVA, DATA, READ)
        table.map(IOVA + PAGE, DATA, WRITE)
        table.set(IOVA + 2 * PAGE, 1 | DATA | READ | WRITE | 1 << 52)  # reserved bit
        table.set(IOVA + 3 * PAGE, 1 | DATA | READ | WRITE | 3 << 9)  # NextLevel 3 below level 1
        table.set(IOVA + 4 * PAGE, 0)
        table.set(0x1_0020_0000, 1 | DATA | PAGE | READ | WRITE, level=2)  # a 2 MiB page at an address of 4 KiB
        port = started.endpoint
        for answer in (
            port.write(IOVA + 8, b"x"),
            port.read(IOVA + PAGE + 16, 1),
            port.read(IOVA + 2 * PAGE, 1),
            port.write(IOVA + 3 * PAGE, b"x"),
            port.read(IOVA + 4 * PAGE, 1),
            port.write(IOVA + 4 * PAGE + 4, b"x"),
            port.read(0x1_0020_0000, 1),
        ):
            assert isinstance(answer, Fault)
        assert [(event.flags, event.address) for event in started.events()] == [
            (PR | PE | RW, IOVA + 8),
            (PR | PE, IOVA + PAGE + 16),
            (PR | RZ, IOVA + 2 * PAGE),
            (PR | RW, IOVA + 3 * PAGE),
            (0, IOVA + 4 * PAGE),
            (RW, IOVA + 4 * PAGE + 4),
            (PR, 0x1_0020_0000),
        ]

    def test_events_name_device_and_domain(self, started: Vm) -> None:
        started.translate(ENDPOINT, domain=1)
        started.translate(SECOND, domain=0xFFFF, base=TABLES + 16 * PAGE)
        started.second.read(IOVA, 1)
        started.endpoint.read(IOVA, 1)
        assert started.events() == [
            Event(PAGE_FAULT, SECOND, 0xFFFF, 0, IOVA),
            Event(PAGE_FAULT, ENDPOINT, 1, 0, IOVA),
        ]

    def test_the_faulting_page_of_a_transfer_is_named_and_nothing_beyond_moves(self, started: Vm) -> None:
        table = started.translate()
        table.map(IOVA, DATA)
        started.ram.poke(DATA + PAGE, b"untouched")
        fault = started.endpoint.write(IOVA + PAGE - 2, b"12345678")
        assert isinstance(fault, Fault)
        assert fault.done == 2
        assert started.ram.peek(DATA + PAGE, 9) == b"untouched"
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 7, RW, IOVA + PAGE)]

    def test_translated_to_where_no_memory_is(self, started: Vm) -> None:
        table = started.translate()
        table.map(IOVA, NOWHERE)
        fault = started.endpoint.read(IOVA, 8)
        assert isinstance(fault, Fault)
        assert (fault.stage, fault.gpa) == (2, NOWHERE)
        assert started.events() == []
        assert started.iommu.aborted == 1

    def test_a_table_where_no_memory_is(self, started: Vm) -> None:
        """Section 2.5.5: the guest's own table leads the walk nowhere, which is the IOMMU's error, not the device's."""
        started.translate(base=NOWHERE)
        fault = started.endpoint.read(IOVA, 8)
        assert isinstance(fault, Fault)
        entry = NOWHERE + 8 * (IOVA >> 39 & 511)
        assert (fault.stage, fault.table, fault.gpa) == (2, True, entry)
        assert started.events() == [Event(PAGE_TABLE_ERROR, ENDPOINT, 7, MASTER_ABORT, entry)]

    def test_unmapped_pages_stay_usable_until_invalidated_and_no_longer(self, started: Vm) -> None:
        table = started.translate()
        for page in range(4):
            table.map(IOVA + page * PAGE, DATA)
            assert isinstance(started.endpoint.read(IOVA + page * PAGE, 1), bytes)
        for page in range(4):
            table.set(IOVA + page * PAGE, 0)
        started.submit(invalidate_pages(7, IOVA, size=False))
        assert isinstance(started.endpoint.read(IOVA, 1), Fault)
        assert IOVA % (2 * PAGE) == PAGE
        started.submit(invalidate_pages(7, IOVA + PAGE, size=True))  # bit 12 clear: two pages
        assert isinstance(started.endpoint.read(IOVA + PAGE, 1), Fault)
        assert isinstance(started.endpoint.read(IOVA + 2 * PAGE, 1), Fault)
        started.submit(invalidate_pages(7, *EVERY_PAGE))
        assert isinstance(started.endpoint.read(IOVA + 3 * PAGE, 1), Fault)

    def test_a_new_mapping_needs_no_invalidation(self, started: Vm) -> None:
        table = started.translate()
        assert isinstance(started.endpoint.read(IOVA, 1), Fault)
        table.map(IOVA, DATA)
        assert isinstance(started.endpoint.read(IOVA, 1), bytes)

    @pytest.mark.parametrize(
        ("domain", "address", "hits"),
        [(2, ALL_PAGES, 1), (1, ALL_PAGES, 0), (1, IOVA + 3 * PAGE, 1), (1, IOVA - PAGE, 0)],
    )
    def test_invalidation_is_by_domain_and_range(self, started: Vm, domain: int, address: int, hits: int) -> None:
        started.translate(ENDPOINT, domain=1).map(IOVA, DATA)
        assert isinstance(started.endpoint.read(IOVA, 1), bytes)
        (ioasid,) = started.iommu.domains.ioasids.values()
        before = started.context.get_info(ioasid).counters.iotlb_hits
        started.submit(invalidate_pages(domain, address, size=True))  # the other three are two pages or all
        assert isinstance(started.endpoint.read(IOVA, 1), bytes)
        assert started.context.get_info(ioasid).counters.iotlb_hits == before + hits

    def test_devices_of_one_domain_share_an_ioasid_which_goes_with_the_last_of_them(self, started: Vm) -> None:
        table = started.translate(ENDPOINT)
        table.map(IOVA, DATA)
        started.set_entry(SECOND, device_entry(table.root, 4, 7))
        assert not started.iommu.domains.ioasids
        assert isinstance(started.endpoint.read(IOVA, 1), bytes)
        assert isinstance(started.second.read(IOVA, 1), bytes)
        (ioasid,) = started.iommu.domains.ioasids.values()
        info = started.context.get_info(ioasid)
        assert (info.root, info.attachments, info.parent) == (table.root, 2, started.stage2)
        started.submit(invalidate_entry(ENDPOINT))
        assert started.context.get_info(ioasid).attachments == 1
        started.submit(invalidate_entry(SECOND))
        assert not started.iommu.domains.ioasids
        assert started.context.get_info(started.stage2).children == 0

    def test_one_domain_id_for_two_tables_keeps_them_apart(self, started: Vm) -> None:
        one = started.translate(ENDPOINT, domain=7)
        two = started.translate(SECOND, domain=7, base=TABLES + 16 * PAGE)
        one.map(IOVA, DATA)
        two.map(IOVA, DATA + PAGE)
        started.ram.poke(DATA, b"one")
        started.ram.poke(DATA + PAGE, b"two")
        assert started.endpoint.read(IOVA, 3) == b"one"
        assert started.second.read(IOVA, 3) == b"two"
        one.set(IOVA, 0)
        two.set(IOVA, 0)
        started.submit(invalidate_pages(7, *EVERY_PAGE))
        assert isinstance(started.endpoint.read(IOVA, 1), Fault)
        assert isinstance(started.second.read(IOVA, 1), Fault)

    def test_a_changed_root_takes_effect_with_the_entry(self, started: Vm) -> None:
        started.ram.poke(DATA, b"old")
        started.ram.poke(DATA + PAGE, b"new")
        started.translate().map(IOVA, DATA)
        assert started.endpoint.read(IOVA, 3) == b"old"
        started.translate(base=TABLES + 16 * PAGE).map(IOVA, DATA + PAGE)
        assert started.endpoint.read(IOVA, 3) == b"new"
        assert len(started.iommu.domains.ioasids) == 1

    def test_the_vm_losing_memory_is_seen_at_once(self, started: Vm) -> None:
        started.translate().map(IOVA, DATA)
        assert isinstance(started.endpoint.read(IOVA, 1), bytes)
        started.context.unmap_dma(started.stage2, 0, MEMORY)
        assert isinstance(started.endpoint.read(IOVA, 1), Fault)

    def test_somebody_else_detaching_a_device_breaks_nothing(self, started: Vm) -> None:
        started.translate().map(IOVA, DATA)
        assert isinstance(started.endpoint.read(IOVA, 1), bytes)
        started.context.detach(ENDPOINT)
        started.context.detach(ENDPOINT)
        assert isinstance(started.endpoint.read(IOVA, 1), bytes)
        started.context.detach(ENDPOINT)
        started.context.detach(ENDPOINT)
        started.context.unbind_device(ENDPOINT)
        started.submit(invalidate_all())
        assert started.wait()
        assert not started.iommu.domains.ioasids

    def test_a_table_that_the_engine_will_not_take(self, started: Vm, caplog: pytest.LogCaptureFixture) -> None:
        started.translate()
        started.context.unbind_device(ENDPOINT)
        assert reason(started.endpoint.read(IOVA, 1)) == Reason.NO_ROUTE
        assert "not bound" in caplog.text
        (found,) = started.events()
        assert (found.code, found.address) == (PAGE_TABLE_ERROR, TABLES)
        assert not started.iommu.domains.ioasids


class TestPrefetch:
    """PREFETCH_IOMMU_PAGES (section 2.4.6): a hint, of which nothing is told."""

    def hits(self, vm: Vm, iovas: list[int], pasid: int | None = None) -> list[bool]:
        """Which of the reads find their translations in the IOTLB."""
        found = []
        for iova in iovas:
            before = vm.engine.core.counters().iotlb_hits
            assert isinstance(vm.endpoint.read(iova, 1, pasid), bytes)
            found.append(vm.engine.core.counters().iotlb_hits > before)
        return found

    def test_pages_in_a_row(self, started: Vm) -> None:
        table = started.translate()
        pages = [IOVA + page * PAGE for page in range(20)]
        for page in pages:
            table.map(page, DATA)
        requests = started.endpoint.counters.requests
        started.submit(prefetch(ENDPOINT, IOVA, 3))
        assert started.endpoint.counters.requests == requests
        assert self.hits(started, pages[:5]) == [True, True, True, False, False]
        started.submit(invalidate_all(), prefetch(ENDPOINT, IOVA, 255))
        assert self.hits(started, pages) == [True] * 16 + [False] * 4

    def test_of_a_pasid(self, started: Vm) -> None:
        gcr3 = Gcr3Table(started.ram, TABLES, 1)
        table = GuestTable(started.ram, TABLES + 16 * PAGE)
        table.map(IOVA, DATA)
        gcr3.set(5, table.root | 1)
        started.set_entry(ENDPOINT, guest_entry(gcr3.root, domain=7))
        started.submit(prefetch(ENDPOINT, IOVA, pasid=5))
        assert table.get(IOVA) & 0x60 == 0x20  # accessed
        assert self.hits(started, [IOVA], 5) == [True]

    def test_anew(self, started: Vm) -> None:
        table = started.translate()
        table.map(IOVA, DATA)
        started.ram.poke(DATA, b"old")
        started.ram.poke(DATA + PAGE, b"new")
        assert started.endpoint.read(IOVA, 3) == b"old"
        table.map(IOVA, DATA + PAGE)
        started.submit(prefetch(ENDPOINT, IOVA))
        assert started.endpoint.read(IOVA, 3) == b"old"
        started.submit(prefetch(ENDPOINT, IOVA, anew=True))
        assert started.endpoint.read(IOVA, 3) == b"new"

    def test_what_is_not_there_is_told_to_nobody(self, started: Vm) -> None:
        table = started.translate()
        table.set(IOVA + PAGE, 1 | DATA | 1 << 52)
        faults = started.engine.core.counters().faults
        started.engine.core.faults()
        started.submit(
            prefetch(ENDPOINT, IOVA, 4),
            prefetch(ENDPOINT, IOVA, 4, pasid=5),
            prefetch(0x1234, IOVA),
            prefetch(ENDPOINT, (1 << 64) - PAGE, 255),
            prefetch(ENDPOINT, 0xFEE0_0000),
        )
        started.set_entry(ENDPOINT, device_entry(TABLES, 7))
        started.submit(prefetch(ENDPOINT, IOVA))
        assert started.wait()
        assert started.events() == []
        assert started.engine.core.faults() == []
        assert started.engine.core.counters().faults == faults


class TestStage2Permission:
    def test_read_only_memory_beneath_a_writable_mapping(self, started: Vm) -> None:
        rom = 0x8000_0000
        started.context.map_dma(started.stage2, rom, started.ram.hva + DATA, PAGE, Access.READ)
        started.translate().map(IOVA, rom)
        assert isinstance(started.endpoint.read(IOVA, 8), bytes)
        fault = started.endpoint.write(IOVA, b"x")
        assert isinstance(fault, Fault)
        assert (fault.stage, fault.reason) == (2, Reason.PERMISSION)
        assert started.events() == []


class TestMemoryTakenAway:
    """The client truncates the memory under a running guest."""

    def test_page_table(self, started: Vm) -> None:
        table = started.translate(base=DATA, levels=2)
        table.map(IOVA & 0x3FFF_F000, DATA)
        os.ftruncate(started.ram.fd, DATA)
        assert reason(started.endpoint.write(IOVA & 0x3FFF_F000, b"x")) == Reason.MEMORY_GONE
        at = DATA + (IOVA >> 21 & 0x1FF) * 8
        assert started.events() == [Event(PAGE_TABLE_ERROR, ENDPOINT, 7, DATA_ERROR | RW, at)]

    def test_data(self, started: Vm) -> None:
        started.translate().map(IOVA, DATA)
        os.ftruncate(started.ram.fd, DATA)
        assert reason(started.endpoint.read(IOVA, 8)) == Reason.MEMORY_GONE
        assert started.events() == []
        assert started.iommu.aborted == 1

    def test_device_table_and_completion(self, started: Vm) -> None:
        started.write(0x00, DATA | 1)
        os.ftruncate(started.ram.fd, DATA)
        assert reason(started.endpoint.read(IOVA, 8)) == Reason.NO_ROUTE
        started.submit(completion_wait(DATA, 1))
        assert started.events() == [
            Event(DEVICE_TABLE_ERROR, ENDPOINT, 0, DATA_ERROR, DATA + ENDPOINT * 32),
            Event(COMMAND_ERROR, 0, 0, DATA_ERROR, DATA),
        ]
