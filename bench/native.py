"""What every suite needs: the floors in C, time, and a figure beside its floor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns
from typing import Any

from cffi import FFI

from backend.core import Core
from bench.result import Result

HERE = Path(__file__).resolve().parent
CORE = HERE.parent / "backend" / "core"
REPEATS = 25
"""The best of so many runs counts: others share the machine, and noise only ever adds."""
TYPES = """
typedef struct vio_engine vio_engine;
typedef struct { uint64_t root; uint32_t levels, input_bits, granule; } vio_tree;
typedef struct { vio_tree tree, upper; uint32_t output_bits, flags; } vio_table;
"""
"""Of api.h; cffi has them again here, for this is another module."""


def floors() -> Any:
    """Build the C files of this folder, if they changed, and return their (ffi, lib)."""
    ffi = FFI()
    ffi.cdef(TYPES + (HERE / "core_floor.h").read_text(encoding="utf-8"))
    ffi.set_source(
        "_core_floor",
        '#include "vio.h"\n#include "core_floor.h"',
        sources=[str(HERE / "core_floor.c"), str(HERE / "walk_floor.c")],
        depends=[str(path) for path in (*CORE.rglob("*.h"), *HERE.glob("*.h"))],
        include_dirs=[str(CORE), str(HERE)],
        extra_compile_args=["-O3", "-std=gnu11", "-Wall", "-Wextra", "-Werror"],
    )
    spec = importlib.util.spec_from_file_location(
        "_core_floor", ffi.compile(tmpdir=str(HERE.parent / "build" / "bench"))
    )
    if spec is None or spec.loader is None:
        raise ImportError("the floors of the core's figures were not built")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def best(*measures: Callable[[], float], repeats: int = REPEATS) -> list[float]:
    """Run figures in turn, so that what disturbs one disturbs its floor as well; return the best of each."""
    return [min(runs) for runs in zip(*([measure() for measure in measures] for _ in range(repeats)), strict=True)]


def each(call: Callable[[], object], times: int) -> float:
    """Nanoseconds that one call takes, the loop's own share taken off."""
    start = thread_time_ns()
    for _ in range(times):
        pass
    empty = thread_time_ns() - start
    start = thread_time_ns()
    for _ in range(times):
        call()
    return (thread_time_ns() - start - empty) / times


def once(call: Callable[[], object]) -> float:
    """Nanoseconds that one long call takes."""
    start = thread_time_ns()
    call()
    return float(thread_time_ns() - start)


def result(name: str, value: float, unit: str, floor: float | None, target: tuple[str, bool] | None = None) -> Result:
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "floor": None if floor is None else round(floor, 3),
        "ratio": round(value / floor, 3) if floor else None,
        "target": target and target[0],
        "met": target and target[1],
    }


def address_of(core: Core) -> int:
    """The engine's address, for loops in C over its insides."""
    from backend.core._native import ffi  # noqa: PLC0415  (its cdata is not ours to keep)

    return int(ffi.cast("uintptr_t", core._engine))
