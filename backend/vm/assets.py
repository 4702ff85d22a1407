"""What a run needs and this project does not hold: QEMU, a kernel with its modules, busybox, libvfio-user; a compiler
for modules.

Each comes from the host where the host's own fits, else from the cache, fetched on first use. Every function gives
something that was seen to work, or raises CannotRun with what to do. See docs/assets.md.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.vm import debian, kernel_image, qemu_binary
from backend.vm import libvfio_user as library
from backend.vm import module_tools as tools
from backend.vm.cache import MIB, Cache, Entry, Made
from backend.vm.debian import NotThere
from backend.vm.errors import CannotRun
from backend.vm.kernel_image import Kernel
from backend.vm.libvfio_user import LibvfioUser
from backend.vm.module_tools import ModuleTools
from backend.vm.progress import Report
from backend.vm.qemu_binary import DoesNotRun, Qemu, Unfit

MODULES = "usr/lib/modules/"
BUSYBOX = "usr/bin/busybox"
FILE_SYSTEM_TOOLS = re.compile(
    r"usr/s?bin/(mke2fs|e2fsck)|etc/mke2fs\.conf|(usr/)?lib64/ld-linux.*"
    r"|usr/lib/x86_64-linux-gnu/(ld-linux-x86-64|lib(c|ext2fs|e2p|com_err|blkid|uuid))\.so.*"
)
"""What makes and checks the guest's file system, with the libraries that these two are linked to."""

Fetch = Callable[[Sequence[str], Path, Path, Report], Made]
"""Fetches from one set of suites; raises NotThere to have the next one tried."""


class NotOnMirror(CannotRun):
    """No suite of the mirror has it."""


@dataclass(frozen=True, slots=True)
class Asset:
    """How one cache entry is made: suites are tried in turn, all of it is the entry's key but `what` and `need`."""

    name: str
    what: str
    need: int
    """Bytes at the peak: what is kept, what is unpacked, the packages. Measured, and a quarter more."""
    packages: Sequence[str]
    suites: Sequence[Sequence[str]]
    fetch: Fetch

    def key(self) -> Mapping[str, object]:
        return {"packages": list(self.packages), "suites": [list(s) for s in self.suites], "host": platform.machine()}

    def find(self, cache: Cache) -> Entry | None:
        return cache.find(self.name, self.key())

    def get(self, cache: Cache) -> Entry:
        return cache.get(self.name, self.key(), what=self.what, need=self.need, maker=self._make)

    def _make(self, entry: Path, work: Path, report: Report) -> Made:
        reasons: dict[str, list[str]] = {}
        for number, suites in enumerate(self.suites):
            tree, scratch = work / f"tree-{number}", work / f"work-{number}"
            tree.mkdir()
            scratch.mkdir()
            try:
                made = self.fetch(suites, tree, scratch, report)
            except (NotThere, Unfit) as reason:
                reasons.setdefault(str(reason), []).append(" + ".join(suites))
                continue
            entry.rmdir()
            tree.rename(entry)
            return made
        url = debian.find_mirror().url
        tried = "; ".join(f"{', '.join(where)}: {reason}" for reason, where in reasons.items())
        raise NotOnMirror(f"{url} has not {self.what} ({tried}). Set VIOASID_MIRROR to a complete Debian mirror.")


def _fetch_qemu(suites: Sequence[str], tree: Path, work: Path, report: Report) -> Made:
    debian.extract(QEMU.packages, suites, tree, work, keep=qemu_binary.wanted, report=report)
    report("trying it")
    try:
        version = qemu_binary.check(qemu_binary.unpacked_argv(tree))
    except DoesNotRun as error:  # no fault of the suite
        advice = "Set VIOASID_CACHE to a folder on a file system that is not mounted noexec."
        raise CannotRun(f"QEMU was fetched but does not run: {error}. {advice}") from error
    return Made({"version": version}, [f"usr/bin/{qemu_binary.PROGRAM}"])


def _fetch_guest(suites: Sequence[str], tree: Path, work: Path, report: Report) -> Made:
    def wanted(path: str) -> bool:
        return path.startswith((MODULES, "boot/vmlinuz-")) or path == BUSYBOX or bool(FILE_SYSTEM_TOOLS.fullmatch(path))

    debian.extract(GUEST.packages, suites, tree, work, keep=wanted, report=report, arch="amd64")
    # split packages have the image beside its modules, older ones in /boot
    for image in tree.glob("boot/vmlinuz-*"):
        image.rename(tree / MODULES / image.name.removeprefix("vmlinuz-") / "vmlinuz")
    images = sorted(tree.glob(f"{MODULES}*/vmlinuz"))
    if not images or not (tree / BUSYBOX).exists():
        raise NotThere(f"{' and '.join(GUEST.packages)} hold no kernel or no busybox")
    version = kernel_image.read_version(images[0])
    return Made({"version": version}, [f"{MODULES}{version}/vmlinuz", f"{MODULES}{version}/kernel", BUSYBOX])


