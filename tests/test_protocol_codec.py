"""The codec: bytes laid out by hand from the MessagePack specification, any cut of a stream, and bytes that are ill."""

import contextlib
import errno
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import Limits, Malformed, RpcError
from protocol.codec import SENTENCE_MAX, Decoder, Encoder, has_more_values
from protocol.messages import Ignored, Message, Notification, Request, Response, Unusable

SMALL = Limits(message=1000, depth=4)

# [0, 1, "hello", []] and so on, byte by byte
HELLO = bytes([0x94, 0x00, 0x01, 0xA5]) + b"hello" + bytes([0x90])
ANSWER = bytes([0x94, 0x01, 0x01, 0xC0, 0xC3])
REFUSAL = bytes([0x94, 0x01, 0xCE, 0xFF, 0xFF, 0xFF, 0xFF, 0x92, 0x02, 0xA2]) + b"no" + bytes([0xC0])
TICK = bytes([0x93, 0x02, 0xA4]) + b"tick" + bytes([0x91, 0x81, 0xA1]) + b"n" + bytes([0x07])


def decode(data: bytes, limits: Limits = SMALL) -> list[Message]:
    decoder = Decoder(limits)
    decoder.feed(data)
    return list(decoder)


def nested(depth: int) -> bytes:
    """A request whose params nest so that the message has `depth` arrays within each other."""
    return b"\x94\x00\x07\xa1m" + b"\x91" * (depth - 2) + b"\x90"


# -- What messages are -------------------------------------------------------------------------------------------------


def test_the_messages_of_the_specification() -> None:
    assert decode(HELLO + ANSWER + REFUSAL + TICK) == [
        Request(1, "hello", []),
        Response(1, None, True),
        Response(0xFFFF_FFFF, [2, "no"], None),
        Notification("tick", [{"n": 7}]),
    ]


def test_what_is_sent_are_the_bytes_of_the_specification() -> None:
    encoder = Encoder(SMALL)
    assert encoder.request(1, "hello", {}) == HELLO
    assert encoder.result(1, True) == ANSWER
    assert encoder.error(0xFFFF_FFFF, 2, "no") == REFUSAL
    assert encoder.notification("tick", {"n": 7}) == TICK
    assert encoder.request(5, "m", {"a": b"\x00"}) == b"\x94\x00\x05\xa1m\x91\x81\xa1a\xc4\x01\x00"


def test_a_method_may_be_named_in_binary() -> None:
    assert decode(b"\x94\x00\x01\xc4\x05hello\x90") == [Request(1, "hello", [])]
    assert decode(b"\x93\x02\xc4\x04tick\x90") == [Notification("tick", [])]


@pytest.mark.parametrize("msgid", [0, 127, 128, 255, 256, 65535, 65536, 0xFFFF_FFFF])
def test_a_msgid_has_32_bits(msgid: int) -> None:
    wide = b"\x94\x00\xcf" + struct.pack(">Q", msgid) + b"\xa1m\x90"  # even where its form has 64
    assert decode(wide) == [Request(msgid, "m", [])]


FATAL = {
    "a byte that MessagePack never uses": b"\xc1",
    "a number": b"\x05",
    "nothing": b"\xc0",
    "a map": b"\x81\xa1a\x01",
    "an empty array": b"\x90",
    "text of another protocol": b"GET / HTTP/1.1\r\n",
    "JSON": b'{"jsonrpc": "2.0"}\n',
    "an unknown kind": b"\x94\x03\x01\xa1m\x90",
    "a kind that is True": b"\x94\xc3\x01\xa1m\x90",
    "a kind of one and a half": b"\x94\xcb" + struct.pack(">d", 0.5) + b"\x01\xa1m\x90",
    "a request alone": b"\x91\x00",
    "a msgid of 33 bits": b"\x94\x00\xcf" + struct.pack(">Q", 1 << 32) + b"\xa1m\x90",
    "a negative msgid": b"\x94\x00\xff\xa1m\x90",
    "a msgid in text": b"\x94\x00\xa11\xa1m\x90",
    "a msgid that is True": b"\x94\x00\xc3\xa1m\x90",
    "a msgid of a half": b"\x94\x00\xcb" + struct.pack(">d", 1.0) + b"\xa1m\x90",
    "bad text where the kind should be": b"\x94\xa1\xff\x01\xa1m\x90",
    "bad text where the msgid should be": b"\x94\x00\xa1\xff\xa1m\x90",
}


