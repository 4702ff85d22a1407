"""A device's DMA by another thread: where the memory of another process may keep it waiting."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from backend.core import Core, Fault, Reason

from .port import DevicePort

if TYPE_CHECKING:
    from .device import Device

T = TypeVar("T")


class Run(Protocol):
    """Has another thread call something."""

    def __call__(self, call: Callable[[], T], /) -> Awaitable[T]:
        """What it returned."""


class _Nobody:
    """Of the engine what a port in another thread may touch: it asks no router, and tells nobody of a fault."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def find_route(self, rid: int, pasid: int | None) -> bool:
        return False

    def report(self, fault: Fault) -> Fault:
        return fault

    def renumber(self, fault: Fault) -> Fault:
        return fault


async def aside(device: Device, run: Run, request: Callable[[DevicePort], T | Fault]) -> T | Fault:
    """The answer to one request of the device, made of a port like its own in another thread. The engine's part of it
    is done here, in the engine's thread."""
    engine, port = device.engine, DevicePort(_Nobody(device.engine.core), device.rid)
    port.enabled = device.port.enabled
    answer = await run(lambda: request(port))
    if not isinstance(answer, Fault) or answer.reason is Reason.BUS_MASTER_OFF:
        return answer
    if answer.reason is Reason.NO_ROUTE and not answer.done and engine.find_route(device.rid, answer.pasid):
        answer = await run(lambda: request(port))
    return engine.report(answer) if isinstance(answer, Fault) else answer
