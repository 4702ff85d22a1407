"""What happens in the engine, kept for whoever asks later, and told to the connections that subscribed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from backend.core import Fault
from backend.ioasid import Change, Context

from .contexts import Contexts
from .parameters import Params
from .session import Session
from .wire import plain

EVENTS = ("fault", "attach", "detach", "invalidate")
"""What can be subscribed to; the notification of each is called "event.<name>"."""

FAULTS_KEPT = 1024
"""The newest faults, for `vm.faults`: as many as the core's own ring holds; a guest can cause any number."""

MAX_ANSWER = 256
"""Faults in one answer: some 100 KiB, well below the size of a message."""


class Events:
    """The methods `events.*` and `vm.faults`."""

    def __init__(self, contexts: Contexts) -> None:
        self._contexts = contexts
        self._faults: deque[dict[str, Any]] = deque(maxlen=FAULTS_KEPT)
        self._told = 0
        self._subscribers: dict[Session, None] = {}
        self._unwatch: Callable[[], None] | None = None
        contexts.engine.on_fault(self._faulted)

    def methods(self) -> Mapping[str, Callable[[Session, Params], Any]]:
        """By name."""
        return {
            "events.subscribe": self.subscribe,
            "events.unsubscribe": self.unsubscribe,
            "vm.faults": self.faults,
        }

    def subscribe(self, session: Session, params: Params) -> dict[str, Any]:
        """Tell this connection of `events` (all of them) of its own context, or with `scope` "all" of everybody's."""
        events = params.words("events", EVENTS)
        everybodys = params.word("scope", ("own", "all"), "own") == "all"
        params.end()
        session.events, session.everybodys = events, everybodys
        self._subscribers[session] = None
        self._watch()
        return {"events": sorted(events), "scope": "all" if everybodys else "own", "next": self._told + 1}

    def unsubscribe(self, session: Session, params: Params) -> None:
        """Tell it nothing more."""
        params.end()
        self.forget(session)

    def faults(self, session: Session, params: Params) -> dict[str, Any]:
        """Faults of all devices that are kept, oldest first, those after the one numbered `after`."""
        del session
        after = params.number("after", 1 << 63, 0)
        limit = params.number("limit", MAX_ANSWER + 1, MAX_ANSWER)
        params.end()
        oldest = self._told - len(self._faults)
        begin = min(max(after - oldest, 0), len(self._faults))
        found = [self._faults[index] for index in range(begin, min(begin + limit, len(self._faults)))]
        return {"faults": found, "lost": max(oldest - after, 0), "more": begin + len(found) < len(self._faults)}

    def forget(self, session: Session) -> None:
        """The connection is gone, or wants no more."""
        session.events = frozenset()
        self._subscribers.pop(session, None)
        self._watch()

    def _watch(self) -> None:
        """Have changes described only while somebody wants them."""
        wanted = any(session.events - {"fault"} for session in self._subscribers)
        if wanted and self._unwatch is None:
            self._unwatch = self._contexts.engine.on_change(self._changed)
        elif not wanted and self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def _faulted(self, fault: Fault) -> None:
        self._told += 1
        device = self._contexts.engine.devices.get(fault.rid)
        context = None if device is None else device.context
        record = {
            "number": self._told,
            "time": time.time(),
            "device": None if device is None else device.name,
            "context": None if context is None else self._contexts.number(context),
            **plain(fault),
        }
        self._faults.append(record)
        self._tell("fault", context, record)

    def _changed(self, change: Change) -> None:
        if any(change.what in session.events for session in self._subscribers):
            record = {**plain_change(change), "context": self._contexts.number(change.context)}
            self._tell(change.what, change.context, record)

    def _tell(self, event: str, context: Context | None, record: dict[str, Any]) -> None:
        for session in self._subscribers:
            if event in session.events and (session.everybodys or (context is not None and context is session.own)):
                session.connection.notify(f"event.{event}", record)


def plain_change(change: Change) -> dict[str, Any]:
    """A change as a map, without its context."""
    names = ("ioasid", "rid", "pasid", "iova", "size")
    return {name: value for name in names if (value := getattr(change, name)) is not None}
