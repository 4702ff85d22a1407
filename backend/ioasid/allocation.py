"""IOASIDs come and go: ALLOC, CREATE_NESTING, FREE, GET_INFO."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import overload

from . import rows_spaces as cmd
from .bodies import MAKERS, Request
from .checks import within_format
from .command import Command
from .extensions import extensions
from .formats import PAGE_SIZE, PgtableFormat
from .info import DeviceInfo, Info, describe, describe_device
from .kinds import Kind
from .limits import MAX_CHILDREN, MAX_DEPTH, MAX_IOASIDS
from .spaces import Space
from .tables import TableCommands

NESTED = frozenset({Kind.USER, Kind.KERNEL})
"""Kinds that can stand beneath a parent."""


class AllocationCommands(TableCommands):
    """Commands on the IOASID itself."""

    def check_extension(self, extension: str) -> int:
        """CHECK_EXTENSION: 1 or 0. Names are those of commands, kinds, formats (format:x86), PASID tables
        (pasid-table:amd-gcr3) and of EXTENSIONS."""
        self._enter(cmd.CHECK_EXTENSION, extension=extension)
        return int(extension.lower() in extensions())

    def alloc(
        self,
        kind: Kind = Kind.KERNEL,
        *,
        vendor: str = "amd-v1",
        levels: int = 0,
        accessed: bool = False,
        dirty: bool = False,
        address_width: int = 0,
        granule: int = 0,
        output_width: int = 0,
        upper_root: int | None = None,
        upper_address_width: int = 0,
        upper_granule: int = 0,
        options: Sequence[str] = (),
        parent: int | None = None,
        root: int | None = None,
        pid: int | None = None,
        enforce_snoop: bool = False,
    ) -> int:
        """ALLOC: an IOASID of this kind, with a table of this format; answers with its number.

        vendor and what follows: see PgtableFormat. parent: for `user`, and for `kernel`
        that is to be nested by the host. root: for `user`, GPA of the table to bind at once. pid: for `sva`, whose
        address space it is.
        """
        command = cmd.ALLOC
        asked = {
            "levels": levels,
            "accessed": accessed,
            "dirty": dirty,
            "address_width": address_width,
            "granule": granule,
            "output_width": output_width,
            "upper_root": upper_root,
            "upper_address_width": upper_address_width,
            "upper_granule": upper_granule,
            "options": options,
        }
        given = {"kind": kind, "parent": parent, "root": root, "pid": pid, "enforce_snoop": enforce_snoop}
        self._enter(command, vendor=vendor, **asked, **given)
        if kind not in list(Kind):
            raise command.refuse(errno.EOPNOTSUPP, f"no kind {kind!r}: ask for one of {', '.join(Kind)}")
        kind = Kind(kind)
        fmt = PgtableFormat(
            vendor, levels, accessed, dirty, address_width, granule, output_width, upper_root,
            upper_address_width, upper_granule, tuple(options),
        )  # fmt: skip
        self._refuse_mismatch(command, kind, parent, root, pid)
        above = self._parent(command, parent, kind) if parent is not None else None
        if kind == Kind.USER and root is None:
            assert above is not None
            if vendor != "amd-v1" or any(asked.values()):
                raise command.refuse(errno.EINVAL, "a format without root: give both, or BIND_PGTABLE later")
            fmt = above.format
        elif kind != Kind.SVA:  # whose table is that of the process
            fmt = self._format(command, kind, fmt)
            if kind != Kind.USER:
                self._refuse_guests_options(command, fmt)
        ioasid = self._new_space(command, kind, fmt, above, pid=pid, enforce_snoop=enforce_snoop)
        if root is not None:
            space = self._spaces[ioasid]
            try:
                self._bind(command, space, root, fmt)
            except BaseException:
                self._drop(space)
                raise
        return ioasid

    def _refuse_mismatch(
        self, command: Command, kind: Kind, parent: int | None, root: int | None, pid: int | None
    ) -> None:
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
        if self.guest and kind == Kind.SVA:
            raise command.refuse(
                errno.EPERM, "a guest has no processes of the host: nest a table of its own, of kind user"
            )

    def _refuse_guests_options(self, command: Command, fmt: PgtableFormat) -> None:
        if fmt.options or fmt.accessed or fmt.output_width or fmt.upper_root is not None:
            raise command.refuse(
                errno.EINVAL, "options, accessed, output_width and upper_root are of a guest's table: leave them out"
            )

    def create_nesting(self, parent: int, kind: Kind = Kind.USER) -> int:
        """CREATE_NESTING: a child. Guest-managed: DMA through it faults until BIND_PGTABLE. Host-managed (`kernel`):
        what is mapped into it are addresses of the parent's. A guest-managed one can stand beneath one that is itself
        guest-managed, over a host-managed one: three tables are walked then."""
        command = cmd.CREATE_NESTING
        self._enter(command, parent=parent, kind=kind)
        if kind not in NESTED:
            raise command.refuse(errno.EOPNOTSUPP, f"no nesting of kind {kind!r}: ask for user or kernel")
        above = self._parent(command, parent, Kind(kind))
        return self._new_space(command, Kind(kind), above.format, above)

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

    @overload
    def get_info(self, ioasid: int) -> Info: ...
    @overload
    def get_info(self, ioasid: None = None, *, rid: int) -> DeviceInfo: ...
    def get_info(self, ioasid: int | None = None, rid: int | None = None) -> Info | DeviceInfo:
        """GET_INFO: of an IOASID, or of a device that is bound to this context."""
        command = cmd.GET_INFO
        self._enter(command, ioasid=ioasid, rid=rid)
        if ioasid is not None and rid is None:
            return describe(self._space(command, ioasid), self._core)
        if rid is not None and ioasid is None:
            return describe_device(self._bound(command, rid))
        raise command.refuse(errno.EINVAL, "name an IOASID or a device (rid), and not both")

    def _parent(self, command: Command, parent: int, kind: Kind) -> Space:
        """An IOASID with room for one more child, of this kind."""
        above = self._space(command, parent)
        if above.kind not in cmd.CREATE_NESTING.kinds:
            raise command.refuse(
                errno.EINVAL, f"IOASID {parent} is of kind {above.kind}: a parent is of kind kernel, vm or user"
            )
        if above.kind == Kind.USER:
            self._refuse_middle(command, above, kind)
        if above.depth >= MAX_DEPTH:
            raise command.refuse(errno.ENOSPC, f"IOASID {parent} stands beneath {MAX_DEPTH - 1} others: no deeper")
        if above.children >= MAX_CHILDREN:
            raise command.refuse(errno.ENOSPC, f"IOASID {parent} has {MAX_CHILDREN} children: free one first")
        return above

    def _refuse_middle(self, command: Command, above: Space, kind: Kind) -> None:
        """A guest-managed IOASID cannot be the parent of one of this kind."""
        if kind != Kind.USER:
            raise command.refuse(
                errno.EINVAL,
                f"IOASID {above.ioasid} is guest-managed: what the host maps cannot follow it: nest kind user",
            )
        if above.parent is not above.host:
            raise command.refuse(
                errno.EINVAL,
                f"IOASID {above.ioasid} and its parent are guest-managed: a walk goes through two tables of guests and "
                "one of the host, no hardware has more",
            )
        if above.pasid_table is not None:
            raise command.refuse(
                errno.EINVAL,
                f"IOASID {above.ioasid} has a PASID table: addresses of a table beneath it would carry no PASID",
            )

    def _new_space(
        self,
        command: Command,
        kind: Kind,
        fmt: PgtableFormat,
        parent: Space | None,
        *,
        pid: int | None = None,
        enforce_snoop: bool = False,
    ) -> int:
        if len(self._spaces) >= MAX_IOASIDS:
            raise command.refuse(errno.ENOSPC, f"the context has {MAX_IOASIDS} IOASIDs: free one first")
        make = MAKERS.get(kind)
        if make is None:
            raise command.refuse(errno.EOPNOTSUPP, f"kind {kind} is not to be had")
        if (kind == Kind.VM and fmt.granule > PAGE_SIZE) or (
            kind == Kind.KERNEL and parent is not None and fmt.granule > parent.format.granule
        ):
            raise command.refuse(
                errno.EINVAL, f"pages of {fmt.granule} bytes are larger than the memory's they stand for: use smaller"
            )
        core_id = self.engine.new_core_id()
        pages = self._core.table_pages
        self._take(command, self.share.ioasids, "IOASIDs")
        try:
            with within_format(command):
                body = make(Request(command, self._self, core_id, fmt, parent, pid))
            self._pay(command, pages, body.close)
        except BaseException:
            self.share.ioasids.give()
            raise
        ioasid = heappop(self._free) if self._free else len(self._spaces) + 1
        space = Space(self._self, ioasid, core_id, kind, fmt, body, parent)
        space.enforce_snoop = enforce_snoop or (parent is not None and parent.enforce_snoop)
        self._spaces[ioasid] = space
        if parent is not None:
            parent.below.add(space)
        self.engine.enter(space)
        return ioasid

    def _drop(self, space: Space) -> None:
        last = self._core.space_counters(space.core_id)
        for mapping in space.mappings:
            self._account(space, mapping, -1)
        pages = self._core.table_pages
        space.body.close()
        self.share.table_pages.give(pages - self._core.table_pages)
        self.share.mappings.give(len(space.mappings))
        self.share.ioasids.give()
        self.engine.leave(space, last)
        del self._spaces[space.ioasid]
        heappush(self._free, space.ioasid)
        if space.parent is not None:
            space.parent.below.remove(space)
