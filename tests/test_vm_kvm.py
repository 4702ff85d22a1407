"""KVM is used only after a kernel was seen to boot under it; each way to fail ends in TCG, said aloud."""

import os
import time
from pathlib import Path

import pytest
from fake_programs import FakePrograms

from backend.vm import kvm
from backend.vm.cache import Cache
from backend.vm.errors import CannotRun
from backend.vm.kernel_image import Kernel
from backend.vm.kvm import choose, probe
from backend.vm.qemu_binary import Qemu

KERNEL = Kernel(Path("/boot/vmlinuz-test"), None, "6.12.1-test", "cache")

BOOTS = "echo 'Linux version 6.12.1-test'; echo 'Kernel panic - not syncing'"
FAILS = """echo 'Linux version 6.12.1-test'
echo 'KVM internal error. Suberror: 1' >&2; echo 'emulation failure' >&2; exec sleep 60"""
HANGS = "exec sleep 60"
DIES = "echo 'qemu: failed to initialize kvm: Device or resource busy' >&2; exit 1"


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(kvm, "DEVICE", path)
    monkeypatch.setattr(kvm, "PROBE_SECONDS", 1)
    return path


def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> tuple[Qemu, FakePrograms]:
    programs = FakePrograms(tmp_path / "bin", monkeypatch)
    return Qemu([str(programs.add("qemu", script))], "11.1.3", "host"), programs


def test_no_device(tmp_path: Path, device: Path) -> None:
    device.unlink()
    cache, anything = Cache(tmp_path / "cache"), Qemu(["/nothing"], "0", "host")
    assert not probe(anything, KERNEL, cache).works
    assert choose("auto", anything, KERNEL, cache) == kvm.Accelerator(
        "tcg", "no KVM here: the guest runs under TCG, slower"
    )
    with pytest.raises(CannotRun, match=r"KVM does not work here: .* does not exist"):
        choose("kvm", anything, KERNEL, cache)


def test_a_device_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path)  # a folder cannot be opened for writing, not even by root
    state = probe(Qemu(["/nothing"], "0", "host"), KERNEL, Cache(tmp_path / "cache"))
    assert (state.works, state.exists) == (False, True)
    assert "cannot be opened" in state.reason


def test_a_kernel_that_boots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, programs = qemu(tmp_path, monkeypatch, BOOTS)
    assert choose("auto", machine, KERNEL, Cache(tmp_path / "cache")) == kvm.Accelerator("kvm", "")
    arguments = programs.calls("qemu").splitlines()
    assert arguments[arguments.index("-accel") + 1] == "kvm"
    assert arguments[arguments.index("-kernel") + 1] == str(KERNEL.vmlinuz)


@pytest.mark.parametrize(
    ("script", "reason", "limit"),
    [
        (FAILS, "KVM internal error. Suberror: 1, emulation failure", 2),
        (DIES, "qemu: failed to initialize kvm: Device or resource busy", 2),
        (HANGS, kvm.TOO_SLOW, 3),
        ("exit 0", "QEMU ended without a word", 2),
    ],
)
def test_a_kernel_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str, limit: float
) -> None:
    machine, _ = qemu(tmp_path, monkeypatch, script)
    cache, began = Cache(tmp_path / "cache"), time.monotonic()
    state = probe(machine, KERNEL, cache)
    assert time.monotonic() - began < limit
    assert (state.works, state.exists, state.reason) == (False, True, reason)
    chosen = choose("auto", machine, KERNEL, cache)
    assert chosen.name == "tcg"
    assert f"exists and does not work ({reason})" in chosen.note
    with pytest.raises(CannotRun, match=r"--accel tcg"):
        choose("kvm", machine, KERNEL, cache)


def test_asked_once_for_each_boot_qemu_and_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, programs = qemu(tmp_path, monkeypatch, BOOTS)
    cache = Cache(tmp_path / "cache")

    def runs() -> int:
        return programs.calls("qemu").count("-accel\n")

    for _ in range(3):
        assert probe(machine, KERNEL, cache).works
    assert runs() == 1
    probe(Qemu(machine.argv, "12.0.0", "host"), KERNEL, cache)
    assert runs() == 2
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another boot\n")
    monkeypatch.setattr(kvm, "BOOT_ID", boot_id)
    probe(machine, KERNEL, cache)
    assert runs() == 3
    (cache.root / "kvm.json").write_text("{")
    probe(machine, KERNEL, cache)
    assert runs() == 4


def test_tcg_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, programs = qemu(tmp_path, monkeypatch, BOOTS)
    assert choose("tcg", machine, KERNEL, Cache(tmp_path)).name == "tcg"
    assert programs.calls("qemu") == ""


def test_a_probe_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _ = qemu(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid\n{HANGS}")
    probe(machine, KERNEL, Cache(tmp_path / "cache"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
