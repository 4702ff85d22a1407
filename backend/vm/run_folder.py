"""The folders of a run: a private one for its sockets, gone when it ends, and one for logs, kept when it fails."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType

from backend.vm.errors import CannotRun
from backend.vm.machine import Machine

SOCKET_PATH_LIMIT = 107  # sockaddr_un.sun_path holds 108 bytes, the last of them zero
CONTROL = "control"  # the socket of each run's control plane, without .sock
LOGS_KEPT = 20  # failed runs whose logs stay: enough to look back on a day's work, a few MiB in all


class RunFolder:
    """`path` (mode 0700) holds the run's sockets and is locked by this process; `logs` holds what each part wrote."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keep_logs = False
        self.path = runtime_folder() / name
        self.logs = _logs_folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{os.getpid()}"
        self._lock = _lock(self.path)
        try:
            self.logs.mkdir(parents=True)
        except OSError as error:
            self.close()
            raise CannotRun(
                f"{self.logs}: {error.strerror}; set XDG_STATE_HOME to a folder that can be written"
            ) from error

    def socket(self, name: str) -> Path:
        """The path of a socket in this run; CannotRun if the kernel could not take a path of that length."""
        path = self.path / f"{name}.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            raise CannotRun(
                f"the socket path {path} has {len(os.fsencode(path))} bytes, a Unix socket takes {SOCKET_PATH_LIMIT}; "
                "set XDG_RUNTIME_DIR to a shorter folder, or give the run a shorter name"
            )
        return path

    def sockets(self, machine: Machine) -> dict[str, Path]:
        """The sockets of a machine's functions, by their names."""
        return {function.name: self.socket(function.name) for function in machine.functions}

    def console(self, name: str) -> Path:
        """The log of a guest's console, of the run's part called `name`."""
        return self.logs / f"{name}-console.log"

    def close(self) -> None:
        """Remove the sockets, and the logs unless they are to be kept and there are any."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        if not self.keep_logs or not any(self.logs.iterdir()):
            shutil.rmtree(self.logs, ignore_errors=True)
        else:
            _forget_old_logs()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def runtime_folder() -> Path:
    """Where runs keep their sockets: $XDG_RUNTIME_DIR/vioasid, else a folder of this user in the temporary folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "vioasid" if runtime else Path(tempfile.gettempdir()) / f"vioasid-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.stat(follow_symlinks=False)
    except OSError as error:
        raise CannotRun(f"{folder}: {error.strerror}; set XDG_RUNTIME_DIR to a folder that can be written") from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise CannotRun(f"{folder} is not a folder of this user alone (mode 0700); remove it, or set XDG_RUNTIME_DIR")
    return folder


def _lock(path: Path) -> int:
    """Make the folder and hold its lock; what a run that died left behind is cleared away."""
    while True:
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the run before us removed the folder between the two calls
        except OSError as error:
            raise CannotRun(f"{path}: {error.strerror}; set XDG_RUNTIME_DIR to a folder that can be written") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise CannotRun(
                f"a run called {path.name!r} is active already; end it, or give this one another name (--name)"
            ) from error
        if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
            break
        os.close(handle)
    for left in path.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return handle


def _logs_folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "vioasid" / "logs"


def _forget_old_logs() -> None:
    folders = sorted(
        (path for path in _logs_folder().iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime
    )
    for old in folders[:-LOGS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
