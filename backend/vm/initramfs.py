"""The guest's initramfs: busybox, the checks of guest-tests/, the kernel's modules and e2fsprogs, in one archive.

Uncompressed: QEMU loads it by one copy, while the guest would decompress it instruction by instruction under TCG.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backend.vm import cpio, elf, kernel_modules
from backend.vm.cache import Cache, Made
from backend.vm.errors import CannotRun
from backend.vm.progress import Report

GUEST_TESTS = Path(__file__).resolve().parents[2] / "guest-tests"
MODULES = ("nvme", "ext4")
# mke2fs and e2fsck by the names that init looks for; without them the file system check makes do with busybox
FILE_SYSTEM_TOOLS = {"sbin/mkfs.ext4": "usr/sbin/mke2fs", "sbin/fsck.ext4": "usr/sbin/e2fsck"}
FILE_SYSTEM_CONFIG = "etc/mke2fs.conf"
PROGRAM_FOLDERS = (GUEST_TESTS / "programs", GUEST_TESTS / "sva")
DRIVER_HEADERS = GUEST_TESTS / "modules"
COMPILER_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-static", "-s")
COMPILE_SECONDS = 120  # the compiler needs 2; this is a hung disk
ARCHIVE, ARCHIVE_BYTES = "initramfs.cpio", 64 << 20  # bytes free before it is begun; it has 12 MB
PROGRAM, PROGRAM_BYTES = "guest", 16 << 20  # 1 MB, and the compiler's own files


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """Where the guest's parts lie on the host.

    `modules_dir` is usr/lib/modules/VERSION of the kernel, None for a kernel with its drivers built in; `root` is the
    file tree that holds usr/sbin/mke2fs with its libraries, None to leave them out. `built` has files of modules that
    are not the kernel's own, by name (backend.vm.module_build); they are loaded after `modules`.
    """

    busybox: Path
    modules_dir: Path | None
    modules: Sequence[str] = MODULES
    root: Path | None = None
    built: Mapping[str, Path] = field(default_factory=dict)


def build_initramfs(files: GuestFiles, folder: Path) -> Path:
    """The archive's path in the cache folder, built if it is not there; the same inputs give the same bytes.

    Raises CannotRun, saying what to do: no compiler, no static C library, a part missing, no space.
    """
    cache = Cache(folder)
    program = build_program(cache)

    def make(entry: Path, work: Path, report: Report) -> Made:
        report("packing busybox, modules and checks")
        (entry / ARCHIVE).write_bytes(archive(files, program).data)
        return Made({}, [ARCHIVE])

    try:
        key = _key(files, program)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise CannotRun(f"the guest's initramfs cannot be built: {reason}; run `vioasid doctor`") from error
    return cache.get("initramfs", key, what="the guest's initramfs", need=ARCHIVE_BYTES, maker=make).path / ARCHIVE


def archive(files: GuestFiles, program: Path) -> cpio.Archive:
    """Everything in its place; `program` is the compiled guest program."""
    result = cpio.Archive()
    result.character_device("dev/console", 5, 1)  # init's output before /dev is mounted
    result.character_device("dev/null", 1, 3, 0o666)
    result.file("bin/busybox", _read(files.busybox, "static busybox"), 0o755)
    result.file("bin/guest", program.read_bytes(), 0o755)
    for path in _scripts():
        name = path.relative_to(GUEST_TESTS).as_posix()
        result.file(name, path.read_bytes(), 0o755 if name == "init" else 0o644)
    if files.modules_dir is not None:
        order = kernel_modules.load_order(files.modules_dir, list(files.modules), files.built)
        for position, module in enumerate(order):
            result.file(f"modules/{position:02d}-{module.name}.ko", module.data)
    if files.root is not None:
        _add_file_system_tools(result, files.root)
    return result


def build_program(cache: Cache) -> Path:
    """The static guest program, compiled by the host's `cc` unless the cache has it; CannotRun if it does not."""
    wanted = os.environ.get("CC") or "cc"
    compiler = shutil.which(wanted)
    if compiler is None:
        raise CannotRun(
            f"there is no C compiler {wanted}, which builds the guest's programs; install gcc and libc6-dev"
        )
    sources = sorted(path for folder in PROGRAM_FOLDERS for path in folder.glob("*.[ch]"))
    sources += sorted(DRIVER_HEADERS.glob("*.h"))
    key = {"compiler": [_state(Path(compiler).resolve())], "flags": COMPILER_FLAGS, "sources": _contents(sources)}

    def make(entry: Path, work: Path, report: Report) -> Made:
        report("compiling the guest's programs")
        command = [compiler, *COMPILER_FLAGS, "-o", str(entry / PROGRAM)]
        command += [f"-I{folder}" for folder in (*PROGRAM_FOLDERS, DRIVER_HEADERS)]
        command += [str(source) for source in sources if source.suffix == ".c"]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS, check=False,
                env={**os.environ, "TMPDIR": str(work), "LC_ALL": "C"},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            reason = f"{compiler} did not finish within {COMPILE_SECONDS} s"
            raise CannotRun(f"{reason}; see whether {cache.root} lies on a disk that works") from error
        if run.returncode:
            missing = re.search("cannot find -l|No such file", run.stderr)
            fix = "install libc6-dev" if missing else "set CC to another compiler"
            said = run.stderr.strip()[-2000:]
            raise CannotRun(f"{said}\nthe guest's programs did not compile with {compiler}: {fix}")
        return Made({}, [PROGRAM])

    return cache.get("guest-program", key, what="the guest's programs", need=PROGRAM_BYTES, maker=make).path / PROGRAM


