"""The AMD IOMMU driven as a driver does: registers and queues in real guest memory, translations by the real engine."""

import os
import struct
from collections.abc import Iterator

import pytest
from amd_driver import (
    ALL_PAGES,
    COM_WAIT_INT,
    COM_WAIT_INT_EN,
    COMMAND_EN,
    COMMAND_HEAD,
    COMMAND_RUN,
    COMMAND_TAIL,
    COMMANDS,
    CONTROL,
    DATA,
    DEVICE_TABLE,
    ENDPOINT,
    EVENT_HEAD,
    EVENT_INT,
    EVENT_INT_EN,
    EVENT_LOG_EN,
    EVENT_OVERFLOW,
    EVENT_RUN,
    EVENT_TAIL,
    EVENTS,
    EVERY_PAGE,
    IOMMU,
    IOMMU_EN,
    MEMORY,
    NOWHERE,
    READ,
    SECOND,
    SEMAPHORE,
    STATUS,
    TABLES,
    WRITE,
    Event,
    PageTable,
    Vm,
    completion_wait,
    device_entry,
    invalidate_all,
    invalidate_device_tlb,
    invalidate_entry,
    invalidate_interrupts,
    invalidate_pages,
)
from guest_ram import PAGE

from backend.core import Access, Fault, Reason
from backend.pci import ResetKind
from backend.viommu.amd.commands import Opcode
from backend.viommu.amd.event_log import EventCode

IOVA = 0x7_1234_5000

ILLEGAL_ENTRY, PAGE_FAULT, DEVICE_TABLE_ERROR, ILLEGAL_COMMAND, COMMAND_ERROR = 1, 2, 3, 5, 6
PR, RW, PE, RZ = 1 << 4, 1 << 5, 1 << 6, 1 << 7
MASTER_ABORT = 1 << 9


@pytest.fixture
def vm() -> Iterator[Vm]:
    vm = Vm()
    yield vm
    vm.close()


@pytest.fixture
def started(vm: Vm) -> Vm:
    vm.start()
    return vm


def reason(answer: bytes | Fault | None) -> Reason:
    assert isinstance(answer, Fault)
    return answer.reason


class TestPciFunction:
    def test_identity(self, vm: Vm) -> None:
        config = vm.iommu.config
        assert config.read(0x00, 4) == 0x1419_1022
        assert config.read(0x08, 4) >> 8 == 0x080600
        assert config.read(0x06, 2) & 0x10  # capability list
        assert config.read(0x34, 1) == 0x40
        assert config.read(0x40, 4) == 0x090B_600F
        assert config.read(0x44, 4) == 1
        assert config.read(0x60, 4) == 0x0080_0005  # MSI, 64-bit, one message, the last capability

    def test_bar_0_is_16_kib_of_32_bit_memory(self, vm: Vm) -> None:
        config = vm.iommu.config
        config.write(0x10, 4, 0xFFFF_FFFF)
        assert config.read(0x10, 4) == 0xFFFF_C000
        config.write(0x14, 4, 0xFFFF_FFFF)
        assert config.read(0x14, 4) == 0

    def test_bus_master_cannot_be_turned_off(self, vm: Vm) -> None:
        vm.iommu.config.write(0x04, 2, 0)
        assert vm.iommu.config.read(0x04, 2) & 4
        assert vm.iommu.bus_master


