"""Pages that a job misses: asked of the guest in groups, while other jobs run (PCI Express Base 5.0, 10.4).

Credits (the allocation that the guest grants the function) are shared here: no more is asked than can be sent at once,
and each queue that runs keeps one in reserve, so a process whose pages never come cannot starve another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from backend.core import Access, Fault, Reason
from backend.endpoints.dma_engine.descriptors import Cause
from backend.ioasid import Code

if TYPE_CHECKING:
    from backend.pci import PageRequests, PciFunction

PAGE = 4096
LOOK_AHEAD = 1 << 20
"""Bytes of an operand looked at for missing pages: what a large job needs next, in less than a millisecond."""
GROUPS_AT_ONCE = 2
"""Groups that the allocation is split into: the guest works on one while the device asks for the next."""
TRIES_MAX = 16
"""Requests for a page without a byte moved. A job needs two (source, target), and one more each time that a group was
refused for another page's sake or that the guest took a page back; a guest that needs more answers without mapping."""

_RECOVERABLE = {
    Reason.NOT_PRESENT: Cause.NOT_PRESENT,
    Reason.PERMISSION: Cause.PERMISSION,
    Reason.ACCESS_FLAG: Cause.PERMISSION,
    Reason.DIRTY: Cause.PERMISSION,
}
_FINAL = {Reason.BUS_MASTER_OFF: Cause.BUS_MASTER, Reason.PASID_OFF: Cause.PASID_OFF}


@dataclass(slots=True)
class Operand:
    """What is left of one: [iova, iova + length), in bytes."""

    iova: int
    length: int
    access: Access
    pasid: int | None

    def met(self, fault: Fault) -> bool:
        """Whether the fault befell this operand."""
        inside = self.iova <= fault.iova < self.iova + self.length
        return inside and self.pasid == fault.pasid and bool(self.access & fault.access)


class PageDesk:
    """Page requests of a whole device: what is asked, of whose credits, and who waits for credits."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function
        self.groups = 0
        self.pages = 0
        self.answers = 0
        self._period = 0
        """How often the counters began anew."""
        self._running: set[object] = set()
        self._held: dict[object, int] = {}
        """Pages outstanding, by who asked; no zeros."""
        self._waiting: dict[PageWait, None] = {}

    def clear_counts(self) -> None:
        """The counters begin anew; what is outstanding stays so, and its answers are not counted."""
        self.groups = self.pages = self.answers = 0
        self._period += 1

    def enter(self, user: object) -> None:
        """A user (a queue) runs: one credit is kept for it."""
        self._running.add(user)

    def leave(self, user: object) -> None:
        """It runs no more. What it asked stays outstanding until it is answered."""
        self._running.discard(user)

    def outstanding(self, user: object) -> int:
        """Pages that it asked for and that are not answered."""
        return self._held.get(user, 0)

    @property
    def usable(self) -> PageRequests | None:
        """The interface, if pages can be asked for now."""
        requests = self._function.page_requests
        return requests if requests is not None and requests.usable else None

    def credits(self, user: object) -> int:
        """Pages that a user may ask for now."""
        requests = self.usable
        if requests is None:
            return 0
        capacity = requests.capacity
        reserved = len(self._running.difference(self._held, (user,)))
        return max(capacity - reserved, int(capacity > 0 and user not in self._held))

    @property
    def group_most(self) -> int:
        """Pages of a group."""
        requests = self.usable
        return max(1, requests.allocation // GROUPS_AT_ONCE) if requests is not None else 1

    def missing(self, operand: Operand, asked: set[int], most: int) -> list[int]:
        """IOVAs of pages that the next part of an operand lacks, but for those asked. Each costs a translation request,
        so what precedes the first that was not asked is skipped."""
        first, end = operand.iova & -PAGE, operand.iova + min(operand.length, LOOK_AHEAD)
        while first in asked:
            first += PAGE
        found = self._function.memory.missing(operand.pasid, first, max(end - first, 0), operand.access, most)
        return [page for page in found if page not in asked]

    def ask(self, wait: PageWait, pasid: int | None, pages: list[int], access: Access) -> bool:
        """One group; the wait's `answered` is called once, maybe within this call. False: it cannot be asked."""
        requests = self.usable
        if requests is None:
            return False
        answer = partial(self._answered, wait, pages, self._period)
        self._hold(wait.user, len(pages))  # before: the answer may come within the call
        if not requests.ask(pasid, [(page, access) for page in pages], answer):
            self._hold(wait.user, -len(pages))
            return False
        self.groups += 1
        self.pages += len(pages)
        return True

    def wait_for_credits(self, wait: PageWait) -> bool:
        """Wake this one when credits came back; False: none will."""
        if not self._held:
            return False
        self._waiting[wait] = None
        return True

    def forget(self, wait: PageWait) -> None:
        """It waits for nothing any more."""
        self._waiting.pop(wait, None)

    def _answered(self, wait: PageWait, pages: list[int], period: int, code: Code) -> None:
        self.answers += period == self._period
        self._hold(wait.user, -len(pages))
        wait.answered(pages, code)
        waiting, self._waiting = self._waiting, {}
        for other in waiting:
            other.wake()

    def _hold(self, user: object, pages: int) -> None:
        held = self._held.pop(user, 0) + pages
        if held:
            self._held[user] = held


