"""An IOASID as the engine keeps it, and what stands behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from backend.core import Core

from .formats import PgtableFormat
from .kinds import Kind
from .mappings import Mappings
from .merged import HostTable
from .pasid_formats import PasidTableFormat
from .traits import Window

if TYPE_CHECKING:
    from .context import Context
    from .device import Device


class Body(Protocol):
    """What stands behind an IOASID in the core; `backend.ioasid.bodies` makes one for each kind."""

    @property
    def foreign(self) -> bool:
        """Whether it may lead to memory of another process."""

    def close(self) -> None:
        """Give up the space in the core."""


@dataclass(slots=True)
class CoreBody:
    """A space of the core into which nobody maps."""

    core: Core
    core_id: int
    foreign: bool = False

    def close(self) -> None:
        self.core.destroy_space(self.core_id)


class Untagged(StrEnum):
    """Where requests without a PASID go, when a device's PASIDs are led by a PASID table."""

    BLOCKED = "blocked"
    PARENT = "parent"
    """Past the child: their addresses are the parent's."""
    PASID = "pasid"
    """As if they carried a PASID that the user chose."""


@dataclass(frozen=True, slots=True)
class PasidTable:
    """A guest's PASID table as it was bound; its address is Space.bound_root."""

    format: PasidTableFormat
    bits: int
    """Of a PASID."""
    untagged: Untagged
    untagged_pasid: int | None


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
    enforce_snoop: bool = False
    below: set[Space] = field(default_factory=set)
    """Its children."""
    users: set[tuple[Device, int | None]] = field(default_factory=set)
    """Devices and PASIDs that are attached, routed or not."""
    bound_root: int | None = None
    """GPA of the guest's root table, None while no table is bound."""
    pasid_table: PasidTable | None = None
    """What is bound at bound_root in place of a page table."""
    mappings: Mappings = field(init=False)
    """What MAP_DMA mapped."""
    windows: dict[tuple[Window, ...], int] = field(default_factory=dict)
    """IOVAs that attached devices cannot use, and how many attachments say so."""

    def __post_init__(self) -> None:
        self.mappings = self.body.mappings if isinstance(self.body, HostTable) else Mappings()

    @property
    def table_format(self) -> PgtableFormat | None:
        """Of the table that requests walk first; None: there is none, or it is a process's."""
        if self.kind == Kind.SVA or (self.kind == Kind.USER and (self.bound_root is None or self.pasid_table)):
            return None
        return self.format

    @property
    def depth(self) -> int:
        """1 for a root, one more than its parent's otherwise."""
        return 1 if self.parent is None else self.parent.depth + 1

    @property
    def host(self) -> Space:
        """The host-managed one whose addresses all guest-managed tables on the way lead to: itself, or beneath it."""
        space = self
        while space.kind == Kind.USER and space.parent is not None:
            space = space.parent
        return space

    @property
    def table(self) -> HostTable:
        """Of a host-managed one: the table that stands behind it."""
        assert isinstance(self.body, HostTable)
        return self.body

    @property
    def foreign(self) -> bool:
        """Whether there may be memory of another process behind it."""
        space = self
        while space.kind == Kind.USER:
            assert space.parent is not None
            space = space.parent
        return space.body.foreign

    @property
    def children(self) -> int:
        """How many it has."""
        return len(self.below)

    @property
    def attachments(self) -> int:
        """How many there are."""
        return len(self.users)

    def enter(self, device: Device, pasid: int | None) -> None:
        """A device (or PASID) is attached."""
        self.users.add((device, pasid))
        self.windows[device.windows] = self.windows.get(device.windows, 0) + 1

    def leave(self, device: Device, pasid: int | None) -> None:
        """It is attached no longer."""
        self.users.remove((device, pasid))
        self.windows[device.windows] -= 1
        if not self.windows[device.windows]:
            del self.windows[device.windows]

    def reserved(self, iova: int, size: int) -> Window | None:
        """A window of an attached device that shares a byte with [iova, iova + size)."""
        for windows in self.windows:
            for window in windows:
                if window.start < iova + size and iova < window.end:
                    return window
        return None
