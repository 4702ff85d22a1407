"""Tables built in plain memory, translations of many IOVAs at once, and the program of docs/core.md."""

from __future__ import annotations

import contextlib
import io
import random
import re
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import amd_v1_reference as reference
import pytest

from backend.core import (
    RW,
    X86,
    Access,
    AmdV1,
    ArmStage1,
    ArmStage2,
    ArmTree,
    BadValueError,
    ClosedError,
    Core,
    CoreError,
    Ept,
    Fault,
    LimitError,
    NotMappedError,
    OverlapError,
    PlainMemory,
    Reason,
    RiscV,
    RiscVSecondStage,
    TableBuilder,
    TableFormat,
    Translation,
    UnknownIdError,
    VtdSecondStage,
)

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = 4096
MEBI = 1 << 20
RID = 8


@pytest.fixture
def memory() -> Iterator[PlainMemory]:
    with PlainMemory(16 * MEBI) as made:
        yield made


def walk(memory: PlainMemory, builder: TableBuilder, iova: int) -> tuple[int, int] | str:
    """GPA and log2 of the leaf, or the reason, by the walker written from the specification."""

    def read(gpa: int) -> int:
        return int(struct.unpack("<Q", memory[gpa : gpa + 8])[0])

    found = reference.walk(read, builder.root, builder.binding["levels"], iova, write=False)
    return found.reason if isinstance(found, reference.Stop) else (found.address, found.size_lg2)


def test_the_program_of_the_document() -> None:
    text = (DOCS / "core.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", text, re.S)
    shown = re.findall(r"It prints\n\n```\n(.*?)```", text, re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program[0], "docs/core.md", "exec"), {})
    assert len(program) == 1
    assert [printed.getvalue()] == shown


def test_leaves_are_as_large_as_alignment_allows(memory: PlainMemory) -> None:
    builder = TableBuilder("amd-v1", memory, first=8 * MEBI)
    builder.map(0x40000000 - PAGE, 2 * MEBI - PAGE, 2 * MEBI + 2 * PAGE)
    assert walk(memory, builder, 0x40000000 - PAGE) == (2 * MEBI - PAGE, 12)
    assert walk(memory, builder, 0x40000000 + 5) == (2 * MEBI + 5, 21)
    assert walk(memory, builder, 0x40000000 + 2 * MEBI) == (4 * MEBI, 12)
    assert walk(memory, builder, 0x40000000 + 2 * MEBI + PAGE) == "NOT_PRESENT"


def test_an_unmap_splits_what_is_larger(memory: PlainMemory) -> None:
    builder = TableBuilder("amd-v1", memory, first=8 * MEBI)
    builder.map(0, 1 << 30, 1 << 30, Access.READ)
    builder.unmap(4 * MEBI + PAGE, PAGE)
    assert walk(memory, builder, 4 * MEBI + PAGE) == "NOT_PRESENT"
    for iova, lg2 in ((0, 21), (4 * MEBI, 12), (4 * MEBI + 2 * PAGE, 12), (6 * MEBI - 1, 12), (6 * MEBI, 21)):
        assert walk(memory, builder, iova) == ((1 << 30) + iova, lg2)


@pytest.mark.parametrize("levels", range(1, 7))
def test_against_a_dictionary(memory: PlainMemory, levels: int) -> None:
    builder = TableBuilder("amd-v1", memory, levels=levels, first=8 * MEBI)
    chance = random.Random(levels)
    expected: dict[int, int] = {}
    base = (1 << {1: 21, 2: 30, 3: 39, 4: 48, 5: 57, 6: 64}[levels]) - (1 << 21)
    for _ in range(300):
        first, pages, gpa = chance.randrange(500), chance.randrange(1, 12), chance.randrange(1 << 20)
        iova, wanted = base + first * PAGE, range(first, first + pages)
        if chance.randrange(2):
            if any(page in expected for page in wanted):
                with pytest.raises(OverlapError):
                    builder.map(iova, gpa * PAGE, pages * PAGE)
                continue
            builder.map(iova, gpa * PAGE, pages * PAGE)
            expected |= {page: gpa + i for i, page in enumerate(wanted)}
        elif all(page in expected for page in wanted):
            builder.unmap(iova, pages * PAGE)
            expected = {page: to for page, to in expected.items() if page not in wanted}
        else:
            with pytest.raises(NotMappedError):
                builder.unmap(iova, pages * PAGE)
    for page in range(512):
        found = (expected[page] * PAGE, 12) if page in expected else "NOT_PRESENT"
        assert walk(memory, builder, base + page * PAGE) == found


def test_without_room_nothing_is_mapped(memory: PlainMemory) -> None:
    builder = TableBuilder("amd-v1", memory, first=8 * MEBI, size=5 * PAGE)
    builder.map(0, 0, PAGE)
    with pytest.raises(LimitError):
        builder.map(2 * MEBI - PAGE, 0, 4 * MEBI + PAGE + PAGE)
    assert walk(memory, builder, 2 * MEBI - PAGE) == "NOT_PRESENT"
    assert walk(memory, builder, 0) == (0, 12)


