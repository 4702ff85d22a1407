"""What a guest says on its channel: bytes in, events out, no I/O. The lines are those of backend.vm.guest_protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PROTOCOL = 1
PREFIX = "vioasid: "
MAX_LINE = 2048  # bytes; ours stay below 700, and Linux takes a kernel line of 2048, which `ready` cuts
MAX_BYTES = 4 << 20  # of one boot: ours is 10 KiB; a guest that writes without end is stopped
MAX_KEYS = 16  # of one line

WORD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_CONTROL = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]")  # no escape sequence reaches a terminal through a report


@dataclass(frozen=True, slots=True)
class Ready:
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fact:
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Question:
    number: int
    name: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Done:
    pass


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not of the conversation: KTAP, or noise."""

    text: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """A line that begins as ours and is not; it changes nothing."""

    text: str


Event = Ready | Fact | Question | Done | Line | Malformed


class Flood(Exception):
    """More bytes than a boot may send."""


class Decoder:
    """Bytes as they arrive -> events, however the bytes are cut. Holds at most one line."""

    def __init__(self) -> None:
        self._part = bytearray()
        self._cut = False  # the line at hand is longer than allowed: its rest is dropped
        self._total = 0

    def feed(self, data: bytes) -> list[Event]:
        """Raises Flood beyond MAX_BYTES."""
        self._total += len(data)
        if self._total > MAX_BYTES:
            raise Flood(f"more than {MAX_BYTES} bytes")
        events: list[Event] = []
        *ended, last = data.split(b"\n")
        for piece in ended:
            self._append(piece)
            events.append(decode_line(bytes(self._part), cut=self._cut))
            self._part.clear()
            self._cut = False
        self._append(last)
        return events

    def _append(self, piece: bytes) -> None:
        room = MAX_LINE - len(self._part)
        self._cut |= len(piece) > room
        self._part += piece[:room]


def decode_line(raw: bytes, *, cut: bool = False) -> Event:
    """One line without its line end. A line that was cut is taken for what is left of it, unless it asks something."""
    text = _CONTROL.sub("", raw.decode(errors="replace")).rstrip()
    if not text.startswith(PREFIX):
        return Line(text)
    verb, _, rest = text.removeprefix(PREFIX).partition(" ")
    fields = decode_fields(rest)
    if fields is None:
        return Malformed(text)
    if verb == "ready" and fields.get("protocol") == str(PROTOCOL):
        return Ready(fields)
    if verb == "fact" and WORD.fullmatch(fields.get("key", "")) and "text" in fields:
        return Fact(fields["key"], fields["text"])
    if verb == "ask" and not cut and re.fullmatch(r"\d{1,6}", fields.get("number", "")):
        name = fields.get("question", "")
        if WORD.fullmatch(name):
            return Question(int(fields["number"]), name, fields)
    if verb == "done":
        return Done()
    return Malformed(text)


def decode_fields(text: str) -> dict[str, str] | None:
    """``a=1 b=2 text=the rest`` -> its values; None if it is not of that form."""
    fields: dict[str, str] = {}
    rest = text.strip()
    while rest:
        key, equals, rest = rest.partition("=")
        if not equals or not WORD.fullmatch(key) or key in fields or len(fields) == MAX_KEYS:
            return None
        if key == "text":
            fields[key] = rest
            break
        fields[key], _, rest = rest.partition(" ")
        rest = rest.lstrip(" ")
    return fields
