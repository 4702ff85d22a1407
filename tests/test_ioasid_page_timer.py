"""Page requests that nobody answers end by the server's loop, whoever asked; and nothing runs while none waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from ioasid_guest import Clock

from backend.core import Access
from backend.ioasid import Code, Device, Engine, PageResponse
from backend.ioasid.page_timer import PageTimer

RID = 0x0100


class Counting(Engine):
    """Counts how often it was asked to give up."""

    looked = 0

    def expire(self) -> float | None:
        self.looked += 1
        return super().expire()


@pytest.fixture
def engine() -> Iterator[Counting]:
    made = Counting(page_timeout=0.05)
    yield made
    made.close()


def attached(engine: Engine, rid: int = RID) -> Device:
    """A device on an IOASID of a context of its own."""
    device = engine.add_device(rid, f"dev{rid:x}")
    context = engine.open()
    context.bind_device(rid)
    context.attach(rid, context.alloc())
    return device


def ask(device: Device, group: int = 0, *, last: bool = True) -> asyncio.Future[Code]:
    """A page request, as a device model puts it in: nothing but the call."""
    answered: asyncio.Future[Code] = asyncio.get_running_loop().create_future()

    def answer(response: PageResponse) -> None:
        answered.set_result(response.code)

    device.page_request(None, 0x5000, Access.READ, group=group, last=last, answer=answer)
    return answered


async def test_nobody_answers(engine: Counting) -> None:
    timer = PageTimer(engine)
    timer.start()
    device, other = attached(engine), attached(engine, RID + 8)
    asked = [ask(device, 1), ask(device, 2, last=False), ask(other)]
    assert await asyncio.wait_for(asyncio.gather(*asked), 10) == [Code.INVALID] * 3
    assert await asyncio.wait_for(ask(device), 10) == Code.INVALID, "the next one is timed as well"
    timer.close()


async def test_what_waited_before_the_server_started(engine: Counting) -> None:
    asked = ask(attached(engine))
    timer = PageTimer(engine)
    timer.start()
    assert await asyncio.wait_for(asked, 10) == Code.INVALID
    timer.close()


async def test_nothing_is_looked_at_while_nothing_waits(engine: Counting) -> None:
    timer = PageTimer(engine)
    timer.start()
    started = engine.looked
    device = attached(engine)
    for group in range(100):
        asked = ask(device, group)
        engine.contexts.copy().pop().page_response(RID, group, Code.SUCCESS)
        assert asked.result() == Code.SUCCESS
    await asyncio.sleep(0.3)
    assert engine.looked - started == 1, "one timer for all of them, and none after it"
    timer.close()


async def test_the_earlier_of_two_times_counts() -> None:
    """Contexts may have been opened with different ones."""
    clock = Clock()
    engine = Engine(clock=clock, page_timeout=3600)
    timer = PageTimer(engine)
    timer.start()
    slow = ask(attached(engine))
    engine.page_timeout = 0.05
    quick = attached(engine, RID + 8)
    asked = ask(quick)
    clock.now += 1
    assert await asyncio.wait_for(asked, 10) == Code.INVALID
    assert not slow.done()
    timer.close()
    engine.close()
    assert slow.result() == Code.INVALID, "whoever closes answers what waits"


async def test_a_loop_that_is_early_looks_again(engine: Counting) -> None:
    """The engine's clock may lag behind the loop's."""
    clock = Clock()
    engine.clock = clock
    timer = PageTimer(engine)
    timer.start()
    asked = ask(attached(engine))
    await asyncio.sleep(0.2)
    assert not asked.done() and engine.looked > 1
    clock.now += 1
    assert await asyncio.wait_for(asked, 10) == Code.INVALID
    timer.close()


async def test_closed_it_gives_nothing_up(engine: Counting) -> None:
    timer = PageTimer(engine)
    timer.start()
    device = attached(engine)
    asked = ask(device)
    timer.close()
    ask(device, 1)
    looked = engine.looked
    await asyncio.sleep(0.2)
    assert not asked.done() and engine.looked == looked
