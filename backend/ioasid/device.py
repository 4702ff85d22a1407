"""A device as the engine knows it: its RID, whose it is, and the attachments that route its DMA."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from backend.core import Access

from .fault_queue import Answer, Code, FaultRecord, PageResponse
from .kinds import Kind
from .pasid_pool import PasidMode, PasidPool
from .port import DevicePort
from .traits import Traits

if TYPE_CHECKING:
    from .context import Context
    from .engine import Engine
    from .spaces import Space


@dataclass(frozen=True, slots=True)
class Attachment:
    """A device's DMA may go through `space`, for no more than `access`."""

    space: Space
    access: Access
    ats: bool = False
    """The device may send translation requests over it, and translated requests."""
    direct: tuple[int, int] | None = None
    """IOVAs [start, end) that requests without a PASID find untranslated."""


def unawaited() -> None:
    """For a device TLB to call when it is done, where nobody waits for that."""


class DeviceTlb(Protocol):
    """Translations that a device keeps itself (ATS)."""

    def __call__(self, pasid: int | None, iova: int, size: int | None, done: Callable[[], None]) -> None:
        """Forget those of [iova, iova + size), None: of all, of requests with this PASID; None: of all there are, where
        the guest's own PASID table leads them, else of requests without one.

        `done` is to be called once when nothing of it is in use any more, within the call or later."""


