"""The report: the JSON that is promised, lines for a pipe, a table for a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from backend.vm import ktap
from backend.vm.report import Check, DmaExample, Report, Verdict, guest_checks

EXAMPLE = DmaExample(
    "0000:00:04.0", "write", 4096, 0xFFFFF000, 0x1A2B3000, 0x7F00_1A2B_3000, "AMD v1, 3 levels", "4 levels"
)
REPORT = Report(
    [Check("iommu/group-type", "pass", "DMA-FQ"), Check("blocks/discard", "skip", "no Dataset Management")],
    guest={"kernel": "7.3.4", "cpus": 1},
    dma={"translations": 4711, "bypassed": 0, "faults": 4, "moved": 4700},
    example=EXAMPLE,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_has_the_promised_form() -> None:
    whole = json.loads(REPORT.to_json())
    assert list(whole) == ["ok", "checks", "guest", "dma", "log_dir"]
    assert whole["ok"] is True
    assert whole["checks"] == [
        {"name": "iommu/group-type", "status": "pass", "detail": "DMA-FQ"},
        {"name": "blocks/discard", "status": "skip", "detail": "no Dataset Management"},
    ]
    assert whole["guest"] == {"kernel": "7.3.4", "cpus": 1}
    assert whole["log_dir"] is None
    example = whole["dma"].pop("example")
    assert whole["dma"] == {"translations": 4711, "bypassed": 0, "faults": 4, "moved": 4700}
    assert (example["iova"], example["gpa"], example["hva"]) == ("0xfffff000", "0x1a2b3000", "0x7f001a2b3000")
    bare = json.loads(Report([], log_dir=Path("/logs")).to_json())
    assert bare["dma"] == {"translations": 0, "bypassed": 0, "faults": 0}
    assert bare["log_dir"] == "/logs"


@pytest.mark.parametrize(
    ("verdicts", "ok"),
    [(["pass"], True), (["pass", "skip"], True), (["pass", "fail"], False), (["skip"], False), ([], False)],
)
def test_what_counts_as_passed(verdicts: list[Verdict], ok: bool) -> None:
    assert Report([Check("x", verdict) for verdict in verdicts]).ok == ok


def test_a_lost_vm_is_never_ok_and_shows_among_the_checks() -> None:
    report = Report([Check("x", "pass")], lost_part="guest", lost_reason="it panicked")
    assert not report.ok
    assert json.loads(report.to_json())["checks"][-1] == {
        "name": "vm/guest",
        "status": "fail",
        "detail": "lost: it panicked",
    }
    assert report.plain().splitlines()[-1] == "lost: 1 passed, 1 failed"
    assert (
        Report.lost("qemu", "gone", Path("/logs")).plain().splitlines()[-1] == "lost: 0 passed, 1 failed; logs: /logs"
    )


def test_plain_lines_in_a_pipe() -> None:
    out = io.StringIO()
    REPORT.render(out)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["PASS iommu/group-type: DMA-FQ", "SKIP blocks/discard: no Dataset Management"]
    assert "guest kernel: 7.3.4" in lines
    assert "dma translations: 4711" in lines
    assert "dma example iova: 0xfffff000" in lines
    assert lines[-1] == "ok: 1 passed, 0 failed, 1 skipped"
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_the_picture_and_no_markup_of_the_guest_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    Report([Check("x", "pass", "[red]not red[/red] [link=http://x]y[/link]")], example=EXAMPLE).render(out)
    text = out.getvalue()
    assert "[red]not red[/red] [link=http://x]y[/link]" in text
    picture = [line.strip("│ ") for line in text.splitlines()]
    order = [
        next(i for i, line in enumerate(picture) if word in line)
        for word in ("IOVA", "stage 1", "GPA", "stage 2", "HVA")
    ]
    assert order == sorted(order)
    assert "0x0000fffff000" in text


def test_an_unknown_host_address_is_left_out() -> None:
    example = DmaExample("0000:00:04.0", "read", 512, 0x1000, 0x2000, None, "AMD v1", "AMD v1")
    assert not any("HVA" in line for line in example.lines())
    assert "hva" not in example.json()


def test_the_guest_s_results_become_checks() -> None:
    lines = [
        "KTAP version 1",
        "1..4",
        "  KTAP version 1",
        "  1..2",
        "  ok 1 group-type # DMA",
        "  not ok 2 present # empty",
        "not ok 1 iommu",
        "  KTAP version 1",
        "  1..1",
        "  ok 1 read-back",
        "not ok 2 data # TIMEOUT 90 seconds",
        "ok 3 log # SKIP nothing",
    ]
    assert guest_checks(ktap.read(lines), "second/") == [
        Check("second/iommu/group-type", "pass", "DMA"),
        Check("second/iommu/present", "fail", "empty"),
        Check("second/data/read-back", "pass", ""),
        Check("second/data", "fail", "TIMEOUT 90 seconds"),
        Check("second/log", "skip", "nothing"),
        Check("second/results", "fail", "ended after 3 of 4 tests"),
    ]
