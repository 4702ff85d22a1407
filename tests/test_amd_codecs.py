"""Bytes of the AMD IOMMU's structures: commands, device table entries, events; by hand from publication 48882."""

import struct

import pytest
from amd_driver import (
    OFFERED,
    READ,
    WRITE,
    complete_ppr,
    completion_wait,
    guest_entry,
    invalidate_all,
    invalidate_device_tlb,
    invalidate_entry,
    invalidate_interrupts,
    parse_event,
    prefetch,
)
from hypothesis import given
from hypothesis import strategies as st

from backend.core import Access, Fault, Reason
from backend.viommu.amd.command_buffer import UnreadableCommand, pending_commands
from backend.viommu.amd.commands import (
    AddressRange,
    CompletePpr,
    CompletionWait,
    IllegalCommand,
    InvalidateAll,
    InvalidateDeviceEntry,
    InvalidateDeviceTlb,
    InvalidateInterruptTable,
    InvalidatePages,
    Opcode,
    PrefetchPages,
    address_range,
    decode,
)
from backend.viommu.amd.device_table import Decision, DeviceTable, GuestTables, Verdict, judge, reserved_bits
from backend.viommu.amd.event_log import EventCode, EventFlag, event
from backend.viommu.amd.features import (
    EFR,
    EFR_FIELDS,
    capability_data,
    gcr3_levels,
    guest_levels,
    host_levels,
    pasid_bits,
)

PREFETCH = 1 << 0
IA, GT, PPR, GIO, HA, EPH, HD = 1 << 6, 1 << 4, 1 << 1, 1 << 48, 1 << 49, 1 << 50, 1 << 52


def bits(*ranges: tuple[int, int]) -> int:
    """A mask of bit ranges as the specification writes them: (high, low)."""
    return sum(((1 << high - low + 1) - 1) << low for high, low in ranges)


# Section 2.4: the bits of each command that are fields, opcode aside; of those that GTSup gives, in GUEST_FIELDS.
COMMAND_FIELDS = {
    1: (bits((2, 0), (51, 3)), bits((63, 0))),
    2: (bits((15, 0)), 0),
    3: (bits((47, 32)), bits((0, 0), (1, 1), (63, 12))),
    4: (bits((15, 0), (31, 24), (47, 32)), bits((0, 0), (63, 12))),
    5: (bits((15, 0)), 0),
    6: (bits((15, 0), (31, 24)), bits((0, 0), (4, 4), (63, 12))),
    7: (bits((15, 0)), bits((41, 32), (47, 44))),
    8: (0, 0),
}
GUEST_FIELDS = {
    3: (bits((19, 0)), bits((2, 2))),
    4: (bits((23, 16), (59, 48)), bits((2, 2))),
    6: (bits((51, 32)), bits((2, 2))),
    7: (bits((51, 32)), bits((2, 2))),
}


def fault(reason: Reason = Reason.NOT_PRESENT, gpa: int = 0) -> Fault:
    return Fault(
        rid=0,
        pasid=None,
        ioasid=1,
        iova=gpa,
        access=Access.READ,
        stage=2,
        level=1,
        gpa=gpa,
        entry=0,
        reason=reason,
        done=0,
    )


class TestFeatures:
    def test_what_is_offered(self) -> None:
        assert EFR == OFFERED
        assert (host_levels(EFR), guest_levels(EFR), gcr3_levels(EFR), pasid_bits(EFR)) == (6, 5, 3, 16)

    def test_fields_do_not_overlap_and_say_why(self) -> None:
        seen = 0
        for field in EFR_FIELDS:
            mask = ((1 << field.width) - 1) << field.shift
            assert not seen & mask, field.name
            assert field.value < 1 << field.width
            assert field.reason
            seen |= mask

    def test_capability_announces_an_iommu_with_efr(self) -> None:
        block = b"\x0f\x60" + capability_data()
        header, low, high, device_range, misc, misc1 = struct.unpack("<6I", block)
        assert header == 0x090B600F
        assert (low, high, device_range, misc1) == (1, 0, 0, 0)
        assert misc & 0x1F == 0  # MSI number
        assert misc >> 8 & 0x7F == 52  # bits of a physical address
        assert misc >> 15 & 0x7F == 64  # bits of a virtual address


