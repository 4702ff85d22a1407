"""Unix sockets: listening for one user alone, who the peer is, bytes with the descriptors that came with them."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import select
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import SocketRefused
from .limits import SOCKET_PATH_MAX

RETRY_SECONDS = 0.01
"""Between attempts to connect to a server whose queue of connections is full."""

SENT_AT_ONCE = 253
"""Descriptors that the system lets one message carry (SCM_MAX_FD); all are received, so that all can be closed."""

_CREDENTIALS = struct.Struct("iII")
_ANCILLARY = socket.CMSG_SPACE(SENT_AT_ONCE * 4)
# Plain ints: operators of socket's flag enumerations cost as much as a system call.
_RECEIVE = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who opened the other end, as the system saw it then (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """The peer's credentials, which it cannot choose. A pid of 0 is one that cannot be seen from here."""
    return Peer(*_CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


def may_connect(peer: Peer) -> bool:
    """Whether a peer is served: our own user, and root.

    Refusing root would protect nothing, for it can trace this process; and `sudo` finds the socket it asks for.
    """
    return peer.uid in (os.geteuid(), 0)


def receive(connection: socket.socket, size: int) -> tuple[bytes, Sequence[int], bool]:
    """Bytes at hand, the descriptors that came with them, and whether some were lost for want of free ones here.

    Raises BlockingIOError when there are none; no bytes mean that the other side has ended.
    """
    data, ancillary, flags, _ = connection.recvmsg(size, _ANCILLARY, _RECEIVE)
    if not ancillary:
        return data, (), bool(flags & _TRUNCATED)
    return data, _descriptors(ancillary), bool(flags & _TRUNCATED)


def gone(connection: socket.socket) -> bool:
    """Whether the other side reads no more either: it has not just ended what it sends."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def send(connection: socket.socket, data: bytes | memoryview, descriptors: Sequence[int] = ()) -> int:
    """Send with descriptors on the first byte; how many bytes went (the descriptors did if any byte did)."""
    if not descriptors:
        return connection.send(data)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]
    return connection.sendmsg([data], rights)


def close_all(descriptors: Iterable[int]) -> None:
    """Close received descriptors that nobody took."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def listen(path: Path, *, backlog: int) -> socket.socket:
    """A non-blocking listening socket at `path`, mode 0600; its folder is made with mode 0700 where there is none.

    A dead server's socket file is replaced. Raises SocketRefused.
    """
    raw = os.fsencode(path)
    if len(raw) > SOCKET_PATH_MAX:
        raise SocketRefused(
            f"{path} has {len(raw)} bytes, a socket's path at most {SOCKET_PATH_MAX}: use a shorter folder"
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_dead(path)
        listener.setblocking(False)
        os.fchmod(listener.fileno(), 0o600)  # bind() makes the file with the socket's own mode: it never is wider
        listener.bind(raw)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SocketRefused(f"{path} was taken by another process just now: choose another path") from error
        raise SocketRefused(f"cannot listen at {path}: {error.strerror}") from error
    except SocketRefused:
        listener.close()
        raise
    return listener


def try_connect(connection: socket.socket, path: Path) -> bool:
    """Connect a non-blocking socket; False while the server's queue is full. Raises OSError."""
    try:
        connection.connect(os.fsencode(path))
    except BlockingIOError:
        return False
    return True


def _remove_dead(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SocketRefused(f"{path} exists and is no socket: remove it or choose another path")
        if _is_alive(path):
            raise SocketRefused(f"{path} is served by another process: end it or choose another path")
        os.unlink(path)


def _is_alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            try_connect(probe, path)
        except ConnectionRefusedError:
            return False
    return True


def allow_descriptors(count: int) -> None:
    """Let this process have `count` open files, or as many as it may give itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
