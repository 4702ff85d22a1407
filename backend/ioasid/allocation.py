"""IOASIDs come and go: ALLOC, CREATE_NESTING, FREE, GET_INFO."""

from __future__ import annotations

import errno
from heapq import heappop, heappush

from . import commands as cmd
from .bodies import MAKERS, Request
from .checks import within_limits
from .command import Command
from .formats import PgtableFormat
from .info import Info, describe
from .kinds import Kind
from .limits import MAX_CHILDREN, MAX_DEPTH, MAX_IOASIDS
from .spaces import Space
from .tables import TableCommands

NESTED = frozenset({Kind.USER, Kind.KERNEL})
"""Kinds that can stand beneath a parent."""


class AllocationCommands(TableCommands):
    """Commands on the IOASID itself."""

    def alloc(
        self,
        kind: Kind = Kind.KERNEL,
        *,
        vendor: str = "amd-v1",
        levels: int = 4,
        accessed: bool = False,
        dirty: bool = False,
        parent: int | None = None,
        root: int | None = None,
        pid: int | None = None,
    ) -> int:
        """ALLOC: an IOASID of this kind, with a table of this format; answers with its number.

        parent: for `user`, and for `kernel` that is to be nested by the host. root: for `user`, GPA of the table to
        bind at once. pid: for `sva`, whose address space it is.
        """
        command = cmd.ALLOC
        fmt = PgtableFormat(vendor, levels, accessed, dirty)
        self._enter(
            command,
            kind=kind,
            vendor=vendor,
            levels=levels,
            accessed=accessed,
            dirty=dirty,
            parent=parent,
            root=root,
            pid=pid,
        )
        if kind not in list(Kind):
            raise command.refuse(errno.EOPNOTSUPP, f"no kind {kind!r}: ask for one of {', '.join(Kind)}")
        kind = Kind(kind)
        if kind == Kind.USER and parent is None:
            raise command.refuse(
                errno.EINVAL, "a user-managed table on a root isolates nothing: name a parent, or use CREATE_NESTING"
            )
        if root is not None and kind != Kind.USER:
            raise command.refuse(errno.EINVAL, f"kind {kind} has no table of a user's: leave root out")
        if parent is not None and kind not in NESTED:
            raise command.refuse(errno.EINVAL, f"an IOASID of kind {kind} stands beneath no other: leave parent out")
        if (pid is not None) != (kind == Kind.SVA):
            raise command.refuse(errno.EINVAL, "a process goes with kind sva, and with no other: see pid")
        above = self._parent(command, parent) if parent is not None else None
        if kind == Kind.USER and root is None:
            assert above is not None
            fmt = above.format
        elif kind != Kind.SVA:  # whose table is that of the process
            self._format(command, kind, fmt)
        ioasid = self._new_space(command, kind, fmt, above, pid)
        if root is not None:
            space = self._spaces[ioasid]
            try:
                self._bind(command, space, root, fmt)
            except BaseException:
                self._drop(space)
                raise
        return ioasid

    def create_nesting(self, parent: int, kind: Kind = Kind.USER) -> int:
        """CREATE_NESTING: a child. Guest-managed: DMA through it faults until BIND_PGTABLE. Host-managed (`kernel`):
        what is mapped into it are addresses of the parent's."""
        command = cmd.CREATE_NESTING
        self._enter(command, parent=parent, kind=kind)
        above = self._parent(command, parent)
        if kind not in NESTED:
            raise command.refuse(errno.EOPNOTSUPP, f"no nesting of kind {kind!r}: ask for user or kernel")
        return self._new_space(command, Kind(kind), above.format, above, None)

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

    def _parent(self, command: Command, parent: int) -> Space:
        """A host-managed IOASID with room for one more child."""
        above = self._space(command, parent)
        if above.kind not in cmd.CREATE_NESTING.kinds:
            raise command.refuse(
                errno.EINVAL, f"IOASID {parent} is of kind {above.kind}: a parent is host-managed, of kind kernel or vm"
            )
        if above.depth >= MAX_DEPTH:
            raise command.refuse(errno.ENOSPC, f"IOASID {parent} stands beneath {MAX_DEPTH - 1} others: no deeper")
        if above.children >= MAX_CHILDREN:
            raise command.refuse(errno.ENOSPC, f"IOASID {parent} has {MAX_CHILDREN} children: free one first")
        return above

    def _new_space(
        self, command: Command, kind: Kind, fmt: PgtableFormat, parent: Space | None, pid: int | None
    ) -> int:
        if len(self._spaces) >= MAX_IOASIDS:
            raise command.refuse(errno.ENOSPC, f"the context has {MAX_IOASIDS} IOASIDs: free one first")
        make = MAKERS.get(kind)
        if make is None:
            raise command.refuse(errno.EOPNOTSUPP, f"kind {kind} is not to be had")
        core_id = self.engine.new_core_id()
        with within_limits(command):
            body = make(Request(command, self.engine, core_id, fmt, parent, pid))
        ioasid = heappop(self._free) if self._free else len(self._spaces) + 1
        space = Space(self._self, ioasid, core_id, kind, fmt, body, parent)
        self._spaces[ioasid] = space
        if parent is not None:
            parent.children += 1
        self.engine.enter(space)
        return ioasid

    def _drop(self, space: Space) -> None:
        last = self._core.space_counters(space.core_id)
        space.body.close()
        self.engine.leave(space, last)
        del self._spaces[space.ioasid]
        heappush(self._free, space.ioasid)
        if space.parent is not None:
            space.parent.children -= 1
