"""The AMD IOMMU as a PCI function: registers, start and reset, the device table; driven as a driver does."""


import pytest
from amd_driver import (
    COM_WAIT_INT,
    COMMAND_EN,
    COMMAND_HEAD,
    COMMAND_RUN,
    COMMAND_TAIL,
    COMMANDS,
    CONTROL,
    DATA,
    DEVICE_TABLE,
    DEVICE_TABLE_ERROR,
    ENDPOINT,
    EVENT_HEAD,
    EVENT_LOG_EN,
    EVENT_RUN,
    EVENT_TAIL,
    EVENTS,
    GN,
    ILLEGAL_ENTRY,
    IOMMU_EN,
    IOVA,
    MASTER_ABORT,
    NOWHERE,
    OFFERED,
    PAGE_FAULT,
    PE,
    PR,
    READ,
    RW,
    RZ,
    SECOND,
    SEMAPHORE,
    STATUS,
    TABLES,
    US,
    WRITE,
    Event,
    PageTable,
    Vm,
    completion_wait,
    device_entry,
    invalidate_all,
    invalidate_entry,
    reason,
)

from backend.core import Fault, Reason
from backend.pci import ResetKind


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
        values = {0x00: 0, 0x08: eight, 0x10: eight, 0x38: eight, 0x18: 0, 0x30: OFFERED, 0x1A0: 0, 0x2020: 0}
        for offset in range(0, 0x4000, 8):
            assert vm.read(offset) == values.get(offset, 0), hex(offset)

    def test_what_software_can_set(self, vm: Vm) -> None:
        masks = {
            0x00: 0x000F_FFFF_FFFF_F1FF,
            0x08: 0x0F0F_FFFF_FFFF_F000,
            0x10: 0x0F0F_FFFF_FFFF_F000,
            0x20: 0x000F_FFFF_FFFF_F003,
            0x28: 0x000F_FFFF_FFFF_F000,
            0x38: 0x0F0F_FFFF_FFFF_F000,
            0x2000: 0x7FFF0,
            0x2008: 0x7FFF0,
            0x2010: 0x7FFF0,
            0x2018: 0x7FFF0,
            0x2030: 0x7FFF0,
            0x2038: 0x7FFF0,
        }
        for offset, mask in masks.items():
            vm.write(offset, (1 << 64) - 1)
            assert vm.read(offset) == mask, hex(offset)
        vm.write(0x30, 0)
        assert vm.read(0x30) == OFFERED

    def test_control_has_the_bits_of_what_is_offered(self, vm: Vm) -> None:
        vm.write(CONTROL, (1 << 64) - 1)
        # IommuEn, EventLogEn, EventIntEn, ComWaitIntEn, InvTimeOut, PassPW, ResPassPW, Coherent, Isoc, CmdBufEn,
        # PPRLogEn, PPRIntEn, PPREn, GTEn, GAEn, EPHEn, HADUpdate
        assert vm.read(CONTROL) == 0b1_1111_1111_1101 | 0b1_1111 << 13 | 0b111 << 45

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

    @pytest.mark.parametrize(("low", "high"), [(1 << 3, 0), (1 << 63, 0), (1 << 2, 0), (0, 1 << 42), (2 << 7, 0)])
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
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 0x12345, GN | US, DATA)]
        assert not started.iommu.domains.ioasids

    def test_a_device_of_nobody_is_left_alone(self, started: Vm) -> None:
        started.engine.add_device(0x28, "stranger")
        started.context.bind_device(0x28)
        assert reason(started.engine.devices[0x28].port.read(DATA, 8)) == Reason.NO_ROUTE
        assert started.events() == []
        assert started.iommu.aborted == 0
