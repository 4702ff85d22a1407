"""Work in turns: everybody else on the loop is served in between, and what it raises is not lost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from backend.pci import Turns


async def test_others_are_served_in_between() -> None:
    order: list[str] = []

    def work() -> None:
        order.append("work")
        if order.count("work") < 3:
            assert turns.defer() and turns.defer(), "asked for twice, there is one turn"

    turns = Turns(work)
    loop = asyncio.get_running_loop()
    assert turns.defer()
    loop.call_soon(order.append, "other")
    for _ in range(5):
        await asyncio.sleep(0)
    assert order == ["work", "other", "work", "work"]


async def test_what_a_turn_raises_is_told_to_the_next_caller() -> None:
    def work() -> None:
        raise ZeroDivisionError

    told: list[Mapping[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
    turns = Turns(work)
    turns.check()
    assert turns.defer()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert isinstance(told[0]["exception"], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        turns.check()


def test_without_a_loop_there_are_no_turns() -> None:
    assert not Turns(lambda: None).defer()
