"""Walks: every stage-1 format over every stage-2 format, each beside a bare walk of the same tables.

Hot: 64 pages over and over. At random: over 1 GiB, so that nearly every entry misses the CPU's caches.
"""

from __future__ import annotations

import random
from typing import Any

from bench.guests import RAM, Guests, Layout, guests, layouts
from bench.native import best, floors, result
from bench.result import Result

HOT_PAGES = 64
HOT = 1024
SCATTERED = 1 << 16
HOT_TARGET_NS = 70
MAIN = ("amd-v1", "amd-v1")
"""The pair that is measured at length; the others are measured to be told from it."""


def measure(native: Any, made: Guests, stage1: Layout, stage2: Layout) -> list[Result]:
    """The pair hot and at random."""
    ffi, lib = native.ffi, native.lib
    child, bare = made.pairs[stage1, stage2], made.floor_tables(stage1, stage2)
    chance, page = random.Random(2), 4096
    main = (stage1.name, stage2.name) == MAIN
    found = []
    for place, pages, count, rounds, repeats in (
        ("hot", HOT_PAGES, HOT, 20, 25 if main else 4),
        ("1 GiB at random", RAM // page, SCATTERED, 1, 25 if main else 3),
    ):
        iovas = [chance.randrange(pages) * page for _ in range(count)]
        addresses = ffi.new("uint64_t[]", iovas)
        for iova in iovas[:100]:  # the floor must do the same work
            if lib.bench_walk_one(made.engine, child, iova) != lib.floor_walk_one(bare, iova):
                raise RuntimeError(f"{stage1.name} over {stage2.name}: the floor finds another page at {iova:#x}")
        ours, floor = best(
            lambda addresses=addresses, count=count, rounds=rounds: float(  # type: ignore[misc]
                lib.bench_walk(made.engine, child, addresses, count, rounds)
            ),
            lambda addresses=addresses, count=count, rounds=rounds: float(  # type: ignore[misc]
                lib.floor_walk(bare, addresses, count, rounds)
            ),
            repeats=repeats,
        )
        target = (
            (f"<= {HOT_TARGET_NS} ns", ours <= HOT_TARGET_NS)
            if place == "hot"
            else ("<= 1.3 x floor", ours <= 1.3 * floor)
        )
        levels = f"{bare.levels1}+{bare.levels2} levels"
        found.append(result(f"walk {stage1.name} over {stage2.name}, {levels}, {place}", ours, "ns", floor, target))
    return found


def results() -> list[Result]:
    """Measure every pair."""
    native = floors()
    found = []
    with guests(native, layouts(native)) as made:
        for stage1, stage2 in made.pairs:
            found += measure(native, made, stage1, stage2)
    return found
