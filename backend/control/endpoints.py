"""Software endpoints: devices without a function of their own, which do the DMA that a client asks for."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

from backend.core import Fault
from backend.ioasid import PAGE_SIZE, Device, DevicePort, IoasidError, PageResponse
from backend.ioasid.aside import Run, aside
from backend.ioasid.limits import MAX_GROUP
from protocol import InTurn

from .contexts import Contexts
from .parameters import Params
from .session import Session
from .wire import plain

MAX_MOVE = 1 << 20
"""Bytes that one dma_read or dma_write moves: a message holds no more."""

MAX_BULK = 16 << 20
"""Bytes that one dma_fill or dma_copy moves: a few milliseconds, in which nobody else is served."""

WIDE = 16
"""Bytes that are no number of MessagePack, whose numbers have 64 bits."""

WIDTHS = {
    "store": (1, 2, 4, 8),
    "load": (1, 2, 4, 8),
    "fetch_add": (4, 8),
    "swap": (4, 8),
    "compare_exchange": (4, 8, WIDE),
}
"""Bytes that each may have; the last three are PCI Express AtomicOps."""

Answer = dict[str, Any]
T = TypeVar("T")


class Endpoints:
    """The methods `endpoint.*`. What a DMA met is in its answer: a fault is none of the request's own errors."""

    def __init__(self, contexts: Contexts, rids: Collection[int], run: Run) -> None:
        """`run`: has another thread do the DMA that may wait for the memory of another process."""
        self._contexts = contexts
        self._engine = contexts.engine
        self._rids = frozenset(rids)
        self._run = run

    def methods(self) -> Mapping[str, Callable[[Session, Params], Any]]:
        """By name."""
        return {
            "endpoint.list": self.list,
            "endpoint.hold": self.hold,
            "endpoint.release": self.release,
            "endpoint.pasid": self.pasid,
            "endpoint.dma_read": self.dma_read,
            "endpoint.dma_write": self.dma_write,
            "endpoint.dma_fill": self.dma_fill,
            "endpoint.dma_copy": self.dma_copy,
            "endpoint.store": self.store,
            "endpoint.load": self.load,
            "endpoint.fetch_add": self.fetch_add,
            "endpoint.swap": self.swap,
            "endpoint.compare_exchange": self.compare_exchange,
            "endpoint.page_request": self.page_request,
        }

    def list(self, session: Session, params: Params) -> list[Answer]:
        """Every software endpoint: its RID, name, group, context, cookie and how many connections hold it."""
        params.end()
        return [self._described(self._engine.devices[rid], session) for rid in sorted(self._rids)]

    def hold(self, session: Session, params: Params) -> None:
        """Keep what endpoint `rid` is bound to alive when the connection that bound it goes; allows DMA with it."""
        device = self._device(params)
        params.end()
        self._contexts.hold(session, device.rid)

    def release(self, session: Session, params: Params) -> None:
        """Give the hold of `rid` up."""
        device = self._device(params)
        params.end()
        self._contexts.release(session, device.rid)

    def pasid(self, session: Session, params: Params) -> dict[str, int | None]:
        """What is behind `pasid` of the guest: `physical`, which requests of `rid` carry for it (its driver is told,
        the guest never is), and `enqcmd`, which the CPU submits work under for it (`kvm.map_pasid`); nil: none."""
        device = self._device(params)
        vpasid = params.number("pasid", 1 << 20)
        params.end()
        self._refuse_others(session, params, device)
        if device.context is None:
            return {"physical": None, "enqcmd": None}
        submitted = self._engine.kvm.translate(device.context.vm, vpasid)
        return {"physical": device.physical(vpasid), "enqcmd": submitted}

    def dma_read(self, session: Session, params: Params) -> Answer | InTurn:
        """Read `length` bytes, 1 MiB at most: `data`."""
        device, iova, pasid = self._request(session, params)
        length = params.number("length", MAX_MOVE + 1)
        params.end()
        return self._ask(device, lambda port: port.read(iova, length, pasid), partial(_read, "data"), pasid)

    def dma_write(self, session: Session, params: Params) -> Answer | InTurn:
        """Write `data`, 1 MiB at most."""
        device, iova, pasid = self._request(session, params)
        data = params.data("data", MAX_MOVE)
        params.end()
        return self._ask(device, lambda port: port.write(iova, data, pasid), _done, pasid)

    def dma_fill(self, session: Session, params: Params) -> Answer | InTurn:
        """Write [`pattern`] of [`width`] bytes over and over, `length` bytes, 16 MiB at most."""
        device, iova, pasid = self._request(session, params)
        length = params.number("length", MAX_BULK + 1)
        width = params.one_of("width", (1, 2, 4, 8), 1)
        pattern = params.number("pattern", 1 << 8 * width, 0)
        params.end()
        return self._ask(device, lambda port: port.fill(iova, length, pattern, width, pasid), _done, pasid)

    def dma_copy(self, session: Session, params: Params) -> Answer | InTurn:
        """Copy `length` bytes, 16 MiB at most, to `target`, which [`target_pasid`] may have another PASID for."""
        device, iova, pasid = self._request(session, params)
        target = _address(device, params, "target")
        length = params.number("length", MAX_BULK + 1)
        target_pasid = _physical(device, params.optional("target_pasid", 1 << 20))
        params.end()
        return self._ask(
            device,
            lambda port: port.copy(iova, target, length, pasid, target_pasid=target_pasid),
            _done,
            pasid,
            target_pasid,
        )

    def store(self, session: Session, params: Params) -> Answer | InTurn:
        """One aligned store of `value`, `width` (1, 2, 4, 8) bytes."""
        device, iova, pasid = self._request(session, params)
        width = params.one_of("width", WIDTHS["store"])
        value = params.number("value", 1 << 8 * width)
        params.end()
        return self._ask(device, lambda port: port.store(iova, value, width, pasid), _done, pasid)

    def load(self, session: Session, params: Params) -> Answer | InTurn:
        """One aligned load of `width` (1, 2, 4, 8) bytes: `value`."""
        device, iova, pasid = self._request(session, params)
        width = params.one_of("width", WIDTHS["load"])
        params.end()
        return self._ask(device, lambda port: port.load(iova, width, pasid), partial(_read, "value"), pasid)

    def fetch_add(self, session: Session, params: Params) -> Answer:
        """AtomicOp FetchAdd of `value`, `width` (4, 8) bytes: `value` is what was there before."""
        device, iova, pasid = self._request(session, params)
        width = params.one_of("width", WIDTHS["fetch_add"])
        value = params.number("value", 1 << 8 * width)
        params.end()
        return _read("value", device.port.fetch_add(iova, value, width, pasid))

    def swap(self, session: Session, params: Params) -> Answer:
        """AtomicOp Swap for `value`, likewise."""
        device, iova, pasid = self._request(session, params)
        width = params.one_of("width", WIDTHS["swap"])
        value = params.number("value", 1 << 8 * width)
        params.end()
        return _read("value", device.port.swap(iova, value, width, pasid))

    def compare_exchange(self, session: Session, params: Params) -> Answer:
        """AtomicOp CAS of `compare` for `value`, likewise; of 16 bytes as well, which are data here and in the answer,
        as they lie in memory."""
        device, iova, pasid = self._request(session, params)
        width = params.one_of("width", WIDTHS["compare_exchange"])
        compare, value = (_operand(params, name, width) for name in ("compare", "value"))
        params.end()
        before = device.port.compare_exchange(iova, compare, value, width, pasid)
        if width == WIDE and not isinstance(before, Fault):
            return _read("value", before.to_bytes(WIDE, "little"))
        return _read("value", before)

    async def page_request(self, session: Session, params: Params) -> Answer:
        """Ask for `access` to the page at `iova` (PRI) as one of page request group `group`, and if it is the
        [`last`] one of it (it is, if nothing is said), wait for the answer: `code` is success, invalid or failure; nil
        where others of the group are to come."""
        device, iova, pasid = self._request(session, params)
        access = params.access("access")
        group = params.number("group", MAX_GROUP + 1)
        last = params.flag("last", default=True)
        params.end()
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def answer(response: PageResponse) -> None:
            if not answered.done():
                answered.set_result(str(response.code))

        device.page_request(pasid, iova - iova % PAGE_SIZE, access, group=group, last=last, answer=answer)
        if not last and not answered.done():
            return {"code": None}
        return {"code": await answered}

    def _ask(
        self,
        device: Device,
        request: Callable[[DevicePort], T | Fault],
        tell: Callable[[T | Fault], Answer],
        *pasids: int | None,
    ) -> Answer | InTurn:
        """The answer to a request of the device with these PASIDs. AtomicOps are none of its: they never wait."""
        if not any(device.foreign(pasid) for pasid in pasids):
            return tell(request(device.port))

        async def answer() -> Answer:
            return tell(await aside(device, self._run, request))

        return InTurn(answer())

    def _device(self, params: Params) -> Device:
        rid = params.number("rid", 1 << 16)
        if rid not in self._rids:
            there = ", ".join(f"{each:#06x}" for each in sorted(self._rids)[:8]) or "none: this is a VM's run"
            raise IoasidError(
                errno.ENODEV, f"{params.method}: no software endpoint has RID {rid:#06x} (there are {there})"
            )
        return self._engine.devices[rid]

    def _request(self, session: Session, params: Params) -> tuple[Device, int, int | None]:
        device = self._device(params)
        self._refuse_others(session, params, device)
        return device, _address(device, params, "iova"), _physical(device, params.optional("pasid", 1 << 20))

    def _refuse_others(self, session: Session, params: Params, device: Device) -> None:
        if device.context is not None and device.context is not session.own and device.rid not in session.held:
            raise IoasidError(
                errno.EPERM,
                f"{params.method}: {device} is bound to another connection's context: endpoint.hold it first",
            )

    def _described(self, device: Device, session: Session) -> Answer:
        context = device.context
        return {
            "rid": device.rid,
            "name": device.name,
            "group": device.group.name,
            "context": None if context is None else self._contexts.number(context),
            "own": context is not None and context is session.own,
            "cookie": device.cookie,
            "held": self._contexts.holders(device),
        }


def _operand(params: Params, name: str, width: int) -> int:
    if width != WIDE:
        return params.number(name, 1 << 8 * width)
    data = params.data(name, WIDE)
    if len(data) != WIDE:
        raise params.refuse(f"{name} has {len(data)} bytes, where width says {WIDE}")
    return int.from_bytes(data, "little")


def _address(device: Device, params: Params, name: str) -> int:
    """Where a request begins: no further than the device can count."""
    address, width = params.number(name, 1 << 64), device.traits.address_width
    if address >> width:
        raise params.refuse(f"{name} {address:#x} is wider than the {width} bits that {device} can send")
    return address


def _physical(device: Device, pasid: int | None) -> int | None:
    """The PASID that the device's requests carry, for one that its user knows."""
    if pasid is None:
        return None
    found = device.physical(pasid)
    return pasid if found is None else found


def _done(fault: Fault | None) -> Answer:
    return {"fault": plain(fault)}


def _read(name: str, answer: bytes | int | Fault) -> Answer:
    return {name: None, "fault": plain(answer)} if isinstance(answer, Fault) else {name: answer, "fault": None}
