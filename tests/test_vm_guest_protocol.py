"""The conversation with a guest: lines as they are specified, guests that keep to it, and guests that do not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.vm import ktap
from backend.vm.guest_lines import (
    MAX_BYTES,
    MAX_LINE,
    Decoder,
    Done,
    Event,
    Fact,
    Flood,
    Line,
    Malformed,
    Question,
    Ready,
    decode_fields,
    decode_line,
)
from backend.vm.guest_protocol import (
    MAX_FACTS,
    MAX_NOISE,
    MAX_QUESTIONS,
    Answer,
    GuestLost,
    GuestResult,
    GuestSession,
    HeldPage,
    NoHost,
    OrderedFault,
    State,
    Step,
    Times,
)

READY = b"vioasid: ready protocol=1 kernel=7.3.4 machine=x86_64 cpus=2 memory_kib=468872 text=console=ttyS0 panic=-1\n"
RESULTS = b"KTAP version 1\n1..1\n  KTAP version 1\n  1..1\n  ok 1 group-type # DMA\nok 1 iommu\n"
NEXT = b"vioasid: done seconds=9.1\nvioasid: ask number=7 question=next \n"


def test_each_kind_of_line() -> None:
    assert decode_line(READY[:-1]) == Ready(
        {
            "protocol": "1",
            "kernel": "7.3.4",
            "machine": "x86_64",
            "cpus": "2",
            "memory_kib": "468872",
            "text": "console=ttyS0 panic=-1",
        }
    )
    assert decode_line(b"vioasid: fact key=group_type text=DMA-FQ") == Fact("group_type", "DMA-FQ")
    assert decode_line(b"vioasid: fact key=empty text=") == Fact("empty", "")
    question = decode_line(b"vioasid: ask number=3 question=isolation-unmapped offset=33554432 gpa=0x1000")
    fields = {"number": "3", "question": "isolation-unmapped", "offset": "33554432", "gpa": "0x1000"}
    assert question == Question(3, "isolation-unmapped", fields)
    assert decode_line(b"vioasid: done seconds=12.5") == Done()
    assert decode_line(b"  ok 1 x") == Line("  ok 1 x")


@pytest.mark.parametrize(
    "line",
    [
        b"vioasid: hello",
        b"vioasid: ready",
        b"vioasid: ready protocol=2 kernel=1",
        b"vioasid: fact key=Upper text=x",
        b"vioasid: fact key=x",
        b"vioasid: ask number=x question=next",
        b"vioasid: ask number=1234567 question=next",
        b"vioasid: ask number=1",
        b"vioasid: ask number=1 question=../etc",
        b"vioasid: ask number=1 number=2 question=next",
        b"vioasid: done =",
        b"vioasid: fact " + b" ".join(b"k%d=1" % n for n in range(17)) + b" key=x text=y",
    ],
)
def test_lines_that_only_begin_as_ours(line: bytes) -> None:
    assert isinstance(decode_line(line), Malformed)


def test_no_control_character_comes_through() -> None:
    said = decode_line(b"vioasid: fact key=x text=\x1b[2J\x07red\xff\xc2\x9b1m")
    assert said == Fact("x", "[2Jred\ufffd1m")


def test_a_question_that_was_cut_is_not_answered() -> None:
    line = b"vioasid: ask number=1 question=data-written sha256=" + b"a" * MAX_LINE
    assert [type(event) for event in Decoder().feed(line + b"\n")] == [Malformed]
    decoder = Decoder()
    decoder.feed(line + b"\n")
    [asked] = decoder.feed(b"vioasid: ask number=2 question=next\n")
    assert isinstance(asked, Question)  # the line after it is whole
    ready = b"vioasid: ready protocol=1 text=" + b"x" * MAX_LINE + b"\n"
    [event] = Decoder().feed(ready)
    assert isinstance(event, Ready)
    assert len(event.facts["text"]) < MAX_LINE


words = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
values = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=8)


@given(st.dictionaries(words.filter(lambda key: key != "text"), values, max_size=6), st.none() | values)
def test_fields_read_back(fields: Mapping[str, str], text: str | None) -> None:
    whole = {**fields, **({} if text is None else {"text": f"a b={text}"})}
    assert decode_fields(" ".join(f"{key}={value}" for key, value in whole.items())) == whole


@given(st.lists(st.sampled_from([READY, RESULTS, NEXT, b"\xff\x00", b"\n", b"vioasid: ", b"x" * 3000])), st.data())
def test_events_do_not_depend_on_how_the_bytes_are_cut(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    decoder = Decoder()
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    events: list[Event] = [event for piece in pieces for event in decoder.feed(piece)]
    assert events == Decoder().feed(whole)


@given(st.binary(max_size=400))
def test_any_bytes_are_events(garbage: bytes) -> None:
    assert len(Decoder().feed(garbage)) == garbage.count(b"\n")


def test_a_line_without_end_takes_no_memory_and_a_flood_is_stopped() -> None:
    decoder = Decoder()
    for _ in range(MAX_BYTES // (1 << 16)):
        assert decoder.feed(b"a" * (1 << 16)) == []
    with pytest.raises(Flood):
        decoder.feed(b"a")


def test_answers_are_one_line_whatever_they_hold() -> None:
    line = Answer.ok("two\nlines\x1b é", device="0000:00:04.0", iova="0xfffff000").encode(5)
    assert line == b"vioasid: answer number=5 status=ok device=0000:00:04.0 iova=0xfffff000 text=two?lines? ?\n"
    assert len(Answer.fail("x" * 10_000).encode(1)) < 600
    for bad in ({"iova": "1 2"}, {"Iova": "1"}, {"status": "1"}, {"iova": ""}):
        with pytest.raises(ValueError, match="a word without spaces"):
            Answer("ok", "", bad).encode(1)


class Host(NoHost):
    """Handlers that note what they were called with."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    async def ready(self, facts: Mapping[str, str]) -> None:
        self.calls.append(("ready", facts["kernel"]))

    async def checked(self, test: ktap.Test) -> None:
        self.calls.append(("checked", test.name, test.status))

    async def data_written(self, nvme: str, offset: int, length: int, sha256: str) -> Answer:
        self.calls.append(("data", offset, length, sha256))
        return Answer.ok("equal")

    async def isolation_never_mapped(self, nvme: str) -> OrderedFault:
        self.calls.append(("never", nvme))
        return OrderedFault("0000:00:04.0", 0xDEAD000, "refused")

    async def isolation_unmapped(self, page: HeldPage) -> Answer:
        self.calls.append(page)
        return Answer.skip("not now")

    async def isolation_bus_master(self, nvme: str) -> Answer:
        self.calls.append(("bus master", nvme))
        return Answer.ok("not sent")

    async def next_step(self, result: GuestResult) -> Step:
        self.calls.append(("next", result.state, result.results.ok))
        return Step.REBOOT


