"""The KTAP reader: hand-written runs with what they mean by the specification, trees written out here, and garbage."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.vm import ktap
from backend.vm.ktap import MAX_DEPTH, MAX_DIAGNOSTICS, MAX_PROBLEMS, MAX_TESTS, Reader, Status, read

PASS, FAIL, SKIP = Status.PASS, Status.FAIL, Status.SKIP


def of(text: str) -> list[str]:
    return text.strip("\n").split("\n")


def test_two_levels() -> None:
    results = read(
        of("""
KTAP version 1
1..2
  KTAP version 1
  1..3
  # what was seen
  ok 1 first
  not ok 2 second # it broke
  ok 3 third # SKIP no such device
# after the subtests
not ok 1 group
ok 2 alone # rcode=0
""")
    )
    assert not results.ok
    assert results.problems == ()
    group, alone = results.tests
    assert (group.name, group.status, group.diagnostics) == ("group", FAIL, ("after the subtests",))
    assert [(test.name, test.status, test.detail) for test in group.subtests] == [
        ("first", PASS, ""),
        ("second", FAIL, "it broke"),
        ("third", SKIP, "no such device"),
    ]
    assert group.subtests[0].diagnostics == ("what was seen",)
    assert (alone.status, alone.directive, alone.detail, alone.subtests) == (PASS, "", "rcode=0", ())
    assert [(name, test.status) for name, test in results.tests[0].leaves()] == [
        ("group/first", PASS),
        ("group/second", FAIL),
        ("group/third", SKIP),
    ]


@pytest.mark.parametrize(
    ("line", "status", "directive", "name", "detail"),
    [
        ("ok 1 a b c", PASS, "", "a b c", ""),
        ("ok 1", PASS, "", "", ""),
        ("ok 1 - dashed", PASS, "", "dashed", ""),
        ("ok 1 x # SKIP", SKIP, "SKIP", "x", ""),
        ("not ok 1 x # SKIP why", SKIP, "SKIP", "x", "why"),
        ("ok 1 x #skip lower", SKIP, "SKIP", "x", "lower"),
        ("ok 1 # SKIP nameless", SKIP, "SKIP", "", "nameless"),
        ("not ok 1 x # TODO later", SKIP, "TODO", "x", "expected to fail: later"),
        ("not ok 1 x # XFAIL", SKIP, "XFAIL", "x", "expected to fail"),
        ("ok 1 x # XFAIL it works now", PASS, "XFAIL", "x", "it works now"),
        ("not ok 1 x # TIMEOUT 30 seconds", FAIL, "TIMEOUT", "x", "30 seconds"),
        ("ok 1 x # ERROR contradicts itself", FAIL, "ERROR", "x", "contradicts itself"),
        ("ok 1 x # SKIPPED is no directive", PASS, "", "x", "SKIPPED is no directive"),
        ("not ok 1 x # UNKNOWN word", FAIL, "", "x", "UNKNOWN word"),
        ("[   12.345678] ok 1 from a module", PASS, "", "from a module", ""),
        ("ok 1 two # hashes # here", PASS, "", "two", "hashes # here"),
    ],
)
def test_result_lines(line: str, status: Status, directive: str, name: str, detail: str) -> None:
    results = read(["KTAP version 1", "1..1", line])
    assert results.problems == ()
    [test] = results.tests
    assert (test.status, test.directive, test.name, test.detail) == (status, directive, name, detail)


@pytest.mark.parametrize(
    "line", ["okay 1 x", "ok computer", "not ok", "notok 1", "ok 1x", "1..", "1..x", "OK 1 x", "KTAP version 2"]
)
def test_what_is_no_result_changes_nothing(line: str) -> None:
    results = read(["KTAP version 1", "1..1", line, "ok 1 x"])
    assert results.ok
    assert results.tests[0].diagnostics == (line,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no KTAP version line"),
        ("ok 1 x", "out of place"),
        ("KTAP version 1\n1..2\nok 1 x", "ended after 1 of 2 tests"),
        ("KTAP version 1\n1..1\nok 1 x\nok 2 y", "more tests than the 1 planned"),
        ("KTAP version 1\n1..2\nok 1 x\nok 3 y", "test number 3 where 2 was due"),
        ("KTAP version 1\n1..1\n1..1\nok 1 x", "a plan out of place"),
        ("KTAP version 1\nok 1 x\n1..1", "a plan out of place"),
        ("KTAP version 1\n1..1\nKTAP version 1\nok 1 x", "a second version line at level 0"),
        ("KTAP version 1\n1..1\n    KTAP version 1\nok 1 x", "a version line too far in, at level 2"),
        ("KTAP version 1\n1..1\n  not ok 1 hidden\nok 1 x", "out of place"),
        ("KTAP version 1\n1..1\n not ok 1 crooked\nok 1 x", "out of place"),
        ("KTAP version 1\n1..1\n  KTAP version 1\n  1..1\n  not ok 1 a\nok 1 x", "x says ok above a, which failed"),
        ("KTAP version 1\n1..1\n  KTAP version 1\n  1..2\n  ok 1 a\nok 1 x", "subtests ended after 1 of 2"),
        ("KTAP version 1\n1..1\n  KTAP version 1\n  1..1\n  ok 1 a", "ended after 0 of 1 tests"),
        ("KTAP version 1\n1..2\nok 1 x\nBail out! no disk", "bailed out: no disk"),
    ],
)
def test_contradictions_never_pass(text: str, problem: str) -> None:
    results = read(text.split("\n"))
    assert not results.ok
    assert any(problem in each for each in results.problems), results.problems


def test_a_parent_above_a_failure_fails() -> None:
    results = read(of("KTAP version 1\n1..1\n  KTAP version 1\n  1..1\n  not ok 1 a\nok 1 x"))
    assert results.tests[0].status is FAIL


def test_subtests_that_did_not_run_are_a_failure_of_their_own() -> None:
    results = read(of("KTAP version 1\n1..1\n  KTAP version 1\n  1..3\n  ok 1 a\nnot ok 1 x # TIMEOUT 60 seconds"))
    [test] = results.tests
    assert [(each.name, each.status, each.detail) for each in test.subtests] == [
        ("a", PASS, ""),
        ("missing", FAIL, "2 of 3 subtests did not run"),
    ]


def test_what_was_read_before_the_guest_died_is_not_lost() -> None:
    results = read(of("KTAP version 1\n1..2\nok 1 x\n  KTAP version 1\n  1..2\n  ok 1 a\n# Oops"))
    assert [name for test in results.tests for name, _ in test.leaves()] == ["x", "2/a"]
    assert results.tests[1].diagnostics == ("Oops",)
    assert results.tests[1].status is FAIL


def test_nothing_follows_a_bail_out() -> None:
    results = read(of("KTAP version 1\n1..3\nok 1 x\nBail out! no disk\nok 2 y"))
    assert [test.name for test in results.tests] == ["x"]
    assert results.bailed_out == "no disk"


def test_without_a_plan() -> None:
    results = read(of("TAP version 13\nok 1 x\nok 2 y"))
    assert results.ok
    assert results.planned is None


def test_a_run_of_nothing_but_skips_is_no_contradiction() -> None:
    assert read(of("KTAP version 1\n1..1\nok 1 x # SKIP no disk")).ok
    assert not read(of("KTAP version 1\n1..0")).ok  # nothing ran


def test_top_level_tests_are_handed_back_as_they_end() -> None:
    reader = Reader()
    got = [reader.feed(line) for line in of("KTAP version 1\n1..2\n  KTAP version 1\n  ok 1 a\nok 1 x\nok 2 y")]
    assert [test.name if test else None for test in got] == [None, None, None, None, "x", "y"]


@dataclass(frozen=True)
class Tree:
    name: str
    status: Status
    children: tuple[Tree, ...] = ()

    @property
    def verdict(self) -> Status:
        """A test fails if one of its subtests does."""
        return FAIL if any(child.verdict is FAIL for child in self.children) else self.status


names = st.text("abc xyz0-_/.", max_size=8).map(str.strip).filter(lambda name: not name.startswith("-"))
leaves = st.builds(Tree, names, st.sampled_from(Status))


def groups(below: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.builds(Tree, names, st.sampled_from(Status), st.lists(below, min_size=1, max_size=4).map(tuple))


trees = st.recursive(leaves, groups, max_leaves=12)
noise = st.sampled_from(
    ["", "# note", "[    1.000001] nvme0: 1/0/0 queues", "  crng init done", "\t\x07", "1.2.3", "okay"]
)


def depth(tree: Tree) -> int:
    return 1 + max((depth(child) for child in tree.children), default=0)


def written(tests: tuple[Tree, ...], level: int, noises: list[str]) -> list[str]:
    pad = "  " * level
    lines = [f"{pad}KTAP version 1", f"{pad}1..{len(tests)}"]
    for number, test in enumerate(tests, start=1):
        if noises:
            lines.append(noises.pop())
        if test.children:
            lines += written(test.children, level + 1, noises)
        word = "not ok" if test.verdict is FAIL else "ok"
        lines.append(f"{pad}{word} {number} {test.name}{' # SKIP' if test.verdict is SKIP else ''}")
    return lines


def same(test: ktap.Test, tree: Tree) -> bool:
    return (
        (test.name, test.status) == (tree.name, tree.verdict)
        and len(test.subtests) == len(tree.children)
        and all(map(same, test.subtests, tree.children))
    )


@given(st.lists(trees, min_size=1, max_size=4).map(tuple), st.lists(noise, max_size=20))
def test_any_tree_reads_back_whatever_stands_between(tests: tuple[Tree, ...], noises: list[str]) -> None:
    results = read(["SeaBIOS", *written(tests, 0, noises)])
    if max(map(depth, tests)) > MAX_DEPTH:
        assert not results.ok
        return
    assert results.problems == ()
    assert len(results.tests) == len(tests)
    assert all(map(same, results.tests, tests))
    assert results.ok == all(test.verdict is not FAIL for test in tests)


pieces = st.sampled_from(
    [
        "KTAP version 1",
        "1..2",
        "1..1",
        "ok 1 a",
        "not ok 1 b",
        "ok 2 c",
        "  ",
        " ",
        "Bail out!",
        "# x",
        "[    1.000001] ",
    ]
)
lines = st.one_of(st.lists(pieces, max_size=5).map("".join), st.text(max_size=40))


@given(st.lists(lines, max_size=60))
def test_garbage_is_read_without_an_error_and_hides_no_failure(garbage: list[str]) -> None:
    results = read(garbage)
    stripped = [line.strip() for line in garbage]
    bailed = next((i for i, line in enumerate(stripped) if line.startswith("Bail out!")), len(stripped))
    if any(line == "not ok 1 b" for line in stripped[:bailed]):
        assert not results.ok


def test_everything_that_a_guest_can_make_grow_is_bounded() -> None:
    results = read(["KTAP version 1", *["noise"] * 100_000, "ok 1 x", *(f"ok {n} y" for n in range(2, 2 * MAX_TESTS))])
    assert len(results.tests) == MAX_TESTS
    assert len(results.tests[0].diagnostics) == MAX_DIAGNOSTICS
    assert len(results.problems) <= MAX_PROBLEMS + 1
    assert any("more than" in problem for problem in results.problems)
    deep = read("  " * level + "KTAP version 1" for level in range(1000))
    assert any("levels" in problem for problem in deep.problems)
