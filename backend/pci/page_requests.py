"""The page request interface of a function: groups of page requests, their credits, indices and answers.

PCI Express Base 5.0, 10.4 (page requests and responses) and 10.5.2 (the capability).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from backend.core import Access
from backend.ioasid import Code, PageResponse
from backend.pci.capabilities import Pri
from backend.pci.config_space import ConfigSpace
from backend.pci.pasid_control import PasidControl

CONTROL, STATUS, CAPACITY, ALLOCATION = 4, 6, 8, 12
ENABLE, RESET = 1 << 0, 1 << 1
RESPONSE_FAILURE, UNEXPECTED_INDEX, STOPPED = 1 << 0, 1 << 1, 1 << 8

INDICES = 1 << 9
"""A page request group index has 9 bits."""
LINE_MAX = 64
"""Groups that wait for credits: a device has some jobs under way at once, and an endpoint that is told False can wait
by itself."""
PAGE = 4096

Answer = Callable[[Code], None]


class Send(Protocol):
    """Page request messages on their way to the IOMMU (Device.page_request)."""

    def __call__(
        self,
        pasid: int | None,
        iova: int,
        access: Access,
        *,
        group: int,
        last: bool,
        answer: Callable[[PageResponse], None],
    ) -> None: ...


@dataclass(slots=True, eq=False)
class _Group:
    """Page requests that get one answer."""

    pasid: int | None
    pages: Sequence[tuple[int, Access]]
    answer: Answer | None
    """None: nobody waits for it any more."""


class PageRequests:
    """What a function may ask the guest for, once the guest has enabled it.

    Each group goes out under an index of its own, which stays reserved until the IOMMU has answered it, whatever became
    of the interface meanwhile: an answer that comes late can never be taken for that of another group.
    """

    def __init__(
        self, config: ConfigSpace, capability: Pri, pasids: PasidControl, may_translate: Callable[[], bool]
    ) -> None:
        """`may_translate`: whether the function masters the bus and its address translation service is on."""
        base = config.find(Pri.id, extended=True)
        assert base is not None
        self._config = config
        self._base = base
        self._outstanding_max = capability.outstanding
        self._pasids = pasids
        self._may_translate = may_translate
        self._send: Send | None = None
        self._enabled = False
        self._failed = False
        """A response failure came: no more is asked, and no answer counts, until the interface is enabled anew."""
        self._line: deque[_Group] = deque()
        self._sent: dict[int, _Group] = {}
        """By index."""
        self._credits = 0
        """Page requests of groups that were sent: as many of the allocation are in use."""
        self._free = deque(range(INDICES))  # the one that was in use last comes last
        self._sending = False
        config.on_write(base + CONTROL, 2, self._control_written)
        config.on_write(base + ALLOCATION, 4, self.update)

    def connect(self, send: Send | None) -> None:
        """Where page request messages go; None: nowhere, so none can be asked."""
        self._send = send

    # What an endpoint does

    @property
    def usable(self) -> bool:
        """Whether a group can be asked now: enabled, not failed, translating, and mastering the bus."""
        return self._enabled and not self._failed and self._send is not None and self._may_translate()

    @property
    def allocation(self) -> int:
        """Page requests that the guest lets the function have outstanding, no more than it has room for."""
        return min(self._config.read(self._base + ALLOCATION, 4), self._outstanding_max)

    @property
    def capacity(self) -> int:
        """The most pages that a group can have to be sent now; 0 while others wait for their turn."""
        if not self.usable or self._line or not self._free:
            return 0
        return max(0, self.allocation - self._credits)

    def ask(self, pasid: int | None, pages: Sequence[tuple[int, Access]], answer: Answer) -> bool:
        """Ask for pages, (IOVA, access) each, as one group; `answer` is called with its code, exactly once.

        False, and no answer: the interface is not usable, the group is empty or larger than `allocation`, the PASID
        cannot be sent, or LINE_MAX groups wait already. A group without credits waits for its turn. It is answered by
        Code.FAILURE where it can no longer be answered by the guest: the interface was stopped before it was sent, or
        reset, or a response failure came; that call may come while the function is being reset.
        """
        if not self.usable or not pages or len(self._line) >= LINE_MAX:
            return False
        group = _Group(pasid, [(iova & -PAGE, access) for iova, access in pages], answer)
        if not self._sendable(group):
            return False
        self._line.append(group)
        self._send_what_can_be()
        return True

    def cancel(self, pasid: int | None) -> None:
        """Nobody waits for answers to this PASID's groups any more: those in line are dropped, and so are the answers
        to those sent. Their indices and credits are given back once the answers came."""
        self._line = deque(group for group in self._line if group.pasid != pasid)
        for group in self._sent.values():
            if group.pasid == pasid:
                group.answer = None
        self._send_what_can_be()

    # What the IOMMU does

    def unexpected(self) -> None:
        """A response came whose index no group has: UPRGI (10.5.2.3)."""
        if self._enabled and not self._failed:
            self._set_status(UNEXPECTED_INDEX)

    def _answered(self, index: int, answer: PageResponse) -> None:
        """The one response (10.4.2) to what went out under an index, which is free now."""
        self._free.append(index)
        group = self._sent.pop(index, None)
        if group is None:
            self.unexpected()
        else:
            self._credits -= len(group.pages)
            if answer.code == Code.FAILURE:
                self._failed = True
                self._set_status(RESPONSE_FAILURE)
                self._end(group, *self._take_all())
            else:
                self._end_one(group, answer.code)
            self._stopped_yet()
        self._send_what_can_be()

    # What the guest does

    def update(self) -> None:
        """What decides on what may be sent has changed: bus mastering, address translation, PASIDs, the allocation."""
        if self._line and not self.usable:
            self._end(*self._take_line())
        self._send_what_can_be()

    def reset(self) -> None:
        """The function was reset, and its registers are: nothing is outstanding, the interface is off."""
        self._enabled = self._failed = False
        self._end(*self._take_all())

    def _control_written(self) -> None:
        """10.5.2.2. The status bits that enabling clears, and the order of stop and reset in one write."""
        control = self._config.read(self._base + CONTROL, 2)
        enable = bool(control & ENABLE)
        self._config.set(self._base + CONTROL, 2, control & ~RESET)  # reads as 0
        if enable and not self._enabled:
            self._failed = False
            self._set_status(0, clear=RESPONSE_FAILURE | UNEXPECTED_INDEX | STOPPED)
        self._enabled = enable
        if enable:
            self._send_what_can_be()
        elif control & RESET:
            ended = self._take_all()
            self._set_status(STOPPED)
            self._end(*ended)
        else:
            ended = self._take_line()
            self._stopped_yet()
            self._end(*ended)

    def _stopped_yet(self) -> None:
        """Stopped tells, while the interface is off, that nothing is outstanding (10.5.2.3)."""
        if not self._enabled:
            self._set_status(0 if self._sent else STOPPED)

    def _set_status(self, bits: int, *, clear: int = 0) -> None:
        status = self._config.read(self._base + STATUS, 2)
        self._config.set(self._base + STATUS, 2, status & ~clear | bits)

    # Groups

    def _send_what_can_be(self) -> None:
        """Send groups as long as the one whose turn it is has credits and an index."""
        if self._sending:
            return  # called by an answer to what is being sent: the loop below goes on with it
        self._sending = True
        try:
            while self._line and self.usable:
                group = self._line[0]
                if not self._sendable(group):  # allocation or PASID were taken back: its turn would never come
                    self._line.popleft()
                    self._end_one(group, Code.FAILURE)
                elif self._free and len(group.pages) <= self.allocation - self._credits:
                    self._line.popleft()
                    self._send_group(group)
                else:
                    break
        finally:
            self._sending = False

    def _sendable(self, group: _Group) -> bool:
        """Whether the group could go out by itself, as allocation and PASIDs are now."""
        allowed = all(self._pasids.may_send(group.pasid, access) for _, access in group.pages)
        return allowed and len(group.pages) <= self.allocation

    def _send_group(self, group: _Group) -> None:
        assert self._send is not None
        index = self._free.popleft()
        self._sent[index] = group
        self._credits += len(group.pages)
        answered = partial(self._answered, index)
        for number, (iova, access) in enumerate(group.pages, 1):
            self._send(group.pasid, iova, access, group=index, last=number == len(group.pages), answer=answered)
            if self._sent.get(index) is not group:
                return  # answered already, where nobody could

    def _take_line(self) -> list[_Group]:
        taken = list(self._line)
        self._line.clear()
        return taken

    def _take_all(self) -> list[_Group]:
        """Every group, sent or not: none is known any more, though the indices of those sent stay reserved."""
        taken = [*self._sent.values(), *self._take_line()]
        self._sent.clear()
        self._credits = 0
        return taken

    def _end(self, *groups: _Group) -> None:
        for group in groups:
            self._end_one(group, Code.FAILURE)

    @staticmethod
    def _end_one(group: _Group, code: Code) -> None:
        if group.answer is not None:
            group.answer(code)
