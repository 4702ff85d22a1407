"""What happens in the engine, kept for whoever asks later, and told to the connections that subscribed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from backend.core import Fault
from backend.ioasid import Change, Context, What

from .contexts import Contexts
from .parameters import Params
from .session import Session
from .wire import plain

EVENTS = ("fault", *What)
TOPICS = tuple(f"{group}.{event}" for group in ("ioasid", "vm") for event in EVENTS)
"""What can be subscribed to: "ioasid.*" is of the connection's own context, "vm.*" of all."""

FAULTS_KEPT = 1024
"""The newest faults, for `vm.faults`: as many as the core's own ring holds; a guest can cause any number."""

MAX_ANSWER = 256
"""Faults in one answer: some 100 KiB, well below the size of a message."""


class Publisher(Protocol):
    """The server, which knows who subscribed to what."""

    def publish(self, topic: str, *params: Any) -> int: ...


class Events:
    """The notifications, and the method `vm.faults`."""

    def __init__(self, contexts: Contexts, publisher: Callable[[], Publisher | None]) -> None:
        self._contexts = contexts
        self._publisher = publisher
        self._faults: deque[dict[str, Any]] = deque(maxlen=FAULTS_KEPT)
        self._told = 0
        contexts.engine.on_fault(self._faulted)
        self.close = contexts.engine.on_change(self._changed)
        """No change is told from then on."""

    def methods(self) -> Mapping[str, Callable[[Session, Params], Any]]:
        """By name."""
        return {"vm.faults": self.faults}

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
        publisher = self._publisher()
        if publisher is not None:
            publisher.publish(f"vm.{event}", record)
        session = self._contexts.session(context) if context is not None else None
        if session is not None:
            session.connection.notify(f"ioasid.{event}", record)
