"""cffi build of the C core as `backend.core._native`; setup.py runs it. The declarations are api.h, beside their C."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = (
    "gate", "guard", "index", "pool", "iotlb", "engine", "walk", "host_table", "dirty", "space", "process_space",
    "helper", "errand",
    "pasid", "route", "faults", "request", "dma", "ats", "ats_missing", "window", "atomic", "batch", "guest_table",
    "lookup",
)  # fmt: skip
FLAGS = ("-O3", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread")


def declarations() -> str:
    """Return api.h as cffi wants it."""
    return (HERE / "api.h").read_text(encoding="utf-8")


def builder(name: str = "backend.core._native", *, root: Path = HERE.parent.parent) -> FFI:
    """Return the FFI that builds the module; sources are named relative to `root`, as setuptools asks."""
    ffi = FFI()
    ffi.cdef(declarations())
    here = HERE.relative_to(root)
    ffi.set_source(
        name,
        '#include "vio.h"',
        sources=[str(here / f"{source}.c") for source in SOURCES],
        depends=[str(path.relative_to(root)) for path in sorted(HERE.rglob("*.h"))],
        include_dirs=[str(here)],
        extra_compile_args=list(FLAGS),
        extra_link_args=["-pthread"],
    )
    return ffi


ffibuilder = builder()
