"""The guest's scripts: what lib.sh writes is read back by the KTAP reader, and its questions find their own answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from backend.vm import ktap
from backend.vm.guest_lines import Question, decode_line
from backend.vm.guest_protocol import Answer
from backend.vm.initramfs import GUEST_TESTS

SCRIPTS = sorted([GUEST_TESTS / "init", *GUEST_TESTS.glob("**/*.sh")])
BASH = shutil.which("bash") or ""  # the shell at hand that knows what busybox's knows: ${x//a/b}, read -t, local

pytestmark = pytest.mark.skipif(not BASH, reason="install bash")


def shell(tmp_path: Path, script: str, answers: bytes = b"") -> tuple[int, list[str]]:
    """Runs `script` with lib.sh; the host's answers stand ready. The status, and what went to the host."""
    said, heard = tmp_path / "said", tmp_path / "heard"
    heard.write_bytes(answers)
    with said.open("wb") as out, heard.open("rb") as answer:
        os.set_inheritable(out.fileno(), True)
        os.set_inheritable(answer.fileno(), True)
        redirected = f"exec 3>&{out.fileno()} 4<&{answer.fileno()}; . {GUEST_TESTS}/lib.sh; {script}"
        done = subprocess.run(
            [BASH, "-c", redirected],
            env={"PATH": os.environ["PATH"], "STATE": str(tmp_path), "HOST": "yes"},
            pass_fds=[out.fileno(), answer.fileno()],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, said.read_text().splitlines()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(path: Path) -> None:
    done = subprocess.run([BASH, "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_verb_that_a_script_calls_is_there() -> None:
    table = (GUEST_TESTS / "programs" / "main.c").read_text()
    verbs = set(re.findall(r'^\t\{ "([a-z0-9-]+)",', table, re.MULTILINE))
    code = "\n".join(re.sub(r"#.*", "", path.read_text()) for path in SCRIPTS)
    called = set(re.findall(r"\bguest ([a-z][a-z0-9-]*)", code))
    assert called
    assert called <= verbs


def test_every_check_promises_as_many_results_as_it_skips() -> None:
    """`skip_all` and the plan of a file must agree, or a guest without a disk breaks its own plan."""
    compared = set()
    for path in GUEST_TESTS.glob("checks/*.sh"):
        text = path.read_text()
        names = re.search(r"^names=\"([^\"$]+)\"", text, re.MULTILINE)
        needed = re.search(r"^need_disk (?:\$\(\(.*\)\)|\S+) (?:\$names|([a-z -]+))$", text, re.MULTILINE)
        plan = re.search(r"^plan (\d+)", text, re.MULTILINE)
        if needed and plan:
            words = needed[1] or (names[1] if names else "")
            assert len(words.split()) == int(plan[1]), path.name
            compared.add(path.stem)
    assert compared == {"20-data", "40-blocks", "50-filesystem", "60-isolation"}  # others count as they go


def test_results_read_back(tmp_path: Path) -> None:
    status, lines = shell(
        tmp_path,
        r"""
        plan 6
        diag "two
        lines # and a hash"
        pass alone
        pass noted "64 MiB #1"
        fail broken "it
broke"
        skip absent "no such device"
        outcome 3 odd "open: No such file"
        outcome 4 unsupported "not here"
        finish
        """,
    )
    assert status == 1
    results = ktap.read(["KTAP version 1", "1..1", *lines, "not ok 1 group"])
    assert results.problems == ()
    tests = results.tests[0].subtests
    assert [(test.name, test.status, test.detail) for test in tests] == [
        ("alone", ktap.Status.PASS, ""),
        ("noted", ktap.Status.PASS, "64 MiB .1"),
        ("broken", ktap.Status.FAIL, "it broke"),
        ("absent", ktap.Status.SKIP, "no such device"),
        ("odd", ktap.Status.FAIL, "status 3: open: No such file"),
        ("unsupported", ktap.Status.SKIP, "not here"),
    ]
    assert tests[0].diagnostics == ("two         lines . and a hash",)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("plan 1; pass a; finish", 0),
        ("plan 2; pass a; skip b why; finish", 0),
        ("plan 2; skip a why; skip b why; finish", 4),
        ("plan 2; skip a why; fail b why; finish", 1),
        ("skip_all why a b c", 4),
        ("DISK=; need_disk 1 a b", 4),
        ("DISK=/dev/x DISK_BYTES=100; need_disk 101 a b", 4),
        ("DISK=/dev/x DISK_BYTES=100; need_disk 100 a b; plan 1; pass a; finish", 0),
    ],
)
def test_how_a_check_ends(tmp_path: Path, script: str, status: int) -> None:
    ended, lines = shell(tmp_path, script)
    assert ended == status
    word = "ok" if status != 1 else "not ok"
    results = ktap.read(["KTAP version 1", "1..1", *lines, f"{word} 1 group"])
    assert results.problems == ()


def test_a_long_text_stays_within_a_line_of_the_protocol(tmp_path: Path) -> None:
    _, lines = shell(tmp_path, "pass x $(printf '%05000d' 0); fact key $(printf '%05000d' 0)")
    assert [len(line) < 600 for line in lines] == [True, True]


def test_questions_and_their_answers(tmp_path: Path) -> None:
    answers = (
        b"garbage\nvioasid: answer number=99 status=ok text=another's\n"
        + Answer.ok("a b = c", device="0000:00:04.0", iova="0xfffff000").encode(1)
        + Answer.ok("late").encode(1)
        + Answer.skip("not now").encode(2)
        + Answer.fail("no").encode(3)
        + b"vioasid: answer number=4 status=strange text=\n"
    )
    script = """
        ask first a=1 b=2; echo $? "$(field device)" "$(field iova)" "$(field text)" "$(field none)" >&3
        ask second; echo $? "$(field text)" >&3
        (ask third; echo $? "$(field text)" >&3)
        ask fourth; echo $? >&3
        ask fifth; echo $? "$(field text)" >&3
    """
    status, lines = shell(tmp_path, script, answers)
    assert status == 0
    assert decode_line(lines[0].encode()) == Question(
        1, "first", {"number": "1", "question": "first", "a": "1", "b": "2"}
    )
    assert lines[1] == "0 0000:00:04.0 0xfffff000 a b = c "
    assert lines[3] == "4 not now"
    assert lines[5] == "1 no"
    assert lines[7] == "3"
    assert lines[9] == "3 the host gave no answer in 30 seconds"
    assert [decode_line(line.encode()) for line in (lines[4], lines[8])] == [
        Question(3, "third", {"number": "3", "question": "third"}),
        Question(5, "fifth", {"number": "5", "question": "fifth"}),
    ]


def test_without_a_host_questions_are_skipped(tmp_path: Path) -> None:
    status, lines = shell(tmp_path, 'HOST=; ask first; echo $? "$(field text)" >&3')
    assert (status, lines) == (0, ["4 there is no host to ask"])


def test_settings_of_the_kernel_line_are_those_that_are_documented() -> None:
    text = (GUEST_TESTS / "init").read_text()
    documented = set(re.findall(r"vioasid\.([a-z]+)=", text.split("\n\n")[0] + text.split("/bin/busybox mkdir")[0]))
    assert set(re.findall(r"\(setting ([a-z]+) ", text)) == documented
