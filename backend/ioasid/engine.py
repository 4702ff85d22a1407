"""The engine of a VM: its devices, its contexts, and what happens to DMA without a route or with a fault."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import fields, replace

from backend.core import Core, Fault, SpaceCounters

from .changes import Change
from .context import Context
from .device import Device
from .errors import IoasidError
from .kinds import Kind
from .limits import MAX_CONTEXTS, MAX_DEVICES, MAX_RID
from .merged import Room
from .spaces import Space
from .user_memory import UserMemory
from .vm_memory import VmMemorySource

MAX_CORE_ID = (1 << 32) - 1

Router = Callable[[int, int | None], bool]
FaultListener = Callable[[Fault], None]
ChangeListener = Callable[[Change], None]


class Engine:
    """One a VM. All calls come from one thread, that of the server's loop.

    `core`: the translation and DMA core; closed with the engine.
    """

    def __init__(self, core: Core | None = None) -> None:
        self.core = core if core is not None else Core()
        self.devices: dict[int, Device] = {}
        """By RID."""
        self.contexts: set[Context] = set()
        self.vm_memory = VmMemorySource()
        """Where the VM's memory lies: what IOASIDs of kind vm follow."""
        self.merged_room = Room()
        self.processes = 0
        """IOASIDs of kind sva."""
        self._spaces: dict[int, Space] = {}
        self._freed = dict.fromkeys(Kind, SpaceCounters(*(0 for _ in fields(SpaceCounters))))
        self._next_core_id = 1
        self._router: Router | None = None
        self._routing: set[tuple[int, int | None]] = set()
        self._listeners: list[FaultListener] = []
        self._telling = False
        self._watchers: list[ChangeListener] = []

    def open(self, memory: UserMemory | None = None) -> Context:
        """A new context, as each open of /dev/ioasid gives. ENOSPC: the engine has all that it may have.

        `memory`: of the user, whose addresses MAP_DMA takes; None: this process.
        """
        if len(self.contexts) >= MAX_CONTEXTS:
            raise IoasidError(errno.ENOSPC, f"open: {MAX_CONTEXTS} contexts are open: close one first")
        context = Context(self, memory)
        self.contexts.add(context)
        return context

    def add_device(self, rid: int, name: str) -> Device:
        """Make a device known (an endpoint, or an IOMMU function). EEXIST: the RID is taken; EINVAL: it is no RID."""
        if not 0 <= rid <= MAX_RID:
            raise IoasidError(errno.EINVAL, f"add_device: RID {rid:#x} of {name} is wider than 16 bits")
        if rid in self.devices:
            raise IoasidError(
                errno.EEXIST, f"add_device: RID {rid:#06x} is {self.devices[rid]} already: give {name} another one"
            )
        assert len(self.devices) < MAX_DEVICES
        device = Device(self, rid, name)
        self.devices[rid] = device
        return device

    def set_router(self, router: Router | None) -> None:
        """Who is asked, once a request, about a (RID, PASID) without a route. True: it is attached now, try again."""
        self._router = router

    def on_fault(self, listener: FaultListener) -> None:
        """Tell the listener of every DMA fault of a device, once, after routing.

        The DMA that a listener does itself is not told when it faults: the listener has the fault as an answer, and
        telling it again would never end where, say, an event log lies in memory that faults.
        """
        self._listeners.append(listener)

    def on_change(self, listener: ChangeListener) -> Callable[[], None]:
        """Tell the listener of every attachment, detachment and invalidation. Answers with what ends that."""
        self._watchers.append(listener)
        return lambda: self._watchers.remove(listener)

    def totals(self, kind: Kind) -> SpaceCounters:
        """What all IOASIDs of a kind counted since the engine began, freed ones included.

        Requests of a device that its port counted and the guest-managed kind did not have bypassed the guest's tables.
        """
        total = self._freed[kind]
        for space in self._spaces.values():
            if space.kind == kind:
                total = _sum(total, self.core.space_counters(space.core_id))
        return total

    def close(self) -> None:
        """Close all contexts, then the core."""
        for context in list(self.contexts):
            context.close()
        self.core.close()

    # For DevicePort.

    def find_route(self, rid: int, pasid: int | None) -> bool:
        """Ask the router. Not while it is being asked about the same (RID, PASID): a router that reads its tables by
        DMA of the very device it routes would never return."""
        key = (rid, pasid)
        if self._router is None or key in self._routing:
            return False
        self._routing.add(key)
        try:
            return self._router(rid, pasid)
        finally:
            self._routing.discard(key)

    def report(self, fault: Fault) -> Fault:
        """Number the fault's IOASID as its context does, tell the listeners, and give it back."""
        space = self._spaces.get(fault.ioasid)
        fault = replace(fault, ioasid=space.ioasid if space is not None else 0)
        if self._telling:
            return fault
        self._telling = True
        try:
            for listener in self._listeners:
                listener(fault)
        finally:
            self._telling = False
        return fault

    # For Context.

    @property
    def watched(self) -> bool:
        """Whether anybody wants to know of changes: else nobody need describe them."""
        return bool(self._watchers)

    def changed(self, change: Change) -> None:
        """Tell who watches."""
        for watcher in list(self._watchers):
            watcher(change)

    def new_core_id(self) -> int:
        """A number for a space in the core: 32 bits, not 0, and used again as late as possible."""
        while True:
            core_id = self._next_core_id
            self._next_core_id = core_id % MAX_CORE_ID + 1
            if core_id not in self._spaces:
                return core_id

    def enter(self, space: Space) -> None:
        """Know a space by its core's number."""
        self._spaces[space.core_id] = space

    def leave(self, space: Space, last: SpaceCounters) -> None:
        """Forget a freed space, but not what it counted."""
        self._freed[space.kind] = _sum(self._freed[space.kind], last)
        del self._spaces[space.core_id]


def _sum(one: SpaceCounters, other: SpaceCounters) -> SpaceCounters:
    return SpaceCounters(*(getattr(one, each.name) + getattr(other, each.name) for each in fields(SpaceCounters)))
