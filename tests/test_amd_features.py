"""Each field of the Extended Feature Register: what it announces is there, and what it does not is not."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from amd_driver import (
    COMMAND_EN,
    CONTROL,
    DATA,
    ENDPOINT,
    ILLEGAL_COMMAND,
    ILLEGAL_ENTRY,
    IOVA,
    OFFERED,
    READ,
    TABLES,
    WRITE,
    Gcr3Table,
    GuestTable,
    PageTable,
    Vm,
    complete_ppr,
    device_entry,
    guest_entry,
    invalidate_all,
    invalidate_device_tlb,
    prefetch,
    reason,
)
from guest_ram import PAGE

from backend.core import Access, Fault, Reason
from backend.viommu.amd.features import EFR2, EFR_FIELDS

ADDRESS = 0x7F12_3456_7000
GUEST = TABLES + 16 * PAGE


def guest(vm: Vm, pasid: int = 5, *, glx: int = 0, five: bool = False, giov: bool = False) -> GuestTable:
    gcr3 = Gcr3Table(vm.ram, TABLES, glx + 1)
    table = GuestTable(vm.ram, GUEST, 5 if five else 4)
    gcr3.set(pasid, table.root | 1)
    vm.set_entry(ENDPOINT, guest_entry(gcr3.root, glx=glx, giov=giov, five=five))
    return table


def legal(vm: Vm, low: int = 0, high: int = 0) -> bool:
    """Whether an entry with these bits is no illegal one."""
    vm.set_entry(ENDPOINT, device_entry(low=3 | READ | WRITE | low, high=high))
    vm.endpoint.read(DATA, 1)
    return ILLEGAL_ENTRY not in {event.code for event in vm.events()}


def taken(vm: Vm, command: bytes) -> bool:
    """Whether a command is one; the buffer runs again after one that is not."""
    vm.submit(command)
    if ILLEGAL_COMMAND not in {event.code for event in vm.events()}:
        return True
    vm.control(clear=COMMAND_EN)
    vm.set_commands(9)
    vm.control(set_=COMMAND_EN)
    return False


def controls(vm: Vm, *bits: int) -> set[int]:
    """Which bits of the control register can be set."""
    vm.control(set_=sum(1 << bit for bit in bits))
    return {bit for bit in bits if vm.read(CONTROL) >> bit & 1}


def prefetches(vm: Vm) -> None:
    vm.translate().map(IOVA, DATA)
    assert taken(vm, prefetch(ENDPOINT, IOVA))
    (ioasid,) = vm.iommu.domains.ioasids.values()
    before = vm.context.get_info(ioasid).counters
    assert isinstance(vm.endpoint.read(IOVA, 1), bytes)
    after = vm.context.get_info(ioasid).counters
    assert (after.iotlb_hits, after.iotlb_misses) == (before.iotlb_hits + 1, before.iotlb_misses)


def ppr(vm: Vm) -> None:
    assert legal(vm, 1 << 52)
    assert controls(vm, 13, 14, 15) == {13, 14, 15}
    assert taken(vm, complete_ppr(ENDPOINT, 1))


def no_execute(vm: Vm) -> None:
    table = guest(vm)
    table.set(ADDRESS, 7 | DATA | 1 << 63)
    assert isinstance(vm.endpoint.read(ADDRESS, 1, 5), bytes)
    fault = vm.engine.core.translate(ENDPOINT, ADDRESS, Access.READ | Access.EXECUTE, pasid=5)
    assert isinstance(fault, Fault)
    assert fault.reason == Reason.PERMISSION


def guest_translation(vm: Vm) -> None:
    guest(vm).map(ADDRESS, DATA)
    assert isinstance(vm.endpoint.read(ADDRESS, 1, 5), bytes)
    assert controls(vm, 16) == {16}


def invalidates_all(vm: Vm) -> None:
    assert taken(vm, invalidate_all())


def guest_apic(vm: Vm) -> None:
    """A format of remapping entries can be chosen; nothing else changes, for none is ever read."""
    vm.translate().map(IOVA, DATA)
    assert controls(vm, 17) == {17}
    assert isinstance(vm.endpoint.read(IOVA, 1), bytes)


def six_host_levels(vm: Vm) -> None:
    table = PageTable(vm.ram, TABLES, 6)
    table.map(0xFE00_1234_5678_9000, DATA)
    vm.set_entry(ENDPOINT, device_entry(table.root, 6, 1))
    assert isinstance(vm.endpoint.read(0xFE00_1234_5678_9000, 1), bytes)


def five_guest_levels(vm: Vm) -> None:
    guest(vm, five=True).map(0x00AB_CDEF_1234_5000, DATA)
    assert isinstance(vm.endpoint.read(0x00AB_CDEF_1234_5000, 1, 5), bytes)


def three_gcr3_levels(vm: Vm) -> None:
    guest(vm, 0x4321, glx=2).map(ADDRESS, DATA)
    assert isinstance(vm.endpoint.read(ADDRESS, 1, 0x4321), bytes)


def sixteen_bits_of_pasid(vm: Vm) -> None:
    guest(vm, 0xFFFF, glx=1).map(ADDRESS, DATA)
    assert isinstance(vm.endpoint.read(ADDRESS, 1, 0xFFFF), bytes)
    guest(vm, 0x1_FFFF, glx=1).map(ADDRESS, DATA)
    assert reason(vm.endpoint.read(ADDRESS, 1, 0x1_FFFF)) == Reason.ADDRESS_WIDTH


def user_pages(vm: Vm) -> None:
    guest(vm).map(ADDRESS, DATA, user=False)
    assert reason(vm.endpoint.read(ADDRESS, 1, 5)) == Reason.PERMISSION


def guest_io(vm: Vm) -> None:
    guest(vm, 0, giov=True).map(ADDRESS, DATA)
    assert isinstance(vm.endpoint.read(ADDRESS, 1), bytes)


def host_bits(vm: Vm, had: int) -> list[int]:
    """A and D (bits 5 and 6) of the leaf and of the table above it after a write."""
    table = PageTable(vm.ram, TABLES, 2)
    table.map(0x5000, DATA)
    vm.set_entry(ENDPOINT, device_entry(table.root, 2, 1, low=3 | READ | WRITE | had << 7))
    assert vm.endpoint.write(0x5000, b"x") is None
    entries = [struct.unpack("<Q", vm.ram.peek(table.slot(0x5000, level), 8))[0] for level in (1, 2)]
    return [entry >> 5 & 3 for entry in entries]


def host_accessed(vm: Vm) -> None:
    assert host_bits(vm, 0) == [0, 0]
    assert host_bits(vm, 1) == [1, 1]


def host_dirty(vm: Vm) -> None:
    assert host_bits(vm, 3) == [3, 1]
    assert not legal(vm, 2 << 7)


def enhanced_ppr(vm: Vm) -> None:
    assert legal(vm, 1 << 53)
    assert controls(vm, 45) == {45}


BEHAVIOUR: dict[str, Callable[[Vm], None]] = {
    "PreFSup": prefetches,
    "PPRSup": ppr,
    "NXSup": no_execute,
    "GTSup": guest_translation,
    "IASup": invalidates_all,
    "GASup": guest_apic,
    "HATS": six_host_levels,
    "GATS": five_guest_levels,
    "GLXSup": three_gcr3_levels,
    "PASmax": sixteen_bits_of_pasid,
    "USSup": user_pages,
    "GIoSup": guest_io,
    "HASup": host_accessed,
    "EPHSup": enhanced_ppr,
    "HDSup": host_dirty,
}

# Control bits and registers (section 3.3.1) of each feature that is not offered, and commands (2.4) with its bits
ABSENT: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[bytes, ...]]] = {
    "XTSup": ((50, 51), (0x170, 0x178, 0x180), ()),
    "GAPPISup": ((55,), (), ()),
    "HESup": ((), (0x40, 0x48, 0x50), ()),
    "PCSup": ((), (0x3FF8,), ()),
    "SmiFSup": ((22, 24), (0x60, 0x68), ()),
    "SmiFRC": ((), (0xD8,), ()),
    "GAMSup": ((25, 26, 27, 28, 29), (0xE0, 0xE8, 0x2040, 0x2048), ()),
    "DualPprLogSup": ((30, 31), (0xF0, 0x2050, 0x2058), ()),
    "DualEventLogSup": ((32, 33), (0xF8, 0x2070, 0x2078), ()),
    "SATSSup": ((), (), ()),
    "DevTblSegSup": ((34, 35, 36), (0x100, 0x130), ()),
    "PprOvrflwEarlySup": ((), (0x2088, 0x2090), ()),
    "PPRAutoRspSup": ((39, 42), (0x2080,), ()),
    "MarcSup": ((40,), (0x200, 0x258), ()),
    "BlkStopMrkSup": ((41,), (), ()),
    "PerfOptSup": ((), (0x168,), ()),
    "MsiCapMmioSup": ((), (0x150, 0x158, 0x160), ()),
    "AttrFWSup": ((), (), ()),
    "InvIotlbTypeSup": ((), (), tuple(invalidate_device_tlb(ENDPOINT, 0x5000 | kind << 4) for kind in (1, 2, 3))),
    "vIommuSup": ((52, 53), (), (struct.pack("<QQ", 9 << 60, 0), struct.pack("<QQ", 10 << 60, 0))),
    "GAUpdateDisSup": ((48, 54), (), ()),
    "ForcePhyDestSup": ((), (), ()),
    "SNPSup": ((61,), (), ()),
}


def test_every_field_is_one_or_the_other() -> None:
    assert {field.name for field in EFR_FIELDS if field.value} == set(BEHAVIOUR)
    assert {field.name for field in EFR_FIELDS if not field.value} == set(ABSENT)
    covered = sum(((1 << field.width) - 1) << field.shift for field in EFR_FIELDS)
    assert not OFFERED & ~covered
    assert EFR2 == 0


@pytest.mark.parametrize("name", BEHAVIOUR)
def test_what_is_offered_is_there(started: Vm, name: str) -> None:
    BEHAVIOUR[name](started)


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_offered_is_not(started: Vm, name: str) -> None:
    bits, registers, commands = ABSENT[name]
    assert controls(started, *bits) == set()
    for offset in registers:
        started.write(offset, (1 << 64) - 1)
        assert started.read(offset) == 0, hex(offset)
    for command in commands:
        assert not taken(started, command)


def test_of_extended_feature_2_nothing_is_there(started: Vm) -> None:
    """GCR3TRPMode (58), IRTCacheDis (59), GstBufferTRPMode (60), TMPM (56)."""
    assert started.read(0x1A0) == 0
    assert controls(started, 56, 57, 58, 59, 60, 62, 63) == set()


def test_the_page_has_the_fields_as_they_are() -> None:
    page = (Path(__file__).parent.parent / "docs" / "amd-vi.md").read_text()
    assert f"\n{OFFERED:#x}: " in page
    for field in EFR_FIELDS:
        high = field.shift + field.width - 1
        bits = str(field.shift) if field.width == 1 else f"{high}:{field.shift}"
        assert f"| {field.name} | {bits} | {field.value} | {field.reason} |\n" in page
