"""Requests to the core: translation and DMA. Each is one call into C, made with the GIL released."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from backend.core._native import ffi, lib
from backend.core.answers import Access, AddressType, AtsReply, Fault, Translated, Translation, Translations
from backend.core.errors import BadValueError, ClosedError
from backend.core.native import LAST_ADDRESS, PAGE, beyond, check, fault_of, fault_record, pasid_of, path_of, small
from backend.core.path import Path

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

BYTES = ffi.typeof("char[]")
WIDE_ANSWERS = ("hva", "gpa", "size", "fault_gpa", "entry")
NARROW_ANSWERS = ("access", "reason", "stage", "level", "table")
"""Columns of translate_many in the order of vio_answers: of 64 and of 8 bits."""
TRANSLATED_LAYOUT = "=QQQI4x"
"""vio_translated."""
RIGHTS = tuple(Access(rights) for rights in range((Access.READ | Access.WRITE | Access.EXECUTE) + 1))
MAX_READ = 1 << 30
"""dma_read makes its buffer itself: no device moves more at once, so a larger length is a bug and not a need."""
MAX_TRANSLATIONS = 1 << 16
"""Leaves in one answer to a translation request: 256 MiB of 4 KiB pages, some 10 ms of work."""


class Requests:
    """What devices do, over the engine of a Core."""

    _native: Any = None

    @property
    def _engine(self) -> Any:
        return self._native or self._closed()

    def _closed(self) -> Any:
        raise ClosedError

    def translate(self, rid: int, iova: int, access: Access, *, pasid: int | None = None) -> Translation | Fault:
        """Translate one IOVA for an access, as a request would."""
        out = ffi.new("vio_translation *")
        try:
            status = lib.vio_translate(self._engine, rid, pasid_of(pasid), iova, small(access), out)
        except OverflowError:
            return beyond(rid, pasid, iova, access)
        if status:
            return fault_of(status)
        return Translation(out.hva, out.size, out.gpa, Access(out.access))

    def translate_many(
        self, rid: int, iovas: ReadableBuffer, access: Access, *, pasid: int | None = None
    ) -> Translations:
        """Translate many IOVAs in one call, each as a request of its own.

        Args:
            iovas: unsigned 64-bit numbers in a row: array("Q"), a numpy array of uint64, or their bytes.

        Raises: BadValueError (a buffer of something else, access).
        """
        with memoryview(iovas) as view:
            kind = (view.format.lstrip("@=<"), view.itemsize)
            if kind not in {("Q", 8), ("L", 8), ("B", 1)} or view.nbytes % 8 or not view.c_contiguous:
                raise BadValueError(f"IOVAs are unsigned 64-bit numbers in a row, not a buffer of {view.format!r}")
            count = view.nbytes // 8
            wide = [memoryview(bytearray(8 * count)).cast("Q") for _ in WIDE_ANSWERS]
            narrow = [memoryview(bytearray(count)) for _ in NARROW_ANSWERS]
            columns = [ffi.from_buffer("uint64_t[]", column, True) for column in wide]
            columns += [ffi.from_buffer("uint8_t[]", column, True) for column in narrow]
            status = lib.vio_translate_many(
                self._engine,
                small(rid),
                pasid_of(pasid),
                ffi.from_buffer("uint64_t[]", view),
                count,
                small(access),
                ffi.new("vio_answers *", columns),
            )
        check(min(status, 0))
        return Translations(**dict(zip(WIDE_ANSWERS + NARROW_ANSWERS, wide + narrow, strict=True)))

    def prefetch(self, rid: int, iova: int, *, pasid: int | None = None) -> None:
        """Have the IOTLB know the page of an address before a request needs it, if it can be read.

        Accessed bits are set as a read would; else nobody learns of it: it is not counted, and no fault.
        """
        check(lib.vio_prefetch(self._engine, small(rid), pasid_of(pasid), iova))

    def ats(self, rid: int, iova: int, length: int, access: Access, *, pasid: int | None = None) -> AtsReply:
        """Answer a translation request (ATS) for the pages of [iova, iova + length).

        A page counts if it permits anything of `access`; accessed and dirty bits are set as a read or a write would.
        A fault for which nothing but the access or the page is to blame is left in no ring, and not counted.

        Returns: as many as 65,536 pages or larger leaves; who wants more asks again from there on.

        Raises: BadValueError (access, or a length of 0).
        """
        room = min((length + 2 * PAGE - 2) // PAGE, MAX_TRANSLATIONS)
        out, count = ffi.new("vio_translated[]", max(room, 1)), ffi.new("uint64_t *")
        try:
            status = lib.vio_ats(self._engine, rid, pasid_of(pasid), iova, length, small(access), out, room, count)
        except OverflowError:
            return AtsReply((), replace(beyond(rid, pasid, iova, access), type=AddressType.TRANSLATION_REQUEST))
        fault = fault_of(status) if status else None
        found = struct.iter_unpack(TRANSLATED_LAYOUT, ffi.buffer(out, count[0] * ffi.sizeof(out[0])))
        return AtsReply(
            tuple(Translated(first, size or 1 << 64, to, RIGHTS[rights]) for first, size, to, rights in found), fault
        )

    def ats_missing(
        self, rid: int, iova: int, length: int, access: Access, most: int, *, pasid: int | None = None
    ) -> list[int] | Fault:
        """Tell which pages of [iova, iova + length) translation requests (`ats`) do not give all of `access`, in order.

        Args:
            most: how many are of interest.

        A Fault: not the pages, but where the requests are led is to blame.

        Raises: BadValueError (access, or a range that is empty or ends beyond 2^64).
        """
        out = ffi.new("uint64_t[]", max(0, min(most, -(-length // PAGE) + 1)))
        count = ffi.new("uint64_t *")
        try:
            status = lib.vio_ats_missing(
                self._engine, rid, pasid_of(pasid), iova, length, small(access), out, len(out), count
            )
        except OverflowError:
            return replace(beyond(rid, pasid, iova, access), type=AddressType.TRANSLATION_REQUEST)
        return fault_of(status) if status else ffi.unpack(out, count[0])

    def lookup(self, rid: int, iova: int, *, pasid: int | None = None, access: Access = Access.READ) -> Path:
        """Tell the whole path of a translation without being a request.

        Every entry is read as a request would read it now, past the IOTLB; no accessed or dirty bit is set, nothing is
        filled, nothing is counted, and a fault at its end is in `Path.result` alone.

        Raises: BadValueError (access, pasid).
        """
        out = ffi.new("vio_path *")
        try:
            check(lib.vio_lookup(self._engine, rid, pasid_of(pasid), iova, small(access), out))
        except OverflowError:
            return Path(rid, pasid, iova, access, None, None, None, None, (), beyond(rid, pasid, iova, access))
        return path_of(out, rid, pasid, iova, access)

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
            status = lib.vio_dma(self._native or self._closed(), rid, pasid_of(pasid), iova, target, len(target), 0)
        except OverflowError:
            return beyond(rid, pasid, iova, Access.READ)
        return fault_of(status) if status else None

    def dma_write(self, rid: int, iova: int, data: ReadableBuffer, *, pasid: int | None = None) -> Fault | None:
        """Write all of `data` to memory at iova. Raises: BufferGoneError."""
        source = ffi.from_buffer(data)
        try:
            status = lib.vio_dma(self._native or self._closed(), rid, pasid_of(pasid), iova, source, len(source), 1)
        except OverflowError:
            return beyond(rid, pasid, iova, Access.WRITE)
        return fault_of(status) if status else None

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
            return beyond(rid, pasid, far, Access.WRITE if write else Access.READ)
        pointer = ffi.cast("vio_segment *", ffi.from_buffer(segments))
        status = lib.vio_dma_scatter(self._engine, rid, pasid_of(pasid), pointer, len(sg), view, write)
        return fault_of(status) if status else None

    def dma_fill(
        self, rid: int, iova: int, length: int, pattern: int = 0, width: int = 1, *, pasid: int | None = None
    ) -> Fault | None:
        """Write `pattern`, `width` (1, 2, 4, 8) bytes of it, little-endian, over and over from iova on.

        Neither iova nor length need be multiples of the width: the last one is cut.

        Raises: BadValueError (width, or a pattern that does not fit it).
        """
        try:
            status = lib.vio_dma_fill(self._engine, rid, pasid_of(pasid), iova, length, pattern, width)
        except OverflowError:
            return beyond(rid, pasid, iova, Access.WRITE)
        return fault_of(status) if status else None

    def dma_copy(
        self,
        rid: int,
        source: int,
        target: int,
        length: int,
        *,
        pasid: int | None = None,
        writer: tuple[int, int | None] | None = None,
    ) -> Fault | None:
        """Copy within guest memory, without a buffer in between: a read by (rid, pasid) and a write by `writer`.

        Where the target's addresses begin within the source's it goes from the end down, so that ranges which overlap
        under one translation end as memmove would have them; a fault's `done` then counts bytes from the end. Other
        addresses that lead to the same memory are not looked for.

        Args:
            source: IOVA to read at.
            target: IOVA to write at.
            writer: (RID, PASID) that writes; None: the one that reads.

        A Fault is that of the read or of the write, as its `access` says.
        """
        to_rid, to_pasid = (rid, pasid) if writer is None else writer
        try:
            status = lib.vio_dma_copy(
                self._engine, rid, pasid_of(pasid), source, to_rid, pasid_of(to_pasid), target, length
            )
        except OverflowError:
            if target > LAST_ADDRESS >= source:
                return beyond(to_rid, to_pasid, target, Access.WRITE)
            return beyond(rid, pasid, source, Access.READ)
        return fault_of(status) if status else None

    def store(self, rid: int, iova: int, value: int, width: int, *, pasid: int | None = None) -> Fault | None:
        """Store `value` as `width` (1, 2, 4, 8) bytes, little-endian, by one release store; iova aligned to the width.

        Raises: BadValueError (width, or a value that does not fit it).
        """
        try:
            status = lib.vio_store(self._engine, rid, pasid_of(pasid), iova, value, width)
        except OverflowError:
            return beyond(rid, pasid, iova, Access.WRITE)
        return fault_of(status) if status else None

    def load(self, rid: int, iova: int, width: int, *, pasid: int | None = None) -> int | Fault:
        """Load `width` (1, 2, 4, 8) bytes, little-endian, by one acquire load; iova aligned to the width.

        Raises: BadValueError (width).
        """
        out = ffi.new("uint64_t *")
        try:
            status = lib.vio_load(self._engine, rid, pasid_of(pasid), iova, width, out)
        except OverflowError:
            return beyond(rid, pasid, iova, Access.READ)
        return fault_of(status) if status else int(out[0])

    # AtomicOps (PCI Express Base Specification 5.0, 6.15): little-endian, iova aligned to the width, and the answer is
    # the value before. The memory must be readable and writable, whatever they find there.

    def fetch_add(self, rid: int, iova: int, value: int, width: int, *, pasid: int | None = None) -> int | Fault:
        """FetchAdd: add `value` to `width` (4, 8) bytes, the carry lost. Raises: BadValueError (width, value)."""
        return self._atomic(lib.VIO_ATOMIC_ADD, rid, iova, width, value=value, compare=0, pasid=pasid)

    def swap(self, rid: int, iova: int, value: int, width: int, *, pasid: int | None = None) -> int | Fault:
        """Swap: put `value` in place of `width` (4, 8) bytes. Raises: BadValueError (width, value)."""
        return self._atomic(lib.VIO_ATOMIC_SWAP, rid, iova, width, value=value, compare=0, pasid=pasid)

    def compare_exchange(
        self, rid: int, iova: int, compare: int, value: int, width: int, *, pasid: int | None = None
    ) -> int | Fault:
        """CAS: put `value` in place of `width` (4, 8, 16) bytes if they are `compare`: if that is what it answers.

        Raises: BadValueError (width, or values that do not fit it).
        """
        return self._atomic(lib.VIO_ATOMIC_CAS, rid, iova, width, value=value, compare=compare, pasid=pasid)

    def _atomic(
        self, operation: int, rid: int, iova: int, width: int, *, value: int, compare: int, pasid: int | None
    ) -> int | Fault:
        operands, before = ffi.new("uint64_t[4]"), ffi.new("uint64_t[2]")
        try:
            operands[0], operands[1] = value & LAST_ADDRESS, value >> 64
            operands[2], operands[3] = compare & LAST_ADDRESS, compare >> 64
            status = lib.vio_atomic(
                self._engine, rid, pasid_of(pasid), iova, operation, width, operands, operands + 2, before
            )
        except OverflowError:
            return beyond(rid, pasid, iova, Access.READ | Access.WRITE)
        return fault_of(status) if status else int(before[0]) | int(before[1]) << 64

    # Faults

    def faults(self) -> list[Fault]:
        """Take the faults out of the ring, oldest first: those of all requests since the last call.

        The ring holds 1024 and drops what comes later; `Counters.faults_dropped` counts that. A request that the
        layers above try again after a NO_ROUTE answer stands here with that answer.
        """
        room = ffi.new("vio_fault[]", lib.VIO_FAULT_RING)
        return [fault_record(room[i]) for i in range(lib.vio_faults(self._engine, room, lib.VIO_FAULT_RING))]
