"""The archive against a reader written here from the format's description."""

from __future__ import annotations

import stat
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.vm.cpio import Archive

# Documentation/driver-api/early-userspace/buffer-format.rst: after the magic, each of eight hexadecimal digits
FIELDS = ["ino", "mode", "uid", "gid", "nlink", "mtime", "filesize", "maj", "min", "rmaj", "rmin", "namesize", "chksum"]


@dataclass(frozen=True)
class Entry:
    name: str
    data: bytes
    fields: dict[str, int]


def unpack(archive: bytes) -> list[Entry]:
    entries: list[Entry] = []
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        digits = archive[at + 6 : at + 110].decode()
        fields = {name: int(digits[8 * i : 8 * i + 8], 16) for i, name in enumerate(FIELDS)}
        end = at + 110 + fields["namesize"]
        name = archive[at + 110 : end]
        assert name[-1] == 0
        begin = (end + 3) // 4 * 4
        data = archive[begin : begin + fields["filesize"]]
        assert not any(archive[end:begin])
        if name == b"TRAILER!!!\0":
            assert begin == len(archive)
            return entries
        entries.append(Entry(name[:-1].decode(), data, fields))
        at = (begin + fields["filesize"] + 3) // 4 * 4


def test_one_of_each_kind() -> None:
    archive = Archive()
    archive.file("init", b"#!/bin/sh\n", 0o755)
    archive.folder("mnt/disk", 0o700)
    archive.character_device("dev/console", 5, 1)
    entries = {entry.name: entry for entry in unpack(archive.data)}
    assert list(entries) == ["dev", "dev/console", "init", "mnt", "mnt/disk"]
    assert entries["init"].data == b"#!/bin/sh\n"
    assert entries["init"].fields["mode"] == stat.S_IFREG | 0o755
    assert entries["mnt/disk"].fields["mode"] == stat.S_IFDIR | 0o700
    console = entries["dev/console"].fields
    assert (stat.S_ISCHR(console["mode"]), console["rmaj"], console["rmin"]) == (True, 5, 1)
    assert len({entry.fields["ino"] for entry in entries.values()}) == len(entries)
    assert all(entry.fields[name] == 0 for entry in entries.values() for name in ("uid", "gid", "mtime", "chksum"))


names = st.text("abz09-_.é", min_size=1, max_size=5).filter(lambda name: name not in {".", ".."})


@given(st.dictionaries(names, st.binary(max_size=9), max_size=8))
def test_contents_and_order(files: dict[str, bytes]) -> None:
    archive, other = Archive(), Archive()
    for name, data in files.items():
        archive.file(f"a/{name}", data)
    for name, data in reversed(files.items()):
        other.file(f"/a/{name}", data)
    assert archive.data == other.data
    entries = unpack(archive.data)
    assert {entry.name: entry.data for entry in entries if entry.name != "a"} == {f"a/{n}": d for n, d in files.items()}
    assert not files or entries[0].name == "a"


def test_a_parent_stands_before_its_child_even_beside_names_that_sort_between() -> None:
    archive = Archive()
    for name in ("a/b", "a-b", "a.b"):
        archive.file(name, b"")
    order = [entry.name for entry in unpack(archive.data)]
    assert order.index("a") < order.index("a/b")


@pytest.mark.parametrize("name", ["", "/", "../etc/passwd", "a/../b", "a\0b"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="no path"):
        Archive().file(name, b"")


def test_the_same_name_with_other_contents() -> None:
    archive = Archive()
    archive.file("lib/libc.so.6", b"one")
    archive.file("lib/libc.so.6", b"one")
    with pytest.raises(ValueError, match=r"lib/libc\.so\.6 is in the archive already"):
        archive.file("lib/libc.so.6", b"two")
