"""What is cached of the guest's tables, and what stands in them: INVALIDATE_CACHE and LOOKUP."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import overload

from backend.core import Access, Fault, Path

from . import rows_tables as cmd
from .changes import Change, What
from .checks import Checks, within_limits
from .device import Device
from .errors import IoasidError
from .formats import PAGE_SIZE
from .kinds import Kind
from .limits import MAX_PREFETCH, MAX_RID
from .spaces import Space


class Granularity(StrEnum):
    """What an invalidation is of."""

    ALL = "all"
    RANGE = "range"
    PASID = "pasid"
    DEVICE = "device"


class Cache(StrEnum):
    """What is to forget."""

    IOTLB = "iotlb"
    DEVICE_TLB = "device-tlb"
    PASID = "pasid"
    """What was read of a PASID table."""


_GRANULARITIES = frozenset(Granularity)
_CACHES = frozenset(Cache)


@dataclass(frozen=True, slots=True)
class Invalidation:
    """One entry of an array; fields as in INVALIDATE_CACHE."""

    granularity: str = Granularity.ALL
    iova: int = 0
    size: int = 0
    pasid: int | None = None
    rid: int | None = None
    caches: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Invalidated:
    """How many entries were done, and why the next one was refused: its errno and sentence, None if all were done."""

    done: int
    errno: int | None = None
    sentence: str | None = None


class _Answers:
    """Those of device TLBs that somebody waits for."""

    def __init__(self, answered: Callable[[], None] | None) -> None:
        self._answered = answered
        self._waiting = 1
        """One is the command itself, until it knows of no more."""

    def awaited(self) -> Callable[[], None]:
        """What one device TLB is to call; a second time does nothing."""
        self._waiting += 1
        left = [self.last]
        return lambda: left.pop()() if left else None

    def last(self) -> None:
        """An answer came, or no more are to be awaited."""
        self._waiting -= 1
        if not self._waiting and self._answered is not None:
            self._answered()


class InvalidationCommands(Checks):
    """Commands on caches, and a look past them."""

    @overload
    def invalidate_cache(
        self,
        ioasid: int,
        *,
        granularity: str = ...,
        iova: int = ...,
        size: int = ...,
        pasid: int | None = ...,
        rid: int | None = ...,
        caches: Sequence[str] = ...,
        answered: Callable[[], None] | None = ...,
    ) -> None: ...
    @overload
    def invalidate_cache(
        self, ioasid: int, *, entries: Sequence[Invalidation], answered: Callable[[], None] | None = ...
    ) -> Invalidated: ...
    def invalidate_cache(
        self,
        ioasid: int,
        *,
        granularity: str = Granularity.ALL,
        iova: int = 0,
        size: int = 0,
        pasid: int | None = None,
        rid: int | None = None,
        caches: Sequence[str] = (),
        entries: Sequence[Invalidation] | None = None,
        answered: Callable[[], None] | None = None,
    ) -> Invalidated | None:
        """INVALIDATE_CACHE: "all"; the "range" [iova, iova + size), of one PASID or of all; a "pasid"; or a "device".

        caches: those that are to forget; none: all there are. More than was asked for may be forgotten.
        entries: in place of the other fields, an array; it ends at the first entry that is refused, and the
        answer says which. answered (of Python alone) is called once, when the TLBs of all devices that were told have
        answered: before this returns, if none has to be waited for; never, if the command is refused.
        """
        command = cmd.INVALIDATE_CACHE
        answers = _Answers(answered)
        one = Invalidation(granularity, iova, size, pasid, rid, caches)
        space = self._space(command, ioasid, ioasid=ioasid, entries=entries, **_fields(one))
        if entries is None:
            self._invalidate(space, one, answers)
            answers.last()
            return None
        if one != Invalidation(caches=caches) or caches:
            raise command.refuse(errno.EINVAL, "entries go in place of all other fields but ioasid: leave those out")
        for done, entry in enumerate(entries):
            try:
                if not isinstance(entry, Invalidation):
                    raise command.refuse(errno.EINVAL, f"entry {done} is no record of an invalidation")
                command.check({"ioasid": ioasid, "entries": None, **_fields(entry)})
                self._invalidate(space, entry, answers)
            except IoasidError as error:
                answers.last()
                return Invalidated(done, error.errno, error.sentence)
        answers.last()
        return Invalidated(len(entries))

    def _invalidate(self, space: Space, what: Invalidation, answers: _Answers) -> None:
        command = cmd.INVALIDATE_CACHE
        granularity, iova, size, pasid = what.granularity, what.iova, what.size, what.pasid
        if granularity not in _GRANULARITIES:
            raise command.refuse(errno.EOPNOTSUPP, f"no granularity {granularity!r}: use {', '.join(Granularity)}")
        for cache in what.caches:
            if cache not in _CACHES:
                raise command.refuse(errno.EOPNOTSUPP, f"no cache {cache!r}: use {', '.join(Cache)}")
        if granularity == Granularity.RANGE:
            if not size:
                raise command.refuse(errno.EINVAL, 'granularity "range" with size 0: name at least one page')
            command.check_range("iova", iova, size)
        elif iova or size:
            raise command.refuse(
                errno.EINVAL, f'granularity "{granularity}" takes no range, got {iova:#x} + {size:#x}: use "range"'
            )
        if (granularity == Granularity.PASID) > (pasid is not None):
            raise command.refuse(errno.EINVAL, 'granularity "pasid" without a PASID: name it')
        if pasid is not None and granularity not in {Granularity.PASID, Granularity.RANGE}:
            raise command.refuse(errno.EINVAL, f'granularity "{granularity}" takes no PASID: use "pasid" or "range"')
        users = self._users(space, what)
        caches = set(what.caches) or _CACHES
        of_table = pasid if space.pasid_table is not None else None
        if caches & {Cache.IOTLB, Cache.PASID}:
            if granularity == Granularity.RANGE:
                self._core.invalidate(space.core_id, iova, size, pasid=of_table)
            else:
                self._core.invalidate(space.core_id, pasid=of_table)
        if Cache.DEVICE_TLB in caches:
            for device, key in users:
                if device.tlb is not None:
                    whose = pasid if space.pasid_table is not None else key
                    device.tlb(whose, iova, size if granularity == Granularity.RANGE else None, answers.awaited())
            if self.engine.tlbs:
                self.engine.forget_tlbs_beneath(space, answers.awaited, what.rid)
        if self.engine.watched:
            where = (iova, size) if granularity == Granularity.RANGE else (None, None)
            self.engine.changed(Change(What.INVALIDATE, self._self, space.ioasid, what.rid, pasid, *where))

    def _users(self, space: Space, what: Invalidation) -> list[tuple[Device, int | None]]:
        """Devices, and the PASIDs they are attached under, that the invalidation is about."""
        command = cmd.INVALIDATE_CACHE
        users = list(space.users) if what.rid is not None or what.pasid is not None or self.engine.tlbs else []
        if what.granularity == Granularity.DEVICE and what.rid is None:
            raise command.refuse(errno.EINVAL, 'granularity "device" without a device: name its rid')
        if what.rid is not None:
            device = self._bound(command, what.rid)
            users = [each for each in users if each[0] is device]
            if not users:
                raise command.refuse(errno.EINVAL, f"{device} is not attached to IOASID {space.ioasid}")
        if what.pasid is None:
            return users
        if space.pasid_table is not None:
            if what.pasid >> space.pasid_table.bits:
                raise command.refuse(
                    errno.EINVAL, f"PASID {what.pasid} is wider than the {space.pasid_table.bits} bits of the table"
                )
            return users
        users = [(device, key) for device, key in users if key is not None and device.virtual(key) == what.pasid]
        if not users:
            raise command.refuse(errno.EINVAL, f"no device is attached to IOASID {space.ioasid} as PASID {what.pasid}")
        return users

    def prefetch(self, rid: int, iova: int, size: int, *, pasid: int | None = None) -> None:
        """PREFETCH: the IOTLB learns what reads of a device would find, page by page; where there is nothing, or the
        device has no route, it learns nothing, and nobody is told."""
        command = cmd.PREFETCH
        device = self._bound(command, rid, rid=rid, iova=iova, size=size, pasid=pasid)
        command.check_range("iova", iova, size)
        if size > MAX_PREFETCH:
            raise command.refuse(errno.EINVAL, f"{size:#x} bytes at once: {MAX_PREFETCH:#x} at most, ask in parts")
        physical = device.physical(pasid) if pasid is not None else None
        if pasid is not None and physical is None:
            return
        for page in range(iova, iova + size, PAGE_SIZE):
            self._core.prefetch(rid, page, pasid=physical)

    def lookup(self, ioasid: int, iova: int, *, pasid: int | None = None, access: Access = Access.READ) -> Path:
        """LOOKUP: what a request for one byte would go through now, every entry of both stages past all caches, and
        where it ends; nothing is set, filled or counted. IOASIDs in it are numbers of this context, and the result's
        hva is the user's own address (0: none of the user's). A guest sees no entry of ours: they are at addresses of
        the host, and hold some."""
        command = cmd.LOOKUP
        space = self._space(command, ioasid, ioasid=ioasid, iova=iova, pasid=pasid, access=access)
        if not access:
            raise command.refuse(errno.EINVAL, "access is none: look up what a read or a write would find")
        if pasid is not None and space.pasid_table is None:
            raise command.refuse(errno.EINVAL, f"IOASID {ioasid} has no PASID table: leave pasid out")
        rid = next((each for each in range(MAX_RID, -1, -1) if each not in self.engine.devices), None)
        if rid is None:
            raise command.refuse(errno.ENOSPC, "every RID is a device's: none is left to look through")
        with within_limits(command):
            self._core.attach(rid, pasid, space.core_id)
        try:
            path = self._core.lookup(rid, iova, pasid=pasid, access=access)
        finally:
            self._core.detach(rid, pasid)
        if self.guest:
            path = replace(path, steps=tuple(step for step in path.steps if step.stage == 1))
        number_of = self.engine.number_of
        result = path.result
        if isinstance(result, Fault):
            ours = self.guest and result.stage == 2
            result = replace(result, ioasid=ioasid, entry=0 if ours else result.entry)
        elif space.kind != Kind.SVA:  # the user's address, not ours
            result = replace(result, hva=self.memory.vaddr(result.hva) or 0)
        return replace(path, ioasid=ioasid, parent=number_of(path.parent), result=result)


def _fields(what: Invalidation) -> dict[str, object]:
    names = ("granularity", "iova", "size", "pasid", "rid", "caches")
    return {name: getattr(what, name) for name in names}