@pytest.mark.parametrize("data", FATAL.values(), ids=FATAL.keys())
def test_what_cannot_be_answered_ends_the_stream(data: bytes) -> None:
    decoder = Decoder(SMALL)
    decoder.feed(HELLO + data)
    assert decoder.next() == Request(1, "hello", [])
    with pytest.raises(Malformed) as caught:
        decoder.next()
    assert caught.value.errno == errno.EPROTO
    assert caught.value.sentence


ANSWERED = {
    "three elements": b"\x93\x00\x07\xa1m",
    "five elements": b"\x95\x00\x07\xa1m\x90\x90",
    "two elements": b"\x92\x00\x07",
    "a method that is a number": b"\x94\x00\x07\x01\x90",
    "a method that is nil": b"\x94\x00\x07\xc0\x90",
    "a method in binary that is no text": b"\x94\x00\x07\xc4\x01\xff\x90",
    "a method in text that is no UTF-8": b"\x94\x00\x07\xa1\xff\x90",
    "params that are a map": b"\x94\x00\x07\xa1m\x80",
    "params that are nil": b"\x94\x00\x07\xa1m\xc0",
    "a field that is no UTF-8": b"\x94\x00\x07\xa1m\x91\x81\xa1a\xa2\xc3\x28",
    "a map with a number for a key": b"\x94\x00\x07\xa1m\x91\x81\x01\x01",
    "a map with an array for a key": b"\x94\x00\x07\xa1m\x91\x81\x90\x01",
    "a timestamp that is none": b"\x94\x00\x07\xa1m\x91\xd4\xff\x00",
    "depth beyond the limit": nested(5),
    "depth far beyond the limit": nested(900),
}


@pytest.mark.parametrize("data", ANSWERED.values(), ids=ANSWERED.keys())
def test_a_request_that_names_itself_is_answered(data: bytes) -> None:
    bad, good = decode(data + HELLO)
    assert isinstance(bad, Unusable)
    assert (bad.msgid, bad.errno) == (7, errno.EINVAL)
    assert bad.sentence
    assert good == Request(1, "hello", [])


def test_what_asks_for_nothing_is_ignored() -> None:
    ill = [
        b"\x91\x02",
        b"\x92\x02\xa1m",
        b"\x93\x02\x01\x90",
        b"\x93\x02\xa1\xff\x90",
        b"\x91\x01",
        b"\x94\x01\xff\xc0\xc0",
    ]
    assert decode(b"".join(ill)) == [Ignored()] * len(ill)


def test_a_reply_that_cannot_be_read_is_an_error_for_its_request() -> None:
    reply = decode(b"\x94\x01\x07\xc0\xa1\xff")[0]
    assert isinstance(reply, Response)
    assert (reply.msgid, reply.error[0]) == (7, errno.EBADMSG)


# -- Limits ------------------------------------------------------------------------------------------------------------


def test_the_depth_limit_is_exact() -> None:
    assert isinstance(decode(nested(4))[0], Request)
    assert isinstance(decode(nested(5))[0], Unusable)
    in_maps = b"\x94\x00\x07\xa1m\x91\x81\xa1a\x81\xa1a\x01"  # message, params, map, map
    assert isinstance(decode(in_maps)[0], Request)
    assert isinstance(decode(in_maps[:-1] + b"\x80")[0], Unusable)


def test_depth_beyond_the_parser_ends_the_stream() -> None:
    with pytest.raises(Malformed, match="deeper"):
        decode(nested(2000), Limits())
    with pytest.raises(Malformed):
        decode(b"\x81\xa1a" * 5000, Limits())


