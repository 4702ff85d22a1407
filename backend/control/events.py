"""What happens in the engine, kept for whoever asks later, and told to the connections that subscribed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from backend.core import Fault
from backend.ioasid import Change, Context, What

from .contexts import Contexts
from .parameters import Params
from .session import Session
from .wire import plain

EVENTS = ("fault", *What)
CHANGES = tuple(f".{change}" for change in What)
READY = "ioasid.ready"
"""READ_FAULTS has something to read: what an eventfd is to /dev/ioasid."""
OWN_TOPICS = (*(f"ioasid.{event}" for event in EVENTS), READY)
TOPICS = (*OWN_TOPICS, *(f"vm.{event}" for event in EVENTS))
"""What can be subscribed to: "ioasid.*" is of the connection's own context, "vm.*" of all."""

FAULTS_KEPT = 1024
"""The newest faults, for `vm.faults`: as many as the core's own ring holds; a guest can cause any number."""

MAX_ANSWER = 256
"""Faults in one answer: some 100 KiB, well below the size of a message."""


class Events:
    """The methods `subscribe` and `unsubscribe`, the notifications, and the method `vm.faults`."""

    def __init__(self, contexts: Contexts) -> None:
        self._contexts = contexts
        self._faults: deque[dict[str, Any]] = deque(maxlen=FAULTS_KEPT)
        self._told = 0
        self._subscribers: dict[str, set[Session]] = {topic: set() for topic in TOPICS}
        self._unwatch: Callable[[], None] | None = None
        contexts.engine.on_fault(self._faulted)

    def methods(self) -> Mapping[str, Callable[[Session, Params], Any]]:
        """By name."""
        return {"subscribe": self.subscribe, "unsubscribe": self.unsubscribe, "vm.faults": self.faults}

    def subscribe(self, session: Session, params: Params) -> list[str]:
        """Notify this connection of [`topics`] too (all that begin with "ioasid.", if none are named); answers with all
        that it has."""
        topics = params.words("topics", TOPICS, default=OWN_TOPICS)
        params.end()
        for topic in topics:
            self._subscribers[topic].add(session)
        self._watch()
        return sorted(topic for topic, sessions in self._subscribers.items() if session in sessions)

    def unsubscribe(self, session: Session, params: Params) -> None:
        """Notify it no more of [`topics`] (of any, if none are named)."""
        topics = params.words("topics", TOPICS, default=TOPICS)
        params.end()
        for topic in topics:
            self._subscribers[topic].discard(session)
        self._watch()

    def follow(self, session: Session, context: Context) -> None:
        """A context was opened: its fault queue tells when there is something to read."""

        def ready() -> None:
            if session in self._subscribers[READY]:
                session.connection.notify(READY, {"unread": context.faults.unread})

        context.faults.on_ready(ready)

    def forget(self, session: Session) -> None:
        """The connection is gone."""
        for sessions in self._subscribers.values():
            sessions.discard(session)
        self._watch()

    def faults(self, session: Session, params: Params) -> dict[str, Any]:
        """Faults of all devices that are kept, oldest first, those after number [`after`], [`limit`] at most."""
        del session
        after = params.number("after", 1 << 63, 0)
        limit = params.number("limit", MAX_ANSWER + 1, MAX_ANSWER)
        params.end()
        oldest = self._told - len(self._faults)
        begin = min(max(after - oldest, 0), len(self._faults))
        found = [self._faults[index] for index in range(begin, min(begin + limit, len(self._faults)))]
        return {"faults": found, "lost": max(oldest - after, 0), "more": begin + len(found) < len(self._faults)}

    def _watch(self) -> None:
        """Have changes described while somebody wants them: a guest's invalidations need not pay for nobody."""
        wanted = any(sessions for topic, sessions in self._subscribers.items() if topic.endswith(CHANGES))
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
            "cookie": None if device is None else device.cookie,
            "context": None if context is None else self._contexts.number(context),
            **plain(fault),
        }
        self._faults.append(record)
        self._tell("fault", context, record)

    def _changed(self, change: Change) -> None:
        record = {"context": self._contexts.number(change.context)}
        for name in ("ioasid", "rid", "pasid", "iova", "size"):
            record[name] = getattr(change, name)
        self._tell(change.what, change.context, record)

    def _tell(self, event: str, context: Context | None, record: dict[str, Any]) -> None:
        for session in self._subscribers[f"vm.{event}"]:
            session.connection.notify(f"vm.{event}", record)
        own = self._contexts.session(context) if context is not None else None
        if own in self._subscribers[f"ioasid.{event}"]:
            own.connection.notify(f"ioasid.{event}", record)
