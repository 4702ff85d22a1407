"""`vioasid boot` and `serve` with what they cannot use: a sentence on stderr, exit code 2, nothing left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 100


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def vioasid(*arguments: str | Path, runtime: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "backend.cli.main", *map(str, arguments)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(runtime.parent / "state")},
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], said: str, runtime: Path) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(runtime.glob("vioasid/*"))
    assert not list((runtime.parent / "state").glob("vioasid/logs/*"))


def test_an_unknown_machine(runtime: Path) -> None:
    refused(vioasid("boot", "--machine", "vax", runtime=runtime), "choose one of", runtime)


def test_memory_and_cpus_out_of_range(runtime: Path) -> None:
    refused(vioasid("boot", "--memory", "64M", runtime=runtime), "give 128M to 1T", runtime)
    refused(vioasid("boot", "--cpus", "0", runtime=runtime), "give 1 to 64", runtime)


def test_disk_files(runtime: Path, tmp_path: Path) -> None:
    refused(vioasid("boot", "--disk", tmp_path / "none", runtime=runtime), "does not exist", runtime)
    (tmp_path / "small").write_bytes(bytes(4096))
    refused(vioasid("boot", "--disk", tmp_path / "small", runtime=runtime), "less than 1 MiB", runtime)
    refused(vioasid("boot", "--disk-size", "4M", runtime=runtime), "give --disk as well", runtime)
    refused(vioasid("boot", "--disk", tmp_path, runtime=runtime), "is a folder", runtime)


def test_a_disk_of_a_size_to_be_made_is_not_left_behind(runtime: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    done = vioasid("boot", "--disk", disk, "--disk-size", "1M", "--kernel", "/etc/hostname", runtime=runtime)
    refused(done, "/etc/hostname", runtime)


def test_a_kernel_file_that_is_none(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"not a kernel" * 1000)
    refused(vioasid("boot", "--kernel", tmp_path / "kernel", runtime=runtime), "kernel", runtime)
    refused(vioasid("boot", "--kernel", tmp_path / "none", runtime=runtime), "none", runtime)
    refused(vioasid("boot", "--initrd", tmp_path / "none", runtime=runtime), "correct the path", runtime)


def test_a_socket_path_that_is_too_long(runtime: Path) -> None:
    deep = runtime / ("d" * 90)
    deep.mkdir()
    done = vioasid("boot", runtime=deep)
    assert done.returncode == 2
    assert "a Unix socket takes 107" in done.stderr


def test_no_runtime_folder(runtime: Path) -> None:
    done = vioasid("boot", runtime=runtime / "none")
    assert done.returncode == 2
    assert "set XDG_RUNTIME_DIR" in done.stderr


def test_a_second_server_of_the_same_name(runtime: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "backend.cli.main", "serve", "--json"],
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(runtime.parent / "state")},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert first.stdout is not None
        assert '"ready": true' in first.stdout.readline()
        done = vioasid("serve", runtime=runtime)
        assert done.returncode == 2
        assert "is active already" in done.stderr
        with socket.socket(socket.AF_UNIX) as client:  # the first one is not disturbed
            client.connect(str(runtime / "vioasid" / "q35-amd" / "nvme0.sock"))
    finally:
        first.terminate()
        assert first.wait(SECONDS) == 130
    assert not list(runtime.glob("vioasid/*"))
