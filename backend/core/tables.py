"""A guest's page table, built in plain memory as the guest's own driver would: entries hold GPAs."""

from __future__ import annotations

from typing import Any, TypedDict

from backend.core._native import ffi, lib
from backend.core.answers import RW, Access
from backend.core.errors import BadValueError
from backend.core.memory import PlainMemory
from backend.core.native import PAGE, address, bitmap_for, check, format_of, number

BYTES = ffi.typeof("char[]")


class Binding(TypedDict):
    """What `Core.bind_table` needs to know of a table."""

    fmt: str
    root: int
    levels: int
    accessed: bool
    dirty: bool


class TableBuilder:
    """An empty table in `memory`, and the calls that fill it.

    Args:
        fmt: name of a format, as in `Core.bind_table`.
        memory: where it lies; what it maps are addresses there, GPAs.
        levels: of the root.
        first, size: GPAs for its tables, whole 4 KiB pages; size None: to the end of memory. Nothing else may use them.
            A table that an unmap leaves empty stays where it is.
        accessed, dirty: let walks set accessed and dirty bits, where the format has a choice.

    Raises: UnknownIdError (format), BadValueError (levels, region), LimitError (no room for the root).
    """

    def __init__(
        self,
        fmt: str,
        memory: PlainMemory,
        *,
        levels: int = 4,
        first: int = 0,
        size: int | None = None,
        accessed: bool = False,
        dirty: bool = False,
    ) -> None:
        self.memory = memory
        """Kept, so that it lives as long as the builder."""
        size = len(memory) - first if size is None else size
        if not 0 <= first <= first + size <= len(memory):
            raise BadValueError(f"{size:#x} bytes from {first:#x} on do not lie in memory of {len(memory):#x} bytes")
        flags = (lib.VIO_TABLE_ACCESSED if accessed else 0) | (lib.VIO_TABLE_DIRTY if dirty else 0)
        asked = ffi.new("vio_table *", {"tree": {"levels": number(levels, 6, "levels")}, "flags": flags})
        out = ffi.new("vio_guest_table **")
        check(lib.vio_guest_table_create(format_of(fmt), asked, memory.pointer, first, size, out))
        self._native: Any = ffi.gc(out[0], lib.vio_guest_table_destroy)
        made = ffi.new("vio_table *")
        lib.vio_guest_table_get(self._native, made)
        self.root: int = made.tree.root
        """GPA of the root table."""
        self.binding: Binding = {
            "fmt": fmt,
            "root": self.root,
            "levels": levels,
            "accessed": accessed,
            "dirty": dirty,
        }
        """For `Core.bind_table(ioasid, **builder.binding)`."""

    def map(self, iova: int, gpa: int, size: int, access: Access = RW) -> None:
        """Map [iova, iova + size) to gpa, by the largest leaves that both alignments allow; all of it or nothing.

        Raises: BadValueError (whole pages in the table's reach; access), OverlapError, LimitError (room for tables).
        """
        numbers = address(iova, "iova"), address(gpa, "gpa"), address(size, "size")
        check(lib.vio_guest_table_map(self._live(), *numbers, access), None, iova, size)

    def unmap(self, iova: int, size: int) -> None:
        """Unmap [iova, iova + size), all of it mapped. Cores go on using what they cached until it is invalidated.

        Raises: BadValueError, NotMappedError, LimitError (room to split a larger leaf); nothing is unmapped then.
        """
        status = lib.vio_guest_table_unmap(self._live(), address(iova, "iova"), address(size, "size"))
        check(status, None, iova, size)

    def protect(self, iova: int, size: int, access: Access) -> None:
        """Let `access` be what [iova, iova + size), all of it mapped, permits; what is dirty stays so.

        Raises: BadValueError, NotMappedError, LimitError (room to split a larger leaf); nothing is changed then.
        """
        numbers = address(iova, "iova"), address(size, "size")
        check(lib.vio_guest_table_protect(self._live(), *numbers, access), None, iova, size)

    def read_dirty(self, iova: int, size: int, page_size: int = PAGE, *, clear: bool = True) -> bytes:
        """Return which pages of [iova, iova + size) lie in leaves whose dirty bit is set, a bit each, and clear it.

        Bits as in `Core.read_dirty`. A core that holds such a leaf in its IOTLB writes on without setting the bit again
        until that is invalidated. Clearing splits leaves that reach over the ends of the range.

        Raises: UntrackedError (walks do not set dirty bits in this table), BadValueError, LimitError (room to split).
        """
        bitmap, lg2 = bitmap_for(iova, size, page_size)
        pointer = ffi.from_buffer(BYTES, bitmap, True)
        check(lib.vio_guest_table_read_dirty(self._live(), iova, size, lg2, clear, pointer), None, iova, size)
        return bytes(bitmap)

    def _live(self) -> Any:
        self.memory.pointer  # noqa: B018  (raises once the memory is closed)
        return self._native
