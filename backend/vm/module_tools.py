"""What builds a kernel module: the kernel's headers with its build programs, a compiler and make.

The host's own where they fit the kernel at hand, else Debian's packages, unpacked and never installed. Unpacked
programs are newer than the host's C library, so each is run by the loader that came with it: a script of three lines
takes the program's place, the program keeps its name with ".elf" behind it. Nothing is mounted and no root is changed,
so root, users and containers go the same way.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.vm.debian import NotThere

TREE = "VIOASID_TREE"
"""The variable by which the scripts find the tree: a cache may be moved."""
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = "ld-linux-x86-64.so.2"
SCRIPT = f"""#!/bin/sh
lib=${TREE}/{LIBRARIES}
exec "$lib/{LOADER}" --library-path "$lib" --argv0 "$0" "${TREE}/%s" "$@"
"""
HEADERS = "usr/src/linux-headers-"
PROGRAMS = ("usr/bin/", "usr/libexec/gcc/", "usr/lib/linux-kbuild-")
# Those that build a module, and what they link to. Of the rest pahole would add types that nothing reads.
_BINARIES = r"usr/bin/(make|x86_64-linux-gnu-(gcc-\d+|as|ld|ld\.bfd|nm|ar|objcopy|objdump|readelf|strip))"
_COMPILER = r"usr/libexec/gcc/x86_64-linux-gnu/\d+/(cc1|liblto_plugin\.so)|usr/lib/gcc/x86_64-linux-gnu/\d+/include/.*"
_LIBRARY = rf"{LIBRARIES}/(?!lib(\w*san|itm|gomp|crypto|ssl|bpf|stdc)\b)[^/]+\.so(\.[^/]*)?"
_WANTED = re.compile(rf"{_BINARIES}|{_COMPILER}|{_LIBRARY}|{HEADERS}.*(?<!/vmlinux)|usr/lib/linux-kbuild-.*")
# Two of the build programs only choose, by way of /proc/self/exe, which one to run for the kernel's architecture.
_CHOSEN = {"scripts/mod/modpost": "modpost.real-lsb-64", "tools/objtool/objtool": "objtool.real-x86"}


@dataclass(frozen=True, slots=True)
class ModuleTools:
    """How to build modules for one kernel: `make` and its first arguments, the environment beside the host's own."""

    make: Sequence[str]
    environment: Mapping[str, str]
    strip: str
    state: str
    """Changes whenever what is built may."""


def wanted(path: str) -> bool:
    """Whether a member of the packages is needed to build modules."""
    return bool(_WANTED.fullmatch(path))


def lay_out(tree: Path) -> None:
    """Make the unpacked programs run here. Raises NotThere when one that must be there is not."""
    for build in tree.glob("usr/lib/linux-kbuild-*"):
        for place, chosen in _CHOSEN.items():
            program = build / place
            if (program.parent / chosen).exists():
                (program.parent / chosen).replace(program)
    for path in sorted(tree.glob("usr/**/*")):
        name = path.relative_to(tree).as_posix()
        if name.startswith(PROGRAMS) and path.is_file() and not path.is_symlink() and _is_program(path):
            path.rename(f"{path}.elf")
            path.write_text(SCRIPT % f"{name}.elf")
            path.chmod(0o755)
    gcc = next(iter(tree.glob("usr/bin/x86_64-linux-gnu-gcc-*[0-9]")), None)
    if gcc is None or not (tree / "usr/bin/make").exists() or not (tree / LIBRARIES / LOADER).exists():
        raise NotThere("the packages hold no compiler, no make or no C library")
    if not list(tree.glob(f"{HEADERS}*/.config")):
        raise NotThere("the packages hold no kernel headers")
    # gcc asks for the plain name beside its own prefix
    plain = tree / "usr/x86_64-linux-gnu/bin/as"
    plain.parent.mkdir(parents=True)
    plain.symlink_to("../../bin/x86_64-linux-gnu-as")


def unpacked(tree: Path, version: str) -> ModuleTools:
    """The tools in a tree that lay_out() prepared, for the kernel `version`."""
    build = tree / f"{HEADERS}{version}"
    common = re.sub(r"-[a-z0-9]+$", "-common", str(build))
    binaries = tree / "usr/bin"
    return ModuleTools(
        # Debian's own Makefile there names the folder in which it would be installed
        [str(binaries / "make"), "-C", common, f"KBUILD_OUTPUT={build}"],
        {TREE: str(tree), "PATH": f"{binaries}:{os.environ.get('PATH', os.defpath)}"},
        str(binaries / "x86_64-linux-gnu-strip"),
        tree.name,
    )


def find_host(version: str) -> ModuleTools | None:
    """The host's own headers for the kernel `version`, where the compiler that built it and make are installed too."""
    build = Path("/lib/modules", version.replace("/", "_"), "build")
    try:
        config = (build / "include/config/auto.conf").read_text(errors="replace")
        state = (build / "Module.symvers").stat()
    except OSError:
        return None
    found = re.search(r'^CONFIG_CC_VERSION_TEXT="(\S*gcc\S*) ', config, re.MULTILINE)
    make, compiler = shutil.which("make"), shutil.which(found[1]) if found else None
    if not make or not compiler or not shutil.which("strip"):
        return None
    return ModuleTools([make, "-C", str(build)], {}, "strip", f"{build} {state.st_mtime_ns} {compiler}")


def _is_program(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(18)
    # of type EXEC or DYN (ELF-64 Object File Format, 3); the one library in these folders ends in .so
    executable = os.access(path, os.X_OK) and path.suffix != ".so"
    return executable and head.startswith(b"\x7fELF") and head[16] in (2, 3)
