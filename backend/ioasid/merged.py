"""Host-managed tables, and software nesting: a child's mappings and its parent's, merged into one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backend.core import FOREIGN, Access, Core, LimitError, NoMemoryError

from .intervals import Intervals
from .limits import MAX_MAPPINGS, MAX_MERGED
from .mappings import Mapping, Mappings
from .share import UNBOUNDED, Allowance
from .user_memory import UserMemory

NO_ROOM = (LimitError, NoMemoryError, MemoryError)


class Room:
    """How many pieces of merged tables a context may have yet; each is one of its mappings beside other contexts'."""

    def __init__(self, mappings: Allowance = UNBOUNDED) -> None:
        self.left = MAX_MERGED
        self._mappings = mappings

    def take(self) -> None:
        """LimitError: all are in use."""
        if not self.left or not self._mappings.take():
            raise LimitError(f"a context's merged tables have {MAX_MERGED} pieces at most, or the clients no room")
        self.left -= 1

    def give(self) -> None:
        self.left += 1
        self._mappings.give()


@dataclass(slots=True, eq=False)
class Link:
    """[iova, iova + size) of a child stands for [start, start + size) of its parent: what one MAP_DMA said."""

    child: HostTable
    iova: int
    start: int
    size: int
    access: Access

    def cut(self, piece: Mapping) -> Mapping | None:
        """What a piece of the parent's comes to in the child; None: nothing that the child's table could permit."""
        low, high = max(self.start, piece.iova), min(self.start + self.size, piece.end)
        where = piece.where + low - piece.iova
        part = Mapping(self.iova + low - self.start, high - low, where, where, self.access & piece.access)
        return part if self.child.fits(part) else None


