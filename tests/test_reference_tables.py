"""Known answers for PASID tables and nested walks, and properties of the case generators."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random
from typing import Any

import pytest
from reference import amd_gcr3, arm_cd, arm_lpae, cases, ept, nested, riscv, riscv_pdt, vtd_pasid, vtd_second_stage, x86
from reference.common import Access, Fault, Kind, Perms, Reason, Result, Update
from reference.formats import FIRST_STAGES, SECOND_STAGES, VARIANTS, Variant
from reference.memory import Memory, Region
from reference.nested_cases import nested_cases

READ, WRITE = Access(Kind.READ), Access(Kind.WRITE)


def reason(answer: Any) -> tuple[Reason, int]:
    """Reason and level of what must be a fault."""
    assert isinstance(answer, Fault), answer
    return answer.reason, answer.level


def test_memory_ends() -> None:
    memory = Memory(0x2000, {0x1FF8: 0x1122_3344_5566_7788})
    assert memory.read64(0x1FF8) == 0x1122_3344_5566_7788
    assert memory.read64(0x2000) is None
    assert memory.read(0x1FF9, 3) == bytes((0x77, 0x66, 0x55))
    assert memory.read(0x1FFF, 2) is None
    memory.apply([Update(0x1FF8, 0xF000_0000_0000_0000, 0x8)])
    assert memory.read64(0x1FF8) == 0xF122_3344_5566_7780
    with pytest.raises(ValueError, match="multiple of 8"):
        memory.read64(4)
    with pytest.raises(ValueError, match="no room"):
        Region(0, 0x1000).allocate(0x2000)


def test_gcr3() -> None:
    # PASID 0x9abcd: 19:18 = 2, 17:9 = 0xd5, 8:0 = 0x1cd.
    words = {0x1010: 0x2001, 0x26A8: 0x3001, 0x3E68: 0xABCD_E001}
    config = amd_gcr3.Config(0x1000, 3)
    assert amd_gcr3.lookup(Memory(1 << 20, words), config, 0x9ABCD) == 0xABCD_E000
    assert reason(amd_gcr3.lookup(Memory(1 << 20, words), config, 0x100000)) == (Reason.ADDRESS_WIDTH, 0)
    assert reason(amd_gcr3.lookup(Memory(1 << 20, words), amd_gcr3.Config(0x1000), 0x200)) == (Reason.ADDRESS_WIDTH, 0)
    assert reason(amd_gcr3.lookup(Memory(1 << 20, words), config, 0x9ABCE)) == (Reason.NOT_PRESENT, 1)
    reserved = Memory(1 << 20, words | {0x26A8: 0x3003})
    assert reason(amd_gcr3.lookup(reserved, config, 0x9ABCD)) == (Reason.RESERVED_BITS, 2)
    assert reason(amd_gcr3.lookup(Memory(0x3000, words), config, 0x9ABCD)) == (Reason.TABLE_ACCESS, 1)
    memory = Memory(1 << 20)
    builder = amd_gcr3.Builder(memory, Region(0x1000, 1 << 20), 3)
    builder.set(0x9ABCD, 0xABCD_E000)
    assert memory.words == words


def test_vtd_pasid() -> None:
    # PASID 0x12345: directory entry 0x48d, table entry 5. Nested: PGTT 3, AW 2, SSADE; FSPM 1, WPE, NXE, SRE.
    words = {0x4468: 0x2_0001, 0x2_0140: 0x5_02C9, 0x2_0148: 0x1234, 0x2_0150: 0x6_0035}
    config = vtd_pasid.Config(0x2000)
    entry = vtd_pasid.lookup(Memory(1 << 20, words), config, 0x12345)
    assert entry == vtd_pasid.Entry(
        vtd_pasid.Type.NESTED,
        0x1234,
        x86.Config(0x6_0000, 5),
        vtd_second_stage.Config(0x5_0000, 4, access_dirty=True),
        True,
    )

    def changed(address: int, word: int) -> tuple[Reason, int]:
        return reason(vtd_pasid.lookup(Memory(1 << 20, words | {address: word}), config, 0x12345))

    assert changed(0x4468, 0x2_0000) == (Reason.NOT_PRESENT, 2)
    assert changed(0x4468, 0x2_0005) == (Reason.RESERVED_BITS, 2)
    assert changed(0x4468, 0x100_0001) == (Reason.TABLE_ACCESS, 1)
    assert changed(0x2_0140, 0x5_02C8) == (Reason.NOT_PRESENT, 1)
    assert changed(0x2_0140, 0x5_0009) == (Reason.RESERVED_BITS, 1)  # PGTT 0
    assert changed(0x2_0140, 0x5_02D1) == (Reason.BAD_LEVEL, 1)  # AW 4
    assert changed(0x2_0150, 0x6_003D) == (Reason.BAD_LEVEL, 1)  # FSPM 3
    small = vtd_pasid.Config(0x2000, 0)
    assert reason(vtd_pasid.lookup(Memory(1 << 20, words), small, 1 << 13)) == (Reason.ADDRESS_WIDTH, 0)
    memory = Memory(1 << 20)
    builder = vtd_pasid.Builder(memory, Region(0x1_0000, 1 << 20))
    builder.set(0x12345, domain=0x1234, first=(0x6_0000, 5), second=(0x5_0000, 4))
    # A directory of 2^14 entries takes 128 KiB, so it lies at 0x20000 and the table behind it.
    assert memory.words == {0x2_2468: 0x4_0001, 0x4_0140: 0x5_00C9, 0x4_0148: 0x1234, 0x4_0150: 0x6_0035}


def test_context_descriptors() -> None:
    # T0SZ 25, TG0 4K, EPD1, V, IPS 48, AA64, ASID 0x77, TTB0 0x5000. SubstreamID 0x45: group 1, CD 5 of a 4 KiB leaf.
    cd = 0x0077_0205_C000_0019
    words = {0x1008: 0x2001, 0x2140: cd, 0x2148: 0x5000}
    config = arm_cd.Config(0x1000, 6, 8)
    expected = arm_cd.Entry(0x77, arm_lpae.Stage1(arm_lpae.Tables(0x5000, 39), lpa=True))
    assert arm_cd.lookup(Memory(1 << 20, words), config, 0x45) == expected
    linear = arm_cd.Config(0x1000, 0, 8)
    assert arm_cd.lookup(Memory(1 << 20, {0x2140: cd, 0x2148: 0x5000}), linear, 0x45) == expected
    wide = arm_cd.Config(0x1000, 10, 12)
    assert arm_cd.lookup(Memory(1 << 20, {0x1008: 0x1_0001, 0x1_1140: cd, 0x1_1148: 0x5000}), wide, 0x445) == expected

    def changed(address: int, word: int, substream: int = 0x45) -> tuple[Reason, int]:
        return reason(arm_cd.lookup(Memory(1 << 20, words | {address: word}), config, substream))

    assert changed(0, 0, 0x100) == (Reason.ADDRESS_WIDTH, 0)
    assert changed(0x1008, 0x2000) == (Reason.NOT_PRESENT, 2)
    assert changed(0x2140, cd & ~(1 << 31)) == (Reason.NOT_PRESENT, 1)
    for illegal in (cd & ~(1 << 41), cd | 1 << 15, cd | 3 << 6, cd & ~0x3F | 15, cd | 7 << 32, cd | 1 << 42):
        assert changed(0x2140, illegal) == (Reason.RESERVED_BITS, 1)
    assert changed(0x2148, 0x5010) == (Reason.RESERVED_BITS, 1)  # not aligned to its table
    # Both ranges: T1SZ 16, TG1 16K (1); HAD1, TTB1 0x8000; HD, HA, TBI1, AFFD.
    both = (cd & ~(1 << 30)) | 16 << 16 | 1 << 22 | 3 << 42 | 1 << 39 | 1 << 35
    entry = arm_cd.lookup(Memory(1 << 20, words | {0x2140: both, 0x2150: 0x8002}), config, 0x45)
    assert entry == arm_cd.Entry(
        0x77,
        arm_lpae.Stage1(
            arm_lpae.Tables(0x5000, 39),
            arm_lpae.Tables(0x8000, 48, 14, tbi=True, hierarchical=False),
            ha=True,
            hd=True,
            affd=True,
            lpa=True,
        ),
    )
    for split, expected_words in (
        (0, {0x4000 + 0x1140: cd, 0x4000 + 0x1148: 0x5000}),
        (6, {0x1008: 0x2001, 0x2140: cd, 0x2148: 0x5000}),
    ):
        memory = Memory(1 << 20)
        builder = arm_cd.Builder(memory, Region(0x1000, 1 << 20), split, 8)
        builder.set(0x45, asid=0x77, root=0x5000, t0sz=25)
        assert memory.words == expected_words


def test_process_directory() -> None:
    # process_id 0x9abcd: PDI 4, 0x1ab, 0xcd. PC: ENS, SUM, PSCID 0x80055; Sv48 at 0x5000.
    words = {0x1020: 0x801, 0x2D58: 0xC01, 0x3CD0: 0x8005_5007, 0x3CD8: 0x9000_0000_0000_0005}
    config = riscv_pdt.Config(0x1000, 3, hardware_ad=True)
    expected = riscv_pdt.Entry(0x8_0055, True, riscv.Config(0x5000, 4, hardware_ad=True, sum=True))
    assert riscv_pdt.lookup(Memory(1 << 20, words), config, 0x9ABCD) == expected

    def changed(address: int, word: int) -> tuple[Reason, int]:
        return reason(riscv_pdt.lookup(Memory(1 << 20, words | {address: word}), config, 0x9ABCD))

    assert changed(0x1020, 0x800) == (Reason.NOT_PRESENT, 3)
    assert changed(0x2D58, 0xC03) == (Reason.RESERVED_BITS, 2)
    assert changed(0x2D58, 1 << 54 | 0xC01) == (Reason.RESERVED_BITS, 2)
    assert changed(0x3CD0, 0x5_5006) == (Reason.NOT_PRESENT, 1)
    assert changed(0x3CD0, 0x5_500F) == (Reason.RESERVED_BITS, 1)
    assert changed(0x3CD8, 0x1000_0000_0000_0005) == (Reason.RESERVED_BITS, 1)
    for levels, limit in ((1, 1 << 8), (2, 1 << 17), (3, 1 << 20)):
        answer = riscv_pdt.lookup(Memory(1 << 20, words), riscv_pdt.Config(0x1000, levels), limit)
        assert reason(answer) == (Reason.ADDRESS_WIDTH, 0)
    memory = Memory(1 << 20)
    builder = riscv_pdt.Builder(memory, Region(0x1000, 1 << 20), 3)
    builder.set(0x9ABCD, pscid=0x8_0055, root=0x5000, mode=9, flags=7)
    assert memory.words == words


# A guest of four x86 tables at 0x1000 to 0x4000 (indices 0, 1, 1, 1 for 0x40201000) whose page is GPA 0x5000; a second
# stage of three levels at host 0x100000 that puts GPA 0xN000 at host 0x80N000.
GUEST = {0x80_1000: 0x2007, 0x80_2008: 0x3007, 0x80_3008: 0x4007, 0x80_4008: 0x5007}
HOST = {0x10_0000: 0x10_1003, 0x10_1000: 0x10_2003, **{0x10_2000 + 8 * n: 0x80_0003 | n << 12 for n in range(1, 6)}}
FIRST = nested.Stage(x86.walk, x86.Config(0x1000))
SECOND = nested.Stage(vtd_second_stage.walk, vtd_second_stage.Config(0x10_0000, 3))


def ask(access: Access, changed: dict[int, int], second: nested.Stage = SECOND) -> Any:
    """The nested walk of 0x40201abc, some words being replaced."""
    return nested.walk(Memory(1 << 24, GUEST | HOST | changed), FIRST, second, 0x4020_1ABC, access)


def test_nested_page() -> None:
    answer = ask(WRITE, {})
    updates = (Update(0x80_1000, 0x20), Update(0x80_2008, 0x20), Update(0x80_3008, 0x20), Update(0x80_4008, 0x60))
    assert answer == nested.NestedResult(0x80_5ABC, 0x5ABC, 4096, True, True, True, True, updates)
    # A 2 MiB guest page over 4 KiB host pages is a 4 KiB translation: offset 0x1abc of GPA 0, host page 1.
    answer = ask(READ, {0x80_3008: 0x87})
    assert (answer.output, answer.gpa, answer.size) == (0x80_1ABC, 0x1ABC, 4096)


def test_nested_faults_name_their_stage() -> None:
    def told(access: Access, changed: dict[int, int]) -> tuple[Any, ...]:
        fault = ask(access, changed)
        assert isinstance(fault, nested.NestedFault), fault
        return fault.stage, fault.reason, fault.level, fault.gpa, fault.implicit

    assert told(READ, {0x80_3008: 0}) == (1, Reason.NOT_PRESENT, 2, 0x3008, False)
    assert told(READ, {0x10_2018: 0}) == (2, Reason.NOT_PRESENT, 1, 0x3008, True)
    assert told(READ, {0x10_2028: 0}) == (2, Reason.NOT_PRESENT, 1, 0x5ABC, False)
    assert told(WRITE, {0x10_2028: 0x80_5001}) == (2, Reason.PERMISSION, 1, 0x5ABC, False)
    # A table in a read-only page: its accessed bit cannot be set, unless it is set already.
    assert told(READ, {0x10_2020: 0x80_4001}) == (2, Reason.PERMISSION, 1, 0x4008, True)
    assert isinstance(ask(READ, {0x10_2020: 0x80_4001, 0x80_4008: 0x5027}), nested.NestedResult)
    # Stage 1 ends before its updates begin.
    assert told(READ, {0x10_2008: 0x80_1001, 0x80_4008: 0}) == (1, Reason.NOT_PRESENT, 1, 0x4008, False)
    # A guest table that stage 2 puts beyond memory.
    assert told(READ, {0x10_2020: 0x100_0003}) == (1, Reason.TABLE_ACCESS, 1, 0x4008, False)
    assert told(READ, {0x80_4008: 0x80_0000_0007}) == (2, Reason.ADDRESS_WIDTH, 0, 0x80_0000_0ABC, False)


def test_nested_dirty_bits_of_stage_two() -> None:
    stage = nested.Stage(vtd_second_stage.walk, vtd_second_stage.Config(0x10_0000, 3, access_dirty=True))
    updates = {u.address: u.set for u in ask(READ, {}, stage).updates}
    # Guest tables were written (accessed bits), the page itself was read.
    assert [updates[0x10_2000 + 8 * n] for n in range(1, 6)] == [0x300, 0x300, 0x300, 0x300, 0x100]
    marked = {a: w | 0x20 for a, w in GUEST.items()}
    updates = {u.address: u.set for u in ask(READ, marked, stage).updates}
    assert [updates[0x10_2000 + 8 * n] for n in range(1, 6)] == [0x100] * 5
    # EPT with accessed and dirty flags sees each table access as a write (four levels, root at 0x110000).
    words = {0x11_0000: 0x10_0007, 0x10_0000: 0x10_1007, 0x10_1000: 0x10_2007}
    words |= {0x10_2000 + 8 * n: 0x80_0037 | n << 12 for n in range(1, 6)}
    stage = nested.Stage(ept.walk, ept.Config(0x11_0000, access_dirty=True), Kind.WRITE)
    updates = {u.address: u.set for u in ask(READ, marked | words, stage).updates}
    assert [updates[0x10_2000 + 8 * n] for n in range(1, 6)] == [0x300, 0x300, 0x300, 0x300, 0x100]
    fault = ask(READ, marked | words | {0x10_2010: 0x80_2035}, stage)
    assert (fault.stage, fault.reason, fault.gpa) == (2, Reason.PERMISSION, 0x2008)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_what_is_built_is_walked(variant: Variant) -> None:
    """Each leaf size at both ends of the input: first and last byte translate as mapped, with its size and no more."""
    builder = variant.make(Memory(cases.MEMORY_BYTES), Region(*cases.TABLES))
    offset = 1 << 34  # keeps outputs apart from inputs; below every output limit
    expected: dict[int, tuple[int, int]] = {}
    for size in builder.sizes:
        for iova in (0, 4 * size, (1 << builder.input_bits) - size):
            oa = (iova % (1 << 33) + offset) // size * size
            try:
                builder.map(iova, oa, size, leaf=size)
            except ValueError:
                continue  # taken by a larger leaf, or skipped
            expected[iova] = (oa, size)
    assert expected
    user = Access(Kind.READ)
    for iova, (oa, size) in expected.items():
        for place in (0, size // 2 + 1, size - 1):
            answer = variant.walk(builder.memory, variant.config(builder), builder.extend(iova + place), user)
            if isinstance(answer, Fault):
                # only for pages that this configuration does not know
                assert answer.reason is Reason.RESERVED_BITS
                assert ("large_1g" in variant.changes or "gigabyte_pages" in variant.changes) and size > 4096
            else:
                assert (answer.output, answer.size) == (oa + place, size)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_cases_are_repeatable_and_varied(variant: Variant) -> None:
    first, second = ([c.answers() for c in cases.adversarial(variant, Random(7))] for _ in range(2))
    assert first == second
    seen = Counter(a.reason if isinstance(a, Fault) else None for answers in first for a in answers)
    assert {None, Reason.NOT_PRESENT} <= set(seen)
    assert len(seen) >= 4, seen


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_updates_are_honest(variant: Variant) -> None:
    """Updates change what they name; applying them leaves the answer as it was, with nothing more to update."""
    for case in islice(cases.adversarial(variant, Random(3)), 12):
        for iova, access in case.accesses:
            answer = variant.walk(case.memory, case.config, iova, access)
            updates = answer.may_update if isinstance(answer, Fault) else answer.updates
            for update in updates:
                old = case.memory.read64(update.address)
                assert old is not None
                assert not old & update.set
                assert old & update.clear == update.clear
            if isinstance(answer, Result) and len({u.address & -8192 for u in updates}) == len(updates):
                image = case.memory.copy()
                image.apply(updates)
                again = variant.walk(image, case.config, iova, access)
                if isinstance(again, Fault):  # one entry as pointer and leaf: RISC-V reserves A and D in pointers
                    assert variant.walk is riscv.walk
                else:
                    assert (again.output, again.size, again.updates) == (answer.output, answer.size, ())


def test_every_bit_flips() -> None:
    variant = next(v for v in VARIANTS if v.name == "riscv-sv39")
    flips = list(cases.bit_flips(variant, Random(1), leaves=1))
    clean = {c.memory.read64(a) for c in flips for a in c.memory.words}
    assert len(flips) % 64 == 0
    assert len(clean) >= 64


@pytest.mark.parametrize("second", SECOND_STAGES[::4], ids=lambda v: v.name)
def test_nested_cases_meet_both_stages(second: Variant) -> None:
    stages: Counter[int] = Counter()
    for first in FIRST_STAGES[::5]:
        for case in nested_cases(first, second, Random(5)):
            for answer in case.answers():
                stages[answer.stage if isinstance(answer, nested.NestedFault) else 0] += 1
    assert stages[1] and stages[2]
    if second.name != "amd-v1-1":  # 2 MiB of guest memory leave no page of a random guest in reach
        assert stages[0]


def test_builders_refuse_overlap() -> None:
    builder = x86.Builder(Memory(1 << 20), Region(0x1_0000, 1 << 20))
    builder.map(0, 0, 1 << 21, Perms())
    for iova, size in ((0, 1 << 21), (0x1000, 4096), (0, 1 << 30)):
        with pytest.raises(ValueError, match="mapped already"):
            builder.map(iova, 0, size, leaf=size)
    with pytest.raises(ValueError, match="no leaf fits"):
        builder.map(1 << 21, 0x800, 4096)
