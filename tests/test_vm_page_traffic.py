"""Page requests as the server counts them: by PASID, with their answers, on a real queue of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backend.core import Access
from backend.ioasid import Code, Context, Device, Engine, PageResponse
from backend.vm import page_traffic
from backend.vm.page_traffic import PageMeter

RID = 0x28


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def attached(engine: Engine) -> tuple[Context, Device]:
    """A device whose page requests wait in a context's queue, whichever PASID they have."""
    device = engine.add_device(RID, "dma0")
    context = engine.open()
    context.bind_device(RID)
    space = context.alloc()
    context.attach(RID, space)
    for pasid in (1, 2):
        context.attach(RID, space, vpasid=pasid)
    return context, device


def test_groups_pages_and_answers_by_pasid(engine: Engine) -> None:
    context, device = attached(engine)
    meter, heard = PageMeter(), list[PageResponse]()

    def ask(pasid: int, group: int, *pages: int) -> None:
        for page in pages:
            last = page == pages[-1]
            meter.request(device, pasid, page, Access.WRITE, group=group, last=last, answer=heard.append)

    ask(1, 0, 0x1000, 0x2000, 0x3000)
    ask(2, 1, 0x1000)
    ask(1, 2, 0x9000)
    assert meter.waiting == 3
    context.page_response(RID, 0, Code.SUCCESS)
    context.page_response(RID, 1, Code.INVALID)
    assert [(each.group, each.code) for each in heard] == [(0, Code.SUCCESS), (1, Code.INVALID)]
    one, two = meter.by_pasid[1], meter.by_pasid[2]
    assert (one.groups, one.pages, dict(one.answers)) == (2, 4, {Code.SUCCESS: 1})
    assert (two.groups, two.pages, dict(two.answers)) == (1, 1, {Code.INVALID: 1})
    assert [each.pages for each in meter.round_trips] == [3, 1]
    assert all(each.ours >= 0 and each.whole > 0 for each in meter.round_trips)
    assert meter.pasid_figures() == {
        "1": {"groups": 2, "pages": 4, "success": 1, "invalid": 0, "failure": 0},
        "2": {"groups": 1, "pages": 1, "success": 0, "invalid": 1, "failure": 0},
    }
    figures = meter.figures()
    assert (figures["page_groups"], figures["page_requests"], figures["page_answers_success"]) == (3, 5, 1)
    meter.begin()
    context.page_response(RID, 2, Code.SUCCESS)
    assert meter.waiting == 0
    assert (meter.total.groups, meter.total.answers[Code.SUCCESS]) == (0, 1), "asked by the guest before"


def test_a_refusal_within_the_call_is_an_answer(engine: Engine) -> None:
    device = engine.add_device(RID, "dma0")  # of no context: nobody could answer
    meter, heard = PageMeter(), list[PageResponse]()
    meter.request(device, 7, 0x1000, Access.READ, group=3, last=True, answer=heard.append)
    assert [each.code for each in heard] == [Code.INVALID]
    assert (meter.waiting, meter.by_pasid[7].answers[Code.INVALID]) == (0, 1)


def test_more_pasids_than_a_report_has_lines(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_traffic, "PASIDS_KEPT", 2)
    device = engine.add_device(RID, "dma0")
    meter = PageMeter()
    for pasid in range(5):
        meter.request(device, pasid, 0, Access.READ, group=pasid, last=True, answer=lambda _: None)
    assert (sorted(each for each in meter.by_pasid if each is not None), meter.total.groups) == ([0, 1], 5)
