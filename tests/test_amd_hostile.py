"""The AMD IOMMU against a guest that means harm: nothing it writes raises, grows without bound, or outlives a reset."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from amd_driver import (
    COMMAND_HEAD,
    COMMAND_RUN,
    COMMAND_TAIL,
    COMMANDS,
    CONTROL,
    DATA,
    DEVICE_TABLE,
    ENDPOINT,
    EVENT_HEAD,
    EVENT_RUN,
    EVENT_TAIL,
    EVENTS,
    IOMMU_EN,
    MEMORY,
    NOWHERE,
    PPR_HEAD,
    PPR_RUN,
    PPR_TAIL,
    READ,
    SECOND,
    SEMAPHORE,
    TABLES,
    WRITE,
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
    prefetch,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.core import Access, Fault
from backend.ioasid import PageResponse
from backend.pci import ResetKind

words = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 1, (1 << 64) - 1, NOWHERE, MEMORY - 16, MEMORY, COMMANDS | 8 << 56, EVENTS | 15 << 56]),
    st.integers(0, 1 << 13),
    st.integers(0, 0x80000),
)
registers = st.one_of(
    st.sampled_from([0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x38, 0x1A]),
    st.sampled_from([0x2000, 0x2008, 0x2010, 0x2018, 0x2020, 0x2030, 0x2038]),
    st.integers(0, 0x3FF8),
)
register_writes = st.tuples(st.just("register"), registers, st.sampled_from([1, 2, 4, 8]), words)
commands = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.builds(
        lambda opcode, low, high: struct.pack("<QQ", opcode << 60 | low, high),
        st.integers(0, 15),
        st.one_of(
            st.integers(0, (1 << 60) - 1), st.integers(0, 0xFFFF), st.builds(lambda d: d << 32, st.integers(0, 9))
        ),
        words,
    ),
    st.sampled_from(
        [
            completion_wait(SEMAPHORE, 1),
            invalidate_all(),
            invalidate_entry(ENDPOINT),
            invalidate_entry(SECOND),
            invalidate_pages(7, 0x7FFF_FFFF_FFFF_F000, size=True),
            invalidate_pages(7, 0x7FFF_FFFF_FFFF_F000, size=True, pasid=5),
            invalidate_device_tlb(ENDPOINT, 0x5000),
            invalidate_device_tlb(ENDPOINT, 0x5000, pasid=5),
            complete_ppr(ENDPOINT, 1),
            prefetch(ENDPOINT, 0x5000, 255),
            prefetch(SECOND, 0xFFFF_FFFF_FFFF_F001, 255, pasid=5, anew=True),
            complete_ppr(SECOND, 2, 1),
        ]
    ),
)
submissions = st.tuples(st.just("commands"), st.lists(commands, min_size=1, max_size=4), st.just(0), st.just(0))
entries = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.builds(
        device_entry,
        st.sampled_from([0, TABLES, NOWHERE, MEMORY - 0x1000, 0x000F_FFFF_FFFF_F000]),
        st.integers(0, 7),
        st.integers(0, 9),
        low=st.sampled_from([0, 1, 3, 3 | READ, 3 | READ | WRITE, 3 | READ | WRITE | 1 << 52]),
        high=st.sampled_from([0, 1 << 32]),
    ),
    st.builds(
        guest_entry,
        st.sampled_from([0, TABLES, NOWHERE, MEMORY - 0x1000, 0x000F_FFFF_FFFF_F000]),
        glx=st.integers(0, 3),
        giov=st.booleans(),
        five=st.booleans(),
        domain=st.integers(6, 8),
        mode=st.sampled_from([0, 0, 4, 7]),
        low=st.sampled_from([3 | READ | WRITE, 3 | READ | WRITE | 1 << 52]),
        high=st.sampled_from([0, 1 << 32]),
    ),
)
entry_writes = st.tuples(st.just("entry"), st.sampled_from([ENDPOINT, SECOND]), entries, st.just(0))
table_writes = st.tuples(st.just("table"), st.integers(0, 0x3FF), words, st.just(0))
requests = st.tuples(
    st.sampled_from(["read", "write", "translate", "translated"]),
    st.sampled_from([ENDPOINT, SECOND]),
    st.sampled_from([None, None, 0, 5, 0x1_0000]),
    words,
)
page_requests = st.tuples(
    st.just("ask"), st.sampled_from([ENDPOINT, SECOND]), st.sampled_from([None, 5]), st.integers(0, 3)
)
answers = st.tuples(st.just("answer"), st.integers(0, 9), st.just(0), st.just(0))
times = st.tuples(st.just("time"), st.sampled_from([0.001, 1.0, 100.0]), st.just(0), st.just(0))
resets = st.tuples(st.just("reset"), st.sampled_from(ResetKind), st.just(0), st.just(0))
actions = st.lists(
    st.one_of(
        register_writes,
        submissions,
        submissions,
        entry_writes,
        table_writes,
        requests,
        requests,
        page_requests,
        answers,
        times,
        resets,
    ),
    max_size=40,
)


class Machine(Vm):
    """A VM whose endpoints keep translations, and ask for pages."""

    def __init__(self) -> None:
        super().__init__()
        self.tlb = Tlb()
        for rid in (ENDPOINT, SECOND):
            self.engine.set_tlb(self.engine.devices[rid], self.tlb)
        self.asked = 0
        self.answers: list[PageResponse] = []


@contextmanager
def machine() -> Iterator[Machine]:
    vm = Machine()
    try:
        yield vm
    finally:
        vm.close()


def act(vm: Machine, action: tuple[object, ...]) -> None:
    match action:
        case ("register", int(offset), int(size), int(value)):
            vm.iommu.bar_write(0, offset, size, value & (1 << 8 * size) - 1)
        case ("commands", list(batch), _, _):
            tail = vm.read(COMMAND_TAIL)
            size = 16 << (vm.read(0x08) >> 56 & 0xF)
            base = vm.read(0x08) & 0x000F_FFFF_FFFF_F000
            for command in batch:
                if base + tail + 16 <= MEMORY:
                    vm.ram.poke(base + tail, command)
                tail = (tail + 16) % size
            vm.write(COMMAND_TAIL, tail)
        case ("entry", int(device), bytes(raw), _):
            vm.ram.poke(DEVICE_TABLE + device * 32, raw)
        case ("table", int(slot), int(value), _):
            vm.ram.poke(TABLES + slot * 8, struct.pack("<Q", value))
        case ("read", int(device), None | int() as pasid, int(iova)):
            vm.engine.devices[device].port.read(iova, 64, pasid)
        case ("write", int(device), None | int() as pasid, int(iova)):
            vm.engine.devices[device].port.write(iova, b"0123456789abcdef", pasid)
        case ("translate", int(device), None | int() as pasid, int(iova)):
            vm.engine.devices[device].port.translate(iova, 64, Access.READ | Access.WRITE, pasid)
        case ("translated", int(device), _, int(iova)):
            vm.engine.devices[device].port.translated.read(iova, 64)
        case ("ask", int(device), None | int() as pasid, int(group)):
            vm.asked += 1
            vm.engine.devices[device].page_request(
                pasid, 0x5000, Access.READ, group=group, last=group > 0, answer=vm.answers.append
            )
        case ("answer", int(number), _, _):
            if vm.tlb.unanswered:
                vm.tlb.unanswered.pop(number % len(vm.tlb.unanswered))()
        case ("time", float(seconds), _, _):
            vm.timers.advance(seconds)
        case ("reset", ResetKind() as kind, _, _):
            vm.iommu.reset(kind)
        case _:
            raise AssertionError(action)


def check(vm: Machine) -> None:
    """What holds at any time."""
    for base, pointers, run in (
        (0x08, (COMMAND_HEAD, COMMAND_TAIL), COMMAND_RUN),
        (0x10, (EVENT_HEAD, EVENT_TAIL), EVENT_RUN),
        (0x38, (PPR_HEAD, PPR_TAIL), PPR_RUN),
    ):
        length = vm.read(base) >> 56
        size = 16 << length if length >= 8 else 0
        for pointer in pointers:
            assert vm.read(pointer) < max(size, 1)
            assert vm.read(pointer) % 16 == 0
        if vm.status & run:
            assert size
            assert vm.read(CONTROL) & IOMMU_EN
    if vm.status & COMMAND_RUN and not vm.iommu.device_tlbs.waiting:
        assert vm.read(COMMAND_HEAD) == vm.read(COMMAND_TAIL)
    ioasids = vm.iommu.domains.ioasids.values()
    assert len(ioasids) <= 4  # a host table and a GCR3 table of each endpoint's
    beneath = [ioasid for ioasid in ioasids if vm.context.get_info(ioasid).parent == vm.stage2]
    assert vm.context.get_info(vm.stage2).children == len(beneath)
    assert len(vm.timers.waiting) <= 2 * 32
    assert len(vm.answers) <= vm.asked


@settings(max_examples=150, deadline=None)
@given(actions)
def test_any_sequence_of_accesses(sequence: list[tuple[object, ...]]) -> None:
    with machine() as vm:
        vm.start()
        for action in sequence:
            act(vm, action)
            check(vm)
            vm.tlb.take()
        # The next guest finds the IOMMU as new, and a good driver is served.
        vm.iommu.reset(ResetKind.LOST_CONNECTION)
        vm.ram.poke(DATA, b"good")
        assert vm.endpoint.read(DATA, 4) == b"good"
        vm.ram.poke(DEVICE_TABLE, bytes(0x2000))
        vm.start()
        table = vm.translate()
        table.map(0x5000, DATA)
        assert vm.endpoint.read(0x5000, 4) == b"good"
        assert isinstance(vm.endpoint.read(0x6000, 4), Fault)
        assert [event.address for event in vm.events()] == [0x6000]


@settings(max_examples=100, deadline=None)
@given(st.lists(commands, min_size=1, max_size=8))
def test_any_commands(batch: list[bytes]) -> None:
    with machine() as vm:
        vm.start()
        vm.submit(*batch)
        check(vm)
        while vm.tlb.unanswered:
            vm.tlb.unanswered.pop()()
        assert not vm.iommu.device_tlbs.waiting
        check(vm)
        events = vm.events()
        if vm.status & COMMAND_RUN:
            assert events == []
        else:
            (event,) = events
            assert event.code in (5, 6)  # ILLEGAL_COMMAND_ERROR, COMMAND_HARDWARE_ERROR
            if event.code == 5:
                assert event.address == COMMANDS + vm.read(COMMAND_HEAD)
        assert isinstance(vm.endpoint.read(DATA, 4), bytes)  # its entry is all zeros: V clear


def test_tails_that_jump() -> None:
    """A tail anywhere in the ring is at most one round of commands; what stands there is judged as any command is."""
    with machine() as vm:
        vm.start(commands=8)
        vm.ram.poke(COMMANDS, completion_wait(SEMAPHORE, 5) * 256)
        done = vm.iommu.commands.total()
        head = vm.read(COMMAND_HEAD)
        vm.write(COMMAND_TAIL, (head - 16) % 4096)  # as far as it goes
        assert vm.iommu.commands.total() == done + 255
        vm.write(COMMAND_TAIL, head)
        assert vm.iommu.commands.total() == done + 256
        for beyond in (4096, 8192, 0x7FFF0):
            vm.write(COMMAND_TAIL, beyond)
            assert vm.read(COMMAND_TAIL) == head
        assert vm.wait()


def test_the_largest_device_table_and_log() -> None:
    with machine() as vm:
        vm.start(pages=512, events=15)
        vm.iommu.endpoints |= {0x7FFF, 0xFFFF}
        for rid in (0x7FFF, 0xFFFF):
            vm.engine.add_device(rid, f"{rid:x}")
            vm.context.bind_device(rid)
        # 00:03.0 bypasses; the entry of 0x7FFF lies where the command ring is, that of 0xFFFF in the event log.
        vm.ram.poke(0x7FFF * 32, device_entry(low=1))
        assert isinstance(vm.engine.devices[0x7FFF].port.read(0, 1), Fault)
        assert [event.device for event in vm.events()] == [0x7FFF]
        assert vm.read(EVENT_TAIL) == 16


def test_page_tables_that_loop_or_lead_out() -> None:
    with machine() as vm:
        vm.start()
        table = PageTable(vm.ram, TABLES, 6)
        vm.set_entry(ENDPOINT, device_entry(table.root, 6, 1))
        for number, entry in enumerate(
            (
                1 | 6 << 9 | TABLES | READ | WRITE,  # itself
                1 | 5 << 9 | TABLES | READ | WRITE,  # itself, one level down: ends at level 1 as a table
                1 | 5 << 9 | NOWHERE | READ | WRITE,
                1 | 5 << 9 | MEMORY | READ | WRITE,
                1 | 7 << 9 | TABLES | READ | WRITE,
            )
        ):
            vm.ram.poke(TABLES + 8 * number, struct.pack("<Q", entry))
            assert isinstance(vm.endpoint.read(number << 57 | number << 48, 8), Fault)
        assert vm.wait()


def test_the_device_table_as_command_buffer_and_event_log() -> None:
    """One page as all three: each is only read or written as what it is."""
    with machine() as vm:
        vm.write(0x00, DEVICE_TABLE)
        vm.set_commands(8, DEVICE_TABLE)
        vm.set_events(8, DEVICE_TABLE)
        vm.write(CONTROL, 0x1005)
        vm.write(COMMAND_TAIL, 0xFF0)
        assert not vm.status & COMMAND_RUN
        assert vm.ram.peek(DEVICE_TABLE + 7, 1) == b"\x50"
        for _ in range(300):
            vm.endpoint.read(0, 1)
        check(vm)
