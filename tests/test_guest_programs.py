"""The guest's programs on this machine, against files: what they print, what they notice, and how they end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from backend.vm.cache import Cache
from backend.vm.initramfs import build_program

PASS, FAIL, USAGE, ERROR, SKIP = range(5)  # guest-tests/programs/guest.h
MIB = 1 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_program(Cache(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file that takes direct I/O, filled with something."""
    path = tmp_path / "disk"
    path.write_bytes(b"\x5a" * (8 * MIB))
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{tmp_path} takes no direct I/O: set TMPDIR to a folder on a disk")
    return path


def run(program: Path, *words: object) -> tuple[int, str]:
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize("verb", ["sha256", "sha256-plain"])
@pytest.mark.parametrize("length", [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 1000, 65535, 65536, 200001])
def test_sha256_is_that_of_the_library(program: Path, tmp_path: Path, verb: str, length: int) -> None:
    data = bytes((n * n + length) % 251 for n in range(length))
    (tmp_path / "data").write_bytes(data)
    assert run(program, verb, tmp_path / "data") == (PASS, hashlib.sha256(data).hexdigest() + "\n")


def test_bulk_prints_the_hash_of_what_lies_on_the_disk(program: Path, disk: Path) -> None:
    seen = set()
    for _ in range(2):
        status, text = run(program, "bulk", disk, "1M", "4M")
        assert status == PASS, text
        data = disk.read_bytes()
        assert data[:MIB] == b"\x5a" * MIB
        assert data[5 * MIB :] == b"\x5a" * (3 * MIB)
        digest = hashlib.sha256(data[MIB : 5 * MIB]).hexdigest()
        assert text.startswith(f"sha256={digest} bytes={4 * MIB} written=")
        assert len(set(data[MIB : 5 * MIB])) == 256
        seen.add(digest)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("depth", "size", "count"), [(1, "4K", 16), (8, 512, 100), (32, 1536, 33), (64, "4K", 10), (4, "1M", 6)]
)
def test_queues_leave_every_block_in_its_place(program: Path, disk: Path, depth: int, size: object, count: int) -> None:
    status, text = run(program, "queues", disk, "1M", depth, size, count)
    assert status == PASS, text
    each = int(str(size).replace("K", "")) * 1024 if "K" in str(size) else MIB if size == "1M" else int(str(size))
    data = disk.read_bytes()
    blocks = [data[MIB + n * each : MIB + (n + 1) * each] for n in range(count)]
    assert len(set(blocks)) == count
    assert b"\x5a" * 512 not in b"".join(blocks)
    assert data[:MIB] + data[MIB + count * each :] == b"\x5a" * (len(data) - count * each)


def test_a_disk_that_is_not_there(program: Path, tmp_path: Path) -> None:
    text = f"open {tmp_path / 'none'}: No such file or directory\n"
    assert run(program, "bulk", tmp_path / "none", 0, "1M") == (ERROR, text)


@pytest.mark.parametrize("verb", ["zeroes", "discard"])
def test_what_a_file_cannot_do_is_a_skip(program: Path, disk: Path, verb: str) -> None:
    status, text = run(program, verb, disk, "1M", "1M")
    assert status == SKIP
    assert text.startswith("the device takes no ")


