"""Messages that are large take turns: what all clients have half sent is bounded, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class Sender(Protocol):
    """A connection whose message is larger than what every connection may keep here."""

    def resume(self) -> None:
        """Its turn has come: the rest may be read."""

    def late(self) -> None:
        """Its message did not end in time, and others wait: the connection is to end."""


class LargeMessages:
    """`most` at a time. Who has had its turn for `seconds`, and is not done, loses it as soon as somebody waits."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._turns: dict[Sender, asyncio.TimerHandle] = {}
        self._waiting: dict[Sender, None] = {}
        """Oldest first."""

    def __len__(self) -> int:
        return len(self._turns) + len(self._waiting)

    def enter(self, sender: Sender) -> bool:
        """Whether it is its turn; if not, it is resumed when it is."""
        if sender in self._turns:
            return True
        if len(self._turns) < self._most:
            self._start(sender)
            return True
        self._waiting[sender] = None
        return False

    def leave(self, sender: Sender) -> None:
        """The message is whole, or the sender is gone."""
        self._waiting.pop(sender, None)
        timer = self._turns.pop(sender, None)
        if timer is None:
            return
        timer.cancel()
        if self._waiting:
            next_one = next(iter(self._waiting))
            del self._waiting[next_one]
            self._start(next_one)
            next_one.resume()

    def _start(self, sender: Sender) -> None:
        self._turns[sender] = self._after(lambda: self._over(sender))

    def _over(self, sender: Sender) -> None:
        if self._waiting:
            sender.late()
        else:
            self._turns[sender] = self._after(lambda: self._over(sender))

    def _after(self, what: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._seconds, what)
