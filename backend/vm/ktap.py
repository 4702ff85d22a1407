"""A reader of the Kernel Test Anything Protocol, version 1: lines in, tests out.

Linux, Documentation/dev-tools/ktap.rst.

The writer is a guest and may say anything. A line that is no KTAP is kept as a diagnostic of the next result, and what
contradicts itself (a plan not fulfilled, a parent that is "ok" above a failure, a result out of place) is a problem,
with which no run passes.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

MAX_TESTS = 4096  # results of one run, at all levels; ours has forty, a kernel suite a few hundred
MAX_DEPTH = 8  # levels of nesting; KUnit uses three
MAX_DIAGNOSTICS = 100  # lines kept before a result: the last ones, which tell why
MAX_PROBLEMS = 50  # more say nothing new

_VERSION = re.compile(r"(?:KTAP version 1|TAP version 1[34])\s*")
_PLAN = re.compile(r"1\.\.(\d{1,6})(?:\s*#\s*(.*))?")
_RESULT = re.compile(r"(ok|not ok) (\d{1,6})(?![^ #])")
_DIRECTIVE = re.compile(r"(SKIP|TODO|XFAIL|TIMEOUT|ERROR)\b:?\s*(.*)", re.IGNORECASE)
_BAIL_OUT = re.compile(r"Bail out!\s*(.*)")
_PRINTK_TIME = re.compile(r"\[ *\d+\.\d{6}\] ")  # results that a kernel module prints bear the console's time stamp


class Status(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Test:
    """One result line, with what stood before it. `detail` is the text after '#', without its directive."""

    number: int
    name: str
    status: Status
    directive: str = ""
    detail: str = ""
    diagnostics: tuple[str, ...] = ()
    subtests: tuple[Test, ...] = ()

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Test]]:
        """The tests that have no subtests, each with its name as a path ("iommu/group-type")."""
        name = f"{prefix}{self.name or self.number}"
        if not self.subtests:
            yield name, self
        for test in self.subtests:
            yield from test.leaves(f"{name}/")


@dataclass(frozen=True, slots=True)
class Results:
    """A whole run. `planned` is None where no plan was given."""

    tests: tuple[Test, ...]
    planned: int | None
    problems: tuple[str, ...]
    bailed_out: str | None = None

    @property
    def ok(self) -> bool:
        """At least one result, none failed, and nothing that contradicts itself."""
        return bool(self.tests) and not self.problems and all(test.status is not Status.FAIL for test in self.tests)


@dataclass(slots=True)
class _Level:
    """Results at one indentation, from their version line on."""

    planned: int | None = None
    tests: list[Test] = field(default_factory=list)


class Reader:
    """Takes one run's lines in their order. `feed` hands back a top-level test as soon as its result line has come."""

    def __init__(self) -> None:
        self._levels: list[_Level] = []
        self._finished: list[Test] | None = None  # subtests of the result line that has to come
        self._diagnostics: deque[str] = deque(maxlen=MAX_DIAGNOSTICS)
        self._problems: list[str] = []
        self._count = 0
        self._bailed_out: str | None = None

    def feed(self, line: str) -> Test | None:
        """One line, without its line end."""
        text = _PRINTK_TIME.sub("", line.rstrip(), count=1) if _PRINTK_TIME.match(line) else line.rstrip()
        body = text.lstrip(" ")
        level, odd = divmod(len(text) - len(body), 2)
        if self._bailed_out is not None or not body:
            return None
        if match := _BAIL_OUT.fullmatch(body):
            self._bailed_out = match[1] or "no reason given"
            self._problem(f"bailed out: {self._bailed_out}")
        elif _VERSION.fullmatch(body) and not odd:
            self._version(level)
        elif (match := _PLAN.fullmatch(body)) and not odd:
            self._plan(level, int(match[1]), body)
        elif match := _RESULT.match(body):
            return self._result(-1 if odd else level, match, body)
        elif self._levels:
            self._diagnostics.append(body.removeprefix("#").strip())
        return None

    def results(self) -> Results:
        """What was read so far, as the end: what is missing becomes a problem."""
        problems = list(self._problems)
        top = self._levels[0] if self._levels else _Level()
        if not self._levels:
            problems.append("no KTAP version line")
        for depth, level in enumerate(self._levels):
            where = f" at level {depth}" if depth else ""
            if self._bailed_out is None and level.planned is not None and len(level.tests) < level.planned:
                problems.append(f"ended after {len(level.tests)} of {level.planned} tests{where}")
            elif depth and level.tests:
                problems.append(f"ended within the subtests of level {depth}")
        if self._finished is not None:
            problems.append("ended before the result of a test whose subtests had ended")
        unfinished = self._unfinished()
        return Results((*top.tests, *unfinished), top.planned, tuple(problems), self._bailed_out)

    def _unfinished(self) -> tuple[Test, ...]:
        """Subtests whose parent's result never came, under a failed parent made for them: nothing read is lost."""
        inner: tuple[Test, ...] = tuple(self._finished or ())
        for level in reversed(self._levels[1:]):
            number = len(level.tests) + 1
            made = (Test(number, "", Status.FAIL, detail="ended without a result", subtests=inner),) if inner else ()
            inner = (*level.tests, *made)
        number = len(self._levels[0].tests) + 1 if self._levels else 1
        last = tuple(self._diagnostics)
        return (Test(number, "", Status.FAIL, "", "ended without a result", last, inner),) if inner else ()

    def _version(self, level: int) -> None:
        if level != len(self._levels):
            what = "a second version line at" if level < len(self._levels) else "a version line too far in, at"
            self._problem(f"{what} level {level}")
        elif level >= MAX_DEPTH:
            self._problem(f"more than {MAX_DEPTH} levels of subtests")
        elif self._finished is not None:
            self._problem("subtests twice before one result")
        else:
            self._levels.append(_Level())

    def _plan(self, level: int, planned: int, line: str) -> None:
        current = self._levels[-1] if self._levels else None
        if current is None or level != len(self._levels) - 1 or current.planned is not None or current.tests:
            self._problem(f"a plan out of place: {line}")
        else:
            current.planned = planned

    def _result(self, level: int, match: re.Match[str], line: str) -> Test | None:
        self._count += 1
        depth = len(self._levels) - 1
        if self._count > MAX_TESTS:
            self._problem(f"more than {MAX_TESTS} results")
            return None
        if not 0 <= level <= depth or (level < depth - 1) or (level < depth and self._finished is not None):
            self._problem(f"a result out of place: {line}")
            return None
        if level < depth:  # the result of the test whose subtests these were
            self._close()
        current = self._levels[-1]
        test = self._test(match, line, tuple(self._finished or ()))
        self._finished = None
        self._diagnostics.clear()
        if test.number != len(current.tests) + 1:
            self._problem(f"test number {test.number} where {len(current.tests) + 1} was due: {line}")
        if current.planned is not None and len(current.tests) == current.planned:
            self._problem(f"more tests than the {current.planned} planned: {line}")
        current.tests.append(test)
        return test if level == 0 else None

    def _close(self) -> None:
        ended = self._levels.pop()
        if ended.planned is not None and len(ended.tests) < ended.planned:
            self._problem(f"subtests ended after {len(ended.tests)} of {ended.planned}")
            missing = f"{ended.planned - len(ended.tests)} of {ended.planned} subtests did not run"
            ended.tests.append(Test(len(ended.tests) + 1, "missing", Status.FAIL, detail=missing))
        self._finished = ended.tests

    def _test(self, match: re.Match[str], line: str, subtests: tuple[Test, ...]) -> Test:
        word, number = match[1], int(match[2])
        name, _, tail = line[match.end() :].partition("#")
        name, tail = name.strip().removeprefix("- "), tail.strip()
        status = Status.PASS if word == "ok" else Status.FAIL
        directive, detail = "", tail
        if found := _DIRECTIVE.fullmatch(tail):
            directive, detail = found[1].upper(), found[2]
        if directive == "SKIP":
            status = Status.SKIP
        elif directive in {"TODO", "XFAIL"} and status is Status.FAIL:
            status, detail = Status.SKIP, f"expected to fail: {detail}".removesuffix(": ")
        elif directive in {"TIMEOUT", "ERROR"}:
            status = Status.FAIL
        failed = [test for test in subtests if test.status is Status.FAIL]
        if failed and status is not Status.FAIL:
            self._problem(f"{name or number} says {word} above {failed[0].name or failed[0].number}, which failed")
            status = Status.FAIL
        return Test(number, name, status, directive, detail, tuple(self._diagnostics), subtests)

    def _problem(self, text: str) -> None:
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(text)


def read(lines: Iterable[str]) -> Results:
    """All of a run at once."""
    reader = Reader()
    for line in lines:
        reader.feed(line)
    return reader.results()
