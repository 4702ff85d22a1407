"""Where the firmware put things: read from what query-pci answers, remembered, and compared."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from backend.vm import machine
from backend.vm.placement import Placement, PlacementMemory

MACHINE = machine.parse(
    "two",
    tomllib.loads("""
machine = { type = "q35", memory = "512M" }
port = [{ name = "port1", slot = 6 }]
function = [
    { name = "iommu0", model = "amd-iommu", slot = 3 },
    { name = "iommu1", model = "amd-iommu", slot = 4 },
    { name = "nvme0", model = "nvme", slot = 5, size = "1M" },
    { name = "nvme1", model = "nvme", port = "port1", iommu = "iommu1", size = "1M" },
]
"""),
)


def device(name: str, bus: int, slot: int, *bars: tuple[int, int], **more: Any) -> dict[str, Any]:
    """As QEMU's query-pci has it (qapi/pci.json), but for what nobody reads."""
    regions = [{"bar": number, "type": "memory", "size": 0x4000, "address": address} for number, address in bars]
    return {"qdev_id": name, "bus": bus, "slot": slot, "function": 0, "regions": regions, **more}


def answer() -> list[Any]:
    behind = [device("nvme1", 7, 0, (0, 0xFE800000))]
    buses = {"number": 0, "secondary": 7, "subordinate": 7}
    return [
        {
            "bus": 0,
            "devices": [
                device("", 0, 0),
                device("iommu0", 0, 3, (0, 0xFEBF4000)),
                device("iommu1", 0, 4, (0, 0xFEBF8000)),
                device("nvme0", 0, 5, (0, -1)),  # nobody waits for it: no table names its BAR
                device("port1", 0, 6, pci_bridge={"bus": buses, "devices": behind}),
            ],
        }
    ]


FOUND = Placement(
    {"iommu0": 0xFEBF4000, "iommu1": 0xFEBF8000}, {"iommu0": 0, "iommu1": 0, "nvme0": 0, "nvme1": 7}
)


def test_what_query_pci_says() -> None:
    assert Placement.seen(answer(), MACHINE) == FOUND


@pytest.mark.parametrize("address", [-1, 0])
def test_a_bar_that_is_not_placed_yet(address: int) -> None:
    said = answer()
    said[0]["devices"][2]["regions"][0]["address"] = address
    assert Placement.seen(said, MACHINE) is None


def test_a_bus_that_is_not_numbered_yet() -> None:
    """QEMU shows what is behind a port once the port has a bus."""
    said = answer()
    del said[0]["devices"][4]["pci_bridge"]["devices"]
    assert Placement.seen(said, MACHINE) is None


def test_what_stands_elsewhere_is_named() -> None:
    assert FOUND.difference(copy.deepcopy(FOUND)) == ""
    moved = Placement({**FOUND.bars, "iommu1": 0xFEB00000}, FOUND.buses)
    assert FOUND.difference(moved) == "the registers of iommu1 stand at 0xfebf8000, not at 0xfeb00000"
    renumbered = Placement(FOUND.bars, {**FOUND.buses, "nvme1": 2})
    assert FOUND.difference(renumbered) == "nvme1 stands on bus 0x07, not on 0x02"


def test_what_is_remembered(tmp_path: Path) -> None:
    memory = PlacementMemory(tmp_path, MACHINE, "11.1")
    assert memory.recall() is None
    memory.learn(FOUND)
    assert memory.recall() == FOUND
    assert PlacementMemory(tmp_path, MACHINE, "11.2").recall() is None
    assert PlacementMemory(tmp_path, MACHINE.with_options(memory="1G"), "11.1").recall() is None
    memory.forget()
    assert memory.recall() is None


@pytest.mark.parametrize(
    "kept", ["", "[]", "{}", '{"bars": {"iommu0": 0, "iommu1": 1}, "buses": {}}', '{"bars": 1, "buses": 2}', "\xff"]
)
def test_what_cannot_be_read_is_learnt_again(tmp_path: Path, kept: str) -> None:
    memory = PlacementMemory(tmp_path, MACHINE, "11.1")
    memory.learn(FOUND)
    (file,) = (tmp_path / "placements").iterdir()
    file.write_text(kept, encoding="latin-1")
    assert memory.recall() is None
