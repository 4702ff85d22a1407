"""The faults of a context: page requests that wait for an answer, and unrecoverable ones that are told once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from backend.core import Access, Fault, Reason

from .limits import MAX_DEVICE_PAGE_REQUESTS, MAX_FAULTS, MAX_PAGE_REQUESTS
from .share import Allowance

if TYPE_CHECKING:
    from .device import Device


class Code(StrEnum):
    """The answer to a group of page requests (PCI Express, page request group response: 0, 1 and 15)."""

    SUCCESS = "success"
    INVALID = "invalid"
    FAILURE = "failure"


CODES = {str(code): code for code in Code}
"""By name, as a command's user gives them."""


@dataclass(frozen=True, slots=True)
class PageResponse:
    """What a device gets for a group; pasid as the guest sees it."""

    rid: int
    pasid: int | None
    group: int
    code: Code


Answer = Callable[[PageResponse], None]


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """A fault as its context's user reads it. RID and cookie say whose, the PASID is the guest's."""

    recoverable: bool
    """A page request: it waits for PAGE_RESPONSE. Else DMA that is over."""
    ioasid: int
    """0 without a route."""
    rid: int
    cookie: int | None
    pasid: int | None
    iova: int
    access: Access
    group: int | None
    """Of a page request."""
    last: bool
    """The group is complete."""
    reason: Reason | None
    """Of an unrecoverable one, with where it befell:"""
    stage: int = 0
    level: int = 0
    gpa: int | None = None
    middle: int | None = None
    """Of three tables: the address that the guest's one in the middle was to translate; None: another was at work."""


@dataclass(frozen=True, slots=True)
class Faults:
    """The answer of READ_FAULTS. `lost`: unrecoverable ones that found no room since the last time."""

    records: tuple[FaultRecord, ...]
    lost: int


@dataclass(slots=True)
class _Group:
    """Page requests of one index of one device."""

    device: Device
    index: int
    pasid: int | None
    deadline: float
    answer: Answer
    complete: bool = False
    numbers: list[int] = field(default_factory=list)
    """Of its records, read or not."""


