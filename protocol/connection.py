"""One client of the server: its socket, its requests, and what it may cost.

OPEN: requests are served. CLOSING: nothing is read any more, what was sent last may still be read. CLOSED: the socket
is closed, requests that are waited for are ended; when the last of them has, the session is told.

Reads and writes never wait. A client that does not read its replies is not read from; a turn is bounded, so that others
have theirs; all replies of a turn leave in one write.

What clients leave unread here draws on one budget, of which each has a part to itself: beyond that part, a reply for
which there is no room becomes an error, and requests are not read until the client has read. Large messages take turns.

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
from dataclasses import dataclass
from time import monotonic
from types import CoroutineType
from typing import Any, Protocol

from .budget import Budget
from .codec import Decoder, Encoder, as_utf8
from .errors import Malformed, RpcError
from .large import LargeMessages
from .limits import Limits
from .messages import Message, Notification, Request, Unusable, fields_of
from .outbox import Outbox
from .sockets import close_all, gone, peer_of, receive

Method = Callable[[Any, dict[str, Any]], Any]
"""Called with the session and the request's fields; answers with the result, or a coroutine of it, or that InTurn."""


@dataclass(frozen=True, slots=True)
class InTurn:
    """A method's result that is waited for before the connection's next request is carried out."""

    work: Coroutine[Any, Any, Any]


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
    waiting: Budget
    """Bytes that wait for clients to read."""
    pending: Budget
    """Requests that are waited for."""
    large: LargeMessages

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
        self._waiting = owner.waiting.account()
        self._pending = owner.pending.account()
        self._short = False  # there was no room for a reply
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived: deque[tuple[int, list[int], bool]] = deque()  # offset of the byte they belong to, fds, some lost
        self._flush_due = False
        self._in_turn: asyncio.Task[None] | None = None  # nothing behind it is carried out before it is done
        self._ended = False  # the client sends no more
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
            data = self._encoder.notification(method, *params)
            self._outbox.notify(data, None if self._may_wait(len(data)) else self._limits.small - self._unread)
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
        self._waiting.hold(0)
        self._owner.large.leave(self)
        for task in self._tasks:
            task.cancel()
        if not self._tasks:
            self._gone()

    # Reading

    def _read_more(self) -> None:
        if not self._reading and not self._ended and self.state is State.OPEN:
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
            self._ended = True
            self._stop_reading()
            if self._in_turn is None or gone(self._socket):
                self._finish()
            return
        self._decoder.feed(data)
        self._turn()

    def _turn(self) -> None:
        """Serve what has arrived, up to a bound."""
        end = monotonic() + self._limits.turn
        while not self._full:
            if self.state is not State.OPEN:
                return
            if self._in_turn is not None:
                self._flush()
                if self._decoder.received - self._decoder.consumed < self._limits.small:
                    self._read_more()  # to see the client's end
                else:
                    self._stop_reading()
                return
            if self._ended and gone(self._socket):
                self.abort()
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
                if self._ended:
                    self._finish()
                    return
                self._flush()
                if self.state is not State.OPEN:  # it reads no more, and so has no turn to take
                    return
                if self._decoder.unfinished <= self._limits.small:
                    self._owner.large.leave(self)
                elif not self._owner.large.enter(self):
                    self._stop_reading()
                    return
                self._read_more()
                return
            self._handle(message)
            if monotonic() >= end:
                break
        self._stop_reading()  # there may be more at hand
        self._flush()
        if not self._writing and self.state is State.OPEN:
            self._loop.call_soon(self._turn)

    @property
    def _unread(self) -> int:
        """Bytes that the system would not take, because the client does not read."""
        return len(self._unsent) + self._outbox.reply_bytes

    @property
    def _full(self) -> bool:
        """The client is to read before more is done for it."""
        return self._unread > (self._limits.small if self._short else self._limits.unsent)

    def _may_wait(self, more: int) -> bool:
        """Whether so many bytes more may wait for the client, beside what waits for others."""
        size = len(self._unsent) + self._outbox.size + more
        return size <= self._limits.small or self._waiting.hold(size)

    def _reply(self, msgid: int, data: bytes) -> None:
        if not self._may_wait(len(data)):
            self._short = True
            data = self._encoder.error(msgid, errno.ENOMEM, "the clients leave too many replies unread: read yours")
        self._outbox.reply(data)

    # For LargeMessages

    def resume(self) -> None:
        """The rest of a large message may be read."""
        if not self._full:
            self._read_more()

    def late(self) -> None:
        """It takes too long."""
        self.close(errno.ETIMEDOUT, f"a message did not end within {self._limits.large_seconds} seconds: others wait")

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
            self._reply(message.msgid, self._encoder.error(message.msgid, message.errno, message.sentence))
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
            in_turn = type(result) is InTurn
            work = result.work if in_turn else result
            if type(work) is CoroutineType:
                if len(self._tasks) < self._limits.in_flight and self._pending.take():
                    task = self._start_task(msgid, work, descriptors, context)
                    if in_turn:
                        self._in_turn = task
                    return True
                work.close()
                count = len(self._tasks)
                raise RpcError(errno.EAGAIN, f"{count} requests are waited for already: wait until one is answered")
        except Exception as error:
            self._reply(msgid, self._refusal(msgid, error))
            return False
        self._reply(msgid, self._result(msgid, result))
        return False

    def _start_task(
        self,
        msgid: int,
        work: Coroutine[Any, Any, Any],
        descriptors: list[int] | None,
        context: contextvars.Context | None,
    ) -> asyncio.Task[None]:
        task = self._loop.create_task(self._wait_for(msgid, work), context=context)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            work.close()  # a task that is cancelled before its first step never comes to it
            close_all(descriptors or ())
            self._tasks.discard(task)
            self._pending.give()
            if not task.cancelled() and (error := task.exception()) is not None:
                self._owner.record(error)
            if self._in_turn is task:
                self._in_turn = None
                if self.state is State.OPEN:
                    self._turn()
            if self.state is State.CLOSED and not self._tasks:
                self._gone()

        task.add_done_callback(done)
        return task

    async def _wait_for(self, msgid: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            reply = self._result(msgid, await work)
        except Exception as error:
            reply = self._refusal(msgid, error)
        if self.state is not State.OPEN:
            return
        self._reply(msgid, reply)
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
            self._settle()
        except (BlockingIOError, InterruptedError):
            self._settle()
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._socket, self._writable)
            return
        except OSError:
            self.abort()
            return
        if self.state is State.CLOSING:
            self.abort()

    def _settle(self) -> None:
        """What was sent waits no more."""
        if self._waiting.used:
            self._waiting.hold(len(self._unsent) + self._outbox.size)
        self._short = self._short and self._unread > self._limits.small

    def _writable(self) -> None:
        self._write()
        if self.state is not State.OPEN:
            return
        if not self._unsent and not self._outbox:
            self._writing = False
            self._loop.remove_writer(self._socket)
        if not self._reading and not self._full:
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
