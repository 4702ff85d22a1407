"""The core's own sources, compiled with sanitizers once for all tests that link them: walk.c takes a minute."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backend.core.build import SOURCES

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "backend" / "core"
BUILD = ROOT / "build" / "sanitized"
COMPILER = shutil.which("gcc") or shutil.which("cc")
FLAGS = (
    "-std=gnu11", "-O1", "-g", "-fno-var-tracking", "-Wall", "-Wextra", "-Werror", "-pthread",
    "-fno-sanitize-recover=all", f"-I{CORE}",
)  # fmt: skip


class NoSanitizer(Exception):
    """The compiler cannot build for these sanitizers; its words."""


def core_objects(sanitizers: str) -> list[str]:
    """Object files of the core for `-fsanitize=<sanitizers>`; kept until a source changes."""
    assert COMPILER is not None
    flags = [*FLAGS, f"-fsanitize={sanitizers}"]
    state = hashlib.sha256(repr((COMPILER, flags)).encode())
    for path in sorted([*CORE.rglob("*.c"), *CORE.rglob("*.h")]):
        state.update(path.read_bytes())
    folder = BUILD / sanitizers.replace(",", "-") / state.hexdigest()[:16]
    if not folder.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        unfinished = folder.with_suffix(f".{os.getpid()}")
        unfinished.mkdir(parents=True)

        def compile_one(source: str) -> str:
            made = unfinished / f"{source}.o"
            made.parent.mkdir(parents=True, exist_ok=True)
            command = [str(COMPILER), *flags, "-c", str(CORE / f"{source}.c"), "-o", str(made)]
            return subprocess.run(command, capture_output=True, text=True, check=False).stderr

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = "".join(pool.map(compile_one, sorted(SOURCES, key=lambda source: source != "walk")))
        assert not errors, errors
        unfinished.rename(folder)
    return [str(folder / f"{source}.o") for source in SOURCES]


def link(made: Path, sanitizers: str, *sources: Path, flags: tuple[str, ...] = ()) -> None:
    """Build a program of the core and `sources`. Raises: NoSanitizer."""
    command = [
        str(COMPILER), *FLAGS, f"-fsanitize={sanitizers}", *flags, "-o", str(made), *map(str, sources),
        *core_objects(sanitizers),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr and "san" in done.stderr:
        raise NoSanitizer(f"the run-time for -fsanitize={sanitizers} is missing: install libgcc-dev's libasan, libtsan")
    assert done.returncode == 0, done.stderr
