"""What an engine holds, for whoever looks: contexts, IOASIDs as a tree, devices and what they are attached to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from backend.ioasid import Context, Device

from .contexts import Contexts
from .parameters import Params
from .session import Session
from .wire import plain

MAX_ANSWER = 64
"""IOASIDs in one answer: a few milliseconds of work and some 100 KiB; who wants more asks again."""

MAX_DEVICES = 512
"""Devices in one answer, likewise."""

SPACE_FIELDS = (
    "ioasid", "kind", "format", "pasid_table", "root", "address_width", "pid", "enforce_snoop", "parent", "children",
    "attachments", "mappings", "mapped", "counters",
)  # fmt: skip
"""What of GET_INFO a listing shows; the rest is what could be asked for, which is long."""


class Status:
    """The methods `vm.*` that only look. `facts`: what the run says of itself, beside its engine's numbers."""

    def __init__(self, contexts: Contexts, facts: Callable[[], Mapping[str, Any]]) -> None:
        self._contexts = contexts
        self._engine = contexts.engine
        self._facts = facts
        self._begun = time.monotonic()

    def methods(self) -> Mapping[str, Callable[[Session, Params], Any]]:
        """By name."""
        return {
            "vm.status": self.status,
            "vm.contexts": self.contexts,
            "vm.spaces": self.spaces,
            "vm.devices": self.devices,
        }

    def status(self, session: Session, params: Params) -> dict[str, Any]:
        """The run, and how many of everything there are."""
        del session
        params.end()
        core = self._engine.core.counters()
        return {
            **plain(self._facts()),
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._begun, 3),
            "contexts": len(self._engine.contexts),
            "devices": len(self._engine.devices),
            "ioasids": sum(len(context.ioasids) for context in self._engine.contexts),
            "counters": plain(core),
        }

    def contexts(self, session: Session, params: Params) -> list[dict[str, Any]]:
        """Every context: number, name, how many IOASIDs and devices it has, and whether it is the caller's."""
        params.end()
        bound: dict[Context, int] = {}
        for device in self._engine.devices.values():
            if device.context is not None:
                bound[device.context] = bound.get(device.context, 0) + 1
        return [
            {
                "context": self._contexts.number(context),
                "name": self._contexts.called(context),
                "own": context is session.own,
                "ioasids": len(context.ioasids),
                "devices": bound.get(context, 0),
            }
            for context in self._contexts
        ]

    def spaces(self, session: Session, params: Params) -> dict[str, Any]:
        """IOASIDs of [`context`] (the caller's) with numbers above [`after`], lowest first, [`limit`] at most."""
        number = params.optional("context", 1 << 63)
        after = params.number("after", 1 << 32, 0)
        limit = params.number("limit", MAX_ANSWER + 1, MAX_ANSWER)
        params.end()
        context = session.context if number is None else self._contexts.find(number)
        later = sorted(each for each in context.ioasids if each > after)
        shown = later[:limit]
        attached = self._attached(context, set(shown))
        return {
            "spaces": [{**self._space(context, each), "attached": attached.get(each, [])} for each in shown],
            "more": len(later) > len(shown),
        }

    def devices(self, session: Session, params: Params) -> dict[str, Any]:
        """Devices with RIDs from [`first`] on: name, context, cookie, and what their requests went through."""
        del session
        first = params.number("first", 1 << 16, 0)
        params.end()
        later = sorted(rid for rid in self._engine.devices if rid >= first)
        return {
            "devices": [self._device(self._engine.devices[rid]) for rid in later[:MAX_DEVICES]],
            "more": len(later) > MAX_DEVICES,
        }

    def _space(self, context: Context, ioasid: int) -> dict[str, Any]:
        info = context.get_info(ioasid)
        return {name: plain(getattr(info, name)) for name in SPACE_FIELDS}

    def _attached(self, context: Context, wanted: set[int]) -> dict[int, list[dict[str, Any]]]:
        """By IOASID: who is attached; `routes`: whether requests go there now, or to a child on top of it."""
        found: dict[int, list[dict[str, Any]]] = {}
        for device in self._engine.devices.values():
            if device.context is not context:
                continue
            for pasid, stack in device.stacks.items():
                for attachment in stack:
                    if attachment.space.ioasid in wanted:
                        found.setdefault(attachment.space.ioasid, []).append(
                            {
                                "rid": device.rid,
                                "name": device.name,
                                "pasid": device.virtual(pasid),
                                "access": plain(attachment.access),
                                "routes": attachment is stack[-1],
                            }
                        )
        return found

    def _device(self, device: Device) -> dict[str, Any]:
        return {
            "rid": device.rid,
            "name": device.name,
            "context": None if device.context is None else self._contexts.number(device.context),
            "cookie": device.cookie,
            "counters": plain(device.port.counters),
        }
