"""The nested walk: any stage 1 over any stage 2.

VT-d 3.8 (nested translation), AMD IOMMU 48882 2.2.6 (guest tables over host tables), Arm ARM D8 and SMMUv3 3.3 (two
stages), RISC-V privileged "Two-Stage Address Translation", RISC-V IOMMU "Process to translate an IOVA".

Order: 1. stage 1, each of its table accesses translated by stage 2 as a read; 2. each of its entry updates, in order,
translated by stage 2 as a write; 3. the resulting guest-physical address by stage 2, for the request itself.
RISC-V prescribes it so (first-stage step 9 precedes the second stage of the result). unspecified elsewhere: when,
between reading an entry and the end of stage 1, an accessed bit is written; where stage 2 forbids that write and
stage 1 fails too, the fault of stage 1 is told here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .common import Access, Fault, Kind, Reader, Reason, Result, Update, merge


@dataclass(frozen=True, slots=True)
class Stage:
    """A walker with its configuration.

    table_kind: how a stage 2 sees reads of stage-1 entries; WRITE for EPT with accessed and dirty flags.
    """

    walk: Callable[[Reader, Any, int, Access], Result | Fault]
    config: Any
    table_kind: Kind = Kind.READ


@dataclass(frozen=True, slots=True)
class NestedResult:
    """Permissions are the AND of both stages, `size` the smaller page, `updates` name host addresses of both stages."""

    output: int
    gpa: int
    size: int
    read: bool
    write: bool
    execute: bool
    user: bool
    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class NestedFault:
    """`stage` 1: `gpa` is the stage-1 entry's guest-physical address, None if no entry was looked at.

    `stage` 2: `gpa` is the guest-physical address that stage 2 did not translate; `implicit`: needed for a stage-1
    table access, not for the request itself. `level`, `entry`: of the stage at fault. `may_update`: as in common.Fault.
    """

    stage: int
    reason: Reason
    level: int
    gpa: int | None
    entry: int | None
    implicit: bool = False
    may_update: tuple[Update, ...] = ()
    inner: NestedFault | None = None
    """Of stage 2, where that is `under`: what befell there, `gpa` being what was asked of it."""


@dataclass(frozen=True, slots=True)
class UnderFault(Fault):
    """A fault of two stages that stand as one."""

    inner: NestedFault | None = None


def under(middle: Stage, host: Stage) -> Stage:
    """Two stages as one second stage: a table of the guest's own between its first one and the host's.

    AMD IOMMU 48882, 2.2.6: guest tables over host tables, the latter being those of a guest here.
    """

    def walk_both(memory: Reader, _config: Any, address: int, access: Access) -> Result | Fault:
        answer = walk(memory, middle, host, address, access)
        if isinstance(answer, NestedFault):
            return UnderFault(answer.reason, answer.level, None, answer.entry, answer.may_update, answer)
        return Result(
            answer.output, answer.size, answer.read, answer.write, answer.execute, answer.user, answer.updates
        )

    return Stage(walk_both, None, middle.table_kind)


class SecondStageView:
    """Guest-physical memory as stage 1 and PASID-table look-ups see it; it keeps the fault and updates of stage 2."""

    def __init__(self, memory: Reader, second: Stage, privileged: bool = False) -> None:
        self.memory = memory
        self.second = second
        self.privileged = privileged
        self.fault: Fault | None = None
        self.gpa: int | None = None  # of the access at fault
        self.updates: list[Update] = []

    def translate(self, gpa: int, kind: Kind) -> int | None:
        """Host address of a table access; None after a stage-2 fault, which is kept."""
        answer = self.second.walk(self.memory, self.second.config, gpa, Access(kind, self.privileged))
        if isinstance(answer, Fault):
            self.fault, self.gpa = answer, gpa
            self.updates += answer.may_update
            return None
        self.updates += answer.updates
        return answer.output

    def read64(self, address: int) -> int | None:
        host = self.translate(address, self.second.table_kind)
        return None if host is None else self.memory.read64(host)


def walk(memory: Reader, first: Stage, second: Stage, iova: int, access: Access) -> NestedResult | NestedFault:
    """Translates `iova` by both stages for one access."""
    view = SecondStageView(memory, second, access.privileged)

    # 1. Stage 1 over guest-physical memory.
    inner = first.walk(view, first.config, iova, access)
    if isinstance(inner, Fault):
        fault = NestedFault(1, inner.reason, inner.level, inner.address, inner.entry)
        if view.fault is not None:
            fault = _second_stage_fault(view)
        for update in inner.may_update:
            host = view.translate(update.address, Kind.WRITE)
            if host is not None:
                view.updates.append(Update(host, update.set, update.clear))
        return replace(fault, may_update=merge(view.updates))

    # 2. Its accessed and dirty bits.
    for update in inner.updates:
        host = view.translate(update.address, Kind.WRITE)
        if host is None:
            return _second_stage_fault(view)
        view.updates.append(Update(host, update.set, update.clear))

    # 3. The request itself.
    outer = second.walk(memory, second.config, inner.output, access)
    if isinstance(outer, Fault):
        may = merge([*view.updates, *outer.may_update])
        return NestedFault(2, outer.reason, outer.level, inner.output, outer.entry, False, may, _inner(outer))
    return NestedResult(
        outer.output,
        inner.output,
        min(inner.size, outer.size),
        inner.read and outer.read,
        inner.write and outer.write,
        inner.execute and outer.execute,
        inner.user,
        merge([*view.updates, *outer.updates]),
    )


def _second_stage_fault(view: SecondStageView) -> NestedFault:
    """The fault that the view met at a table access."""
    fault = view.fault
    assert fault is not None
    return NestedFault(2, fault.reason, fault.level, view.gpa, fault.entry, True, merge(view.updates), _inner(fault))


def _inner(fault: Fault) -> NestedFault | None:
    return fault.inner if isinstance(fault, UnderFault) else None
