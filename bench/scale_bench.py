"""What many IOASIDs cost: making one ready, invalidating one, and the memory of an idle one, beside 1 to 100,000."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

from backend.core import RW, Core, PlainMemory, TableBuilder
from bench.native import best, each, floors, result
from bench.result import Result

HOST = 1
CHILD = 2
SPARE = 1 << 30
"""IOASID that comes and goes."""
COUNTS = (1, 1_000, 100_000)
RID = 8
PAGE = 4096
FLAT = 1.5
"""Times the figure with one IOASID; a scan of them all would take thousands."""
IDLE_BYTES = 1024


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc, bytes in use: `uordblks` in its heaps, `hblkhd` in mappings of their own."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    )


def allocated() -> int:
    """Bytes that malloc has given out and not got back: all that the core holds but for tables and the IOTLB."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo
    gc.collect()
    info = mallinfo2()
    return int(info.uordblks) + int(info.hblkhd)


class Crowd:
    """A core with so many nested spaces, each bound to a table and with a translation in the IOTLB."""

    def __init__(self, count: int) -> None:
        self.memory = PlainMemory(1 << 20)
        self.core = Core(iotlb_entries=4096)
        self.core.create_host_space(HOST)
        self.core.map(HOST, 0, self.memory.hva, len(self.memory), RW)
        self.table = TableBuilder("amd-v1", self.memory, first=1 << 19)
        self.table.map(0, 0, 64 * PAGE)
        for ioasid in range(CHILD, CHILD + count):
            self.core.create_nested_space(ioasid, HOST)
            self.core.bind_table(ioasid, **self.table.binding)
        step = max(1, count // 256)
        for ioasid in range(CHILD, CHILD + count, step):
            self.core.attach(RID, None, ioasid)
            self.core.dma_read(RID, 0, 1)

    def come_and_go(self) -> None:
        self.core.create_nested_space(SPARE, HOST)
        self.core.bind_table(SPARE, **self.table.binding)
        self.core.attach(RID + 1, None, SPARE)
        self.core.detach(RID + 1, None)
        self.core.destroy_space(SPARE)

    def parent_changes(self) -> None:
        self.core.unmap(HOST, 0, PAGE)
        self.core.map(HOST, 0, self.memory.hva, PAGE, RW)

    def close(self) -> None:
        self.core.close()
        self.memory.close()


def measure(native: Any, count: int) -> tuple[dict[str, float], float]:
    """Microseconds a call of each thing with so many IOASIDs, and an empty call into C."""
    crowd = Crowd(count)
    core, view = crowd.core, native.ffi.from_buffer(bytearray(1))
    things = {
        "CREATE, BIND, ATTACH, DETACH, DESTROY": (crowd.come_and_go, 5),
        "invalidate one IOASID": (lambda: core.invalidate(CHILD), 1),
        "invalidate 4 KiB of one IOASID": (lambda: core.invalidate(CHILD, 0, PAGE), 1),
        "invalidate a device": (lambda: core.invalidate_device(RID), 1),
        "invalidate everything": (core.invalidate_all, 1),
        "unmap and map 4 KiB of the parent": (crowd.parent_changes, 2),
    }
    calls = [lambda call=call, parts=parts: each(call, 500) / parts for call, parts in things.values()]
    floor = lambda: each(lambda: native.lib.floor_empty(view, 0, 0, 0, view, 0, 0), 500)  # noqa: E731
    *took, empty = best(*calls, floor, repeats=10)
    crowd.close()
    return {name: time / 1000 for name, time in zip(things, took, strict=True)}, empty / 1000


def memory_results(native: Any) -> list[Result]:
    """Bytes that an idle IOASID takes beyond its root table, by what malloc gave out."""
    floor = float(native.lib.bench_space_bytes())
    found = []
    for kind, count in (("nested", 100_000), ("host-managed", 10_000)):
        core = Core(iotlb_entries=0)
        core.create_host_space(HOST)
        core.create_nested_space(CHILD, HOST)
        before = allocated()
        for ioasid in range(SPARE, SPARE + count):
            if kind == "nested":
                core.create_nested_space(ioasid, HOST)
            else:
                core.create_host_space(ioasid)
        used = (allocated() - before) / count
        core.close()
        target = (f"<= {IDLE_BYTES} B", used <= IDLE_BYTES)
        found.append(result(f"memory of an idle {kind} IOASID beyond its root table", used, "B", floor, target))
    return found


def results() -> list[Result]:
    """Measure."""
    native = floors()
    found = memory_results(native)
    alone: dict[str, float] = {}
    for count in COUNTS:
        figures, empty = measure(native, count)
        alone = alone or figures
        for name, took in figures.items():
            target = None if count == 1 else (f"<= {FLAT} x with 1", took <= FLAT * alone[name])
            found.append(result(f"{name}, {count:,} IOASID{'s' if count > 1 else ''}", took, "us", empty, target))
    return found
