"""libvfio-user: the host's own where there is one, else compiled from the copy in Debian's QEMU source package.

No distribution packages the library. Its meson.build asks for cmocka, which only its tests need, and for meson and
ninja; one call of the C compiler over its sources needs neither, so the host has three packages less to install.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.vm.debian import need_program
from backend.vm.errors import CannotRun

VARIABLE = "VIOASID_LIBVFIO_USER"
SONAME = "libvfio-user.so.0"
SOURCE_FOLDER = "subprojects/libvfio-user"
SOURCES = ("dma", "irq", "libvfio-user", "migration", "pci", "pci_caps", "tran", "tran_sock")
"""As its lib/meson.build lists them, without the optional pipe transport."""
JSON_C_HEADERS = ("/usr/include/json-c", "/usr/local/include/json-c")
HEADERS = ("/usr/local/include/vfio-user", "/usr/include/vfio-user")
NEEDED = ("vfu_create_ctx", "vfu_realize_ctx", "vfu_attach_ctx", "vfu_get_poll_fd", "vfu_run_ctx", "vfu_irq_trigger")


@dataclass(frozen=True, slots=True)
class LibvfioUser:
    library: Path
    include: Path | None
    """The folder of libvfio-user.h; None where the host has the library without its header."""
    source: str
    """"host" or "cache"."""


def missing_from(library: str) -> Sequence[str]:
    """Functions we use that `library` lacks. Raises OSError when it cannot be loaded."""
    loaded = ctypes.CDLL(library)
    return [name for name in NEEDED if not hasattr(loaded, name)]


def find_host() -> LibvfioUser | None:
    """The library that $VIOASID_LIBVFIO_USER names, else the one the dynamic loader finds, if it has what we use.

    Raises CannotRun when the variable names one that cannot be used.
    """
    own = os.environ.get(VARIABLE)
    try:
        missing = missing_from(own or SONAME)
        if missing and own:
            raise CannotRun(f"{VARIABLE} is {own}, which lacks {', '.join(missing)}. Name a newer one, or unset it.")
        if missing:
            return None
        if own:
            return LibvfioUser(Path(own), _host_headers(), "host")
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            mapped = next((line.split(None, 5)[5].rstrip("\n") for line in maps if "/libvfio-user.so" in line), None)
    except OSError as error:
        if own:
            raise CannotRun(f"{VARIABLE} is {own}, which does not load: {error}. Correct it, or unset it.") from error
        return None
    return LibvfioUser(Path(mapped), _host_headers(), "host") if mapped else None


def _host_headers() -> Path | None:
    return next((Path(folder) for folder in HEADERS if Path(folder, "libvfio-user.h").exists()), None)


def compile_source(source: Path, library: Path) -> None:
    """Compile the source tree into the shared library. Raises CannotRun with the compiler's first error."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    need_program(compiler[0], "gcc libc6-dev")
    json_c = next((folder for folder in JSON_C_HEADERS if Path(folder, "json.h").exists()), None)
    if not json_c:
        raise CannotRun("libvfio-user needs json-c's headers, which are missing. Run: apt-get install libjson-c-dev")
    argv = [*compiler, "-std=gnu99", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-w", "-D_GNU_SOURCE"]
    argv += [f"-Wl,-soname,{SONAME}", "-I", json_c, "-I", str(source / "include"), "-I", str(source / "lib")]
    argv += [str(source / "lib" / f"{name}.c") for name in SOURCES]
    argv += ["-o", str(library), "-ljson-c"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), "".join(lines[:1]) or f"status {done.returncode}")
        raise CannotRun(
            f"libvfio-user cannot be compiled: {reason}. "
            "Run: apt-get install gcc libc6-dev libjson-c-dev, or install a libvfio-user."
        )
    try:
        missing = missing_from(str(library))
    except OSError as error:
        raise CannotRun(
            f"libvfio-user was compiled but does not load: {error}. "
            "Set VIOASID_CACHE to a folder on a file system that is not mounted noexec."
        ) from error
    if missing:
        raise CannotRun(f"This libvfio-user lacks {', '.join(missing)}. Install a newer one on the host.")


def lay_out(source: Path, entry: Path) -> LibvfioUser:
    """Compile `source` into entry/lib and put its headers and licence beside it."""
    (entry / "lib").mkdir()
    compile_source(source, entry / "lib" / SONAME)
    shutil.copytree(source / "include", entry / "include")
    shutil.copy(source / "LICENSE", entry / "LICENSE")
    return inside(entry)


def inside(entry: Path) -> LibvfioUser:
    """The library as lay_out() left it."""
    return LibvfioUser(entry / "lib" / SONAME, entry / "include", "cache")
