"""Work of a function that is done in turns, so that everybody else on the loop is served in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Turns:
    """`work` is called again when the loop has served everyone else.

    What it raises there, in nobody's call, is kept for the next one who asks: the transport, which ends the function.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._scheduled = False
        self._broken: Exception | None = None

    def check(self) -> None:
        """Raise what a turn raised."""
        if self._broken is not None:
            raise self._broken

    def defer(self) -> bool:
        """Go on in the next turn, of which there is one at a time; False where no loop runs."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._resume)
        return True

    def _resume(self) -> None:
        self._scheduled = False
        try:
            self._work()
        except Exception as error:
            self._broken = error  # the loop logs it as well
            raise
