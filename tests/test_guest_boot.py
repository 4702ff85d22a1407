"""Stock guests behind the IOMMU: the whole of `vioasid boot --full`, and each way in which a run can end early."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

COMMAND = [sys.executable, "-m", "backend.cli.main"]
BOOTS = ("boot", "reboot", "second-qemu-strict", "two-cpus-4-gib")
V2_BOOTS = ("v2-4-levels", "v2-5-levels")
# what the guest itself says of translation, of its data, and of DMA that it did not allow
CHECKS = (
    "iommu/group-type", "data/read-back", "data/host-copy", "filesystem/check", "filesystem/compare",
    "isolation/never-mapped", "isolation/never-mapped-logged", "isolation/unmapped", "isolation/unmapped-logged",
    "isolation/page-unchanged", "isolation/bus-master", "log/faults", "log/iommu-commands", "log/nvme",
    "dma/translated", "dma/bypassed", "dma/tables",
)  # fmt: skip


@dataclass
class Place:
    """Folders of one run's own, so that what it leaves can be seen."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_RUNTIME_DIR": str(self.root / "run"), "XDG_STATE_HOME": str(self.root / "state")}

    def sockets(self) -> list[Path]:
        return list((self.root / "run").glob("vioasid/*/*"))

    def processes(self) -> list[int]:
        """Processes whose command line names this place: QEMU and whatever else was started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.root).encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def logs(self) -> list[Path]:
        return list((self.root / "state").glob("vioasid/logs/*/*"))

    def nothing_left(self) -> None:
        assert self.sockets() == []
        assert self.processes() == []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "run").mkdir()
    return Place(tmp_path)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Place]:
    root = tmp_path_factory.mktemp("full")
    (root / "run").mkdir()
    place = Place(root)
    return (
        subprocess.run(
            [*COMMAND, "boot", "--full", "--json"],
            env=place.environment, capture_output=True, text=True, check=False, timeout=390,
        ),
        place,
    )  # fmt: skip


@contextlib.contextmanager
def started(place: Place, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "boot", *arguments],
        env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until_the_guest_runs(process: subprocess.Popen[str], place: Place, seconds: float = 100) -> int:
    """QEMU's pid, once the guest's kernel writes to its console."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for console in (place.root / "state").glob("vioasid/logs/*/boot-console.log"):
            if b"Linux version" in console.read_bytes():
                (qemu,) = [pid for pid in place.processes() if b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes()]
                return qemu
        time.sleep(0.05)
    pytest.fail(f"no guest ran within {seconds} s: {process.communicate()[1] if process.poll() is not None else ''}")


def test_every_check_of_every_boot_passes(full: tuple[subprocess.CompletedProcess[str], Place]) -> None:
    done, place = full
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["ok"] is True
    status = {check["name"]: check["status"] for check in report["checks"]}
    for boot in BOOTS:
        for check in CHECKS:
            assert status.get(f"{boot}/{check}") == "pass", f"{boot}/{check}"
    for boot in V2_BOOTS:
        for check in (each for each in CHECKS if not each.startswith("filesystem/")):
            assert status.get(f"{boot}/{check}") == "pass", f"{boot}/{check}"
    assert "fail" not in status.values()
    assert "skip" not in status.values()
    assert report["log_dir"] is None
    assert place.logs() == []
    place.nothing_left()


def test_what_the_guests_were(full: tuple[subprocess.CompletedProcess[str], Place]) -> None:
    report = json.loads(full[0].stdout)
    details = {check["name"]: check["detail"] for check in report["checks"]}
    assert details["boot/iommu/group-type"].endswith("of type DMA-FQ")
    assert details["second-qemu-strict/iommu/group-type"].endswith(
        "of type DMA"
    )  # iommu.strict=1, in Linux's own words
    assert "on each of 2 CPUs" in details["two-cpus-4-gib/queues/depth-1-size-4096"]
    assert details["boot/dma/tables"].startswith("amd-v1, 3 levels, over ours: ")
    assert details["v2-4-levels/dma/tables"].startswith("x86, 4 levels, over ours: ")
    assert details["v2-5-levels/dma/tables"].startswith("x86, 5 levels, over ours: ")
    assert "intremap=off" in report["guest"]["command_line"]


def test_dma_went_through_the_guests_tables(full: tuple[subprocess.CompletedProcess[str], Place]) -> None:
    dma = json.loads(full[0].stdout)["dma"]
    # six boots, each writing and reading 64 MiB in requests of at most 1 MiB
    assert dma["translations"] >= 6 * 128
    assert dma["bytes"] >= 6 * (128 << 20)
    assert 0 < dma["moved"] <= dma["translations"]
    assert dma["bypassed"] == 0
    assert dma["faults"] == 6 * 4  # a write and a read, at an address never mapped and at one unmapped
    example = dma["example"]
    assert int(example["iova"], 16) != int(example["gpa"], 16)


def test_ctrl_c_ends_everything(place: Place) -> None:
    with started(place) as process:
        until_the_guest_runs(process, place)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in said
    place.nothing_left()


def test_a_killed_run_takes_qemu_with_it(place: Place) -> None:
    with started(place) as process:
        until_the_guest_runs(process, place)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while place.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert place.processes() == []


def test_a_dead_qemu_is_a_lost_vm(place: Place) -> None:
    with started(place, "--json") as process:
        os.kill(until_the_guest_runs(process, place), signal.SIGKILL)
        out, said = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "the VM was lost (qemu): QEMU ended by SIGKILL" in said
    assert json.loads(out)["ok"] is False
    assert Path(json.loads(out)["log_dir"], "boot-console.log") in place.logs()
    place.nothing_left()


def test_a_guest_that_panics_is_a_lost_vm(place: Place) -> None:
    with started(place, "--append", "rdinit=/none init=/none root=/dev/none") as process:
        _, said = process.communicate(timeout=100)
    assert process.returncode == 3
    assert "the VM was lost (guest): the guest's kernel died: Kernel panic - not syncing" in said
    assert str(place.logs()[0].parent) in said
    place.nothing_left()


def test_a_backend_that_crashes_is_a_lost_vm(place: Place) -> None:
    with started(place, "--json") as process:
        qemu = until_the_guest_runs(process, place)
        status = Path(f"/proc/{qemu}/status").read_text()
        backend = int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))
        assert backend != process.pid
        os.kill(backend, signal.SIGSEGV)
        out, said = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "the VM was lost (backend): the backend process died by SIGSEGV" in said
    assert json.loads(out)["ok"] is False
    place.nothing_left()


def test_a_remembered_placement_that_is_wrong_is_told_and_forgotten(place: Place, tmp_path: Path) -> None:
    """With a cache folder of its own that shares all but what was remembered."""
    from backend.vm.cache import cache_dir  # noqa: PLC0415  # read when the test runs, after its environment is set

    own = tmp_path / "cache"
    own.mkdir()
    for entry in cache_dir().iterdir():
        if entry.name not in {"placements", "ivrs"}:
            (own / entry.name).symlink_to(entry)
    environment = {**place.environment, "VIOASID_CACHE": str(own)}
    # the dry run learns the address
    line = subprocess.run(
        [*COMMAND, "boot", "--dry-run"], env=environment, capture_output=True, text=True, check=True, timeout=100
    )
    (remembered,) = (own / "placements").iterdir()
    kept = json.loads(remembered.read_text())
    true = kept["bars"]["iommu"]
    assert line.stdout.count("\n") == 1
    remembered.write_text(json.dumps({**kept, "bars": {"iommu": true + 0x10000}}))
    done = subprocess.run([*COMMAND, "boot"], env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2, done.stderr
    assert f"stand at {true:#x}" in done.stderr
    assert not remembered.exists()
    place.nothing_left()


def test_the_line_of_a_dry_run_runs(place: Place) -> None:
    dry = subprocess.run(
        [*COMMAND, "boot", "--dry-run"], env=place.environment, capture_output=True, text=True, check=True, timeout=100
    )
    assert place.sockets() == []
    words = shlex.split(dry.stdout)
    assert "-device" in words
    process = subprocess.Popen(
        shlex.split(dry.stdout),
        env=place.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = []
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "Here is a shell" in line:
                process.stdin.write("exit\n")
                process.stdin.flush()
        assert process.wait(60) == 0, "".join(said[-20:])
    finally:
        process.kill()
    results = "".join(said)
    assert "type DMA-FQ" in results
    assert "not ok" not in results
    assert "ok 1 iommu" in results
    place.nothing_left()


def test_a_qemu_that_does_not_share_its_memory(place: Place) -> None:
    dry = subprocess.run(
        [*COMMAND, "boot", "--dry-run"], env=place.environment, capture_output=True, text=True, check=True, timeout=100
    )
    assert ",share=on" in dry.stdout
    done = subprocess.run(
        shlex.split(dry.stdout.replace(",share=on", ",share=off")),
        env=place.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "share=on and -machine memory-backend=ram" in done.stderr
    place.nothing_left()
