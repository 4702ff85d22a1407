"""`vioasid ctl`, `vioasid serve --no-vm`, and finding the run that is meant."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_serving import COMMAND, SECONDS, Served, serving, vioasid

from backend.cli.values import for_json, parse, readable


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("ctl") / "s", endpoints=2) as found:
        yield found


def ctl(served: Served, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return vioasid("ctl", "--socket", str(served.path), *arguments, text=text)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("12", 12), ("0x1000", 4096), ("-1", -1), ("007", 7), ("4K", 4096), ("1G", 1 << 30), ("2MiB", 2 << 20),
        ("true", True), ("null", None), ("hex:00ff", b"\x00\xff"), ("hex:", b""), ("amd-v1", "amd-v1"), ("", ""),
        ('{"a": [1]}', {"a": [1]}), ('"12"', "12"), ("[]", []), ("a=b", "a=b"), ("4 K", "4 K"), ("1e3", "1e3"),
    ],
)  # fmt: skip
def test_values(written: str, value: Any) -> None:
    found = parse(written)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("written", ["hex:0", "hex:zz", "{", "[1,", '"'])
def test_values_that_are_wrong(written: str) -> None:
    with pytest.raises(ValueError, match=r"hex|JSON"):
        parse(written)


def test_answers_in_json_and_in_lines() -> None:
    answer = {"data": b"\x00a", "list": [1, 2], "maps": [{"rid": 256, "x": None}], "none": [], "ok": True}
    assert for_json(answer)["data"] == "hex:0061"
    assert readable(answer) == [
        "data: hex:0061", "list: 1, 2", "maps:", "  - rid: 0x100", "    x: none", "none: none", "ok: yes",
    ]  # fmt: skip
    assert readable([]) == ["(none)"] and readable({}) == ["(empty)"] and readable(b"text") == ["'text'"]


def test_one_method(served: Served) -> None:
    done = ctl(served, "ioasid.alloc", "kind=kernel", "levels=5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    done = ctl(served, "ioasid.alloc", "--json")
    assert json.loads(done.stdout) == {"method": "ioasid.alloc", "ok": True, "result": 1}


def test_a_refusal_is_a_sentence_and_exit_code_1(served: Served) -> None:
    done = ctl(served, "ioasid.free", "ioasid=9")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no IOASID 9 in this context" in done.stderr and "(ENOENT)" in done.stderr
    done = ctl(served, "ioasid.free", "ioasid=9", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, done.stderr, answer["ok"]) == (1, "", False)
    assert (answer["error"]["errno"], answer["error"]["name"]) == (2, "ENOENT")
    assert ctl(served, "no.such_method").returncode == 1


def test_lines_share_one_context_and_end_at_the_first_refusal(served: Served) -> None:
    done = ctl(served, text="ioasid.alloc\n\n# comment\nioasid.alloc # another\nioasid.free ioasid=7\nioasid.alloc\n")
    assert (done.returncode, done.stdout) == (1, "1\n2\n")
    done = ctl(served, "--json", text="ioasid.alloc\n-ioasid.free ioasid=7\nioasid.free ioasid=1\n")
    answers = [json.loads(line)["ok"] for line in done.stdout.splitlines()]
    assert (done.returncode, answers) == (0, [True, False, True])


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["ioasid.alloc", "kernel"], "", "write key=value"),
        (["ioasid.alloc", "a=1", "a=2"], "", "a is given twice"),
        (["ioasid.alloc", "a={"], "", "JSON"),
        (["--memory", "lots"], "", "give SIZE or SIZE@ADDRESS"),
        (["--memory", "5"], "", "whole pages"),
        ([], "ioasid.alloc 'x\n", "line 1"),
        (["--memory", "4K"], "memory.read vaddr=0 length=1\n", "lies outside"),
        (["--memory", "4K"], "memory.write vaddr=0x40000000 colour=1\n", "memory.write vaddr="),
        (["--memory", "4K"], "memory.write vaddr=0x40000000 value=-1\n", "memory.write"),
    ],
)
def test_lines_that_cannot_be_run(served: Served, arguments: list[str], text: str, said: str) -> None:
    done = ctl(served, *arguments, text=text)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_nobody_listens(tmp_path: Path) -> None:
    for verb in ("spaces", "faults"):
        done = vioasid(verb, "--socket", str(tmp_path / "none"))
        assert (done.returncode, done.stdout) == (2, "") and str(tmp_path / "none") in done.stderr
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    assert vioasid("ctl", "--socket", str(dead), "hello").returncode == 2


def test_the_run_that_is_meant(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    done = vioasid("spaces", runtime=runtime)
    assert (done.returncode, "there is none" in done.stderr) == (2, True)
    (runtime / "vioasid" / "died").mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime / "vioasid" / "died" / "control.sock"))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(tmp_path / "state")}
    runs = {
        name: subprocess.Popen([*COMMAND, "serve", "--no-vm", "--name", name], stdout=subprocess.PIPE, env=environment)
        for name in ("one", "two")
    }
    try:
        for run in runs.values():
            assert run.stdout is not None and run.stdout.readline().startswith(b"ready ")
        done = vioasid("ctl", "vm.status", runtime=runtime)
        assert (done.returncode, "there are one, two; give --name" in done.stderr) == (2, True)
        done = vioasid("ctl", "vm.status", "--name", "two", "--json", runtime=runtime)
        assert json.loads(done.stdout)["result"]["kind"] == "engine"
        assert "no run is called 'three'" in vioasid("spaces", "--name", "three", runtime=runtime).stderr
        runs["one"].send_signal(signal.SIGINT)
        assert runs["one"].wait(SECONDS) == 0
        assert vioasid("spaces", runtime=runtime).returncode == 0
    finally:
        for run in runs.values():
            run.terminate()
            run.communicate(timeout=SECONDS)
    assert [path.name for path in (runtime / "vioasid").iterdir()] == ["died"]


def test_serve_no_vm_says_what_will_not_do(tmp_path: Path, served: Served) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        (served.path, "is served by another process"),
        (tmp_path / "file", "is no socket"),
        (tmp_path / ("x" * 120), "use a shorter folder"),
    ):
        done = vioasid("serve", "--no-vm", "--socket", str(path))
        assert (done.returncode, done.stdout, said in done.stderr) == (2, "", True), done.stderr
    assert vioasid("serve", "--no-vm", "--endpoints", "0", "--socket", str(tmp_path / "s")).returncode == 2
    assert vioasid("serve", "--socket", str(tmp_path / "s")).returncode == 2
    assert not (tmp_path / "s").exists()


def test_serve_no_vm_with_a_command(tmp_path: Path) -> None:
    path = tmp_path / "s"
    inner = [*COMMAND, "ctl", "--socket", str(path), "ioasid.alloc"]
    done = vioasid("serve", "--no-vm", "--socket", str(path), "--", *inner)
    assert (done.returncode, done.stdout) == (0, "1\n")
    done = vioasid("serve", "--no-vm", "--socket", str(path), "--", sys.executable, "-c", "raise SystemExit(7)")
    assert done.returncode == 7 and not path.exists()


def test_a_killed_servers_socket_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [*COMMAND, "serve", "--no-vm", "--socket", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline()
        first.kill()
        first.wait()
    deadline = time.monotonic() + SECONDS
    while vioasid("ctl", "--socket", str(path), "hello").returncode != 2:  # its child ends a moment later
        assert time.monotonic() < deadline
    with serving(path) as again, again.client() as client:
        assert client.call("vm.status")["kind"] == "engine"
