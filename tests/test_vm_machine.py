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
    assert [iommu.rid for iommu in found.iommus] == [0x18]  # device 3, function 0 of bus 0
    assert [(f.rid, f.bdf, f.size) for f in found.endpoints] == [(0x28, "0000:00:05.0", 64 << 20)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("slot = 5", "slot = 3", "share a slot"),
        ("slot = 5", 'slot = "5"', "is '5': it must be a whole number"),
        ('name = "nvme0"', 'name = "iommu"', "share a name"),
        ('name = "nvme0"', 'name = "../x"', "function name .* must be 1 to 16"),
        ('model = "nvme"', 'model = "floppy"', "unknown model 'floppy'"),
        ('model = "nvme"\nslot = 5\nsize = "64M"', 'model = "amd-iommu"\nslot = 5', "one endpoint behind each IOMMU"),
        ('model = "amd-iommu"', 'model = "nvme"', "at least one IOMMU"),
        ('model = "amd-iommu"', 'model = "amd-iommu"\nsize = "1M"', "'size', which means nothing here"),
        ('model = "amd-iommu"\nslot = 3', 'model = "amd-iommu"\nport = "p"', "'port', which means nothing here"),
        ("slot = 5", "", "either a slot"),
        ("slot = 5", 'slot = 5\nport = "p"', "either a slot"),
        ("slot = 5", 'port = "p"', "names the port 'p' .ports: the file has none"),
        ("slot = 5", 'slot = 5\niommu = "nvme0"', "'nvme0', which is no IOMMU of this machine .iommu."),
        ("[kernel]", '[[port]]\nname = "p"\nslot = 9\n[kernel]', "nothing stands behind port 'p'"),
        ("[kernel]", '[[port]]\nname = "p"\nslot = 5\n[kernel]', "share a slot: 3, 5, 5"),
        ("[kernel]", '[[port]]\nname = "p"\nslot = 0\n[kernel]', "port 'p' has slot 0"),
        ("[kernel]", '[[port]]\nname = "p"\nbus = 9\n[kernel]', "'bus', which means nothing"),
        ("[kernel]", '[[port]]\nname = "nvme0"\nslot = 9\n[kernel]', "share a name"),
        ("slot = 5", "slot = 31", "slot 31: 1 to 30"),
        ('memory = "1G"', 'memory = "much"', "is no size"),
        ("cpus = 2", "cores = 2", "'cores', which means nothing"),
        ("[kernel]", '[guest]\nchecks = ["log", "x"]\n[kernel]', "'x', which is none .known: .*isolation"),
    ],
)
def test_what_is_wrong_with_a_file(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=said):
        parsed(GOOD.replace(old, new))


def test_no_endpoint() -> None:
    with pytest.raises(ValueError, match="at least one endpoint"):
        parsed(GOOD[: GOOD.rindex("[[function]]")])


TWO = GOOD + """
[[port]]
name = "east"
slot = 9
[[port]]
name = "west"
slot = 8
[[function]]
name = "iommu1"
model = "amd-iommu"
slot = 4
[[function]]
name = "nvme1"
model = "nvme"
port = "east"
iommu = "iommu1"
size = "1M"
[[function]]
name = "nvme2"
model = "nvme"
port = "west"
size = "1M"
"""


def test_the_checks_that_a_guest_runs_stand_on_its_kernel_line() -> None:
    found = parsed(GOOD + '[guest]\nchecks = ["iommu", "log"]\n')
    assert found.kernel_line == "console=ttyS0 vioasid.checks=iommu,log"
    assert parsed(GOOD).kernel_line == "console=ttyS0"


def test_root_ports_and_several_iommus() -> None:
    """Buses are numbered in the order of the ports' slots until the firmware has been asked."""
    found = parsed(TWO)
    assert [iommu.name for iommu in found.iommus] == ["iommu", "iommu1"]
    assert {f.name: f.bdf for f in found.behind("iommu")} == {"nvme0": "0000:00:05.0", "nvme2": "0000:01:00.0"}
    assert {f.name: f.rid for f in found.behind("iommu1")} == {"nvme1": 0x200}
    learnt = found.with_buses({"iommu": 0, "iommu1": 0, "nvme0": 0, "nvme1": 5, "nvme2": 0xFF})
    assert [f.rid for f in learnt.functions] == [0x18, 0x28, 0x20, 0x500, 0xFF00]


def test_a_port_has_one_function() -> None:
    with pytest.raises(ValueError, match="share a port: east, east"):
        parsed(TWO.replace('port = "west"', 'port = "east"'))


def test_more_than_can_be_served() -> None:
    port = '[[port]]\nname = "p{0}"\nslot = {0}\n'
    function = '[[function]]\nname = "n{0}"\nmodel = "nvme"\nport = "p{0}"\nsize = "1M"\n'
    ports = "".join(port.format(n) for n in range(10, 27))
    with pytest.raises(ValueError, match="17 ports, at most 16"):
        parsed(GOOD + ports)
    with pytest.raises(ValueError, match="19 functions, at most 16"):
        parsed(GOOD + ports + "".join(function.format(n) for n in range(10, 27)))


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
    assert found.cpu == "qemu64" and found.with_options(cpu="max").cpu == "max"


def test_names_that_are_no_machine(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=r"choose one of .*q35-amd"):
        machine.load("q36")
    with pytest.raises(CannotRun, match="No such file"):
        machine.load(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_bytes(b"\xff\xfe[machine]")
    with pytest.raises(CannotRun, match="correct the machine file"):
        machine.load(str(broken))
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
