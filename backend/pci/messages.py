"""Framing of vfio-user messages: bytes in, whole messages out. No socket is touched here.

Numbers are little-endian, as on every host that QEMU's vfio-user runs on (vfio-user specification, "Message format").
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from ctypes_bindings import MESSAGE_MAX

HEADER = struct.Struct("<HHIII")
"""Message id, command, size with the header, flags, error number."""
ACCESS = struct.Struct("<HHIIIQII")
"""Header, then a region access: offset, region, count. A write's data, or a read reply's, follows."""

VERSION = 1
DMA_MAP = 2
DMA_UNMAP = 3
SET_IRQS = 8
REGION_READ = 9
REGION_WRITE = 10

TYPE_MASK = 0xF
TYPE_COMMAND = 0
TYPE_REPLY = 1
FLAG_NO_REPLY = 1 << 4
FLAG_ERROR = 1 << 5

DESCRIPTORS_MAX = 16
"""File descriptors beside one message: DMA_MAP brings one, SET_IRQS one a vector; the library announces 8."""


class FramingError(Exception):
    """The stream can no longer be cut into messages: nothing behind this point can be trusted."""


@dataclass(frozen=True, slots=True)
class Message:
    """One whole message, header included, and the file descriptors that came with it."""

    id: int
    command: int
    flags: int
    data: bytes
    descriptors: list[int] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """What follows the header."""
        return self.data[HEADER.size :]

    @property
    def wants_reply(self) -> bool:
        """False for a posted message."""
        return not self.flags & FLAG_NO_REPLY

    def refusal(self, error: int) -> bytes:
        """The reply that says `error` (an errno)."""
        return HEADER.pack(self.id, self.command, HEADER.size, TYPE_REPLY | FLAG_ERROR, error)


class Framer:
    """Cuts a stream into messages. It holds at most one message's worth of bytes (MESSAGE_MAX).

    `buffer[start:end]` is what has come and was not taken; region accesses are served straight from there.
    """

    def __init__(self) -> None:
        self.buffer = bytearray(MESSAGE_MAX)
        self.start = 0
        self.end = 0
        self.descriptors: list[tuple[int, list[int]]] = []
        """(where their message begins, descriptors), in order."""
        self._view = memoryview(self.buffer)
        self.whole = (self._view,)
        """Where to receive to while nothing waits, as recvmsg_into takes it; `start` and `end` are to be 0 then."""

    def room(self) -> memoryview:
        """Where to receive to. Empty only if the message at the start is longer than a message may be."""
        if self.start == self.end:
            self.start = self.end = 0
            return self._view
        if self.start:
            waiting = self.end - self.start
            self.buffer[:waiting] = self.buffer[self.start : self.end]
            self.descriptors = [(at - self.start, held) for at, held in self.descriptors]
            self.start, self.end = 0, waiting
        return self._view[self.end :]

    def received(self, count: int, descriptors: list[int]) -> None:
        """`count` bytes were put into room(); `descriptors` came beside the last message begun among them.

        A stream socket ends a read behind the bytes that a descriptor came with, so that message is the last one.
        """
        self.end += count
        if descriptors:
            self.descriptors.append((self._last_begun(), descriptors))

    def next(self) -> Message | None:
        """The next whole message, or None. FramingError if what has come is none."""
        size = self._size(self.start)
        if size is None or self.end - self.start < size:
            return None
        identity, command, _, flags, _ = HEADER.unpack_from(self.buffer, self.start)
        if flags & TYPE_MASK != TYPE_COMMAND:
            raise FramingError(f"message {identity:#x} is no command (flags {flags:#x})")
        held: list[int] = []
        while self.descriptors and self.descriptors[0][0] <= self.start:
            held += self.descriptors.pop(0)[1]
        data = bytes(self._view[self.start : self.start + size])
        self.start += size
        return Message(identity, command, flags, data, held)

    def abandoned(self) -> list[int]:
        """Descriptors whose message will never be taken, for closing."""
        held = [descriptor for _, descriptors in self.descriptors for descriptor in descriptors]
        self.descriptors.clear()
        return held

    def _last_begun(self) -> int:
        """Where the last message that has begun begins, as far as the stream can be followed."""
        begin = at = self.start
        while at < self.end:
            begin = at
            try:
                size = self._size(at)
            except FramingError:
                break  # next() will say so when it gets there
            if size is None:
                break
            at += size
        return begin

    def _size(self, at: int) -> int | None:
        """The size that the header at `at` claims, None while the header is not whole."""
        if self.end - at < HEADER.size:
            return None
        size: int = HEADER.unpack_from(self.buffer, at)[2]
        if not HEADER.size <= size <= MESSAGE_MAX:
            raise FramingError(f"a message claims {size} bytes: {HEADER.size} to {MESSAGE_MAX} are possible")
        return size
