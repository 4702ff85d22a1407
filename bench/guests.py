"""A guest of each format over a stage 2 of each: 1 GiB that plays guest RAM, and above it one table a format.

Stage 2 has leaves of its smallest size only, and so has stage 1, which maps 1 GiB of IOVAs onto RAM in random order:
the worst that a walk can meet.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backend.core._native import ffi, lib

from backend.core import RW, Core, PlainMemory
from backend.core.native import check
from bench.native import address_of

RAM = 1 << 30
TABLES = 8 << 20
"""For one guest's table: 2 MiB of leaves of 4 KiB, and little above."""
SKEW = 64 << 10
"""Of guest memory against its GPAs, modulo 2 MiB and more: no leaf of stage 2 can be larger than a page then."""
GRANULES = (12, 14, 16)
RID = 8


@dataclass(frozen=True)
class Layout:
    """A format in one configuration."""

    format: int
    name: str
    granule: int
    shifted: bool

    @property
    def page(self) -> int:
        return 1 << self.granule


def layouts(native: Any, *, granules: tuple[int, ...] = GRANULES) -> list[Layout]:
    """Every format there is, those with several granules once in each."""
    found = []
    for number in range(native.lib.bench_formats()):
        name = native.ffi.string(native.lib.bench_format_name(number)).decode()
        has = [g for g in granules if native.lib.bench_config(number, g, 0, native.ffi.new("vio_table *"))]
        for granule in has:
            label = f"{name} {1 << granule - 10}K" if len(has) > 1 else name
            found.append(Layout(number, label, granule, bool(native.lib.bench_shifted(number))))
    return found


class Guests:
    """One core with a stage 2 of each layout that can be one, and over each a child of each layout."""

    def __init__(self, native: Any, core: Core, chosen: list[Layout]) -> None:
        self.native = native
        self.core = core
        self._memory = PlainMemory(SKEW + RAM + len(chosen) * TABLES, memfd=True)  # as a VM's is
        self.hva, self.size = self._memory.hva + SKEW, RAM + len(chosen) * TABLES
        self.engine = native.ffi.cast("vio_engine *", address_of(core))
        self._builders: list[Any] = []
        self._tables = {layout: self._build(layout, RAM + i * TABLES) for i, layout in enumerate(chosen)}
        self._next = 1
        self._stage2: dict[Layout, int] = {}
        self.pairs: dict[tuple[Layout, Layout], int] = {}
        """(stage 1, stage 2) to the child's IOASID."""
        for stage2 in chosen:
            if self._create_stage2(stage2):
                for stage1 in chosen:
                    self._create_child(stage1, stage2)

    def _config(self, layout: Layout, host: bool) -> Any:
        table = self.native.ffi.new("vio_table *")
        found = self.native.lib.bench_config(layout.format, layout.granule, host, table)
        if not found:
            return None
        tree = {"levels": table.tree.levels, "granule": table.tree.granule}
        return ffi.new("vio_table *", {"tree": tree})

    def _build(self, layout: Layout, first: int) -> Any:
        out, made = ffi.new("vio_guest_table **"), ffi.new("vio_table *")
        config = self._config(layout, False)
        check(lib.vio_guest_table_create(layout.format, config, ffi.cast("void *", self.hva), first, TABLES, out))
        builder = ffi.gc(out[0], lib.vio_guest_table_destroy)
        order = array("Q", range(0, RAM, layout.page))
        random.Random(1).shuffle(order)
        cast = self.native.ffi.cast
        check(
            self.native.lib.bench_fill(
                cast("void *", int(ffi.cast("uintptr_t", ffi.addressof(lib, "vio_guest_table_map")))),
                cast("void *", int(ffi.cast("uintptr_t", builder))),
                self.native.ffi.from_buffer("uint64_t[]", order),
                len(order),
                layout.page,
            )
        )
        lib.vio_guest_table_get(builder, made)
        self._builders.append(builder)
        return made

    def _create_stage2(self, layout: Layout) -> bool:
        config = self._config(layout, True)
        if config is None or lib.vio_space_create_host(self.core._engine, self._next, layout.format, config):
            return False
        self._stage2[layout] = self._next
        self.core.map(self._next, 0, self.hva, self.size, RW)
        self._next += 1
        return True

    def _create_child(self, stage1: Layout, stage2: Layout) -> None:
        self.core.create_nested_space(self._next, self._stage2[stage2])
        if lib.vio_space_bind(self.core._engine, self._next, stage1.format, self._tables[stage1]):
            self.core.destroy_space(self._next)
            return
        self.pairs[stage1, stage2] = self._next
        self._next += 1

    def floor_tables(self, stage1: Layout, stage2: Layout) -> Any:
        """The pair's tables as the floor of walks takes them."""
        one, two = (self.native.ffi.new("vio_table *") for _ in range(2))
        self.native.lib.bench_table(self.engine, self.pairs[stage1, stage2], one)
        self.native.lib.bench_table(self.engine, self._stage2[stage2], two)
        return self.native.ffi.new(
            "struct floor_tables *",
            [
                *(one.tree.root, two.tree.root, one.tree.levels, two.tree.levels),
                *(stage1.granule, stage2.granule, stage1.shifted, stage2.shifted),
            ],
        )

    def close(self) -> None:
        self._builders.clear()
        self._memory.close()


@contextmanager
def guests(native: Any, chosen: list[Layout], *, iotlb_entries: int = 0) -> Iterator[Guests]:
    core = Core(iotlb_entries=iotlb_entries)
    made = Guests(native, core, chosen)
    try:
        yield made
    finally:
        core.close()
        made.close()
