"""The path of one translation: every table entry of both stages, as it was read, and where it led."""

from __future__ import annotations

from dataclasses import dataclass

from backend.core.answers import Access, Fault, Reason, Translation


@dataclass(frozen=True, slots=True)
class Step:
    """One table entry."""

    stage: int
    """1: a table of the guest's; 2: ours."""
    level: int
    """1 holds the smallest leaves."""
    table_of: int | None
    """The level of the guest's entry that it leads to, None if it leads to the data; None, too, of the first table."""
    pasid_table: bool
    """The entry is one of a PASID table, level 1 describing an address space; stage 2: it leads to one."""
    middle: bool
    """Three stages: the entry is one of the guest's table in the middle; stage 2: it leads to one of those."""
    input: int
    """The address that is being translated: an IOVA by stage 1, a GPA by stage 2; the PASID by a PASID table."""
    address: int
    """Where the entry lies: a GPA in stage 1, an address of this process in stage 2."""
    entry: int | None
    """The entry; None if its memory is gone."""
    leaf: bool
    output: int | None
    """Base of the leaf or of the next table; None if the entry leads nowhere."""
    size: int | None
    """Bytes of the leaf; None if it is none."""
    access: Access | None
    """What this entry and the leaf permit together, for requests of this privilege; None if no leaf was reached."""
    accessed: bool | None
    """Its accessed bit; None if the entry has none (ours have none)."""
    dirty: bool | None
    """Its dirty bit; likewise."""
    reason: Reason | None
    """Why the path ends here; None if it does not."""

    @property
    def present(self) -> bool:
        """Whether the entry was read and is present; what is present may be malformed all the same."""
        return self.entry is not None and self.reason != Reason.NOT_PRESENT


@dataclass(frozen=True, slots=True)
class Path:
    """What a request would go through at this moment."""

    rid: int
    pasid: int | None
    iova: int
    access: Access
    ioasid: int | None
    """Where (rid, pasid) leads; None: nowhere."""
    parent: int | None
    """The space underneath, if that is a nested one."""
    stage1: str | None
    """Format of the guest's table; None without one."""
    stage2: str | None
    """Format of our table; None if the request reaches none."""
    steps: tuple[Step, ...]
    """In the order in which they are read: before each entry of stage 1 those of stage 2 that lead to it."""
    result: Translation | Fault
    middle: str | None = None
    """Format of the guest's table in the middle, where there are three; else None."""
