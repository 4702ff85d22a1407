"""Where the firmware puts what the host must know before QEMU starts: the IOMMUs' BARs, and buses behind root ports.

The IVRS names both. The firmware decides the same on every boot of one configuration: learnt once, and remembered in
the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backend.vm.machine import Machine

NOT_PLACED = (-1, 0)  # as query-pci says of a BAR that firmware has not reached, or that is off


@dataclass(frozen=True, slots=True)
class Placement:
    """`bars`: the GPA of BAR 0 of each IOMMU; `buses`: the bus of each function. Both by the function's name."""

    bars: Mapping[str, int]
    buses: Mapping[str, int]

    @classmethod
    def seen(cls, pci: Any, machine: Machine) -> Placement | None:
        """What QEMU's `query-pci` answers comes to; None while the firmware is not through with it."""
        found = {str(device["qdev_id"]): (int(device["bus"]), device["regions"]) for device in _devices(pci)}
        if not all(function.name in found for function in machine.functions):
            return None
        bars = {}
        for iommu in machine.iommus:
            for region in found[iommu.name][1]:
                if region["bar"] == 0 and region["address"] not in NOT_PLACED:
                    bars[iommu.name] = int(region["address"])
        if len(bars) < len(machine.iommus):
            return None
        return cls(bars, {function.name: found[function.name][0] for function in machine.functions})

    def difference(self, other: Placement) -> str:
        """The first thing that stands elsewhere than in `other`, as a sentence; "" if nothing does."""
        for name, bar in self.bars.items():
            if other.bars.get(name) != bar:
                return f"the registers of {name} stand at {bar:#x}, not at {other.bars.get(name, 0):#x}"
        for name, bus in self.buses.items():
            if other.buses.get(name) != bus:
                return f"{name} stands on bus {bus:#04x}, not on {other.buses.get(name, 0):#04x}"
        return ""


def _devices(pci: Any) -> Iterator[Any]:
    """Devices of all buses, those behind bridges as well."""
    for bus in pci:
        yield from _of_bus(bus["devices"])


def _of_bus(devices: Any) -> Iterator[Any]:
    for device in devices:
        yield device
        yield from _of_bus(device.get("pci_bridge", {}).get("devices", ()))


class PlacementMemory:
    """One small file a configuration. What cannot be read counts as not known: it is learnt again."""

    def __init__(self, cache: Path, machine: Machine, qemu_version: str) -> None:
        # all that moves a BAR or a bus: the firmware (which comes with QEMU), the board, its memory, what else is there
        functions = [(f.name, f.model, f.slot, f.port) for f in machine.functions]
        ports = [(port.name, port.slot) for port in machine.ports]
        key = [qemu_version, machine.type, machine.memory, functions, ports]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self._path = cache / "placements" / f"{machine.name}-{digest}"
        self._machine = machine

    def recall(self) -> Placement | None:
        """What was learnt before, None if nothing was."""
        try:
            kept = json.loads(self._path.read_text())
            bars = {iommu.name: int(kept["bars"][iommu.name]) for iommu in self._machine.iommus}
            buses = {each.name: int(kept["buses"][each.name]) for each in self._machine.functions}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not all(0 < bar < 1 << 32 for bar in bars.values()) or not all(0 <= bus < 256 for bus in buses.values()):
            return None
        return Placement(bars, buses)

    def learn(self, placement: Placement) -> None:
        """Remember; written whole or not at all, as another run may read it at any time."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        new.write_text(json.dumps(asdict(placement)) + "\n")
        new.replace(self._path)

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)
