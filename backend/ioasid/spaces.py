"""An IOASID as the engine keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .formats import PgtableFormat
from .kinds import Kind
from .mappings import Mappings

if TYPE_CHECKING:
    from .context import Context


@dataclass(slots=True, eq=False)
class Space:
    """One IOASID. `ioasid` is its number in its context, `core_id` the one the core knows it by."""

    context: Context
    ioasid: int
    core_id: int
    kind: Kind
    format: PgtableFormat
    """Of a host-managed one its own; of a guest-managed one the parent's, until a table is bound."""
    parent: Space | None = None
    children: int = 0
    attachments: int = 0
    bound_root: int | None = None
    """GPA of the guest's root table, None while no table is bound."""
    mappings: Mappings = field(default_factory=Mappings)
