"""Page requests of the endpoints as the server saw them: how many, by PASID, their answers, and how long it took."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from backend.core import Access
from backend.ioasid import Code, Device, PageResponse

TIMES_KEPT = 4096
"""The newest round trips, for the median: a guest can cause any number."""
PASIDS_KEPT = 256
"""A report's lines; what further PASIDs do counts in the totals alone."""


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """One group: `pages` of it, and seconds from when its last request was handed on, with an interrupt to the guest,
    until the guest's answer. `ours` is the processor time that this process took meanwhile: the rest is the guest's."""

    pages: int
    whole: float
    ours: float


@dataclass(slots=True)
class PasidPages:
    """Of one PASID, through however many processes it went."""

    groups: int = 0
    pages: int = 0
    answers: Counter[Code] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class _Open:
    """A group that was asked for and not answered."""

    first: tuple[int, Access]
    pages: int = 0
    begin: float | None = None
    """When all of it was handed on, and what this thread had used of its processor then."""
    used: float = 0.0


class PageMeter:
    """Stands between functions and their devices' page requests."""

    def __init__(self) -> None:
        self.by_pasid: dict[int | None, PasidPages] = {}
        self.total = PasidPages()
        self.round_trips: deque[RoundTrip] = deque(maxlen=TIMES_KEPT)
        self.on_answer: Callable[[PageResponse, int, Access], None] | None = None
        """Told of each answer to a group of several pages, before its device, with the first page. Those of one page
        are left alone: they are what round trips are measured by."""
        self._open: dict[tuple[int, int], _Open] = {}

    def begin(self) -> None:
        """Count from here: a guest starts."""
        self.by_pasid.clear()
        self.total = PasidPages()
        self.round_trips.clear()

    @property
    def waiting(self) -> int:
        """Groups without an answer."""
        return len(self._open)

    def request(
        self,
        device: Device,
        pasid: int | None,
        iova: int,
        access: Access,
        *,
        group: int,
        last: bool,
        answer: Callable[[PageResponse], None],
    ) -> None:
        """Device.page_request, counted. A function has no more groups open than there are indices: 512."""
        key = (device.rid, group)
        opened = self._open.get(key)
        counts = self._counts(pasid)
        if opened is None:
            opened = self._open[key] = _Open((iova, access))
            for each in counts:
                each.groups += 1
        opened.pages += 1
        for each in counts:
            each.pages += 1
        device.page_request(
            pasid, iova, access, group=group, last=last, answer=partial(self._answered, key, pasid, answer)
        )
        if last:
            opened.begin, opened.used = time.perf_counter(), time.thread_time()

    def _answered(
        self, key: tuple[int, int], pasid: int | None, answer: Callable[[PageResponse], None], said: PageResponse
    ) -> None:
        opened = self._open.pop(key, None)
        if opened is not None:
            if opened.begin is not None:
                whole, ours = time.perf_counter() - opened.begin, time.thread_time() - opened.used
                self.round_trips.append(RoundTrip(opened.pages, whole, ours))
            if self.on_answer is not None and opened.pages > 1:
                self.on_answer(said, *opened.first)
        for each in self._counts(pasid):
            each.answers[said.code] += 1
        answer(said)

    def _counts(self, pasid: int | None) -> list[PasidPages]:
        found = self.by_pasid.get(pasid)
        if found is None and len(self.by_pasid) < PASIDS_KEPT:
            found = self.by_pasid[pasid] = PasidPages()
        return [self.total] if found is None else [self.total, found]

    def pasid_figures(self) -> dict[str, dict[str, int]]:
        """For the report: by PASID, "none" for requests without one."""
        return {
            "none" if pasid is None else str(pasid): {
                "groups": each.groups,
                "pages": each.pages,
                **{code.value: each.answers[code] for code in Code},
            }
            for pasid, each in sorted(self.by_pasid.items(), key=lambda item: -1 if item[0] is None else item[0])
        }

    def figures(self) -> dict[str, int]:
        """For the report: totals, and of groups of one page, which cost the most a page, medians in microseconds."""
        total = self.total
        figures = {
            "page_groups": total.groups,
            "page_requests": total.pages,
            **{f"page_answers_{code}": total.answers[code] for code in Code},
        }
        single = [each for each in self.round_trips if each.pages == 1]
        if single:
            figures["page_round_trip_us"] = round(median(each.whole for each in single) * 1e6)
            figures["page_round_trip_ours_us"] = round(median(each.ours for each in single) * 1e6)
        return figures
