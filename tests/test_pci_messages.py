"""Framing: any cut of a stream gives the same messages, and descriptors go to the message they came with."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.pci.messages import Framer, FramingError, Message

MAX = 64 * 1024


def packed(identity: int, command: int, body: bytes, flags: int = 0) -> bytes:
    """A message as the vfio-user specification lays it out: id, command, size, flags, error; little endian."""
    return struct.pack("<HHIII", identity, command, 16 + len(body), flags, 0) + body


def feed(framer: Framer, data: bytes, descriptors: list[int] | None = None) -> None:
    room = framer.room()
    assert len(data) <= len(room)
    room[: len(data)] = data
    framer.received(len(data), descriptors or [])


def taken(framer: Framer) -> list[Message]:
    messages = []
    while (message := framer.next()) is not None:
        messages.append(message)
    return messages


MESSAGES = st.lists(
    st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=300), st.sampled_from((0, 0x10))),
    max_size=12,
)


@given(MESSAGES, st.data())
def test_any_cut_gives_the_same_messages(sent: list[tuple[int, int, bytes, int]], data: st.DataObject) -> None:
    stream = b"".join(packed(identity, command, body, flags) for identity, command, body, flags in sent)
    framer = Framer()
    got: list[Message] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        feed(framer, stream[:size])
        stream = stream[size:]
        got += taken(framer)
    assert [(m.id, m.command, m.body, m.flags) for m in got] == sent
    assert (framer.start, framer.abandoned()) == (framer.end, [])


@given(MESSAGES, st.sets(st.integers(0, 11)), st.integers(0, 15))
def test_descriptors_go_with_the_message_they_came_with(
    sent: list[tuple[int, int, bytes, int]], with_descriptors: set[int], late: int
) -> None:
    """As Linux delivers them: a read ends behind the piece that carried descriptors, a message's beginning."""
    framer = Framer()
    waiting = b""
    got: list[Message] = []
    for index, (identity, command, body, flags) in enumerate(sent):
        message = packed(identity, command, body, flags)
        if index in with_descriptors:
            piece = message[: len(message) - min(late, len(body))]
            feed(framer, waiting + piece, [100 + index])
            waiting = message[len(piece) :]
            got += taken(framer)
        else:
            waiting += message
    feed(framer, waiting)
    got += taken(framer)
    assert [m.descriptors for m in got] == [[100 + n] if n in with_descriptors else [] for n in range(len(sent))]


def test_the_longest_message_fits_behind_a_partial_one() -> None:
    framer = Framer()
    longest = packed(2, 10, bytes(MAX - 16))
    feed(framer, packed(1, 9, b"abc") + longest[:1000])
    assert [m.id for m in taken(framer)] == [1]
    feed(framer, longest[1000:])
    assert [len(m.data) for m in taken(framer)] == [MAX]
    assert len(framer.room()) == MAX


@pytest.mark.parametrize("size", [0, 1, 15, MAX + 1, 2**31, 2**32 - 1])
def test_a_size_that_cannot_be_breaks_the_stream(size: int) -> None:
    framer = Framer()
    feed(framer, packed(1, 13, b"") + struct.pack("<HHIII", 2, 9, size, 0, 0), [50])
    message = framer.next()
    assert message is not None
    assert message.id == 1
    with pytest.raises(FramingError, match=f"claims {size} bytes"):
        framer.next()
    assert framer.abandoned() == [50]


@pytest.mark.parametrize("kind", [1, 2, 15])
def test_what_is_no_command_breaks_the_stream(kind: int) -> None:
    framer = Framer()
    feed(framer, packed(3, 9, b"", flags=kind))
    with pytest.raises(FramingError, match="message 0x3 is no command"):
        framer.next()


def test_a_refusal_is_a_reply_with_an_error() -> None:
    refusal = Message(0x1234, 8, 0, b"").refusal(22)
    assert refusal == struct.pack("<HHIII", 0x1234, 8, 16, 0x21, 22)
