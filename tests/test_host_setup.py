"""tools/host-setup.sh: names what is missing, installs it as root, and prints the command to anybody else."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "host-setup.sh"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with nothing but what is put there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mktemp", "rm", "tail"):
        (folder / name).symlink_to(str(shutil.which(name)))
    add(folder, "python3", 'case "$2" in *sys.executable*) echo /the/python ;; esac')
    return folder


def add(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path), "TMPDIR": str(path.parent)}
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_a_user_is_told_the_command(path: Path) -> None:
    add(path, "id", "echo 1000")
    add(path, "apt-get", f"touch {path}/called")
    done = run(path)
    assert done.returncode == 2
    assert done.stdout == ""
    command = done.stderr.splitlines()[-1]
    assert command.startswith("vioasid:   sudo apt-get install --no-install-recommends ")
    for package in ("gcc", "libc6-dev", "libjson-c-dev", "mmdebstrap", "xz-utils"):
        assert package in command.split()
    assert not (path / "called").exists()


def test_root_installs_with_fresh_lists_where_the_old_do_not_do(path: Path) -> None:
    log = path.parent / "log"
    add(path, "id", "echo 0")
    programs = " ".join(f"{path}/{name}" for name in ("cc", "mmdebstrap", "xz", "setpriv"))
    add(
        path,
        "apt-get",
        f"""echo "$@" >> {log}
case "$1" in
    update) : > {path}/updated ;;
    install) [ -e {path}/updated ] || {{ echo "E: Unable to locate package" >&2; exit 100; }}
        for program in {programs}; do printf '#!/bin/sh\\n' > $program; /bin/chmod +x $program; done ;;
esac""",
    )
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "/the/python\n"
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["install", "update", "install"]


def test_an_installation_that_fails_shows_why(path: Path) -> None:
    add(path, "id", "echo 0")
    add(path, "apt-get", "echo 'E: Could not resolve host'; exit 100")
    done = run(path)
    assert done.returncode == 2
    assert "E: Could not resolve host" in done.stderr
    assert "apt-get install --no-install-recommends" in done.stderr.splitlines()[-1]


def test_a_system_of_another_kind(path: Path) -> None:
    done = run(path)
    assert done.returncode == 2
    assert "mmdebstrap" in done.stderr


def test_it_leaves_no_file(path: Path) -> None:
    before = set(os.listdir(path.parent))
    add(path, "id", "echo 0")
    add(path, "apt-get", "exit 100")
    run(path)
    assert set(os.listdir(path.parent)) == before


def test_the_fuzzer_is_asked_for_by_fuzzing_alone(path: Path) -> None:
    add(path, "id", "echo 1000")
    add(path, "apt-get", "exit 100")
    assert "clang" not in run(path).stderr
    command = run(path, "fuzz").stderr.splitlines()[-1]
    assert command.endswith(" clang libclang-rt-dev")
    add(path, "clang", "exit 0")
    assert "clang" not in run(path, "fuzz").stderr
