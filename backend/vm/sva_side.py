"""What the server saw of shared virtual addressing during one boot, as checks beside those of the guest."""

from __future__ import annotations

import asyncio

from backend.core import Access, Translation
from backend.ioasid import Code, PageResponse
from backend.viommu.amd import EventCode, Opcode
from backend.vm.backend import Backend
from backend.vm.report import Check

SAMPLES = 64
"""Pages looked up after their answer: a millisecond of work in all."""
SAMPLE_SECONDS = 0.001
"""After the answer: the job that asked has used the page by then. Later, its process may have ended."""
EXPECTED_EVENTS = frozenset({EventCode.IO_PAGE_FAULT})
"""Those of requests that the checks order. A refused translation request is no event."""


class SvaSide:
    """Counts from its making on. `checks` gives what they come to."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._commands = backend.iommu_commands()
        self._events = _events(backend)
        self._translated = {name: _translated(backend, name) for name in backend.endpoints}
        self._looked_up = 0
        self._marked: list[bool] = []
        """Of pages that were asked for and were there later: whether their entry was marked as used."""
        backend.pages.on_answer = self._answered

    def checks(self) -> list[Check]:
        """Of all endpoints together, at the end of the boot."""
        pages = self._backend.pages
        pages.on_answer = None
        if not pages.total.groups:
            return [Check("sva/pasids", "fail", "no device of the guest's asked for a page in any PASID")]
        return [
            self._pasids(),
            self._answers(),
            self._invalidations(),
            self._entries(),
            self._requests(),
            self._unexpected_events(),
        ]

    def _pasids(self) -> Check:
        by_pasid = self._backend.pages.by_pasid
        said = ", ".join(f"{pasid}: {each.groups} groups" for pasid, each in sorted(by_pasid.items(), key=str)[:8])
        more = f" and {len(by_pasid) - 8} more" if len(by_pasid) > 8 else ""
        without = None in by_pasid
        return Check("sva/pasids", "fail" if without else "pass", f"{len(by_pasid)} asked for pages ({said}{more})")

    def _answers(self) -> Check:
        """Each group has had one answer, and it is that of a COMPLETE_PPR_REQUEST but where the engine gave up."""
        pages = self._backend.pages
        answers = pages.total.answers
        given = self._given(Opcode.COMPLETE_PPR_REQUEST)
        text = (
            f"{pages.total.pages} pages in {pages.total.groups} groups: "
            f"{', '.join(f'{answers[code]} {code}' for code in Code)}; {pages.waiting} wait, "
            f"{given} COMPLETE_PPR_REQUEST"
        )
        whole = answers.total() + pages.waiting == pages.total.groups and not pages.waiting
        return Check("sva/page-requests", "pass" if whole and answers[Code.SUCCESS] <= given else "fail", text)

    def _invalidations(self) -> Check:
        given = self._given(Opcode.INVALIDATE_IOTLB_PAGES)
        return Check("sva/device-tlb", "pass" if given else "fail", f"{given} INVALIDATE_IOTLB_PAGES")

    def _entries(self) -> Check:
        """What the guest's own entries say of pages that a device has asked for and used (LOOKUP)."""
        marked, seen = sum(self._marked), len(self._marked)
        if not seen:
            return Check("sva/accessed-dirty", "skip", "the guest's checks asked for no several pages at once")
        text = f"{marked} of {seen} entries looked up after their answer are marked as accessed, for a write as dirty"
        return Check("sva/accessed-dirty", "pass" if marked == seen else "fail", text)

    def _requests(self) -> Check:
        """Requests with a PASID are translated by the guest's tables, or they are none: the device does it first."""
        moved = {}
        for name, before in self._translated.items():
            requests, size = _translated(self._backend, name)
            if requests > before[0]:
                moved[name] = f"{name}: {requests - before[0]} requests, {size - before[1] >> 20} MiB"
        return Check("sva/translated-requests", "pass" if moved else "fail", "; ".join(moved.values()) or "none")

    def _unexpected_events(self) -> Check:
        new = {code: count - self._events.get(code, 0) for code, count in _events(self._backend).items()}
        odd = {code: count for code, count in new.items() if count and code not in EXPECTED_EVENTS}
        text = ", ".join(f"{count} {code.name}" for code, count in sorted(new.items()) if count) or "no event"
        return Check("sva/events", "fail" if odd else "pass", text)

    def _given(self, opcode: Opcode) -> int:
        return self._backend.iommu_commands()[opcode] - self._commands[opcode]

    def _answered(self, said: PageResponse, iova: int, access: Access) -> None:
        if said.code == Code.SUCCESS and self._looked_up < SAMPLES:
            self._looked_up += 1
            asyncio.get_running_loop().call_later(SAMPLE_SECONDS, self._look_up, said, iova, access)

    def _look_up(self, said: PageResponse, iova: int, access: Access) -> None:
        if self._backend.pages.on_answer != self._answered:
            return  # the boot is over
        path = self._backend.look_up(said.rid, iova, access, said.pasid)
        if path is None or not isinstance(path.result, Translation):
            return  # the process has given it away since
        leaf = [step for step in path.steps if step.stage == 1 and not step.pasid_table][-1]
        self._marked.append(bool(leaf.accessed) and (not access & Access.WRITE or bool(leaf.dirty)))


def _events(backend: Backend) -> dict[EventCode, int]:
    """Events logged or lost by all IOMMUs, by code."""
    found: dict[EventCode, int] = {}
    for iommu in backend.iommus.values():
        for code, count in (*iommu.event_log.logged.items(), *iommu.event_log.lost.items()):
            found[code] = found.get(code, 0) + count
    return found


def _translated(backend: Backend, name: str) -> tuple[int, int]:
    """Requests of an endpoint with translated addresses, and their bytes."""
    rid = next(each.rid for each in backend.machine.endpoints if each.name == name)
    counters = backend.engine.devices[rid].port.translated.counters
    return counters.requests, counters.bytes
