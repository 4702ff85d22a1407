"""The doctor: every part is there, what is absent has a fix, what fails sets the exit status."""

import argparse
import json
from pathlib import Path

import pytest
from fake_programs import FakePrograms

from backend.cli import doctor as verb
from backend.vm import debian, doctor, kvm, libvfio_user
from backend.vm.cache import Cache
from backend.vm.doctor import Part, Status, all_well, examine

PARTS = [
    "python", "compiler", "core", "cache", "mirror", "mmdebstrap", "qemu", "kernel", "module-tools", "busybox",
    "libvfio-user", "memfd", "kvm", "sockets", "iasl",
]  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePrograms:
    """A machine with an empty cache and an old QEMU."""
    monkeypatch.setenv("VIOASID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIOASID_MIRROR", "http://m.example/debian")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(libvfio_user, "find_host", lambda: None)
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "no-kvm")
    keyring = tmp_path / "keys.gpg"
    keyring.touch()
    monkeypatch.setattr(debian, "KEYRING", keyring)
    programs = FakePrograms(tmp_path / "bin", monkeypatch)
    programs.add("qemu-system-x86_64", "echo QEMU emulator version 7.2.0")
    programs.add("mmdebstrap", "exit 1")
    programs.add("xz", "")
    return programs


def by_name() -> dict[str, Part]:
    return {part.name: part for part in examine()}


def command(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    verb.fill_parser(parser)
    args = parser.parse_args(argv)
    return int(args.run(args))


def test_every_part_in_order(bare: FakePrograms) -> None:
    parts = examine()
    assert [part.name for part in parts] == PARTS
    for part in parts:
        assert part.detail
        assert part.status is Status.PASS or part.fix


def test_what_is_not_fetched_yet_is_no_failure(bare: FakePrograms) -> None:
    parts = by_name()
    for name in ("qemu", "kernel", "busybox", "libvfio-user"):
        assert parts[name].status is Status.WARN
        assert "will be fetched by make boot" in parts[name].detail
    assert not Cache().root.exists()
    assert bare.calls("mmdebstrap") == ""


def test_what_builds_drivers_is_fetched_by_the_machines_that_have_some(bare: FakePrograms) -> None:
    part = by_name()["module-tools"]
    assert part.status is Status.WARN
    assert part.fix == "Run: make boot ARGS='--machine q35-amd-sva'"


def test_kvm_that_is_absent_means_tcg(bare: FakePrograms) -> None:
    part = by_name()["kvm"]
    assert part.status is Status.WARN
    assert "TCG" in part.detail


def test_kvm_that_exists_and_fails_is_a_warning(
    bare: FakePrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path)
    part = by_name()["kvm"]
    assert part.status is Status.WARN
    assert part.detail.startswith("exists and does not work: ")
    assert "kvm" in part.fix


def test_no_tools_to_fetch_with(bare: FakePrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare.folder / "mmdebstrap").unlink()
    monkeypatch.setenv("PATH", str(bare.folder))
    parts = by_name()
    assert parts["mmdebstrap"].status is Status.FAIL
    assert parts["mmdebstrap"].fix == "Run: apt-get install mmdebstrap"
    assert parts["compiler"].status is Status.FAIL
    assert "gcc" in parts["compiler"].fix
    assert parts["iasl"].status is Status.WARN


def test_a_mirror_that_is_none(bare: FakePrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIOASID_MIRROR", "nonsense")
    assert by_name()["mirror"].status is Status.FAIL


def test_a_runtime_folder_too_long_for_sockets(
    bare: FakePrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    part = by_name()["sockets"]
    assert part.status is Status.FAIL
    assert "XDG_RUNTIME_DIR" in part.fix


def test_a_cache_that_cannot_be(bare: FakePrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIOASID_CACHE", str(tmp_path / "file"))
    part = by_name()["cache"]
    assert part.status is Status.FAIL
    assert "VIOASID_CACHE" in part.fix


def test_json_and_exit_status(
    bare: FakePrograms, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(status: Status) -> dict[str, doctor.Check]:
        return {
            "one": lambda cache: Part("one", Status.PASS, "fine"),
            "two": lambda cache: Part("two", status, "so", "do"),
        }

    expected = [
        {"name": "one", "status": "PASS", "detail": "fine", "fix": ""},
        {"name": "two", "status": "WARN", "detail": "so", "fix": "do"},
    ]
    monkeypatch.setattr(doctor, "CHECKS", check(Status.WARN))
    assert command("--json") == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "parts": expected}
    assert command() == 0
    assert capsys.readouterr().out == "PASS one: fine\nWARN two: so | fix: do\n"
    monkeypatch.setattr(doctor, "CHECKS", check(Status.FAIL))
    assert command("--json") == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert command() == 1


def test_a_check_that_breaks_is_a_failure_of_its_part(bare: FakePrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cache: Cache) -> Part:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(doctor, "CHECKS", {"disk": broken, "next": lambda cache: Part("next", Status.PASS, "fine")})
    parts = examine()
    assert [(part.name, part.status) for part in parts] == [("disk", Status.FAIL), ("next", Status.PASS)]
    assert "Input/output error" in parts[0].detail
    assert not all_well(parts)