def cause_of(fault: Fault) -> Cause:
    """What a record says of a fault that nobody can mend."""
    return _RECOVERABLE.get(fault.reason) or _FINAL.get(fault.reason, Cause.TRANSLATION)


class PageWait:
    """The pages of one job, or of a ring: what it has asked, and what became of that."""

    def __init__(self, desk: PageDesk, user: object, wake: Callable[[], None]) -> None:
        """`user`: whose credits these are. `wake` is called when it is worth trying again."""
        self._desk = desk
        self.user = user
        self.wake = wake
        self._asked: set[int] = set()
        self._limit = LOOK_AHEAD // PAGE
        self._tries = 0
        self._progress = -1
        self._invalid: int | None = None
        self._doubted: list[int] | None = None
        """The page of a group of one that was answered by invalid."""
        self._failed = False

    def close(self) -> None:
        """Answers to come concern nobody."""
        self.wake = _nobody
        self._desk.forget(self)

    def meet(self, fault: Fault, operands: Sequence[Operand], progress: int) -> Cause | None:
        """A fault befell the first of the operands. None: its page was asked for, and `wake` will be called, maybe
        within this call; else why that is no use. `progress` differs from the last one if something moved meanwhile."""
        cause = cause_of(fault)
        if fault.reason not in _RECOVERABLE or fault.pasid is None:
            return cause
        page = fault.iova & -PAGE
        if self._failed:
            return Cause.PRI_FAILURE
        if page == self._invalid:
            return Cause.PRI_INVALID
        if self._desk.usable is None:
            return cause
        if progress != self._progress:
            self._progress, self._tries = progress, 0
        if page in self._asked:
            self._ask_more(operands, None)
            return None
        if self._tries >= TRIES_MAX:
            return Cause.UNRESOLVED
        if not self._desk.credits(self.user):
            return None if self._desk.wait_for_credits(self) else Cause.PRI_FAILURE
        self._tries += 1
        return None if self._ask_more(operands, page) else Cause.PRI_FAILURE

    def answered(self, pages: list[int], code: Code) -> None:
        """A group's answer."""
        self._asked.difference_update(pages)
        if code == Code.FAILURE:
            self._failed = True
        elif code == Code.SUCCESS:
            self._limit = min(2 * self._limit, LOOK_AHEAD // PAGE)
        elif pages == self._doubted:
            self._invalid = pages[0]
        else:
            # One of them cannot be had: find out whether it is the one that is needed next. One alone is asked for a
            # second time: to a group under the same index Linux adds what it still keeps of one that it refused.
            self._limit = 1
            self._doubted = pages[:1] if len(pages) == 1 else None
        self.wake()

    def _ask_more(self, operands: Sequence[Operand], first: int | None) -> bool:
        """Ask for `first` (None: that is asked already), and for what the operands lack besides, in turn, as far as the
        credits go; whether anything was asked."""
        wanted = [(operand, self._pages(operand, first if operand is operands[0] else None)) for operand in operands]
        asked = False
        while wanted:
            operand, pages = wanted.pop(0)
            if not pages:
                continue
            count = min(len(pages), self._desk.group_most, self._desk.credits(self.user))
            if not count:
                continue
            group, rest = pages[:count], pages[count:]
            self._asked.update(group)
            if not self._desk.ask(self, operand.pasid, group, operand.access):
                self._asked.difference_update(group)
                break
            asked = True
            wanted.append((operand, rest))
        return asked

    def _pages(self, operand: Operand, first: int | None) -> list[int]:
        """What to ask of an operand, `first` before all others."""
        pages = [] if first is None else [first]
        if operand.pasid is not None and self._limit > 1:
            most = min(self._limit, self._desk.credits(self.user)) - len(pages)
            pages += self._desk.missing(operand, self._asked.union(pages), most)
        return pages


def _nobody() -> None:
    """Nobody waits."""