class TestAddressRange:
    @pytest.mark.parametrize(
        ("operand", "start", "size"),
        [
            (0x0000_0000_1234_5000, 0x1234_5000, 0x1000),
            (0x0000_0000_1234_6001, 0x1234_6000, 0x2000),  # bit 12 is the lowest zero: 8 KiB
            (0x0000_0000_1234_5001, 0x1234_4000, 0x4000),  # bit 13: 16 KiB
            (0x0000_0000_0000_7001, 0x0000_0000, 0x1_0000),
            (0x0000_0000_401F_F001, 0x4000_0000, 0x40_0000),  # ones in 20:12, zero at 21: 4 MiB
            (0x3FFF_FFFF_FFFF_F001, 0x0000_0000, 1 << 63),
            (0xBFFF_FFFF_FFFF_F001, 1 << 63, 1 << 63),
            (0x7FFF_FFFF_FFFF_F001, 0, 1 << 64),  # section 2.4.3: all of the domain
            (0xFFFF_FFFF_FFFF_F001, 0, 1 << 64),
        ],
    )
    def test_sizes(self, operand: int, start: int, size: int) -> None:
        assert address_range(operand) == AddressRange(start, size)
        assert address_range(operand).everything == (size == 1 << 64)

    @given(st.integers(0, (1 << 64) - 1))
    def test_against_a_count_of_bits(self, operand: int) -> None:
        found = address_range(operand)
        position = 12
        while operand & 1 and position < 64 and operand >> position & 1:
            position += 1
        size = min(1 << position + 1, 1 << 64) if operand & 1 else 1 << 12
        assert found.size == size
        assert found.start == (operand >> 12 << 12) // size * size
        assert found.start + found.size <= 1 << 64


class TestCommands:
    @pytest.mark.parametrize(
        ("raw", "opcode", "command"),
        [
            (completion_wait(0x8, 0x1122), 1, CompletionWait(8, 0x1122, interrupt=False, flush=False)),
            (struct.pack("<QQ", 0x100F_FFFF_FFFF_FFFE, 0), 1, CompletionWait(None, 0, interrupt=True, flush=True)),
            (
                struct.pack("<QQ", 0x100F_FFFF_FFFF_FFFD, (1 << 64) - 1),
                1,
                CompletionWait(0x000F_FFFF_FFFF_FFF8, (1 << 64) - 1, interrupt=False, flush=True),
            ),
            (invalidate_entry(0xBEEF), 2, InvalidateDeviceEntry(0xBEEF)),
            (
                struct.pack("<QQ", 0x3000_0007_0000_0000, 0x7FFF_FFFF_FFFF_F003),
                3,
                InvalidatePages(7, AddressRange(0, 1 << 64), directories=True),
            ),
            (
                struct.pack("<QQ", 0x3000_FFFF_0000_0000, 0x5000),
                3,
                InvalidatePages(0xFFFF, AddressRange(0x5000, 0x1000), directories=False),
            ),
            (invalidate_device_tlb(0x18, 0x9000), 4, InvalidateDeviceTlb(0x18, AddressRange(0x9000, 0x1000), None, 1)),
            (
                struct.pack("<QQ", 0x4A34_0018_2012_0018, 0x9005),
                4,
                InvalidateDeviceTlb(0x18, AddressRange(0x8000, 0x4000), 0xA1234, 0x20),
            ),
            (
                struct.pack("<QQ", 0x3000_0007_000A_1234, 0x5004),
                3,
                InvalidatePages(7, AddressRange(0x5000, 0x1000), directories=False, pasid=0xA1234),
            ),
            (invalidate_interrupts(0x18), 5, InvalidateInterruptTable(0x18)),
            (
                prefetch(0x18, 0x9000, 4),
                6,
                PrefetchPages(0x18, AddressRange(0x9000, 0x1000), 4, None, invalidate=False),
            ),
            (
                prefetch(0x18, 0x9001, 0xFF, pasid=0xA1234, anew=True),
                6,
                PrefetchPages(0x18, AddressRange(0x8000, 0x4000), 0xFF, 0xA1234, invalidate=True),
            ),
            (complete_ppr(0x18, 0x1FF, 1), 7, CompletePpr(0x18, 0x1FF, 1, None)),
            (complete_ppr(0x18, 0x200, 15, 0xF1234), 7, CompletePpr(0x18, 0, 15, 0xF1234)),  # LAST is no part of a tag
            (invalidate_all(), 8, InvalidateAll()),
        ],
    )
    def test_decode(self, raw: bytes, opcode: int, command: object) -> None:
        assert decode(raw, EFR) == (Opcode(opcode), command)

    @pytest.mark.parametrize("number", sorted(set(range(16)) - set(COMMAND_FIELDS)))
    def test_opcodes_that_are_not_offered(self, number: int) -> None:
        with pytest.raises(IllegalCommand, match=f"{number:#x}"):
            decode(struct.pack("<QQ", number << 60, 0), EFR)

    @pytest.mark.parametrize(
        ("raw", "feature"), [(invalidate_all(), IA), (complete_ppr(1, 1), PPR), (prefetch(1, 0), PREFETCH)]
    )
    def test_commands_that_need_a_feature(self, raw: bytes, feature: int) -> None:
        decode(raw, EFR)
        with pytest.raises(IllegalCommand, match="does not offer"):
            decode(raw, EFR & ~feature)

    @pytest.mark.parametrize("number", COMMAND_FIELDS)
    def test_each_bit_is_a_field_or_reserved(self, number: int) -> None:
        low, high = COMMAND_FIELDS[number]
        guest_low, guest_high = GUEST_FIELDS.get(number, (0, 0))
        for efr, fields in ((EFR & ~GT, high << 64 | low), (EFR, (high | guest_high) << 64 | low | guest_low)):
            for bit in range(128):
                if 60 <= bit < 64:
                    continue
                word = 1 << bit
                raw = (number << 60 | word).to_bytes(16, "little")
                if word & fields:
                    decode(raw, efr)
                else:
                    with pytest.raises(IllegalCommand, match="reserved"):
                        decode(raw, efr)

    @given(st.binary(min_size=16, max_size=16))
    def test_any_bytes_are_a_command_or_illegal(self, raw: bytes) -> None:
        try:
            opcode, _command = decode(raw, EFR)
        except IllegalCommand:
            return
        assert opcode == raw[7] >> 4