def test_files_are_recognised(program: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    assert run(program, "files-make", tree, 7) == (PASS, "96 files in 8 folders\n")
    assert run(program, "files-compare", tree, 7) == (PASS, "104 files as they were written\n")
    assert (tree / "0/soft").is_symlink()
    assert (tree / "0/hard").samefile(tree / "0/5")
    assert sum(path.stat().st_size for path in tree.rglob("*") if not path.is_symlink()) > 8 * MIB
    status, text = run(program, "files-compare", tree, 8)
    assert status == FAIL
    assert re.fullmatch(r"0/1: byte 0 is 0x\w\w, was written as 0x\w\w\n", text)


@pytest.mark.parametrize("damage", ["flip", "append", "cut", "remove", "add"])
def test_files_that_changed_are_noticed(program: Path, tmp_path: Path, damage: str) -> None:
    run(program, "files-make", tmp_path, 1)
    victim = tmp_path / "7/11"
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        victim.write_bytes(data)
        said = f"7/11: byte {len(data) - 1} is "
    elif damage in {"append", "cut"}:
        victim.write_bytes(data + b"x" if damage == "append" else data[:-1])
        said = f"7/11 has {len(data) + (1 if damage == 'append' else -1)} bytes, not {len(data)}"
    elif damage == "remove":
        victim.unlink()
        said = "7/11: No such file or directory"
    else:
        (tmp_path / "3/new").touch()
        said = "folder 3 has 14 entries, not 13"
    status, text = run(program, "files-compare", tmp_path, 1)
    assert status == FAIL
    assert said in text


# A page that is locked lies in a mapping of its own, which /proc/PID/smaps marks "lo".
CHANGE_THE_PAGE = """
import os, re
for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open(f"/proc/{os.getppid()}/smaps").read()):
    if re.search(r"(?m)^VmFlags:.* lo( |$)", part):
        with open(f"/proc/{os.getppid()}/mem", "r+b", buffering=0) as memory:
            memory.seek(int(part.split("-")[0], 16) + 100)
            memory.write(b"was here")
"""


def test_a_held_page_that_nobody_touches(program: Path, disk: Path) -> None:
    status, text = run(program, "held-page", disk, "1M", "sh", "-c", "echo $HELD_OFFSET $HELD_LENGTH $HELD_GPA; exit 1")
    assert status == FAIL  # the command's own
    assert re.fullmatch(rf"{MIB} 4096 0x[0-9a-f]+\n", text)
    assert run(program, "held-page", disk, "1M", "true") == (PASS, "")


def test_a_held_page_that_changes(program: Path, disk: Path) -> None:
    status, text = run(program, "held-page", disk, "1M", sys.executable, "-c", CHANGE_THE_PAGE)
    if "PermissionError" in text:
        pytest.skip("this user may not write to the memory of another process of theirs")
    assert status == FAIL
    assert re.fullmatch(r"the page at 0x[0-9a-f]+ changed from byte 10\d on: 0x\w\w instead of 0x\w\w\n", text)


FAULT = "nvme 0000:00:04.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000b address=0xdead000 flags=0x0020]"
UNCLAIMED = "AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:00:04.0 domain=0x000b address=0xdead000 flags=0x0020]"


@contextlib.contextmanager
def log(records: Sequence[str], *, first: int = 100) -> Iterator[int]:
    """A stand-in for /dev/kmsg: a pipe in packet mode hands out one record a read, too."""
    source, sink = os.pipe2(os.O_DIRECT)
    for sequence, text in enumerate(records, start=first):
        os.write(sink, f"4,{sequence},{sequence}000,-;{text}\n SUBSYSTEM=pci\n DEVICE=+pci:0000:00:04.0\n".encode())
    os.close(sink)
    try:
        yield source
    finally:
        os.close(source)


def log_wait(program: Path, records: Sequence[str], *words: object) -> tuple[int, str]:
    with log(records) as source:
        command = [str(program), "log-wait", f"/dev/fd/{source}", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, pass_fds=[source])
    return done.returncode, done.stdout


@pytest.mark.parametrize("text", [FAULT, UNCLAIMED, FAULT.replace("0xdead000", "0x000000000dead000")])
def test_the_fault_that_was_ordered_is_found(program: Path, text: str) -> None:
    records = ["something else", text, "more"]
    assert log_wait(program, records, 101, "0000:00:04.0", "0xdead000", 5) == (PASS, f"{text}\n")


@pytest.mark.parametrize(
    ("text", "mark", "others"),
    [
        (FAULT, 102, 0),  # before the mark
        (FAULT.replace("0xdead000", "0xdead0000"), 100, 1),
        (FAULT.replace("0xdead000", "0xdea"), 100, 1),
        (FAULT.replace("04.0", "05.0"), 100, 1),
        (FAULT.replace("04.0", "04.07"), 100, 1),
        (FAULT.replace("0000:00:04.0", "1110000:00:04.0"), 100, 1),
        (UNCLAIMED.replace("04.0", "04.01"), 100, 1),
        (FAULT.replace("IO_PAGE_FAULT", "DEV_TAB_HARDWARE_ERROR"), 100, 0),
        ("0000:00:04.0 address=0xdead000", 100, 0),
    ],
)
def test_another_fault_is_not_taken_for_it(program: Path, text: str, mark: int, others: int) -> None:
    status, said = log_wait(program, [text], mark, "0000:00:04.0", "0xdead000", 0)
    assert status == FAIL
    what = f"the last of {others} others: {text}" if others else "and no other fault either"
    assert what in said


def test_waiting_for_a_fault_ends(program: Path) -> None:
    begin = time.monotonic()
    assert log_wait(program, [], 0, "0000:00:04.0", "0x1000", 1)[0] == FAIL
    assert 0.9 < time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["bulk"],
        ["bulk", "disk", "0"],
        ["bulk", "disk", "0", "1M", "more"],
        ["queues", "{disk}", "0", "0", "512", "1"],
        ["queues", "{disk}", "0", "65", "512", "1"],
        ["queues", "{disk}", "0", "1", "100", "1"],
        ["queues", "{disk}", "0", "1", "512", "0"],
        ["bulk", "{disk}", "0", "1"],
        ["bulk", "{disk}", "x", "1M"],
        ["bulk", "{disk}", "1G", "1M"],
        ["bulk", "{disk}", "0", "99999999999999999999M"],
        ["zeroes", "{disk}", "0", "4096"],
        ["held-page", "{disk}", "0"],
    ],
)
def test_wrong_words_are_a_usage_error(program: Path, disk: Path, words: list[str]) -> None:
    before = disk.read_bytes()
    status, text = run(program, *(word.format(disk=disk) for word in words))
    assert status == USAGE
    assert text
    assert disk.read_bytes() == before


def test_the_program_needs_nothing_but_the_kernel(program: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("install binutils for readelf")
    headers = subprocess.run(["readelf", "-l", program], capture_output=True, text=True, check=True).stdout
    assert "INTERP" not in headers


def test_sva_tests_end_one_by_one_where_there_is_no_engine(program: Path) -> None:
    """Each in a process of its own: an error is that test's result, and the next one runs."""
    status, text = run(program, "sva", "errors")
    lines = text.splitlines()
    assert status == FAIL
    assert lines[0] == "  KTAP version 1"
    planned = int(lines[1].removeprefix("  1.."))
    assert planned > 5
    assert len(lines) == 2 + planned
    for number, line in enumerate(lines[2:], 1):
        assert re.fullmatch(rf"  not ok {number} [a-z-]+ # /dev/vioasid-dma0: No such file or directory", line)


def test_one_sva_test_can_be_chosen(program: Path) -> None:
    status, text = run(program, "sva", "errors", "hole")
    assert status == FAIL
    assert text.splitlines()[1:] == ["  1..1", "  not ok 1 hole # /dev/vioasid-dma0: No such file or directory"]
    assert run(program, "sva", "none-such") == (USAGE, "none-such is no group of tests\n")
