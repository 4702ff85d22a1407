"""One client of the server: its socket, its requests, and what it may cost.

OPEN: requests are served. CLOSING: nothing is read any more, what was sent last may still be read. CLOSED: the socket
is closed, requests that are waited for are ended; when the last of them has, the session is told.

Reads and writes never wait. A client that does not read its replies is not read from; a turn is bounded, so that others
have theirs; all replies of a turn leave in one write.

Descriptors (SCM_RIGHTS) belong to the message that holds the last byte of the read they came with. The system ends such
a read within the bytes that were sent with them, so this is the sender's message whenever it was sent by a call of its
own.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from time import monotonic
from types import CoroutineType
from typing import Any, Protocol

from .codec import Decoder, Encoder, as_utf8
from .errors import Malformed, RpcError
from .limits import Limits
from .messages import Message, Notification, Request, Unusable, fields_of
from .outbox import Outbox
from .sockets import close_all, peer_of, receive

Method = Callable[[Any, dict[str, Any]], Any]
"""Called with the session and the request's fields; answers with the result, or a coroutine of it."""

_offered: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("descriptors of the request", default=None)


class Session(Protocol):
    """What the owner of the server keeps for a connection."""

    def closed(self) -> None:
        """The connection is gone, and nothing of it runs any more."""


class Owner(Protocol):
    """The server, as a connection sees it."""

    limits: Limits
    encoder: Encoder
    log: logging.Logger

    @property
    def methods(self) -> Mapping[str, Method]:
        """What clients may call, by name."""

    def lost(self, connection: Connection) -> None:
        """The connection is closed and its session was told."""

    def record(self, error: BaseException) -> None:
        """A method raised what is no refusal."""