class Guest:
    """The other end of the channel, played by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, *lines: bytes) -> None:
        self.writer.write(b"".join(lines))
        await self.writer.drain()

    async def ask(self, line: bytes) -> bytes:
        await self.say(line)
        return await asyncio.wait_for(self.reader.readline(), 5)


@contextlib.asynccontextmanager
async def channel() -> AsyncIterator[tuple[Guest, asyncio.StreamReader, asyncio.StreamWriter]]:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    guest = Guest(*await asyncio.open_connection(sock=theirs))
    try:
        yield guest, reader, writer
    finally:
        for end in (writer, guest.writer):
            end.close()
            with contextlib.suppress(ConnectionError):
                await end.wait_closed()


async def lost(said: Sequence[bytes], *, end: bool = True, times: Times | None = None) -> GuestLost:
    """What a session makes of a guest that says that much, and then goes or falls silent."""
    async with channel() as (guest, reader, writer):
        session = asyncio.create_task(GuestSession(reader, writer, times).run(NoHost()))
        for part in said:
            guest.writer.write(part)  # without drain: a session that has ended reads no more
        if end:
            guest.writer.write_eof()
        with pytest.raises(GuestLost) as caught:
            await asyncio.wait_for(session, 10)
        guest.writer.transport.abort()
        return caught.value


async def test_a_whole_boot_and_the_next_one_on_the_same_channel() -> None:
    async with channel() as (guest, reader, writer):
        for boot in range(2):
            host = Host()
            session = GuestSession(reader, writer)
            states = [session.state]
            run = asyncio.create_task(session.run(host))
            await guest.say(b"\x00noise of a UART\n", READY, RESULTS[:20])
            await guest.say(RESULTS[20:], b"vioasid: fact key=group_type text=DMA\n")
            digest = b"ab" * 32
            answer = await guest.ask(
                b"vioasid: ask number=1 question=data-written offset=0 length=67108864 sha256=%s\n" % digest
            )
            assert answer == b"vioasid: answer number=1 status=ok text=equal\n"
            states.append(session.state)
            answer = await guest.ask(b"vioasid: ask number=2 question=isolation-never-mapped nvme=0000:00:04.0\n")
            assert answer == b"vioasid: answer number=2 status=ok device=0000:00:04.0 iova=0xdead000 text=refused\n"
            page = b"nvme=0000:00:04.0 offset=33554432 length=4096 gpa=0x1a000"
            answer = await guest.ask(b"vioasid: ask number=3 question=isolation-unmapped %s\n" % page)
            assert answer == b"vioasid: answer number=3 status=skip text=not now\n"
            answer = await guest.ask(b"vioasid: ask number=4 question=isolation-bus-master nvme=0000:00:04.0\n")
            assert answer == b"vioasid: answer number=4 status=ok text=not sent\n"
            assert await guest.ask(NEXT) == b"vioasid: answer number=7 status=ok do=reboot text=\n"
            result = await asyncio.wait_for(run, 5)
            states.append(session.state)
            assert states == [State.BOOTING, State.CHECKING, State.ENDED]
            assert host.calls == [
                ("ready", "7.3.4"),
                ("checked", "iommu", ktap.Status.PASS),
                ("data", 0, 67108864, digest.decode()),
                ("never", "0000:00:04.0"),
                HeldPage("0000:00:04.0", 33554432, 4096, 0x1A000),
                ("bus master", "0000:00:04.0"),
                ("next", State.DONE, True),
            ], f"boot {boot}"
            assert (result.step, result.facts["group_type"], result.facts["cpus"]) == (Step.REBOOT, "DMA", "2")
            assert result.noise == ("noise of a UART",)
            assert result.results.ok


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (b"question=data-written offset=0 length=1 sha256=zz", b"status=fail text=sha256 is no hash"),
        (b"question=data-written offset=-1 length=1", b"status=fail text=offset is no number"),
        (b"question=data-written offset=99999999999999999999 length=1", b"status=fail text=offset is no number"),
        (b"question=isolation-unmapped nvme=x offset=0 length=4096 gpa=0xzz", b"status=fail text=gpa is no number"),
        (b"question=format-the-disk", b"status=skip text=the host does not know the question"),
        (b"question=next", b"status=skip text=the host does not know the question"),  # before its results are out
    ],
)
async def test_questions_that_cannot_be_answered(question: bytes, answer: bytes) -> None:
    async with channel() as (guest, reader, writer):
        run = asyncio.create_task(GuestSession(reader, writer).run(Host()))
        await guest.say(READY)
        assert (await guest.ask(b"vioasid: ask number=4 %s\n" % question)).startswith(
            b"vioasid: answer number=4 " + answer
        )
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run


async def test_a_guest_that_goes() -> None:
    error = await lost([READY, RESULTS])
    assert error.part == "guest"
    assert str(error) == "the guest's channel ended while it was checking"
    assert [test.name for test in error.result.results.tests] == ["iommu"]
    assert str(await lost([])) == "the guest's channel ended while it was booting"


async def test_a_guest_that_falls_silent() -> None:
    error = await lost([b"Kernel panic\n"], end=False, times=Times(0.1, 0.1))
    assert str(error) == "the guest was still booting after 0.1 s; it said last: Kernel panic"
    error = await lost([READY, RESULTS], end=False, times=Times(5, 0.1))
    assert str(error) == "the guest was still checking after 0.1 s; it said last: the result of 'iommu'"
    error = await lost([READY, RESULTS, NEXT[:26]], end=False, times=Times(5, 0.1))
    assert str(error).startswith("the guest was still done after 0.1 s")


async def test_a_guest_that_restarts_by_itself() -> None:
    assert str(await lost([READY, RESULTS, READY])) == "the guest restarted by itself while it was checking"


async def test_a_guest_that_writes_without_end() -> None:
    error = await lost([b"a" * (1 << 20)] * 5, end=False)
    assert str(error) == f"the guest wrote more than {MAX_BYTES} bytes while booting"


async def test_a_guest_that_asks_without_end() -> None:
    async with channel() as (guest, reader, writer):
        run = asyncio.create_task(GuestSession(reader, writer).run(NoHost()))
        await guest.say(READY)
        for number in range(MAX_QUESTIONS):
            assert b"status=skip" in await guest.ask(b"vioasid: ask number=%d question=x\n" % number)
        await guest.say(b"vioasid: ask number=1 question=x\n")
        with pytest.raises(GuestLost, match=f"more than {MAX_QUESTIONS} questions"):
            await asyncio.wait_for(run, 5)


async def test_facts_and_noise_are_bounded_and_out_of_turn_lines_change_nothing() -> None:
    facts = b"".join(b"vioasid: fact key=k%d text=v\n" % n for n in range(1000))
    early = b"vioasid: fact key=early text=v\nvioasid: done\nvioasid: ask number=1 question=next\n"
    error = await lost([b"noise\n" * 1000, early, READY, facts, b"vioasid: done\nvioasid: done\n"])
    assert len(error.result.facts) == MAX_FACTS
    assert len(error.result.noise) == MAX_NOISE
    assert "early" not in error.result.facts
    assert error.result.state is State.DONE
    assert error.result.questions == ()


async def test_what_a_handler_raises_ends_the_session_with_it() -> None:
    class Broken(NoHost):
        async def ready(self, facts: Mapping[str, str]) -> None:
            raise LookupError("moved")

    async with channel() as (guest, reader, writer):
        run = asyncio.create_task(GuestSession(reader, writer).run(Broken()))
        await guest.say(READY)
        with pytest.raises(LookupError, match="moved"):
            await asyncio.wait_for(run, 5)
