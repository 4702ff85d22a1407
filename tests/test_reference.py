"""Known answers for the reference walkers and builders: every entry and address below is worked out by hand.

Walkers are fed words that no builder wrote, builders are judged by the words they write, so that the two do not merely
agree with each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from reference import amd_v1, arm_lpae, ept, riscv, vtd_second_stage, x86
from reference.common import Access, Fault, Kind, Perms, Reason, Result, Update
from reference.memory import Memory, Region

READ, WRITE, EXECUTE = (Access(kind) for kind in Kind)
P_READ, P_WRITE, P_EXECUTE = (Access(kind, privileged=True) for kind in Kind)


def memory(words: dict[int, int], size: int = 1 << 20) -> Memory:
    """A memory of given words."""
    return Memory(size, dict(words))


@dataclass(frozen=True)
class Tree:
    """Hand-laid entries of one format."""

    walk: Any
    config: Any
    words: dict[int, int] = field(default_factory=dict)

    def ask(self, iova: int, access: Access, changed: dict[int, int] | None = None) -> Result | Fault:
        """The walker's answer, some words being replaced."""
        answer = self.walk(memory(self.words | (changed or {})), self.config, iova, access)
        assert isinstance(answer, Result | Fault)
        return answer

    def ok(self, iova: int, access: Access, changed: dict[int, int] | None = None) -> tuple[int, int]:
        """Output address and size of an answer that must be a translation."""
        answer = self.ask(iova, access, changed)
        assert isinstance(answer, Result), answer
        return answer.output, answer.size

    def fails(self, iova: int, access: Access, changed: dict[int, int] | None = None) -> tuple[Reason, int]:
        """Reason and level of an answer that must be a fault."""
        answer = self.ask(iova, access, changed)
        assert isinstance(answer, Fault), answer
        return answer.reason, answer.level


# x86: 0x7f123456789a has indices 0xfe, 0x48, 0x1a2, 0x167 and offset 0x89a.
X86_IOVA = 0x7F12_3456_789A
X86_WORDS = {0x17F0: 0x2007, 0x2240: 0x3007, 0x3D10: 0x4007, 0x4B38: 0x1_2345_6007}
X86 = Tree(x86.walk, x86.Config(0x1000), X86_WORDS)


def test_x86_page() -> None:
    answer = X86.ask(X86_IOVA, WRITE)
    updates = (Update(0x17F0, 0x20), Update(0x2240, 0x20), Update(0x3D10, 0x20), Update(0x4B38, 0x60))
    assert answer == Result(0x1_2345_689A, 4096, True, True, True, True, updates)
    # Bits that are set already need no update.
    assert X86.ask(X86_IOVA, READ, {a: w | 0x20 for a, w in X86_WORDS.items()}) == Result(
        0x1_2345_689A, 4096, True, True, True, True, ()
    )


def test_x86_large_pages() -> None:
    # 2 MiB at 0x1_2340_0000 with PAT (bit 12) set: the offset is 0x16789a.
    assert X86.ok(X86_IOVA, READ, {0x3D10: 0x1_2340_1087}) == (0x1_2340_0000 + 0x16789A, 1 << 21)
    assert X86.ok(X86_IOVA, READ, {0x2240: 0x40_4000_1087}) == (0x40_4000_0000 + 0x3456789A, 1 << 30)
    assert X86.fails(X86_IOVA, READ, {0x17F0: 0x87}) == (Reason.RESERVED_BITS, 4)
    assert X86.fails(X86_IOVA, READ, {0x3D10: 0x1_2340_2087}) == (Reason.RESERVED_BITS, 2)
    assert X86.fails(X86_IOVA, READ, {0x2240: 0x40_2000_0087}) == (Reason.RESERVED_BITS, 3)


def test_x86_rights_are_anded_over_levels() -> None:
    assert X86.fails(X86_IOVA, WRITE, {0x2240: 0x3005}) == (Reason.PERMISSION, 1)
    assert X86.fails(X86_IOVA, READ, {0x3D10: 0x4003}) == (Reason.PERMISSION, 1)
    assert X86.ok(X86_IOVA, P_READ, {0x3D10: 0x4003}) == (0x1_2345_689A, 4096)
    assert X86.fails(X86_IOVA, EXECUTE, {0x17F0: 0x8000_0000_0000_2007}) == (Reason.PERMISSION, 1)
    no_wp = Tree(x86.walk, x86.Config(0x1000, write_protect=False, smep=True, xd=x86.Xd.IGNORED), X86_WORDS)
    assert no_wp.ok(X86_IOVA, P_WRITE, {0x4B38: 0x1_2345_6005}) == (0x1_2345_689A, 4096)
    assert no_wp.fails(X86_IOVA, WRITE, {0x4B38: 0x1_2345_6005}) == (Reason.PERMISSION, 1)
    assert no_wp.fails(X86_IOVA, P_EXECUTE) == (Reason.PERMISSION, 1)
    assert no_wp.ok(X86_IOVA, EXECUTE, {0x17F0: 0x8000_0000_0000_2007}) == (0x1_2345_689A, 4096)