def request_of(size: int) -> bytes:
    head = b"\x94\x00\x07\xa1m\x91\xc5"
    body = size - len(head) - 2
    return head + struct.pack(">H", body) + bytes(body)


def test_the_size_limit_is_exact() -> None:
    assert len(request_of(1000)) == 1000
    assert isinstance(decode(request_of(1000) + HELLO)[0], Request)
    with pytest.raises(Malformed) as caught:
        decode(request_of(1001))
    assert caught.value.errno == errno.EMSGSIZE


def test_the_size_limit_is_known_before_the_end() -> None:
    decoder = Decoder(SMALL)
    decoder.feed(request_of(5000)[:1000])
    assert decoder.next() is None
    decoder.feed(b"\0")
    with pytest.raises(Malformed):
        decoder.next()


def test_the_limit_of_values_is_exact() -> None:
    limits = Limits(values=100)

    def of(values: int) -> bytes:  # the message, its kind, msgid, method, params and the text are 6 of them
        return (
            b"\x94\x00\x07\xa1m\xdc" + struct.pack(">H", values - 5) + b"\xd9\xff" + b"x" * 255 + b"\xc0" * (values - 6)
        )

    assert isinstance(decode(of(100), limits)[0], Request)
    assert isinstance(decode(of(101), limits)[0], Unusable)
    assert isinstance(decode(of(101), Limits(values=101))[0], Request)


@pytest.mark.parametrize("head", [b"\x92", b"\x92\x00", b"\x94\x00\x07", b"\x94\x00\x07\xa1m"])
def test_too_many_values_are_not_built_wherever_they_stand(head: bytes) -> None:
    decoder = Decoder(Limits())
    after = head[0] - 0x90 - len(head) + (1 if b"m" in head else 0)  # values that the message has besides
    decoder.feed(head + b"\xdd\x00\x0f\x00\x00" + b"\x90" * 0xF0000 + b"\x90" * after)
    tracemalloc.start()
    try:
        with contextlib.suppress(Malformed):
            assert isinstance(decoder.next(), Unusable)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # the bytes, not a million arrays
    finally:
        tracemalloc.stop()


def count(value: Any) -> int:
    """Values within a value, by recursion over what was built."""
    if isinstance(value, list):
        return 1 + sum(count(each) for each in value)
    if isinstance(value, dict):
        return 1 + sum(count(key) + count(each) for key, each in value.items())
    return 1


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"])
def test_a_claim_of_4_gib_costs_what_was_sent(head: bytes) -> None:
    bomb = b"\x94\x00\x07\xa1m" + (head + b"\xff\xff\xff\xfe") * (200 if head in b"\xdd" else 1)
    decoder = Decoder(Limits())
    tracemalloc.start()
    try:
        decoder.feed(bomb)
        assert decoder.next() is None
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_large_message_leaves_no_large_buffer() -> None:
    decoder = Decoder(Limits())
    packed = msgpack.packb([0, 1, "m", [{"data": bytes(1 << 20)}]])
    tracemalloc.start()
    try:
        for _ in range(3):
            for start in range(0, len(packed), 65536):
                decoder.feed(packed[start : start + 65536])
                list(decoder)
        assert decoder.consumed == decoder.received == 3 * len(packed)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    decoder.feed(HELLO)
    assert decoder.next() == Request(1, "hello", [])


def test_what_is_too_long_to_send_is_refused() -> None:
    encoder = Encoder(SMALL)
    data = bytes(1000)
    too_long: list[Callable[[], bytes]] = [
        lambda: encoder.result(1, data),
        lambda: encoder.request(1, "m", {"a": data}),
        lambda: encoder.notification("m", data),
    ]
    for make in too_long:
        with pytest.raises(RpcError) as caught:
            make()
        assert caught.value.errno == errno.EMSGSIZE
    assert encoder.result(1, True) == ANSWER  # nothing of the refused one is left


