"""A context: what one open of /dev/ioasid owns, and the commands on it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from backend.core import RW, Access, LimitError, NoMemoryError

from . import commands as cmd
from .changes import Change, What
from .commands import Command
from .device import Attachment, Device
from .errors import IoasidError
from .formats import FORMATS, FormatRule, PgtableFormat
from .info import Info, describe
from .kinds import Kind
from .limits import MAX_ATTACHMENTS, MAX_CHILDREN, MAX_IOASIDS, MAX_MAPPINGS
from .mappings import Mapping
from .spaces import Space
from .user_memory import OwnMemory, UserMemory

if TYPE_CHECKING:
    from .engine import Engine


class Context:
    """The commands of the uAPI. IOASIDs are numbers local to the context; lowest free first, from 1.

    Every command either does all it says or raises IoasidError and changes nothing. Fields, legal kinds and errors
    of each stand in backend.ioasid.commands.
    """

    def __init__(self, engine: Engine, memory: UserMemory | None = None) -> None:
        self.engine = engine
        self.memory = memory if memory is not None else OwnMemory()
        self._core = engine.core
        self._spaces: dict[int, Space] = {}
        self._free: list[int] = []
        self._devices: dict[int, Device] = {}
        self._closed = False

    # IOASIDs

    def alloc(self, kind: Kind = Kind.KERNEL, *, vendor: str = "amd-v1", levels: int = 4) -> int:
        """ALLOC: a host-managed IOASID with an empty table of this format."""
        self._enter(cmd.ALLOC, kind=kind, vendor=vendor, levels=levels)
        if kind not in list(Kind):
            raise cmd.ALLOC.refuse(errno.EOPNOTSUPP, f"no kind {kind!r}: ask for one of {', '.join(Kind)}")
        if kind == Kind.USER:
            raise cmd.ALLOC.refuse(
                errno.EINVAL, "a user-managed table on a root isolates nothing: use CREATE_NESTING on its parent"
            )
        self._format(cmd.ALLOC, Kind.KERNEL, vendor, levels)
        fmt = PgtableFormat(vendor, levels)
        return self._new_space(
            cmd.ALLOC, fmt, None, lambda core_id: self._core.create_host_space(core_id, fmt=vendor, levels=levels)
        )

    def create_nesting(self, parent: int) -> int:
        """CREATE_NESTING: a guest-managed child. DMA through it faults until BIND_PGTABLE."""
        above = self._space(cmd.CREATE_NESTING, parent, parent=parent)
        if above.children >= MAX_CHILDREN:
            raise cmd.CREATE_NESTING.refuse(
                errno.ENOSPC, f"IOASID {parent} has {MAX_CHILDREN} children: free one first"
            )
        ioasid = self._new_space(
            cmd.CREATE_NESTING,
            above.format,
            above,
            lambda core_id: self._core.create_nested_space(core_id, above.core_id),
        )
        above.children += 1
        return ioasid

    def free(self, ioasid: int) -> None:
        """FREE: of an IOASID without children and attached devices."""
        space = self._space(cmd.FREE, ioasid, ioasid=ioasid)
        if space.children:
            raise cmd.FREE.refuse(errno.EBUSY, f"IOASID {ioasid} has {space.children} children: free them first")
        if space.attachments:
            raise cmd.FREE.refuse(
                errno.EBUSY, f"{space.attachments} attachments use IOASID {ioasid}: detach them first"
            )
        self._drop(space)

    def get_info(self, ioasid: int) -> Info:
        """GET_INFO."""
        return describe(self._space(cmd.GET_INFO, ioasid, ioasid=ioasid), self._core)

    # Host-managed tables

    def map_dma(self, ioasid: int, iova: int, vaddr: int, size: int, access: Access = RW) -> None:
        """MAP_DMA: [iova, iova + size) stands for the user's [vaddr, vaddr + size). Multiples of 4096."""
        space = self._space(cmd.MAP_DMA, ioasid, ioasid=ioasid, iova=iova, vaddr=vaddr, size=size, access=access)
        cmd.MAP_DMA.check_range("iova", iova, size)
        cmd.MAP_DMA.check_range("vaddr", vaddr, size)
        if not access:
            raise cmd.MAP_DMA.refuse(
                errno.EINVAL, "access allows neither read nor write: leave the range unmapped instead"
            )
        width = FORMATS[space.format.vendor].address_width(space.format.levels)
        if iova + size > 1 << width:
            raise cmd.MAP_DMA.refuse(
                errno.EINVAL,
                f"[{iova:#x}, {iova + size:#x}) is wider than the {width} bits of IOASID {ioasid}: see GET_INFO",
            )
        other = space.mappings.overlapping(iova, size)
        if other is not None:
            raise cmd.MAP_DMA.refuse(
                errno.EEXIST,
                f"[{iova:#x}, {iova + size:#x}) overlaps the mapping [{other.iova:#x}, {other.end:#x}): unmap it first",
            )
        if len(space.mappings) >= MAX_MAPPINGS:
            raise cmd.MAP_DMA.refuse(
                errno.ENOSPC, f"IOASID {ioasid} has {MAX_MAPPINGS} mappings: use fewer, larger ones"
            )
        try:
            hva = self.memory.hva(vaddr, size, access)
        except IoasidError as error:
            raise cmd.MAP_DMA.refuse(error.errno or 0, error.sentence) from error
        with _within_limits(cmd.MAP_DMA):
            self._core.map(space.core_id, iova, hva, size, access)
        space.mappings.add(Mapping(iova, size, vaddr, access))

    def unmap_dma(self, ioasid: int, iova: int, size: int) -> None:
        """UNMAP_DMA: of exactly what one MAP_DMA mapped."""
        space = self._space(cmd.UNMAP_DMA, ioasid, ioasid=ioasid, iova=iova, size=size)
        cmd.UNMAP_DMA.check_range("iova", iova, size)
        mapping = space.mappings.at(iova)
        if mapping is None:
            raise cmd.UNMAP_DMA.refuse(
                errno.ENOENT, f"no mapping of IOASID {ioasid} begins at {iova:#x}: unmap what was mapped"
            )
        if mapping.size != size:
            raise cmd.UNMAP_DMA.refuse(
                errno.EINVAL,
                f"{size:#x} bytes at {iova:#x}, where {mapping.size:#x} were mapped: unmap them all at once",
            )
        self._core.unmap(space.core_id, iova, size)
        space.mappings.remove(mapping)

    # Guest-managed tables

    def bind_pgtable(self, ioasid: int, root: int, fmt: PgtableFormat) -> None:
        """BIND_PGTABLE: root is the GPA of the guest's root table. The table is not looked at: it faults when it is
        walked."""
        command = cmd.BIND_PGTABLE
        space = self._space(
            command,
            ioasid,
            ioasid=ioasid,
            root=root,
            vendor=fmt.vendor,
            levels=fmt.levels,
            accessed=fmt.accessed,
            dirty=fmt.dirty,
        )
        rule = self._format(command, Kind.USER, fmt.vendor, fmt.levels)
        if root >> rule.root_bits:
            raise command.refuse(
                errno.EINVAL, f"root {root:#x} is wider than {rule.root_bits} bits, all that {fmt.vendor} has"
            )
        if fmt.dirty and not fmt.accessed:
            raise command.refuse(errno.EINVAL, "dirty bits are kept only together with accessed bits: ask for both")
        if space.bound_root is not None:
            raise command.refuse(
                errno.EBUSY, f"IOASID {ioasid} has the table at {space.bound_root:#x}: UNBIND_PGTABLE first"
            )
        self._core.bind_table(
            space.core_id, fmt=fmt.vendor, root=root, levels=fmt.levels, accessed=fmt.accessed, dirty=fmt.dirty
        )
        space.bound_root = root
        space.format = fmt

    def unbind_pgtable(self, ioasid: int) -> None:
        """UNBIND_PGTABLE: nothing of the table is used once this returned."""
        space = self._space(cmd.UNBIND_PGTABLE, ioasid, ioasid=ioasid)
        if space.bound_root is None:
            raise cmd.UNBIND_PGTABLE.refuse(errno.EINVAL, f"no table is bound to IOASID {ioasid}")
        self._core.unbind_table(space.core_id)
        space.bound_root = None

    def invalidate_cache(self, ioasid: int, *, granularity: str = "all", iova: int = 0, size: int = 0) -> None:
        """INVALIDATE_CACHE: "all", or the "range" [iova, iova + size)."""
        command = cmd.INVALIDATE_CACHE
        space = self._space(command, ioasid, ioasid=ioasid, granularity=granularity, iova=iova, size=size)
        if granularity == "all":
            if iova or size:
                raise command.refuse(
                    errno.EINVAL, f'granularity "all" takes no range, got {iova:#x} + {size:#x}: use "range"'
                )
            self._core.invalidate(space.core_id)
        elif granularity == "range":
            if not size:
                raise command.refuse(errno.EINVAL, 'granularity "range" with size 0: name at least one page')
            command.check_range("iova", iova, size)
            self._core.invalidate(space.core_id, iova, size)
        else:
            raise command.refuse(errno.EOPNOTSUPP, f'no granularity {granularity!r}: use "all" or "range"')
        if self.engine.watched:
            what = (iova, size) if granularity == "range" else (None, None)
            self.engine.changed(Change(What.INVALIDATE, self, ioasid, None, None, *what))

    # Devices

    def bind_device(self, rid: int, cookie: int | None = None) -> None:
        """BIND_IOASID_FD: the device belongs to this context from now on. One device has one context."""
        device = self._device(cmd.BIND_IOASID_FD, rid, rid=rid, cookie=cookie)
        if device.context is not None:
            whose = "this" if device.context is self else "another"
            raise cmd.BIND_IOASID_FD.refuse(
                errno.EBUSY, f"{device} is bound to {whose} context already: unbind it there first"
            )
        device.context = self
        device.cookie = cookie
        self._devices[rid] = device

    def unbind_device(self, rid: int) -> None:
        """UNBIND_IOASID_FD: of a device that is attached to nothing."""
        device = self._bound(cmd.UNBIND_IOASID_FD, rid, rid=rid)
        if device.attachments:
            raise cmd.UNBIND_IOASID_FD.refuse(
                errno.EBUSY, f"{device} is attached {device.attachments} times: detach it first"
            )
        self._release(device)

    def attach(self, rid: int, ioasid: int, *, pasid: int | None = None, access: Access = RW) -> None:
        """ATTACH_IOASID: DMA of (rid, pasid) goes through this IOASID, for no more than `access` (none at all may be
        asked for).

        A child takes the routing over from its parent, to which the device stays attached: (rid, pasid) must be
        attached to the parent, or for a PASID, the RID must. Only what routes bounds access; the parent's bound
        counts again when it routes again.
        """
        command = cmd.ATTACH_IOASID
        device = self._bound(command, rid, rid=rid, ioasid=ioasid, pasid=pasid, access=access)
        space = self._space(command, ioasid)
        routed = device.routed(pasid)
        who = str(device) if pasid is None else f"PASID {pasid} of {device}"
        if routed is not None and (space.parent is None or routed.space is not space.parent):
            raise command.refuse(
                errno.EBUSY, f"{who} is routed to IOASID {routed.space.ioasid} already: detach it first"
            )
        if routed is None and space.parent is not None and (pasid is None or not device.holds(None, space.parent)):
            raise command.refuse(
                errno.EINVAL,
                f"{who} is not attached to IOASID {space.parent.ioasid}, the parent of {ioasid}: attach it there first",
            )
        if device.attachments >= MAX_ATTACHMENTS:
            raise command.refuse(errno.ENOSPC, f"{device} has {MAX_ATTACHMENTS} attachments: detach one first")
        with _within_limits(command):
            self._core.attach(rid, pasid, space.core_id, access=access)  # in place of the parent's route, if any
        device.push(pasid, Attachment(space, access))
        if self.engine.watched:
            self.engine.changed(Change(What.ATTACH, self, ioasid, rid, pasid))

    def detach(self, rid: int, *, pasid: int | None = None) -> None:
        """DETACH_IOASID: from what (rid, pasid) is routed to; the parent beneath it, if any, routes again."""
        command = cmd.DETACH_IOASID
        device = self._bound(command, rid, rid=rid, pasid=pasid)
        routed = device.routed(pasid)
        if routed is None:
            who = str(device) if pasid is None else f"PASID {pasid} of {device}"
            raise command.refuse(errno.ENOENT, f"{who} is not attached")
        leaning = device.leaning(routed.space) if pasid is None else None
        if leaning is not None:
            raise command.refuse(
                errno.EBUSY,
                f"PASID {leaning} of {device} is attached to a child of IOASID {routed.space.ioasid}: detach it first",
            )
        self._pop(device, pasid)

    @property
    def ioasids(self) -> Sequence[int]:
        """Those that are allocated, oldest first."""
        return list(self._spaces)

    def close(self) -> None:
        """Give up all that the context owns: attachments, devices, IOASIDs. Later commands are refused; closing
        again is not."""
        for device in list(self._devices.values()):
            while device.stacks:
                self._pop(device, next(reversed(device.stacks)))
            self._release(device)
        for space in sorted(self._spaces.values(), key=lambda each: each.parent is None):
            self._drop(space)
        self._closed = True
        self.engine.contexts.discard(self)

    # Shared by the commands

    def _enter(self, command: Command, /, **fields: object) -> None:
        if self._closed:
            raise command.refuse(errno.EBADF, "this context was closed: open another")
        command.check(**fields)

    def _space(self, command: Command, ioasid: int, /, **fields: object) -> Space:
        """The IOASID, on whose kind the command is legal. Fields, where given, are checked first."""
        if fields:
            self._enter(command, **fields)
        space = self._spaces.get(ioasid)
        if space is None:
            raise command.refuse(
                errno.ENOENT, f"no IOASID {ioasid} in this context: use a number that ALLOC or CREATE_NESTING gave"
            )
        if space.kind not in command.kinds:
            legal = " or ".join(sorted(command.kinds))
            raise command.refuse(
                errno.EINVAL, f"IOASID {ioasid} is of kind {space.kind}, and {command.name} is for kind {legal}"
            )
        return space

    def _device(self, command: Command, rid: int, /, **fields: object) -> Device:
        self._enter(command, **fields)
        device = self.engine.devices.get(rid)
        if device is None:
            raise command.refuse(errno.ENODEV, f"no device has RID {rid:#06x}: use one that the engine knows")
        return device

    def _bound(self, command: Command, rid: int, /, **fields: object) -> Device:
        device = self._device(command, rid, **fields)
        if device.context is not self:
            raise command.refuse(errno.EINVAL, f"{device} is not bound to this context: BIND_IOASID_FD first")
        return device

    def _format(self, command: Command, kind: Kind, vendor: str, levels: int) -> FormatRule:
        rule = FORMATS.get(vendor)
        if rule is None or kind not in rule.kinds:
            offered = ", ".join(each.vendor for each in FORMATS.values() if kind in each.kinds)
            raise command.refuse(
                errno.EOPNOTSUPP, f"format {vendor!r} is not offered for kind {kind}: use one of {offered}"
            )
        if levels not in rule.levels:
            raise command.refuse(
                errno.EOPNOTSUPP,
                f"{vendor} with {levels} levels is not offered: use {rule.levels[0]} to {rule.levels[-1]}",
            )
        return rule

    def _new_space(
        self, command: Command, fmt: PgtableFormat, parent: Space | None, create: Callable[[int], None]
    ) -> int:
        if len(self._spaces) >= MAX_IOASIDS:
            raise command.refuse(errno.ENOSPC, f"the context has {MAX_IOASIDS} IOASIDs: free one first")
        core_id = self.engine.new_core_id()
        with _within_limits(command):
            create(core_id)
        ioasid = heappop(self._free) if self._free else len(self._spaces) + 1
        space = Space(self, ioasid, core_id, Kind.KERNEL if parent is None else Kind.USER, fmt, parent)
        self._spaces[ioasid] = space
        self.engine.enter(space)
        return ioasid

    def _drop(self, space: Space) -> None:
        last = self._core.space_counters(space.core_id)
        self._core.destroy_space(space.core_id)
        self.engine.leave(space, last)
        del self._spaces[space.ioasid]
        heappush(self._free, space.ioasid)
        if space.parent is not None:
            space.parent.children -= 1

    def _release(self, device: Device) -> None:
        device.context = None
        device.cookie = None
        del self._devices[device.rid]

    def _pop(self, device: Device, pasid: int | None) -> None:
        """Drop the attachment that routes; what lies beneath it routes again."""
        stack = device.stacks[pasid]
        if len(stack) > 1:
            self._core.attach(device.rid, pasid, stack[-2].space.core_id, access=stack[-2].access)
        else:
            self._core.detach(device.rid, pasid)
        gone = device.pop(pasid)
        if self.engine.watched:
            self.engine.changed(Change(What.DETACH, self, gone.space.ioasid, device.rid, pasid))


@contextmanager
def _within_limits(command: Command) -> Iterator[None]:
    """The core or the host having no room is an answer to the caller, not the end of the backend."""
    try:
        yield
    except LimitError as error:
        raise command.refuse(
            errno.ENOSPC, "the engine has no room left for tables and routes: free some first"
        ) from error
    except (NoMemoryError, MemoryError) as error:
        raise command.refuse(errno.ENOMEM, "the host has no memory for it: free something first") from error
