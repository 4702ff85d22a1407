"""Modules of a kernel that was unpacked but never installed: found, put in load order and decompressed.

depmod has not run over such a folder, so there is no modules.dep; each module names what it needs in its .modinfo
section (kernel sources, scripts/mod/modpost.c: "depends" and "softdep").
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.vm.errors import CannotRun

DECOMPRESS: Mapping[str, Sequence[str]] = {
    ".xz": ("xz", "-dc"),
    ".zst": ("zstd", "-qdc"),
    ".gz": ("gzip", "-dc"),
}
"""By a module's last suffix. Programs: an interpreter may be built without lzma, and none before 3.14 has zstd."""

ELF64_LITTLE = b"\x7fELF\x02\x01"


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    """With underscores, as /proc/modules has it."""
    data: bytes
    """The ELF object, decompressed."""


def load_order(modules_dir: Path, names: Sequence[str], built: Mapping[str, Path] | None = None) -> list[Module]:
    """The modules `names` and all they need, each after what it needs; what is built into the kernel is left out.

    `built`: files of modules that are not the kernel's own, by name; they come after `names`, with what they need.
    Raises CannotRun for a name that this kernel has neither as a module nor built in, and for a damaged module.
    """
    files, builtin = _index(modules_dir)
    files |= built or {}
    order: dict[str, Module] = {}
    pending: set[str] = set()

    def add(name: str, wanted_by: str, *, optional: bool = False) -> None:
        name = name.replace("-", "_")
        if name in order or name in builtin or name in pending:  # pending: a soft dependency may close a circle
            return
        if name not in files:
            if optional:
                return
            raise CannotRun(f"The kernel of {modules_dir} lacks module {name}, which {wanted_by}. Use one that has it.")
        data = _decompressed(files[name])
        info = modinfo(data, files[name])
        pending.add(name)
        for needed in filter(None, ",".join(info.get("depends", [])).split(",")):
            add(needed, f"{name} needs")
        for soft in _soft_before(info.get("softdep", [])):
            add(soft, f"{name} can use", optional=True)
        order[name] = Module(name, data)

    for name in (*names, *(built or ())):
        add(name, "the guest needs")
    return list(order.values())


def modinfo(data: bytes, path: Path) -> dict[str, list[str]]:
    """The .modinfo section of a module: values by tag. Raises CannotRun if `data` is no such ELF object."""
    try:
        if not data.startswith(ELF64_LITTLE):
            raise ValueError("no 64-bit little-endian ELF file")
        section_table = struct.unpack_from("<Q", data, 0x28)[0]
        entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
        if section_table + entry_size * count > len(data):
            raise ValueError("it is cut short")
        headers = [struct.unpack_from("<IIQQQQ", data, section_table + index * entry_size) for index in range(count)]
        names = headers[names_index][4]
        found = [header for header in headers if data.startswith(b".modinfo\0", names + header[0])]
        if not found:
            raise ValueError("no .modinfo section")
        offset, size = found[0][4:6]
    except (struct.error, IndexError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    tags: dict[str, list[str]] = {}
    for line in data[offset : offset + size].split(b"\0"):
        tag, equals, value = line.decode("utf-8", "replace").partition("=")
        if equals:
            tags.setdefault(tag, []).append(value)
    return tags


def _soft_before(softdeps: Sequence[str]) -> list[str]:
    """The names after "pre:" of softdep lines ("pre: a b post: c")."""
    before: list[str] = []
    for line in softdeps:
        wanted = False
        for word in line.split():
            if word.endswith(":"):
                wanted = word == "pre:"
            elif wanted:
                before.append(word)
    return before


def _index(modules_dir: Path) -> tuple[dict[str, Path], frozenset[str]]:
    """Files of modules by name, and the names of those built in."""
    if not (modules_dir / "kernel").is_dir():
        raise CannotRun(f"{modules_dir} holds no kernel modules. Install that kernel's, or leave out --kernel.")
    files = {_name(path.name): path for path in modules_dir.glob("kernel/**/*.ko*")}
    try:
        listed = (modules_dir / "modules.builtin").read_text().split()
    except OSError:
        listed = []
    return files, frozenset(_name(line.rpartition("/")[2]) for line in listed)


def _name(file_name: str) -> str:
    return file_name.partition(".ko")[0].replace("-", "_")


def _decompressed(path: Path) -> bytes:
    argv = DECOMPRESS.get(path.suffix)
    if argv and not shutil.which(argv[0]):
        raise CannotRun(f"{path} cannot be read without {argv[0]}. Install the package that has it.")
    try:
        if not argv:
            return path.read_bytes()
        with open(path, "rb") as file:
            done = subprocess.run(argv, stdin=file, capture_output=True, check=False)
    except OSError as error:
        raise CannotRun(f"{path} cannot be read: {error.strerror}.") from error
    if done.returncode != 0:
        raise _damaged(path, done.stderr.decode(errors="replace").strip())
    return done.stdout


def _damaged(path: Path, reason: str) -> CannotRun:
    return CannotRun(f"The kernel module {path} is damaged: {reason}. Remove its folder to have it fetched again.")