def test_x86_order_of_faults() -> None:
    # A structural fault below outranks a missing right above; presence outranks reserved bits.
    assert X86.fails(X86_IOVA, WRITE, {0x17F0: 0x2005, 0x4B38: 0}) == (Reason.NOT_PRESENT, 1)
    assert X86.fails(X86_IOVA, WRITE, {0x3D10: 0xFFFF_FFFF_FFFF_FFFE}) == (Reason.NOT_PRESENT, 2)
    fault = X86.ask(X86_IOVA, WRITE, {0x3D10: 0x10_0007})
    assert fault == Fault(
        Reason.TABLE_ACCESS, 1, 0x10_0B38, None, (Update(0x17F0, 0x20), Update(0x2240, 0x20), Update(0x3D10, 0x20))
    )


def test_x86_addresses() -> None:
    assert X86.fails(0x0000_8000_0000_0000, READ) == (Reason.ADDRESS_WIDTH, 0)
    assert X86.fails(0xFFFF_7FFF_FFFF_FFFF, READ) == (Reason.ADDRESS_WIDTH, 0)
    assert X86.ok(0xFFFF_8000_0000_0123, READ, {0x1800: 0x2007, 0x2000: 0x87}) == (0x123, 1 << 30)
    pasid0 = Tree(x86.walk, x86.Config(0x1000, sign_extended=False), {0x1800: 0x2007, 0x2000: 0x87})
    assert pasid0.ok(0x0000_8000_0000_0123, READ) == (0x123, 1 << 30)
    assert pasid0.fails(0xFFFF_8000_0000_0123, READ) == (Reason.ADDRESS_WIDTH, 0)
    # Five levels: bit 56 is the sign; index 0x100 of the PML5.
    five = Tree(x86.walk, x86.Config(0x1000, 5), {0x1800: 0x2007, 0x2000: 0x3007, 0x3000: 0x87})
    assert five.ok(0xFF00_0000_0000_0042, READ) == (0x42, 1 << 30)
    assert five.fails(0x0100_0000_0000_0042, READ) == (Reason.ADDRESS_WIDTH, 0)
    narrow = Tree(x86.walk, x86.Config(0x1000, pa_bits=32), X86_WORDS)
    assert narrow.fails(X86_IOVA, READ) == (Reason.RESERVED_BITS, 1)


def test_vtd_second_stage() -> None:
    # 0x40201000 has index 1 at each of three levels.
    tree = Tree(
        vtd_second_stage.walk,
        vtd_second_stage.Config(0x1000, 3, access_dirty=True),
        {0x1008: 0x2003, 0x2008: 0x3003, 0x3008: 0xABC003},
    )
    answer = tree.ask(0x4020_1008, WRITE)
    updates = (Update(0x1008, 0x100), Update(0x2008, 0x100), Update(0x3008, 0x300))
    assert answer == Result(0xABC008, 4096, True, True, True, True, updates)
    assert tree.ok(0x4020_1008, READ, {0x2008: 0x600883}) == (0x601008, 1 << 21)  # SNP, PS
    assert tree.ok(0x4020_1008, READ, {0x1008: 0x4000_0083}) == (0x4020_1008, 1 << 30)
    assert tree.ok(0x4020_1008, READ, {0x3008: 0xABC07F}) == (0xABC008, 4096)  # X, EMT, IPAT are ignored
    assert tree.fails(0x4020_1008, READ, {0x3008: 0xABC002}) == (Reason.PERMISSION, 1)
    assert tree.fails(0x4020_1008, WRITE, {0x1008: 0x2001}) == (Reason.PERMISSION, 1)
    assert tree.fails(0x4020_1008, READ, {0x1008: 0x2002}) == (Reason.PERMISSION, 1)
    assert tree.fails(0x4020_1008, READ, {0x2008: 0x3000 | 0x4}) == (Reason.NOT_PRESENT, 2)
    assert tree.fails(0x4020_1008, READ, {0x2008: 0x3803}) == (Reason.RESERVED_BITS, 2)
    assert tree.fails(0x4020_1008, READ, {0x2008: 0x601083}) == (Reason.RESERVED_BITS, 2)
    assert tree.fails(0x4020_1008, READ, {0x3008: 0x4000_0000_00AB_C003}) == (Reason.RESERVED_BITS, 1)
    assert tree.fails(0x80_0000_0000, READ) == (Reason.ADDRESS_WIDTH, 0)
    four = Tree(vtd_second_stage.walk, vtd_second_stage.Config(0x1000, 4), {0x1000: 0x2083})
    assert four.fails(0, READ) == (Reason.RESERVED_BITS, 4)