class State(enum.Enum):
    """See the head of this file."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Connection:
    """A client, from the moment it is accepted until nothing of it is left."""

    def __init__(self, owner: Owner, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sock.setblocking(False)
        self.peer = peer_of(sock)
        self.state = State.OPEN
        self.session: Session | None = None
        self._owner = owner
        self._limits = owner.limits
        self._encoder = owner.encoder
        self._socket = sock
        self._loop = loop
        self._decoder = Decoder(owner.limits)
        self._outbox = Outbox(owner.limits, lambda count: self._encoder.notification("lost", {"count": count}))
        self._unsent = memoryview(b"")
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived: deque[tuple[int, list[int], bool]] = deque()  # offset of the byte they belong to, fds, some lost
        self._flush_due = False
        self._reading = False
        self._writing = False
        self._goodbye: asyncio.TimerHandle | None = None

    def start(self, session: Session | None) -> None:
        """Serve requests from now on."""
        self.session = session
        self._read_more()

    # For the owner of the server

    def notify(self, method: str, *params: Any) -> None:
        """Send a notification. Never waits: a client that does not read loses the oldest, and is told how many."""
        if self.state is State.OPEN:
            self._outbox.notify(self._encoder.notification(method, *params))
            self._flush_soon()

    def take_fds(self) -> list[int]:
        """The descriptors that came with the request being served, now the caller's to close. Those that no method
        takes are closed when it is done."""
        offered = _offered.get()
        if offered is None:
            return []
        taken = offered[:]
        offered.clear()
        return taken

    def close(self, number: int, sentence: str) -> None:
        """Tell the client why, and end the connection when it has read that, or a second later."""
        if self.state is State.OPEN:
            self._outbox.end(self._encoder.notification("closing", {"errno": number, "sentence": as_utf8(sentence)}))
            self._finish()

    def abort(self) -> None:
        """End the connection at once."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self._goodbye is not None:
            self._goodbye.cancel()
        self._stop_reading()
        if self._writing:
            self._loop.remove_writer(self._socket)
        self._socket.close()
        for _, descriptors, _ in self._arrived:
            close_all(descriptors)
        self._arrived.clear()
        self._unsent = memoryview(b"")
        for task in self._tasks:
            task.cancel()
        if not self._tasks:
            self._gone()

    # Reading

    def _read_more(self) -> None:
        if not self._reading and self.state is State.OPEN:
            self._reading = True
            self._loop.add_reader(self._socket, self._readable)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket)

    def _readable(self) -> None:
        try:
            data, descriptors, truncated = receive(self._socket, self._limits.read)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        if descriptors or truncated:
            self._arrived.append((self._decoder.received + len(data) - 1, list(descriptors), truncated))
        if not data:  # it ended its side; what it asked for has been served, what it waits for has not
            self._finish()
            return
        self._decoder.feed(data)
        self._turn()

    def _turn(self) -> None:
        """Serve what has arrived, up to a bound."""
        end = monotonic() + self._limits.turn
        while self._unread <= self._limits.unsent:
            if self.state is not State.OPEN:
                return
            try:
                message = self._decoder.next()
            except Malformed as error:
                self.close(error.errno, error.sentence)
                return
            if message is None:
                if self._arrived and sum(len(each[1]) for each in self._arrived) > self._limits.descriptors:
                    most = self._limits.descriptors
                    self.close(errno.E2BIG, f"a message that is not whole has more than {most} descriptors already")
                    return
                self._flush()
                self._read_more()
                return
            self._handle(message)
            if monotonic() >= end:
                break
        self._stop_reading()  # there may be more at hand
        self._flush()
        if not self._writing:
            self._loop.call_soon(self._turn)

    @property
    def _unread(self) -> int:
        """Bytes that the system would not take, because the client does not read."""
        return len(self._unsent) + self._outbox.reply_bytes

    # Serving

    def _handle(self, message: Message) -> None:
        descriptors: list[int] | None = None
        if self._arrived and self._arrived[0][0] < self._decoder.consumed:
            descriptors, problem = self._claim()
            if problem is not None and isinstance(message, Request):
                message = Unusable(message.msgid, *problem)
        if isinstance(message, Request):
            if self._serve(message, descriptors):
                return
        elif isinstance(message, Unusable):
            self._outbox.reply(self._encoder.error(message.msgid, message.errno, message.sentence))
        elif isinstance(message, Notification):
            self._owner.log.debug("ignored the notification %.100r", message.method)
        if descriptors:
            close_all(descriptors)

    def _claim(self) -> tuple[list[int], tuple[int, str] | None]:
        """The descriptors of the message given out last, and what is wrong with them."""
        claimed: list[int] = []
        lost = False
        while self._arrived and self._arrived[0][0] < self._decoder.consumed:
            _, descriptors, truncated = self._arrived.popleft()
            claimed += descriptors
            lost = lost or truncated
        if lost:
            close_all(claimed)
            return [], (errno.EMFILE, "the request's descriptors were lost: the server has no free ones, close some")
        if len(claimed) > self._limits.descriptors:
            close_all(claimed)
            most = self._limits.descriptors
            return [], (errno.E2BIG, f"the request came with {len(claimed)} descriptors, it can have {most}")
        return claimed, None

    def _serve(self, request: Request, descriptors: list[int] | None) -> bool:
        """Carry a request out; True if that goes on, and the descriptors are needed until it is done."""
        msgid = request.msgid
        method = self._owner.methods.get(request.method)
        context: contextvars.Context | None = None
        try:
            if method is None:
                raise RpcError(errno.ENOTTY, f"there is no method {request.method!r}: 'hello' lists those there are")
            fields = fields_of(request)
            if descriptors:
                context = contextvars.copy_context()
                context.run(_offered.set, descriptors)
                result = context.run(method, self.session, fields)
            else:
                result = method(self.session, fields)
            if type(result) is CoroutineType:
                if len(self._tasks) < self._limits.in_flight:
                    self._start_task(msgid, result, descriptors, context)
                    return True
                result.close()
                most = self._limits.in_flight
                raise RpcError(errno.EAGAIN, f"{most} requests are waited for already: wait until one is answered")
        except Exception as error:
            self._outbox.reply(self._refusal(msgid, error))
            return False
        self._outbox.reply(self._result(msgid, result))
        return False

    def _start_task(
        self,
        msgid: int,
        work: Coroutine[Any, Any, Any],
        descriptors: list[int] | None,
        context: contextvars.Context | None,
    ) -> None:
        task = self._loop.create_task(self._wait_for(msgid, work), context=context)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            work.close()  # a task that is cancelled before its first step never comes to it
            close_all(descriptors or ())
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._owner.record(error)
            if self.state is State.CLOSED and not self._tasks:
                self._gone()

        task.add_done_callback(done)

    async def _wait_for(self, msgid: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            reply = self._result(msgid, await work)
        except Exception as error:
            reply = self._refusal(msgid, error)
        if self.state is not State.OPEN:
            return
        self._outbox.reply(reply)
        if self._unread > self._limits.unsent_end:
            self._owner.log.warning("a client (process %d) does not read its replies: disconnected", self.peer.pid)
            self.abort()
            return
        self._flush_soon()

    def _result(self, msgid: int, result: Any) -> bytes:
        try:
            return self._encoder.result(msgid, result)
        except Exception as error:
            return self._refusal(msgid, error)

    def _refusal(self, msgid: int, error: Exception) -> bytes:
        if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
            return self._encoder.error(msgid, error.errno, error.strerror or os.strerror(error.errno))
        self._owner.record(error)
        return self._encoder.error(msgid, errno.EIO, "the server failed, through no fault of yours: its log says how")

    # Writing

    def _flush_soon(self) -> None:
        """Flush when the loop comes around, so that what is added meanwhile leaves with it."""
        if not self._flush_due and not self._writing and self.state is not State.CLOSED:
            self._flush_due = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_due = False
        self._flush()

    def _flush(self) -> None:
        """Send what the system takes."""
        if not self._writing and self.state is not State.CLOSED:
            self._write()

    def _write(self) -> None:
        try:
            while self._unsent or self._outbox:
                if not self._unsent:
                    self._unsent = memoryview(self._outbox.take())
                sent = self._socket.send(self._unsent)
                self._unsent = self._unsent[sent:]
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._socket, self._writable)
            return
        except OSError:
            self.abort()
            return
        if self.state is State.CLOSING:
            self.abort()

    def _writable(self) -> None:
        self._write()
        if self.state is not State.OPEN:
            return
        if not self._unsent and not self._outbox:
            self._writing = False
            self._loop.remove_writer(self._socket)
        if not self._reading and self._unread <= self._limits.unsent:
            self._turn()

    # Ending

    def _finish(self) -> None:
        """Send what there is, for a second at most, and end."""
        self.state = State.CLOSING
        self._stop_reading()
        for task in self._tasks:
            task.cancel()
        self._goodbye = self._loop.call_later(self._limits.goodbye, self.abort)
        self._flush()

    def _gone(self) -> None:
        if self.session is not None:
            session, self.session = self.session, None
            try:
                session.closed()
            except Exception as error:
                self._owner.record(error)
        self._owner.lost(self)
