"""Memory, and what the host maps: REGISTER_MEMORY, UNREGISTER_MEMORY, MAP_DMA, UNMAP_DMA, dirty tracking."""

from __future__ import annotations

import errno
from functools import partial

from backend.core import FOREIGN, RW, Access

from . import rows_memory as cmd
from .checks import Checks, within_limits
from .command import Command
from .errors import IoasidError
from .formats import PAGE_SIZE
from .limits import MAX_DIRTY_PAGES, MAX_MAPPINGS, MAX_REGISTERED
from .mappings import Mapping
from .pinned_memory import Registered


class MemoryCommands(Checks):
    """Commands on memory and on what the host maps."""

    def register_memory(self, vaddr: int, size: int) -> None:
        """REGISTER_MEMORY: of the user's. It is counted once, however often it is mapped; from the first time on, what
        is not registered cannot be mapped."""
        command = cmd.REGISTER_MEMORY
        self._enter(command, vaddr=vaddr, size=size)
        command.check_range("vaddr", vaddr, size)
        other = self.pinned.overlapping(vaddr, size)
        if other is not None:
            raise command.refuse(
                errno.EEXIST,
                f"[{vaddr:#x}, {vaddr + size:#x}) overlaps the registered [{other.vaddr:#x}, {other.end:#x})",
            )
        if len(self.pinned) >= MAX_REGISTERED:
            raise command.refuse(errno.ENOSPC, f"{MAX_REGISTERED} ranges are registered: use fewer, larger ones")
        self._user_memory(command, vaddr, size, Access.READ)
        self._pin(command, size)
        self._take(command, self.share.mappings, "mappings")
        self.pinned.register(vaddr, size)

    def unregister_memory(self, vaddr: int, size: int) -> None:
        """UNREGISTER_MEMORY: of exactly what one REGISTER_MEMORY registered, once no mapping uses it."""
        command = cmd.UNREGISTER_MEMORY
        self._enter(command, vaddr=vaddr, size=size)
        command.check_range("vaddr", vaddr, size)
        registered = self.pinned.at(vaddr)
        if registered is None:
            raise command.refuse(errno.ENOENT, f"no registered range begins at {vaddr:#x}: name what was registered")
        if registered.size != size:
            raise command.refuse(
                errno.EINVAL,
                f"{size:#x} bytes at {vaddr:#x}, where {registered.size:#x} were registered: name them all",
            )
        if registered.users:
            raise command.refuse(errno.EBUSY, f"{registered.users} mappings use it: unmap them first")
        self.pinned.unregister(registered)
        self.share.mappings.give()

    def map_dma(self, ioasid: int, iova: int, vaddr: int, size: int, access: Access = RW) -> None:
        """MAP_DMA: [iova, iova + size) stands for the user's [vaddr, vaddr + size), or beneath a parent, for addresses
        of the parent's. Multiples of 4096."""
        command = cmd.MAP_DMA
        space = self._space(command, ioasid, ioasid=ioasid, iova=iova, vaddr=vaddr, size=size, access=access)
        command.check_range("iova", iova, size)
        command.check_range("vaddr", vaddr, size)
        if not access:
            raise command.refuse(errno.EINVAL, "access allows neither read nor write: leave the range unmapped instead")
        table, fmt = space.table, space.format
        if iova + size > 1 << table.width:
            raise command.refuse(
                errno.EINVAL,
                f"[{iova:#x}, {iova + size:#x}) is wider than the {table.width} bits of IOASID {ioasid}: see GET_INFO",
            )
        if (iova | vaddr | size) % fmt.granule:
            raise command.refuse(
                errno.EINVAL,
                f"iova {iova:#x}, vaddr {vaddr:#x} and size {size:#x} must be multiples of {fmt.granule}, the pages of "
                f"IOASID {ioasid}",
            )
        if access == Access.WRITE and not table.write_only:
            raise command.refuse(errno.EINVAL, f"{fmt.vendor} permits no writes without reads: ask for both")
        window = space.reserved(iova, size)
        if window is not None:
            raise command.refuse(
                errno.EADDRINUSE,
                f"[{iova:#x}, {iova + size:#x}) reaches into [{window.start:#x}, {window.end:#x}), which an attached "
                f"device reserves ({window.why}): leave that out",
            )
        other = space.mappings.overlapping(iova, size)
        if other is not None:
            raise command.refuse(
                errno.EEXIST,
                f"[{iova:#x}, {iova + size:#x}) overlaps the mapping [{other.iova:#x}, {other.end:#x}): unmap it first",
            )
        if len(space.mappings) >= MAX_MAPPINGS:
            raise command.refuse(errno.ENOSPC, f"IOASID {ioasid} has {MAX_MAPPINGS} mappings: use fewer, larger ones")
        where = self._user_memory(command, vaddr, size, access) if space.parent is None else vaddr
        pinned = self._pinned_for(command, vaddr, size) if space.parent is None else None
        mapping = Mapping(iova, size, vaddr, where, access, pinned is not None)
        self._take(command, self.share.mappings, "mappings")
        pages = self._core.table_pages
        try:
            with within_limits(command):
                table.map(mapping)
            self._pay(command, pages, partial(table.unmap, mapping))
        except BaseException:
            self.share.mappings.give()
            raise
        self._account(space, mapping, 1)

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
        pages = self._core.table_pages
        space.table.unmap(mapping)
        self.share.table_pages.give(pages - self._core.table_pages)
        self.share.mappings.give()
        self._account(space, mapping, -1)
        self.engine.forget_tlbs(space, iova, size)

    def set_dirty_tracking(self, ioasid: int, on: bool) -> None:
        """SET_DIRTY_TRACKING: `on` while it is on changes nothing; off forgets."""
        command = cmd.SET_DIRTY_TRACKING
        space = self._space(command, ioasid, ioasid=ioasid, on=on)
        pages, was = self._core.table_pages, space.table.tracked
        with within_limits(command):
            space.table.track(on)
        self._pay(command, pages, partial(space.table.track, was))

    def get_dirty_bitmap(
        self, ioasid: int, iova: int, size: int, page_size: int = PAGE_SIZE, clear: bool = True
    ) -> bytes:
        """GET_DIRTY_BITMAP: page i of the range in bit i % 8 of byte i // 8; a page of which anything was written."""
        command = cmd.GET_DIRTY_BITMAP
        space = self._space(command, ioasid, ioasid=ioasid, iova=iova, size=size, page_size=page_size, clear=clear)
        command.check_range("iova", iova, size)
        if page_size < PAGE_SIZE or page_size & (page_size - 1) or (iova | size) % page_size:
            raise command.refuse(
                errno.EINVAL, f"page_size {page_size:#x} must be a power of two from 4096 up that divides iova and size"
            )
        if size // page_size > MAX_DIRTY_PAGES:
            raise command.refuse(
                errno.ENOMEM, f"{size // page_size} pages in one answer: ask for {MAX_DIRTY_PAGES} at most"
            )
        if not space.table.tracked:
            raise command.refuse(errno.EINVAL, f"IOASID {ioasid} is not tracked: SET_DIRTY_TRACKING first")
        with within_limits(command):
            return space.table.read_dirty(iova, size, page_size, clear=clear)

    def _user_memory(self, command: Command, vaddr: int, size: int, access: Access) -> int:
        try:
            where = self.memory.hva(vaddr, size, access)
        except IoasidError as error:
            raise command.refuse(error.errno or 0, error.sentence) from error
        if self.guest and where & FOREIGN:
            raise command.refuse(errno.EPERM, f"vaddr {vaddr:#x} lies in a process of the host, where a guest has none")
        return where

    def _pin(self, command: Command, size: int) -> None:
        if not self.pinned.room(size):
            raise command.refuse(
                errno.ENOMEM,
                f"{size:#x} bytes beside {self.pinned.pinned:#x} are more than the {self.pinned.limit:#x} that may be "
                "pinned: unmap some first",
            )

    def _pinned_for(self, command: Command, vaddr: int, size: int) -> list[Registered] | None:
        """The registered memory that a mapping is to use; None: it is to be counted by itself."""
        if not self.pinned.exclusive:
            self._pin(command, size)
            return None
        found = self.pinned.covering(vaddr, size)
        if found is None:
            raise command.refuse(
                errno.EINVAL, f"[{vaddr:#x}, {vaddr + size:#x}) is not all registered: REGISTER_MEMORY it first"
            )
        return found
