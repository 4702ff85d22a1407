"""Tables built in guest memory, in every format: permission changed in place, and dirty leaves read and cleared."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from reference import amd_v1, arm_lpae, ept, riscv, vtd_second_stage, x86
from reference import common as ref

from backend.core import (
    RW,
    Access,
    BadValueError,
    Core,
    Fault,
    NotMappedError,
    PlainMemory,
    Reason,
    TableBuilder,
    UntrackedError,
)

PAGE, MEBI = 4096, 1 << 20
STAGE2, CHILD, RID = 1, 2, 9
TABLES = 32 * MEBI


@dataclass(frozen=True)
class Format:
    """walk and config: the reference's; `chosen`: dirty bits are an option."""

    name: str
    levels: int
    walk: Any
    config: Any
    chosen: bool = True

    def __str__(self) -> str:
        return self.name


FORMATS = (
    Format("amd-v1", 4, amd_v1.walk, lambda root: amd_v1.Config(root, 4, accessed=True, dirty=True)),
    Format("x86", 4, x86.walk, lambda root: x86.Config(root, 4), chosen=False),
    Format("vtd-second-stage", 4, vtd_second_stage.walk,
           lambda root: vtd_second_stage.Config(root, 4, access_dirty=True)),
    Format("ept", 4, ept.walk, lambda root: ept.Config(root, 4, access_dirty=True)),
    Format("riscv", 3, riscv.walk, lambda root: riscv.Config(root, 3, hardware_ad=True)),
    Format("riscv-x4", 3, riscv.walk, lambda root: riscv.Config(root, 3, second_stage=True, hardware_ad=True)),
)  # fmt: skip


