"""Guest-managed tables: BIND_PGTABLE, UNBIND_PGTABLE, INVALIDATE_CACHE."""

from __future__ import annotations

import errno

from . import commands as cmd
from .changes import Change, What
from .checks import Checks
from .command import Command
from .formats import PgtableFormat
from .kinds import Kind
from .spaces import Space


class TableCommands(Checks):
    """Commands on tables of the guest's."""

    def bind_pgtable(self, ioasid: int, root: int, fmt: PgtableFormat) -> None:
        """BIND_PGTABLE: root is the GPA of the guest's root table. The table is not looked at: it faults when it is
        walked."""
        space = self._space(
            cmd.BIND_PGTABLE,
            ioasid,
            ioasid=ioasid,
            root=root,
            vendor=fmt.vendor,
            levels=fmt.levels,
            accessed=fmt.accessed,
            dirty=fmt.dirty,
        )
        if space.bound_root is not None:
            raise cmd.BIND_PGTABLE.refuse(
                errno.EBUSY, f"IOASID {ioasid} has the table at {space.bound_root:#x}: UNBIND_PGTABLE first"
            )
        self._bind(cmd.BIND_PGTABLE, space, root, fmt)

    def _bind(self, command: Command, space: Space, root: int, fmt: PgtableFormat) -> None:
        rule = self._format(command, Kind.USER, fmt)
        if root >> rule.root_bits:
            raise command.refuse(
                errno.EINVAL, f"root {root:#x} is wider than {rule.root_bits} bits, all that {fmt.vendor} has"
            )
        if fmt.dirty and not fmt.accessed:
            raise command.refuse(errno.EINVAL, "dirty bits are kept only together with accessed bits: ask for both")
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
            self.engine.changed(Change(What.INVALIDATE, self._self, ioasid, None, None, *what))
