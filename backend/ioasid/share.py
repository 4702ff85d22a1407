"""What a context takes of what all contexts of an engine share. Limits of one context stand in limits.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Allowance(Protocol):
    """How much of one thing a context may have beside all others."""

    def take(self, count: int = 1) -> bool:
        """Have so much more. False: there is no room, and nothing has changed."""

    def give(self, count: int = 1) -> None:
        """Have so much less."""


class Unbounded:
    """Nobody else counts."""

    def take(self, count: int = 1) -> bool:
        return True

    def give(self, count: int = 1) -> None:
        pass


UNBOUNDED = Unbounded()


@dataclass(frozen=True, slots=True)
class Share:
    """Taken by what a command makes, given back when it goes. Whoever opens contexts for strangers gives each a share
    of a budget; the context of a VM's own front end has all it asks for."""

    ioasids: Allowance = UNBOUNDED
    mappings: Allowance = UNBOUNDED
    """Of MAP_DMA, pieces of merged tables, registered ranges, and KVM's of PASIDs: a few hundred bytes each."""
    table_pages: Allowance = UNBOUNDED
    """Pages of host-managed tables."""
    attachments: Allowance = UNBOUNDED
    records: Allowance = UNBOUNDED
    """Of the fault queue."""
    processes: Allowance = UNBOUNDED
    """IOASIDs of kind sva."""


ALL = Share()
