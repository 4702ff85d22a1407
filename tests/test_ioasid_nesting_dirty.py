"""Dirty pages of merged tables: what is written through a child is written in all tables above it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from guest_ram import PAGE
from test_ioasid_nesting import Nest

from backend.core import Access
from backend.ioasid import Kind


@pytest.fixture
def nest() -> Iterator[Nest]:
    with closing(Nest()) as nest:
        nest.map_ram(0, 0, 32)
        yield nest


def dirty(nest: Nest, ioasid: int, *, clear: bool = True) -> set[int]:
    bitmap = nest.ctx.get_dirty_bitmap(ioasid, 0, 64 * PAGE, clear=clear)
    return {page for page in range(64) if bitmap[page // 8] >> page % 8 & 1}


def write(nest: Nest, ioasid: int, *pages: int) -> None:
    for page in pages:
        assert nest.engine.devices[ioasid].port.store(page * PAGE + 16, 1, 8) is None


def test_writes_through_children_count_where_they_land(nest: Nest) -> None:
    child = nest.beneath(nest.root)
    nest.map(child, 40, 8, 4)
    nest.map(child, 50, 20, 4)
    nest.ctx.set_dirty_tracking(nest.root, True)
    grandchild = nest.beneath(child)  # made later, tracked as well
    nest.map(grandchild, 3, 41, 2)
    write(nest, child, 43, 50)
    write(nest, grandchild, 4)  # 42 of the child, 10 of the root
    write(nest, nest.root, 1)
    assert dirty(nest, nest.root, clear=False) == {1, 10, 11, 20}
    assert dirty(nest, nest.root) == {1, 10, 11, 20}
    assert dirty(nest, nest.root) == set()
    write(nest, grandchild, 3)
    assert nest.ctx.get_dirty_bitmap(nest.root, 8 * PAGE, 8 * PAGE) == b"\2"
    assert dirty(nest, nest.root) == set()


def test_what_goes_leaves_its_dirty_pages_above(nest: Nest) -> None:
    child = nest.beneath(nest.root)
    grandchild = nest.beneath(child)
    nest.map(child, 40, 8, 4)
    nest.map(grandchild, 0, 40, 4)
    nest.ctx.set_dirty_tracking(nest.root, True)
    write(nest, grandchild, 2)
    nest.unmap(grandchild, 0, 4)
    assert dirty(nest, nest.root) == {10}
    nest.map(grandchild, 0, 40, 4)
    write(nest, grandchild, 1)
    nest.unmap(child, 40, 4)
    nest.map(child, 40, 16, 4)
    assert dirty(nest, nest.root) == {9}, "by the mapping through which it was written"
    write(nest, grandchild, 1)
    for ioasid in (grandchild, child):
        while nest.engine.devices[ioasid].stacks:
            nest.ctx.detach(ioasid)
    nest.ctx.free(grandchild)
    nest.ctx.free(child)
    assert dirty(nest, nest.root) == {17}


def test_each_reader_has_its_own(nest: Nest) -> None:
    child = nest.beneath(nest.root)
    nest.map(child, 40, 8, 4)
    nest.ctx.set_dirty_tracking(child, True)
    write(nest, child, 40)
    nest.ctx.set_dirty_tracking(nest.root, True)
    assert dirty(nest, child) == {40}
    write(nest, child, 41)
    assert dirty(nest, child) == {41}
    assert 9 in dirty(nest, nest.root), "reading the child does not take it from the parent"
    write(nest, child, 42)
    assert 10 in dirty(nest, nest.root)
    assert 42 in dirty(nest, child), "nor the other way round"
    assert dirty(nest, child) == dirty(nest, nest.root) - {8, 9, 10} == set()
    nest.ctx.set_dirty_tracking(child, False)
    write(nest, child, 43)
    assert dirty(nest, nest.root) == {11}
    nest.ctx.set_dirty_tracking(child, True)
    assert dirty(nest, child) == set()
    nest.ctx.set_dirty_tracking(nest.root, False)
    write(nest, child, 40)
    assert dirty(nest, child) == {40}


def test_tracking_a_child_leaves_others_alone(nest: Nest) -> None:
    one, two = nest.beneath(nest.root), nest.beneath(nest.root)
    for child in (one, two):
        nest.map(child, 0, 0, 4)
    nest.ctx.set_dirty_tracking(one, True)
    write(nest, two, 1)
    write(nest, nest.root, 2)
    write(nest, one, 3)
    assert dirty(nest, one) == {3}


def test_rights_that_a_format_cannot_give(nest: Nest) -> None:
    """Writes without reads: where they cannot be had, nothing is there."""
    child = nest.ctx.alloc(Kind.KERNEL, vendor="x86", parent=nest.root)
    nest.reach(child, nest.root)
    nest.map_ram(40, 0, 1, Access.WRITE)
    nest.map(child, 0, 39, 2)
    assert not nest.writable(child, 1)
    nest.unmap(nest.root, 40)
    nest.map_ram(40, 0, 1)
    assert nest.writable(child, 1)
