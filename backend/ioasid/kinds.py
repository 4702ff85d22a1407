"""The kinds of page table that an IOASID stands for."""

from enum import StrEnum


class Kind(StrEnum):
    """Who owns the page table behind an IOASID, and so which commands are legal on it (backend.ioasid.commands)."""

    KERNEL = "kernel"
    """Host-managed: built by MAP_DMA and UNMAP_DMA. Beneath a parent (software nesting), what is mapped are addresses
    of the parent's, and the host keeps both merged."""
    SVA = "sva"
    """The address space of a process of the host: its own page table, nobody maps into it."""
    VM = "vm"
    """Follows the VM's memory as it comes and goes: what EPT is to the CPU; nobody maps into it."""
    USER = "user"
    """Guest-managed: nested beneath a parent, its table bound by BIND_PGTABLE or BIND_PASID_TABLE, its changes told by
    INVALIDATE_CACHE. The parent is host-managed, or guest-managed beneath such a one."""
