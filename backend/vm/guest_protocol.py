"""The conversation between the guest's init and the host, over a serial port of its own.

Lines of UTF-8. What the guest says is either KTAP (backend.vm.ktap) or begins with "vioasid: ":

    vioasid: ready protocol=1 kernel=RELEASE machine=ARCH cpus=N memory_kib=N text=KERNEL LINE
    vioasid: fact key=NAME text=VALUE                          for the report
    vioasid: ask number=N question=NAME KEY=VALUE...           the guest waits for the answer
    vioasid: done seconds=N                                    all results are out
    vioasid: ask number=N question=next                        what to do now: the guest rests until it is answered

and the host answers, one line a question:

    vioasid: answer number=N status=ok|fail|skip KEY=VALUE... text=WHAT WAS SEEN

`text` comes last and holds the rest of the line. A guest is hostile: what it says is bounded in length, number and
time, and is never more than text.

`GuestSession` runs one boot over a pair of asyncio streams; backend.vm.guest_lines reads what the guest says.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from backend.vm import ktap
from backend.vm.guest_lines import PREFIX, WORD, Decoder, Done, Event, Fact, Flood, Line, Malformed, Question, Ready
from backend.vm.lost import VmLost

MAX_FACTS = 64  # ours are a dozen
MAX_QUESTIONS = 64  # ours are four
MAX_NOISE = 50  # lines kept that are neither
CHUNK = 1 << 16


class GuestLost(VmLost):
    """The guest stopped talking as agreed: its channel ended, its time ran out, it restarted, or it wrote without end.

    `result` is what it had said by then.
    """

    def __init__(self, message: str, result: GuestResult) -> None:
        super().__init__("guest", message)
        self.result = result


class Step(StrEnum):
    """What a guest does once it is through."""

    POWER_OFF = "poweroff"
    REBOOT = "reboot"


class State(StrEnum):
    """How far one boot has come."""

    BOOTING = "booting"
    CHECKING = "checking"
    DONE = "done"  # results are out; the guest waits to be told what to do
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the host says to a question; `fields` are words without spaces, `text` says what was seen or why not."""

    status: str
    text: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def ok(text: str = "", **fields: str) -> Answer:
        return Answer("ok", text, fields)

    @staticmethod
    def fail(text: str) -> Answer:
        return Answer("fail", text)

    @staticmethod
    def skip(text: str) -> Answer:
        return Answer("skip", text)

    def encode(self, number: int) -> bytes:
        """The line as it is sent; ValueError for a field that the guest could not read back."""
        for key, value in self.fields.items():
            taken = key in {"text", "number", "status"}
            if taken or not WORD.fullmatch(key) or not re.fullmatch(r"[!-~]{1,100}", value):
                raise ValueError(f"an answer's field is a word without spaces: {key}={value}")
        words = "".join(f" {key}={value}" for key, value in self.fields.items())
        text = re.sub(r"[^ -~]", "?", self.text)[:400]
        return f"{PREFIX}answer number={number} status={self.status}{words} text={text}\n".encode()


@dataclass(frozen=True, slots=True)
class OrderedFault:
    """A DMA that the host had a function make, and that faulted: what the guest's kernel must log now."""

    device: str  # as Linux writes it: 0000:00:04.0
    iova: int
    text: str = ""

    def answer(self) -> Answer:
        return Answer.ok(self.text, device=self.device, iova=f"{self.iova:#x}")


@dataclass(frozen=True, slots=True)
class HeldPage:
    """A page that the guest mapped to read `length` bytes from byte `offset` of the disk, and has unmapped.

    The guest compares the page afterwards by itself.
    """

    nvme: str
    offset: int
    length: int
    gpa: int  # 0: the guest could not tell


