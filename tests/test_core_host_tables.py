"""Tables that the core builds, in every format: walked by the reference, they give what a list of mappings says."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from backend.core._native import ffi, lib
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import amd_v1, arm_lpae, ept, riscv, vtd_second_stage, x86
from reference import common as ref

from backend.core import (
    RW,
    Access,
    BadValueError,
    Core,
    CoreError,
    Fault,
    NotMappedError,
    OverlapError,
    Reason,
    Translation,
)

SPACE, RID = 1, 7
READ, WRITE = Access.READ, Access.WRITE
LARGEST = 31
"""Sequences use leaves below 2^31 bytes: where sides are not aligned alike, more would be hundreds of MiB of tables."""


@dataclass(frozen=True)
class Shape:
    """A format in one configuration: how the core is asked for it, and how the reference reads it.

    sizes: log2 of its leaves, the smallest first; the rest of the alignment rules follow from them.
    """

    name: str
    fmt: str
    tree: dict[str, int]
    walk: Callable[[ref.Reader, Any, int, ref.Access], ref.Result | ref.Fault]
    config: Callable[[int], Any]
    reach: int
    sizes: tuple[int, ...] = (12, 21, 30)
    write_only: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def page(self) -> int:
        return 1 << self.sizes[0]


def amd(levels: int) -> Shape:
    # Leaves of level 1 to 5; a root has the leaves of its own level, too.
    sizes = tuple(3 + 9 * level for level in range(1, min(levels, 4) + 1))
    reach = min(12 + 9 * levels, 64)
    return Shape(f"amd-v1-{levels}", "amd-v1", {"levels": levels}, amd_v1.walk,
                 lambda root: amd_v1.Config(root, levels), reach, sizes, write_only=True)  # fmt: skip


def x86_64(levels: int) -> Shape:
    return Shape(f"x86-{levels}", "x86", {"levels": levels}, x86.walk, lambda root: x86.Config(root, levels),
                 11 + 9 * levels)  # fmt: skip


def vtd(levels: int) -> Shape:
    return Shape(f"vtd-{levels}", "vtd-second-stage", {"levels": levels}, vtd_second_stage.walk,
                 lambda root: vtd_second_stage.Config(root, levels), 12 + 9 * levels, write_only=True)  # fmt: skip


def ept_of(levels: int) -> Shape:
    return Shape(f"ept-{levels}", "ept", {"levels": levels}, ept.walk, lambda root: ept.Config(root, levels),
                 12 + 9 * levels)  # fmt: skip


def arm(stage: int, granule: int, input_bits: int, levels: int, joined: int = 0) -> Shape:
    sizes = {12: (12, 21, 30), 14: (14, 25), 16: (16, 29)}[granule]
    sizes = tuple(size for size in sizes if size < input_bits)

    def config(root: int) -> Any:
        tables = arm_lpae.Tables(root, input_bits, granule, start=4 - levels if joined else None)
        return arm_lpae.Stage1(tables) if stage == 1 else arm_lpae.Stage2(tables)

    tree = {"levels": levels, "granule": granule, "input_bits": input_bits}
    walk = arm_lpae.walk_stage1 if stage == 1 else arm_lpae.walk_stage2
    name = f"arm-s{stage}-{1 << granule - 10}k-{input_bits}"
    return Shape(name, f"arm-s{stage}", tree, walk, config, input_bits, sizes, write_only=stage == 2)


def riscv_of(levels: int, *, x4: bool) -> Shape:
    sizes = tuple(3 + 9 * level for level in range(1, min(levels, 4) + 1))
    reach = 12 + 9 * levels + 2 if x4 else 11 + 9 * levels
    return Shape(f"riscv-{levels}{'x4' if x4 else ''}", "riscv-x4" if x4 else "riscv", {"levels": levels}, riscv.walk,
                 lambda root: riscv.Config(root, levels, second_stage=x4), reach, sizes)  # fmt: skip


SHAPES = (
    *map(amd, range(1, 7)), *map(x86_64, (4, 5)), *map(vtd, (3, 4, 5)), *map(ept_of, (4, 5)),
    arm(1, 12, 48, 4), arm(1, 14, 47, 3), arm(1, 16, 48, 3), arm(2, 12, 40, 3, joined=1), arm(2, 12, 48, 4),
    arm(2, 14, 40, 2, joined=1), arm(2, 16, 46, 2, joined=1),
    *(riscv_of(levels, x4=x4) for levels in (3, 4, 5) for x4 in (False, True)),
)  # fmt: skip


class OurMemory:
    """This process's memory, where the core's tables lie."""

    def read64(self, address: int) -> int | None:
        return ctypes.c_uint64.from_address(address).value


@dataclass(frozen=True)
class Mapping:
    first: int
    size: int
    hva: int
    access: Access

    def cut(self, first: int, end: int) -> tuple[list[Mapping], Mapping]:
        """What lies outside of [first, end), and what lies inside."""
        first, end = max(first, self.first), min(end, self.first + self.size)
        parts = ((self.first, first), (end, self.first + self.size))
        outside = [Mapping(a, b - a, self.hva + a - self.first, self.access) for a, b in parts if a < b]
        return outside, Mapping(first, end - first, self.hva + first - self.first, self.access)


class Table:
    """A space of the core's, and the list of mappings that must hold there."""

    def __init__(self, shape: Shape, iotlb_entries: int = 64) -> None:
        self.shape = shape
        self.core = Core(iotlb_entries=iotlb_entries)
        table = ffi.new("vio_table *", {"tree": shape.tree})
        number = lib.vio_format_find(shape.fmt.encode())
        assert number >= 0
        assert lib.vio_space_create_host(self.core._engine, SPACE, number, table) == 0
        assert lib.vio_space_table_get(self.core._engine, SPACE, table) == 0
        self.config = shape.config(table.tree.root)
        self.core.attach(RID, None, SPACE)
        self.empty_pages = self.core.counters().table_pages
        self.mappings: list[Mapping] = []

    def overlapping(self, first: int, end: int) -> list[Mapping]:
        return [one for one in self.mappings if one.first < end and first < one.first + one.size]

    def covered(self, first: int, end: int) -> bool:
        parts = (one.cut(first, end)[1] for one in self.overlapping(first, end))
        return sum(part.size for part in parts) == end - first

    def map(self, first: int, hva: int, size: int, access: Access) -> None:
        if self.overlapping(first, first + size):
            with pytest.raises(OverlapError):
                self.core.map(SPACE, first, hva, size, access)
            return
        self.core.map(SPACE, first, hva, size, access)
        self.mappings.append(Mapping(first, size, hva, access))

    def change(self, first: int, size: int, access: Access | None) -> None:
        """Unmap, or protect."""

        def call() -> None:
            if access is None:
                self.core.unmap(SPACE, first, size)
            else:
                self.core.protect(SPACE, first, size, access)

        if not self.covered(first, first + size):
            with pytest.raises(NotMappedError):
                call()
            return
        call()
        for one in self.overlapping(first, first + size):
            self.mappings.remove(one)
            outside, inside = one.cut(first, first + size)
            self.mappings += outside
            if access is not None:
                self.mappings.append(Mapping(inside.first, inside.size, inside.hva, access))

    def check(self, address: int) -> int:
        """One address, by the reference and by the core; returns the size of the leaf, 0 if there is none."""
        found = self.overlapping(address, address + 1)
        for asked, kind in ((READ, ref.Kind.READ), (WRITE, ref.Kind.WRITE)):
            told = f"{self.shape} {address:#x} {asked!r}"
            theirs = self.shape.walk(OurMemory(), self.config, address, ref.Access(kind))
            ours = self.core.translate(RID, address, asked)
            if not found:
                assert isinstance(theirs, ref.Fault), told
                assert theirs.reason == ref.Reason.NOT_PRESENT, told
                assert isinstance(ours, Fault), told
                assert ours.reason == Reason.NOT_PRESENT, told
                continue
            (one,) = found
            hva = one.hva + address - one.first
            if asked & ~one.access:
                assert isinstance(theirs, ref.Fault), told
                assert theirs.reason == ref.Reason.PERMISSION, told
                assert isinstance(ours, Fault), told
                assert ours.reason == Reason.PERMISSION, told
                continue
            assert isinstance(theirs, ref.Result), f"{told}: {theirs}"
            assert (theirs.output, theirs.read, theirs.write) == (
                hva,
                bool(one.access & READ),
                bool(one.access & WRITE),
            )
            assert isinstance(ours, Translation), f"{told}: {ours}"
            assert (ours.hva, ours.access & RW) == (hva, one.access), told
            start = address // theirs.size * theirs.size
            assert ours.size == start + theirs.size - address, told
            assert one.first <= start, told
            assert start + theirs.size <= one.first + one.size, told
            size = theirs.size
        return size if found else 0

    def edges(self) -> list[int]:
        """Addresses at which something may go wrong: both sides of every end of a mapping."""
        reach = 1 << self.shape.reach
        ends = {edge for one in self.mappings for edge in (one.first, one.first + one.size)}
        return [at for edge in sorted(ends) for at in (edge - 1, edge) if 0 <= at < reach]

    def close(self) -> None:
        for one in list(self.mappings):
            self.change(one.first, one.size, None)
        assert self.core.counters().table_pages == self.empty_pages, "tables that hold nothing are given back"
        self.core.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leaves_are_as_large_as_both_alignments_allow(shape: Shape) -> None:
    table = Table(shape)
    for size in shape.sizes:
        large = 1 << size
        if 2 * large > 1 << shape.reach:
            continue
        table.map(0, large, 2 * large, RW)
        assert [table.check(at) for at in (0, large - 1, large, 2 * large - 1)] == [large] * 4
        table.change(0, 2 * large, None)
        if size == shape.sizes[0]:
            continue
        smaller = 1 << shape.sizes[shape.sizes.index(size) - 1]
        table.map(0, smaller, large, RW)
        assert table.check(large - 1) == smaller
        table.change(0, large, None)
    table.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_split_leaf_keeps_what_it_meant(shape: Shape) -> None:
    table = Table(shape)
    large, page = 1 << shape.sizes[-1], shape.page
    if 2 * large > 1 << shape.reach or large > 1 << LARGEST:
        large = 1 << shape.sizes[-2]
    large = max(large, 16 * page)
    start = (1 << shape.reach) - large  # the last that the table can hold
    table.map(start, large, large, RW)
    table.change(start + large // 2 + page, page, None)
    table.change(start + large // 4, page, READ)
    chance = random.Random(shape.name)
    for at in (*table.edges(), *(start + chance.randrange(large) for _ in range(50))):
        table.check(at)
    table.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_table_cannot_hold(shape: Shape) -> None:
    table = Table(shape)
    page, reach = shape.page, 1 << shape.reach
    illegal: list[tuple[int, int, int, Access]] = [(0, page // 2, page, RW), (page // 2, 0, page, RW)]
    illegal += [(0, page, page // 2, RW), (0, 1 << 47, page, RW), (0, page, 0, RW)]
    if shape.reach < 64:
        illegal += [(reach, page, page, RW), (reach - page, page, 2 * page, RW), ((1 << 64) - page, page, page, RW)]
    if not shape.write_only:
        illegal.append((0, page, page, WRITE))
    for iova, hva, size, access in illegal:
        with pytest.raises(BadValueError):
            table.core.map(SPACE, iova, hva, size, access)
    if shape.reach < 64:
        for call in (table.core.unmap, lambda space, first, size: table.core.protect(space, first, size, RW)):
            with pytest.raises(CoreError):
                call(SPACE, 0, (1 << 64) - page)
    assert table.core.counters().table_pages == table.empty_pages
    table.map(reach - page, page, page, READ)
    table.check(reach - page)
    table.close()


class Sequences(RuleBasedStateMachine):
    """Any sequence of map, unmap and protect, in places where leaves of all sizes meet."""

    table: Table

    @initialize(shape=st.sampled_from(SHAPES), iotlb=st.sampled_from((0, 64)))
    def begin(self, shape: Shape, iotlb: int) -> None:
        self.table = Table(shape, iotlb)

    def place(self, data: st.DataObject) -> tuple[int, int]:
        """A range: of some pages or some large leaves, at or near a boundary of one of them, or at the far end."""
        shape, draw = self.table.shape, data.draw
        reach = 1 << shape.reach
        unit = 1 << draw(st.sampled_from([size for size in shape.sizes if size < min(shape.reach, LARGEST)]))
        base = draw(st.sampled_from((0, 1, 2, reach // unit // 2, reach // unit - 1))) * unit
        base += draw(st.sampled_from((0, 0, 0, 1, -1, 3))) * shape.page
        count = draw(st.sampled_from((1, 1, 2, 3)))
        size = count * draw(st.sampled_from((shape.page, unit)))
        base = max(0, min(base, reach - shape.page))
        return base, min(size, reach - base)

    def access(self, data: st.DataObject) -> Access:
        return data.draw(st.sampled_from((RW, READ, WRITE) if self.table.shape.write_only else (RW, READ)))

    @rule(data=st.data())
    def map(self, data: st.DataObject) -> None:
        first, size = self.place(data)
        shape = self.table.shape
        unit = 1 << data.draw(st.sampled_from([size for size in shape.sizes if size < LARGEST]))
        hva = unit * data.draw(st.integers(1, 8)) + first % unit  # aligned alike, or
        hva += data.draw(st.sampled_from((0, 0, 1))) * shape.page
        self.table.map(first, hva, size, self.access(data))

    @precondition(lambda self: self.table.mappings)
    @rule(data=st.data(), protect=st.booleans())
    def change(self, data: st.DataObject, protect: bool) -> None:
        if data.draw(st.booleans()):
            first, size = self.place(data)
        else:  # a part of what is mapped
            one = data.draw(st.sampled_from(self.table.mappings))
            pages = one.size // self.table.shape.page
            skip = data.draw(st.integers(0, pages - 1))
            first = one.first + skip * self.table.shape.page
            size = data.draw(st.integers(1, pages - skip)) * self.table.shape.page
        self.table.change(first, size, self.access(data) if protect else None)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "table"):
            for at in self.table.edges():
                self.table.check(at)

    def teardown(self) -> None:
        if hasattr(self, "table"):
            self.table.close()


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=120, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
