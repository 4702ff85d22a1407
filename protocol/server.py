"""Serving a table of methods to clients of this user, on a Unix socket, on the running asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .budget import Budget
from .codec import Encoder
from .connection import Connection, Method, Session
from .errors import RpcError
from .large import LargeMessages
from .limits import DEFAULT, Limits
from .sockets import allow_descriptors, listen, may_connect

VERSION = 1
"""Of the protocol; raised when a client that knew the one before would be misled."""

OWN_NOTIFICATIONS = ("closing", "lost")
"""What any server may say without being asked."""

ERRORS_KEPT = 16
"""Exceptions of methods kept and logged with their traceback; a client could cause the same one for ever."""
ACCEPT_AT_ONCE = 32
"""Connections accepted before those there are have their turn."""
ACCEPT_PAUSE_SECONDS = 0.2
"""Without a free file descriptor, how long to wait before accepting again."""
SPARE_DESCRIPTORS = 256
"""Of the process, beside those of the connections."""

OnConnect = Callable[[Connection], Session]


class Server:
    """Methods by name, for any number of clients; see connection.py for what one client may do.

    A method is called with the session that on_connect made for the connection (None without it) and the request's
    fields. It answers with the result, or is a coroutine function and answers later; it refuses by RpcError, or any
    OSError with an errno. Replies to requests that were waited for come in the order in which they are ready.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        path: Path,
        *,
        on_connect: OnConnect | None = None,
        notifications: Iterable[str] = (),
        limits: Limits = DEFAULT,
        log: logging.Logger | None = None,
    ) -> None:
        """`notifications`: names that `hello` lists. on_connect may refuse a client by an OSError."""
        self.notifications = sorted((*OWN_NOTIFICATIONS, *notifications))
        self.methods: Mapping[str, Method] = {"hello": self._hello, **methods}
        self.path = Path(path)
        self.limits = limits
        self.encoder = Encoder(limits)
        self.waiting = Budget(limits.waiting, least=limits.small, holders=limits.connections)
        self.pending = Budget(limits.pending, least=limits.pending_least, holders=limits.connections)
        self.large = LargeMessages(limits.large, limits.large_seconds)
        self.log = log or logging.getLogger(__name__)
        self.errors: list[BaseException] = []
        """What methods raised that is no refusal, the first ERRORS_KEPT of it."""
        self.connections: set[Connection] = set()
        self._on_connect = on_connect
        self._error_count = 0
        self._listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._paused = False
        self._all_gone = asyncio.Event()

    async def start(self) -> None:
        """Listen. Raises SocketRefused for a bad path."""
        allow_descriptors(self.limits.connections + SPARE_DESCRIPTORS)
        self._listener = listen(self.path, backlog=self.limits.connections)
        status = os.stat(self.path)
        self._identity = status.st_dev, status.st_ino
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def close(self) -> None:
        """Stop listening, remove the socket, end every connection; returns when nothing of them runs any more."""
        if self._pause is not None:
            self._pause.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                status = os.stat(self.path)
                if (status.st_dev, status.st_ino) == self._identity:
                    os.unlink(self.path)
        for connection in [*self.connections]:
            connection.close(errno.ESHUTDOWN, "the server is closing")
        while self.connections:
            self._all_gone.clear()
            await self._all_gone.wait()

    # Called by connections

    def lost(self, connection: Connection) -> None:
        """Nothing of a connection is left."""
        self.connections.discard(connection)
        if not self.connections:
            self._all_gone.set()

    def record(self, error: BaseException) -> None:
        """Keep and log what a method raised, up to a bound."""
        self._error_count += 1
        if self._error_count <= ERRORS_KEPT:
            self.errors.append(error)
            self.log.error("a method failed: %s", error, exc_info=error)
        if self._error_count == ERRORS_KEPT:
            self.log.error("methods keep failing; no more of it is logged")

    def _hello(self, session: Session, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the server is, and offers; a client may say anything about itself."""
        return {
            "version": VERSION,
            "methods": sorted(self.methods),
            "notifications": self.notifications,
            "limits": asdict(self.limits),
        }

    # Accepting

    def _accept(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPT_AT_ONCE):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Still readable, so the loop would spin on it: look again when something may have been closed.
                if not self._paused:
                    self.log.error("cannot accept clients for now: %s", error.strerror)
                self._paused = True
                loop.remove_reader(self._listener)
                self._pause = loop.call_later(ACCEPT_PAUSE_SECONDS, loop.add_reader, self._listener, self._accept)
                return
            self._paused = False
            connection = Connection(self, accepted, loop)
            self.connections.add(connection)
            try:
                self._admit(connection)
                connection.start(None if self._on_connect is None else self._on_connect(connection))
            except Exception as error:
                if not isinstance(error, OSError) or not error.errno:
                    self.record(error)
                    error = RpcError(errno.EIO, "the server failed, through no fault of yours: its log says how")
                connection.close(error.errno or errno.EIO, error.strerror or "refused")

    def _admit(self, connection: Connection) -> None:
        if not may_connect(connection.peer):
            raise RpcError(errno.EPERM, "another user's server: connect as its user, or as root")
        if len(self.connections) > self.limits.connections:
            raise RpcError(errno.EUSERS, f"{self.limits.connections} clients are connected: close one first")
