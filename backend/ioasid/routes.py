"""What attachments and PASID tables mean for the core: where requests of each (RID, PASID) go."""

from __future__ import annotations

import errno

from backend.core import ANY_PASID, TRANSLATED

from .checks import Checks
from .command import Command
from .device import Attachment, Device, unawaited
from .kinds import Kind
from .pasid_formats import PASID_FORMATS
from .pasid_pool import PasidMode
from .spaces import Space, Untagged


class Routes(Checks):
    """Routes, and what stands against one."""

    def _route(self, device: Device, pasid: int | None) -> None:
        """Lead the requests of a device with this PASID (None: without one, and all those that a PASID table of the
        guest's leads) as its attachments say. A CoreError: no room; only what was led nowhere can meet it."""
        top = device.routed(pasid)
        self._route_translated(device)
        if pasid is None:
            self._route_rid(device, top)
        elif top is None:
            self._core.detach(device.rid, pasid)
        else:
            self._core.attach(device.rid, pasid, top.space.core_id, access=top.access, ats=top.ats)
        if device.tlb is not None:
            device.tlb(pasid, 0, None, unawaited)

    def _route_translated(self, device: Device) -> None:
        """Lead requests with translated addresses past all tables of the guest's, if there can be any."""
        to = device.translating if device.group.whole else None
        if to == device.translated:
            return
        if to is not None:
            self._core.attach(device.rid, TRANSLATED, to[0].core_id, access=to[1])
        else:
            self._core.detach(device.rid, TRANSLATED)
        device.translated = to

    def _route_rid(self, device: Device, top: Attachment | None) -> None:
        core, rid = self._core, device.rid
        if top is None:
            self._delegate(device, None)
            core.detach(rid, None)
            return
        if not device.group.whole:  # what of it is attached elsewhere, or nowhere, must not reach this memory
            core.block(rid, None)
            self._delegate(device, None)
            return
        table = top.space.pasid_table
        self._delegate(device, top if table is not None else None)
        below = device.stacks[None][-2] if table is not None and table.untagged == Untagged.PARENT else top
        core.attach(rid, None, below.space.core_id, access=below.access, ats=top.ats)
        windows: list[tuple[int, int, int | None]] = [
            (window.start, window.end - 1, None) for window in device.traits.reserved
        ]
        if top.direct is not None:
            start, end = top.direct
            windows.append((start, end - 1, below.space.host.core_id))
        if windows:
            core.set_windows(rid, windows)

    def _delegate(self, device: Device, to: Attachment | None) -> None:
        """Lead all requests with a PASID to the table of the guest's there, or none any more."""
        if to is not None:
            self._core.attach(device.rid, ANY_PASID, to.space.core_id, access=to.access, ats=to.ats)
        elif device.delegated is not None:
            self._core.detach(device.rid, ANY_PASID)
        device.delegated = to.space if to is not None else None

    def _route_group(self, device: Device) -> None:
        """After a change of what a device is attached to: lead it and those that must move with it."""
        self._route(device, None)
        for other in device.group.devices:
            if other is not device and other.stacks.get(None):
                self._route(other, None)

    def _refuse_format(self, command: Command, device: Device, vendor: str) -> None:
        if device.traits.formats is not None and vendor not in device.traits.formats:
            raise command.refuse(
                errno.EINVAL,
                f"the IOMMU before {device} cannot walk {vendor}: it has {', '.join(sorted(device.traits.formats))}",
            )

    def _refuse_delegation(self, command: Command, device: Device, pasid: int | None, vendor: str) -> None:
        """A PASID table of the guest's cannot serve this device (attached under `pasid`)."""
        if pasid is not None:
            raise command.refuse(
                errno.EINVAL, f"PASID {device.virtual(pasid)} of {device} is attached to it: a PASID table is of a RID"
            )
        if not device.traits.pasid_bits:
            raise command.refuse(errno.EINVAL, f"{device} has no PASIDs: a PASID table is nothing to it")
        if device.traits.pasid_mode != PasidMode.WHOLE:
            raise command.refuse(
                errno.EINVAL, f"PASIDs of {device} come from a {device.traits.pasid_mode} pool: its table is the host's"
            )
        if any(each is not None for each in device.stacks):
            raise command.refuse(errno.EINVAL, f"{device} has PASIDs attached one by one: detach them first")
        for each in PASID_FORMATS[vendor].leads_to:
            self._refuse_format(command, device, each)

    def _refuse_ats(self, command: Command, device: Device, space: Space) -> None:
        """Translation requests of the device cannot be answered with addresses that it could use."""
        if not device.traits.ats:
            raise command.refuse(errno.EINVAL, f"{device} sends no translation requests: attach it without ats")
        if space.kind == Kind.SVA:
            raise command.refuse(
                errno.EINVAL,
                f"IOASID {space.ioasid} is a process: its addresses need a PASID, which translated requests do not "
                "have: attach it without ats",
            )
        if device.ats and device.ats_space is not space.host:
            assert device.ats_space is not None
            raise command.refuse(
                errno.EINVAL,
                f"translated requests of {device} go to IOASID {device.ats_space.ioasid}, and those of IOASID "
                f"{space.ioasid} would have to go to {space.host.ioasid}: attach it without ats",
            )

    def _refuse_space(self, command: Command, device: Device, space: Space) -> None:
        """What an IOASID is, and the device cannot have."""
        if space.enforce_snoop and not device.traits.snoop:
            raise command.refuse(
                errno.EINVAL, f"IOASID {space.ioasid} enforces snooping, and DMA of {device} cannot be made to snoop"
            )
        if space.table_format is not None:
            self._refuse_format(command, device, space.table_format.vendor)
        for window in device.windows:
            mapping = next(space.mappings.within(window.start, window.end - window.start), None)
            if mapping is not None:
                raise command.refuse(
                    errno.EADDRINUSE,
                    f"the mapping [{mapping.iova:#x}, {mapping.end:#x}) reaches into [{window.start:#x}, "
                    f"{window.end:#x}), which {device} reserves ({window.why}): unmap it first",
                )