def test_ept() -> None:
    words = {0x1000: 0x2007, 0x2008: 0x3007, 0x3008: 0x4007, 0x4008: 0xABC037}
    tree = Tree(ept.walk, ept.Config(0x1000, access_dirty=True), words)
    updates = (Update(0x1000, 0x100), Update(0x2008, 0x100), Update(0x3008, 0x100), Update(0x4008, 0x300))
    assert tree.ask(0x4020_1008, WRITE) == Result(0xABC008, 4096, True, True, True, True, updates)
    assert tree.ok(0x4020_1008, READ, {0x2008: 0x8000_00B7}) == (0x8020_1008, 1 << 30)
    assert tree.ok(0x4020_1008, EXECUTE, {0x4008: 0xABC034}) == (0xABC008, 4096)  # execute-only
    assert tree.fails(0x4020_1008, READ, {0x4008: 0xABC034}) == (Reason.PERMISSION, 1)
    assert tree.fails(0x4020_1008, READ, {0x4008: 0xABC036}) == (Reason.RESERVED_BITS, 1)  # write without read
    for memory_type, good in enumerate((True, True, False, False, True, True, True, False)):
        entry = {0x4008: 0xABC007 | memory_type << 3}
        if good:
            assert tree.ok(0x4020_1008, READ, entry) == (0xABC008, 4096)
        else:
            assert tree.fails(0x4020_1008, READ, entry) == (Reason.RESERVED_BITS, 1)
    assert tree.fails(0x4020_1008, READ, {0x3008: 0x400F}) == (Reason.RESERVED_BITS, 2)
    assert tree.fails(0x4020_1008, READ, {0x1000: 0x2087}) == (Reason.RESERVED_BITS, 4)
    assert tree.fails(0x4020_1008, READ, {0x3008: 0xFFF8}) == (Reason.NOT_PRESENT, 2)
    assert tree.fails(1 << 48, READ) == (Reason.ADDRESS_WIDTH, 0)
    strict = Tree(ept.walk, ept.Config(0x1000, execute_only=False), words)
    assert strict.fails(0x4020_1008, EXECUTE, {0x4008: 0xABC034}) == (Reason.RESERVED_BITS, 1)
    mode = Tree(ept.walk, ept.Config(0x1000, mode_based_execute=True), {a: w | 0x400 for a, w in words.items()})
    assert mode.ok(0x4020_1008, EXECUTE) == (0xABC008, 4096)
    assert mode.fails(0x4020_1008, EXECUTE, {0x4008: 0xABC037}) == (Reason.PERMISSION, 1)
    assert mode.ok(0x4020_1008, P_EXECUTE, {0x4008: 0xABC037}) == (0xABC008, 4096)


RW = 0x6000_0000_0000_0001  # AMD: IW, IR, PR


def test_amd_v1_size_codes() -> None:
    one = Tree(amd_v1.walk, amd_v1.Config(0x1000, 1))
    # 64 KiB at 0x12340000: three ones from bit 12, a zero at bit 15. Entry 0x15.
    assert one.ok(0x1_5ABC, WRITE, {0x10A8: RW | 0x1234_7E00}) == (0x1234_5ABC, 1 << 16)
    assert one.ok(0x1_5ABC, WRITE, {0x10A8: RW | 0x1234_0E00}) == (0x1234_1ABC, 1 << 13)  # no ones: 8 KiB
    two = Tree(amd_v1.walk, amd_v1.Config(0x1000, 2))
    # 4 MiB at 1 GiB: nine ones, a zero at bit 21. Entry 3 of level 2 is the upper half.
    assert two.ok(0x61_2345, READ, {0x1018: RW | 0x401F_FE00}) == (0x4021_2345, 1 << 22)
    assert two.ok(0x61_2345, READ, {0x1018: RW | 0x4020_0000}) == (0x4021_2345, 1 << 21)  # default size
    assert two.fails(0x61_2345, READ, {0x1018: RW | 0x400F_FE00}) == (Reason.BAD_LEVEL, 2)  # 2 MiB must be code 0
    assert two.fails(0x61_2345, READ, {0x1018: RW | 0x1FFF_FE00}) == (Reason.BAD_LEVEL, 2)  # 1 GiB belongs to level 3
    assert two.ok(0x61_2345, READ, {0x1018: RW | 0x0FFF_FE00}) == (0x61_2345, 1 << 29)
    assert two.fails(0x61_2345, READ, {0x1018: RW | 0x4020_1000}) == (Reason.MISALIGNED, 2)
    five = Tree(amd_v1.walk, amd_v1.Config(0x1000, 5))
    top = 0x0003_FFFF_FFFF_F000  # ones up to bit 49, a zero at bit 50: 2^51 bytes
    assert five.ok(0x0005_1234_5678_9ABC, READ, {0x1028: RW | top | 0xE00}) == (0x0005_1234_5678_9ABC, 1 << 51)
    assert five.fails(0, READ, {0x1000: RW | 0x000F_FFFF_FFFF_FE00}) == (Reason.BAD_LEVEL, 5)


