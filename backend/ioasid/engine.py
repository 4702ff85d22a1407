"""The engine of a VM: its devices, its contexts, and what happens to DMA without a route or with a fault."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import fields, replace

from backend.core import Core, Fault, SpaceCounters

from .changes import Change
from .context import Context
from .device import Device, DeviceTlb, Group, unawaited
from .errors import IoasidError
from .kinds import Kind
from .kvm_pasids import KvmPasids
from .limits import MAX_CONTEXTS, MAX_DEVICES, MAX_PASID, MAX_RID
from .pasid_pool import PasidMode, PasidPool, SharedPasids
from .share import ALL, Share
from .spaces import Space
from .traits import Traits
from .user_memory import NoMemory, UserMemory
from .vm_memory import VmMemorySource

PAGE_TIMEOUT = 10.0
"""Seconds: a VMM that is swapped out or stopped for a moment is not gone."""

USUAL_TRAITS = Traits()

MAX_CORE_ID = (1 << 32) - 1

Router = Callable[[int, int | None], bool]
FaultListener = Callable[[Fault], None]
ChangeListener = Callable[[Change], None]


class Engine:
    """One a VM. All calls come from one thread, that of the server's loop.

    `core`: the translation and DMA core; closed with the engine. clock: seconds, monotonic. page_timeout: seconds that
    a page request waits for its answer; `expire` gives up waiting.
    """

    def __init__(
        self,
        core: Core | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        page_timeout: float = PAGE_TIMEOUT,
    ) -> None:
        self.core = core if core is not None else Core()
        self.clock = clock
        self.page_timeout = page_timeout
        self.groups: dict[str, Group] = {}
        """By name. Devices without a group make one each, under no name."""
        self.shared_pasids = SharedPasids(PasidPool(MAX_PASID.bit_length()))
        self.kvm = KvmPasids()
        self.tlbs = 0
        """Devices that keep translations themselves."""
        self.devices: dict[int, Device] = {}
        """By RID."""
        self.contexts: set[Context] = set()
        self.vm_memory = VmMemorySource(self._vm_memory_gone)
        """Where the VM's memory lies: what IOASIDs of kind vm follow."""
        self.processes = 0
        """IOASIDs of kind sva."""
        self._spaces: dict[int, Space] = {}
        self._freed = dict.fromkeys(Kind, SpaceCounters(*(0 for _ in fields(SpaceCounters))))
        self._next_core_id = 1
        self._router: Router | None = None
        self._timer: Callable[[float], None] | None = None
        self._routing: set[tuple[int, int | None]] = set()
        self._listeners: list[FaultListener] = []
        self._telling = False
        self._watchers: list[ChangeListener] = []

    def open(
        self, memory: UserMemory | None = None, vm: object = None, share: Share = ALL, *, guest: bool = False
    ) -> Context:
        """A new context, as each open of /dev/ioasid gives. ENOSPC: the engine has all that it may have.

        `memory`: of the user, whose addresses MAP_DMA takes; None: this process. `vm`: contexts opened with the same
        one belong to one VM, whose PASIDs they share; None: a VM of its own. `share`: what it may have beside others.
        `guest`: its user is a guest, which has no process and no memory of the host: kind `sva` is refused, and so is
        every address that is not one of the VM's memory, unless `memory` says where it lies in this process.
        """
        if len(self.contexts) >= MAX_CONTEXTS:
            raise IoasidError(errno.ENOSPC, f"open: {MAX_CONTEXTS} contexts are open: close one first")
        context = Context(self, NoMemory() if guest and memory is None else memory, vm, share, guest=guest)
        self.contexts.add(context)
        return context

    def add_device(self, rid: int, name: str, traits: Traits = USUAL_TRAITS, *, group: str | None = None) -> Device:
        """Make a device known (an endpoint, or an IOMMU function). EEXIST: the RID is taken; EINVAL: it is no RID.

        `group`: of the devices that the IOMMU cannot tell from this one; None: there are none. EBUSY: a device of it is
        bound already.
        """
        if not 0 <= rid <= MAX_RID:
            raise IoasidError(errno.EINVAL, f"add_device: RID {rid:#x} of {name} is wider than 16 bits")
        if rid in self.devices:
            raise IoasidError(
                errno.EEXIST, f"add_device: RID {rid:#06x} is {self.devices[rid]} already: give {name} another one"
            )
        if traits.pasid_mode == PasidMode.GLOBAL and traits.pasid_bits != MAX_PASID.bit_length():
            raise IoasidError(
                errno.EINVAL, f"add_device: {name} has {traits.pasid_bits} bits of PASID: ENQCMD and its pool have 20"
            )
        assert len(self.devices) < MAX_DEVICES
        of = self.groups.get(group) if group is not None else None
        if of is None:
            of = Group(group if group is not None else name)
            if group is not None:
                self.groups[group] = of
        elif any(each.context is not None for each in of.devices):
            raise IoasidError(errno.EBUSY, f"add_device: {of} is in use, {name} cannot join it now: unbind it first")
        device = Device(self, rid, name, traits, of)
        self.devices[rid] = device
        return device

    def set_tlb(self, device: Device, tlb: DeviceTlb | None) -> None:
        """The device keeps translations itself from now on (ATS), and is told what to forget; None: no longer."""
        self.tlbs += (tlb is not None) - (device.tlb is not None)
        device.tlb = tlb

    def expire(self) -> float | None:
        """Give up on page requests whose time is over. Answers with when to call next, by the clock; None: when
        another one has come."""
        deadlines = []
        for context in list(self.contexts):
            context.faults.expire()
            if context.faults.deadline is not None:
                deadlines.append(context.faults.deadline)
        return min(deadlines, default=None)

    def set_timer(self, timer: Callable[[float], None] | None) -> None:
        """Who is told when `expire` is due, by the clock, whenever a page request has come that can be given up then.
        backend.ioasid.page_timer has one for asyncio."""
        self._timer = timer

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

    def renumber(self, fault: Fault) -> Fault:
        """The fault with its IOASID as its context numbers it, and its PASID as its guest does."""
        space = self._spaces.get(fault.ioasid)
        device = self.devices.get(fault.rid)
        pasid = device.virtual(fault.pasid) if device is not None else fault.pasid
        return replace(fault, ioasid=space.ioasid if space is not None else 0, pasid=pasid)

    def report(self, fault: Fault) -> Fault:
        """Renumber the fault, put it in the context's queue, tell the listeners, and give it back."""
        fault = self.renumber(fault)
        device = self.devices.get(fault.rid)
        if device is not None and device.context is not None:
            device.context.faults.report(device, fault)
        if self._telling:
            return fault
        self._telling = True
        try:
            for listener in self._listeners:
                listener(fault)
        finally:
            self._telling = False
        return fault

    def _vm_memory_gone(self, gpa: int, size: int) -> None:
        """Guest memory went, from all IOASIDs of kind vm."""
        if self.tlbs:
            for space in self._spaces.values():
                if space.kind == Kind.VM:
                    self.forget_tlbs(space, gpa, size)

    # For Context.

    def arm(self, due: float) -> None:
        """A page request has come whose time is over then."""
        if self._timer is not None:
            self._timer(due)

    @property
    def watched(self) -> bool:
        """Whether anybody wants to know of changes: else nobody need describe them."""
        return bool(self._watchers)

    def changed(self, change: Change) -> None:
        """Tell who watches."""
        for watcher in list(self._watchers):
            watcher(change)

    def number_of(self, core_id: int | None) -> int | None:
        """The number that a space of the core has in its context."""
        space = self._spaces.get(core_id) if core_id is not None else None
        return space.ioasid if space is not None else None

    def forget_tlbs(self, space: Space, iova: int = 0, size: int | None = None) -> None:
        """Devices that keep translations of an IOASID, or of one beneath it, forget them."""
        if not self.tlbs:
            return
        for device, pasid in list(space.users):
            if device.tlb is not None:
                device.tlb(pasid, iova, size, unawaited)
        self.forget_tlbs_beneath(space)

    def forget_tlbs_beneath(
        self, space: Space, awaited: Callable[[], Callable[[], None]] = lambda: unawaited, rid: int | None = None
    ) -> None:
        """Devices that keep translations of an IOASID beneath this one forget them all; `rid`: just that device.
        awaited: gives what each is to call when it is done."""
        for child in space.below:
            for device, pasid in list(child.users):
                if device.tlb is not None and rid in {None, device.rid}:
                    device.tlb(pasid, 0, None, awaited())
            self.forget_tlbs_beneath(child, awaited, rid)

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
