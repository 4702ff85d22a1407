"""Threads for what may wait: the loop serves others meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from backend.ioasid import IoasidError

T = TypeVar("T")

IDLE = 4
"""Kept for the next calls: to start one costs 100 us, and more than a few at once are rare. There are as many as calls
under way, at most one a connection (protocol.InTurn), so that none waits for another's end."""

Work = Callable[[], None]


class Threads:
    """Started when they are needed. What they call must come to an end by itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def run(self, call: Callable[[], T], /) -> Awaitable[T]:
        """Have it called. Who no longer waits for it does not end it. ENOMEM: the system has no thread for it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            settle: tuple[Callable[[Any], None], Any]
            try:
                settle = future.set_result, call()
            except BaseException as error:
                settle = future.set_exception, error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(lambda: future.done() or settle[0](settle[1]))

        with self._lock:
            if self._idle:
                self._idle -= 1
                self._queue.put(work)
                return future
        thread = threading.Thread(target=self._serve, args=(work,), name="dma")
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            self._threads.discard(thread)
            raise IoasidError(errno.ENOMEM, f"the server has no thread for this: {error}") from error
        return future

    def close(self) -> None:
        """Wait for all of them to end."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._queue.put(None)
        for thread in list(self._threads):
            thread.join()

    def _serve(self, work: Work | None) -> None:
        while work is not None:
            work()
            with self._lock:
                if self._closed or self._idle >= IDLE:
                    break
                self._idle += 1
            work = self._queue.get()
        self._threads.discard(threading.current_thread())
