"""What the CPU translates for the guest, and faults that are read and answered: MAP_PASID, UNMAP_PASID, READ_FAULTS,
PAGE_RESPONSE."""

from __future__ import annotations

import errno

from . import rows_devices as cmd
from .checks import Checks
from .fault_queue import CODES, Code, Faults
from .pasid_pool import PasidMode


class PasidCommands(Checks):
    """Commands of KVM."""

    def map_pasid(self, pasid: int, ioasid: int) -> None:
        """MAP_PASID: ENQCMD of the guest with this PASID reaches devices under the physical one that they are attached
        to this IOASID with. It lasts until UNMAP_PASID, or until none is."""
        command = cmd.MAP_PASID
        space = self._space(command, ioasid, pasid=pasid, ioasid=ioasid)
        reached = {
            key for device, key in space.users if key is not None and device.traits.pasid_mode == PasidMode.GLOBAL
        }
        if not reached:
            raise command.refuse(
                errno.EINVAL, f"no device is attached to IOASID {ioasid} under a PASID of the global pool: attach one"
            )
        if len(reached) > 1:
            raise command.refuse(
                errno.EINVAL,
                f"devices are attached to IOASID {ioasid} under {len(reached)} PASIDs: use one of the VM's",
            )
        kvm = self.engine.kvm
        if kvm.translate(self.vm, pasid) is not None:
            raise command.refuse(errno.EEXIST, f"PASID {pasid} is mapped: UNMAP_PASID first")
        if kvm.full:
            raise command.refuse(errno.ENOSPC, f"{len(kvm)} PASIDs are mapped: unmap one first")
        self._take(command, self.share.mappings, "mappings")
        kvm.put(self.vm, pasid, (reached.pop(), space.core_id), self.share.mappings)

    def unmap_pasid(self, pasid: int) -> None:
        """UNMAP_PASID: ENQCMD with this PASID is refused from now on."""
        command = cmd.UNMAP_PASID
        self._enter(command, pasid=pasid)
        if not self.engine.kvm.take(self.vm, pasid):
            raise command.refuse(errno.ENOENT, f"PASID {pasid} is not mapped")


class FaultCommands(Checks):
    """Commands on faults."""

    def read_faults(self, count: int = 0) -> Faults:
        """READ_FAULTS: take the oldest out of the context's queue, `count` at most, 0: all. `faults.on_ready` tells
        when there are some."""
        self._enter(cmd.READ_FAULTS, count=count)
        return self.faults.read(count)

    def page_response(self, rid: int, group: int, code: Code, pasid: int | None = None) -> None:
        """PAGE_RESPONSE: of a complete group, all at once. pasid: as in the record; None fits any."""
        command = cmd.PAGE_RESPONSE
        self._begin(command, {"rid": rid, "group": group, "code": code, "pasid": pasid})
        device = self._bound(command, rid)
        said = CODES.get(code)
        if said is None:
            raise command.refuse(errno.EOPNOTSUPP, f"no code {code!r}: answer {', '.join(Code)}")
        physical = None
        if pasid is not None:
            physical = device.physical(pasid)
            physical = pasid if physical is None else physical
        if not self.faults.respond(rid, group, physical, said):
            raise command.refuse(
                errno.ENOENT, f"group {group} of {device} waits for no answer: READ_FAULTS tells which do"
            )