class TestRegisters:
    def test_reset_values(self, vm: Vm) -> None:
        eight = 8 << 56  # 256 entries
        values = {0x00: 0, 0x08: eight, 0x10: eight, 0x18: 0, 0x30: 0x840, 0x1A0: 0, 0x2020: 0}
        for offset in range(0, 0x4000, 8):
            assert vm.read(offset) == values.get(offset, 0), hex(offset)

    def test_what_software_can_set(self, vm: Vm) -> None:
        masks = {
            0x00: 0x000F_FFFF_FFFF_F1FF,
            0x08: 0x0F0F_FFFF_FFFF_F000,
            0x10: 0x0F0F_FFFF_FFFF_F000,
            0x2000: 0x7FFF0,
            0x2008: 0x7FFF0,
            0x2010: 0x7FFF0,
            0x2018: 0x7FFF0,
        }
        for offset, mask in masks.items():
            vm.write(offset, (1 << 64) - 1)
            assert vm.read(offset) == mask, hex(offset)
        vm.write(0x30, 0)
        assert vm.read(0x30) == 0x840

    def test_control_has_the_bits_of_what_is_offered(self, vm: Vm) -> None:
        vm.write(CONTROL, (1 << 64) - 1)
        # IommuEn, EventLogEn, EventIntEn, ComWaitIntEn, InvTimeOut, PassPW, ResPassPW, Coherent, Isoc, CmdBufEn
        assert vm.read(CONTROL) == 0b1_1111_1111_1101

    def test_status_is_cleared_by_writing_ones(self, vm: Vm) -> None:
        vm.start()
        vm.submit(completion_wait(store=False, interrupt=True))
        assert vm.status == EVENT_RUN | COMMAND_RUN | COM_WAIT_INT
        vm.write(STATUS, 0)
        assert vm.status == EVENT_RUN | COMMAND_RUN | COM_WAIT_INT
        vm.write(STATUS, EVENT_RUN | COMMAND_RUN | COM_WAIT_INT)
        assert vm.status == EVENT_RUN | COMMAND_RUN

    def test_a_register_is_reached_whole_and_by_halves(self, vm: Vm) -> None:
        vm.iommu.bar_write(0, 0x08, 8, 0x0912_3456_789A_B000)
        assert vm.read(0x08) == 0x0902_3456_789A_B000  # 55:52 are reserved
        vm.iommu.bar_write(0, 0x0C, 4, 0x0800_0001)
        assert vm.iommu.bar_read(0, 0x08, 8) == 0x0800_0001_789A_B000

    def test_run_bits_follow_control(self, vm: Vm) -> None:
        vm.control(set_=COMMAND_EN | EVENT_LOG_EN)
        assert vm.status == 0  # nothing runs while the IOMMU is off
        vm.control(set_=IOMMU_EN)
        assert vm.status == EVENT_RUN | COMMAND_RUN
        vm.control(clear=EVENT_LOG_EN)
        assert vm.status == COMMAND_RUN
        vm.control(clear=COMMAND_EN)
        assert vm.status == 0
        vm.control(set_=COMMAND_EN | EVENT_LOG_EN)
        assert vm.status == EVENT_RUN | COMMAND_RUN
        vm.control(clear=IOMMU_EN)
        assert vm.status == 0

    @pytest.mark.parametrize("length", range(8))
    def test_rings_of_a_reserved_length_do_not_run(self, vm: Vm, length: int) -> None:
        vm.set_commands(length)
        vm.set_events(length)
        vm.control(set_=IOMMU_EN | COMMAND_EN | EVENT_LOG_EN)
        assert vm.status == 0
        for pointer in (COMMAND_HEAD, COMMAND_TAIL, EVENT_HEAD, EVENT_TAIL):
            vm.write(pointer, 0x10)
            assert vm.read(pointer) == 0

    @pytest.mark.parametrize("length", [8, 9, 15])
    def test_pointers_stay_within_their_rings(self, vm: Vm, length: int) -> None:
        size = 16 << length
        vm.set_commands(length)
        vm.set_events(length)
        for pointer in (COMMAND_HEAD, COMMAND_TAIL, EVENT_HEAD, EVENT_TAIL):
            vm.write(pointer, size - 16)
            assert vm.read(pointer) == size - 16
            vm.write(pointer, size)
            assert vm.read(pointer) == (size - 16 if size < 0x80000 else 0)  # 512 KiB has no bit in the register
        vm.write(0x08, COMMANDS | 8 << 56)
        vm.write(0x10, EVENTS | 8 << 56)
        for pointer in (COMMAND_HEAD, COMMAND_TAIL, EVENT_HEAD, EVENT_TAIL):
            assert vm.read(pointer) == 0

    def test_a_running_ring_is_not_moved(self, started: Vm) -> None:
        before = {offset: started.read(offset) for offset in (0x08, 0x10, COMMAND_HEAD, EVENT_TAIL)}
        for offset in before:
            started.write(offset, 0x80)
        assert {offset: started.read(offset) for offset in before} == before
        assert started.wait()