def _fetch_libvfio_user(suites: Sequence[str], tree: Path, work: Path, report: Report) -> Made:
    source = work / "libvfio-user"
    version = debian.source("qemu", suites[0], library.SOURCE_FOLDER, source, work, report=report)
    report("compiling")
    library.lay_out(source, tree)
    return Made({"version": f"from QEMU {version}"}, [f"lib/{library.SONAME}", "include/libvfio-user.h"])


def _fetch_module_tools(packages: Sequence[str]) -> Fetch:
    def fetch(suites: Sequence[str], tree: Path, work: Path, report: Report) -> Made:
        debian.extract(packages, suites, tree, work, keep=tools.wanted, report=report, arch="amd64")
        tools.lay_out(tree)
        return Made({}, ["usr/bin/make", "usr/src", "usr/libexec/gcc"])

    return fetch


# Backports of Debian 13 come first: the oldest suite with a QEMU that fits.
BACKPORTS = ("trixie", "trixie-backports")

QEMU = Asset("qemu", "QEMU", 430 * MIB, ("qemu-system-x86",), (BACKPORTS, ("forky",), ("sid",)), _fetch_qemu)
GUEST = Asset(
    "guest", "a kernel and busybox", 580 * MIB, ("linux-image-amd64", "busybox-static", "e2fsprogs"),
    (BACKPORTS, ("trixie",), ("forky",), ("sid",)), _fetch_guest,
)  # fmt: skip
LIBVFIO_USER = Asset(
    "libvfio-user", "libvfio-user", 130 * MIB, ("qemu",),
    # the suites whose QEMU source carries the library come first; a mirror may lack the source files of one
    (("trixie",), ("bookworm",), ("trixie-backports",), ("forky",), ("sid",)), _fetch_libvfio_user,
)  # fmt: skip


def _module_tools(version: str) -> Asset:
    """Headers are asked for by the very version of the kernel, which a mirror replaces by a newer one in time."""
    packages = (f"linux-headers-{version}", "make")
    fetch = _fetch_module_tools(packages)
    return Asset("module-tools", f"the headers of kernel {version}", 480 * MIB, packages, GUEST.suites, fetch)


def qemu(cache: Cache | None = None) -> Qemu:
    """The host's QEMU if it can be a vfio-user client, else the cached one, fetched if need be."""
    try:
        return qemu_binary.find_host()
    except Unfit as host:
        entry = QEMU.get(cache or Cache())
        try:
            return Qemu(qemu_binary.unpacked_argv(entry.path), entry.facts["version"], "cache")
        except Unfit as kept:
            raise CannotRun(f"No QEMU fits: {host}; {kept}. Remove {entry.path} to have it fetched again.") from kept


def kernel(file: Path | None = None, cache: Cache | None = None) -> Kernel:
    """The user's kernel with this host's modules for it, or the cached Debian kernel with its own."""
    if file is not None:
        return kernel_image.user_kernel(file)
    entry = GUEST.get(cache or Cache())
    version = entry.facts["version"]
    modules = entry.path / MODULES / version
    return Kernel(modules / "vmlinuz", modules, version, "cache")


def module_tools(kernel: Kernel, cache: Cache | None = None) -> ModuleTools:
    """What builds modules for `kernel`: the host's headers and compiler where they fit it, else the cached ones."""
    if host := tools.find_host(kernel.version):
        return host
    if not re.fullmatch(r"\d[\w.+~-]*-amd64", kernel.version):
        raise CannotRun(
            f"Modules for kernel {kernel.version} need its headers, and Debian has none of that name. Install them, so "
            f"that /lib/modules/{kernel.version}/build leads there, and its compiler; or leave out --kernel."
        )
    cache = cache or Cache()
    try:
        entry = _module_tools(kernel.version).get(cache)
    except NotOnMirror as error:
        kernel_entry = GUEST.get(cache).path
        raise CannotRun(
            f"{error} A mirror keeps the headers of its newest kernel only: remove {kernel_entry} to have both fetched."
        ) from error
    return tools.unpacked(entry.path, kernel.version)


def known_module_tools(kernel: Kernel, cache: Cache) -> ModuleTools | None:
    """Those that `module_tools` would use without fetching anything; None: there are none."""
    if host := tools.find_host(kernel.version):
        return host
    entry = _module_tools(kernel.version).find(cache)
    return tools.unpacked(entry.path, kernel.version) if entry else None


def busybox(cache: Cache | None = None) -> Path:
    """A statically linked busybox for x86-64."""
    return GUEST.get(cache or Cache()).path / BUSYBOX


def guest_root(cache: Cache | None = None) -> Path:
    """The file tree in which e2fsprogs and its libraries lie, for the guest."""
    return GUEST.get(cache or Cache()).path


def libvfio_user(cache: Cache | None = None) -> LibvfioUser:
    """The host's libvfio-user, else the cached one, compiled if need be."""
    if host := library.find_host():
        return host
    return library.inside(LIBVFIO_USER.get(cache or Cache()).path)
