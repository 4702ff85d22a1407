"""`make mutants`: does the guest's suite notice a device or an IOMMU that is subtly wrong? docs/mutants.md.

Each mutation of mutations.py is applied alone to a scratch copy of this tree, and a guest is booted on the copy. The
mutation is caught when a check fails or the VM is lost; one that nothing notices survives, and that is what fails here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutations import CHECKS, MUTATIONS, ROOT, Mutation

from backend.cli.supervisor import guarded
from backend.vm.cache import cache_dir
from backend.vm.errors import CannotRun
from backend.vm.progress import notice, shown

BOOT_SECONDS = 400
"""For one boot: as much as its own limits allow, and what building and stopping take."""
COPIED = (
    "backend", "ctypes_bindings", "guest-tests", "protocol", "qemu-configs", "setup.py", "pyproject.toml", "README.md",
)  # fmt: skip
CHECKS_SHOWN = 3
BOOTS: set[subprocess.Popen[str]] = set()
"""Those that run, to be ended when we are."""
ENDING = threading.Event()
"""Set before they are: one that begins later ends itself."""


@dataclass(frozen=True)
class Verdict:
    """What became of one mutation. `failed`: the checks that noticed, or how the VM was lost."""

    name: str
    what: str
    caught: bool
    failed: tuple[str, ...]
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("name", nargs="*", metavar="MUTATION", help="which (all); --list names them")
    parser.add_argument("--list", action="store_true", help="name the mutations and end")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="guests side by side (2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    args = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS}
    unknown = [name for name in args.name if name not in known]
    if unknown or args.jobs < 1:
        parser.error(f"there is no mutation {unknown[0]!r}, see --list" if unknown else "--jobs is 1 or more")
    chosen = [known[name] for name in args.name] or list(MUTATIONS)
    if args.list:
        for mutation in chosen:
            print(f"{mutation.name:28} {mutation.what}")
        return 0
    for mutation in chosen:
        mutation.applied((ROOT / mutation.file).read_text())  # said now, not after many guests
    verdicts = try_all(chosen, args.jobs)
    if args.json:
        print(json.dumps({"ok": all(each.caught for each in verdicts), "mutants": [asdict(each) for each in verdicts]}))
    else:
        show(verdicts)
    return 0 if all(each.caught for each in verdicts) else 1


def try_all(chosen: Sequence[Mutation], jobs: int) -> list[Verdict]:
    """Every mutation, after the tree as it is has passed on each machine that they need: else nothing is shown."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with shown("mutants") as progress, scratch_copies(jobs) as copies, workers(jobs) as pool:
        done = 0
        count = threading.Lock()

        def tried(mutation: Mutation) -> Verdict:
            nonlocal done
            with copies.one() as copy:
                verdict = attempt(copy, mutation)
            word = "caught" if verdict.caught else "SURVIVES"
            with count:
                done += 1
                progress(f"{done} of {len(chosen)}, {verdict.name} {word}")
                if not sys.stderr.isatty():  # minutes pass in silence otherwise
                    notice(f"{done} of {len(chosen)}: {verdict.name} {word} ({verdict.seconds:.0f} s)")
            return verdict

        def passes(machine: str) -> None:
            with copies.one() as copy:
                failed = boot(copy, machine)
            if failed:
                first = ", ".join(failed[:CHECKS_SHOWN])
                raise CannotRun(f"{machine} fails as it is ({first}): nothing can be shown before that passes")

        progress("the tree as it is")
        list(pool.map(passes, sorted({mutation.machine for mutation in chosen})))
        return list(pool.map(tried, chosen))


@contextmanager
def workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose guests end with us, however that is."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    finally:
        ENDING.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(BOOTS):
            process.terminate()
        pool.shutdown()


def attempt(copy: Path, mutation: Mutation) -> Verdict:
    """Apply, boot, take it back."""
    path = copy / mutation.file
    original = path.read_text()
    begin = time.monotonic()
    path.write_text(mutation.applied(original))
    try:
        compiled(copy, path)
        failed = boot(copy, mutation.machine)
    finally:
        path.write_text(original)
        compiled(copy, path)
    return Verdict(mutation.name, mutation.what, bool(failed), tuple(failed), round(time.monotonic() - begin, 1))


def compiled(copy: Path, changed: Path) -> None:
    """Build the C core of a copy again if it is part of what changed."""
    if changed.suffix in {".c", ".h"}:
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"],
            cwd=copy, check=True, capture_output=True,
        )  # fmt: skip


def boot(copy: Path, machine: str) -> list[str]:
    """The checks that failed in a boot of this copy of the tree. Anything but a report counts as the VM's loss."""
    with tempfile.TemporaryDirectory(prefix="vioasid-") as folder:
        run = Path(folder, "run")
        run.mkdir(mode=0o700)
        environment = {
            **os.environ, "XDG_RUNTIME_DIR": str(run), "XDG_STATE_HOME": folder, "VIOASID_CACHE": str(cache_dir()),
            "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        arguments = ["--machine", machine, "--json", "--append", f"vioasid.checks={CHECKS} vioasid.stop=failure"]
        with subprocess.Popen(
            [sys.executable, "-m", "backend.cli.main", "boot", *arguments],
            cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            BOOTS.add(process)
            if ENDING.is_set():
                process.terminate()
            try:
                out, said = process.communicate(timeout=BOOT_SECONDS)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.communicate()
                return [f"no end within {BOOT_SECONDS} s"]
            finally:
                BOOTS.discard(process)
    try:
        report: dict[str, Any] = json.loads(out)
    except ValueError:
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        return [f"exit code {process.returncode}: {last[0]}"]
    failed = [check["name"] for check in report["checks"] if check["status"] == "fail"]
    return failed or ([] if report["ok"] else [f"exit code {process.returncode}"])


class Copies:
    """Scratch copies of the tree, each used by one guest at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._free = list(paths)
        self._lock = threading.Condition()

    @contextmanager
    def one(self) -> Iterator[Path]:
        with self._lock:
            self._lock.wait_for(lambda: self._free)
            path = self._free.pop()
        try:
            yield path
        finally:
            with self._lock:
                self._free.append(path)
                self._lock.notify()


@contextmanager
def scratch_copies(number: int) -> Iterator[Copies]:
    """Copies with the C core as it is built here; they go with the context."""
    with tempfile.TemporaryDirectory(prefix="vioasid-mutants-") as folder:
        paths = [Path(folder, str(each)) for each in range(number)]
        for path in paths:
            for name in COPIED:
                source = ROOT / name
                if source.is_dir():
                    shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    path.mkdir(exist_ok=True)
                    shutil.copy2(source, path / name)
        yield Copies(paths)


def show(verdicts: Sequence[Verdict]) -> None:
    """A table: what each mutation makes wrong, and which checks noticed."""
    from rich.console import Console  # noqa: PLC0415 - of no use with --json
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, header_style="bold")
    for column in ("mutation", "what is wrong", "", "noticed by"):
        table.add_column(column)
    for each in verdicts:
        more = f" and {len(each.failed) - CHECKS_SHOWN} more" if len(each.failed) > CHECKS_SHOWN else ""
        word = Text("caught", style="green") if each.caught else Text("SURVIVES", style="bold red")
        table.add_row(each.name, each.what, word, Text(", ".join(each.failed[:CHECKS_SHOWN]) + more))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    left = [each.name for each in verdicts if not each.caught]
    survivors = f"; left: {', '.join(left)}" if left else ""
    console.print(f"{len(verdicts) - len(left)} of {len(verdicts)} caught{survivors}")


if __name__ == "__main__":
    sys.exit(guarded(main))
