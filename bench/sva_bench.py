"""A process's address space by name, beside the same by one giant MAP_DMA of it: time and memory.

The floor of each figure is what the giant mapping took, in turns with the named one, in the same run. Its table is in
x86's format, whose leaves end at 1 GiB, as a process's own table is; AMD's, with leaves of 512 GiB, stands beside it
where that makes a difference.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from backend.core._native import ffi, lib

from backend.core import FOREIGN, Access, Core, HostProcess
from backend.ioasid import Context, Engine, Kind, Process, open_process
from bench.result import Result

LOW, END = 1 << 32, 1 << 47
"""All of a process's half of the addresses but the lowest 4 GiB, where devices reserve a window for interrupts."""
NAMED, GIANT = 8, 9
"""The device of each."""
PAGE = 4096
MEMORY = 64 << 20
PLACES = 10_000
ROUNDS = 9
AS_FAST = 1.2
"""Times the other, for figures that should be alike: others share the machine."""
GIANT_MAP = "giant MAP"
SHARED = "a shared file"
"""Mapped here and by one MAP_DMA: the giant mapping of who cannot name a process."""

CHILD = """
import ctypes, mmap, os, sys
size = int(sys.argv[1])
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
file = os.memfd_create("shared")
os.ftruncate(file, size)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), file, flush=True)
sys.stdin.read()
"""


class ProcessMemory:
    """Of a context whose user is another process: its addresses, all FOREIGN."""

    def __init__(self, held: Process) -> None:
        self.process: HostProcess | None = held.memory

    def hva(self, vaddr: int, size: int, access: Access) -> int:
        return vaddr | FOREIGN

    def vaddr(self, hva: int) -> int | None:
        return hva & ~FOREIGN


def results() -> list[Result]:
    """All of it."""
    return [*_coming_and_going(), *_own_process(), *_other_process()]


def _coming_and_going() -> list[Result]:
    engine = Engine()
    context = engine.open()
    found: list[Result] = []

    def named() -> None:
        context.free(context.alloc(Kind.SVA, pid=os.getpid()))

    for vendor in ("x86", "amd-v1"):

        def giant(vendor: str = vendor) -> None:
            ioasid = context.alloc(vendor=vendor)
            context.map_dma(ioasid, LOW, LOW, END - LOW)
            context.unmap_dma(ioasid, LOW, END - LOW)
            context.free(ioasid)

        ours, other = _best(lambda: _microseconds(named, 50), lambda: _microseconds(giant, 10))
        target = 1.0 if vendor == "x86" else None
        found.append(_result(f"sva: ALLOC and FREE, beside a giant MAP in {vendor}", ours, "us", other, target))
        before = engine.core.counters().table_pages
        ioasid = context.alloc(vendor=vendor)
        context.map_dma(ioasid, LOW, LOW, END - LOW)
        tables = (engine.core.counters().table_pages - before) * PAGE / 1024
        context.free(ioasid)
        ioasid = context.alloc(Kind.SVA, pid=os.getpid())
        none = (engine.core.counters().table_pages - before) * PAGE / 1024
        context.free(ioasid)
        found.append(_result(f"sva: tables, beside those of a giant MAP in {vendor}", none, "KiB", tables, 1.0))
    engine.close()
    return found


def _own_process() -> list[Result]:
    """Places at random, 8 bytes each, in one call: translation is most of it."""
    found: list[Result] = []
    ram = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor: Any = ctypes.c_char.from_buffer(ram)
    at = ctypes.addressof(anchor)
    ctypes.memset(at, 1, MEMORY)
    for what, entries in (("by the IOTLB", 4096), ("without an IOTLB", 0)):
        with _both(os.getpid(), entries) as engine:
            ours, other = _best(*(_random_places(engine, rid, at) for rid in (NAMED, GIANT)))
            found.append(_result(f"sva, own process: 8 bytes of a scatter list, {what}", ours, "ns", other, AS_FAST))
            if entries:
                ours, other = _best(*(_transfers(engine, rid, at, 1 << 20, 200) for rid in (NAMED, GIANT)))
                found.append(_result("sva, own process: DMA of 1 MiB", ours, "us", other, AS_FAST))
    del anchor
    ram.close()
    return found


def _other_process() -> list[Result]:
    found: list[Result] = []
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", CHILD, str(MEMORY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        at, file = (int(word) for word in child.stdout.readline().split())
        with _both(child.pid, 4096) as engine:
            shared = _first_touch_of_a_file(child.pid, file)
            mine = _first_touch(engine, NAMED, at)
            found.append(
                _result(
                    "sva: a process's 64 MiB, never touched, written", mine[0], "ms", shared[0], None, beside=SHARED
                )
            )
            found.append(_result("sva: our own memory that they take", mine[1], "KiB", shared[1], 1.0, beside=SHARED))
            for size, name in ((8, "8 bytes"), (PAGE, "4 KiB"), (1 << 20, "1 MiB")):
                times = 2000 if size <= PAGE else 100
                clock = time.perf_counter_ns  # most of it is done by a helper process
                ours, other = _best(*(_transfers(engine, rid, at, size, times, clock=clock) for rid in (NAMED, GIANT)))
                found.append(_result(f"sva, another process: DMA of {name}", ours, "us", other, AS_FAST))
    finally:
        child.kill()
        child.communicate()
    return found


