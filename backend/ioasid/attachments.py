"""Devices and where their DMA goes: BIND_IOASID_FD, UNBIND_IOASID_FD, ATTACH_IOASID, DETACH_IOASID."""

from __future__ import annotations

import errno

from backend.core import RW, Access

from . import rows_devices as cmd
from .changes import Change, What
from .checks import within_limits
from .command import Command
from .device import Attachment, Device
from .kinds import Kind
from .limits import MAX_ATTACHMENTS
from .pasid_pool import PasidMode
from .routes import Routes
from .spaces import Space


class AttachmentCommands(Routes):
    """Commands on devices."""

    def bind_device(self, rid: int, cookie: int | None = None) -> None:
        """BIND_IOASID_FD: the device belongs to this context from now on. One device has one context, and so has one
        group."""
        command = cmd.BIND_IOASID_FD
        device = self._device(command, rid, rid=rid, cookie=cookie)
        if device.context is not None:
            whose = "this" if device.context is self else "another"
            raise command.refuse(errno.EBUSY, f"{device} is bound to {whose} context already: unbind it there first")
        for other in device.group.devices:
            if other.context is not None and other.context is not self:
                raise command.refuse(
                    errno.EBUSY, f"{other}, which moves with {device}, is bound to another context: unbind it there"
                )
        device.context = self._self
        device.cookie = cookie
        self._devices[rid] = device

    def unbind_device(self, rid: int) -> None:
        """UNBIND_IOASID_FD: of a device that is attached to nothing, nor is any other of its group."""
        command = cmd.UNBIND_IOASID_FD
        device = self._bound(command, rid, rid=rid)
        for each in (device, *device.group.devices):
            if each.attachments:
                raise command.refuse(errno.EBUSY, f"{each} is attached {each.attachments} times: detach it first")
        self._release(device)

    def attach(
        self,
        rid: int,
        ioasid: int,
        *,
        pasid: int | None = None,
        vpasid: int | None = None,
        access: Access = RW,
        ats: bool = False,
        direct_iova: int = 0,
        direct_size: int = 0,
    ) -> None:
        """ATTACH_IOASID: DMA of (rid, pasid) goes through this IOASID, for no more than `access` (none at all may be
        asked for). ats: the device may ask for translations, of every PASID where the IOASID has a PASID table, and
        use what it was told: its translated requests go to the host-managed IOASID underneath, one for the device.
        Requests without a PASID to [direct_iova, direct_iova + direct_size) go there untranslated, too; 0: none do.

        A child takes the routing over from its parent, to which the device stays attached: (rid, pasid) must be
        attached to the parent, or for a PASID, the RID must. Only what routes bounds access; the parent's bound
        counts again when it routes again. vpasid: a PASID of the guest's, in place of one of the device's.
        """
        command = cmd.ATTACH_IOASID
        device = self._bound(command, rid, rid=rid, ioasid=ioasid, pasid=pasid, vpasid=vpasid, access=access,
                             ats=ats, direct_iova=direct_iova, direct_size=direct_size)  # fmt: skip
        space = self._space(command, ioasid)
        key = self._key(command, device, pasid, vpasid)
        self._refuse_pasid(command, device, space, pasid, vpasid)
        self._refuse_space(command, device, space)
        if ats:
            self._refuse_ats(command, device, space)
        direct = self._direct(command, direct_iova, direct_size, pasid if vpasid is None else vpasid)
        self._refuse_stack(command, device, space, key, vpasid)
        self._refuse_group(command, device, space, pasid if vpasid is None else vpasid)
        if device.attachments >= MAX_ATTACHMENTS:
            raise command.refuse(errno.ENOSPC, f"{device} has {MAX_ATTACHMENTS} attachments: detach one first")
        self._take(command, self.share.attachments, "attachments")
        if vpasid is not None:
            key = device.register(vpasid)
            if key is None:
                self.share.attachments.give()
                raise command.refuse(errno.ENOSPC, f"no PASID is left in the pool of {device}: detach one first")
        device.push(key, Attachment(space, access, ats, direct))
        try:
            with within_limits(command):
                self._route_all(device, key)
        except OSError:
            device.pop(key)
            self._route_translated(device)
            device.unregister(key)
            self.share.attachments.give()
            raise
        if self.engine.watched:
            self.engine.changed(Change(What.ATTACH, self._self, ioasid, rid, device.virtual(key)))

    def detach(self, rid: int, *, pasid: int | None = None, vpasid: int | None = None) -> None:
        """DETACH_IOASID: from what (rid, pasid) is routed to; the parent beneath it, if any, routes again. Page
        requests that wait for an answer are invalid."""
        command = cmd.DETACH_IOASID
        device = self._bound(command, rid, rid=rid, pasid=pasid, vpasid=vpasid)
        key = self._key(command, device, pasid, vpasid)
        routed = device.routed(key) if key is not None or vpasid is None else None
        if routed is None:
            raise command.refuse(errno.ENOENT, f"{_who(device, pasid, vpasid)} is not attached")
        for each in device.group.devices if key is None else ():
            leaning = each.leaning(routed.space)
            if leaning is not None:
                raise command.refuse(
                    errno.EBUSY,
                    f"PASID {each.virtual(leaning)} of {each} is attached to a child of IOASID {routed.space.ioasid}: "
                    "detach it first",
                )
            tagged = next((other for other in each.stacks if other is not None), None)
            if tagged is not None and len(device.group.devices) > 1:
                raise command.refuse(
                    errno.EBUSY,
                    f"{device.group} would be only partly attached, and PASID {each.virtual(tagged)} of {each} is: "
                    "detach it first",
                )
        self._pop(device, key)

    def _direct(self, command: Command, iova: int, size: int, pasid: int | None) -> tuple[int, int] | None:
        """[start, end) of what is not translated, or None."""
        if not size:
            if iova:
                raise command.refuse(errno.EINVAL, f"direct_iova {iova:#x} without direct_size: give both or none")
            return None
        if pasid is not None:
            raise command.refuse(errno.EINVAL, "direct addresses are of requests without a PASID: leave them out")
        command.check_range("direct_iova", iova, size)
        return iova, iova + size

    def _key(self, command: Command, device: Device, pasid: int | None, vpasid: int | None) -> int | None:
        """The physical PASID that a command is about; None: requests without one, or a vPASID that has none yet."""
        if pasid is not None and vpasid is not None:
            raise command.refuse(errno.EINVAL, "name a PASID of the device or one of the guest's, and not both")
        return pasid if vpasid is None else device.physical(vpasid)

    def _refuse_pasid(
        self, command: Command, device: Device, space: Space, pasid: int | None, vpasid: int | None
    ) -> None:
        mode = device.traits.pasid_mode
        asked = pasid if vpasid is None else vpasid
        if asked is None:
            if space.pasid_table is not None:
                self._refuse_delegation(command, device, None, space.pasid_table.format.vendor)
            if mode != PasidMode.WHOLE and space.kind in {Kind.USER, Kind.SVA}:
                raise command.refuse(
                    errno.EINVAL,
                    f"all requests of {device} for a guest's address space carry a PASID ({mode}): name a vpasid",
                )
            return
        if not device.traits.pasid_bits:
            raise command.refuse(errno.EINVAL, f"{device} has no PASIDs: attach it without one")
        if space.pasid_table is not None:
            raise command.refuse(
                errno.EINVAL, f"the PASID table of IOASID {space.ioasid} is the guest's own: attach it without a PASID"
            )
        if device.delegated is not None:
            raise command.refuse(
                errno.EINVAL,
                f"PASIDs of {device} are led by the guest's own table (IOASID {device.delegated.ioasid}): leave it out",
            )
        if pasid is not None and mode != PasidMode.WHOLE:
            raise command.refuse(
                errno.EINVAL, f"PASIDs of {device} come from a pool ({mode}) and are not shown: name a vpasid"
            )
        if asked >> (device.traits.pasid_bits if mode == PasidMode.WHOLE else 20):
            raise command.refuse(
                errno.EINVAL, f"PASID {asked} is wider than the {device.traits.pasid_bits} bits that {device} has"
            )

    def _refuse_stack(
        self, command: Command, device: Device, space: Space, key: int | None, vpasid: int | None
    ) -> None:
        """Where (rid, pasid) is attached already, or where its parent is not."""
        fresh = vpasid is not None and key is None
        routed = None if fresh else device.routed(key)
        who = _who(device, key if vpasid is None else None, vpasid)
        parent = space.parent
        if routed is not None and (parent is None or routed.space is not parent):
            raise command.refuse(
                errno.EBUSY, f"{who} is routed to IOASID {routed.space.ioasid} already: detach it first"
            )
        without_pasid = key is None and vpasid is None
        if routed is None and parent is not None and (without_pasid or not device.holds(None, parent)):
            raise command.refuse(
                errno.EINVAL,
                f"{who} is not attached to IOASID {parent.ioasid}, the parent of {space.ioasid}: attach it there first",
            )

    def _refuse_group(self, command: Command, device: Device, space: Space, pasid: int | None) -> None:
        """Where the devices that must move with this one stand in the way."""
        group = device.group
        mine = [*device.spaces, space] if pasid is None else device.spaces
        for other in group.devices:
            if other is device:
                continue
            if other.context is not self:
                raise command.refuse(
                    errno.EINVAL, f"{group} is only partly bound: BIND_IOASID_FD of {other} to this context first"
                )
            theirs = other.spaces
            if any(one is not two for one, two in zip(mine, theirs, strict=False)):
                raise command.refuse(
                    errno.EINVAL,
                    f"{other} of {group} is attached to IOASID {theirs[-1].ioasid}: devices of a group go the same way",
                )
            if len(theirs) < len(mine) - 1 or (pasid is not None and len(theirs) != len(mine)):
                raise command.refuse(
                    errno.EINVAL, f"{group} is only partly attached: attach {other} to the same IOASIDs first"
                )

    def _route_all(self, device: Device, key: int | None) -> None:
        if key is None:
            self._route_group(device)
        else:
            self._route(device, key)

    def _release(self, device: Device) -> None:
        self.faults.release(device, None, every=True)
        device.context = None
        device.cookie = None
        del self._devices[device.rid]

    def _pop(self, device: Device, pasid: int | None) -> None:
        """Drop the attachment that routes; what lies beneath it routes again. Nobody answers its page requests now."""
        delegated = pasid is None and device.delegated is not None
        virtual = device.virtual(pasid)
        gone = device.pop(pasid)
        self.share.attachments.give()
        self._route_all(device, pasid)
        self.faults.release(device, pasid, every=delegated)
        if device.traits.pasid_mode == PasidMode.GLOBAL and pasid is not None:
            self._forget_kvm(device, pasid, gone.space)
        device.unregister(pasid)
        if self.engine.watched:
            self.engine.changed(Change(What.DETACH, self._self, gone.space.ioasid, device.rid, virtual))

    def _forget_kvm(self, device: Device, pasid: int, space: Space) -> None:
        """The CPU translates no PASID to what nothing is attached under any more."""
        if not any(key == pasid and other.traits.pasid_mode == PasidMode.GLOBAL for other, key in space.users):
            self.engine.kvm.forget((pasid, space.core_id))


def _who(device: Device, pasid: int | None, vpasid: int | None) -> str:
    asked = pasid if vpasid is None else vpasid
    return str(device) if asked is None else f"PASID {asked} of {device}"
