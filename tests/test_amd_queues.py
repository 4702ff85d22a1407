"""The AMD IOMMU's command buffer and event log, driven as a driver does."""

import asyncio
import struct
from collections.abc import Mapping
from typing import Any

import pytest
from amd_driver import (
    ALL_PAGES,
    COM_WAIT_INT,
    COM_WAIT_INT_EN,
    COMMAND_EN,
    COMMAND_ERROR,
    COMMAND_HEAD,
    COMMAND_RUN,
    COMMAND_TAIL,
    COMMANDS,
    DATA,
    DEVICE_TABLE,
    ENDPOINT,
    EVENT_INT,
    EVENT_INT_EN,
    EVENT_LOG_EN,
    EVENT_OVERFLOW,
    EVENT_RUN,
    EVENT_TAIL,
    EVERY_PAGE,
    ILLEGAL_COMMAND,
    IOMMU,
    IOMMU_EN,
    IOVA,
    MASTER_ABORT,
    MEMORY,
    NOWHERE,
    READ,
    SEMAPHORE,
    STATUS,
    TABLES,
    WRITE,
    Event,
    Vm,
    completion_wait,
    device_entry,
    invalidate_device_tlb,
    invalidate_entry,
    invalidate_interrupts,
    invalidate_pages,
    reason,
)
from guest_ram import PAGE

from backend.core import Fault, Reason
from backend.viommu.amd.commands import Opcode
from backend.viommu.amd.event_log import EventCode


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

    async def test_many_commands_by_one_doorbell(self, vm: Vm) -> None:
        vm.start(commands=15)
        many = [completion_wait(SEMAPHORE, number) for number in range(1, 32766)]
        vm.submit(*many)
        assert vm.read(COMMAND_HEAD) < vm.read(COMMAND_TAIL)  # in turns, so that the loop serves others in between
        vm.write(COMMAND_TAIL, vm.read(COMMAND_TAIL))
        assert vm.read(COMMAND_HEAD) < vm.read(COMMAND_TAIL)
        for _ in range(32):
            await asyncio.sleep(0)
        assert vm.ram.peek(SEMAPHORE, 8) == struct.pack("<Q", 32765)
        assert vm.iommu.commands[Opcode.COMPLETION_WAIT] == 32766

    def test_without_a_loop_a_ring_is_done_at_once(self, vm: Vm) -> None:
        vm.start(commands=12)
        vm.submit(*[completion_wait(SEMAPHORE, number) for number in range(1, 2501)])
        assert vm.read(COMMAND_HEAD) == vm.read(COMMAND_TAIL)
        assert vm.ram.peek(SEMAPHORE, 8) == struct.pack("<Q", 2500)

    async def test_what_a_later_turn_raises_is_told_to_the_transport(
        self, vm: Vm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vm.start(commands=12)
        vm.submit(*[completion_wait(SEMAPHORE, number) for number in range(1, 2501)])
        told: list[Mapping[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(vm.iommu.dma, "store", broken)
        vm.iommu.drained()
        for _ in range(2):
            await asyncio.sleep(0)
        assert [type(each["exception"]) for each in told] == [ZeroDivisionError]
        with pytest.raises(ZeroDivisionError):
            vm.iommu.drained()

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
            struct.pack("<QQ", 6 << 60 | ENDPOINT | 1 << 16, 0),  # PREFETCH_IOMMU_PAGES: a reserved bit
            struct.pack("<QQ", 7 << 60 | ENDPOINT, 1 << 42),  # COMPLETE_PPR_REQUEST: between tag and code
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
