"""An IOASID as the engine keeps it, and what stands behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from backend.core import Core

from .formats import PgtableFormat
from .kinds import Kind
from .mappings import Mappings
from .merged import HostTable

if TYPE_CHECKING:
    from .context import Context


class Body(Protocol):
    """What stands behind an IOASID in the core; `backend.ioasid.bodies` makes one for each kind."""

    def close(self) -> None:
        """Give up the space in the core."""


@dataclass(slots=True)
class CoreBody:
    """A space of the core into which nobody maps."""

    core: Core
    core_id: int

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

    @property
    def depth(self) -> int:
        """1 for a root, one more than its parent's otherwise."""
        return 1 if self.parent is None else self.parent.depth + 1

    @property
    def table(self) -> HostTable:
        """Of a host-managed one: the table that stands behind it."""
        assert isinstance(self.body, HostTable)
        return self.body