class TestCommandBuffer:
    @given(
        st.integers(8, 12),
        st.integers(0, 1 << 16),
        st.integers(0, 1 << 16),
    )
    def test_commands_come_in_order_around_the_ring(self, length: int, head: int, tail: int) -> None:
        entries = 1 << length
        head, tail = head % entries, tail % entries
        memory = b"".join(struct.pack("<QQ", number, ~number & 0xFFFF) for number in range(entries))

        def read(gpa: int, size: int) -> bytes:
            assert gpa >= 0x5000
            assert gpa + size <= 0x5000 + len(memory)
            assert (gpa & 0xFFF) + size <= 0x1000
            return memory[gpa - 0x5000 : gpa - 0x5000 + size]

        found = list(pending_commands(read, 0x5000, 16 * entries, 16 * head, 16 * tail))
        numbers = [(head + step) % entries for step in range((tail - head) % entries)]
        assert found == [(16 * n, struct.pack("<QQ", n, ~n & 0xFFFF)) for n in numbers]

    def test_a_page_that_cannot_be_read_costs_no_command_before_it(self) -> None:
        def read(gpa: int, size: int) -> bytes | Fault:
            return fault(gpa=gpa) if gpa >= 0x2000 else bytes(size)

        commands = pending_commands(read, 0x1000, 0x2000, 0xFE0, 0x1040)
        assert [next(commands)[0], next(commands)[0]] == [0xFE0, 0xFF0]
        with pytest.raises(UnreadableCommand) as raised:
            next(commands)
        assert raised.value.address == 0x2000


def entry(low: int, high: int = 0) -> bytes:
    return struct.pack("<4Q", low, high, 0, 0)


