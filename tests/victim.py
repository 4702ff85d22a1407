"""Another client of a server that is being harmed: it asks all the while, and remembers its slowest answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self


class Victim:
    """`ask` is called with a running number, over and over, and asserts that the answer is right; `close` at the end.

    `patience`: seconds in which every answer must come. A stalled server takes all the time there is.
    """

    def __init__(self, ask: Callable[[int], None], close: Callable[[], None], *, patience: float) -> None:
        self._ask = ask
        self._close = close
        self._patience = patience
        self._stop = threading.Event()
        self.slowest = 0.0
        self.answers = 0
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._ask_on)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        before = self.answers
        deadline = time.monotonic() + 5
        while self.answers < before + 5 and self.error is None and time.monotonic() < deadline:
            time.sleep(0.005)
        self._stop.set()
        self._thread.join()
        self._close()
        assert self.error is None
        assert self.answers >= before + 5
        assert self.slowest < self._patience

    def _ask_on(self) -> None:
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                self._ask(self.answers)
                self.slowest = max(self.slowest, time.monotonic() - started)
                self.answers += 1
                time.sleep(0.0005)
        except Exception as error:
            self.error = error
