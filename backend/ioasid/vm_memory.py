"""The VM's memory as it comes and goes, and the tables that follow it: what KVM's EPT is to the CPU."""

from __future__ import annotations

import errno
from collections.abc import Callable

from backend.core import Access

from .errors import IoasidError
from .formats import PAGE_SIZE
from .limits import MAX_MAPPINGS, USER_END
from .mappings import Mapping, Mappings
from .merged import NO_ROOM, HostTable


class VmMemorySource:
    """Where guest memory lies in this process, by GPA. Whoever knows the VM (backend.vm.memory) tells it; IOASIDs of
    kind `vm` are kept like it. One an engine."""

    def __init__(self, gone: Callable[[int, int], None] | None = None) -> None:
        """`gone` is told of each (GPA, size) that has left all tables."""
        self._gone = gone
        self.extents = Mappings()
        """iova: the GPA; where: the HVA."""
        self._tables: dict[HostTable, None] = {}

    def map(self, gpa: int, hva: int, size: int, access: Access) -> None:
        """Guest memory comes: [gpa, gpa + size) lies at hva. Bytes, whole pages.

        IoasidError, and nothing changed: EINVAL no whole pages, not below 2^64 and 2^47, or no access; EEXIST a part is
        there; ENOSPC too many, or a table has no room for it.
        """
        where = f"guest memory [{gpa:#x}, {gpa + size:#x}) at HVA {hva:#x}"
        if gpa < 0 or size <= 0 or (gpa | hva | size) % PAGE_SIZE or gpa + size > 1 << 64 or not access:
            raise IoasidError(errno.EINVAL, f"{where}: give whole pages below 2^64, and an access")
        if not 0 < hva <= USER_END - size:
            raise IoasidError(errno.EINVAL, f"{where}: no memory of this process lies there")
        other = self.extents.overlapping(gpa, size)
        if other is not None:
            raise IoasidError(errno.EEXIST, f"{where} overlaps [{other.iova:#x}, {other.end:#x}): unmap that first")
        if len(self.extents) >= MAX_MAPPINGS:
            raise IoasidError(errno.ENOSPC, f"{where} comes on top of {MAX_MAPPINGS} extents")
        extent = Mapping(gpa, size, gpa, hva, access)
        done: list[HostTable] = []
        try:
            for table in self._tables:
                self._put(table, extent)
                done.append(table)
        except NO_ROOM as error:
            for table in done:
                self._take(table, extent)
            raise IoasidError(errno.ENOSPC, f"{where}: there is no room left for tables") from error
        self.extents.add(extent)

    def unmap(self, gpa: int, size: int) -> None:
        """Guest memory goes: what one `map` brought. Nothing uses it once this returned. ENOENT: it is not there."""
        extent = self.extents.at(gpa)
        if extent is None or extent.size != size:
            raise IoasidError(errno.ENOENT, f"guest memory [{gpa:#x}, {gpa + size:#x}) is not what was mapped")
        for table in self._tables:
            self._take(table, extent)
        self.extents.remove(extent)
        if self._gone is not None:
            self._gone(gpa, size)

    # For IOASIDs of kind vm.

    def follow(self, table: HostTable) -> None:
        """Fill an empty table, and keep it like the memory; what lies beyond its width it cannot have. A CoreError:
        no room, and it does not follow."""
        self._tables[table] = None
        try:
            for extent in self.extents:
                self._put(table, extent)
        except BaseException:
            del self._tables[table]
            raise

    def leave(self, table: HostTable) -> None:
        """It does not follow any more."""
        del self._tables[table]

    def _part(self, table: HostTable, extent: Mapping) -> Mapping | None:
        """What a table can have of an extent."""
        size = min(extent.end, 1 << table.width) - extent.iova
        part = Mapping(extent.iova, size, extent.iova, extent.where, extent.access)
        return part if size > 0 and table.fits(part) else None

    def _put(self, table: HostTable, extent: Mapping) -> None:
        part = self._part(table, extent)
        if part is not None:  # what users nest beneath it must not keep the VM from its memory
            table.put(part, at_all_costs=True)

    def _take(self, table: HostTable, extent: Mapping) -> None:
        part = self._part(table, extent)
        if part is not None:
            table.take(part)