class TestDeviceTableEntry:
    ROOT = 0x000A_BCDE_F012_3000

    @pytest.mark.parametrize("mode", range(1, 7))
    def test_translation(self, mode: int) -> None:
        raw = entry(3 | mode << 9 | self.ROOT | READ, 0xFFFE)
        assert judge(raw, 0x40, EFR) == Verdict(
            Decision.TRANSLATE, 0x40, Access.READ, 0xFFFE, self.ROOT, mode, valid=True
        )

    @pytest.mark.parametrize(
        ("low", "access"),
        [
            (3, Access(0)),
            (3 | READ, Access.READ),
            (3 | WRITE, Access.WRITE),
            (3 | READ | WRITE, Access.READ | Access.WRITE),
        ],
    )
    def test_mode_0_bypasses_within_ir_and_iw(self, low: int, access: Access) -> None:
        verdict = judge(entry(low), 0, EFR)
        assert (verdict.decision, verdict.access) == (Decision.BYPASS, access)

    @given(st.binary(min_size=32, max_size=32))
    def test_without_v_nothing_else_counts(self, raw: bytes) -> None:
        verdict = judge(bytes([raw[0] & 0xFE]) + raw[1:], 0, EFR)
        assert (verdict.decision, verdict.access) == (Decision.BYPASS, Access.READ | Access.WRITE)

    def test_without_tv_nothing_is_translated(self) -> None:
        assert judge(entry(1 | 4 << 9 | self.ROOT | READ | WRITE, 5), 0, EFR).decision is Decision.NO_TRANSLATION

    def test_mode_7_and_modes_deeper_than_offered(self) -> None:
        assert judge(entry(3 | 7 << 9), 0, EFR).decision is Decision.ILLEGAL_LEVEL
        assert judge(entry(3 | 5 << 9), 0, 0).decision is Decision.ILLEGAL_LEVEL
        assert judge(entry(3 | 4 << 9), 0, 0).decision is Decision.TRANSLATE
        assert judge(entry(3 | 5 << 9), 0, 1 << 10).decision is Decision.TRANSLATE

    # Section 2.2.2: fields of bits 127:0 that host tables alone have, and those that each feature adds; everything
    # else is reserved.
    FIELDS = bits((1, 0), (11, 9), (51, 12), (62, 61)) | bits((79, 64), (105, 96))
    ADDED = (
        (GT, bits((60, 55), (95, 80), (127, 107))),
        (PPR, bits((52, 52))),
        (GIO, bits((54, 54))),
        (HA, bits((7, 7))),
        (EPH, bits((53, 53))),
        (HD, bits((8, 8))),
    )

    @pytest.mark.parametrize("feature", [0, *(feature for feature, _ in ADDED)])
    def test_each_bit_is_a_field_or_reserved(self, feature: int) -> None:
        fields = self.FIELDS | sum(added for each, added in self.ADDED if each == feature)
        for bit in range(128):
            word = 3 << 7 if bit == 8 and feature == HD else 1 << bit  # dirty bits without accessed ones are reserved
            raw = ((word | 1).to_bytes(16, "little")) + bytes(16)
            illegal = judge(raw, 0, feature | (HA if bit == 8 and feature == HD else 0)).decision
            assert (illegal is Decision.ILLEGAL_BITS) == (not fields >> bit & 1), bit
        low, high = reserved_bits(feature)
        assert high << 64 | low == (1 << 128) - 1 & ~fields

    def test_interrupt_half_is_not_looked_at(self) -> None:
        raw = struct.pack("<4Q", 3 | READ | WRITE, 0, (1 << 64) - 1, (1 << 64) - 1)
        assert judge(raw, 0, EFR) == judge(struct.pack("<4Q", 3 | READ | WRITE, 0, 0, 0), 0, EFR)

    @pytest.mark.parametrize("valid", [0, 1])
    @pytest.mark.parametrize("control", range(4))
    def test_interrupt_control(self, valid: int, control: int) -> None:
        raw = struct.pack("<4Q", 3 | READ | WRITE, 0, valid | control << 60, 0)
        assert judge(raw, 0, EFR).interrupts_blocked == (valid == 1 and control == 0)

    ROOT_OF_GCR3 = 0x000F_EDCB_A987_6000

    @pytest.mark.parametrize("glx", [0, 1, 2])
    @pytest.mark.parametrize("giov", [False, True])
    @pytest.mark.parametrize("five", [False, True])
    def test_guest_tables(self, glx: int, giov: bool, five: bool) -> None:
        raw = guest_entry(self.ROOT_OF_GCR3, glx=glx, giov=giov, five=five, domain=9)
        verdict = judge(raw, 0, EFR)
        assert (verdict.decision, verdict.domain_id) == (Decision.BYPASS, 9)
        assert verdict.guest == GuestTables(self.ROOT_OF_GCR3, glx + 1, 5 if five else 4, giov)
        assert judge(raw, 0, EFR, guest_enabled=False).guest is None
        raw = guest_entry(self.ROOT_OF_GCR3, glx=glx, giov=giov, mode=3, root=self.ROOT)
        verdict = judge(raw, 0, EFR)
        assert (verdict.decision, verdict.root, verdict.levels) == (Decision.TRANSLATE, self.ROOT, 3)
        assert verdict.guest == GuestTables(self.ROOT_OF_GCR3, glx + 1, 4, giov)

    def test_guest_tables_deeper_than_offered(self) -> None:
        assert judge(guest_entry(0, glx=3), 0, EFR).decision is Decision.ILLEGAL_LEVEL
        assert judge(guest_entry(0, glx=2), 0, EFR & ~(3 << 14) | 1 << 14).decision is Decision.ILLEGAL_LEVEL
        assert judge(guest_entry(0, five=True), 0, EFR & ~(3 << 12)).decision is Decision.ILLEGAL_LEVEL
        for mode in (2, 3):
            raw = guest_entry(0)[:16] + struct.pack("<QQ", mode << 54, 0)
            assert judge(raw, 0, EFR).decision is Decision.ILLEGAL_LEVEL

    @pytest.mark.parametrize(("had", "accessed", "dirty"), [(0, False, False), (1, True, False), (3, True, True)])
    def test_accessed_and_dirty_bits(self, had: int, accessed: bool, dirty: bool) -> None:
        verdict = judge(entry(3 | had << 7 | 4 << 9), 0, EFR)
        assert (verdict.accessed, verdict.dirty) == (accessed, dirty)
        assert judge(entry(3 | 2 << 7 | 4 << 9), 0, EFR).decision is Decision.ILLEGAL_BITS

    def test_suppressions(self) -> None:
        verdict = judge(entry(3, 1 << 33), 0, EFR)
        assert (verdict.suppress_repeated, verdict.suppress_all) == (True, False)
        verdict = judge(entry(3, 1 << 34), 0, EFR)
        assert (verdict.suppress_repeated, verdict.suppress_all) == (False, True)

    @given(st.binary(min_size=32, max_size=32))
    def test_any_bytes_get_a_verdict(self, raw: bytes) -> None:
        verdict = judge(raw, 0, EFR)
        assert verdict.decision is not Decision.TRANSLATE or 1 <= verdict.levels <= 6
        assert not verdict.root & 0xFFF