class TestStart:
    def test_bypass_until_enabled(self, vm: Vm) -> None:
        vm.ram.poke(DATA, b"firmware")
        assert vm.endpoint.read(DATA, 8) == b"firmware"
        assert vm.endpoint.write(DATA, b"pxe boot") is None
        assert vm.ram.peek(DATA, 8) == b"pxe boot"
        assert reason(vm.endpoint.read(NOWHERE, 8)) == Reason.NOT_PRESENT
        assert vm.iommu.aborted == 0  # not through an IOMMU

    def test_enabling_takes_the_bypass_away_and_disabling_gives_it_back(self, vm: Vm) -> None:
        calls: list[str] = []
        vm.iommu.on_enable = lambda: calls.append("on")
        vm.iommu.on_disable = lambda: calls.append("off")
        assert isinstance(vm.endpoint.read(DATA, 8), bytes)
        vm.ram.poke(DEVICE_TABLE + ENDPOINT * 32, device_entry(low=3))  # IR and IW clear: blocked
        vm.start()
        assert calls == ["on"]
        assert reason(vm.endpoint.read(DATA, 8)) in (Reason.PERMISSION, Reason.BLOCKED)
        vm.control(clear=IOMMU_EN)
        assert calls == ["on", "off"]
        assert vm.iommu.enables == 1
        assert isinstance(vm.endpoint.read(DATA, 8), bytes)

    def test_reset_bypasses(self, started: Vm) -> None:
        calls: list[str] = []
        started.iommu.on_disable = lambda: calls.append("off")
        started.translate()
        assert reason(started.endpoint.read(DATA, 8)) == Reason.NOT_PRESENT
        started.iommu.reset(ResetKind.DEVICE)
        assert calls == ["off"]
        assert started.read(CONTROL) == started.status == 0
        assert isinstance(started.endpoint.read(DATA, 8), bytes)
        assert not started.iommu.domains.ioasids
        started.start()
        assert reason(started.endpoint.read(DATA, 8)) == Reason.NOT_PRESENT

    def test_commands_that_wait_run_when_the_buffer_starts(self, vm: Vm) -> None:
        vm.set_commands(9)
        vm.submit(completion_wait(SEMAPHORE, 0x77))
        assert vm.read(COMMAND_HEAD) == 0
        vm.control(set_=IOMMU_EN | COMMAND_EN)
        assert vm.read(COMMAND_HEAD) == 16
        assert vm.ram.peek(SEMAPHORE, 1) == b"\x77"


