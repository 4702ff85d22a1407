"""A QEMU that can be a vfio-user client: the host's own where it fits, else one unpacked from Debian packages."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST = (10, 1)
"""The release that brought vfio-user-pci (QEMU 10.1 change log)."""

PROGRAM = "qemu-system-x86_64"
ANSWER_SECONDS = 30
"""Far more than --version takes on a busy host."""


@dataclass(frozen=True, slots=True)
class Qemu:
    argv: Sequence[str]
    """Program and first arguments; the machine's own arguments follow."""
    version: str
    source: str
    """"host" or "cache"."""


class Unfit(Exception):
    """This QEMU cannot be used; the message says why."""


class DoesNotRun(Unfit):
    """The program cannot even be started here."""


def check(argv: Sequence[str]) -> str:
    """The version of the QEMU started by `argv`. Raises Unfit when it does not run or cannot be a vfio-user client."""
    text = _ask([*argv, "--version"])
    found = re.search(r"version (\d+)\.(\d+)(\.\d+)*", text)
    if not found:
        raise Unfit(f"{argv[0]} is no QEMU")
    version = found[0].removeprefix("version ")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise Unfit(f"QEMU {version} has no vfio-user-pci, {OLDEST[0]}.{OLDEST[1]} is the first that has")
    if '"vfio-user-pci"' not in _ask([*argv, "-device", "help"]):
        raise Unfit(f"QEMU {version} is built without vfio-user-pci")
    return version


def find_host() -> Qemu:
    """The QEMU of the host's PATH. Raises Unfit."""
    path = shutil.which(PROGRAM)
    if not path:
        raise Unfit("no QEMU is installed")
    return Qemu([path], check([path]), "host")


def unpacked_argv(root: Path) -> list[str]:
    """How to run the QEMU below `root` by its own loader and libraries. Raises Unfit when a part is not there.

    Its libraries are newer than the host's, and programs unpacked side by side share no C library: the loader is named.
    """
    program = root / "usr/bin" / PROGRAM
    loader = next(iter(sorted(root.glob("usr/lib/*-linux-gnu*/ld-linux*.so*"))), None)
    if not program.exists() or not loader:
        raise Unfit(f"{root} holds no QEMU")
    argv = [str(loader), "--library-path", str(loader.parent), str(program)]
    for folder in ("usr/share/qemu", "usr/share/seabios"):
        argv += ["-L", str(root / folder)]
    return argv


def wanted(path: str) -> bool:
    """Whether a member of the packages is needed to run QEMU: the program, libraries, firmware."""
    if re.fullmatch(r"usr/lib/[^/]+-linux-gnu[^/]*/[^/]+\.so(\.[^/]*)?", path):
        return True
    return path == f"usr/bin/{PROGRAM}" or path.startswith(("usr/share/qemu/", "usr/share/seabios/"))


def _ask(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", check=False, timeout=ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DoesNotRun(f"{argv[0]} does not run: {error}") from error
    if done.returncode != 0:
        raise DoesNotRun(f"{argv[0]} does not run: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
