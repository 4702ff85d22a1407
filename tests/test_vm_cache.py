"""The cache folder: whole or absent, one maker at a time, bad folders refused with what to do."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.vm.cache import MANIFEST, UNUSED_DAYS, Cache, Entry, Made, cache_dir
from backend.vm.errors import CannotRun
from backend.vm.progress import Report

KEY = {"packages": ["a"]}

MAKER = """
import sys, time
from pathlib import Path
from backend.vm.cache import Cache, Made

def maker(entry, work, report):
    (entry / "data").write_text("half")
    Path(sys.argv[2]).touch()          # the test waits for this
    time.sleep(float(sys.argv[3]))
    (entry / "data").write_text("whole")
    return Made({"by": sys.argv[2]}, ["data"])

entry = Cache(Path(sys.argv[1])).get("thing", {"packages": ["a"]}, what="a thing", need=1, maker=maker)
print(entry.facts["by"])
"""


def make(entry: Path, work: Path, report: Report) -> Made:
    (entry / "data").write_text("whole")
    return Made({"version": "1"}, ["data"])


def get(cache: Cache, key: dict[str, list[str]] | None = None, *, need: int = 1) -> Entry:
    return cache.get("thing", key or KEY, what="a thing", need=need, maker=make)


def start(root: Path, sign: Path, seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", MAKER, str(root), str(sign), str(seconds)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith(".lock-"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"VIOASID_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"VIOASID_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/vioasid"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/u/.cache/vioasid"),  # XDG base directories: must be absolute
        ({}, "/home/u/.cache/vioasid"),
    ],
)
def test_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("VIOASID_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/u")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_made_once_and_found_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache")
    assert cache.find("thing", KEY) is None
    entry = get(cache)
    assert (entry.path / "data").read_text() == "whole"
    assert cache.find("thing", KEY) == entry
    assert cache.get("thing", KEY, what="a thing", need=1, maker=unwanted) == entry


def unwanted(entry: Path, work: Path, report: Report) -> Made:
    raise AssertionError("the entry is there: nothing is to be made")


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = get(cache)
    second = get(cache, {"packages": ["a", "b"]})
    assert first.path != second.path
    assert cache.find("thing", KEY) == first


def test_an_entry_that_nobody_opened_for_long_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    old = get(cache)
    long_ago = time.time() - (UNUSED_DAYS + 1) * 86400
    os.utime(old.path / MANIFEST, (long_ago, long_ago))
    new = get(cache, {"packages": ["b"]})
    assert leftovers(tmp_path) == [new.path.name]


@pytest.mark.parametrize("damage", ["manifest gone", "manifest cut", "manifest of another kind", "data gone"])
def test_a_damaged_entry_is_absent_and_made_again(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    entry = get(cache)
    manifest = entry.path / MANIFEST
    match damage:
        case "manifest gone":
            manifest.unlink()
        case "manifest cut":
            manifest.write_text(manifest.read_text()[:20])
        case "manifest of another kind":
            manifest.write_text(json.dumps([1, 2]))
        case "data gone":
            (entry.path / "data").unlink()
    assert cache.find("thing", KEY) is None
    assert get(cache) == entry
    assert (entry.path / "data").read_text() == "whole"
    assert leftovers(tmp_path) == [entry.path.name]


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing(entry: Path, work: Path, report: Report) -> Made:
        (entry / "data").write_text("half")
        (work / "scrap").write_text("x")
        raise CannotRun("the mirror is gone")

    cache = Cache(tmp_path)
    with pytest.raises(CannotRun, match="the mirror is gone"):
        cache.get("thing", KEY, what="a thing", need=1, maker=failing)
    assert leftovers(tmp_path) == []


def test_a_killed_maker_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    root, sign = tmp_path / "cache", tmp_path / "sign"
    with start(root, sign, 60) as maker:
        wait_for(sign)
        maker.send_signal(signal.SIGKILL)
    cache = Cache(root)
    assert cache.find("thing", KEY) is None
    assert [name for name in leftovers(root) if name.startswith(".making-thing-")]
    entry = get(cache)
    assert leftovers(root) == [entry.path.name]


def test_two_at_once_make_it_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    root, first_sign, second_sign = tmp_path / "cache", tmp_path / "first", tmp_path / "second"
    with start(root, first_sign, 1.5) as first:
        wait_for(first_sign)
        with start(root, second_sign, 0) as second:
            told, said = second.communicate(timeout=20)
        first_told, _ = first.communicate(timeout=20)
    assert told == first_told == f"{first_sign}\n"
    assert said == f"vioasid: waiting for another run that fetches a thing into {root}\n"
    assert not second_sign.exists()


def test_the_one_who_waits_takes_over_from_one_that_dies(tmp_path: Path) -> None:
    root, first_sign, second_sign = tmp_path / "cache", tmp_path / "first", tmp_path / "second"
    with start(root, first_sign, 60) as first:
        wait_for(first_sign)
        with start(root, second_sign, 0) as second:
            killer = threading.Timer(0.5, first.kill)
            killer.start()
            told, _ = second.communicate(timeout=20)
            killer.join()
    assert told == f"{second_sign}\n"
    assert len(leftovers(root)) == 1


def test_too_little_space_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=r"No space to fetch a thing: .* MiB are needed\. .*VIOASID_CACHE"):
        get(Cache(tmp_path), need=1 << 60)
    assert leftovers(tmp_path) == []


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CannotRun, match=r"cannot be used: it is no folder.*VIOASID_CACHE"):
            get(Cache(place))


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting takes root: run the tests as root to include this one")
    if not shutil.which("mount"):
        pytest.skip("there is no mount program: apt-get install mount")
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("this container may not mount: run the tests on a machine that may")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path) -> None:
    def big(entry: Path, work: Path, report: Report) -> Made:
        (entry / "data").write_bytes(bytes(8 << 20))
        return Made({}, ["data"])

    root = tmp_path / "small"
    with mounted(root, "size=4m"):
        with pytest.raises(CannotRun, match=r"No space to fetch a thing: .* is full, about 3 MiB are needed"):
            Cache(root).get("thing", KEY, what="a thing", need=3 << 20, maker=big)
        assert leftovers(root) == []


def test_a_read_only_folder_serves_what_it_has(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    with mounted(root, "size=4m"):
        entry = get(Cache(root))
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        assert get(Cache(root)) == entry
        with pytest.raises(CannotRun, match=r"Read-only file system.*VIOASID_CACHE"):
            get(Cache(root), {"packages": ["b"]})
