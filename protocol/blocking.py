"""A client for scripts and command lines, without a loop: one thread, calls that wait."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .caller import Caller, answer, nobody_serves
from .errors import RpcError
from .limits import DEFAULT, Limits
from .messages import Notification, Response
from .sockets import RETRY_SECONDS, try_connect

WINDOW = 512
"""Requests of call_many() under way at once: enough that neither side waits for the other."""


class BlockingClient:
    """A connection to a server, for one thread. `timeout`: seconds a call waits for its reply, None for ever.

    client.call("ioasid.alloc", kind="kernel") returns the result; it raises RpcError if the server refuses,
    TimeoutError if it does not answer in time, Disconnected if the connection cannot be made or ends.
    """

    def __init__(self, path: Path, *, timeout: float | None = 30.0, limits: Limits = DEFAULT) -> None:
        self.timeout = timeout
        self._caller = Caller(Path(path), limits)
        self._replies: dict[int, Response] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            deadline = self._deadline()
            while not try_connect(self._socket, Path(path)):
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "too many others wait for it")
                time.sleep(RETRY_SECONDS)
        except OSError as error:
            self._socket.close()
            raise nobody_serves(Path(path), error) from error
        self._poll = select.poll()

    @property
    def lost(self) -> int:
        """How many notifications were dropped because nobody took them in time, here or at the server."""
        return self._caller.lost

    def call(self, method: str, /, *, descriptors: Sequence[int] = (), **fields: Any) -> Any:
        """Call a method; its result. `descriptors` go along by SCM_RIGHTS and stay the caller's."""
        msgid = self._caller.request(method, fields, descriptors)
        try:
            return answer(self._reply(msgid, self._deadline(), method))
        finally:
            self._caller.forget(msgid)

    def call_many(self, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Any]:
        """Call methods without waiting for each: their results in order, an RpcError standing for one refused."""
        results: list[Any] = []
        under_way: deque[tuple[int, str]] = deque()
        source = iter(calls)
        while True:
            for method, fields in islice(source, WINDOW - len(under_way)):
                under_way.append((self._caller.request(method, fields), method))
            if not under_way:
                return results
            msgid, method = under_way.popleft()
            try:
                results.append(answer(self._reply(msgid, self._deadline(), method)))
            except RpcError as error:
                results.append(error)

    def notification(self, timeout: float | None = None) -> Notification | None:
        """The next notification, or None if there was none within `timeout` seconds (None: wait for ever)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._caller.notifications:
            if not self._wait(deadline):
                return None
        return self._caller.notifications.popleft()

    def close(self) -> None:
        """End the connection."""
        self._caller.close()
        with contextlib.suppress(OSError):
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deadline(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout

    def _reply(self, msgid: int, deadline: float | None, method: str) -> Response:
        while msgid not in self._replies:
            if not self._wait(deadline):
                raise TimeoutError(f"{method} was not answered within {self.timeout:g} seconds")
        return self._replies.pop(msgid)

    def _wait(self, deadline: float | None) -> bool:
        """Send and receive what can be, waiting until something can; False once it is too late.

        Both at once: a server does not read from a client that does not read.
        """
        self._caller.send(self._socket)
        self._poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._caller.unsent else 0))
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._poll.poll(None if left is None else left * 1000):
            return False
        for response in self._caller.receive(self._socket):
            self._replies[response.msgid] = response
        return True
