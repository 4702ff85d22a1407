"""An engine without a VM: software endpoints that do the DMA their clients ask for, and the control socket."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.ioasid import BEHIND_X86, Engine
from backend.ioasid.page_timer import PageTimer

from .control import Control

FIRST_RID = 0x0100
"""01:00.0, the first device behind a root port; the next ones are 01:01.0 and so on."""

MAX_ENDPOINTS = 1024
"""More than any VMM's test attaches, and few enough to list at once."""


class EngineAlone:
    """`endpoints` software endpoints, called sw0, sw1 ..., behind a control socket at `path`."""

    def __init__(self, path: Path, endpoints: int = 4) -> None:
        if not 0 < endpoints <= MAX_ENDPOINTS:
            raise ValueError(f"{endpoints} endpoints: give 1 to {MAX_ENDPOINTS}")
        self.engine = Engine()
        self._timer = PageTimer(self.engine)
        self.endpoints = {FIRST_RID + 8 * index: f"sw{index}" for index in range(endpoints)}
        for rid, name in self.endpoints.items():
            self.engine.add_device(rid, name, BEHIND_X86)
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
