"""A FunctionServer on a loop in a thread of its own, so that tests can be plain blocking clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from backend.pci import (
    Bar,
    DmaRegion,
    FunctionServer,
    Msi,
    Msix,
    PciExpress,
    PciFunction,
    PciIds,
    Register,
    RegisterTable,
    ResetKind,
)

T = TypeVar("T")

IDS = PciIds(
    vendor=0x1234, device=0x11E8, subsystem_vendor=0x1AF4, subsystem=0x1100, revision=0x10, class_code=0x00FF00
)
IDENTITY, LIVENESS, STATUS, WIDE, SCRATCH = 0x00, 0x04, 0x08, 0x10, 0x100


class EduFunction(PciFunction):
    """A small function to serve: an identity, a register that inverts, one that clears, interrupts, odd behaviour."""

    def __init__(self, name: str = "edu") -> None:
        registers = [
            Register("IDENTITY", IDENTITY, 4, 0x010000ED, ro=0xFFFF_FFFF),
            Register("LIVENESS", LIVENESS, 4, rw=0xFFFF_FFFF),
            Register("STATUS", STATUS, 4, ro=0x80, w1c=0xF),
            Register("WIDE", WIDE, 8, rw=0xFFFF_FFFF_FFFF_F000),
            *(Register(f"SCRATCH{n}", SCRATCH + 4 * n, 4, rw=0xFFFF_FFFF) for n in range(64)),
        ]
        self.table = RegisterTable(registers)
        super().__init__(
            name=name,
            ids=IDS,
            bars={0: Bar(0x4000, self.table), 2: Bar(0x20, is_io=True)},
            capabilities=[Msi(vectors=4), Msix(4, table_bar=0, table_offset=0x2000, pba_offset=0x3000), PciExpress()],
        )
        self.table.on_write("LIVENESS", lambda new, _: self.table.__setitem__("LIVENESS", ~new & 0xFFFF_FFFF))
        self.resets: list[ResetKind] = []
        self.drains = 0
        self.writes_a_drain: list[int] = []
        self.raised: Exception | None = None
        self._writes = 0

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        if self.raised is not None:
            raise self.raised
        return super().bar_read(bar, offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        if self.raised is not None:
            raise self.raised
        self._writes += 1
        super().bar_write(bar, offset, size, value)

    def reset(self, kind: ResetKind) -> None:
        super().reset(kind)
        self.resets.append(kind)

    def drained(self) -> None:
        self.drains += 1
        if self._writes:
            self.writes_a_drain.append(self._writes)
            self._writes = 0


class Serving:
    """Functions served by one loop, as a backend serves them; `regions` is the memory mapped now, by function."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.loop = asyncio.new_event_loop()
        self.servers: list[FunctionServer] = []
        self.regions: dict[str, list[DmaRegion]] = {}
        self.map_error: Exception | None = None
        self.disconnects = 0
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self.servers:
            self.run(server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def call(self, work: Callable[[], T]) -> T:
        """Run a function on the loop and wait for it; the loop has then done all that came before."""

        async def calling() -> T:
            return work()

        return self.run(calling())

    def serve(self, function: PciFunction, path: Path) -> FunctionServer:
        regions = self.regions.setdefault(function.name, [])

        def mapped(region: DmaRegion) -> None:
            if self.map_error is not None:
                raise self.map_error
            regions.append(region)

        server = FunctionServer(function, path, on_dma_map=mapped, on_dma_unmap=regions.remove, library=self.library)
        server.on_disconnect = self._count
        self.run(server.start())
        self.servers.append(server)
        return server

    def _count(self) -> None:
        self.disconnects += 1

    def wait_for(self, condition: Callable[[], bool], what: str, *, seconds: float = 5.0) -> None:
        """Wait until the loop has brought something about."""

        async def waiting() -> None:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.002)

        try:
            self.run(waiting())
        except TimeoutError:
            raise AssertionError(f"did not come about within {seconds} s: {what}") from None