def test_amd_v1_levels() -> None:
    # Entry 5 of level 4 leads to level 2; 0x28000607123 has zeros in between, then indices 3 and 7.
    words = {0x1028: RW | 0x2400, 0x2018: RW | 0x3200, 0x3038: RW | 0x987_6000}
    tree = Tree(amd_v1.walk, amd_v1.Config(0x1000, 4), words)
    assert tree.ok(0x280_0060_7123, READ) == (0x987_6123, 4096)
    assert tree.fails(0x280_4060_7123, READ) == (Reason.ADDRESS_WIDTH, 4)
    assert tree.fails(0x280_0060_7123, READ, {0x2018: RW | 0x3400}) == (Reason.BAD_LEVEL, 2)  # level 2 to level 2
    assert tree.fails(0x280_0060_7123, READ, {0x3038: RW | 0x3200}) == (Reason.BAD_LEVEL, 1)
    assert tree.fails(1 << 48, READ) == (Reason.ADDRESS_WIDTH, 0)
    # Level 6: seven bits from bit 57; all 64 bits count; no page entry.
    six = Tree(amd_v1.walk, amd_v1.Config(0x1000, 6), {0x13F8: RW | 0x2200, 0x2FF8: RW | 0x5000})
    assert six.fails(0xFE00_0000_001F_F00F, READ, {0x13F8: RW}) == (Reason.BAD_LEVEL, 6)
    assert six.ok(0xFE00_0000_001F_F00F, READ) == (0x500F, 4096)


def test_amd_v1_permissions_and_reserved_bits() -> None:
    words = {0x1000: RW | 0x2200, 0x2000: RW | 0x9000}
    tree = Tree(amd_v1.walk, amd_v1.Config(0x1000, 2, accessed=True, dirty=True), words)
    answer = tree.ask(0x10, WRITE)
    assert answer == Result(0x9010, 4096, True, True, True, True, (Update(0x1000, 0x20), Update(0x2000, 0x60)))
    assert tree.fails(0, WRITE, {0x1000: 0x2000_0000_0000_2201}) == (Reason.PERMISSION, 1)
    assert tree.fails(0, READ, {0x1000: 0x4000_0000_0000_2201}) == (Reason.PERMISSION, 1)
    assert tree.fails(0, READ, {0x1000: RW | 0x2200 | 1 << 60}) == (Reason.RESERVED_BITS, 2)
    assert tree.ok(0, READ, {0x2000: RW | 0x9000 | 1 << 60 | 1 << 59 | 1 << 63}) == (0x9000, 4096)  # FC, U, ignored
    assert tree.fails(0, READ, {0x2000: RW | 0x9000 | 1 << 58}) == (Reason.RESERVED_BITS, 1)
    assert tree.fails(0, READ, {0x2000: 0x6000_0000_0000_9000}) == (Reason.NOT_PRESENT, 1)
    device_reads = Tree(amd_v1.walk, amd_v1.Config(0x1000, 2, write=False), words)
    assert device_reads.fails(0, WRITE) == (Reason.PERMISSION, 1)


def arm1(root: int, input_bits: int, granule: int = 12, **options: Any) -> arm_lpae.Stage1:
    """A stage 1 with TTBR0 only."""
    return arm_lpae.Stage1(arm_lpae.Tables(root, input_bits, granule), **options)


ARM_WORDS = {0x1000: 0x2003, 0x2008: 0x3003, 0x3008: 0x4003, 0x4008: 0x0000_0000_1234_5743}
ARM = Tree(arm_lpae.walk_stage1, arm1(0x1000, 48), ARM_WORDS)


def test_arm_stage1_pages_and_blocks() -> None:
    assert ARM.ask(0x4020_1ABC, WRITE) == Result(0x1234_5ABC, 4096, True, True, True, True, ())
    assert ARM.ok(0x4020_1ABC, READ, {0x3008: 0x5000_0741}) == (0x5000_1ABC, 1 << 21)
    assert ARM.ok(0x4020_1ABC, READ, {0x2008: 0x8000_0741}) == (0x8020_1ABC, 1 << 30)
    assert ARM.ok(0x4020_1ABC, READ, {0x3008: 0x5010_0741}) == (0x5000_1ABC, 1 << 21)  # RES0 below the size
    assert ARM.fails(0x4020_1ABC, READ, {0x1000: 0x741}) == (Reason.BAD_LEVEL, 4)
    assert ARM.fails(0x4020_1ABC, READ, {0x4008: 0x1234_5741}) == (Reason.BAD_LEVEL, 1)
    assert ARM.fails(0x4020_1ABC, READ, {0x4008: 0x1234_5742}) == (Reason.NOT_PRESENT, 1)
    assert ARM.fails(0x4020_1ABC, READ, {0x4008: 0x1234_5343}) == (Reason.ACCESS_FLAG, 1)
    narrow = Tree(arm_lpae.walk_stage1, arm1(0x1000, 48, pa_bits=32), ARM_WORDS)
    assert narrow.fails(0x4020_1ABC, READ, {0x4008: 0x1_1234_5343}) == (Reason.ADDRESS_WIDTH, 1)  # before the AF


