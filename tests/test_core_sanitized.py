"""The C core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, driven by core_driver.c."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from core_objects import COMPILER, NoSanitizer, link

DRIVER = Path(__file__).resolve().parent / "core_driver.c"


def build(folder: Path, sanitizers: str) -> Path:
    """Build the driver with the core's own sources; skip where the host's compiler lacks the sanitizer."""
    if COMPILER is None:
        pytest.skip("no C compiler: install gcc")
    made = folder / "driver"
    try:
        link(made, sanitizers, DRIVER)
    except NoSanitizer as missing:
        pytest.skip(str(missing))
    return made


def run(driver: Path, *arguments: str) -> None:
    # Without a fixed layout of addresses: ThreadSanitizer cannot place its shadow in every random one.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {name: value for name, value in os.environ.items() if name not in {"LD_PRELOAD", "ASAN_OPTIONS"}}
    done = subprocess.run(
        [*fixed, str(driver), *arguments], capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stderr == ""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("asan"), "address,undefined")


@pytest.mark.parametrize("seed", range(1, 5))
def test_random_requests_and_changes(address: Path, seed: int) -> None:
    """Hostile tables, maps, truncations and every call, against a model of stage 2."""
    run(address, "random", str(seed), "100000")


def test_index(address: Path) -> None:
    """The hash index of spaces and routes, against an array."""
    run(address, "index", "1")


def test_bounds(address: Path) -> None:
    """Table pages and IOTLB tags run out."""
    run(address, "bounds")


def test_threads_and_addresses(address: Path) -> None:
    run(address, "threads", "300")


def test_used_bits_race_with_the_guest(address: Path) -> None:
    """Accessed and dirty are set by compare-and-exchange."""
    run(address, "used-bits")


def test_iotlb_sets_are_read_whole(address: Path) -> None:
    run(address, "iotlb", "4000000")


def test_threads(tmp_path: Path) -> None:
    driver = build(tmp_path, "thread")
    run(driver, "threads", "500")
    run(driver, "iotlb", "200000")
    run(driver, "used-bits")
