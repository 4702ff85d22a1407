"""A device's DMA port: the only way of an endpoint, or of an IOMMU function itself, to guest memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from backend.core import (
    RW,
    TRANSLATED,
    Access,
    AddressType,
    AtsReply,
    Fault,
    Reason,
    RouteCounters,
    UnknownIdError,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from backend.core import Core

T = TypeVar("T")

MISSES = frozenset({Reason.NOT_PRESENT, Reason.PERMISSION, Reason.ACCESS_FLAG, Reason.DIRTY})
"""Why translation requests find no page: the answer that they are for."""


def _always() -> bool:
    return True


class Router(Protocol):
    """What a port asks of the engine."""

    @property
    def core(self) -> Core:
        """Which moves the bytes."""

    def find_route(self, rid: int, pasid: int | None) -> bool:
        """Is there a route now, where there was none?"""

    def report(self, fault: Fault) -> Fault:
        """Tell whom it concerns."""

    def renumber(self, fault: Fault) -> Fault:
        """Number its IOASID and its PASID as its context does."""


class DevicePort:
    """DMA in the device's addresses. Every method is one call into the core for the whole transfer.

    A refused access is an answer (`Fault`), never an exception. `enabled` says whether the function may master the
    bus; while it says no, nothing moves, and as the request never leaves the device no fault listener hears of it.

    A request whose (RID, PASID) has no route asks the engine's router once and is tried once more. What still faults
    is told to the engine's fault listeners, once. IOASIDs in faults are numbers of the device's context, 0 where
    there was no route.
    """

    def __init__(self, engine: Router, rid: int) -> None:
        self._engine = engine
        self._core = engine.core
        self.rid = rid
        self.enabled: Callable[[], bool] = _always

    def read(self, iova: int, length: int, pasid: int | None = None) -> bytes | Fault:
        """`length` bytes from iova onward."""
        if not self.enabled():
            return self._off(iova, Access.READ, pasid)
        answer = self._core.dma_read(self.rid, iova, length, pasid=pasid)
        if isinstance(answer, Fault):
            return self._faulted(answer, partial(self._core.dma_read, self.rid, iova, length, pasid=pasid))
        return answer

    def read_into(self, iova: int, buffer: WriteableBuffer, pasid: int | None = None) -> Fault | None:
        """Fill a writable buffer from iova onward. None: all of it moved."""
        if not self.enabled():
            return self._off(iova, Access.READ, pasid)
        answer = self._core.dma_read_into(self.rid, iova, buffer, pasid=pasid)
        if answer is not None:
            return self._faulted(answer, partial(self._core.dma_read_into, self.rid, iova, buffer, pasid=pasid))
        return None

    def write(self, iova: int, data: ReadableBuffer, pasid: int | None = None) -> Fault | None:
        """Put the data at iova onward. None: all of it moved."""
        if not self.enabled():
            return self._off(iova, Access.WRITE, pasid)
        answer = self._core.dma_write(self.rid, iova, data, pasid=pasid)
        if answer is not None:
            return self._faulted(answer, partial(self._core.dma_write, self.rid, iova, data, pasid=pasid))
        return None

    def scatter(
        self,
        sg: Sequence[tuple[int, int]],
        buffer: ReadableBuffer | WriteableBuffer,
        *,
        write: bool,
        pasid: int | None = None,
    ) -> Fault | None:
        """Move a buffer to (`write`) or from a list of (IOVA, bytes), whose lengths sum to the buffer's."""
        if not self.enabled():
            return self._off(sg[0][0] if sg else 0, Access.WRITE if write else Access.READ, pasid)
        answer = self._core.dma_scatter(self.rid, sg, buffer, write=write, pasid=pasid)
        if answer is not None:
            return self._faulted(
                answer, partial(self._core.dma_scatter, self.rid, sg, buffer, write=write, pasid=pasid)
            )
        return None

    def store(self, iova: int, value: int, width: int, pasid: int | None = None) -> Fault | None:
        """One aligned release store of 1, 2, 4 or 8 bytes: what was written before it is seen before it."""
        if not self.enabled():
            return self._off(iova, Access.WRITE, pasid)
        answer = self._core.store(self.rid, iova, value, width, pasid=pasid)
        if answer is not None:
            return self._faulted(answer, partial(self._core.store, self.rid, iova, value, width, pasid=pasid))
        return None

    def load(self, iova: int, width: int, pasid: int | None = None) -> int | Fault:
        """One aligned acquire load of 1, 2, 4 or 8 bytes."""
        if not self.enabled():
            return self._off(iova, Access.READ, pasid)
        answer = self._core.load(self.rid, iova, width, pasid=pasid)
        if isinstance(answer, Fault):
            return self._faulted(answer, partial(self._core.load, self.rid, iova, width, pasid=pasid))
        return answer

    def fill(self, iova: int, length: int, pattern: int = 0, width: int = 1, pasid: int | None = None) -> Fault | None:
        """Put a pattern of 1, 2, 4 or 8 bytes over and over from iova onward, the last one cut. None: all of it."""
        if not self.enabled():
            return self._off(iova, Access.WRITE, pasid)
        answer = self._core.dma_fill(self.rid, iova, length, pattern, width, pasid=pasid)
        if answer is not None:
            return self._faulted(
                answer, partial(self._core.dma_fill, self.rid, iova, length, pattern, width, pasid=pasid)
            )
        return None

    def copy(
        self, source: int, target: int, length: int, pasid: int | None = None, *, target_pasid: int | None = None
    ) -> Fault | None:
        """Copy within guest memory: read with `pasid`, write with `target_pasid` (None: without one, each).

        Where the target's addresses begin within the source's, from the end down, as memmove would.
        """
        if not self.enabled():
            return self._off(source, Access.READ, pasid)
        answer = self._copy(source, target, length, pasid, target_pasid)
        moved, asked = 0, set[int | None]()
        while answer is not None and answer.reason == Reason.NO_ROUTE and answer.pasid not in asked:
            asked.add(answer.pasid)  # of two PASIDs, each may have to be routed
            if not self._engine.find_route(self.rid, answer.pasid):
                break
            # What is done may have overwritten its own source: go on, not over.
            if not source < target < source + length:
                source, target = source + answer.done, target + answer.done
            moved, length = moved + answer.done, length - answer.done
            answer = self._copy(source, target, length, pasid, target_pasid)
        return self._engine.report(replace(answer, done=moved + answer.done)) if answer is not None else None

    def _copy(self, source: int, target: int, length: int, pasid: int | None, target_pasid: int | None) -> Fault | None:
        writer = (self.rid, target_pasid)
        return self._core.dma_copy(self.rid, source, target, length, pasid=pasid, writer=writer)

    def fetch_add(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        """AtomicOp FetchAdd of 4 or 8 bytes; the value before."""
        return self._atomic(iova, partial(self._core.fetch_add, self.rid, iova, value, width, pasid=pasid), pasid)

    def swap(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        """AtomicOp Swap of 4 or 8 bytes; the value before."""
        return self._atomic(iova, partial(self._core.swap, self.rid, iova, value, width, pasid=pasid), pasid)

    def compare_exchange(
        self, iova: int, compare: int, value: int, width: int, pasid: int | None = None
    ) -> int | Fault:
        """AtomicOp CAS of 4, 8 or 16 bytes; the value before, and `value` is there now if that is `compare`."""
        operation = partial(self._core.compare_exchange, self.rid, iova, compare, value, width, pasid=pasid)
        return self._atomic(iova, operation, pasid)

    def _atomic(self, iova: int, operation: Callable[[], int | Fault], pasid: int | None) -> int | Fault:
        if not self.enabled():
            return self._off(iova, RW, pasid)
        answer = operation()
        return self._faulted(answer, operation) if isinstance(answer, Fault) else answer

    def translate(self, iova: int, length: int, access: Access, pasid: int | None = None) -> AtsReply:
        """A translation request (ATS) for the pages of [iova, iova + length): what the device may keep of them until it
        is told to forget it.

        Pages are there if they permit anything of `access`; a request for writes sets dirty bits as a write would.
        Where they end before the range does, the reply's fault says why. That there is no page, or no access to it, is
        told to nobody else. A reply without a fault may end early, too, after 65,536 pages: ask again from there on.
        """
        if not self.enabled():
            return AtsReply((), self._off(iova, access, pasid, AddressType.TRANSLATION_REQUEST))
        if not length:
            return AtsReply((), None)
        reply = self._core.ats(self.rid, iova, length, access, pasid=pasid)
        fault = reply.fault
        if fault is not None and fault.reason == Reason.NO_ROUTE and self._engine.find_route(self.rid, pasid):
            reply = self._core.ats(self.rid, iova, length, access, pasid=pasid)
            fault = reply.fault
        if fault is None:
            return reply
        missed = fault.reason in MISSES or (fault.reason == Reason.ADDRESS_WIDTH and fault.stage)
        return AtsReply(reply.translations, self._engine.renumber(fault) if missed else self._engine.report(fault))

    def missing(self, iova: int, length: int, access: Access, most: int, pasid: int | None = None) -> list[int]:
        """Pages of [iova, iova + length), `most` at the most, that translation requests do not find, or not for all of
        `access`. None: also where translation requests are not served, or no request may be sent."""
        if not length or not self.enabled():
            return []
        ask = partial(self._core.ats_missing, self.rid, iova, length, access, most, pasid=pasid)
        answer = ask()
        if isinstance(answer, Fault):
            answer = self._faulted(answer, ask)
        return [] if isinstance(answer, Fault) else answer

    @cached_property
    def translated(self) -> DevicePort:
        """The same for requests whose addresses `translate` gave, while the device is attached with ATS; else they are
        refused. They carry no PASID: what is given for one does not count."""
        return _TranslatedPort(self._engine, self)

    @property
    def counters(self) -> RouteCounters:
        """Requests, bytes and faults of the RID, over all that it was ever attached to."""
        return self._counted(None)

    def _counted(self, pasid: int | None) -> RouteCounters:
        try:
            return self._core.route_counters(self.rid, pasid)
        except UnknownIdError:
            return RouteCounters(*(0 for _ in fields(RouteCounters)))  # never attached: nothing moved

    def _faulted(self, fault: Fault, again: Callable[[], T | Fault]) -> T | Fault:
        """Ask for a route once where there was none, try once more, and report what is left."""
        if fault.reason == Reason.NO_ROUTE and self._engine.find_route(self.rid, fault.pasid):
            answer = again()
            if not isinstance(answer, Fault):
                return answer
            fault = answer
        return self._engine.report(fault)

    def _off(self, iova: int, access: Access, pasid: int | None, kind: AddressType = AddressType.UNTRANSLATED) -> Fault:
        return Fault(
            rid=self.rid,
            pasid=pasid,
            ioasid=0,
            iova=iova,
            access=access,
            stage=0,
            level=0,
            gpa=None,
            entry=0,
            reason=Reason.BUS_MASTER_OFF,
            done=0,
            type=kind,
        )


class _TranslatedPort(DevicePort):
    """Requests of the device that carry translated addresses, and no PASID."""

    def __init__(self, engine: Router, port: DevicePort) -> None:
        super().__init__(engine, port.rid)
        self._port = port
        self.enabled = self._port_enabled

    def _port_enabled(self) -> bool:
        return self._port.enabled()

    def read(self, iova: int, length: int, pasid: int | None = None) -> bytes | Fault:
        return super().read(iova, length, TRANSLATED)

    def read_into(self, iova: int, buffer: WriteableBuffer, pasid: int | None = None) -> Fault | None:
        return super().read_into(iova, buffer, TRANSLATED)

    def write(self, iova: int, data: ReadableBuffer, pasid: int | None = None) -> Fault | None:
        return super().write(iova, data, TRANSLATED)

    def scatter(
        self,
        sg: Sequence[tuple[int, int]],
        buffer: ReadableBuffer | WriteableBuffer,
        *,
        write: bool,
        pasid: int | None = None,
    ) -> Fault | None:
        return super().scatter(sg, buffer, write=write, pasid=TRANSLATED)

    def store(self, iova: int, value: int, width: int, pasid: int | None = None) -> Fault | None:
        return super().store(iova, value, width, TRANSLATED)

    def load(self, iova: int, width: int, pasid: int | None = None) -> int | Fault:
        return super().load(iova, width, TRANSLATED)

    def fill(self, iova: int, length: int, pattern: int = 0, width: int = 1, pasid: int | None = None) -> Fault | None:
        return super().fill(iova, length, pattern, width, TRANSLATED)

    def copy(
        self, source: int, target: int, length: int, pasid: int | None = None, *, target_pasid: int | None = None
    ) -> Fault | None:
        return super().copy(source, target, length, TRANSLATED, target_pasid=TRANSLATED)

    def fetch_add(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        return super().fetch_add(iova, value, width, TRANSLATED)

    def swap(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        return super().swap(iova, value, width, TRANSLATED)

    def compare_exchange(
        self, iova: int, compare: int, value: int, width: int, pasid: int | None = None
    ) -> int | Fault:
        return super().compare_exchange(iova, compare, value, width, TRANSLATED)

    @property
    def counters(self) -> RouteCounters:
        """Of these requests alone."""
        return self._counted(TRANSLATED)

    def _off(self, iova: int, access: Access, pasid: int | None, kind: AddressType = AddressType.UNTRANSLATED) -> Fault:
        return super()._off(iova, access, None, AddressType.TRANSLATED)