def test_arm_stage1_permissions() -> None:
    # A kernel's data page: DBM, PXN, UXN, AP 00.
    data = {0x4008: 0x0068_0000_1234_5F03}
    assert ARM.ok(0x4020_1ABC, P_WRITE, data) == (0x1234_5ABC, 4096)
    for access in (READ, WRITE, EXECUTE, P_EXECUTE):
        assert ARM.fails(0x4020_1ABC, access, data) == (Reason.PERMISSION, 1)
    # AP 00 without UXN: user code may run what it cannot read.
    assert ARM.ok(0x4020_1ABC, EXECUTE, {0x4008: 0x1234_5F03}) == (0x1234_5ABC, 4096)
    # What a user may write, a supervisor does not execute.
    assert ARM.fails(0x4020_1ABC, P_EXECUTE) == (Reason.PERMISSION, 1)
    assert ARM.ok(0x4020_1ABC, P_EXECUTE, {0x4008: 0x1234_57C3}) == (0x1234_5ABC, 4096)
    # Hierarchical: APTable 10 no write, 01 no user, UXNTable.
    assert ARM.fails(0x4020_1ABC, P_WRITE, {0x1000: 0x2003 | 1 << 62}) == (Reason.PERMISSION, 1)
    assert ARM.fails(0x4020_1ABC, READ, {0x3008: 0x4003 | 1 << 61}) == (Reason.PERMISSION, 1)
    assert ARM.fails(0x4020_1ABC, EXECUTE, {0x3008: 0x4003 | 1 << 60}) == (Reason.PERMISSION, 1)
    flat = arm_lpae.Stage1(arm_lpae.Tables(0x1000, 48, hierarchical=False))
    assert Tree(arm_lpae.walk_stage1, flat, ARM_WORDS).ok(0x4020_1ABC, READ, {0x3008: 0x4003 | 1 << 61})


def test_arm_stage1_hardware_update() -> None:
    tree = Tree(arm_lpae.walk_stage1, arm1(0x1000, 48, ha=True, hd=True), ARM_WORDS)
    clean = {0x4008: 0x0008_0000_1234_53C3}  # DBM, AP 11, AF clear
    answer = tree.ask(0x4020_1ABC, WRITE, clean)
    assert isinstance(answer, Result)
    assert answer.updates == (Update(0x4008, 0x400, 0x80),)
    answer = tree.ask(0x4020_1ABC, READ, clean)
    assert isinstance(answer, Result)
    assert answer.updates == (Update(0x4008, 0x400),)
    denied = tree.ask(0x4020_1ABC, WRITE, {0x4008: 0x1234_53C3})
    assert isinstance(denied, Fault)
    assert (denied.reason, denied.may_update) == (Reason.PERMISSION, (Update(0x4008, 0x400),))
    ha_only = Tree(arm_lpae.walk_stage1, arm1(0x1000, 48, ha=True), ARM_WORDS)
    assert ha_only.fails(0x4020_1ABC, WRITE, clean) == (Reason.PERMISSION, 1)


def test_arm_ranges() -> None:
    lower, upper = arm_lpae.Tables(0x1000, 39), arm_lpae.Tables(0x5000, 25)
    words = {0x1000: 0x741, 0x5000: 0x0040_0741, 0x5078: 0x0060_0741}
    tree = Tree(arm_lpae.walk_stage1, arm_lpae.Stage1(lower, upper), words)
    assert tree.ok(0x1234_5678, READ) == (0x1234_5678, 1 << 30)
    assert tree.fails(0x80_0000_0000, READ) == (Reason.ADDRESS_WIDTH, 0)
    # 25 bits: the walk starts at level 2 with four index bits; 0xffff_ffff_ffe0_0000 is entry 15.
    assert tree.ok(0xFFFF_FFFF_FFE0_1234, READ) == (0x0060_1234, 1 << 21)
    assert tree.fails(0xFFFF_FFFF_FDFF_FFFF, READ) == (Reason.ADDRESS_WIDTH, 0)
    assert tree.fails(0xAA00_0000_1234_5678, READ) == (Reason.ADDRESS_WIDTH, 0)
    tbi = arm_lpae.Stage1(arm_lpae.Tables(0x1000, 39, tbi=True))
    assert Tree(arm_lpae.walk_stage1, tbi, words).ok(0xAA00_0000_1234_5678, READ) == (0x1234_5678, 1 << 30)
    assert Tree(arm_lpae.walk_stage1, tbi, words).fails(0xFFFF_FFFF_FFE0_1234, READ) == (Reason.NOT_PRESENT, 0)