class TestDeviceTable:
    def test_v_clear_bypasses(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, device_entry(low=(1 << 64) - 2))
        started.ram.poke(DATA, b"bypassed")
        assert started.endpoint.read(DATA, 8) == b"bypassed"
        assert started.endpoint.write(DATA, b"x") is None

    @pytest.mark.parametrize(
        ("allowed", "can_read", "can_write"), [(0, 0, 0), (READ, 1, 0), (WRITE, 0, 1), (READ | WRITE, 1, 1)]
    )
    @pytest.mark.parametrize("mode", [0, 3])
    def test_ir_and_iw(self, started: Vm, mode: int, allowed: int, can_read: int, can_write: int) -> None:
        table = PageTable(started.ram, TABLES, 3)
        table.map(DATA, DATA)
        started.set_entry(ENDPOINT, device_entry(table.root if mode else 0, mode, 9, low=3 | allowed))
        assert isinstance(started.endpoint.read(DATA, 8), bytes) == bool(can_read)
        assert (started.endpoint.write(DATA + 4, b"x") is None) == bool(can_write)
        denied = [Event(PAGE_FAULT, ENDPOINT, 9, PR | PE, DATA)] if not can_read else []
        denied += [Event(PAGE_FAULT, ENDPOINT, 9, PR | PE | RW, DATA + 4)] if not can_write else []
        assert started.events() == denied

    def test_tv_clear_is_a_page_fault(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, device_entry(0, 0, 3, low=1 | READ | WRITE))
        assert reason(started.endpoint.write(DATA, b"x")) == Reason.NO_ROUTE
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 3, RW, DATA)]

    def test_mode_7_is_illegal(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, device_entry(TABLES, 7, 3))
        assert reason(started.endpoint.read(IOVA, 1)) == Reason.NO_ROUTE
        assert started.events() == [Event(ILLEGAL_ENTRY, ENDPOINT, 0, 0, IOVA)]

    @pytest.mark.parametrize(("low", "high"), [(1 << 55, 0), (1 << 63, 0), (1 << 2, 0), (0, 1 << 42), (1 << 7, 0)])
    def test_reserved_bits_and_features_not_offered_are_illegal(self, started: Vm, low: int, high: int) -> None:
        started.set_entry(ENDPOINT, device_entry(TABLES, 4, 3, low=3 | READ | WRITE | low, high=high))
        assert reason(started.endpoint.write(IOVA, b"x")) == Reason.NO_ROUTE
        assert started.events() == [Event(ILLEGAL_ENTRY, ENDPOINT, 0, RZ | RW, IOVA)]

    def test_device_beyond_the_table(self, vm: Vm) -> None:
        vm.write(0x00, NOWHERE)
        vm.start(pages=1)
        assert isinstance(vm.endpoint.read(DATA, 8), bytes)  # 128 entries hold 00:03.0
        vm.iommu.endpoints |= {0x80}
        vm.engine.add_device(0x80, "far")
        vm.context.bind_device(0x80)
        assert reason(vm.engine.devices[0x80].port.read(IOVA, 8)) == Reason.NO_ROUTE
        assert vm.events() == [Event(PAGE_FAULT, 0x80, 0, 0, IOVA)]

    def test_table_outside_memory(self, vm: Vm) -> None:
        vm.start()
        vm.write(0x00, NOWHERE | 1)
        assert reason(vm.endpoint.write(IOVA, b"x")) == Reason.NO_ROUTE
        assert vm.events() == [Event(DEVICE_TABLE_ERROR, ENDPOINT, 0, RW | MASTER_ABORT, NOWHERE + ENDPOINT * 32)]

    def test_entries_are_cached_until_invalidated(self, started: Vm) -> None:
        refused, passing = device_entry(low=3), device_entry()
        started.set_entry(ENDPOINT, refused)
        assert isinstance(started.endpoint.read(DATA, 8), Fault)
        started.set_entry(ENDPOINT, passing, flush=False)
        assert isinstance(started.endpoint.read(DATA, 8), Fault)
        started.submit(invalidate_entry(SECOND))
        assert isinstance(started.endpoint.read(DATA, 8), Fault)
        started.submit(invalidate_entry(ENDPOINT))
        assert isinstance(started.endpoint.read(DATA, 8), bytes)
        started.set_entry(ENDPOINT, refused, flush=False)
        assert isinstance(started.endpoint.read(DATA, 8), bytes)
        started.submit(invalidate_all())
        assert isinstance(started.endpoint.read(DATA, 8), Fault)

    def test_requests_with_a_pasid_are_refused(self, started: Vm) -> None:
        started.translate()
        assert reason(started.endpoint.read(DATA, 8, 0x12345)) == Reason.NO_ROUTE
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 0x12345, 1, DATA)]  # GN
        assert not started.iommu.domains.ioasids

    def test_a_device_of_nobody_is_left_alone(self, started: Vm) -> None:
        started.engine.add_device(0x28, "stranger")
        started.context.bind_device(0x28)
        assert reason(started.engine.devices[0x28].port.read(DATA, 8)) == Reason.NO_ROUTE
        assert started.events() == []
        assert started.iommu.aborted == 0


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
        assert (found.code, found.address) == (4, TABLES)  # PAGE_TAB_HARDWARE_ERROR at the root
        assert not started.iommu.domains.ioasids


