"""C programs of the tests, built with the core's own sources under a sanitizer of the compiler, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from core_objects import COMPILER, NoSanitizer, link

TESTS = Path(__file__).resolve().parent


def build(folder: Path, sanitizers: str, source: str) -> Path:
    """Build tests/`source` with the core; skip where the host's compiler lacks the sanitizer."""
    if COMPILER is None:
        pytest.skip("no C compiler: install gcc")
    made = folder / "driver"
    try:
        link(made, sanitizers, TESTS / source)
    except NoSanitizer as missing:
        pytest.skip(str(missing))
    return made


def run(driver: Path, *arguments: str, seconds: float = 60) -> str:
    """Run what was built; a sanitizer's report, or a line on what does not hold, fails the test."""
    # Without a fixed layout of addresses: ThreadSanitizer cannot place its shadow in every random one.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {name: value for name, value in os.environ.items() if name not in {"LD_PRELOAD", "ASAN_OPTIONS"}}
    done = subprocess.run(
        [*fixed, str(driver), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stderr == ""
    return done.stdout
