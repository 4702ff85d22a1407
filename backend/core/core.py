"""The Python face of the C core: spaces, routes, translation and DMA. No policy, and no rule of the uAPI.

Each method is one call into C, made with the GIL released; any number of threads may call. Once a change (map, unmap,
bind, attach ...) has returned, nothing that it ended is still in use; until then requests may see part of it. Changes
wait for the piece of each request that is under way, requests for the piece of a change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backend.core._native import ffi, lib
from backend.core.answers import RW, Access, Counters, RouteCounters, SpaceCounters
from backend.core.errors import BadValueError
from backend.core.native import LAST_ADDRESS, MAX_IOASID, PAGE
from backend.core.native import address as _address
from backend.core.native import bitmap_for as _bitmap_for
from backend.core.native import check as _check
from backend.core.native import format_of as _format
from backend.core.native import ioasid_of as _id
from backend.core.native import number as _number
from backend.core.native import pasid_of as _pasid
from backend.core.native import route_pasid as _route_pasid
from backend.core.native import small as _small
from backend.core.pasid_format import PasidFormat
from backend.core.process import HostProcess
from backend.core.requests import Requests
from backend.core.table_format import TableFormat, table_of

BYTES = ffi.typeof("char[]")


class Core(Requests):
    """One engine: its spaces, routes and IOTLB. One a VM.

    Args:
        iotlb_entries: translations the IOTLB can hold, rounded up to a power of two; 0 switches it off.
        walk_caches: let walks remember tables they came by; what forgets IOTLB entries forgets them, too. None: if
            there is an IOTLB.
        patience: seconds that a request waits for pages which another process withholds, before it ends in a fault
            (WITHHELD); up to an hour. None: one second.

    Raises:
        BadValueError: patience.
        LimitError: more than 2^20 entries.
        NoMemoryError: no memory for them.
    """

    def __init__(
        self, *, iotlb_entries: int = 4096, walk_caches: bool | None = None, patience: float | None = None
    ) -> None:
        self._native: Any = None
        out = ffi.new("vio_engine **")
        _check(lib.vio_engine_create(_number(iotlb_entries, MAX_IOASID, "iotlb_entries"), out))
        # Freed with the last reference: a call that another thread still has under way holds one.
        self._native = ffi.gc(out[0], lib.vio_engine_destroy)
        if patience is not None:
            _check(lib.vio_patience(self._native, _number(int(patience * 1e9), LAST_ADDRESS, "patience")))
        if walk_caches is not None and walk_caches != bool(iotlb_entries):
            _check(lib.vio_walk_caches(self._native, walk_caches))

    def close(self) -> None:
        """Give everything up. Calls under way end first; later ones raise ClosedError."""
        self._native = None

    # Spaces

    def create_host_space(self, ioasid: int, *, fmt: TableFormat | str = "amd-v1", levels: int = 4) -> None:
        """Create a host-managed space: a page table of format `fmt` in this process, empty.

        Args:
            fmt: a TableFormat without options (its geometry counts), or the name of a format, then of `levels`. Every
                format can hold addresses of this process. First-stage formats map the lower half of their addresses.

        Raises: ExistsError, BadValueError (levels, options), UnknownIdError (format), LimitError.
        """
        name, table = table_of(fmt, 0, levels)
        _check(lib.vio_space_create_host(self._engine, _id(ioasid), _format(name), table), ioasid)

    def create_process_space(self, ioasid: int, process: HostProcess) -> None:
        """Create a space that stands for a process's address space: an IOVA is an address of that process.

        Nothing is pinned: pages are faulted in as the process itself would. What it may not touch itself is answered
        by a fault: NOT_PRESENT, or PERMISSION at writes to what may be read; and everything by MEMORY_GONE once that
        address space is gone (exit, exec). AtomicOps work on this process's own memory alone, else they are
        UNSUPPORTED. A translation tells what is mapped there; whether a page is there is known once it is touched.

        A page that the process withholds (userfaultfd, a file system in user space) keeps the request waiting, and
        nobody else; after the core's `patience` it is answered by WITHHELD.

        Raises: ExistsError, LimitError.
        """
        _check(lib.vio_space_create_process(self._engine, _id(ioasid), process.native), ioasid)

    def lend_process(self, ioasid: int, process: HostProcess) -> None:
        """Let a host-managed space map addresses of a process from now on: `hva | FOREIGN`.

        They are touched as those of create_process_space are; a guest's tables that lie there are not walked
        (UNSUPPORTED).

        Raises: ExistsError (it was lent one already), UnknownIdError, KindError.
        """
        _check(lib.vio_space_lend_process(self._engine, _id(ioasid), process.native), ioasid)

    def create_nested_space(self, ioasid: int, parent: int) -> None:
        """Create a guest-managed space over the space `parent`; its requests fault until bind_table.

        The parent is host-managed, or guest-managed over one that is: then each address that the child's table holds,
        of tables and of data, is translated by the parent's table first. A PASID table of AMD's or VT-d's lies in the
        host-managed space all the same, one of Arm's or RISC-V's in the parent.

        Raises: ExistsError, UnknownIdError (parent), KindError (parent), LimitError.
        """
        _check(lib.vio_space_create_nested(self._engine, _id(ioasid), _id(parent)), ioasid)

    def destroy_space(self, ioasid: int) -> None:
        """Destroy a space without children and routes. Raises: UnknownIdError, BusyError."""
        _check(lib.vio_space_destroy(self._engine, _id(ioasid)), ioasid)

    def map(self, ioasid: int, iova: int, hva: int, size: int, access: Access) -> None:
        """Map [iova, iova + size) of a host-managed space to this process's memory at hva; whole 4 KiB pages.

        `hva | FOREIGN`: an address of the process that was lent to the space.

        Large leaves are used where iova and hva are aligned alike. Nothing is mapped unless all of it is.

        Raises: OverlapError, BadValueError, UnknownIdError, KindError, LimitError (pages for tables).
        """
        try:
            status = lib.vio_space_map(self._engine, ioasid, iova, hva, size, access)
        except OverflowError as beyond:
            raise BadValueError("numbers of a mapping that are not of 64 bits", ioasid=ioasid) from beyond
        if status:
            _check(status, ioasid, iova, size)

    def unmap(self, ioasid: int, iova: int, size: int) -> None:
        """Unmap [iova, iova + size), all of it mapped; larger leaves at its ends are split.

        Once it returned, nothing uses the range: no request, no IOTLB entry of this space or of its children.

        Raises: NotMappedError, BadValueError, UnknownIdError, KindError, LimitError (pages to split a leaf); nothing
        is unmapped then.
        """
        try:
            status = lib.vio_space_unmap(self._engine, ioasid, iova, size)
        except OverflowError as beyond:
            raise BadValueError("numbers of a range that are not of 64 bits", ioasid=ioasid) from beyond
        if status:
            _check(status, ioasid, iova, size)

    def protect(self, ioasid: int, iova: int, size: int, access: Access) -> None:
        """Let `access` be what [iova, iova + size), all of it mapped, permits; larger leaves at its ends are split.

        Once it returned, nothing is permitted by what held before.

        Raises: NotMappedError, BadValueError, UnknownIdError, KindError, LimitError (pages to split a leaf); nothing
        is changed then.
        """
        status = lib.vio_space_protect(
            self._engine, _id(ioasid), _address(iova, "iova"), _address(size, "size"), _small(access)
        )
        _check(status, ioasid, iova, size)

    def set_dirty_tracking(self, ioasid: int, on: bool) -> None:
        """Note from now on, or no longer, which pages of a host-managed space requests write.

        What counts is the write itself, in units of 4 KiB, through whatever space it came: the writes of nested
        spaces count for the pages they reach here, and so do accessed and dirty bits set in a guest's table.
        `on` while it is on changes nothing; off forgets.

        Raises: UnknownIdError, KindError (a nested space: ask its parent), LimitError (pages for the bits).
        """
        _check(lib.vio_dirty_set(self._engine, _id(ioasid), on), ioasid)

    def read_dirty(self, ioasid: int, iova: int, size: int, page_size: int = PAGE, *, clear: bool = True) -> bytes:
        """Return which pages of [iova, iova + size) were written, a bit each, and forget that unless told not to.

        Args:
            page_size: bytes that a bit stands for: a power of two, 4 KiB or more, that divides iova and size. A page
                is dirty if any of it was written. Clearing clears just the range.

        Returns: page i of the range in bit i % 8 of byte i // 8. Writes before the call are in it, writes after it in
        the next; a page that was unmapped since stays dirty until it is read.

        Raises: UntrackedError, BadValueError, UnknownIdError, KindError (a nested space: ask its parent).
        """
        bitmap, lg2 = _bitmap_for(iova, size, page_size)
        pointer = ffi.from_buffer(BYTES, bitmap, True)
        status = lib.vio_dirty_read(self._engine, _id(ioasid), iova, size, lg2, clear, pointer)
        _check(status, ioasid, iova, size)
        return bytes(bitmap)

    def pass_dirty(self, ioasid: int, iova: int, size: int, to: int, start: int, *, clear: bool) -> None:
        """Make pages of another space dirty, from `start` on, as those of [iova, iova + size) are; `clear`: these no
        longer. Where there is no room for all, what was passed was passed.

        Raises: UntrackedError (either space), BadValueError, UnknownIdError, KindError, LimitError.
        """
        status = lib.vio_dirty_pass(
            self._engine, _id(ioasid), _address(iova, "iova"), _address(size, "size"), _id(to),
            _address(start, "start"), clear,
        )  # fmt: skip
        _check(status, ioasid, iova, size)

    def bind_table(
        self,
        ioasid: int,
        *,
        fmt: TableFormat | str,
        root: int,
        levels: int = 4,
        accessed: bool = False,
        dirty: bool = False,
    ) -> None:
        """Let a nested space be translated by the guest's table at GPA `root`; replaces a table bound before.

        Args:
            fmt: a TableFormat; or the name of a format, then of `levels` and without options but the two below.
            root: GPA of the root table, aligned as the format asks.
            accessed: set the accessed bit of entries used (AMD: DTE HA).
            dirty: set the dirty bit of leaves written through; needs `accessed` (AMD: DTE HD).

        Raises: BadValueError, UnknownIdError, KindError (host-managed space).
        """
        name, table = table_of(fmt, root, levels)
        table.flags |= (lib.VIO_TABLE_ACCESSED if accessed else 0) | (lib.VIO_TABLE_DIRTY if dirty else 0)
        _check(lib.vio_space_bind(self._engine, _id(ioasid), _format(name), table), ioasid)

    def unbind_table(self, ioasid: int) -> None:
        """Take a nested space's table away. Raises: UnknownIdError, KindError."""
        _check(lib.vio_space_unbind(self._engine, _id(ioasid)), ioasid)

    def bind_pasid_table(self, ioasid: int, *, fmt: PasidFormat, root: int, default_pasid: int | None = None) -> None:
        """Let requests to a nested space be translated by the table of their PASID, found in a PASID table at `root`.

        Replaces a table or PASID table bound before; unbind_table takes it away. What was found is used again until
        the space or the PASID is invalidated, or the parent changes. Attach the space as (rid, ANY_PASID) for all
        PASIDs of a device.

        Args:
            root: GPA of the root table or directory, aligned as the format asks.
            default_pasid: PASID of requests that carry none; None: they are answered by a BLOCKED fault.

        Raises: BadValueError, UnknownIdError, KindError (host-managed space).
        """
        _address(root, "root")
        try:
            table = ffi.new("vio_pasid_table *", {**fmt.fields(), "root": root, "default_pasid": _pasid(default_pasid)})
        except OverflowError as beyond:
            raise BadValueError(f"{fmt} has a number that no table has") from beyond
        number = lib.vio_pasid_format_find(fmt.name.encode())
        _check(lib.vio_pasid_bind(self._engine, _id(ioasid), number, table), ioasid)

    def invalidate(self, ioasid: int, iova: int = 0, size: int | None = None, *, pasid: int | None = None) -> None:
        """Forget what the IOTLB holds of [iova, iova + size) of one space, at least; size None: to the end.

        A size that reaches beyond 2^64 is cut there. Where a PASID table is bound: of one PASID, or of all; without
        iova and size, what the PASID table said is forgotten, too.

        Raises: UnknownIdError, BadValueError (size 0), KindError (a PASID, and no PASID table is bound).
        """
        first = _address(iova, "iova")
        last = LAST_ADDRESS if size is None else min(first + size - 1, LAST_ADDRESS)
        if last < first:
            raise BadValueError("an invalidation needs a size of one byte or more", ioasid=ioasid, iova=iova, size=size)
        if pasid is None:
            status = lib.vio_space_invalidate(self._engine, _id(ioasid), first, last)
        else:
            status = lib.vio_pasid_invalidate(self._engine, _id(ioasid), _pasid(pasid), first, last)
        _check(status, ioasid, iova, size)

    def invalidate_all(self) -> None:
        """Forget all that the IOTLB holds; the cost does not depend on how much that is."""
        lib.vio_invalidate_all(self._engine)

    def invalidate_device(self, rid: int) -> None:
        """Forget what the IOTLB holds of the spaces to which this RID's requests lead, with and without PASID.

        Entries are not kept by device: others attached to the same spaces lose them, too. Raises: BadValueError.
        """
        _check(lib.vio_invalidate_device(self._engine, _small(rid)))

    # Routes

    def attach(self, rid: int, pasid: int | None, ioasid: int, *, access: Access = RW, ats: bool = False) -> None:
        """Lead requests of (rid, pasid) to a space; `access` bounds what they may do (AMD: DTE IR, IW).

        ANY_PASID leads the requests with a PASID for which there is no route of its own; TRANSLATED those whose
        addresses are translated already, which is for the space to say whose `ats` answers they are. `ats`: translation
        requests are answered, too (AMD: DTE I). Replaces where they led before.

        Raises: UnknownIdError, BadValueError, LimitError (2^16 routes), KindError (`ats`, of a process's space).
        """
        rights = _small(access) | (lib.VIO_ATS if ats else 0)
        _check(lib.vio_route_attach(self._engine, _small(rid), _route_pasid(pasid), _id(ioasid), rights), ioasid)

    def set_windows(self, rid: int, windows: Sequence[tuple[int, int, int | None]]) -> None:
        """Addresses (first, last, space) that requests of a device without a PASID do not find translated where they
        are attached: they go as they are to that host-managed space underneath or, with None, nowhere (RESERVED_RANGE).

        They last until the device is attached anew. Raises: UnknownIdError, BadValueError, KindError, LimitError (32).
        """
        table = [(first, last, 0 if space is None else _id(space)) for first, last, space in windows]
        _check(lib.vio_route_windows(self._engine, _small(rid), ffi.new("vio_window[]", table), len(table)))

    def block(self, rid: int, pasid: int | None) -> None:
        """Answer requests of (rid, pasid) by a BLOCKED fault, until attach or detach. Raises: LimitError."""
        _check(lib.vio_route_block(self._engine, _small(rid), _route_pasid(pasid)))

    def detach(self, rid: int, pasid: int | None) -> None:
        """Forget where requests of (rid, pasid) go, or that they are blocked. Raises: UnknownIdError."""
        _check(lib.vio_route_detach(self._engine, _small(rid), _route_pasid(pasid)))

    # Counters

    @property
    def table_pages(self) -> int:
        """As in Counters, at once: for whoever makes changes, one at a time, and wants to know what each one took."""
        pages: int = lib.vio_table_pages(self._native or self._closed())
        return pages

    def counters(self) -> Counters:
        """Return the totals."""
        out = ffi.new("vio_counters *")
        lib.vio_engine_counters(self._engine, out)
        return Counters(*(getattr(out, name) for name in Counters.__slots__))

    def space_counters(self, ioasid: int) -> SpaceCounters:
        """Return what a space counted. Raises: UnknownIdError."""
        out = ffi.new("vio_space_counters *")
        _check(lib.vio_space_counters_get(self._engine, _id(ioasid), out), ioasid)
        return SpaceCounters(*(getattr(out, name) for name in SpaceCounters.__slots__))

    def route_counters(self, rid: int, pasid: int | None = None) -> RouteCounters:
        """Return what a route counted since it was first attached. Raises: UnknownIdError if it never was."""
        out = ffi.new("vio_route_counters *")
        _check(lib.vio_route_counters_get(self._engine, _small(rid), _route_pasid(pasid), out))
        return RouteCounters(*(getattr(out, name) for name in RouteCounters.__slots__))
