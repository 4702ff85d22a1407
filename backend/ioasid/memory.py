"""Host-managed tables: MAP_DMA and UNMAP_DMA."""

from __future__ import annotations

import errno

from backend.core import RW, Access

from . import commands as cmd
from .checks import Checks, within_limits
from .errors import IoasidError
from .formats import FORMATS
from .limits import MAX_MAPPINGS
from .mappings import Mapping


class MemoryCommands(Checks):
    """Commands on memory and on what the host maps."""

    def map_dma(self, ioasid: int, iova: int, vaddr: int, size: int, access: Access = RW) -> None:
        """MAP_DMA: [iova, iova + size) stands for the user's [vaddr, vaddr + size), or beneath a parent, for addresses
        of the parent's. Multiples of 4096."""
        command = cmd.MAP_DMA
        space = self._space(command, ioasid, ioasid=ioasid, iova=iova, vaddr=vaddr, size=size, access=access)
        command.check_range("iova", iova, size)
        command.check_range("vaddr", vaddr, size)
        if not access:
            raise command.refuse(errno.EINVAL, "access allows neither read nor write: leave the range unmapped instead")
        width = FORMATS[space.format.vendor].address_width(space.format.levels)
        if iova + size > 1 << width:
            raise command.refuse(
                errno.EINVAL,
                f"[{iova:#x}, {iova + size:#x}) is wider than the {width} bits of IOASID {ioasid}: see GET_INFO",
            )
        other = space.mappings.overlapping(iova, size)
        if other is not None:
            raise command.refuse(
                errno.EEXIST,
                f"[{iova:#x}, {iova + size:#x}) overlaps the mapping [{other.iova:#x}, {other.end:#x}): unmap it first",
            )
        if len(space.mappings) >= MAX_MAPPINGS:
            raise command.refuse(errno.ENOSPC, f"IOASID {ioasid} has {MAX_MAPPINGS} mappings: use fewer, larger ones")
        try:
            where = self.memory.hva(vaddr, size, access) if space.parent is None else vaddr
        except IoasidError as error:
            raise command.refuse(error.errno or 0, error.sentence) from error
        with within_limits(command):
            space.table.map(iova, where, size, access)
        space.mappings.add(Mapping(iova, size, vaddr, where, access))

    def unmap_dma(self, ioasid: int, iova: int, size: int) -> None:
        """UNMAP_DMA: of exactly what one MAP_DMA mapped."""
        command = cmd.UNMAP_DMA
        space = self._space(command, ioasid, ioasid=ioasid, iova=iova, size=size)
        command.check_range("iova", iova, size)
        mapping = space.mappings.at(iova)
        if mapping is None:
            raise command.refuse(
                errno.ENOENT, f"no mapping of IOASID {ioasid} begins at {iova:#x}: unmap what was mapped"
            )
        if mapping.size != size:
            raise command.refuse(
                errno.EINVAL,
                f"{size:#x} bytes at {iova:#x}, where {mapping.size:#x} were mapped: unmap them all at once",
            )
        space.table.unmap(iova, size)
        space.mappings.remove(mapping)