class TestCommands:
    def test_completion_wait_stores_and_interrupts(self, started: Vm) -> None:
        started.submit(completion_wait(SEMAPHORE + 8, 0x1122_3344_5566_7788))
        assert started.ram.peek(SEMAPHORE + 8, 8) == struct.pack("<Q", 0x1122_3344_5566_7788)
        assert started.interrupts == 0
        started.submit(completion_wait(store=False, interrupt=True))
        assert (started.interrupts, started.status & COM_WAIT_INT) == (0, COM_WAIT_INT)
        started.control(set_=COM_WAIT_INT_EN)
        assert started.interrupts == 1
        started.submit(completion_wait(SEMAPHORE, 3, interrupt=True))
        assert started.interrupts == 1  # software has not cleared the first
        started.write(STATUS, COM_WAIT_INT)
        started.submit(completion_wait(SEMAPHORE, 4, interrupt=True))
        assert started.interrupts == 2

    def test_the_head_follows_around_the_ring(self, vm: Vm) -> None:
        vm.start(commands=8)
        for _ in range(600):
            assert vm.wait()
            assert vm.read(COMMAND_HEAD) == vm.read(COMMAND_TAIL)
        assert vm.read(COMMAND_HEAD) == 16 * (602 % 256)

    def test_many_commands_by_one_doorbell(self, vm: Vm) -> None:
        vm.start(commands=15)
        many = [completion_wait(SEMAPHORE, number) for number in range(1, 32766)]
        vm.submit(*many)
        assert vm.ram.peek(SEMAPHORE, 8) == struct.pack("<Q", 32765)
        assert vm.iommu.commands[Opcode.COMPLETION_WAIT] == 32766

    def test_counts(self, started: Vm) -> None:
        started.submit(
            invalidate_device_tlb(ENDPOINT, 0x5000),
            invalidate_device_tlb(0xFFFF, ALL_PAGES),
            invalidate_interrupts(ENDPOINT),
            invalidate_entry(0xFFFF),
            invalidate_pages(0xFFFF, *EVERY_PAGE),
        )
        assert started.iommu.commands == {
            Opcode.INVALIDATE_IOMMU_ALL: 1,
            Opcode.COMPLETION_WAIT: 1,
            Opcode.INVALIDATE_IOTLB_PAGES: 2,
            Opcode.INVALIDATE_INTERRUPT_TABLE: 1,
            Opcode.INVALIDATE_DEVTAB_ENTRY: 1,
            Opcode.INVALIDATE_IOMMU_PAGES: 1,
        }
        assert started.events() == []

    @pytest.mark.parametrize(
        "bad",
        [
            struct.pack("<QQ", 0, 0),
            struct.pack("<QQ", 6 << 60 | ENDPOINT, 0),  # PREFETCH_IOMMU_PAGES: PreFSup is clear
            struct.pack("<QQ", 7 << 60 | ENDPOINT, 0),  # COMPLETE_PPR_REQUEST: PPRSup is clear
            struct.pack("<QQ", 3 << 60 | 7 << 32 | 5, ALL_PAGES | 7),  # a PASID and GN: GTSup is clear
            struct.pack("<QQ", 15 << 60, 0),
            struct.pack("<QQ", 8 << 60 | 1, 0),
        ],
    )
    def test_an_illegal_command_halts_the_buffer(self, started: Vm, bad: bytes) -> None:
        at = started.read(COMMAND_TAIL)
        started.submit(completion_wait(SEMAPHORE, 100), bad, completion_wait(SEMAPHORE, 200))
        assert started.ram.peek(SEMAPHORE, 1) == b"\x64"
        assert started.status == EVENT_RUN | EVENT_INT
        assert started.read(COMMAND_HEAD) == at + 16
        assert started.interrupts == 1
        assert started.events() == [Event(ILLEGAL_COMMAND, 0, 0, 0, COMMANDS + at + 16)]
        # A doorbell does not start it again, CmdBufEn going 0 to 1 does; the head may be moved meanwhile.
        started.write(COMMAND_TAIL, started.read(COMMAND_TAIL))
        started.control(set_=COMMAND_EN)
        assert not started.status & COMMAND_RUN
        assert started.events() == []
        started.control(clear=COMMAND_EN)
        started.write(COMMAND_HEAD, at + 32)
        started.control(set_=COMMAND_EN)
        assert started.ram.peek(SEMAPHORE, 1) == b"\xc8"
        assert started.wait()

    def test_restart_as_linux_does(self, started: Vm) -> None:
        started.submit(struct.pack("<QQ", 0, 0))
        started.control(clear=COMMAND_EN)
        started.write(COMMAND_HEAD, 0)
        started.write(COMMAND_TAIL, 0)
        started.control(set_=COMMAND_EN)
        assert started.wait()

    def test_a_buffer_outside_memory(self, vm: Vm) -> None:
        vm.set_commands(9, NOWHERE)
        vm.set_events(9)
        vm.control(set_=IOMMU_EN | COMMAND_EN | EVENT_LOG_EN)
        vm.write(COMMAND_TAIL, 0x20)
        assert vm.status == EVENT_RUN | EVENT_INT
        assert vm.read(COMMAND_HEAD) == 0
        assert vm.events() == [Event(COMMAND_ERROR, 0, 0, MASTER_ABORT, NOWHERE)]

    def test_a_buffer_that_leaves_memory(self, vm: Vm) -> None:
        vm.start()
        vm.control(clear=COMMAND_EN)
        vm.set_commands(9, MEMORY - PAGE)
        vm.ram.poke(MEMORY - PAGE, completion_wait(SEMAPHORE, 9) * 256)
        vm.control(set_=COMMAND_EN)
        vm.write(COMMAND_TAIL, PAGE + 16)
        assert vm.read(COMMAND_HEAD) == PAGE
        assert vm.ram.peek(SEMAPHORE, 1) == b"\x09"
        assert vm.events() == [Event(COMMAND_ERROR, 0, 0, MASTER_ABORT, MEMORY)]

    def test_a_completion_that_cannot_be_stored(self, started: Vm) -> None:
        at = started.read(COMMAND_TAIL)
        started.submit(completion_wait(NOWHERE, 1), completion_wait(SEMAPHORE, 0x55))
        assert started.read(COMMAND_HEAD) == at
        assert not started.status & COMMAND_RUN
        assert started.ram.peek(SEMAPHORE, 1) != b"\x55"
        assert started.events() == [Event(COMMAND_ERROR, 0, 0, MASTER_ABORT, NOWHERE)]


