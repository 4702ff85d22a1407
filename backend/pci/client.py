"""One vfio-user client of a function: its socket, its messages, and what it may cost.

A client owns nothing but its own connection. Reads and writes never wait; a message is acted upon when it is whole;
a client that does not read its replies is not read from; a turn is bounded, so that others have theirs.

Accesses of 1, 2, 4 or 8 bytes to a BAR or to config space go straight to the function: that is the round trip a guest
waits for. Every other message is vetted, then answered by libvfio-user (session.py).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import enum
import errno
import logging
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from backend.pci.config_space import CONFIG_SIZE
from backend.pci.function import PciFunction
from backend.pci.messages import (
    ACCESS,
    DESCRIPTORS_MAX,
    FLAG_NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    TYPE_REPLY,
    VERSION,
    Framer,
    FramingError,
    Message,
)
from backend.pci.session import CONFIG_REGION, Session
from ctypes_bindings import LibraryError, errno_of

MESSAGES_A_TURN = 64
"""Messages served before other connections have their turn: under a millisecond of register accesses."""

_CREDENTIALS = struct.Struct("iII")
_ANCILLARY = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4)
# Plain ints: operators of socket's flag enumerations cost as much as a system call.
_RECEIVE = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)
_WIDTHS = ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))
_NUMBER = {size: struct.Struct("<" + code).unpack_from for size, code in _WIDTHS}
_READ_REPLY = {size: struct.Struct(ACCESS.format + code).pack for size, code in _WIDTHS}
_unpack = ACCESS.unpack_from
_ACCESS_SIZE = ACCESS.size
_NOT_POSTED = ~FLAG_NO_REPLY


class State(enum.Enum):
    """What is awaited of a client: its version, its requests, nothing any more."""

    GREETING = "greeting"
    SERVED = "served"
    GONE = "gone"


class Owner(Protocol):
    """The server, as a client sees it."""

    function: PciFunction
    log: logging.Logger

    def greeted(self, client: Client, version: Message) -> None:
        """The client has sent its version: attach it or refuse it."""

    def lost(self, client: Client) -> None:
        """The client is gone; its socket is closed already."""

    def record(self, error: BaseException) -> None:
        """The function's own code raised."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A region as accesses reach it: its size in bytes, read(offset, size), write(offset, size, value)."""

    size: int
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]

    @classmethod
    def of_bar(cls, function: PciFunction, bar: int) -> _Target:
        return cls(function.bars[bar].size, partial(function.bar_read, bar), partial(function.bar_write, bar))


