"""The C core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, driven by core_driver.c."""

from __future__ import annotations

from pathlib import Path

import pytest
from core_sanitizers import build, run

DRIVER = "core_driver.c"
TRACKING_DRIVER = "core_tracking_driver.c"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("asan"), "address,undefined", DRIVER)


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
    driver = build(tmp_path, "thread", DRIVER)
    run(driver, "threads", "500")
    run(driver, "iotlb", "200000")
    run(driver, "used-bits")


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_dirty_tracking_and_pasid_tables_in_threads(tmp_path: Path, sanitizers: str) -> None:
    """No write between two reads of the dirty pages is lost; no PASID's old table is used after its invalidation."""
    run(build(tmp_path, sanitizers, TRACKING_DRIVER), "500")