class HostTable:
    """A table that the core builds, made up of pieces: each is a range of host memory in one piece.

    On a root a piece is a mapping. A child's mappings name addresses of its parent's; its pieces are what they share
    with the parent's pieces, so its table leads straight to host memory. A piece that comes or goes does so in all
    tables beneath before the change returns, and nothing is looked at but the mappings that lead to it.
    """

    def __init__(
        self,
        core: Core,
        core_id: int,
        room: Room,
        above: HostTable | None = None,
        *,
        leave: Callable[[HostTable], None] | None = None,
        memory: UserMemory | None = None,
        width: int = 64,
        write_only: bool = True,
    ) -> None:
        """Of an empty space of the core. Raises a CoreError if there is no room to track what its parent tracks."""
        self.core = core
        self.core_id = core_id
        self.width = width
        """Bits of an IOVA that it maps."""
        self.write_only = write_only
        """Whether its format can permit writes without reads."""
        self.foreign = False
        """Whether it has ever led to memory of another process."""
        self.tracked = False
        """Whether its user wants to know of dirty pages."""
        self.pieces = Mappings()
        self.mappings = self.pieces if above is None and leave is None else Mappings()
        """What `map` mapped: on a root of a user's, the pieces themselves."""
        self._room = room
        self._above = above
        self._leave = leave
        self._memory = memory
        self._links: dict[int, Link] = {}
        self._below: Intervals[Link] = Intervals()
        self._children: set[HostTable] = set()
        self._trackers: int = above._trackers if above is not None else 0
        if self._trackers:
            core.set_dirty_tracking(core_id, True)
        if above is not None:
            above._children.add(self)

    # Body

    def map(self, mapping: Mapping) -> None:
        """Let a range stand for host memory, or for addresses of the parent's."""
        if self._above is None:
            self.put(mapping)
            return
        iova, size, where = mapping.iova, mapping.size, mapping.where
        link = Link(self, iova, where, size, mapping.access)
        self._links[iova] = link
        self._above._below.add(link)
        self.mappings.add(mapping)
        try:
            for piece in self._above.pieces.within(where, size):
                self._put_beneath(link, piece)
        except BaseException:
            self.unmap(mapping)
            raise

    def unmap(self, mapping: Mapping) -> None:
        """Take away what one `map` mapped; nothing uses it, here or beneath, once this returned."""
        if self._above is None:
            self.take(mapping)
            return
        iova, size = mapping.iova, mapping.size
        self.mappings.remove(mapping)
        link = self._links.pop(iova)
        self._above._below.remove(link)
        for piece in list(self.pieces.within(iova, size)):
            self.take(piece)
        self._gather(iova, size)
        self._pass_up(link, iova, size, clear=not self.tracked)

    def close(self) -> None:
        """Give the table up. Nothing is beneath it any more."""
        if self._leave is not None:
            self._leave(self)
        if self._above is not None:
            for link in self._links.values():
                self._above._below.remove(link)
                self._pass_up(link, link.iova, link.size, clear=False)
            self._above._children.discard(self)
            for _ in self.pieces:
                self._room.give()
        self.core.destroy_space(self.core_id)

    # Pieces

    def fits(self, piece: Mapping) -> bool:
        """Whether its format can hold a piece, and the piece permits anything."""
        return bool(piece.access & Access.READ or (piece.access and self.write_only))

    def put(self, piece: Mapping, *, at_all_costs: bool = False) -> None:
        """A piece comes, here and beneath. Without room, nothing has changed, and a CoreError says so.

        `at_all_costs`: it is not refused for want of room beneath: there, DMA to what could not be mapped faults.
        """
        if self._above is not None:
            if len(self.pieces) >= MAX_MAPPINGS:
                raise LimitError(f"a merged table has {MAX_MAPPINGS} pieces")
            self._room.take()
        try:
            if piece.where & FOREIGN and self._memory is not None:
                self._borrow(self._memory)
            self.core.map(self.core_id, piece.iova, piece.where, piece.size, piece.access)
        except BaseException:
            if self._above is not None:
                self._room.give()
            raise
        self.pieces.add(piece)
        for link in self._below.overlapping(piece.iova, piece.size):
            try:
                link.child._put_beneath(link, piece)
            except NO_ROOM:
                if not at_all_costs:
                    self.take(piece)
                    raise

    def _borrow(self, memory: UserMemory) -> None:
        """Addresses of the user's process come into the table: the core is to know whose they are, once."""
        process = memory.process
        assert process is not None
        self.core.lend_process(self.core_id, process)
        self._memory = None
        self.foreign = True

    def take(self, piece: Mapping) -> None:
        """A piece goes, beneath and here."""
        for link in self._below.overlapping(piece.iova, piece.size):
            link.child._take_beneath(link, piece)
        self.core.unmap(self.core_id, piece.iova, piece.size)
        self.pieces.remove(piece)
        if self._above is not None:
            self._room.give()

    def _put_beneath(self, link: Link, piece: Mapping) -> None:
        part = link.cut(piece)
        if part is not None:
            self.put(part)

    def _take_beneath(self, link: Link, piece: Mapping) -> None:
        part = link.cut(piece)
        held = self.pieces.at(part.iova) if part is not None else None
        if held is not None:  # else there was no room for it
            self.take(held)

    # Dirty pages: what is written through a child is written in all tables above it

    def track(self, on: bool) -> None:
        """Note from now on, or no longer, which pages are written, here and beneath. A CoreError: no room, and nothing
        has changed."""
        if on != self.tracked:
            for link in self._links.values():  # what was written before is its parents' business alone
                self._pass_up(link, link.iova, link.size, clear=True)
            self._count_tracker(1 if on else -1)
            self.tracked = on

    def read_dirty(self, iova: int, size: int, page_size: int, *, clear: bool) -> bytes:
        """As Core.read_dirty, what was written beneath included.

        A page that was written through a child which is tracked itself is told again until it is read there, too.
        """
        self._gather(iova, size)
        if clear and self._above is not None and self._above._trackers:
            for link in list(self._links.values()):
                self._pass_up(link, iova, size, clear=False)
        return self.core.read_dirty(self.core_id, iova, size, page_size, clear=clear)

    def _count_tracker(self, one: int) -> None:
        self._trackers += one
        if self._trackers == (one > 0):
            try:
                self.core.set_dirty_tracking(self.core_id, one > 0)
            except BaseException:
                self._trackers -= one
                raise
        done: list[HostTable] = []
        try:
            for child in self._children:
                child._count_tracker(one)
                done.append(child)
        except BaseException:
            self._trackers -= one
            if not self._trackers:
                self.core.set_dirty_tracking(self.core_id, False)
            for child in done:
                child._count_tracker(-one)
            raise

    def _gather(self, iova: int, size: int) -> None:
        """Let what was written beneath be dirty here."""
        if not self._trackers:
            return
        for link in self._below.overlapping(iova, size):
            low, high = max(iova, link.start), min(iova + size, link.start + link.size)
            first = link.iova + low - link.start
            link.child._gather(first, high - low)
            link.child._pass_up(link, first, high - low, clear=not link.child.tracked)

    def _pass_up(self, link: Link, iova: int, size: int, *, clear: bool) -> None:
        """Let what is dirty here in one's own part of a range be dirty in the parent."""
        above = self._above
        low, high = max(iova, link.iova), min(iova + size, link.iova + link.size)
        if above is not None and above._trackers and low < high:
            start = link.start + low - link.iova
            self.core.pass_dirty(self.core_id, low, high - low, above.core_id, start, clear=clear)