class TestEventLog:
    def fault(self, vm: Vm, count: int = 1) -> None:
        for _ in range(count):
            assert isinstance(vm.endpoint.read(IOVA, 1), Fault)

    def test_an_event_interrupts_once_until_cleared(self, started: Vm) -> None:
        started.translate()
        self.fault(started, 3)
        assert (started.interrupts, started.read(EVENT_TAIL)) == (1, 48)
        assert len(started.events()) == 3
        self.fault(started)
        assert started.interrupts == 2

    def test_enabling_the_interrupt_late(self, started: Vm) -> None:
        started.control(clear=EVENT_INT_EN)
        started.translate()
        self.fault(started)
        assert (started.interrupts, started.status & EVENT_INT) == (0, EVENT_INT)
        started.control(set_=EVENT_INT_EN)
        assert started.interrupts == 1

    def test_an_interrupt_before_msi_is_enabled_comes_then(self, vm: Vm) -> None:
        vm.set_events(9)
        vm.control(set_=IOMMU_EN | EVENT_LOG_EN | EVENT_INT_EN)
        vm.ram.poke(DEVICE_TABLE + ENDPOINT * 32, device_entry(low=3))
        self.fault(vm)
        assert vm.interrupts == 0
        vm.enable_msi()
        assert vm.interrupts == 1

    def test_overflow_stops_the_log_until_it_is_restarted(self, vm: Vm) -> None:
        vm.start(events=8)
        vm.translate()
        self.fault(vm, 255)
        assert vm.status == EVENT_RUN | COMMAND_RUN | EVENT_INT
        assert vm.read(EVENT_TAIL) == 255 * 16
        before = vm.interrupts
        self.fault(vm)
        assert vm.status == COMMAND_RUN | EVENT_INT | EVENT_OVERFLOW
        assert vm.interrupts == before + 1
        self.fault(vm, 5)
        assert vm.read(EVENT_TAIL) == 255 * 16
        assert vm.iommu.event_log.lost == {EventCode.IO_PAGE_FAULT: 6}
        assert vm.iommu.event_log.logged == {EventCode.IO_PAGE_FAULT: 255}
        assert len(vm.events()) == 255
        self.fault(vm)  # room, but not restarted
        assert vm.events() == []
        # As Linux restarts it.
        vm.control(clear=EVENT_INT_EN)
        vm.control(clear=EVENT_LOG_EN)
        vm.write(STATUS, EVENT_OVERFLOW)
        vm.control(set_=EVENT_INT_EN)
        vm.control(set_=EVENT_LOG_EN)
        assert vm.status == EVENT_RUN | COMMAND_RUN
        self.fault(vm, 2)
        assert len(vm.events()) == 2
        assert vm.read(EVENT_TAIL) == 16  # around the end

    def test_a_log_whose_overflow_is_not_cleared_takes_nothing(self, vm: Vm) -> None:
        vm.start(events=8)
        vm.translate()
        self.fault(vm, 256)
        assert len(vm.events()) == 255
        vm.control(clear=EVENT_LOG_EN)
        vm.control(set_=EVENT_LOG_EN)
        self.fault(vm)
        assert vm.events() == []
        vm.write(STATUS, EVENT_OVERFLOW)
        self.fault(vm)
        assert len(vm.events()) == 1

    def test_a_log_outside_memory_stops(self, vm: Vm) -> None:
        vm.start()
        vm.control(clear=EVENT_LOG_EN)
        vm.set_events(9, NOWHERE)
        vm.control(set_=EVENT_LOG_EN)
        vm.translate()
        self.fault(vm, 2)
        assert (vm.status, vm.read(EVENT_TAIL), vm.interrupts) == (COMMAND_RUN, 0, 0)
        assert vm.iommu.event_log.lost[EventCode.IO_PAGE_FAULT] == 2
        assert vm.wait()

    def test_nothing_is_logged_while_the_log_is_off(self, started: Vm) -> None:
        started.control(clear=EVENT_LOG_EN)
        started.translate()
        self.fault(started)
        assert (started.read(EVENT_TAIL), started.interrupts) == (0, 0)

    @pytest.mark.parametrize("entry_fault", [False, True])
    def test_suppression(self, started: Vm, entry_fault: bool) -> None:
        low = (1 if entry_fault else 3) | READ | WRITE
        started.ram.poke(TABLES, bytes(PAGE))
        started.set_entry(ENDPOINT, device_entry(TABLES, 4, 5, low=low, high=1 << 33))  # SE
        self.fault(started, 3)
        assert len(started.events()) == 1
        started.submit(invalidate_entry(ENDPOINT))
        self.fault(started, 3)
        assert len(started.events()) == 1
        started.set_entry(ENDPOINT, device_entry(TABLES, 4, 5, low=low, high=1 << 34))  # SA
        self.fault(started, 3)
        assert started.events() == []

    def test_illegal_entries_are_not_suppressed(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, device_entry(TABLES, 7, high=3 << 33))
        self.fault(started, 2)
        assert len(started.events()) == 2

    def test_a_request_that_no_bus_carries_is_none(self, started: Vm) -> None:
        started.translate().map(IOVA, DATA)
        assert reason(started.endpoint.store(IOVA + 1, 0, 8)) == Reason.MISALIGNED
        assert started.events() == []

    def test_the_iommu_own_faults_are_no_events_of_a_device(self, started: Vm) -> None:
        assert isinstance(started.iommu.dma.read(NOWHERE, 8), Fault)
        assert started.iommu.rid == IOMMU
        assert started.events() == []
        assert started.iommu.aborted == 0


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

    GONE = 3 << 9  # Type 11 of a hardware error

    def test_page_table(self, started: Vm) -> None:
        table = started.translate(base=DATA, levels=2)
        table.map(IOVA & 0x3FFF_F000, DATA)
        os.ftruncate(started.ram.fd, DATA)
        assert reason(started.endpoint.write(IOVA & 0x3FFF_F000, b"x")) == Reason.MEMORY_GONE
        at = DATA + (IOVA >> 21 & 0x1FF) * 8
        assert started.events() == [Event(4, ENDPOINT, 7, self.GONE | RW, at)]

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
            Event(DEVICE_TABLE_ERROR, ENDPOINT, 0, self.GONE, DATA + ENDPOINT * 32),
            Event(COMMAND_ERROR, 0, 0, self.GONE, DATA),
        ]
