"""Where the firmware puts the IOMMU's BAR: learnt once for each configuration, remembered in the cache folder.

The IVRS must name that address before QEMU starts; the firmware gives the same one on every boot of one configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from backend.vm.machine import Machine


class BarMemory:
    """One small file a configuration. What cannot be read counts as not known: it is learnt again."""

    def __init__(self, cache: Path, machine: Machine, qemu_version: str) -> None:
        # all that moves a BAR: the firmware (which comes with QEMU), the board, its memory, and what else has BARs
        key = [qemu_version, machine.type, machine.memory, [(f.model, f.slot) for f in machine.functions]]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self._path = cache / "bars" / f"{machine.name}-{digest}"

    def recall(self) -> int | None:
        """The address learnt before, None if there is none."""
        try:
            address = int(self._path.read_text(), 16)
        except (OSError, ValueError):
            return None
        return address if 0 < address < 1 << 32 else None

    def learn(self, address: int) -> None:
        """Remember an address; written whole or not at all, as another run may read it at any time."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        new.write_text(f"{address:#x}\n")
        new.replace(self._path)

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)
