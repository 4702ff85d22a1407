"""What a run came to: checks, the guest, DMA figures; as JSON, as a table on a terminal, as plain lines in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from backend.vm import ktap

if TYPE_CHECKING:
    from rich.console import Console

Verdict = Literal["pass", "fail", "skip"]
DMA_FIGURES = ("translations", "bypassed", "faults")  # always there, whatever else is counted
MARKS: Mapping[Verdict, tuple[str, str]] = {
    "pass": ("PASS", "green"),
    "fail": ("FAIL", "red"),
    "skip": ("SKIP", "yellow"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One claim and what was seen; `detail` of a skip says what is missing."""

    name: str
    status: Verdict
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DmaExample:
    """One DMA as it went: the address at each stage, and whose table stands between. `hva`: None if unknown."""

    device: str
    access: str  # "read" or "write", of guest memory
    length: int
    iova: int
    gpa: int
    hva: int | None
    stage1: str  # as "AMD v1, 3 levels"
    stage2: str

    def lines(self) -> list[str]:
        """The picture of it."""
        into = "from" if self.access == "read" else "into"
        rows = [
            f"{self.device}   {self.access} of {self.length} bytes",
            f"    │ IOVA {self.iova:#014x}",
            "    ▼",
            f"stage 1   the guest's table: {self.stage1}",
            f"    │ GPA  {self.gpa:#014x}",
            "    ▼",
            f"stage 2   our table: {self.stage2}",
        ]
        if self.hva is not None:
            rows += [f"    │ HVA  {self.hva:#014x}"]
        return [*rows, "    ▼", f"guest memory   copied {into} it by us"]

    def json(self) -> dict[str, str | int]:
        """Addresses in hexadecimal: JSON's numbers end at 53 bits."""
        hexadecimal = {
            key: f"{value:#x}" for key in ("iova", "gpa", "hva") if (value := getattr(self, key)) is not None
        }
        return {**{key: value for key, value in asdict(self).items() if value is not None}, **hexadecimal}


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run. `lost_part` is "qemu", "guest" or "backend" if the VM went away, which is no failed check."""

    checks: Sequence[Check]
    guest: Mapping[str, str | int] = field(default_factory=dict)
    dma: Mapping[str, int] = field(default_factory=dict)
    pasids: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Page requests by PASID."""
    example: DmaExample | None = None
    log_dir: Path | None = None
    lost_part: str | None = None
    lost_reason: str = ""

    @classmethod
    def lost(cls, part: str, reason: str, log_dir: Path | None) -> Report:
        """The report of a run of which nothing but its end is known."""
        return cls([], log_dir=log_dir, lost_part=part, lost_reason=reason)

    @property
    def ok(self) -> bool:
        """Something passed, nothing failed, and the VM stayed to the end."""
        verdicts = {check.status for check in self.all_checks()}
        return "pass" in verdicts and "fail" not in verdicts

    def all_checks(self) -> list[Check]:
        """With the loss of the VM as the last one, so that it shows wherever checks do."""
        lost = (
            [Check(f"vm/{self.lost_part}", "fail", f"lost: {self.lost_reason}")] if self.lost_part is not None else []
        )
        return [*self.checks, *lost]

    def to_json(self) -> str:
        """One object: {"ok", "checks": [{"name", "status", "detail"}], "guest", "dma", "log_dir"}."""
        dma: dict[str, object] = {**dict.fromkeys(DMA_FIGURES, 0), **self.dma}
        if self.pasids:
            dma["pasids"] = {pasid: dict(figures) for pasid, figures in self.pasids.items()}
        if self.example is not None:
            dma["example"] = self.example.json()
        whole = {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.all_checks()],
            "guest": dict(self.guest),
            "dma": dma,
            "log_dir": str(self.log_dir) if self.log_dir is not None else None,
        }
        return json.dumps(whole, indent=2)

    def render(self, file: TextIO | None = None) -> None:
        """A table and a picture on a terminal, else one line a check; on stdout unless `file` is given."""
        out = file or sys.stdout
        if not out.isatty():
            out.write(self.plain())
            return
        from rich.console import Console  # noqa: PLC0415 - 0.1 s to import, and of no use in a pipe

        self._show(Console(file=out))

    def plain(self) -> str:
        """Lines that grep and awk can read: STATUS name: detail."""
        lines = [f"{MARKS[check.status][0]} {_described(check)}" for check in self.all_checks()]
        lines += [f"guest {key}: {value}" for key, value in self.guest.items()]
        lines += [f"dma {key}: {value}" for key, value in self.dma.items()]
        lines += [f"dma pasid {pasid}: {_counted(figures)}" for pasid, figures in self.pasids.items()]
        if self.example is not None:
            lines += [f"dma example {key}: {value}" for key, value in self.example.json().items()]
        return "\n".join([*lines, self._verdict()]) + "\n"

    def _verdict(self) -> str:
        checks = self.all_checks()
        count = {status: sum(check.status == status for check in checks) for status in MARKS}
        word = "lost" if self.lost_part is not None else "ok" if self.ok else "failed"
        skipped = f", {count['skip']} skipped" if count["skip"] else ""
        logs = f"; logs: {self.log_dir}" if self.log_dir is not None else ""
        return f"{word}: {count['pass']} passed, {count['fail']} failed{skipped}{logs}"

    def _show(self, console: Console) -> None:
        from rich.panel import Panel  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, show_header=False, pad_edge=False)
        for check in self.all_checks():
            word, style = MARKS[check.status]
            # Text, not markup: a guest's words could hold markup of their own
            table.add_row(Text(word, style=style), Text(check.name), Text(check.detail, style="dim"))
        console.print(table)
        if self.example is not None:
            console.print(Panel(Text("\n".join(self.example.lines())), title="one DMA", expand=False))
        facts = Table(box=None, show_header=False, pad_edge=False)
        for pasid, figures in self.pasids.items():
            facts.add_row(f"pasid {pasid}", Text(_counted(figures), style="dim"))
        for title, values in (("guest", self.guest), ("dma", self.dma)):
            if values:
                facts.add_row(title, Text(", ".join(f"{key} {value}" for key, value in values.items()), style="dim"))
        console.print(facts)
        console.print(Text(self._verdict(), style="bold green" if self.ok else "bold red"))


def guest_checks(results: ktap.Results, prefix: str = "") -> list[Check]:
    """The guest's results as checks: every leaf, every failure that no leaf explains, every contradiction."""
    checks: list[Check] = []
    for test in results.tests:
        _add(checks, test, prefix)
    checks += [Check(f"{prefix}results", "fail", problem) for problem in results.problems]
    return checks


def _add(checks: list[Check], test: ktap.Test, prefix: str) -> None:
    name = f"{prefix}{test.name or test.number}"
    before = len(checks)
    for each in test.subtests:
        _add(checks, each, f"{name}/")
    explained = any(check.status == "fail" for check in checks[before:])
    if not test.subtests or (test.status is ktap.Status.FAIL and not explained):
        checks.append(Check(name, test.status.value, f"{test.directive} {test.detail}" if _bad(test) else test.detail))


def _bad(test: ktap.Test) -> bool:
    return test.directive in {"TIMEOUT", "ERROR"}


def _counted(figures: Mapping[str, int]) -> str:
    return ", ".join(f"{value} {key}" for key, value in figures.items())


def _described(check: Check) -> str:
    return f"{check.name}: {check.detail}" if check.detail else check.name
