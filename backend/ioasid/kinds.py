"""The kinds of page table that an IOASID stands for."""

from enum import StrEnum


class Kind(StrEnum):
    """Who owns the page table behind an IOASID, and so which commands are legal on it (backend.ioasid.commands)."""

    KERNEL = "kernel"
    """Host-managed: built by MAP_DMA and UNMAP_DMA."""
    USER = "user"
    """Guest-managed: nested beneath a parent, its table bound by BIND_PGTABLE, its changes told by INVALIDATE_CACHE."""
