"""What this machine has and lacks for a run, part by part, each with its fix. Fetches and installs nothing."""

from __future__ import annotations

import importlib
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from backend.vm import assets, debian, kernel_image, kvm, libvfio_user, qemu_binary
from backend.vm.assets import Asset
from backend.vm.cache import MAKE_SPACE, MAKE_WRITABLE, MIB, Cache
from backend.vm.errors import CannotRun
from backend.vm.kernel_image import Kernel
from backend.vm.qemu_binary import Qemu, Unfit
from backend.vm.run_folder import SOCKET_PATH_LIMIT, runtime_folder

FETCHED_LATER = "absent, will be fetched by make boot"
OLDEST_PYTHON = (3, 11)
WITH_DRIVER = "q35-amd-sva"
SOCKET_NAME_BYTES = 48
"""Room for the name of a run and of a function below the runtime folder."""


class Status(StrEnum):
    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    status: Status
    detail: str
    fix: str = ""
    """What to do about it, "" when there is nothing to do."""


Check = Callable[[Cache], Part]


def examine(cache: Cache | None = None) -> list[Part]:
    """Every part in the order of CHECKS. A check never raises: what it cannot find out is a FAIL that says so."""
    cache = cache or Cache()
    parts = []
    for name, check in CHECKS.items():
        try:
            parts.append(check(cache))
        except (CannotRun, OSError) as error:
            problem, _, advice = str(error).partition(". ")
            parts.append(Part(name, Status.FAIL, problem, advice))
    return parts


def _passed(name: str, detail: str) -> Part:
    return Part(name, Status.PASS, detail)


def _to_fetch(cache: Cache) -> list[Asset]:
    """The assets that a run would fetch now."""
    needed = [assets.GUEST]
    try:
        qemu_binary.find_host()
    except Unfit:
        needed.append(assets.QEMU)
    with suppress(CannotRun):  # the user named one: nothing is fetched, whatever it is worth
        if not libvfio_user.find_host():
            needed.append(assets.LIBVFIO_USER)
    return [asset for asset in needed if not asset.find(cache)]


def _python(_: Cache) -> Part:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return Part("python", Status.FAIL, f"{version} is too old", "Use Python 3.11 or newer, then: make clean boot")
    return _passed("python", f"{version}, {sys.executable}")


def _compiler(_: Cache) -> Part:
    compiler = shutil.which((os.environ.get("CC") or "cc").split()[0])
    if not compiler:
        return Part("compiler", Status.FAIL, "no C compiler", "Run: apt-get install gcc libc6-dev")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return Part("compiler", Status.FAIL, "Python's headers are missing", "Run: apt-get install python3-dev")
    if not _includes(compiler, "stdio.h"):
        return Part("compiler", Status.FAIL, "the C library's headers are missing", "Run: apt-get install libc6-dev")
    if not any(Path(folder, "json.h").exists() for folder in libvfio_user.JSON_C_HEADERS):
        return Part("compiler", Status.FAIL, "json-c's headers are missing", "Run: apt-get install libjson-c-dev")
    return _passed("compiler", f"{compiler}, headers of C, Python and json-c")


def _includes(compiler: str, header: str) -> bool:
    argv = [compiler, "-E", "-x", "c", "-"]
    done = subprocess.run(argv, input=f"#include <{header}>\n".encode(), capture_output=True, check=False)
    return done.returncode == 0


def _core(_: Cache) -> Part:
    try:
        importlib.import_module("backend.core._native")
    except ImportError as error:
        return Part("core", Status.FAIL, f"the C core does not load: {error}", "Run: make clean boot")
    return _passed("core", "the C core loads")


def _cache(cache: Cache) -> Part:
    place = cache.root
    while not place.exists() and place != place.parent:
        place = place.parent
    absent = _to_fetch(cache)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Part("cache", Status.FAIL if absent else Status.WARN, f"{cache.root} cannot be written", MAKE_WRITABLE)
    free = cache.free_bytes()
    need = max((asset.need for asset in absent), default=0)
    if free < need:
        detail = f"{cache.root} has {free // MIB} MiB free, {need // MIB} MiB are needed"
        return Part("cache", Status.FAIL, detail, MAKE_SPACE)
    return _passed("cache", f"{cache.root}, {free // MIB} MiB free")


def _mirror(cache: Cache) -> Part:
    try:
        mirror = debian.find_mirror()
    except CannotRun as error:
        if _to_fetch(cache):
            raise
        return Part("mirror", Status.WARN, str(error).partition(". ")[0], "Nothing is left to fetch.")
    return _passed("mirror", f"{mirror.url}, named by {mirror.source}")


def _fetch_tools(cache: Cache) -> Part:
    try:
        debian.need_program("mmdebstrap", "mmdebstrap")
        debian.need_program("xz", "xz-utils")
        debian.keyring()
    except CannotRun as error:
        problem, _, advice = str(error).partition(". ")
        return Part("mmdebstrap", Status.FAIL if _to_fetch(cache) else Status.WARN, problem, advice)
    return _passed("mmdebstrap", "with xz and the keys of Debian's archive")


