"""Devices and where their DMA goes: BIND_IOASID_FD, UNBIND_IOASID_FD, ATTACH_IOASID, DETACH_IOASID."""

from __future__ import annotations

import errno

from backend.core import RW, Access

from . import commands as cmd
from .changes import Change, What
from .checks import Checks, within_limits
from .device import Attachment, Device
from .limits import MAX_ATTACHMENTS


class AttachmentCommands(Checks):
    """Commands on devices."""

    def bind_device(self, rid: int, cookie: int | None = None) -> None:
        """BIND_IOASID_FD: the device belongs to this context from now on. One device has one context."""
        device = self._device(cmd.BIND_IOASID_FD, rid, rid=rid, cookie=cookie)
        if device.context is not None:
            whose = "this" if device.context is self else "another"
            raise cmd.BIND_IOASID_FD.refuse(
                errno.EBUSY, f"{device} is bound to {whose} context already: unbind it there first"
            )
        device.context = self._self
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
        with within_limits(command):
            self._core.attach(rid, pasid, space.core_id, access=access)  # in place of the parent's route, if any
        device.push(pasid, Attachment(space, access))
        if self.engine.watched:
            self.engine.changed(Change(What.ATTACH, self._self, ioasid, rid, pasid))

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
            self.engine.changed(Change(What.DETACH, self._self, gone.space.ioasid, device.rid, pasid))
