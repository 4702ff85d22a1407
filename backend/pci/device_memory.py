"""Guest memory as a function reaches it: by translations of its own where the guest has enabled them, else by none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from backend.core import RW, Access, AddressType, BadValueError, Fault, Reason, RouteCounters
from backend.pci.ats_control import AtsControl
from backend.pci.device_tlb import PAGE, DeviceTlb, Segments
from backend.pci.pasid_control import PasidControl

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from backend.pci.dma import DmaPort, FunctionPort

CHUNK = 2 << 20
"""Bytes translated and moved in one piece: at the most 512 translations are under way, far fewer than the TLB holds."""
ATTEMPTS = 8
"""To translate a piece while what was translated of it is invalidated; only what is asked in the course of it, such as
a route, can do that."""
END = 1 << 64

T = TypeVar("T")
Part = tuple[int, int]
"""(IOVA, bytes)"""
Place = tuple[int, int | None]
"""(IOVA, PASID)"""


class DeviceMemory:
    """A DmaPort over the function's own port.

    While the guest has enabled ATS, each IOVA is translated by the device TLB, what it does not know by translation
    requests, one for all that is missing of a piece, and what moves are translated requests. A fault tells IOVAs and
    bytes as for untranslated requests; where translations are missing, no fault listener hears of it. While ATS is off,
    requests are untranslated; so are those of a PASID for which the IOMMU does not support translation requests,
    until something of it is invalidated.

    Requests carry a PASID only where the guest has enabled that: else they fault with PASID_OFF, which nobody else
    hears of.
    """

    def __init__(self, rid: Callable[[], int], port: FunctionPort, pasids: PasidControl, ats: AtsControl) -> None:
        self._rid = rid
        self._port = port
        self._pasids = pasids
        self._ats = ats

    @property
    def counters(self) -> RouteCounters:
        """Of the port: requests without a PASID, untranslated ones."""
        return self._port.counters

    # Transfers: as DmaPort's

    def read(self, iova: int, length: int, pasid: int | None = None) -> bytes | Fault:
        """`length` bytes, 1 GiB at the most."""
        if self._tlb(pasid) is None:
            return self._refused(pasid, iova, Access.READ) or self._port.read(iova, length, pasid)
        if not 0 <= length <= 1 << 30:
            raise BadValueError(f"a read of {length} bytes: it must be of 0 to 2^30")
        buffer = bytearray(length)
        return self.read_into(iova, buffer, pasid) or bytes(buffer)

    def read_into(self, iova: int, buffer: WriteableBuffer, pasid: int | None = None) -> Fault | None:
        """Fill the buffer."""
        with memoryview(buffer) as view:
            return self.scatter([(iova, view.nbytes)], view, write=False, pasid=pasid)

    def write(self, iova: int, data: ReadableBuffer, pasid: int | None = None) -> Fault | None:
        """Put the data there."""
        with memoryview(data) as view:
            return self.scatter([(iova, view.nbytes)], view, write=True, pasid=pasid)

    def scatter(
        self,
        sg: Sequence[Part],
        buffer: ReadableBuffer | WriteableBuffer,
        *,
        write: bool,
        pasid: int | None = None,
    ) -> Fault | None:
        """Move a list of (IOVA, bytes), whose lengths sum to the buffer's."""
        access = Access.WRITE if write else Access.READ
        refused = self._refused(pasid, sg[0][0] if sg else 0, access)
        if refused is not None:
            return refused
        tlb = self._tlb(pasid)
        if tlb is None:
            return self._port.scatter(sg, buffer, write=write, pasid=pasid)
        with memoryview(buffer) as whole, whole.cast("B") as view:
            if sum(length for _, length in sg) != len(view):
                raise BadValueError(f"the scatter list and its buffer of {len(view)} bytes differ in length")
            done = 0
            for parts in _pieces(sg):
                segments, reached, missing = self._translate(tlb, pasid, parts, access)
                if missing is not None and missing.reason == Reason.ATS_OFF and not done:
                    return self._port.scatter(sg, buffer, write=write, pasid=pasid)
                if reached:
                    fault = self._port.translated.scatter(segments, view[done : done + reached], write=write)
                    if fault is not None:
                        done += fault.done
                        return _as_asked(fault, _at(sg, done), done, pasid)
                    done += reached
                if missing is not None:
                    return replace(missing, done=done)
        return None

    def fill(self, iova: int, length: int, pattern: int = 0, width: int = 1, pasid: int | None = None) -> Fault | None:
        """A pattern of 1, 2, 4 or 8 bytes, over and over."""
        if self._tlb(pasid) is None:
            return self._refused(pasid, iova, Access.WRITE) or self._port.fill(iova, length, pattern, width, pasid)
        if width not in (1, 2, 4, 8) or pattern < 0 or pattern >> 8 * width:
            raise BadValueError(f"a pattern of {pattern:#x} in {width} bytes: it must fit 1, 2, 4 or 8")
        block = pattern.to_bytes(width, "little") * (min(length, CHUNK) // width + 1)
        for done in range(0, length, CHUNK):
            fault = self.write(iova + done, memoryview(block)[: min(CHUNK, length - done)], pasid)
            if fault is not None:
                return replace(fault, done=done + fault.done)
        return None

    def copy(
        self, source: int, target: int, length: int, pasid: int | None = None, *, target_pasid: int | None = None
    ) -> Fault | None:
        """Within guest memory: read with `pasid`, write with `target_pasid`; ranges that overlap as by memmove."""
        refused = self._refused(pasid, source, Access.READ) or self._refused(target_pasid, target, Access.WRITE)
        if refused is not None:
            return refused
        tlb = self._tlb(pasid, target_pasid)
        if tlb is None:
            return self._port.copy(source, target, length, pasid, target_pasid=target_pasid)
        copy = self._copy_down if source < target < source + length else self._copy_up
        fault = copy(tlb, (source, pasid), (target, target_pasid), length)
        if fault is not None and fault.reason == Reason.ATS_OFF and not fault.done:
            return self._port.copy(source, target, length, pasid, target_pasid=target_pasid)
        return fault

    # Single accesses: as DmaPort's

    def store(self, iova: int, value: int, width: int, pasid: int | None = None) -> Fault | None:
        """One aligned release store of 1, 2, 4 or 8 bytes."""
        return self._single(iova, Access.WRITE, pasid, lambda port, at: port.store(at, value, width, pasid))

    def load(self, iova: int, width: int, pasid: int | None = None) -> int | Fault:
        """One aligned acquire load of 1, 2, 4 or 8 bytes."""
        return self._single(iova, Access.READ, pasid, lambda port, at: port.load(at, width, pasid))

    def fetch_add(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        """AtomicOp FetchAdd of 4 or 8 aligned bytes; the value before."""
        return self._single(iova, RW, pasid, lambda port, at: port.fetch_add(at, value, width, pasid))

    def swap(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        """AtomicOp Swap of 4 or 8 aligned bytes; the value before."""
        return self._single(iova, RW, pasid, lambda port, at: port.swap(at, value, width, pasid))

    def compare_exchange(
        self, iova: int, compare: int, value: int, width: int, pasid: int | None = None
    ) -> int | Fault:
        """AtomicOp CAS of 4, 8 or 16 aligned bytes; the value before."""
        return self._single(iova, RW, pasid, lambda port, at: port.compare_exchange(at, compare, value, width, pasid))

    # Translations

    def missing(self, pasid: int | None, iova: int, length: int, access: Access, most: int) -> list[int]:
        """IOVAs of the pages of [iova, iova + length), `most` at the most, that have no translation for `access` now.

        Empty also where nothing can be known or done about it: without ATS, bus mastering, or the PASID.
        """
        length = min(length, END - iova)
        if self._tlb(pasid) is None or length <= 0 or not self._pasids.may_send(pasid, access):
            return []
        return self._port.missing(iova, length, access, most, pasid)

    def _tlb(self, *pasids: int | None) -> DeviceTlb | None:
        """The device TLB, where it serves all these PASIDs."""
        tlb = self._ats.tlb
        return tlb if tlb is not None and tlb.unsupported.isdisjoint(pasids) else None

    def _translate(
        self, tlb: DeviceTlb, pasid: int | None, parts: Sequence[Part], access: Access
    ) -> tuple[Segments, int, Fault | None]:
        """Where parts lie: segments for translated requests, how many bytes they are, and why they end before the parts
        do. To be used at once: before anything else can be invalidated."""
        segments: Segments = []
        for _ in range(ATTEMPTS):
            changes = tlb.changes
            segments, reached = [], 0
            fault: Fault | None = None
            for iova, length in parts:
                at, fault = self._translate_part(tlb, (iova, pasid), length, access, segments)
                reached += at - iova
                if fault is not None:
                    break
            if tlb.changes == changes:
                return segments, reached, fault
        return [], 0, self._fault(pasid, parts[0][0], access, Reason.ENTRY_CHANGED)

    def _translate_part(
        self, tlb: DeviceTlb, place: Place, length: int, access: Access, segments: Segments
    ) -> tuple[int, Fault | None]:
        """Append where [iova, iova + length) lies; how far that reaches, and why not to the end."""
        iova, pasid = place
        end = iova + length
        if end > END:
            return iova, self._fault(pasid, iova, access, Reason.ADDRESS_WIDTH)
        found, at = tlb.find(pasid, iova, end, int(access))
        segments += found
        while at < end:
            changes = tlb.changes
            reply = self._port.translate(at, end - at, access, pasid)
            if tlb.changes != changes:
                return at, None  # what it answers may be over: all begins anew
            tlb.keep(pasid, reply.translations)
            found, reached = tlb.find(pasid, at, end, int(access))
            segments += found
            fault = reply.fault
            if fault is not None and reached in {at, fault.iova}:
                if fault.reason == Reason.ATS_OFF:
                    tlb.refuse(pasid)
                return reached, fault if fault.iova == reached else replace(fault, iova=reached)
            if reached == at:  # there is a page, for a part of the access
                return at, self._fault(pasid, at, access, Reason.PERMISSION)
            at = reached
        return at, None

    def _copy_up(self, tlb: DeviceTlb, source: Place, target: Place, length: int) -> Fault | None:
        """Piece by piece, by way of a buffer."""
        buffer = memoryview(bytearray(min(length, CHUNK)))
        port = self._port.translated
        done = 0
        while done < length:
            size = min(CHUNK, length - done)
            start, to = source[0] + done, target[0] + done
            reading, writing, size, missing = self._translate_both(tlb, (start, source[1]), (to, target[1]), size)
            fault = port.scatter(reading, buffer[:size], write=False) if size else None
            if fault is not None:
                missing = _as_asked(fault, start + fault.done, 0, source[1])
                writing, size = _first(writing, fault.done), fault.done
            fault = port.scatter(writing, buffer[:size], write=True) if size else None
            if fault is not None:
                missing = _as_asked(fault, to + fault.done, 0, target[1])
                size = fault.done
            done += size
            if missing is not None:
                return replace(missing, done=done)
        return None

    def _translate_both(
        self, tlb: DeviceTlb, source: Place, target: Place, size: int
    ) -> tuple[Segments, Segments, int, Fault | None]:
        """Segments to read and to write, of as many bytes each."""
        for _ in range(ATTEMPTS):
            changes = tlb.changes
            reading, readable, fault = self._translate(tlb, source[1], [(source[0], size)], Access.READ)
            if not readable:
                return [], [], 0, fault
            writing, writable, refused = self._translate(tlb, target[1], [(target[0], readable)], Access.WRITE)
            if tlb.changes == changes:
                return _first(reading, writable), writing, writable, refused or fault
        return [], [], 0, self._fault(source[1], source[0], Access.READ, Reason.ENTRY_CHANGED)

    def _copy_down(self, tlb: DeviceTlb, source: Place, target: Place, length: int) -> Fault | None:
        """From the end, by pages: nothing is overwritten before it was read."""
        left = length
        while left:
            last, to = source[0] + left - 1, target[0] + left - 1
            size = min(left, last % PAGE + 1, to % PAGE + 1)
            reading, writing, found, fault = self._translate_both(tlb, (last, source[1]), (to, target[1]), 1)
            if fault is None:
                assert found == 1
                back = size - 1
                fault = self._port.translated.copy(reading[0][0] - back, writing[0][0] - back, size)
                if fault is not None:
                    iova, pasid = target if fault.access == Access.WRITE else source
                    left -= fault.done
                    fault = _as_asked(fault, iova + left - 1, 0, pasid)
            if fault is not None:
                return replace(fault, done=length - left)
            left -= size
        return None

    def _single(self, iova: int, access: Access, pasid: int | None, act: Callable[[DmaPort, int], T]) -> T | Fault:
        """Do one access by the port and at the address that it is for."""
        refused = self._refused(pasid, iova, access)
        if refused is not None:
            return refused
        tlb = self._tlb(pasid)
        if tlb is None:
            return act(self._port, iova)
        segments, _, missing = self._translate(tlb, pasid, [(iova, 1)], access)  # aligned, it lies in one page
        if missing is not None:
            return act(self._port, iova) if missing.reason == Reason.ATS_OFF else missing
        answer = act(self._port.translated, segments[0][0])
        return _as_asked(answer, iova, 0, pasid) if isinstance(answer, Fault) else answer

    def _refused(self, pasid: int | None, iova: int, access: Access) -> Fault | None:
        if pasid is None or self._pasids.may_send(pasid, access):
            return None
        return self._fault(pasid, iova, access, Reason.PASID_OFF)

    def _fault(self, pasid: int | None, iova: int, access: Access, reason: Reason) -> Fault:
        return Fault(
            rid=self._rid(),
            pasid=pasid,
            ioasid=0,
            iova=iova,
            access=access,
            stage=0,
            level=0,
            gpa=None,
            entry=0,
            reason=reason,
            done=0,
        )


def _as_asked(fault: Fault, iova: int, done: int, pasid: int | None) -> Fault:
    """The fault of a translated request, as one of what the endpoint has asked for."""
    return replace(fault, iova=iova, done=done, pasid=pasid, type=AddressType.UNTRANSLATED)


def _pieces(sg: Sequence[Part]) -> Iterator[list[Part]]:
    """The list cut into lists of CHUNK bytes, the last one shorter."""
    piece: list[Part] = []
    room = CHUNK
    for iova, length in sg:
        done = 0
        while length - done > room:
            piece.append((iova + done, room))
            yield piece
            done += room
            piece, room = [], CHUNK
        piece.append((iova + done, length - done))
        room -= length - done
    yield piece


def _first(segments: Segments, size: int) -> Segments:
    """The first `size` bytes of segments."""
    found: Segments = []
    for address, length in segments:
        if size <= length:
            found.append((address, size))
            break
        found.append((address, length))
        size -= length
    return found


def _at(sg: Sequence[Part], done: int) -> int:
    """The IOVA of the byte behind `done` others."""
    for iova, length in sg:
        if done < length:
            return iova + done
        done -= length
    return 0