class Handlers(Protocol):
    """The host's side. Each may take its time: the guest waits 30 seconds. What one raises ends the session with it."""

    async def ready(self, facts: Mapping[str, str]) -> None:
        """The guest's init runs: kernel, machine, cpus, memory_kib, text (its kernel line)."""

    async def checked(self, test: ktap.Test) -> None:
        """One of the guest's checks has ended."""

    async def data_written(self, nvme: str, offset: int, length: int, sha256: str) -> Answer:
        """The guest read `length` bytes back from byte `offset` of the disk of that BDF: compare the backing store's
        hash (hex)."""

    async def isolation_never_mapped(self, nvme: str) -> OrderedFault | Answer:
        """Have a function DMA to an IOVA never mapped. `nvme` is the BDF of the function that the guest checks."""

    async def isolation_unmapped(self, page: HeldPage) -> OrderedFault | Answer:
        """Have a function write to the IOVA under which `page` was mapped, and is no more."""

    async def isolation_bus_master(self, nvme: str) -> Answer:
        """Have a function, which the guest does not let master the bus now, read memory that is mapped for it."""

    async def next_step(self, result: GuestResult) -> Step:
        """All results are out, and the guest does nothing until this returns."""


class NoHost:
    """Handlers for a guest that runs by itself: what needs the host is skipped, and the guest ends with a power-off."""

    async def ready(self, facts: Mapping[str, str]) -> None:
        return None

    async def checked(self, test: ktap.Test) -> None:
        return None

    async def data_written(self, nvme: str, offset: int, length: int, sha256: str) -> Answer:
        return Answer.skip("the host does not hold the disk")

    async def isolation_never_mapped(self, nvme: str) -> OrderedFault | Answer:
        return Answer.skip("the host serves no function behind the IOMMU")

    async def isolation_unmapped(self, page: HeldPage) -> OrderedFault | Answer:
        return Answer.skip("the host serves no function behind the IOMMU")

    async def isolation_bus_master(self, nvme: str) -> Answer:
        return Answer.skip("the host serves no function behind the IOMMU")

    async def next_step(self, result: GuestResult) -> Step:
        return Step.POWER_OFF