def _scripts() -> list[Path]:
    return sorted([GUEST_TESTS / "init", *GUEST_TESTS.glob("*.sh"), *GUEST_TESTS.glob("checks/*.sh")])


def _add_file_system_tools(result: cpio.Archive, root: Path) -> None:
    for place, program in FILE_SYSTEM_TOOLS.items():
        if not (root / program).is_file():
            continue
        try:
            parts = elf.program_files(root, program)
        except (FileNotFoundError, ValueError) as error:
            raise CannotRun(f"{root / program} cannot be taken into the guest: {error}") from error
        for name, path in parts.items():
            result.file(place if name == program else name, path.read_bytes(), 0o755)
    if (root / FILE_SYSTEM_CONFIG).is_file():
        result.file(FILE_SYSTEM_CONFIG, (root / FILE_SYSTEM_CONFIG).read_bytes())


def _inputs(files: GuestFiles) -> Iterable[Path]:
    yield files.busybox
    yield from files.built.values()
    if files.modules_dir is not None:
        yield files.modules_dir
        yield files.modules_dir / "kernel"
        yield files.modules_dir / "modules.order"
    if files.root is not None:
        yield from (files.root / name for name in (*FILE_SYSTEM_TOOLS.values(), FILE_SYSTEM_CONFIG))


def _key(files: GuestFiles, program: Path) -> dict[str, object]:
    """Scripts and this code by content; what the asset cache holds by size and time, which is what changes there."""
    code = [Path(__file__), *(Path(module.__file__ or "") for module in (cpio, elf, kernel_modules))]
    return {
        "program": str(program),
        "modules": list(files.modules),
        "scripts": _contents(_scripts()),
        "code": _contents(code),
        "inputs": [_state(path) for path in _inputs(files)],
    }


def _contents(paths: Iterable[Path]) -> list[tuple[str, str]]:
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]


def _state(path: Path) -> tuple[str, int, int]:
    """Size and time of change; 0 for what is not there."""
    try:
        state = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), state.st_size, state.st_mtime_ns


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CannotRun(f"{what} is not at {path} ({error.strerror}); run `vioasid doctor`") from error
