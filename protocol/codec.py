"""Bytes to messages and back, without I/O.

A stream is cut into messages by skipping over them, which builds nothing; only a message that has arrived whole, within
the limits, is built. So the head of an array that promises 2^32 elements costs its five bytes.

What ends the stream (Malformed): a byte that is no MessagePack, a message beyond the size limit, one nested deeper than
the parser goes (1,024), and a value that is no message. What is answered (Unusable): a request that is whole and names
its msgid, but is nested or has values beyond the limit, has text that is no UTF-8, or is otherwise not in order.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack

from .errors import Malformed, RpcError
from .limits import DEFAULT, Limits
from .messages import NOTIFICATION, REQUEST, RESPONSE, Ignored, Message, Response, Unusable, is_msgid, parse

KEPT = 64 << 10
"""Bytes of buffers worth keeping for the next message; larger ones are given back."""


class Decoder:
    """A stream of messages from bytes in pieces of any size."""

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self._limits = limits
        self.received = 0
        """Bytes fed since the beginning."""
        self.consumed = 0
        """Bytes of the messages given out since the beginning: where the next one starts."""
        self._held = bytearray()
        self._taken = 0  # bytes at the head of _held that messages given out are made of
        self._largest = 0
        self._start()

    def _start(self) -> None:
        # 0 is the largest the library offers: our own limit is checked in next(), where it can be told
        self._skipper = msgpack.Unpacker(max_buffer_size=0, read_size=4096)
        self._base = self.consumed

    @property
    def unfinished(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._held) - self._taken

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self._held += data
        self._largest = max(self._largest, len(self._held))
        self._skipper.feed(data)
        self.received += len(data)

    def next(self) -> Message | None:
        """The next message, None until more bytes are fed. Raises Malformed; the decoder is of no use then."""
        try:
            self._skipper.skip()
        except msgpack.OutOfData:
            self._forget()
            self._check_size(len(self._held))
            return None
        except msgpack.StackError:
            raise Malformed(errno.EPROTO, "a message is nested deeper than 1,024 arrays and maps") from None
        except ValueError:
            raise Malformed(errno.EPROTO, f"no MessagePack, in the message at byte {self.consumed}") from None
        end = self._base + self._skipper.tell()
        size = end - self.consumed
        self._check_size(size)
        packed = self._held[self._taken : self._taken + size]
        self._taken += size
        self.consumed = end
        return self._build(packed)

    def _forget(self) -> None:
        del self._held[: self._taken]
        self._taken = 0
        if not self._held and self._largest > KEPT:
            self._largest = 0
            self._start()

    def __iter__(self) -> Iterator[Message]:
        while (message := self.next()) is not None:
            yield message

    def _check_size(self, size: int) -> None:
        if size > self._limits.message:
            raise Malformed(errno.EMSGSIZE, f"a message is longer than {self._limits.message} bytes: split the work")

    def _build(self, packed: bytearray) -> Message:
        most = self._limits.values
        if len(packed) > most and has_more_values(packed, most):  # a value takes a byte at least
            return _unusable(packed, f"the message holds more than {most} values: split the work")
        try:
            value = msgpack.unpackb(packed)
        except (ValueError, TypeError) as error:  # UnicodeDecodeError is a ValueError
            is_text = isinstance(error, UnicodeDecodeError)
            wrong = "text that is no UTF-8" if is_text else "a map whose keys are no names"
            return _unusable(packed, f"the message holds {wrong}")
        if not _is_flat(value, self._limits.depth):
            return _unusable(packed, f"the message is nested deeper than {self._limits.depth} arrays and maps")
        return parse(value)


def _lengths() -> list[tuple[int, int]]:
    """By the first byte of a value: its bytes without contents, and how many, after the first, say how long these are.

    The values in an array or a map simply follow it. Source: the MessagePack specification, "Formats".
    """
    table = [(1, 0)] * 256  # small integers, arrays and maps; nil, false, true
    for code in range(0xA0, 0xC0):
        table[code] = (1 + (code & 31), 0)  # short text
    for code, width in ((0xC4, 1), (0xC5, 2), (0xC6, 4), (0xD9, 1), (0xDA, 2), (0xDB, 4)):
        table[code] = (1 + width, width)  # bin, str
    for code, width in ((0xC7, 1), (0xC8, 2), (0xC9, 4)):
        table[code] = (2 + width, width)  # ext, with a byte for its type
    for code, size in ((0xCA, 4), (0xCB, 8), (0xDC, 2), (0xDD, 4), (0xDE, 2), (0xDF, 4)):
        table[code] = (1 + size, 0)  # float; array and map, whose values follow
    for power in range(4):
        table[0xCC + power] = table[0xD0 + power] = (1 + (1 << power), 0)  # uint, int
    for power in range(5):
        table[0xD4 + power] = (2 + (1 << power), 0)  # fixext
    return table


_LENGTHS = _lengths()


def has_more_values(packed: bytes | bytearray, most: int) -> bool:
    """Whether a whole message consists of more than `most` values. Builds none, and looks at no more than it must."""
    position, end = 0, len(packed)
    for _ in range(most):
        size, width = _LENGTHS[packed[position]]
        if width:
            position += int.from_bytes(packed[position + 1 : position + 1 + width], "big")
        position += size
        if position >= end:
            return False
    return True


def _is_flat(value: object, depth: int) -> bool:
    """Whether a value has at most `depth` arrays and maps within each other."""
    kind = type(value)
    if kind is list:
        inner: Any = value
    elif kind is dict:
        inner = value.values()  # type: ignore[attr-defined]
    else:
        return True
    if not depth:
        return False
    for each in inner:
        kind = type(each)
        if (kind is dict or kind is list) and not _is_flat(each, depth - 1):
            return False
    return True


def _unusable(packed: bytearray, sentence: str) -> Message:
    """What to make of a whole message that cannot be built or used: its head says what it was to be."""
    head = msgpack.Unpacker(max_buffer_size=0)
    head.feed(packed)
    kind = msgid = None
    with contextlib.suppress(ValueError):  # no array
        if head.read_array_header() > 1:
            kind = _integer(head, packed)
            msgid = _integer(head, packed) if kind in (REQUEST, RESPONSE) else None
    if kind == NOTIFICATION:
        return Ignored()
    if msgid is None or not is_msgid(msgid):
        raise Malformed(errno.EPROTO, f"{sentence}, and its head does not say which request it is")
    if kind == REQUEST:
        return Unusable(msgid, errno.EINVAL, sentence)
    return Response(msgid, [errno.EBADMSG, sentence], None)


def _integer(head: Any, packed: bytearray) -> int | None:
    """The next value if it is a whole number. Nothing else is built, for it may be large."""
    code = packed[head.tell()]
    if code < 0x80 or 0xCC <= code <= 0xD3:
        number: int = head.unpack()
        return number
    return None


class Encoder:
    """Messages to bytes, for any number of connections of one thread."""

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self._limits = limits
        self._pack = msgpack.Packer().pack

    def request(self, msgid: int, method: str, fields: Mapping[str, Any]) -> bytes:
        """Raises RpcError EMSGSIZE where it is too long, TypeError, ValueError or OverflowError for what has no form
        in MessagePack."""
        return self._bounded([REQUEST, msgid, method, [fields] if fields else []], method)

    def result(self, msgid: int, result: Any) -> bytes:
        """Raises as request() does."""
        packed: bytes = self._pack([RESPONSE, msgid, None, result])
        if len(packed) > self._limits.message:
            raise RpcError(errno.EMSGSIZE, self._too_long("the result", packed))
        return packed

    def error(self, msgid: int, number: int, sentence: str) -> bytes:
        """The one shape of an error that all clients take."""
        packed: bytes = self._pack([RESPONSE, msgid, [number, as_utf8(sentence)], None])
        return packed

    def notification(self, method: str, *params: Any) -> bytes:
        """Raises as request() does."""
        return self._bounded([NOTIFICATION, method, params], method)

    def _bounded(self, message: list[Any], name: str) -> bytes:
        packed: bytes = self._pack(message)
        if len(packed) > self._limits.message:
            raise RpcError(errno.EMSGSIZE, self._too_long(name, packed))
        return packed

    def _too_long(self, what: str, packed: bytes) -> str:
        return f"{what} takes {len(packed)} bytes, a message has {self._limits.message}: ask for less at once"


SENTENCE_MAX = 1000
"""Characters of a sentence: it may quote what a client sent."""


def as_utf8(sentence: str) -> str:
    """A sentence as it can be sent: bounded, and without what has no form in UTF-8."""
    if len(sentence) > SENTENCE_MAX:
        sentence = sentence[: SENTENCE_MAX - 3] + "..."
    try:
        sentence.encode()
    except UnicodeEncodeError:
        return sentence.encode("utf-8", "backslashreplace").decode()
    return sentence