@dataclass(frozen=True, slots=True)
class GuestResult:
    """What one boot said. `facts` holds those of `ready` too; `step` is what the guest was told to do in the end."""

    state: State
    facts: Mapping[str, str]
    results: ktap.Results
    questions: tuple[str, ...]
    noise: tuple[str, ...]
    step: Step | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that a guest may take."""

    boot: float = 90  # until `ready`
    checks: float = 120  # from there until it asks what to do next


class GuestSession:
    """One boot of a guest. After a reboot the same streams serve the next session."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, times: Times | None = None) -> None:
        self._reader = reader
        self._writer = writer
        self._times = times or Times()
        self.state = State.BOOTING
        self._decoder = Decoder()
        self._ktap = ktap.Reader()
        self._facts: dict[str, str] = {}
        self._questions: list[str] = []
        self._noise: list[str] = []
        self._step: Step | None = None

    def result(self) -> GuestResult:
        """What was said so far."""
        return GuestResult(
            self.state, dict(self._facts), self._ktap.results(), tuple(self._questions), tuple(self._noise), self._step
        )

    async def run(self, handlers: Handlers) -> GuestResult:
        """Until the guest has been told what to do next. Raises GuestLost; cancelling it leaves the streams usable.

        Close them only when QEMU has ended or the next boot is ready: QEMU hands the guest some bytes at a time and
        drops the rest of the last answer when its end of the channel closes.
        """
        try:
            await self._until(self._times.boot, handlers, State.BOOTING)
            await self._until(self._times.checks, handlers, State.CHECKING, State.DONE)
        except Flood as error:
            raise GuestLost(f"the guest wrote {error} while {self.state}", self.result()) from error
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise GuestLost(f"the guest's channel broke while it was {self.state}: {error}", self.result()) from error
        return self.result()

    async def _until(self, seconds: float, handlers: Handlers, *states: State) -> None:
        try:
            async with asyncio.timeout(seconds) as limit:
                while self.state in states:
                    await self._read(handlers)
        except TimeoutError as error:
            if not limit.expired():
                raise  # a handler's own
            said = self._noise[-1] if self._noise else "nothing else"
            message = f"the guest was still {self.state} after {seconds:g} s; it said last: {self._last(said)}"
            raise GuestLost(message, self.result()) from error

    def _last(self, said: str) -> str:
        tests = self._ktap.results().tests
        return f"the result of {tests[-1].name!r}" if tests and self.state is State.CHECKING else said

    async def _read(self, handlers: Handlers) -> None:
        data = await self._reader.read(CHUNK)
        if not data:
            raise GuestLost(f"the guest's channel ended while it was {self.state}", self.result())
        for event in self._decoder.feed(data):
            await self._handle(event, handlers)

    async def _handle(self, event: Event, handlers: Handlers) -> None:
        match event:
            case Ready(facts):
                if self.state is not State.BOOTING:
                    raise GuestLost(f"the guest restarted by itself while it was {self.state}", self.result())
                self.state = State.CHECKING
                self._facts.update(facts)
                await handlers.ready(facts)
            case Question() if self.state in {State.CHECKING, State.DONE}:
                await self._answer(event, handlers)
            case Fact(key, value) if self.state is State.CHECKING and len(self._facts) < MAX_FACTS:
                self._facts[key] = value
            case Done() if self.state is State.CHECKING:
                self.state = State.DONE
            case Line(text) if self.state is State.CHECKING:
                test = self._ktap.feed(text)
                if test is not None:
                    await handlers.checked(test)
            case Line(text) | Malformed(text):
                if text and len(self._noise) < MAX_NOISE:
                    self._noise.append(text)
            case _:
                if len(self._noise) < MAX_NOISE:
                    self._noise.append(f"out of turn: {event}")

    async def _answer(self, question: Question, handlers: Handlers) -> None:
        if len(self._questions) == MAX_QUESTIONS:
            raise GuestLost(f"the guest asked more than {MAX_QUESTIONS} questions", self.result())
        self._questions.append(question.name)
        if question.name == "next" and self.state is State.DONE:
            self._step = await handlers.next_step(self.result())
            answer = Answer.ok(do=self._step.value)
            self.state = State.ENDED
        else:
            answer = await _ask(question, handlers)
        self._writer.write(answer.encode(question.number))
        await self._writer.drain()


async def _ask(question: Question, handlers: Handlers) -> Answer:
    """What a handler says to one question, or why it cannot be asked so."""
    fields = question.fields
    nvme = fields.get("nvme", "")
    try:
        match question.name:
            case "data-written":
                offset, length = _number(fields, "offset"), _number(fields, "length")
                sha256 = fields.get("sha256", "")
                if not re.fullmatch("[0-9a-f]{64}", sha256):
                    return Answer.fail("sha256 is no hash of 64 hexadecimal digits")
                return await handlers.data_written(nvme, offset, length, sha256)
            case "isolation-never-mapped":
                return _as_answer(await handlers.isolation_never_mapped(nvme))
            case "isolation-unmapped":
                page = HeldPage(nvme, _number(fields, "offset"), _number(fields, "length"), _number(fields, "gpa"))
                return _as_answer(await handlers.isolation_unmapped(page))
            case "isolation-bus-master":
                return await handlers.isolation_bus_master(nvme)
    except _BadField as error:
        return Answer.fail(str(error))
    return Answer.skip(f"the host does not know the question {question.name}")


def _as_answer(said: OrderedFault | Answer) -> Answer:
    return said.answer() if isinstance(said, OrderedFault) else said


class _BadField(Exception):
    pass


def _number(fields: Mapping[str, str], key: str) -> int:
    text = fields.get(key, "")
    if not re.fullmatch(r"0x[0-9a-f]{1,16}|\d{1,19}", text):
        raise _BadField(f"{key} is no number of up to 64 bits")
    return int(text, 0) if text.startswith("0x") else int(text)
