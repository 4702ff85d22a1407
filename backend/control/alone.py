"""An engine without a VM: software endpoints that do the DMA their clients ask for, and the control socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.core import Core
from backend.ioasid import BEHIND_X86, Engine, Traits
from backend.ioasid.page_timer import PageTimer

from .control import Control

FIRST_RID = 0x0100
"""01:00.0, the first device behind a root port; the next ones are 01:01.0 and so on."""

MAX_ENDPOINTS = 1024
"""More than any VMM's test attaches, and few enough to list at once."""


@dataclass(frozen=True, slots=True)
class SoftwareEndpoint:
    """A device to be: see Engine.add_device."""

    rid: int
    name: str
    traits: Traits = BEHIND_X86
    group: str | None = None


def usual_endpoints(count: int) -> list[SoftwareEndpoint]:
    """Whole functions behind an x86 IOMMU, called sw0, sw1 ..."""
    return [SoftwareEndpoint(FIRST_RID + 8 * index, f"sw{index}") for index in range(count)]


class EngineAlone:
    """Software endpoints behind a control socket at `path`."""

    def __init__(self, path: Path, endpoints: Sequence[SoftwareEndpoint], core: Core | None = None) -> None:
        """`core`: of the engine, None: as usual. IoasidError, as of Engine.add_device: they cannot be together."""
        assert 0 < len(endpoints) <= MAX_ENDPOINTS
        self.engine = Engine(core)
        self._timer = PageTimer(self.engine)
        self.endpoints = {each.rid: each.name for each in endpoints}
        for each in endpoints:
            self.engine.add_device(each.rid, each.name, each.traits, group=each.group)
        self.control = Control(self.engine, path, facts=self._facts, endpoints=self.endpoints.keys())

    def _facts(self) -> Mapping[str, Any]:
        return {"kind": "engine", "endpoints": len(self.endpoints), "connections": len(self.control.connections)}

    async def start(self) -> None:
        """Listen. Raises protocol.SocketRefused."""
        await self.control.start()
        self._timer.start()

    async def close(self) -> None:
        """End every connection, and the engine."""
        await self.control.close()
        self._timer.close()
        self.engine.close()