@contextmanager
def _both(pid: int, iotlb_entries: int) -> Iterator[Engine]:
    """A process's memory by name and by a giant mapping, a device on each."""
    engine = Engine(Core(iotlb_entries=iotlb_entries))
    held = open_process(pid)
    context: Context = engine.open(ProcessMemory(held))
    named, giant = context.alloc(Kind.SVA, pid=pid), context.alloc(vendor="x86")
    context.map_dma(giant, LOW, LOW, END - LOW)
    for rid, ioasid in ((NAMED, named), (GIANT, giant)):
        engine.add_device(rid, f"device {rid}")
        context.bind_device(rid)
        context.attach(rid, ioasid)
    yield engine
    engine.close()
    held.close()


def _first_touch(engine: Engine, rid: int, at: int) -> tuple[float, float]:
    """Milliseconds for a write of all of it, a MiB at a time, and the KiB of our own that it took."""
    buffer = bytearray(1 << 20)
    before, start = _our_memory(), time.perf_counter_ns()
    for offset in range(0, MEMORY, len(buffer)):
        if engine.core.dma_write(rid, at + offset, buffer) is not None:
            raise RuntimeError("memory of the bench faulted")
    return (time.perf_counter_ns() - start) / 1e6, _our_memory() - before


def _first_touch_of_a_file(pid: int, file: int) -> tuple[float, float]:
    """The same of a memfd that the process shares: mapped here, and by one MAP_DMA."""
    engine = Engine()
    context = engine.open()
    engine.add_device(GIANT, "device")
    context.bind_device(GIANT)
    ioasid = context.alloc()
    context.attach(GIANT, ioasid)
    with open(f"/proc/{pid}/fd/{file}", "r+b") as shared:
        ram = mmap.mmap(shared.fileno(), MEMORY)
    anchor: Any = ctypes.c_char.from_buffer(ram)
    context.map_dma(ioasid, LOW, ctypes.addressof(anchor), MEMORY)
    took = _first_touch(engine, GIANT, LOW)
    engine.close()
    del anchor
    ram.close()
    return took


def _random_places(engine: Engine, rid: int, at: int) -> Callable[[], float]:
    order = random.Random(1)
    places = [(at + order.randrange(MEMORY // 8) * 8, 8) for _ in range(PLACES)]
    segments = ffi.new("vio_segment[]", places)  # made once: that takes longer than what is measured
    buffer = ffi.new("char[]", 8 * PLACES)

    def measure() -> float:
        start = time.thread_time_ns()
        if lib.vio_dma_scatter(engine.core._engine, rid, lib.VIO_NO_PASID, segments, PLACES, buffer, 0):
            raise RuntimeError("memory of the bench faulted")
        return (time.thread_time_ns() - start) / PLACES

    return measure


def _transfers(
    engine: Engine, rid: int, at: int, size: int, times: int, *, clock: Callable[[], int] = time.thread_time_ns
) -> Callable[[], float]:
    buffer = bytearray(size)

    def transfer() -> None:
        if engine.core.dma_read_into(rid, at, buffer) is not None:
            raise RuntimeError("memory of the bench faulted")

    return lambda: _microseconds(transfer, times, clock)


def _our_memory() -> float:
    """KiB of this process that are there, its page tables included (proc(5))."""
    with open("/proc/self/status", encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return float(sum(int(lines[name].split()[0]) for name in ("VmRSS", "VmPTE")))


def _microseconds(call: Callable[[], object], times: int, clock: Callable[[], int] = time.thread_time_ns) -> float:
    """Of this thread's CPU, the kernel's share included, or by another clock, for one call."""
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times / 1000


def _best(*measures: Callable[[], float]) -> list[float]:
    """In turns, so that what disturbs one disturbs the other; the best of each."""
    return [min(runs) for runs in zip(*([measure() for measure in measures] for _ in range(ROUNDS)), strict=True)]


def _result(
    name: str, value: float, unit: str, floor: float, limit: float | None, *, beside: str = GIANT_MAP
) -> Result:
    ratio = value / floor if floor else None
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "floor": floor,
        "ratio": ratio,
        "target": f"<= {limit:g} x {beside}" if limit is not None else None,
        "met": ratio <= limit if limit is not None and ratio is not None else None,
    }