class Guest:
    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        self.memory = PlainMemory(40 * MEBI)
        self.builder = TableBuilder(fmt.name, self.memory, levels=fmt.levels, first=TABLES, accessed=fmt.chosen,
                                    dirty=fmt.chosen)  # fmt: skip
        self.core = Core()
        self.core.create_host_space(STAGE2)
        self.core.map(STAGE2, 0, self.memory.hva, len(self.memory), RW)
        self.core.create_nested_space(CHILD, STAGE2)
        self.core.bind_table(CHILD, **self.builder.binding)
        self.core.attach(RID, None, CHILD)

    def read64(self, address: int) -> int | None:
        return int(struct.unpack("<Q", self.memory[address : address + 8])[0])

    def permits(self, iova: int) -> tuple[int, bool, bool]:
        """GPA, read and write, by the reference."""
        found = self.fmt.walk(self, self.fmt.config(self.builder.root), iova, ref.Access(ref.Kind.READ))
        assert isinstance(found, ref.Result)
        return found.output, found.read, found.write

    def dirty(self, iova: int, size: int, **options: Any) -> set[int]:
        bitmap = self.builder.read_dirty(iova, size, **options)
        return {i for i in range(8 * len(bitmap)) if bitmap[i // 8] >> i % 8 & 1}

    def close(self) -> None:
        self.core.close()
        self.memory.close()


@pytest.fixture(params=FORMATS, ids=str)
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    made = Guest(request.param)
    yield made
    made.close()


def test_protect_splits_what_is_larger(guest: Guest) -> None:
    builder = guest.builder
    builder.map(0, 8 * MEBI, 4 * MEBI)
    builder.protect(2 * MEBI - PAGE, 2 * PAGE, Access.READ)
    for iova in (0, 2 * MEBI - 2 * PAGE, 2 * MEBI + PAGE, 4 * MEBI - 1):
        assert guest.permits(iova) == (8 * MEBI + iova, True, True)
    for iova in (2 * MEBI - PAGE, 2 * MEBI, 2 * MEBI + PAGE - 1):
        assert guest.permits(iova) == (8 * MEBI + iova, True, False)
        answer = guest.core.dma_write(RID, iova, b"x")
        assert isinstance(answer, Fault)
        assert answer.reason == Reason.PERMISSION
    builder.protect(0, 4 * MEBI, RW)
    guest.core.invalidate(CHILD)
    assert guest.permits(2 * MEBI) == (10 * MEBI, True, True)
    with pytest.raises(NotMappedError):
        builder.protect(4 * MEBI - PAGE, 2 * PAGE, RW)
    with pytest.raises(BadValueError):
        builder.protect(0, PAGE + 1, RW)


def test_dirty_leaves_are_read_and_cleared(guest: Guest) -> None:
    core, builder = guest.core, guest.builder
    builder.map(2 * MEBI, 8 * MEBI, 2 * MEBI)
    builder.map(4 * MEBI, 10 * MEBI + PAGE, 4 * PAGE)
    assert guest.dirty(0, 8 * MEBI) == set(), "leaves are made clean"
    assert isinstance(core.dma_read(RID, 2 * MEBI, 4), bytes)
    assert guest.dirty(0, 8 * MEBI) == set()
    for _ in range(2):
        core.invalidate(CHILD)
        assert core.dma_write(RID, 4 * MEBI + PAGE, b"some") is None
        assert guest.dirty(0, 8 * MEBI, clear=False) == {1025}
        assert guest.dirty(4 * MEBI, 2 * PAGE, page_size=2 * PAGE) == {0}
        assert guest.dirty(0, 8 * MEBI) == set()
    assert core.dma_write(RID, 2 * MEBI + 77, b"some") is None
    assert guest.dirty(0, 8 * MEBI, page_size=MEBI, clear=False) == {2, 3}, "all of the large leaf"
    assert guest.dirty(2 * MEBI + PAGE, 3 * PAGE) == {0, 1, 2}
    assert guest.dirty(2 * MEBI, 5 * PAGE, clear=False) == {0, 4}, "split, and the rest is dirty still"
    builder.protect(2 * MEBI, PAGE, Access.READ)
    assert guest.dirty(2 * MEBI, 5 * PAGE) == {0, 4}
    core.invalidate(CHILD)
    assert core.dma_write(RID, 2 * MEBI + 2 * PAGE, b"some") is None
    assert guest.dirty(2 * MEBI, 5 * PAGE) == {2}


@pytest.mark.parametrize("fmt", [one for one in FORMATS if one.chosen], ids=str)
def test_without_dirty_bits_there_is_nothing_to_read(fmt: Format) -> None:
    with PlainMemory(MEBI) as memory:
        builder = TableBuilder(fmt.name, memory, levels=fmt.levels)
        with pytest.raises(UntrackedError):
            builder.read_dirty(0, PAGE)


@pytest.mark.parametrize("stage", [1, 2])
def test_arm_keeps_its_dirty_state_in_the_permission(stage: int) -> None:
    """DBM set: not writable is clean, writable is dirty (Arm ARM D8.5); by the words alone."""
    from backend.core._native import ffi, lib  # noqa: PLC0415

    tree = {"levels": 4, "granule": 12, "input_bits": 48}
    flags = lib.VIO_TABLE_ACCESSED | lib.VIO_TABLE_DIRTY
    with PlainMemory(MEBI) as memory:
        out = ffi.new("vio_guest_table **")
        asked = ffi.new("vio_table *", {"tree": tree, "flags": flags})
        number = lib.vio_format_find(f"arm-s{stage}".encode())
        assert lib.vio_guest_table_create(number, asked, memory.pointer, 0, MEBI, out) == 0
        table = ffi.gc(out[0], lib.vio_guest_table_destroy)
        lib.vio_guest_table_get(table, asked)
        assert lib.vio_guest_table_map(table, 0, 0x8000, PAGE, RW) == 0

        class Reader:
            def read64(self, address: int) -> int | None:
                return int(struct.unpack("<Q", memory[address : address + 8])[0])

        tables = arm_lpae.Tables(asked.tree.root, 48)
        walk: Any = arm_lpae.walk_stage1 if stage == 1 else arm_lpae.walk_stage2
        config = (arm_lpae.Stage1(tables, ha=True, hd=True) if stage == 1
                  else arm_lpae.Stage2(tables, ha=True, hd=True))  # fmt: skip

        def updates() -> tuple[ref.Update, ...]:
            found = walk(Reader(), config, 0, ref.Access(ref.Kind.WRITE))
            assert isinstance(found, ref.Result)
            assert (found.output, found.write) == (0x8000, True)
            return found.updates

        bitmap = bytearray(1)

        def read(clear: bool) -> int:
            bitmap[0] = 0
            assert lib.vio_guest_table_read_dirty(table, 0, PAGE, 12, clear, ffi.from_buffer(bitmap)) == 0
            return bitmap[0]

        assert read(False) == 0
        (update,) = updates()
        leaf = ((Reader().read64(update.address) or 0) | update.set) & ~update.clear
        memory[update.address : update.address + 8] = struct.pack("<Q", leaf)
        assert updates() == ()
        assert (read(False), read(True), read(True)) == (1, 1, 0)
        assert updates() == (update,)