class Client:
    """A connection from the moment it is accepted until it ends, by either side."""

    def __init__(self, owner: Owner, connection: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        connection.setblocking(False)
        self.state = State.GREETING
        self.session: Session | None = None
        self._owner = owner
        self._function = owner.function
        self._targets = {bar: _Target.of_bar(owner.function, bar) for bar in owner.function.bars}
        self._targets[CONFIG_REGION] = _Target(CONFIG_SIZE, owner.function.config.read, owner.function.config.write)
        self._connection = connection
        self._loop = loop
        self._framer = Framer()
        self._unsent = b""
        self._reading = True  # while there is someone to read from, and nothing that must be sent first
        self._receive_into = connection.recvmsg_into
        self._send = connection.send
        loop.add_reader(connection, self._turn)

    def serve(self, session: Session) -> None:
        """The version is agreed on: requests go to this session from now on."""
        self.session = session
        self.state = State.SERVED

    @property
    def peer_pid(self) -> int:
        """The process at the other end (SO_PEERCRED, unix(7)); 0 where it cannot be seen from here."""
        found = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(found)[0])

    @property
    def hung_up(self) -> bool:
        """Whether the other side has closed, whatever it left to be read."""
        poll = select.poll()
        poll.register(self._connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self, why: str) -> None:
        """End the connection; the owner is told once."""
        if self.state is State.GONE:
            return
        self._owner.log.info("%s: client gone: %s", self._function.name, why)
        self.state = State.GONE
        self._reading = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        _close_all(self._framer.abandoned())
        self._owner.lost(self)

    def send(self, reply: bytes) -> None:
        """Send, or keep what does not fit; nothing more is read from the client until that is gone."""
        try:
            sent = self._send(reply)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.close(f"cannot be written to: {error.strerror}")
            return
        if sent != len(reply):
            self._unsent = reply[sent:]
            self._reading = False
            self._loop.remove_reader(self._connection)
            self._loop.add_writer(self._connection, self._writable)

    # Turns

    def _turn(self) -> None:
        """Serve what has come, at most MESSAGES_A_TURN messages, then let the function finish its batch."""
        framer = self._framer
        budget = MESSAGES_A_TURN
        try:
            while self._reading and budget > 0:
                if self.session is not None:
                    budget = self._serve_accesses(budget)
                    if budget <= 0 or not self._reading or framer.start == framer.end:
                        break
                message = framer.next()
                if message is not None:
                    budget -= 1
                    self._handle(message)
                elif not self._receive():
                    break
        except FramingError as error:
            self.close(str(error))
        if budget <= 0 and self._reading and framer.start != framer.end:
            self._loop.call_soon(self._continue)  # the socket knows nothing of the messages that wait here
        if self.state is State.SERVED:
            try:
                self._function.drained()
            except Exception as error:
                self._owner.record(error)

    def _continue(self) -> None:
        if self._reading:
            self._turn()

    def _writable(self) -> None:
        reply, self._unsent = self._unsent, b""
        self._reading = True
        self._loop.remove_writer(self._connection)
        self._loop.add_reader(self._connection, self._turn)
        self.send(reply)
        self._continue()

    def _receive(self) -> bool:
        """Take what the socket holds; False when there is nothing to go on with."""
        try:
            return self._take(*self._receive_into((self._framer.room(),), _ANCILLARY, _RECEIVE)[:3])
        except BlockingIOError:
            return False
        except OSError as error:
            self.close(f"cannot be read from: {error.strerror}")
            return False

    def _take(self, count: int, ancillary: list[tuple[int, int, bytes]], flags: int) -> bool:
        """Account for what recvmsg has put into the framer's room; False if it was the connection's end."""
        descriptors: list[int] = []
        for _, _, data in ancillary:
            whole = array.array("i")
            whole.frombytes(data[: len(data) - len(data) % whole.itemsize])
            descriptors += whole
        if count and not flags & _TRUNCATED:
            self._framer.received(count, descriptors)
            return True
        _close_all(descriptors)
        self.close(f"more than {DESCRIPTORS_MAX} file descriptors at once" if count else "closed by the other side")
        return False

    # Messages

    def _serve_accesses(self, budget: int) -> int:
        """Serve accesses of 1, 2, 4 or 8 bytes until something else comes, or nothing; returns the budget left.

        This is what a guest waits for, so it receives by itself and looks up as little as it can: on one CPU, each
        tenth of a microsecond here is two per cent of the round trip.
        """
        framer, targets = self._framer, self._targets
        buffer, receive = framer.buffer, self._receive_into
        while budget > 0 and not framer.descriptors:
            start, end = framer.start, framer.end
            if start == end:
                start = framer.start = framer.end = 0
                try:
                    end, ancillary, flags, _ = receive(framer.whole, _ANCILLARY, _RECEIVE)
                except BlockingIOError:
                    break
                except OSError as error:
                    self.close(f"cannot be read from: {error.strerror}")
                    break
                if ancillary or flags & _TRUNCATED or not end:
                    self._take(end, ancillary, flags)
                    break
                framer.end = end
            if end - start < _ACCESS_SIZE:
                break
            identity, command, size, flags, _, offset, region, count = _unpack(buffer, start)
            target = targets.get(region)
            if target is None or offset + count > target.size or flags & _NOT_POSTED or count not in _READ_REPLY:
                break
            try:
                if command == REGION_READ and size == _ACCESS_SIZE:
                    framer.start = start + size
                    value = target.read(offset, count)
                    reply = _READ_REPLY[count](
                        identity, REGION_READ, _ACCESS_SIZE + count, TYPE_REPLY, 0, offset, region, count, value
                    )
                elif command == REGION_WRITE and size == _ACCESS_SIZE + count and end - start >= size:
                    framer.start = start + size
                    target.write(offset, count, _NUMBER[count](buffer, start + _ACCESS_SIZE)[0])
                    if flags:
                        budget -= 1
                        continue
                    reply = ACCESS.pack(identity, REGION_WRITE, _ACCESS_SIZE, TYPE_REPLY, 0, offset, region, count)
                else:
                    break
            except Exception as error:
                self._owner.record(error)
                reply = Message(identity, command, flags, b"").refusal(errno_of(error))
            budget -= 1
            if not flags:
                self.send(reply)
                if not self._reading:
                    break
        return budget

    def _handle(self, message: Message) -> None:
        """Any message but the accesses above."""
        try:
            if self.session is not None:
                reply = self.session.request(message)
                if reply is not None:
                    self.send(reply)
            elif message.command == VERSION and not message.descriptors:
                self._owner.greeted(self, message)
            else:
                self.send(message.refusal(errno.EINVAL))
                self.close(f"began with command {message.command}, not with its version")
        except LibraryError as error:
            self.close(f"command {message.command} failed in the library: {error}")
        finally:
            _close_all(message.descriptors)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    descriptors.clear()
