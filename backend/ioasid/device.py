"""A device as the engine knows it: its RID, whose it is, and the attachments that route its DMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backend.core import Access

from .port import DevicePort

if TYPE_CHECKING:
    from .context import Context
    from .engine import Engine
    from .spaces import Space


@dataclass(frozen=True, slots=True)
class Attachment:
    """A device's DMA may go through `space`, for no more than `access`."""

    space: Space
    access: Access


class Device:
    """One RID.

    Attachments stack for each of (the RID itself, each PASID): a parent, and on top of it a child. The top one
    routes; when a child is detached, routing returns to the parent beneath it, whose attachment was never given up.
    """

    def __init__(self, engine: Engine, rid: int, name: str) -> None:
        self.rid = rid
        self.name = name
        self.context: Context | None = None
        self.cookie: int | None = None
        self.stacks: dict[int | None, list[Attachment]] = {}
        """By PASID, None for requests without one; no list is empty."""
        self.attachments = 0
        self.port = DevicePort(engine, rid)
        """The only way of this device to memory."""

    def routed(self, pasid: int | None) -> Attachment | None:
        """The attachment that routes now."""
        stack = self.stacks.get(pasid)
        return stack[-1] if stack else None

    def holds(self, pasid: int | None, space: Space) -> bool:
        """Whether the device (or PASID) is attached to the space, routed to it or not."""
        return any(each.space is space for each in self.stacks.get(pasid, ()))

    def leaning(self, space: Space) -> int | None:
        """A PASID attached to a child of `space` that relies on the RID's own attachment to `space`, or None."""
        for pasid, stack in self.stacks.items():
            if pasid is not None and stack[0].space.parent is space:
                return pasid
        return None

    def push(self, pasid: int | None, attachment: Attachment) -> None:
        """Record an attachment; it routes from now on."""
        self.stacks.setdefault(pasid, []).append(attachment)
        self.attachments += 1
        attachment.space.attachments += 1

    def pop(self, pasid: int | None) -> Attachment:
        """Forget the one that routes. There must be one."""
        stack = self.stacks[pasid]
        attachment = stack.pop()
        if not stack:
            del self.stacks[pasid]
        self.attachments -= 1
        attachment.space.attachments -= 1
        return attachment

    def __str__(self) -> str:
        return f"{self.name} ({self.rid >> 8:02x}:{self.rid >> 3 & 31:02x}.{self.rid & 7})"