def test_arm_granules() -> None:
    # 16K, 47 bits: indices 46:36, 35:25, 24:14. Level 2 blocks have 32 MiB.
    tree = Tree(arm_lpae.walk_stage1, arm1(0x4000, 47, 14), {0x4008: 0x8003, 0x8008: 0xC003, 0xC008: 0x1234_4743})
    iova = 1 << 36 | 1 << 25 | 1 << 14 | 0x1ABC
    assert tree.ok(iova, READ) == (0x1234_5ABC, 1 << 14)
    assert tree.ok(iova, READ, {0x8008: 0x0600_0741}) == (0x0600_5ABC, 1 << 25)
    assert tree.fails(iova, READ, {0x4008: 0x741}) == (Reason.BAD_LEVEL, 3)
    # 64K, 52 bits: indices 51:42, 41:29, 28:16; output 51:48 in 15:12.
    wide = Tree(
        arm_lpae.walk_stage1,
        arm1(0x4000, 52, 16, pa_bits=52, lpa=True),
        {0x5FF8: 0x1_0003, 0x1_0010: 0x2_0003, 0x2_0018: 0x1234_5678_F743},
    )
    iova = 0x3FF << 42 | 2 << 29 | 3 << 16 | 0xABCD
    assert wide.ok(iova, READ) == (0xF_1234_5678_ABCD, 1 << 16)
    assert wide.ok(iova, READ, {0x1_0010: 0x1234_4000_F741}) == (0xF_1234_4003_ABCD, 1 << 29)
    assert wide.ok(iova, READ, {0x5FF8: 0x0400_0000_1741}) == (0x1_0400_4003_ABCD, 1 << 42)
    # 48 bits in force in an SMMU of 52: 15:12 still are address bits, level 1 still has blocks.
    less = Tree(arm_lpae.walk_stage1, arm1(0x4000, 52, 16, lpa=True), wide.words)
    assert less.fails(iova, READ) == (Reason.ADDRESS_WIDTH, 1)
    assert less.ok(iova, READ, {0x5FF8: 0x0400_0000_0741}) == (0x0400_4003_ABCD, 1 << 42)
    # An SMMU of 48 bits: 15:12 are RES0.
    small = Tree(arm_lpae.walk_stage1, arm1(0x4000, 52, 16), wide.words)
    assert small.ok(iova, READ) == (0x1234_5678_ABCD, 1 << 16)
    assert small.fails(iova, READ, {0x5FF8: 0x0400_0000_0741}) == (Reason.BAD_LEVEL, 3)


def test_arm_stage2() -> None:
    # 40 bits from level 1: two joined tables, ten index bits; entry 0x201 for 0x80_4020_1000.
    tables = arm_lpae.Tables(0x4000, 40, start=1)
    tree = Tree(
        arm_lpae.walk_stage2,
        arm_lpae.Stage2(tables),
        {0x5008: 0x6003, 0x6008: 0x7003, 0x7008: 0x1234_57FF},
    )
    assert tree.ask(0x80_4020_1ABC, WRITE) == Result(0x1234_5ABC, 4096, True, True, True, True, ())
    assert tree.fails(0x180_4020_1ABC, READ) == (Reason.ADDRESS_WIDTH, 0)
    assert tree.fails(0x80_4020_1ABC, WRITE, {0x7008: 0x1234_577F}) == (Reason.PERMISSION, 1)
    assert tree.fails(0x80_4020_1ABC, READ, {0x7008: 0x1234_57BF}) == (Reason.PERMISSION, 1)
    assert tree.fails(0x80_4020_1ABC, EXECUTE, {0x7008: 0x1234_57BF}) == (Reason.PERMISSION, 1)
    for xn, user, privileged in ((0, True, True), (1, True, False), (2, False, False), (3, False, True)):
        word = {0x7008: 0x1234_57FF | xn << 53}
        for access, allowed in ((EXECUTE, user), (P_EXECUTE, privileged)):
            assert isinstance(tree.ask(0x80_4020_1ABC, access, word), Result if allowed else Fault)
    hd = Tree(arm_lpae.walk_stage2, arm_lpae.Stage2(tables, ha=True, hd=True), tree.words)
    answer = hd.ask(0x80_4020_1ABC, WRITE, {0x7008: 0x0008_0000_1234_537F})
    assert isinstance(answer, Result)
    assert answer.updates == (Update(0x7008, 0x480),)
    with pytest.raises(ValueError, match="no start"):
        arm_lpae.Tables(0x8000, 44, start=1)  # 32 joined tables
    with pytest.raises(ValueError, match="aligned"):
        arm_lpae.Tables(0x1000, 40, start=1)


def test_riscv_sv39() -> None:
    # A gigapage at 0x80000000, V R W X A D; 0xffffffc000123456 has index 0x100.
    tree = Tree(riscv.walk, riscv.Config(0x1000, sum=True), {0x1800: 0x2000_00CF})
    assert tree.ok(0xFFFF_FFC0_0012_3456, P_WRITE) == (0x8012_3456, 1 << 30)
    assert tree.fails(0xFFFF_FFC0_0012_3456, READ) == (Reason.PERMISSION, 3)
    assert tree.fails(0x0000_0040_0012_3456, READ) == (Reason.ADDRESS_WIDTH, 0)
    assert tree.fails(0xFFFF_FFC0_0012_3456, P_READ, {0x1800: 0x2000_04CF}) == (Reason.MISALIGNED, 3)
    user = {0x1800: 0x2000_00DF}
    assert tree.ok(0xFFFF_FFC0_0012_3456, READ, user) == (0x8012_3456, 1 << 30)
    assert tree.ok(0xFFFF_FFC0_0012_3456, P_READ, user) == (0x8012_3456, 1 << 30)  # SUM
    assert tree.fails(0xFFFF_FFC0_0012_3456, P_EXECUTE, user) == (Reason.PERMISSION, 3)
    no_sum = Tree(riscv.walk, riscv.Config(0x1000), user)
    assert no_sum.fails(0xFFFF_FFC0_0012_3456, P_READ) == (Reason.PERMISSION, 3)


