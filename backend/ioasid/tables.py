"""Guest-managed tables: BIND_PGTABLE, UNBIND_PGTABLE, BIND_PASID_TABLE, UNBIND_PASID_TABLE."""

from __future__ import annotations

import errno

from . import rows_tables as cmd
from .checks import format_fields, within_format, within_limits
from .command import Command
from .device import Device
from .formats import FORMATS, PgtableFormat
from .kinds import Kind
from .pasid_formats import PASID_FORMATS, PasidTableFormat
from .routes import Routes
from .spaces import PasidTable, Space, Untagged


class TableCommands(Routes):
    """Commands on tables of the guest's."""

    def bind_pgtable(self, ioasid: int, root: int, fmt: PgtableFormat) -> None:
        """BIND_PGTABLE: root is the GPA of the guest's root table. The table is not looked at: it faults when it is
        walked."""
        command = cmd.BIND_PGTABLE
        space = self._unbound(command, ioasid, root=root, **format_fields(fmt))
        self._bind(command, space, root, self._format(command, Kind.USER, fmt))

    def _bind(self, command: Command, space: Space, root: int, fmt: PgtableFormat) -> None:
        """`fmt` is complete."""
        rule = FORMATS[fmt.vendor]
        if root >> rule.root_bits:
            raise command.refuse(
                errno.EINVAL, f"root {root:#x} is wider than {rule.root_bits} bits, all that {fmt.vendor} has"
            )
        for device, _ in space.users:
            self._refuse_format(command, device, fmt.vendor)
        with within_format(command):
            self._core.bind_table(space.core_id, fmt=rule.table(fmt), root=root)
        space.bound_root = root
        space.format = fmt

    def unbind_pgtable(self, ioasid: int) -> None:
        """UNBIND_PGTABLE: nothing of the table is used once this returned."""
        command = cmd.UNBIND_PGTABLE
        space = self._space(command, ioasid, ioasid=ioasid)
        if space.bound_root is None or space.pasid_table is not None:
            raise command.refuse(errno.EINVAL, f"no page table is bound to IOASID {ioasid}")
        self._unbind(space)

    def bind_pasid_table(
        self,
        ioasid: int,
        root: int,
        fmt: PasidTableFormat,
        untagged: Untagged = Untagged.BLOCKED,
        untagged_pasid: int | None = None,
    ) -> None:
        """BIND_PASID_TABLE: the child stands for the PASIDs of every device attached to it. The table is not looked at:
        it faults when it is walked.

        untagged: where requests without a PASID go.
        """
        command = cmd.BIND_PASID_TABLE
        space = self._unbound(
            command, ioasid, root=root, untagged=untagged, untagged_pasid=untagged_pasid, **format_fields(fmt)
        )
        if space.children:
            raise command.refuse(
                errno.EINVAL,
                f"IOASID {ioasid} has {space.children} children: their addresses would carry no PASID, free them first",
            )
        rule = PASID_FORMATS.get(fmt.vendor)
        if rule is None:
            raise command.refuse(
                errno.EOPNOTSUPP, f"no PASID table {fmt.vendor!r}: use one of {', '.join(PASID_FORMATS)}"
            )
        if untagged not in list(Untagged):
            raise command.refuse(errno.EINVAL, f"untagged {untagged!r} is none of {', '.join(Untagged)}")
        untagged = Untagged(untagged)
        if (untagged_pasid is not None) != (untagged == Untagged.PASID):
            raise command.refuse(errno.EINVAL, 'untagged_pasid goes with untagged "pasid", and with nothing else')
        if root >> rule.root_bits:
            raise command.refuse(
                errno.EINVAL, f"root {root:#x} is wider than {rule.root_bits} bits, all that {fmt.vendor} has"
            )
        try:
            table = rule.table(fmt)
            bits = rule.pasid_bits(fmt)
        except ValueError as error:
            raise command.refuse(errno.EOPNOTSUPP, f"{error}; see GET_INFO for what is offered") from error
        for device, pasid in space.users:
            self._refuse_delegation(command, device, pasid, fmt.vendor)
        with within_format(command):
            self._core.bind_pasid_table(space.core_id, fmt=table, root=root, default_pasid=untagged_pasid)
        space.bound_root = root
        space.pasid_table = PasidTable(fmt, bits, untagged, untagged_pasid)
        try:
            with within_limits(command):
                for device in _devices(space):
                    self._route(device, None)
        except OSError:
            self._unbind(space)
            raise

    def unbind_pasid_table(self, ioasid: int) -> None:
        """UNBIND_PASID_TABLE: nothing of the table is used once this returned."""
        command = cmd.UNBIND_PASID_TABLE
        space = self._space(command, ioasid, ioasid=ioasid)
        if space.pasid_table is None:
            raise command.refuse(errno.EINVAL, f"no PASID table is bound to IOASID {ioasid}")
        self._unbind(space)

    def _unbound(self, command: Command, ioasid: int, **fields: object) -> Space:
        space = self._space(command, ioasid, ioasid=ioasid, **fields)
        if space.bound_root is not None:
            how = "UNBIND_PGTABLE" if space.pasid_table is None else "UNBIND_PASID_TABLE"
            raise command.refuse(errno.EBUSY, f"IOASID {ioasid} has the table at {space.bound_root:#x}: {how} first")
        return space

    def _unbind(self, space: Space) -> None:
        self._core.unbind_table(space.core_id)
        was, space.bound_root, space.pasid_table = space.pasid_table, None, None
        if was is not None:
            for device in _devices(space):
                self._route(device, None)
        self.engine.forget_tlbs(space)
        for device, pasid in space.users:
            self.faults.release(device, pasid, every=was is not None)


def _devices(space: Space) -> list[Device]:
    return [device for device, pasid in space.users if pasid is None]