def test_a_sentence_can_always_be_sent() -> None:
    encoder = Encoder(Limits())
    _, _, (number, sentence), result = msgpack.unpackb(encoder.error(1, 22, "\udcff and " + "x" * 1_000_000))
    assert (number, result) == (22, None)
    assert sentence.startswith("\\udcff and xxx")
    assert len(sentence) < SENTENCE_MAX + 10


# -- Streams -----------------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False)
values: st.SearchStrategy[Any] = st.recursive(
    scalars | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
msgids = st.integers(0, 0xFFFF_FFFF)
messages = st.one_of(
    st.builds(Request, msgids, st.text(max_size=20), st.lists(values, max_size=2)),
    st.builds(Response, msgids, st.none() | st.tuples(st.integers(1, 133), st.text(max_size=20)).map(list), values),
    st.builds(Notification, st.text(max_size=20), st.lists(values, max_size=2)),
)


def pack(message: Message) -> bytes:
    """By the library alone."""
    match message:
        case Request(msgid, method, params):
            value = [0, msgid, method, params]
        case Response(msgid, error, result):
            value = [1, msgid, error, result]
        case Notification(method, params):
            value = [2, method, params]
    packed: bytes = msgpack.packb(value)
    return packed


@given(st.lists(messages, max_size=6), st.data())
def test_any_cut_of_a_stream_gives_the_same_messages(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(pack(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = Decoder(Limits(depth=64))
    received: list[Message] = []
    ends: list[int] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.feed(stream[start:end])
        while (message := decoder.next()) is not None:
            received.append(message)
            ends.append(decoder.consumed)
    assert received == sent
    assert decoder.received == len(stream)
    assert ends == [sum(len(pack(m)) for m in sent[: count + 1]) for count in range(len(sent))]


extensions = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20) | st.just(bytes(300)))
large = st.sampled_from([bytes(300), bytes(70_000), "x" * 300, "x" * 70_000, [0] * 20, [0] * 70_000])


@given(st.lists(values | extensions | large, max_size=3))
def test_values_are_counted_without_being_built(value: list[Any]) -> None:
    packed = msgpack.packb(value)
    expected = count(value)
    assert has_more_values(packed, expected - 1)
    assert not has_more_values(packed, expected)
    assert not has_more_values(packed, len(packed))


@given(values, msgids)
def test_what_the_encoder_sends_the_library_reads(value: Any, msgid: int) -> None:
    encoder = Encoder(Limits())
    assert msgpack.unpackb(encoder.result(msgid, value)) == [1, msgid, None, value]
    assert msgpack.unpackb(encoder.request(msgid, "m", {"v": value})) == [0, msgid, "m", [{"v": value}]]
    assert msgpack.unpackb(encoder.notification("m", value)) == [2, "m", [value]]


@given(st.binary(max_size=300), st.integers(1, 50))
def test_garbage_gives_messages_or_ends_the_stream(garbage: bytes, piece: int) -> None:
    def run(size: int) -> tuple[list[Message], bool]:
        decoder = Decoder(SMALL)
        found: list[Message] = []
        try:
            for start in range(0, len(garbage), size):
                decoder.feed(garbage[start : start + size])
                found += decoder
        except Malformed:
            # iteration stopped in the middle: take what it gave before
            return found, True
        return found, False

    whole, ended = run(len(garbage) or 1)
    pieces, ended_too = run(piece)
    assert ended == ended_too
    if not ended:
        assert whole == pieces


@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_damage_never_raises_anything_else(sent: list[Message], data: st.DataObject) -> None:
    stream = bytearray(b"".join(pack(message) for message in sent))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    decoder = Decoder(SMALL)
    decoder.feed(bytes(stream))
    with contextlib.suppress(Malformed):
        list(decoder)


def test_a_large_message_in_small_pieces_takes_time_by_its_size() -> None:
    """A client that sends a byte at a time must not make each byte cost the whole message."""
    packed = msgpack.packb([0, 1, "m", [{"data": bytes(200_000)}]])
    decoder = Decoder(Limits())
    for position in range(0, len(packed), 2):
        decoder.feed(packed[position : position + 2])
        if decoder.next() is not None:
            break
    assert decoder.consumed == len(packed)