class Group:
    """Devices that the IOMMU cannot tell apart, and so must move together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.devices: list[Device] = []

    @property
    def whole(self) -> bool:
        """Whether all devices are attached to the same, without PASID: only then DMA of any may pass."""
        first = self.devices[0].spaces
        return all(each.spaces == first for each in self.devices[1:])

    def __str__(self) -> str:
        return f"group {self.name}"


class Device:
    """One RID.

    Attachments stack for each of (the RID itself, each PASID): a parent, and on top of it a child. The top one
    routes; when a child is detached, routing returns to the parent beneath it, whose attachment was never given up.
    PASIDs here are physical ones; `virtual` and `physical` lead from one to the other.
    """

    def __init__(self, engine: Engine, rid: int, name: str, traits: Traits, group: Group) -> None:
        self.rid = rid
        self.name = name
        self.traits = traits
        self.windows = traits.windows()
        self.group = group
        group.devices.append(self)
        self.context: Context | None = None
        self.cookie: int | None = None
        self.stacks: dict[int | None, list[Attachment]] = {}
        """By PASID, None for requests without one; no list is empty."""
        self.attachments = 0
        self.ats = 0
        """Attachments over which it may send translation requests, routing or not: `ats_space` is beneath all."""
        self.ats_space: Space | None = None
        self._ats_routed: Counter[Access] = Counter()
        self.translated: tuple[Space, Access] | None = None
        """Where requests with translated addresses are led, and what they may do."""
        self.delegated: Space | None = None
        """Whose PASID table serves all its PASIDs: the guest's own."""
        self.port = DevicePort(engine, rid)
        """The only way of this device to memory."""
        self.tlb: DeviceTlb | None = None
        """Told what to forget, where the device keeps translations."""
        self.engine = engine
        self._pool = PasidPool(traits.pasid_bits) if traits.pasid_mode == PasidMode.PER_RID else None
        self._physical: dict[int, int] = {}
        self._virtual: dict[int, int] = {}

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

    def foreign(self, pasid: int | None) -> bool:
        """Whether its requests may come to memory of another process, and so have to wait for as long as that likes."""
        attachment = self.routed(pasid)
        space = attachment.space if attachment is not None else self.delegated if pasid is not None else None
        return space is not None and space.foreign

    @property
    def spaces(self) -> list[Space]:
        """Those that requests without PASID are attached to, the one that routes last."""
        return [each.space for each in self.stacks.get(None, ())]

    def push(self, pasid: int | None, attachment: Attachment) -> None:
        """Record an attachment; it routes from now on."""
        stack = self.stacks.setdefault(pasid, [])
        self._count_ats(stack, -1)
        stack.append(attachment)
        self._count_ats(stack, 1)
        if attachment.ats:
            self.ats += 1
            self.ats_space = attachment.space.host
        self.attachments += 1
        attachment.space.enter(self, pasid)

    def pop(self, pasid: int | None) -> Attachment:
        """Forget the one that routes. There must be one."""
        stack = self.stacks[pasid]
        self._count_ats(stack, -1)
        attachment = stack.pop()
        self._count_ats(stack, 1)
        self.ats -= attachment.ats
        if not stack:
            del self.stacks[pasid]
        self.attachments -= 1
        attachment.space.leave(self, pasid)
        return attachment

    # ATS

    @property
    def translating(self) -> tuple[Space, Access] | None:
        """Which addresses translation requests answer with now, and what they can permit; None: there are none."""
        rights = [access for access, count in self._ats_routed.items() if count]
        if not rights or self.ats_space is None:
            return None
        return self.ats_space, functools.reduce(operator.or_, rights)

    def _count_ats(self, stack: list[Attachment], by: int) -> None:
        """Of a stack, the one that routes has begun to (1) or ceased (-1)."""
        if stack and stack[-1].ats:
            self._ats_routed[stack[-1].access] += by

    # PASIDs

    def physical(self, vpasid: int) -> int | None:
        """The PASID that the device's requests carry for one that the guest sees; None: it has none."""
        return vpasid if self.traits.pasid_mode == PasidMode.WHOLE else self._physical.get(vpasid)

    def virtual(self, pasid: int | None) -> int | None:
        """The PASID that the guest sees for one that a request carries; what the guest has no number for, unchanged."""
        return pasid if pasid is None else self._virtual.get(pasid, pasid)

    def register(self, vpasid: int) -> int | None:
        """The physical PASID for one of the guest's, from the pool if it has none yet. None: the pool is empty."""
        found = self.physical(vpasid)
        if found is None:
            assert self.context is not None
            if self._pool is not None:
                found = self._pool.take()
            else:
                found = self.engine.shared_pasids.take(self.context.vm, vpasid)
            if found is not None:
                self._physical[vpasid] = found
                self._virtual[found] = vpasid
        return found

    def unregister(self, pasid: int | None) -> None:
        """Give a physical PASID back to its pool, once nothing of the device is attached under it."""
        vpasid = self._virtual.get(pasid) if pasid is not None else None
        if vpasid is None or pasid is None or pasid in self.stacks:
            return
        del self._virtual[pasid], self._physical[vpasid]
        if self._pool is not None:
            self._pool.give(pasid)
        else:
            assert self.context is not None
            self.engine.shared_pasids.give(self.context.vm, vpasid)

    # Page requests

    def page_request(
        self, pasid: int | None, iova: int, access: Access, *, group: int, last: bool, answer: Answer
    ) -> None:
        """Ask for a page that is not there (PCI Express page request); `iova` of a page, `group` of 9 bits.

        A group of requests, ended by one with `last`, gets one answer, through the `answer` of its newest request:
        success: translate again; invalid: there is nothing to be had; failure: ask no more. It may come before this
        returns: where nobody could answer, or the context has too many waiting. A group that was not answered yet
        takes no further request once `last` came: that one is invalid. As of DMA, a route that is not known is asked
        for once.
        """
        space = self._space_of(pasid)
        if space is None and self.engine.find_route(self.rid, pasid):
            space = self._space_of(pasid)
        if self.context is None or space is None or space.kind not in {Kind.KERNEL, Kind.USER}:
            answer(PageResponse(self.rid, self.virtual(pasid), group, Code.INVALID))
            return
        record = FaultRecord(
            recoverable=True,
            ioasid=space.ioasid,
            rid=self.rid,
            cookie=self.cookie,
            pasid=self.virtual(pasid),
            iova=iova,
            access=access,
            group=group,
            last=last,
            reason=None,
        )
        self.context.faults.request(self, pasid, record, answer)

    def _space_of(self, pasid: int | None) -> Space | None:
        """Where requests with a PASID, or without one, are led; None: nowhere."""
        attachment = self.routed(pasid)
        return attachment.space if attachment is not None else self.delegated if pasid is not None else None

    def __str__(self) -> str:
        return f"{self.name} ({self.rid >> 8:02x}:{self.rid >> 3 & 31:02x}.{self.rid & 7})"
