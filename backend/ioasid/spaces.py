"""An IOASID as the engine keeps it, and what stands behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from backend.core import Access, Core

from .formats import PgtableFormat
from .kinds import Kind
from .mappings import Mapping, Mappings

if TYPE_CHECKING:
    from .context import Context


class Body(Protocol):
    """What stands behind an IOASID in the core; `backend.ioasid.bodies` makes one for each kind.

    `map` and `unmap` are called for kinds on which MAP_DMA is legal alone, ranges checked against what is mapped.
    """

    def map(self, iova: int, vaddr: int, size: int, access: Access) -> None:
        """Let [iova, iova + size) stand for vaddr. A CoreError is answered by an errno, nothing being mapped then."""

    def unmap(self, iova: int, size: int) -> None:
        """Take away what one `map` mapped; nothing uses it once this returned."""

    def close(self) -> None:
        """Give up the space in the core."""


class Follower(Protocol):
    """Who keeps up with the mappings of an IOASID (`Space.followers`)."""

    def mapped(self, mapping: Mapping) -> None:
        """A mapping is there. A CoreError undoes it: then this follower has changed nothing."""

    def unmapped(self, mapping: Mapping) -> None:
        """A mapping is gone, and nothing may use it through the follower once this returned."""


@dataclass(slots=True)
class CoreBody:
    """A space of the core: a table of ours, or the place for a guest's."""

    core: Core
    core_id: int

    def map(self, iova: int, vaddr: int, size: int, access: Access) -> None:
        self.core.map(self.core_id, iova, vaddr, size, access)

    def unmap(self, iova: int, size: int) -> None:
        self.core.unmap(self.core_id, iova, size)

    def close(self) -> None:
        self.core.destroy_space(self.core_id)


@dataclass(slots=True, eq=False)
class Space:
    """One IOASID. `ioasid` is its number in its context, `core_id` the one the core knows it by."""

    context: Context
    ioasid: int
    core_id: int
    kind: Kind
    format: PgtableFormat
    """Of a host-managed one its own; of a guest-managed one the parent's, until a table is bound."""
    body: Body
    parent: Space | None = None
    children: int = 0
    attachments: int = 0
    bound_root: int | None = None
    """GPA of the guest's root table, None while no table is bound."""
    mappings: Mappings = field(default_factory=Mappings)
    followers: list[Follower] = field(default_factory=list)
    """In the order in which they are told."""
