"""The Python face of the C core: spaces, routes, translation and DMA. No policy, and no rule of the uAPI.

Each method is one call into C, made with the GIL released; any number of threads may call. A request waits for changes
(map, unmap, bind, attach ...) under way and changes wait for requests, so once a change has returned, nothing that it
ended is still in use.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backend.core._native import ffi, lib
from backend.core.answers import RW, Access, Counters, Fault, Reason, RouteCounters, SpaceCounters, Translation
from backend.core.errors import ERRORS, BadValueError, ClosedError, CoreError, UnknownIdError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

BYTES = ffi.typeof("char[]")
NO_PASID: int = lib.VIO_NO_PASID
LAST_ADDRESS = (1 << 64) - 1
MAX_IOASID = (1 << 32) - 1
PAGE = 4096
MAX_DIRTY_BITS = 1 << 30
"""read_dirty makes its bitmap itself: 128 MiB stand for 4 TiB of pages, and a caller may ask again."""
MAX_READ = 1 << 30
"""dma_read makes its buffer itself: no device moves more at once, so a larger length is a bug and not a need."""


class Core:
    """One engine: its spaces, routes and IOTLB. One a VM.

    Args:
        iotlb_entries: translations the IOTLB can hold, rounded up to a power of two; 0 switches it off.

    Raises:
        LimitError: more than 2^20 entries.
        NoMemoryError: no memory for them.
    """

    def __init__(self, *, iotlb_entries: int = 4096) -> None:
        self._native: Any = None
        out = ffi.new("vio_engine **")
        _check(lib.vio_engine_create(_number(iotlb_entries, MAX_IOASID, "iotlb_entries"), out))
        # Freed with the last reference: a call that another thread still has under way holds one.
        self._native = ffi.gc(out[0], lib.vio_engine_destroy)

    def close(self) -> None:
        """Give everything up. Calls under way end first; later ones raise ClosedError."""
        self._native = None

    @property
    def _engine(self) -> Any:
        return self._native or self._closed()

    def _closed(self) -> Any:
        raise ClosedError

    # Spaces

    def create_host_space(self, ioasid: int, *, fmt: str = "amd-v1", levels: int = 4) -> None:
        """Create a host-managed space: a page table of format `fmt` in this process, empty.

        Raises: ExistsError, BadValueError (levels), UnknownIdError (format), LimitError.
        """
        table = ffi.new("vio_table *", {"tree": {"levels": _small(levels)}})
        _check(lib.vio_space_create_host(self._engine, _id(ioasid), _format(fmt), table), ioasid)

    def create_nested_space(self, ioasid: int, parent: int) -> None:
        """Create a guest-managed space over the host-managed space `parent`; its requests fault until bind_table.

        Raises: ExistsError, UnknownIdError (parent), KindError (parent is nested itself), LimitError.
        """
        _check(lib.vio_space_create_nested(self._engine, _id(ioasid), _id(parent)), ioasid)

    def destroy_space(self, ioasid: int) -> None:
        """Destroy a space without children and routes. Raises: UnknownIdError, BusyError."""
        _check(lib.vio_space_destroy(self._engine, _id(ioasid)), ioasid)

    def map(self, ioasid: int, iova: int, hva: int, size: int, access: Access) -> None:
        """Map [iova, iova + size) of a host-managed space to this process's memory at hva; whole 4 KiB pages.

        Large leaves are used where iova and hva are aligned alike. Nothing is mapped unless all of it is.

        Raises: OverlapError, BadValueError, UnknownIdError, KindError, LimitError (pages for tables).
        """
        status = lib.vio_space_map(
            self._engine,
            _id(ioasid),
            _address(iova, "iova"),
            _address(hva, "hva"),
            _address(size, "size"),
            _small(access),
        )
        _check(status, ioasid, iova, size)

    def unmap(self, ioasid: int, iova: int, size: int) -> None:
        """Unmap [iova, iova + size), all of it mapped; larger leaves at its ends are split.

        Once it returned, nothing uses the range: no request, no IOTLB entry of this space or of its children.

        Raises: NotMappedError, BadValueError, UnknownIdError, KindError, LimitError (pages to split a leaf); nothing
        is unmapped then.
        """
        status = lib.vio_space_unmap(self._engine, _id(ioasid), _address(iova, "iova"), _address(size, "size"))
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
        if page_size < PAGE or page_size & (page_size - 1) or size <= 0 or (iova | size) & (page_size - 1):
            raise BadValueError(
                f"a page size of {page_size:#x} must be a power of two, 4 KiB or more, that divides IOVA and size",
                ioasid=ioasid,
                iova=iova,
                size=size,
            )
        bits = size // page_size
        if bits > MAX_DIRTY_BITS:
            raise BadValueError(f"{bits} pages at once: {MAX_DIRTY_BITS} at most", ioasid=ioasid, iova=iova, size=size)
        bitmap = bytearray((bits + 7) // 8)
        lg2 = page_size.bit_length() - 1
        status = lib.vio_dirty_read(
            self._engine,
            _id(ioasid),
            _address(iova, "iova"),
            _address(size, "size"),
            lg2,
            clear,
            ffi.from_buffer(BYTES, bitmap, True),
        )
        _check(status, ioasid, iova, size)
        return bytes(bitmap)

    def bind_table(
        self, ioasid: int, *, fmt: str, root: int, levels: int, accessed: bool = False, dirty: bool = False
    ) -> None:
        """Let a nested space be translated by the guest's table at GPA `root`; replaces a table bound before.

        Args:
            fmt: "amd-v1".
            root: GPA of the root table, aligned to 4 KiB.
            levels: level of the root table, 1 to 6 for amd-v1.
            accessed: set the accessed bit of entries used (AMD: DTE HA).
            dirty: set the dirty bit of leaves written through; needs `accessed` (AMD: DTE HD).

        Raises: BadValueError, UnknownIdError, KindError (host-managed space, or no such format over the parent's).
        """
        flags = (lib.VIO_TABLE_ACCESSED if accessed else 0) | (lib.VIO_TABLE_DIRTY if dirty else 0)
        tree = {"root": _address(root, "root"), "levels": _small(levels)}
        table = ffi.new("vio_table *", {"tree": tree, "flags": flags})
        _check(lib.vio_space_bind(self._engine, _id(ioasid), _format(fmt), table), ioasid)

    def unbind_table(self, ioasid: int) -> None:
        """Take a nested space's table away. Raises: UnknownIdError, KindError."""
        _check(lib.vio_space_unbind(self._engine, _id(ioasid)), ioasid)

    def invalidate(self, ioasid: int, iova: int = 0, size: int | None = None) -> None:
        """Forget what the IOTLB holds of [iova, iova + size) of one space, at least; size None: to the end.

        A size that reaches beyond 2^64 is cut there. Raises: UnknownIdError, BadValueError (size 0).
        """
        first = _address(iova, "iova")
        last = LAST_ADDRESS if size is None else min(first + size - 1, LAST_ADDRESS)
        if last < first:
            raise BadValueError("an invalidation needs a size of one byte or more", ioasid=ioasid, iova=iova, size=size)
        _check(lib.vio_space_invalidate(self._engine, _id(ioasid), first, last), ioasid, iova, size)

    def invalidate_all(self) -> None:
        """Forget all that the IOTLB holds; the cost does not depend on how much that is."""
        lib.vio_invalidate_all(self._engine)

    def invalidate_device(self, rid: int) -> None:
        """Forget what the IOTLB holds of the spaces to which this RID's requests lead, with and without PASID.

        Entries are not kept by device: others attached to the same spaces lose them, too. Raises: BadValueError.
        """
        _check(lib.vio_invalidate_device(self._engine, _small(rid)))

    # Routes

    def attach(self, rid: int, pasid: int | None, ioasid: int, *, access: Access = RW) -> None:
        """Lead requests of (rid, pasid) to a space; `access` bounds what they may do (AMD: DTE IR, IW).

        Replaces where they led before. Raises: UnknownIdError, BadValueError, LimitError (2^16 routes).
        """
        _check(lib.vio_route_attach(self._engine, _small(rid), _pasid(pasid), _id(ioasid), _small(access)), ioasid)

    def block(self, rid: int, pasid: int | None) -> None:
        """Answer requests of (rid, pasid) by a BLOCKED fault, until attach or detach. Raises: LimitError."""
        _check(lib.vio_route_block(self._engine, _small(rid), _pasid(pasid)))

    def detach(self, rid: int, pasid: int | None) -> None:
        """Forget where requests of (rid, pasid) go, or that they are blocked. Raises: UnknownIdError."""
        _check(lib.vio_route_detach(self._engine, _small(rid), _pasid(pasid)))

    # Requests

    def translate(self, rid: int, iova: int, access: Access, *, pasid: int | None = None) -> Translation | Fault:
        """Translate one IOVA for an access, as a request would."""
        out = ffi.new("vio_translation *")
        try:
            status = lib.vio_translate(self._engine, rid, _pasid(pasid), iova, _small(access), out)
        except OverflowError:
            return _beyond(rid, pasid, iova, access)
        if status:
            return _fault(status)
        return Translation(out.hva, out.size, out.gpa, Access(out.access))

    def dma_read(self, rid: int, iova: int, length: int, *, pasid: int | None = None) -> bytes | Fault:
        """Read `length` bytes (0 to 2^30) at iova. Raises: BadValueError (length)."""
        if not 0 <= length <= MAX_READ:
            raise BadValueError(f"a read of {length} bytes: it must be of 0 to {MAX_READ}")
        buffer = bytearray(length)
        return self.dma_read_into(rid, iova, buffer, pasid=pasid) or bytes(buffer)

    def dma_read_into(self, rid: int, iova: int, buffer: WriteableBuffer, *, pasid: int | None = None) -> Fault | None:
        """Fill `buffer` (bytearray, memoryview, mmap ...) from memory at iova.

        Raises: BufferGoneError if the buffer is a mapped file that was truncated.
        """
        target = ffi.from_buffer(BYTES, buffer, True)  # positional: by keyword it takes thrice the time
        try:
            status = lib.vio_dma(self._native or self._closed(), rid, _pasid(pasid), iova, target, len(target), 0)
        except OverflowError:
            return _beyond(rid, pasid, iova, Access.READ)
        return _fault(status) if status else None

    def dma_write(self, rid: int, iova: int, data: ReadableBuffer, *, pasid: int | None = None) -> Fault | None:
        """Write all of `data` to memory at iova. Raises: BufferGoneError."""
        source = ffi.from_buffer(data)
        try:
            status = lib.vio_dma(self._native or self._closed(), rid, _pasid(pasid), iova, source, len(source), 1)
        except OverflowError:
            return _beyond(rid, pasid, iova, Access.WRITE)
        return _fault(status) if status else None

    def dma_scatter(
        self,
        rid: int,
        sg: Sequence[tuple[int, int]],
        buffer: ReadableBuffer | WriteableBuffer,
        *,
        write: bool,
        pasid: int | None = None,
    ) -> Fault | None:
        """Move between one buffer and a list of (iova, length), in order; `write`: from the buffer to memory.

        The lengths add up to the buffer's. A fault tells the bytes moved before it, in all.

        Raises: BadValueError (lengths), BufferGoneError.
        """
        view = ffi.from_buffer(BYTES, buffer, not write)
        if sum(length for _, length in sg) != len(view):
            raise BadValueError(f"the scatter list and its buffer of {len(view)} bytes differ in length")
        try:
            segments = struct.pack(f"={2 * len(sg)}Q", *(number for segment in sg for number in segment))
        except struct.error:
            far = next((iova for iova, _ in sg if iova > LAST_ADDRESS), -1)
            return _beyond(rid, pasid, far, Access.WRITE if write else Access.READ)
        pointer = ffi.cast("vio_segment *", ffi.from_buffer(segments))
        status = lib.vio_dma_scatter(self._engine, rid, _pasid(pasid), pointer, len(sg), view, write)
        return _fault(status) if status else None

    def store(self, rid: int, iova: int, value: int, width: int, *, pasid: int | None = None) -> Fault | None:
        """Store `value` as `width` (1, 2, 4, 8) bytes, little-endian, by one release store; iova aligned to the width.

        Raises: BadValueError (width, or a value that does not fit it).
        """
        try:
            status = lib.vio_store(self._engine, rid, _pasid(pasid), iova, value, width)
        except OverflowError:
            return _beyond(rid, pasid, iova, Access.WRITE)
        return _fault(status) if status else None

    def load(self, rid: int, iova: int, width: int, *, pasid: int | None = None) -> int | Fault:
        """Load `width` (1, 2, 4, 8) bytes, little-endian, by one acquire load; iova aligned to the width.

        Raises: BadValueError (width).
        """
        out = ffi.new("uint64_t *")
        try:
            status = lib.vio_load(self._engine, rid, _pasid(pasid), iova, width, out)
        except OverflowError:
            return _beyond(rid, pasid, iova, Access.READ)
        return _fault(status) if status else int(out[0])

    # Counters

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
        _check(lib.vio_route_counters_get(self._engine, _small(rid), _pasid(pasid), out))
        return RouteCounters(*(getattr(out, name) for name in RouteCounters.__slots__))


def _check(status: int, ioasid: int | None = None, iova: int | None = None, size: int | None = None) -> None:
    if status:
        raise ERRORS.get(status, CoreError)(ioasid=ioasid, iova=iova, size=size)


def _fault(status: int) -> Fault:
    """Return this thread's last fault, or raise what the negative status stands for."""
    if status < 0:
        _check(status)
    fault = lib.vio_last_fault()
    return Fault(
        rid=fault.rid,
        pasid=None if fault.pasid == NO_PASID else fault.pasid,
        ioasid=fault.ioasid,
        iova=fault.iova,
        access=Access(fault.access),
        stage=fault.stage,
        level=fault.level,
        gpa=fault.gpa if fault.has_gpa else None,
        entry=fault.entry,
        reason=Reason(fault.reason),
        done=fault.done,
        table=bool(fault.table),
    )


def _beyond(rid: int, pasid: int | None, iova: int, access: Access) -> Fault:
    """Answer a request whose numbers are not of 64 bits: a device added to an address until it left the space."""
    if iova <= LAST_ADDRESS:
        raise BadValueError("a request's numbers must fit their fields: RID 16 bits, addresses, sizes and values 64")
    return Fault(
        rid=rid,
        pasid=pasid,
        ioasid=0,
        iova=iova,
        access=access,
        stage=0,
        level=0,
        gpa=None,
        entry=0,
        reason=Reason.ADDRESS_WIDTH,
        done=0,
    )


def _number(value: int, limit: int, name: str) -> int:
    if not 0 <= value <= limit:
        raise BadValueError(f"{name} is {value}: it must be within 0 and {limit:#x}")
    return value


def _address(value: int, name: str) -> int:
    return _number(value, LAST_ADDRESS, name)


def _id(ioasid: int) -> int:
    return _number(ioasid, MAX_IOASID, "ioasid")


def _small(value: int) -> int:
    """Return a number that C takes as 32 bits and judges itself."""
    return _number(value, MAX_IOASID, "argument")


def _pasid(pasid: int | None) -> int:
    return NO_PASID if pasid is None else _number(pasid, (1 << 20) - 1, "pasid")


def _format(name: str) -> int:
    number: int = lib.vio_format_find(name.encode())
    if number < 0:
        raise UnknownIdError(f"no page-table format is named {name!r}")
    return number
