"""A client's side of a connection, without waiting: what is to be sent, which reply belongs to which request."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .codec import Decoder, Encoder
from .errors import Disconnected, RpcError
from .limits import DEFAULT, MSGID_END, Limits
from .messages import Notification, Response
from .sockets import close_all, send

REPLY_DEPTH = 128
"""Arrays and maps within each other in a reply: a tree of nested spaces may be deep."""

JOINED = 64 << 10
"""Bytes of requests that are sent by one call of the system."""


class Caller:
    """Requests go in by request(), out by send(); what arrives goes in by receive() and comes out as replies."""

    def __init__(self, path: Path, limits: Limits = DEFAULT) -> None:
        self.path = path
        self.notifications: deque[Notification] = deque()
        """Those that nobody has taken yet, the newest."""
        self.lost = 0
        """How many were dropped for want of room, here or at the server."""
        self._limits = limits
        self._encoder = Encoder(limits)
        self._decoder = Decoder(replace(limits, depth=REPLY_DEPTH, values=limits.message))
        self._waiting: set[int] = set()
        self._next = 0
        self._unsent: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._closing = ""

    def request(self, method: str, fields: Mapping[str, Any], descriptors: Sequence[int] = ()) -> int:
        """Queue a request, with duplicates of descriptors; its msgid. Raises RpcError EMSGSIZE; TypeError, ValueError
        or OverflowError for fields that have no form in MessagePack; OSError for what is no descriptor."""
        while self._next in self._waiting:
            self._next = (self._next + 1) % MSGID_END
        msgid = self._next
        packed = self._encoder.request(msgid, method, fields)
        # the caller may close its own before the system takes the request
        self._unsent.append((memoryview(packed), [os.dup(each) for each in descriptors]))
        self._next = (msgid + 1) % MSGID_END
        self._waiting.add(msgid)
        return msgid

    def forget(self, msgid: int) -> None:
        """Nobody waits for this reply any more."""
        self._waiting.discard(msgid)

    @property
    def unsent(self) -> bool:
        """Whether something is to be sent."""
        return bool(self._unsent)

    def send(self, connection: socket.socket) -> None:
        """Send what the system takes. A request with descriptors has a call of its own, so that they are known to be
        its."""
        try:
            while self._unsent:
                data, descriptors = self._unsent.popleft()
                if not descriptors and self._unsent:
                    data = self._joined(data)
                try:
                    sent = send(connection, data, descriptors)
                except (BlockingIOError, InterruptedError):
                    self._unsent.appendleft((data, descriptors))
                    return
                close_all(descriptors)
                if sent < len(data):
                    self._unsent.appendleft((data[sent:], ()))
        except ConnectionError:
            close_all(descriptors)
            self.close()  # what the server said last may still be read

    def close(self) -> None:
        """Nothing more is sent."""
        while self._unsent:
            close_all(self._unsent.popleft()[1])

    def _joined(self, first: memoryview) -> memoryview:
        pieces, size = [first], len(first)
        while self._unsent and not self._unsent[0][1] and size < JOINED:
            piece = self._unsent.popleft()[0]
            pieces.append(piece)
            size += len(piece)
        return memoryview(b"".join(pieces))

    def receive(self, connection: socket.socket) -> Iterator[Response]:
        """Replies to requests that are waited for. Raises Disconnected, Malformed."""
        try:
            data = connection.recv(self._limits.read)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise self.ended(error.strerror or "") from error
        if not data:
            raise self.ended()
        self._decoder.feed(data)
        for message in self._decoder:
            if isinstance(message, Response):
                if message.msgid in self._waiting:
                    self._waiting.remove(message.msgid)
                    yield message
            elif isinstance(message, Notification):
                self._notified(message)

    def _notified(self, message: Notification) -> None:
        known = message.params[0] if message.params and isinstance(message.params[0], dict) else {}
        if message.method == "closing":
            self._closing = str(known.get("sentence", ""))
            return
        if message.method == "lost":
            self.lost += int(known.get("count", 0))
        self.notifications.append(message)
        if len(self.notifications) > self._limits.notifications:
            self.notifications.popleft()
            self.lost += 1

    def ended(self, reason: str = "") -> Disconnected:
        """The error to raise once the connection is gone."""
        return Disconnected(f"{self.path}: {self._closing or reason or 'the server has closed the connection'}")


def answer(response: Response) -> Any:
    """The result of a reply; raises the RpcError that it carries."""
    error = response.error
    if error is None:
        return response.result
    match error:
        case [int(number), str(sentence)] if number > 0:
            raise RpcError(number, sentence)
    raise RpcError(errno.EPROTO, f"the server answered with an error of no known shape: {error!r:.200}")


def nobody_serves(path: Path, error: OSError) -> Disconnected:
    """What to say when a connection cannot be made."""
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        return Disconnected(f"nobody serves {path}: start the server first, or name its socket")
    return Disconnected(f"cannot connect to {path}: {error.strerror}")
