"""Kernel modules of guest-tests/modules, built against the headers of the kernel that the guest boots."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from backend.vm import assets
from backend.vm.cache import Cache, Made
from backend.vm.errors import CannotRun
from backend.vm.kernel_image import Kernel
from backend.vm.module_tools import ModuleTools
from backend.vm.progress import Report

SOURCES = Path(__file__).resolve().parents[2] / "guest-tests" / "modules"
BUILD_SECONDS = 300  # three on an idle host; this is a hung disk
BUILD_BYTES = 32 << 20  # 1 MB of modules, their objects with debug information meanwhile
KBUILD_REFUSES = re.compile(r"[\s:]")  # "source directory cannot contain spaces or colons" (Linux, Makefile)


def build(names: Sequence[str], kernel: Kernel, cache: Cache | None = None, sources: Path = SOURCES) -> dict[str, Path]:
    """The files of modules `names` by name, built for `kernel` unless the cache has them.

    Raises CannotRun: no such module, headers not to be had, or what the compiler said.
    """
    cache = cache or Cache()
    files = _sources(sources)
    if not names:
        return {}
    tools = assets.module_tools(kernel, cache)
    key = {"kernel": kernel.version, "tools": tools.state, "sources": _digests(files)}

    def make(entry: Path, work: Path, report: Report) -> Made:
        report("compiling")
        for name, path in files.items():
            shutil.copyfile(path, work / name)
        # the same sources give the same bytes: debug information names the folder, and is part of the build id
        flags = f"KCFLAGS=-ffile-prefix-map={work}=."
        _run([*tools.make, f"M={work}", flags, f"-j{os.cpu_count() or 1}", "modules"], tools, work)
        built = sorted(work.glob("*.ko"))
        _run([tools.strip, "--strip-debug", *map(str, built)], tools, work)
        for path in built:
            shutil.copyfile(path, entry / path.name)
        return Made({}, [path.name for path in built])

    if KBUILD_REFUSES.search(str(cache.root)):
        raise CannotRun(
            f"Kernel modules cannot be built below {cache.root}: the kernel's Makefile takes no path with a space or "
            "a colon. Set VIOASID_CACHE to another folder."
        )
    entry = cache.get("guest-modules", key, what="the guest's kernel modules", need=BUILD_BYTES, maker=make)
    found = {name: entry.path / f"{name}.ko" for name in names}
    for name, path in found.items():
        if not path.exists():
            raise CannotRun(f"{sources / 'Kbuild'} builds no module {name}. Correct the machine file's built_modules.")
    return found


def _sources(folder: Path) -> dict[str, Path]:
    try:
        return {
            path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".c", ".h", "") and path.is_file()
        }
    except OSError as error:
        raise CannotRun(f"{folder} cannot be read: {error.strerror}. Check out the project's guest-tests.") from error


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _run(argv: Sequence[str], tools: ModuleTools, work: Path) -> None:
    # what a person's shell says to make and the compiler is not meant for this build
    host = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "KBUILD", "KCFLAGS"))}
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=BUILD_SECONDS, cwd=work, env={**host, **tools.environment, "TMPDIR": str(work), "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        reason = f"the guest's kernel modules were not built within {BUILD_SECONDS} s"
        raise CannotRun(f"{reason}; see whether {work.parent} lies on a disk that works") from error
    except OSError as error:
        raise CannotRun(
            f"{argv[0]} does not run: {error.strerror}. Remove its folder to have it fetched again."
        ) from error
    if done.returncode != 0:
        said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("make"))[-3000:]
        raise CannotRun(f"{said}\nthe guest's kernel modules did not compile; correct {SOURCES}")
