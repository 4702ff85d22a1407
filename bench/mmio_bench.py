"""The round trip of an MMIO read over vfio-user, beside a server in C on the same library (mmio_floor.c).

Both servers run in a process of their own, one after the other and in turns, and answer the same client
(mmio_client.c): 4 bytes of BAR0, one read at a time. What a round trip costs depends on where the two processes run,
so both places are measured: on two CPUs, as a guest and its backend have them, where waking the other CPU is most of
it; and on one CPU, where nothing but the servers' own work is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from backend.pci import Bar, FunctionServer, Msi, PciFunction, PciIds, Register, RegisterTable
from backend.vm import assets
from bench.result import Result

HERE = Path(__file__).resolve().parent
CLIENT = "mmio_client"
ROUNDS = 7
READS = 4000
TARGET = 1.3
"""Times the C server's round trip."""
C_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


def results() -> list[Result]:
    """The round trip in microseconds, on two CPUs (where there are two) and on one."""
    library = assets.libvfio_user()
    cpus = sorted(os.sched_getaffinity(0))
    places = [("one CPU", cpus[0], cpus[0])]
    if len(cpus) > 1:
        places.insert(0, ("two CPUs", cpus[0], cpus[1]))
    with tempfile.TemporaryDirectory(prefix="vioasid-") as name:
        folder = Path(name)
        _compile(folder, CLIENT)
        python = [sys.executable, "-m", "bench.mmio_bench", "--library", str(library.library), "--serve"]
        floor = None
        if library.include is not None:
            link = ("-isystem", str(library.include), str(library.library), f"-Wl,-rpath,{library.library.parent}")
            floor = [str(_compile(folder, "mmio_floor", *link))]
        return [_measure(folder, place, on, python, floor) for place, *on in places]


def _measure(folder: Path, place: str, on: Sequence[int], python: list[str], floor: list[str] | None) -> Result:
    """Take turns, so that a drift of the machine meets both; the best round of each counts, for noise only adds."""
    ours: list[float] = []
    floors: list[float] = []
    for _ in range(ROUNDS):
        if floor is not None:
            floors.append(_round_trip(folder, floor, on))
        ours.append(_round_trip(folder, python, on))
    least = min(floors) if floors else None
    ratio = min(ours) / least if least else None
    return {
        "name": f"MMIO read round trip, {place}",
        "value": min(ours),
        "unit": "us",
        "floor": least,
        "ratio": ratio,
        "target": f"<= {TARGET} x floor",
        "met": None if ratio is None else ratio <= TARGET,
    }


def _round_trip(folder: Path, server: list[str], on: Sequence[int]) -> float:
    """Start a server on one CPU and the client on another; the median round trip in microseconds."""
    path = folder / "mmio.sock"
    path.unlink(missing_ok=True)
    with _pinned(on[0]):
        serving = subprocess.Popen([*server, str(path)], stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    try:
        assert serving.stdout is not None
        if serving.stdout.readline() != "ready\n":
            raise RuntimeError(f"{shlex.join(server)} did not start: status {serving.wait()}")
        with _pinned(on[1]):
            done = subprocess.run(
                [folder / CLIENT, path, str(READS)], capture_output=True, text=True, check=True, timeout=60
            )
        return statistics.median(int(line) for line in done.stdout.splitlines()) / 1000
    finally:
        serving.terminate()
        serving.communicate()


@contextmanager
def _pinned(cpu: int) -> Iterator[None]:
    """Run on one CPU, for children to inherit it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _compile(folder: Path, name: str, *more: str) -> Path:
    binary = folder / name
    compiler = shlex.split(os.environ.get("CC") or "cc")
    subprocess.run([*compiler, *C_FLAGS, str(HERE / f"{name}.c"), "-o", str(binary), *more], check=True)
    return binary


async def serve(path: Path, library: Path) -> None:
    """The Python server: one function with a register table, until it is ended."""
    logging.disable()
    table = RegisterTable(Register(f"R{n}", 4 * n, 4, rw=0xFFFF_FFFF) for n in range(64))
    function = PciFunction(name="mmio", ids=PciIds(0x1234, 0x11E8), bars={0: Bar(4096, table)}, capabilities=[Msi()])
    server = FunctionServer(function, path, on_dma_map=lambda _: None, on_dma_unmap=lambda _: None, library=library)
    await server.start()
    print("ready", flush=True)
    raise await server.failed()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mmio_bench", description=__doc__)
    parser.add_argument("--serve", type=Path, metavar="SOCKET", help="be the Python server")
    parser.add_argument("--library", type=Path, metavar="FILE", help="libvfio-user for --serve")
    args = parser.parse_args()
    if args.serve is not None:
        asyncio.run(serve(args.serve, args.library))
        return 0
    print(json.dumps({"results": results()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
