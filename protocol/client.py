"""A client on the running asyncio loop: any number of calls at once, replies in any order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .caller import Caller, answer, nobody_serves
from .errors import Disconnected, Malformed
from .limits import DEFAULT, Limits
from .messages import Notification, Response
from .sockets import RETRY_SECONDS, try_connect


class Client:
    """A connection to a server. Made by connect(); ends by close(), or as an asynchronous context manager.

    client.call("ioasid.alloc", kind="kernel") is a coroutine of the result; it raises RpcError if the server refuses,
    Disconnected if the connection ends. A call that is cancelled goes on at the server, its reply is dropped.
    """

    def __init__(self, connection: socket.socket, caller: Caller) -> None:
        self._socket = connection
        self._caller = caller
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Future[Response]] = {}
        self._notified = asyncio.Event()
        self._error: Exception | None = None
        self._writing = False
        self._flush_due = False
        self._loop.add_reader(connection, self._readable)

    @classmethod
    async def connect(cls, path: Path, *, limits: Limits = DEFAULT) -> Self:
        """Connect to the server at `path`. Raises Disconnected."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            # not the loop's: for a Unix socket "would block" means a full queue, which nothing announces the end of
            while not try_connect(connection, path):
                await asyncio.sleep(RETRY_SECONDS)
        except OSError as error:
            connection.close()
            raise nobody_serves(path, error) from error
        except BaseException:
            connection.close()
            raise
        return cls(connection, Caller(path, limits))

    @property
    def lost(self) -> int:
        """How many notifications were dropped because nobody took them in time, here or at the server."""
        return self._caller.lost

    async def call(self, method: str, /, *, descriptors: Sequence[int] = (), **fields: Any) -> Any:
        """Call a method; its result. `descriptors` go along by SCM_RIGHTS and stay the caller's."""
        if self._error is not None:
            raise self._error
        msgid = self._caller.request(method, fields, descriptors)
        reply = self._calls[msgid] = self._loop.create_future()
        if not self._flush_due and not self._writing:
            self._flush_due = True
            self._loop.call_soon(self._flush)  # calls made by then leave together
        try:
            return answer(await reply)
        finally:
            self._calls.pop(msgid, None)
            self._caller.forget(msgid)

    async def notifications(self) -> AsyncIterator[Notification]:
        """Notifications as they come, until the connection ends."""
        while True:
            while self._caller.notifications:
                yield self._caller.notifications.popleft()
            if self._error is not None:
                return
            self._notified.clear()
            await self._notified.wait()

    async def close(self) -> None:
        """End the connection; calls under way raise Disconnected."""
        self._end(Disconnected("the connection was closed from this side"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _readable(self) -> None:
        try:
            for response in self._caller.receive(self._socket):
                call = self._calls.get(response.msgid)
                if call is not None and not call.done():
                    call.set_result(response)
        except (Disconnected, Malformed) as error:
            self._end(error)
        if self._caller.notifications:
            self._notified.set()

    def _flush(self) -> None:
        self._flush_due = False
        if self._error is not None:
            return
        self._caller.send(self._socket)
        if self._caller.unsent != self._writing:
            self._writing = self._caller.unsent
            if self._writing:
                self._loop.add_writer(self._socket, self._flush)
            else:
                self._loop.remove_writer(self._socket)

    def _end(self, error: Exception) -> None:
        if self._error is not None:
            return
        self._error = error
        self._caller.close()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        with contextlib.suppress(OSError):
            self._socket.close()
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        self._notified.set()
