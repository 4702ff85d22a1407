"""Machine files: what they say, and what is said of those that are wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from backend.vm import machine
from backend.vm.errors import CannotRun

GOOD = """
description = "a test"
[machine]
type = "q35"
memory = "1G"
cpus = 2
[kernel]
append = "console=ttyS0"
[[function]]
name = "iommu"
model = "amd-iommu"
slot = 3
[[function]]
name = "nvme0"
model = "nvme"
slot = 5
size = "64M"
"""


def parsed(text: str) -> machine.Machine:
    return machine.parse("test", tomllib.loads(text))


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("4G", 4 << 30), ("1T", 1 << 40), ("4096", 4096), ("8k", 8192), ("2GiB", 2 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert machine.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.5G", "1X", "0x10", "1 2"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        machine.parse_size(text)


def test_a_machine_file() -> None:
    found = parsed(GOOD)
    assert (found.memory, found.cpus, found.type) == (1 << 30, 2, "q35")
    assert found.iommu.rid == 0x18  # device 3, function 0 of bus 0
    assert [(f.rid, f.bdf, f.size) for f in found.endpoints] == [(0x28, "0000:00:05.0", 64 << 20)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("slot = 5", "slot = 3", "share a slot"),
        ('name = "nvme0"', 'name = "iommu"', "share a name"),
        ('name = "nvme0"', 'name = "../x"', "must be 1 to 16"),
        ('model = "nvme"', 'model = "floppy"', "unknown model 'floppy'"),
        ('model = "nvme"', 'model = "amd-iommu"', "exactly one IOMMU"),
        ("slot = 5", "slot = 31", "1 to 30"),
        ('memory = "1G"', 'memory = "much"', "is no size"),
        ("cpus = 2", "cores = 2", "'cores', which means nothing"),
    ],
)
def test_what_is_wrong_with_a_file(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=said):
        parsed(GOOD.replace(old, new))


def test_no_endpoint() -> None:
    with pytest.raises(ValueError, match="at least one endpoint"):
        parsed(GOOD[: GOOD.rindex("[[function]]")])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "64M"}, "128M to 1T"),
        ({"memory": "129M"}, "multiple of 2M"),
        ({"memory": "lots"}, "--memory"),
        ({"cpus": 0}, "1 to 64"),
        ({"cpus": 65}, "1 to 64"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(CannotRun, match=said):
        parsed(GOOD).with_options(**options)


def test_options_take_the_place_of_the_file() -> None:
    found = parsed(GOOD).with_options(memory="4G", cpus=1, append="iommu.strict=1")
    assert (found.memory, found.cpus, found.append) == (4 << 30, 1, "console=ttyS0 iommu.strict=1")


def test_names_that_are_no_machine(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=r"choose one of .*q35-amd"):
        machine.load("q36")
    with pytest.raises(CannotRun, match="No such file"):
        machine.load(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[machine")
    with pytest.raises(CannotRun, match="correct the machine file"):
        machine.load(str(broken))
    broken.write_text('[machine]\nmemory = "1G"\n')
    with pytest.raises(CannotRun, match="the key 'type' is missing"):
        machine.load(str(broken))


def test_every_machine_of_the_project_loads() -> None:
    assert "q35-amd" in machine.names()
    for name in machine.names():
        assert machine.load(name).name == name
