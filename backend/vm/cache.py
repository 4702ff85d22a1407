"""The cache folder: entries that are whole or absent, made by one run at a time.

    CACHE/NAME-KEY/            an entry, as its maker left it
    CACHE/NAME-KEY/manifest    JSON, written last: what was asked, facts, paths that must exist
    CACHE/.lock-NAME           held with flock while an entry of that name is made
    CACHE/.making-NAME-*/      what the holder of that lock is at; anybody else's is left over from a run that died

An entry is made beside its place, written to the disk and renamed into it, so that no death of the maker (SIGKILL,
power, a full disk) leaves something that looks done.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from backend.vm.errors import CannotRun
from backend.vm.progress import Report, notice, shown

MANIFEST = "manifest"
UNUSED_DAYS = 60
"""An entry asked for under an old key may serve another checkout; one that nobody opened for this long serves none."""

MIB = 1 << 20

MAKE_SPACE = "Free some space, or set VIOASID_CACHE to a folder on a larger disk."
MAKE_WRITABLE = "Make it writable, or set VIOASID_CACHE to a folder that is."


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole entry: its folder and what its maker noted about it."""

    path: Path
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Made:
    """What a maker hands back: facts to remember, and the paths below the entry without which it is none."""

    facts: Mapping[str, str]
    requires: Sequence[str]


Maker = Callable[[Path, Path, Report], Made]
"""Called with the empty folder of the entry, a folder for scratch work, and where to report phases."""


def cache_dir() -> Path:
    """The folder in use: $VIOASID_CACHE, else vioasid in the XDG cache folder (a relative one counts as unset)."""
    if own := os.environ.get("VIOASID_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if os.path.isabs(xdg) else Path(os.environ.get("HOME") or "~").expanduser() / ".cache"
    return base / "vioasid"


class Cache:
    """Entries by name and key; the key is all that was asked for, so asking for something else makes a new entry."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir()

    def find(self, name: str, key: Mapping[str, object]) -> Entry | None:
        """The entry if it is whole. Never waits, and writes nothing but the manifest's time."""
        path = self._place(name, key)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            facts, requires = manifest["facts"], manifest["requires"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not all((path / required).exists() for required in requires):
            return None
        with suppress(OSError):  # a cache that is shared read-only is still a cache
            os.utime(path / MANIFEST)
        return Entry(path, facts)

    def get(self, name: str, key: Mapping[str, object], *, what: str, need: int, maker: Maker) -> Entry:
        """The entry, made now if it is absent.

        `what` names it in messages ("QEMU"), `need` is the number of bytes that making it takes at its peak.
        Raises CannotRun when there is no space or the folder cannot be written; whatever `maker` raises goes through.
        """
        if entry := self.find(name, key):
            return entry
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._lock(name, what):
                if entry := self.find(name, key):  # made by the run we waited for
                    return entry
                for stale in self.root.glob(f".making-{name}-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                self._check_space(what, need)
                return self._make(name, key, what, maker)
        except OSError as error:
            raise self._explain(error, what, need) from error

    def _place(self, name: str, key: Mapping[str, object]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.root / f"{name}-{digest[:12]}"

    @contextmanager
    def _lock(self, name: str, what: str) -> Iterator[None]:
        with open(self.root / f".lock-{name}", "a", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notice(f"waiting for another run that fetches {what} into {self.root}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make(self, name: str, key: Mapping[str, object], what: str, maker: Maker) -> Entry:
        place = self._place(name, key)
        prefix = f".making-{name}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=self.root, ignore_cleanup_errors=True) as making:
            entry, work = Path(making, "entry"), Path(making, "work")
            entry.mkdir()
            work.mkdir()
            with shown(f"preparing {what}") as report:
                made = maker(entry, work, report)
                report("writing to disk")
                manifest = {"name": name, "key": key, "facts": dict(made.facts), "requires": list(made.requires)}
                (entry / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
                # one call for thousands of files, where fsync of each takes many seconds
                subprocess.run(["sync", "-f", str(entry)], check=False, stderr=subprocess.DEVNULL)
            if place.exists():  # damaged: find() did not take it
                place.rename(Path(making, "damaged"))
            entry.rename(place)
            folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._prune(name, place)
        return Entry(place, made.facts)

    def _prune(self, name: str, keep: Path) -> None:
        for old in self.root.glob(f"{name}-" + "[0-9a-f]" * 12):
            try:
                unused = time.time() - (old / MANIFEST).stat().st_mtime
            except OSError:
                unused = float("inf")
            if old != keep and unused > UNUSED_DAYS * 86400:
                shutil.rmtree(old, ignore_errors=True)

    def _check_space(self, what: str, need: int) -> None:
        free = self.free_bytes()
        if free < need:
            space = f"{self.root} has {free // MIB} MiB free and {need // MIB} MiB are needed"
            raise CannotRun(f"No space to fetch {what}: {space}. {MAKE_SPACE}")

    def free_bytes(self) -> int:
        """Free bytes for this user where the cache folder is, or would be made."""
        place = self.root
        while not place.exists() and place != place.parent:
            place = place.parent
        stat = os.statvfs(place)
        return stat.f_bavail * stat.f_frsize

    def _explain(self, error: OSError, what: str, need: int) -> CannotRun:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            space = f"{self.root} is full, about {need // MIB} MiB are needed"
            return CannotRun(f"No space to fetch {what}: {space}. {MAKE_SPACE}")
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "it is no folder" if no_folder else error.strerror or error
        return CannotRun(f"The cache folder {self.root} cannot be used: {reason}. {MAKE_WRITABLE}")