RISCV_WORDS = {0x1008: 0x801, 0x2008: 0xC01, 0x3008: 0x21D9_50DF}  # tables 0x2000, 0x3000; page 0x87654000
RISCV = Tree(riscv.walk, riscv.Config(0x1000), RISCV_WORDS)


def test_riscv_entries() -> None:
    assert RISCV.ask(0x4020_1ABC, WRITE) == Result(0x8765_4ABC, 4096, True, True, True, True, ())
    assert RISCV.ok(0x4020_1ABC, READ, {0x2008: 0x2008_00DF}) == (0x8020_1ABC, 1 << 21)
    assert RISCV.fails(0x4020_1ABC, READ, {0x3008: 0x21D9_50DE}) == (Reason.NOT_PRESENT, 1)
    assert RISCV.fails(0x4020_1ABC, READ, {0x3008: 0x21D9_50D5}) == (Reason.RESERVED_BITS, 1)  # W without R
    assert RISCV.fails(0x4020_1ABC, READ, {0x3008: 0x21D9_5001}) == (Reason.BAD_LEVEL, 1)
    assert RISCV.fails(0x4020_1ABC, READ, {0x2008: 0xC11}) == (Reason.RESERVED_BITS, 2)  # U of a pointer
    assert RISCV.fails(0x4020_1ABC, READ, {0x2008: 0xC01 | 1 << 61}) == (Reason.RESERVED_BITS, 2)  # PBMT of a pointer
    assert RISCV.ok(0x4020_1ABC, READ, {0x3008: 0x21D9_50DF | 2 << 61}) == (0x8765_4ABC, 4096)
    assert RISCV.fails(0x4020_1ABC, READ, {0x3008: 0x21D9_50DF | 3 << 61}) == (Reason.RESERVED_BITS, 1)
    assert RISCV.fails(0x4020_1ABC, READ, {0x3008: 0x21D9_50DF | 1 << 54}) == (Reason.RESERVED_BITS, 1)
    assert RISCV.fails(0x4020_1ABC, READ, {0x3008: 0x21D9_50DF | 1 << 60}) == (Reason.RESERVED_BITS, 1)
    assert RISCV.fails(0x4020_1ABC, WRITE, {0x3008: 0x21D9_505B}) == (Reason.PERMISSION, 1)
    bare = Tree(riscv.walk, riscv.Config(0x1000, svpbmt=False, svrsw60t59b=True), RISCV_WORDS)
    assert bare.fails(0x4020_1ABC, READ, {0x3008: 0x21D9_50DF | 2 << 61}) == (Reason.RESERVED_BITS, 1)
    assert bare.ok(0x4020_1ABC, READ, {0x3008: 0x21D9_50DF | 3 << 59}) == (0x8765_4ABC, 4096)


def test_riscv_napot() -> None:
    # 64 KiB at 0x87650000: page number 0x87650 with 1000 in its low bits, N.
    napot = 0x8000_0000_21D9_60DF
    assert RISCV.ok(0x4020_1ABC, READ, {0x3008: napot}) == (0x8765_1ABC, 1 << 16)
    assert RISCV.fails(0x4020_1ABC, READ, {0x3008: 0x8000_0000_21D9_50DF}) == (Reason.RESERVED_BITS, 1)
    assert RISCV.fails(0x4020_1ABC, READ, {0x2008: 0x8000_0000_2008_20DF}) == (Reason.RESERVED_BITS, 2)
    without = Tree(riscv.walk, riscv.Config(0x1000, svnapot=False), RISCV_WORDS)
    assert without.fails(0x4020_1ABC, READ, {0x3008: napot}) == (Reason.RESERVED_BITS, 1)


def test_riscv_accessed_and_dirty() -> None:
    assert RISCV.fails(0x4020_1ABC, READ, {0x3008: 0x21D9_501F}) == (Reason.ACCESS_FLAG, 1)
    assert RISCV.fails(0x4020_1ABC, WRITE, {0x3008: 0x21D9_501F}) == (Reason.ACCESS_FLAG, 1)
    assert RISCV.fails(0x4020_1ABC, WRITE, {0x3008: 0x21D9_505F}) == (Reason.DIRTY, 1)
    assert RISCV.ok(0x4020_1ABC, READ, {0x3008: 0x21D9_505F}) == (0x8765_4ABC, 4096)
    hardware = Tree(riscv.walk, riscv.Config(0x1000, hardware_ad=True), RISCV_WORDS)
    for access, before, update in ((READ, 0x1F, 0x40), (WRITE, 0x1F, 0xC0), (WRITE, 0x5F, 0x80)):
        answer = hardware.ask(0x4020_1ABC, access, {0x3008: 0x21D9_5000 | before})
        assert isinstance(answer, Result)
        assert answer.updates == (Update(0x3008, update),)


