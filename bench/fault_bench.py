"""Shared virtual addressing in a guest: page requests from the guest's side and from ours, and 1 MiB both ways.

A stock guest runs the timings of guest-tests/sva on the machine q35-amd-sva. What it measures holds its own time: its
kernel's handling of a fault, and every instruction of it emulated where there is no KVM. The server measures each round
trip as well, from the interrupt (MSI) to the answer (COMPLETE_PPR), and how much of its own processor that took.

A copy of resident memory has a floor, a copy of as much by the C library in this run; a fault has none: whatever is
between interrupt and answer is the guest's choice.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from backend.vm.errors import CannotRun
from bench.result import Result

MACHINE = "q35-amd-sva"
SECONDS = 300
MIB = 1 << 20
COPIES = 50
OURS_US = 100.0
UNTOUCHED_MS = 70.0
RESIDENT_MS = 2.0

# name, the guest's test, what it printed, unit, limit
FIGURES = (
    ("a fault, in the guest: job with one less job without", "fault", r"round trip ([\d.]+) ms", "ms", None),
    ("1 MiB untouched, in groups", "untouched-1-mib", r": ([\d.]+) ms", "ms", UNTOUCHED_MS),
    ("1 MiB resident, copied", "resident-1-mib", r": ([\d.]+) ms", "ms", RESIDENT_MS),
    ("1 MiB resident, unknown to the device TLB", "cold-1-mib", r": ([\d.]+) ms", "ms", None),
    ("bind a process", "bind", r"bind ([\d.]+) ms", "ms", None),
    ("a job that does nothing", "empty-job", r": ([\d.]+) ms", "ms", None),
)


def results() -> list[Result]:
    """One guest's figures. CannotRun if it does not come to them."""
    report = _report()
    details = {check["name"]: check["detail"] for check in report["checks"]}
    dma = report["dma"]
    found = [
        _result("MSI to COMPLETE_PPR, as the server sees it", dma["page_round_trip_us"], "us", None),
        _result("of it the server's own", dma["page_round_trip_ours_us"], "us", OURS_US),
    ]
    for name, test, pattern, unit, limit in FIGURES:
        said = re.search(pattern, details.get(f"sva-timings/{test}", ""))
        if said is None:
            raise CannotRun(f"the guest gave no figure for {test}: {details.get(f'sva-timings/{test}', 'nothing')}")
        floor = _copy_ms() if test == "resident-1-mib" else None
        found.append(_result(name, float(said[1]), unit, limit, floor))
    return found


def _report() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vioasid-") as folder:
        run = Path(folder, "run")
        run.mkdir(mode=0o700)
        done = subprocess.run(
            [
                sys.executable, "-m", "backend.cli.main", "boot", "--machine", MACHINE, "--json",
                "--append", "vioasid.checks=sva-timings",
            ],
            env={**os.environ, "XDG_RUNTIME_DIR": str(run), "XDG_STATE_HOME": folder},
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise CannotRun(f"a guest of {MACHINE} did not pass: {done.stderr.strip() or done.stdout.strip()[-500:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _copy_ms() -> float:
    """Of 1 MiB by memmove(), the best of some."""
    source, target = (ctypes.create_string_buffer(MIB) for _ in range(2))
    took = []
    for _ in range(COPIES):
        begin = time.perf_counter()
        ctypes.memmove(target, source, MIB)
        took.append(time.perf_counter() - begin)
    return min(took) * 1e3


def _result(name: str, value: float, unit: str, limit: float | None, floor: float | None = None) -> Result:
    return {
        "name": f"faults: {name}",
        "value": value,
        "unit": unit,
        "floor": floor,
        "ratio": None if floor is None else value / floor,
        "target": None if limit is None else f"<= {limit:g} {unit}",
        "met": None if limit is None else value <= limit,
    }
