"""What a program needs to start, its loader and its libraries, read from its ELF file (System V ABI, chapters 4, 5)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "lib64", "usr/lib", "lib")
MAX_LIBRARIES = 64  # a program that needs more is none for an initramfs

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5


@dataclass(frozen=True, slots=True)
class Needs:
    """Names as they stand in the file; `loader` is an absolute path, None for a static program or a library."""

    loader: str | None
    libraries: tuple[str, ...]


def needs(data: bytes) -> Needs:
    """Loader and libraries of one ELF file; ValueError if it is none."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        (program_headers,) = struct.unpack_from("<Q", data, 0x20)
        entry_size, count = struct.unpack_from("<HH", data, 0x36)
        segments = [struct.unpack_from("<IIQQQQ", data, program_headers + i * entry_size) for i in range(count)]
        loader = None
        dynamic: list[tuple[int, int]] = []
        for kind, _, offset, _, _, size in segments:
            if kind == PT_INTERP:
                loader = data[offset : offset + size].split(b"\0")[0].decode()
            elif kind == PT_DYNAMIC:
                dynamic = list(_dynamic(data, offset, size))
        strings = next((value for tag, value in dynamic if tag == DT_STRTAB), 0)
        base = 0  # where the string table lies in the file, from its address in memory
        for kind, _, offset, address, _, size in segments:
            if kind == PT_LOAD and address <= strings < address + size:
                base = strings - address + offset
        libraries = tuple(_string(data, base + value) for tag, value in dynamic if tag == DT_NEEDED)
    except (struct.error, UnicodeDecodeError, OverflowError) as error:  # an offset wider than any file overflows
        raise ValueError(f"a damaged ELF file: {error}") from error
    return Needs(loader, libraries)


def _string(data: bytes, at: int) -> str:
    return data[at : data.find(b"\0", at)].decode()


def _dynamic(data: bytes, offset: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(offset, offset + size, 16):
        tag, value = struct.unpack_from("<qQ", data, at)
        if tag == DT_NULL:
            return
        yield tag, value


def program_files(root: Path, program: str) -> dict[str, Path]:
    """Every file that `program` (a path below `root`) needs, itself included: path in the guest -> path here.

    Raises FileNotFoundError naming what is missing below `root`, ValueError for a file that is no ELF file.
    """
    found: dict[str, Path] = {}
    wanted = [program]
    while wanted:
        name = wanted.pop()
        path, place = _locate(root, name)
        if place in found:
            continue
        if len(found) == MAX_LIBRARIES:
            raise ValueError(f"{program} needs more than {MAX_LIBRARIES} libraries")
        found[place] = path
        need = needs(path.read_bytes())
        wanted += need.libraries
        wanted += [need.loader] if need.loader else []
    return found


def _locate(root: Path, name: str) -> tuple[Path, str]:
    """Where a library, the loader (an absolute path) or a program lies below root, and its path in the guest."""
    places = [name.lstrip("/")] if "/" in name else [f"{folder}/{name}" for folder in LIBRARY_FOLDERS]
    if name.startswith("/"):  # a tree that was extracted, not installed, may lack the link from /lib64 to /usr/lib64
        base = name.rsplit("/", 1)[1]
        places += [f"{folder}/{base}" for folder in LIBRARY_FOLDERS]
    for place in places:
        if (root / place).is_file():
            return root / place, name.lstrip("/") if "/" in name else place
    raise FileNotFoundError(f"{name} is not below {root}")
