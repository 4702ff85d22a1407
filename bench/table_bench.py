"""What tables cost: mapped and unmapped leaves a second, a mapping of one page, memory for a mapped GiB."""

from __future__ import annotations

from typing import Any

from backend.core._native import ffi as core_ffi
from backend.core._native import lib as core_lib

from backend.core import RW, Core
from bench.guests import Layout, layouts
from bench.native import best, each, floors, once, result
from bench.result import Result

HOST = 1
HVA = 1 << 44
"""Nothing is there: maps and unmaps do not look."""
GIB = 1 << 30
LEAVES = 1 << 18
TARGET = 20
"""Million leaves of the smallest size a second."""


def space_of(native: Any, core: Core, layout: Layout) -> bool:
    """Create the host-managed space of a layout; false if the format cannot be one."""
    table = native.ffi.new("vio_table *")
    if not native.lib.bench_config(layout.format, layout.granule, 1, table):
        return False
    config = core_ffi.new("vio_table *", {"tree": {"levels": table.tree.levels, "granule": table.tree.granule}})
    return bool(core_lib.vio_space_create_host(core._engine, HOST, layout.format, config) == 0)


def rates(
    native: Any, core: Core, name: str, leaf: int, count: int, *, skew: int, target: int | None = None
) -> list[Result]:
    """Map and unmap `count` leaves of `leaf` bytes in one call each."""
    entries = native.ffi.new("uint64_t[]", LEAVES)
    size = leaf * count

    def unmap_floor() -> float:
        return float(native.lib.floor_clear(entries, count, LEAVES // count))

    def map_floor() -> float:
        return float(native.lib.floor_entries(entries, count, LEAVES // count))

    mapped, unmapped, entry, cleared = best(
        lambda: once(lambda: core.map(HOST, leaf * 16, HVA + skew, size, RW)) / count,
        lambda: once(lambda: core.unmap(HOST, leaf * 16, size)) / count,
        map_floor,
        unmap_floor,
        repeats=10,
    )
    found = []
    for what, took, floor in (("mapped", mapped, entry), ("unmapped", unmapped, cleared)):
        rate, most = 1000 / took, 1000 / floor
        goal = (f">= {target} M/s", rate >= target) if target else None
        found.append(result(f"{name} {what} in one call", rate, "M/s", most, goal))
    return found


def results() -> list[Result]:
    """Measure; rates are in million leaves a second, so more is better there, and ratios are below 1."""
    native = floors()
    found: list[Result] = []
    for layout in layouts(native):
        core = Core()
        if space_of(native, core, layout):
            pages = f"{layout.page >> 10} KiB pages"
            found += rates(
                native, core, f"{pages} of {layout.name}", layout.page, LEAVES, skew=layout.page, target=TARGET
            )
        core.close()
    core = Core()
    core.create_host_space(HOST)
    found += rates(native, core, "2 MiB pages of amd-v1", 2 << 20, 1 << 15, skew=2 << 20)
    found += rates(native, core, "1 GiB pages of amd-v1", GIB, 1 << 14, skew=0)

    def one() -> None:
        core.map(HOST, 0, HVA, 4096, RW)
        core.unmap(HOST, 0, 4096)

    core.map(HOST, 4096, HVA, 4096, RW)  # as in use: no table comes and goes
    view = native.ffi.from_buffer(bytearray(1))
    pair, empty = best(
        lambda: each(one, 2000) / 2000,
        lambda: each(lambda: native.lib.floor_empty(view, 0, 0, 0, view, 0, 0), 2000) / 1000,
        repeats=10,
    )
    found.append(result("one 4 KiB page mapped or unmapped from Python", pair, "us", empty))
    before = core.counters().table_pages
    core.map(HOST, GIB, HVA + 4096, GIB, RW)
    used = (core.counters().table_pages - before) * 4096 / 1024
    found.append(result("memory of a GiB mapped by 4 KiB pages", used, "KiB", GIB // 4096 * 8 / 1024))
    core.close()
    return found
