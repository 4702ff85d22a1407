"""Asynchronous events (NVM Express 1.4, 5.2): what the controller tells the guest unasked.

An event waits until the guest has an Asynchronous Event Request open; reporting one masks its type until the guest
reads the log page that it names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum

from backend.endpoints.nvme.status import CommandFailed, Status

# Requests that may be open at a time; the stock driver keeps one.
MAX_REQUESTS = 4

_TYPE_ERROR, _TYPE_SMART = 0, 1
_LOG_ERROR, _LOG_SMART = 0x01, 0x02


class Event(Enum):
    """(type, information, log page): dword 0 of the completion, bits 2:0, 15:8 and 23:16."""

    INVALID_DOORBELL_REGISTER = (_TYPE_ERROR, 0x00, _LOG_ERROR)
    INVALID_DOORBELL_VALUE = (_TYPE_ERROR, 0x01, _LOG_ERROR)
    TEMPERATURE_THRESHOLD = (_TYPE_SMART, 0x01, _LOG_SMART)

    @property
    def kind(self) -> int:
        return self.value[0]

    @property
    def log_page(self) -> int:
        return self.value[2]

    @property
    def result(self) -> int:
        kind, information, log_page = self.value
        return kind | information << 8 | log_page << 16


class AsyncEvents:
    """Open requests and events not yet told. Bounded: MAX_REQUESTS, and each event waits at most once."""

    def __init__(self) -> None:
        self._requests: deque[int] = deque()
        self._waiting: list[Event] = []
        self._masked: set[int] = set()

    def reset(self) -> None:
        """A controller reset forgets requests and events alike."""
        self._requests.clear()
        self._waiting.clear()
        self._masked.clear()

    def request(self, cid: int) -> None:
        """Open a request; it completes when there is something to tell. Raises CommandFailed."""
        if cid in self._requests:
            raise CommandFailed(Status.COMMAND_ID_CONFLICT)
        if len(self._requests) >= MAX_REQUESTS:
            raise CommandFailed(Status.ASYNC_EVENT_LIMIT_EXCEEDED)
        self._requests.append(cid)

    def abort(self, cid: int) -> bool:
        """Withdraw a request; whether there was one of this id."""
        if cid not in self._requests:
            return False
        self._requests.remove(cid)
        return True

    def report(self, event: Event) -> None:
        """Something happened."""
        if event not in self._waiting:
            self._waiting.append(event)

    def log_was_read(self, log_page: int) -> None:
        """The guest has read a log page: events that name it may be told again."""
        self._masked -= {event.kind for event in Event if event.log_page == log_page}

    def deliver(self, complete: Callable[[int, int], None], room: int) -> None:
        """Call complete(command id, dword 0) for every event that may be told now, at most `room` times."""
        for event in tuple(self._waiting):
            if not self._requests or room <= 0:
                return
            if event.kind in self._masked:
                continue
            self._waiting.remove(event)
            self._masked.add(event.kind)
            complete(self._requests.popleft(), event.result)
            room -= 1
