"""What a request costs: a hit of the IOTLB, DMA from Python, a large DMA through small pages."""

from __future__ import annotations

import mmap
import random

from bench.guests import RAM, RID, guests, layouts
from bench.native import best, each, floors, result
from bench.result import Result

PAGE = 4096
CACHED_PAGES = 256
"""A sixteenth of the IOTLB: with four ways, none displaces another but by rare chance."""


def results() -> list[Result]:
    """Measure, with AMD's format in both stages: what is cached has no format any more."""
    native = floors()
    ffi, lib = native.ffi, native.lib
    layout = next(one for one in layouts(native) if one.name == "amd-v1")
    with guests(native, [layout], iotlb_entries=4096) as made:
        core, child = made.core, made.pairs[layout, layout]
        core.attach(RID, None, child)
        chance = random.Random(3)
        pages = chance.sample(range(RAM // PAGE), CACHED_PAGES)
        iovas = [chance.choice(pages) * PAGE for _ in range(4096)]
        for iova in iovas:
            core.dma_read(RID, iova, 1)
        addresses = ffi.new("uint64_t[]", iovas)
        hit, hit_floor = best(
            lambda: float(lib.bench_iotlb(made.engine, child, addresses, len(iovas), 100)),
            lambda: float(lib.floor_iotlb(addresses, len(iovas), 100, 10)),
        )
        if hit < 0:
            raise RuntimeError("the pages of the IOTLB figure displaced each other: take fewer")

        page, spare = bytearray(PAGE), bytearray(PAGE)
        view, spare_view = ffi.from_buffer(page), ffi.from_buffer(spare)
        write, read, call, copy = best(
            lambda: each(lambda: core.dma_write(RID, 0x1000, page), 5000),
            lambda: each(lambda: core.dma_read(RID, 0x1000, PAGE), 5000),
            lambda: each(lambda: lib.floor_empty(made.engine, RID, 0, 0x1000, view, PAGE, 1), 5000),
            lambda: float(lib.floor_memcpy(spare_view, view, PAGE, 5000)),
        )
        write, read, small_floor = write / 1000, read / 1000, (call + copy) / 1000

        # page-aligned, as the mapped file behind a disk is
        mebi, spare_mebi = mmap.mmap(-1, 1 << 20), mmap.mmap(-1, 1 << 20)
        mebi[:] = spare_mebi[:] = bytes(range(256)) * 4096
        large, copy = best(
            lambda: each(lambda: core.dma_write(RID, 0, mebi), 150) / 1000,
            lambda: float(lib.floor_memcpy(ffi.from_buffer(spare_mebi), ffi.from_buffer(mebi), 1 << 20, 150)) / 1000,
        )
    return [
        result("IOTLB hit", hit, "ns", hit_floor, ("<= 8 ns", hit <= 8)),
        result("4 KiB DMA write called from Python", write, "us", small_floor, ("<= 1.5 us", write <= 1.5)),
        result("4 KiB DMA read called from Python", read, "us", small_floor, ("<= 1.5 us", read <= 1.5)),
        result(
            "1 MiB DMA write through 4 KiB nested mappings",
            large,
            "us",
            copy,
            ("<= 1.25 x memcpy", large <= 1.25 * copy),
        ),
    ]
