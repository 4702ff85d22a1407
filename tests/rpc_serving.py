"""A protocol server on a loop in a thread of its own, so that tests can be plain blocking clients."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgpack

from protocol import Connection, Limits, Method, RpcError, Server

T = TypeVar("T")


class Sessions:
    """Makes the sessions of a server, and counts those that are open."""

    def __init__(self) -> None:
        self.open: list[OneSession] = []
        self.closed = 0

    def __call__(self, connection: Connection) -> OneSession:
        session = OneSession(self, connection)
        self.open.append(session)
        return session


class OneSession:
    """A connection's session; it must be told once that the connection is gone."""

    def __init__(self, sessions: Sessions, connection: Connection) -> None:
        self.connection = connection
        self._sessions = sessions

    def closed(self) -> None:
        self._sessions.open.remove(self)
        self._sessions.closed += 1


def add(session: OneSession, fields: dict[str, Any]) -> Any:
    """The sum of a and b."""
    return fields["a"] + fields["b"]


def echo(session: OneSession, fields: dict[str, Any]) -> Any:
    return fields


def refuse(session: OneSession, fields: dict[str, Any]) -> Any:
    raise RpcError(fields["errno"], fields["sentence"])


def fail(session: OneSession, fields: dict[str, Any]) -> Any:
    raise ZeroDivisionError("a mistake of the server")


async def later(session: OneSession, fields: dict[str, Any]) -> Any:
    """Answers after `seconds` with `value`."""
    await asyncio.sleep(fields["seconds"])
    return fields.get("value")


def work(session: OneSession, fields: dict[str, Any]) -> None:
    """Takes `seconds`, in which the loop does nothing else."""
    time.sleep(fields["seconds"])


def notify(session: OneSession, fields: dict[str, Any]) -> None:
    """Sends `count` notifications "tick" with their number and `size` bytes."""
    for number in range(fields["count"]):
        session.connection.notify("tick", {"number": number, "data": bytes(fields.get("size", 0))})


def tell(session: OneSession, fields: dict[str, Any]) -> None:
    """Sends the notification `method` with `params`."""
    session.connection.notify(fields["method"], *fields["params"])


def blob(session: OneSession, fields: dict[str, Any]) -> bytes:
    """`size` bytes."""
    return bytes(fields["size"])


def read_files(session: OneSession, fields: dict[str, Any]) -> list[bytes]:
    """What the files hold that came with the request."""
    files = session.connection.take_fds()
    try:
        return [os.pread(file, 100, 0) for file in files]
    finally:
        for file in files:
            os.close(file)


async def read_files_later(session: OneSession, fields: dict[str, Any]) -> list[bytes]:
    await asyncio.sleep(fields["seconds"])
    return read_files(session, fields)


METHODS: dict[str, Method] = {
    "add": add,
    "blob": blob,
    "echo": echo,
    "fail": fail,
    "later": later,
    "notify": notify,
    "read_files": read_files,
    "read_files_later": read_files_later,
    "refuse": refuse,
    "tell": tell,
    "work": work,
}


class RpcServing:
    """A server of METHODS at `path`."""

    def __init__(self, path: Path, *, limits: Limits | None = None) -> None:
        self.path = path
        self.sessions = Sessions()
        self.loop = asyncio.new_event_loop()
        self.server = Server(METHODS, path, on_connect=self.sessions, notifications=["tick"], limits=limits or Limits())
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.run(self.server.start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self.server.close())
        tasks = self.call(lambda: [task for task in asyncio.all_tasks() if task is not asyncio.current_task()])
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        assert self.sessions.open == []
        assert tasks == []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def call(self, work: Callable[[], T]) -> T:
        """Run a function on the loop and wait for it."""

        async def calling() -> T:
            return work()

        return self.run(calling())

    def wait_for(self, condition: Callable[[], bool], what: str, *, seconds: float = 10.0) -> None:
        """Wait until the loop has brought something about."""
        deadline = time.monotonic() + seconds
        while not self.call(condition):
            assert time.monotonic() < deadline, f"did not come about within {seconds} s: {what}"
            time.sleep(0.005)

    def wait_until_alone(self) -> None:
        """Wait until nothing is left of any client."""
        self.wait_for(lambda: not self.server.connections and not self.sessions.open, "no connections")


class RawClient:
    """A socket and what MessagePack makes of it: nothing of the code under test."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))  # before the timeout: it waits where the queue is full
        self.socket.settimeout(10)
        self._unpacker = msgpack.Unpacker(max_buffer_size=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, *messages: object) -> None:
        self.socket.sendall(b"".join(msgpack.packb(message) for message in messages))

    def receive(self) -> Any:
        """The next message, or None at the end of the connection."""
        while True:
            for message in self._unpacker:
                return message
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._unpacker.feed(data)

    def rest(self) -> list[Any]:
        """All messages until the end of the connection."""
        return list(iter(self.receive, None))

    def ask(self, msgid: int, method: str, **fields: Any) -> Any:
        """Send one request; the next message that arrives."""
        self.send([0, msgid, method, [fields]])
        return self.receive()