class TestDeviceTable:
    def test_size_is_in_pages_less_one(self) -> None:
        reads: list[tuple[int, int]] = []

        def read(gpa: int, size: int) -> bytes:
            reads.append((gpa, size))
            return bytes(size)

        table = DeviceTable(read, EFR)
        assert table.look_up(127, 0x5000).decision is Decision.BYPASS
        assert table.look_up(128, 0x5000).decision is Decision.OUT_OF_TABLE
        assert reads == [(0x5000 + 127 * 32, 32)]
        assert table.look_up(0xFFFF, 0x5000 | 0x1FF).decision is Decision.BYPASS
        assert table.look_up(0xFFFE, 0x5000 | 0x1FE).decision is Decision.OUT_OF_TABLE

    def test_an_entry_is_read_once_until_forgotten(self) -> None:
        answers: list[bytes | Fault] = [fault(), entry(0), entry(3 | 7 << 9), entry(3)]
        table = DeviceTable(lambda _gpa, _size: answers.pop(0), EFR)
        for decision in (Decision.UNREADABLE, Decision.BYPASS, Decision.ILLEGAL_LEVEL):
            assert table.look_up(5, 0).decision is decision
            assert table.look_up(5, 0).decision is decision
            table.forget(6)
            assert table.look_up(5, 0).decision is decision
            table.forget(5)
        table.look_up(5, 0)
        assert not answers

    def test_a_table_that_the_engine_refused_stays_refused(self) -> None:
        table = DeviceTable(lambda _gpa, _size: entry(3 | 4 << 9 | 0x9000, 3), EFR)
        before = table.look_up(5, 0)
        table.refuse(5)
        after = table.look_up(5, 0)
        assert (after.decision, after.root, after.domain_id) == (Decision.NO_TABLE, before.root, 3)


class TestEvents:
    @given(
        st.sampled_from(EventCode), st.integers(0, 0xFFFF), st.integers(0, (1 << 20) - 1), st.integers(0, (1 << 64) - 1)
    )
    def test_layout(self, code: EventCode, device: int, tag: int, address: int) -> None:
        raw = event(code, address=address, device_id=device, tag=tag, flags=EventFlag.PR | EventFlag.RW)
        found = parse_event(raw)
        assert (found.code, found.device, found.domain, found.address) == (code, device, tag, address)
        assert found.flags == 1 << 52 - 48 | 1 << 53 - 48

    @pytest.mark.parametrize(
        ("flag", "position"),
        [("GN", 48), ("NX", 49), ("US", 50), ("I", 51), ("PR", 52), ("RW", 53), ("PE", 54), ("RZ", 55), ("TR", 56)],
    )
    def test_flags_stand_where_figures_have_them(self, flag: str, position: int) -> None:
        raw = event(EventCode.IO_PAGE_FAULT, address=0, flags=getattr(EventFlag, flag))
        assert int.from_bytes(raw[:8], "little") == 2 << 60 | 1 << position