class FaultQueue:
    """Bounded. Page requests keep their places until they are answered, read or not; unrecoverable faults until they
    are read.

    clock: seconds, monotonic. timeout: seconds that a group waits for its answer, from its first request on; then it
    is invalid. arm: told when that will be, of every group that opens. records: what is kept beside other contexts.
    """

    def __init__(
        self, clock: Callable[[], float], timeout: float, arm: Callable[[float], None], records: Allowance
    ) -> None:
        self._clock = clock
        self._timeout = timeout
        self._arm = arm
        self._records = records
        self._groups: dict[tuple[int, int], _Group] = {}
        """By RID and index, oldest first."""
        self._unread: dict[int, tuple[_Group | None, FaultRecord]] = {}
        """By number, oldest first."""
        self._next = 0
        self._requests = 0
        self._by_device: dict[int, int] = {}
        """Page requests by RID; no zeros."""
        self._lost = 0
        self._unrecoverable = 0
        self._listeners: list[Callable[[], None]] = []

    def on_ready(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Tell the listener of each record that comes, within the call that brought it; it may read and answer there.
        Answers with what ends that.

        Every listener is told of every record, and whoever reads first has it: one user of the context reads, the
        others look at `unread`.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    @property
    def waiting(self) -> int:
        """Page requests without an answer."""
        return self._requests

    @property
    def unread(self) -> int:
        """Records to read."""
        return len(self._unread)

    def request(self, device: Device, pasid: int | None, record: FaultRecord, answer: Answer) -> None:
        """A page request of a device with this physical PASID; see Device.page_request."""
        self.expire()
        assert record.group is not None
        key = (device.rid, record.group)
        group = self._groups.get(key)
        of_device = self._by_device.get(device.rid, 0)
        refused = None
        if group is not None and (group.complete or group.pasid != pasid):
            refused = Code.INVALID
        elif of_device >= MAX_DEVICE_PAGE_REQUESTS or self._requests >= MAX_PAGE_REQUESTS or not self._records.take():
            refused = Code.FAILURE
            if group is not None:  # it can never be complete now
                group.answer = answer
                self._finish(group, Code.FAILURE)
                return
        if refused is not None:
            answer(PageResponse(device.rid, record.pasid, record.group, refused))
            return
        if group is None:
            group = _Group(device, record.group, pasid, self._clock() + self._timeout, answer)
            self._groups[key] = group
            self._arm(group.deadline)
        group.answer = answer
        group.complete = record.last
        self._requests += 1
        self._by_device[device.rid] = of_device + 1
        self._put(group, record)

    def report(self, device: Device, fault: Fault) -> None:
        """An unrecoverable fault of a device; its IOASID and PASID are the user's already."""
        if self._unrecoverable >= MAX_FAULTS or not self._records.take():
            self._lost += 1
            return
        self._unrecoverable += 1
        record = FaultRecord(
            recoverable=False,
            ioasid=fault.ioasid,
            rid=fault.rid,
            cookie=device.cookie,
            pasid=fault.pasid,
            iova=fault.iova,
            access=fault.access,
            group=None,
            last=False,
            reason=fault.reason,
            stage=fault.stage,
            level=fault.level,
            gpa=fault.gpa,
            middle=fault.middle,
        )
        self._put(None, record)

    def read(self, count: int = 0) -> Faults:
        """Take the oldest records out, `count` at most; 0: all."""
        self.expire()
        taken = list(self._unread)[: count or None]
        records = []
        for number in taken:
            group, record = self._unread.pop(number)
            if group is None:
                self._unrecoverable -= 1
                self._records.give()
            records.append(record)
        lost, self._lost = self._lost, 0
        return Faults(tuple(records), lost)

    def respond(self, rid: int, index: int, pasid: int | None, code: Code) -> bool:
        """Answer a complete group; False: there is none. `pasid`: physical; None fits any."""
        self.expire()
        group = self._groups.get((rid, index))
        if group is None or not group.complete or (pasid is not None and group.pasid != pasid):
            return False
        self._finish(group, code)
        return True

    def release(self, device: Device, pasid: int | None, *, every: bool = False) -> None:
        """Nobody is to answer the device's requests with this PASID (None: without one) any more, or `every` one of
        its requests: they are invalid."""
        for key, group in list(self._groups.items()):
            if group.device is device and (every or group.pasid == pasid) and self._groups.get(key) is group:
                self._finish(group, Code.INVALID)

    def close(self) -> None:
        """Nobody reads what is left. Page requests were released before, with their devices."""
        self._records.give(self._unrecoverable)
        self._unread.clear()
        self._unrecoverable = 0

    def expire(self) -> None:
        """Give up waiting where time is over."""
        now = self._clock()
        while self._groups:
            oldest = next(iter(self._groups.values()))
            if oldest.deadline > now:
                return
            self._finish(oldest, Code.INVALID)

    @property
    def deadline(self) -> float | None:
        """When `expire` has something to do next, by the clock; None: nothing waits."""
        first = next(iter(self._groups.values()), None)
        return first.deadline if first is not None else None

    def _finish(self, group: _Group, code: Code) -> None:
        """Answer a group. What of it was not read yet is of no use to anybody now."""
        device = group.device
        del self._groups[device.rid, group.index]
        self._requests -= len(group.numbers)
        left = self._by_device[device.rid] - len(group.numbers)
        if left:
            self._by_device[device.rid] = left
        else:
            del self._by_device[device.rid]
        self._records.give(len(group.numbers))
        for number in group.numbers:
            self._unread.pop(number, None)
        group.answer(PageResponse(device.rid, device.virtual(group.pasid), group.index, code))

    def _put(self, group: _Group | None, record: FaultRecord) -> None:
        self._unread[self._next] = (group, record)
        if group is not None:
            group.numbers.append(self._next)
        self._next += 1
        for listener in tuple(self._listeners):
            listener()
