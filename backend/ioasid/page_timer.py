"""Page requests that nobody answers are given up by the server's loop, whoever asked."""

from __future__ import annotations

import asyncio

from .engine import Engine

SLACK = 0.001
"""Seconds after a deadline at which it is looked at: the engine's clock and the loop's need not agree to the last."""


class PageTimer:
    """Calls `Engine.expire` when a page request's time is over, and never while none waits.

    The engine arms it with every page request that opens a group, so whoever lets a device ask needs nothing of its
    own. One timer of the loop at the most, whatever waits.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self) -> None:
        """From now on, in the loop that runs. What waits already counts."""
        self._loop = asyncio.get_running_loop()
        self._engine.set_timer(self._arm)
        self._expire()

    def close(self) -> None:
        """Nothing is given up any more."""
        self._engine.set_timer(None)
        self._disarm()

    def _arm(self, due: float) -> None:
        """Look at `due`, by the engine's clock, if not before."""
        assert self._loop is not None
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_later(max(0.0, due - self._engine.clock()) + SLACK, self._expire)

    def _expire(self) -> None:
        self._disarm()
        due = self._engine.expire()
        if due is not None:
            self._arm(due)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