def test_riscv_second_stage() -> None:
    # Sv39x4: eleven index bits; 0x1ff_c0000000 is entry 0x7ff of the 16 KiB root.
    tree = Tree(riscv.walk, riscv.Config(0x4000, second_stage=True), {0x7FF8: 0x2000_00DF, 0x4000: 0x2000_00CF})
    assert tree.ok(0x1FF_C012_3456, P_WRITE) == (0x8012_3456, 1 << 30)
    assert tree.fails(0x12_3456, READ) == (Reason.PERMISSION, 3)  # U must be 1
    assert tree.fails(0x200_0000_0000, READ) == (Reason.ADDRESS_WIDTH, 0)
    with pytest.raises(ValueError, match="16 KiB"):
        riscv.Config(0x1000, second_stage=True)


def written(builder_type: Any, iova: int, oa: int, size: int, perms: Perms, **options: Any) -> dict[int, int]:
    """Every word that a builder writes for one mapping; tables are allocated from 0x10000 on."""
    image = Memory(1 << 20)
    builder_type(image, Region(0x1_0000, 1 << 20), **options).map(iova, oa, size, perms)
    return image.words


@pytest.mark.parametrize(
    ("builder_type", "options", "mapping", "words"),
    [
        (
            x86.Builder,
            {},
            (X86_IOVA & -4096, 0x1_2345_6000, 4096, Perms(execute=False)),
            {0x1_07F0: 0x1_1007, 0x1_1240: 0x1_2007, 0x1_2D10: 0x1_3007, 0x1_3B38: 0x8000_0001_2345_6007},
        ),
        (
            x86.Builder,
            {"levels": 5},
            (1 << 30, 1 << 30, 1 << 30, Perms(write=False, user=False)),
            {0x1_0000: 0x1_1007, 0x1_1000: 0x1_2007, 0x1_2008: 0x4000_0081},
        ),
        (
            vtd_second_stage.Builder,
            {"levels": 3},
            (0x4020_0000, 0x60_0000, 1 << 21, Perms(write=False)),
            {0x1_0008: 0x1_1003, 0x1_1008: 0x60_0081},
        ),
        (
            ept.Builder,
            {},
            (0x1000, 0xABC000, 4096, Perms(execute=False)),
            {0x1_0000: 0x1_1407, 0x1_1000: 0x1_2407, 0x1_2000: 0x1_3407, 0x1_3008: 0xABC033},
        ),
        (
            amd_v1.Builder,
            {"levels": 2},
            (0x1_4000, 0x1234_4000, 0x4000, Perms()),  # 16 KiB: four entries, one 1 below the zero at bit 13
            {0x1_0000: RW | 0x1_1200, **{0x1_10A0 + 8 * i: RW | 0x1234_5E00 for i in range(4)}},
        ),
        (
            amd_v1.Builder,
            {"levels": 3, "skips": {3: 1}},
            (0x40_0000_0000 + 0x1000, 0x9000, 4096, Perms(write=False)),
            {0x1_0800: RW | 0x1_1200, 0x1_1008: 0x2000_0000_0000_9001},
        ),
        (
            arm_lpae.Builder,
            {"input_bits": 39},
            (0x4020_0000, 0x5000_0000, 1 << 21, Perms(write=False, execute=False)),
            {0x1_0008: 0x1_1003, 0x1_1008: 0x0060_0000_5000_04C1},
        ),
        (
            arm_lpae.Builder,
            {"granule": 16, "input_bits": 42, "pa_bits": 52, "stage": 2},
            (0x1_0000, 0xF_1234_5678_0000, 1 << 16, Perms()),
            {0x1_0000: 0x2_0003, 0x2_0008: 0x1234_5678_F4C3},
        ),
        (
            arm_lpae.Builder,
            {"input_bits": 40, "stage": 2, "joined": 1, "dbm": True},
            (0x80_4000_0000, 1 << 30, 1 << 30, Perms()),
            {0x1_1008: 0x0008_0000_4000_0441},
        ),
        (
            riscv.Builder,
            {},
            (0x4021_0000, 0x8765_0000, 1 << 16, Perms()),
            {0x1_0008: 0x4401, 0x1_1008: 0x4801, **{0x1_2080 + 8 * i: 0x8000_0000_21D9_60DF for i in range(16)}},
        ),
        (
            riscv.Builder,
            {"second_stage": True},
            (0x1FF_C000_0000, 0x8000_0000, 1 << 30, Perms(write=False, execute=False)),
            {0x1_3FF8: 0x2000_00D3},
        ),
    ],
)
def test_builders_write(builder_type: Any, options: dict[str, Any], mapping: tuple[Any, ...], words: Any) -> None:
    assert written(builder_type, *mapping, **options) == words