def test_tables_that_others_wrote_over_lead_nowhere_else(memory: PlainMemory) -> None:
    """An entry put there by hand, to memory outside of the builder's part."""
    builder = TableBuilder("amd-v1", memory, first=8 * MEBI)
    builder.map(0, 0, PAGE)
    for target in (0, 1 << 51, 12 * MEBI | 1 << 40):
        memory[builder.root : builder.root + 8] = struct.pack("<Q", 1 | 3 << 9 | 3 << 61 | target)
        with pytest.raises(BadValueError):
            builder.map(PAGE, 0, PAGE)
        with pytest.raises(BadValueError):
            builder.unmap(0, PAGE)
    assert bytes(memory[0 : 8 * MEBI]) == bytes(8 * MEBI)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda memory: PlainMemory(PAGE + 1), BadValueError),
        (lambda memory: PlainMemory(0), BadValueError),
        (lambda memory: TableBuilder("none", memory), UnknownIdError),
        (lambda memory: TableBuilder("amd-v1", memory, levels=7), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory, levels=0), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory, first=16 * MEBI), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory, first=-PAGE), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory, first=PAGE, size=16 * MEBI), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory, dirty=True), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory).map(1, 0, PAGE), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory).map(0, 0, 0), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory).map(1 << 48, 0, PAGE), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory).map(0, 1 << 52, PAGE), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory).map(0, -PAGE, PAGE), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory).map(0, 0, PAGE, Access(0)), BadValueError),
        (lambda memory: TableBuilder("amd-v1", memory).unmap(0, PAGE), NotMappedError),
    ],
)
def test_misuse_is_told(memory: PlainMemory, call: object, error: type[CoreError]) -> None:
    assert callable(call)
    with pytest.raises(error):
        call(memory)


def test_memory_that_was_closed() -> None:
    memory = PlainMemory(MEBI, memfd=True)
    builder = TableBuilder("amd-v1", memory)
    memory.close()
    with pytest.raises(ClosedError):
        builder.map(0, 0, PAGE)


def test_many_translations_are_as_one_each(memory: PlainMemory) -> None:
    core = Core(iotlb_entries=64)
    core.create_host_space(1)
    core.map(1, 0, memory.hva, len(memory), RW)
    builder = TableBuilder("amd-v1", memory, first=8 * MEBI)
    builder.map(0, 0, 4 * MEBI)
    builder.map(1 << 32, 5 * MEBI, PAGE, Access.READ)
    core.create_nested_space(2, 1)
    core.bind_table(2, **builder.binding)
    core.attach(RID, None, 2)
    chance = random.Random(1)
    asked = [chance.choice((0, 4 * MEBI - 1, 4 * MEBI, 1 << 32, 1 << 50)) + chance.randrange(9) for _ in range(200)]
    for access in (Access.READ, Access.WRITE):
        found = core.translate_many(RID, array("Q", asked), access)
        assert len(found) == len(asked)
        for iova, hva, gpa, size, reason in zip(asked, found.hva, found.gpa, found.size, found.reason, strict=True):
            one = core.translate(RID, iova, access)
            if isinstance(one, Translation):
                assert (hva, gpa, size, reason) == (one.hva, one.gpa, one.size, 0)
            else:
                assert isinstance(one, Fault)
                assert (hva, gpa, size, Reason(reason)) == (0, 0, 0, one.reason)
    as_bytes = core.translate_many(RID, struct.pack("<Q", 5 * MEBI), Access.READ)
    assert list(as_bytes.reason) == [Reason.NOT_PRESENT]
    assert len(core.translate_many(RID, b"", Access.READ)) == 0
    for wrong in (array("q", [1]), array("I", [1, 2]), b"seven..", memoryview(array("Q", [1, 2, 3]))[::2]):
        with pytest.raises(BadValueError):
            core.translate_many(RID, wrong, Access.READ)
    core.close()


@pytest.mark.parametrize(
    "fmt",
    [
        AmdV1(levels=6),
        X86(levels=5),
        VtdSecondStage(levels=3),
        Ept(),
        *(ArmStage1(ArmTree(input_bits, granule)) for input_bits, granule in ((48, 4096), (47, 16384), (48, 65536))),
        ArmStage2(ArmTree(40, 4096, levels=3)),
        RiscV(levels=5),
        RiscVSecondStage(levels=4),
    ],
    ids=lambda fmt: fmt.name,
)
def test_a_table_of_any_format_is_bound_as_it_was_built(fmt: TableFormat) -> None:
    big = 1 << 16  # a page of every granule
    with PlainMemory(64 * MEBI) as memory:
        core = Core()
        core.create_host_space(1, fmt=fmt)
        core.map(1, 0, memory.hva, len(memory), RW)
        builder = TableBuilder(fmt, memory, first=32 * MEBI)
        builder.map(32 * MEBI, 0, 2 * big)
        builder.map(1 << 30, 5 * big, big, Access.READ)
        core.create_nested_space(2, 1)
        core.bind_table(2, **builder.binding)
        core.attach(RID, None, 2)
        memory[big + 7 : big + 11] = b"here"
        memory[5 * big : 5 * big + 5] = b"there"
        assert core.dma_read(RID, 32 * MEBI + big + 7, 4) == b"here"
        assert core.dma_read(RID, 1 << 30, 5) == b"there"
        refused = core.dma_write(RID, 1 << 30, b"no")
        assert refused is not None
        assert (refused.stage, refused.reason) == (1, Reason.PERMISSION)
        core.close()