def _known_qemu(cache: Cache) -> Qemu | None:
    try:
        return qemu_binary.find_host()
    except Unfit:
        entry = assets.QEMU.find(cache)
        return Qemu(qemu_binary.unpacked_argv(entry.path), entry.facts["version"], "cache") if entry else None


def _qemu(cache: Cache) -> Part:
    try:
        known = _known_qemu(cache)
        if known is None:
            return Part("qemu", Status.WARN, FETCHED_LATER, "Run: make boot")
        qemu_binary.check(known.argv)
    except Unfit as error:
        return Part("qemu", Status.FAIL, str(error), f"Remove {cache.root} to have it fetched again.")
    return _passed("qemu", f"{known.version} with vfio-user-pci, {_whose(known.source)}")


def _whose(source: str) -> str:
    return "the host's own" if source == "host" else "in the cache"


def _known_kernel(cache: Cache) -> Kernel | None:
    return assets.kernel(cache=cache) if assets.GUEST.find(cache) else None


def _kernel(cache: Cache) -> Part:
    known = _known_kernel(cache)
    if known is None:
        return Part("kernel", Status.WARN, FETCHED_LATER, "Run: make boot")
    kernel_image.read_version(known.vmlinuz)
    return _passed("kernel", f"{known.version}, in the cache")


def _module_tools(cache: Cache) -> Part:
    known = _known_kernel(cache)
    found = assets.known_module_tools(known, cache) if known is not None else None
    if found is None:
        detail = "absent, will be fetched for machines whose guest has a driver of ours"
        return Part("module-tools", Status.WARN, detail, f"Run: make boot ARGS='--machine {WITH_DRIVER}'")
    return _passed("module-tools", f"headers of kernel {known.version if known else ''}, their compiler and make")


def _busybox(cache: Cache) -> Part:
    if not assets.GUEST.find(cache):
        return Part("busybox", Status.WARN, FETCHED_LATER, "Run: make boot")
    return _passed("busybox", "in the cache")


def _library(cache: Cache) -> Part:
    known = libvfio_user.find_host()
    if known is None:
        if not (entry := assets.LIBVFIO_USER.find(cache)):
            return Part("libvfio-user", Status.WARN, FETCHED_LATER, "Run: make boot")
        known = libvfio_user.inside(entry.path)
        try:
            libvfio_user.missing_from(str(known.library))
        except OSError as error:
            return Part("libvfio-user", Status.FAIL, str(error), f"Remove {entry.path} to have it compiled again.")
    return _passed("libvfio-user", f"loads, {_whose(known.source)}")


def _memfd(_: Cache) -> Part:
    handle = os.memfd_create("vioasid-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(handle, mmap.PAGESIZE)
        with mmap.mmap(handle, mmap.PAGESIZE, mmap.MAP_SHARED):
            return _passed("memfd", "guest memory can be shared")
    finally:
        os.close(handle)


def _kvm(cache: Cache) -> Part:
    state = kvm.device_state()
    if state is None:
        try:
            qemu, kernel = _known_qemu(cache), _known_kernel(cache)
        except Unfit:
            qemu = kernel = None
        if qemu is None or kernel is None:
            detail = f"{kvm.DEVICE} opens; whether it works is seen when a kernel is here"
            return Part("kvm", Status.WARN, detail, "Run: make boot")
        state = kvm.probe(qemu, kernel, cache)
    if state.works:
        return _passed("kvm", state.reason)
    what = "exists and does not work: " if state.exists else ""
    return Part("kvm", Status.WARN, f"{what}{state.reason}; guests run under TCG, slower", kvm.fix(state))


def _sockets(_: Cache) -> Part:
    folder = runtime_folder()
    length = len(os.fsencode(folder)) + SOCKET_NAME_BYTES
    if length > SOCKET_PATH_LIMIT:
        problem = f"{folder} is too long for sockets: {SOCKET_PATH_LIMIT - SOCKET_NAME_BYTES} bytes at most"
        return Part("sockets", Status.FAIL, problem, "Set XDG_RUNTIME_DIR to a shorter folder of your own.")
    return _passed("sockets", str(folder))


def _iasl(_: Cache) -> Part:
    if path := shutil.which("iasl"):
        return _passed("iasl", path)
    detail = "optional and absent: tests cannot hold our ACPI tables against it"
    return Part("iasl", Status.WARN, detail, "Run: apt-get install acpica-tools")


CHECKS: dict[str, Check] = {
    "python": _python,
    "compiler": _compiler,
    "core": _core,
    "cache": _cache,
    "mirror": _mirror,
    "mmdebstrap": _fetch_tools,
    "qemu": _qemu,
    "kernel": _kernel,
    "module-tools": _module_tools,
    "busybox": _busybox,
    "libvfio-user": _library,
    "memfd": _memfd,
    "kvm": _kvm,
    "sockets": _sockets,
    "iasl": _iasl,
}


def all_well(parts: Sequence[Part]) -> bool:
    """Whether a run can be tried: no part failed."""
    return all(part.status is not Status.FAIL for part in parts)
