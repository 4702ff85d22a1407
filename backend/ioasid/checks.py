"""What every command of a context begins with: its fields checked, its IOASID and device found."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, cast

from backend.core import BadValueError, KindError, LimitError, NoMemoryError

from .command import Command
from .device import Device
from .fault_queue import FaultQueue
from .formats import FORMATS, PgtableFormat
from .kinds import Kind
from .mappings import Mapping
from .merged import Room
from .pasid_formats import PasidTableFormat
from .pinned_memory import PinnedMemory
from .share import ALL, Allowance, Share
from .spaces import Space
from .user_memory import OwnMemory, UserMemory

if TYPE_CHECKING:
    from .context import Context
    from .engine import Engine


class Checks:
    """What a context owns, and the refusals that all groups of commands share."""

    def __init__(
        self,
        engine: Engine,
        memory: UserMemory | None = None,
        vm: object = None,
        share: Share = ALL,
        *,
        guest: bool = False,
    ) -> None:
        self.engine = engine
        self.guest = guest
        """Its user is a guest: it reaches and learns nothing of the host but its VM's memory."""
        self.share = share
        """What it may have beside other contexts."""
        self.merged_room = Room(share.mappings)
        self.memory = memory if memory is not None else OwnMemory()
        self.vm = vm if vm is not None else self
        """Contexts of one VM share it: its PASIDs are the same in all."""
        self.pinned = PinnedMemory()
        """What is accounted; its `limit` can be set."""
        self.faults = FaultQueue(engine.clock, engine.page_timeout, engine.arm, share.records)
        self._core = engine.core
        self._spaces: dict[int, Space] = {}
        self._free: list[int] = []
        self._devices: dict[int, Device] = {}
        self._closed = False

    @property
    def _self(self) -> Context:
        """This context, as what it owns names its owner."""
        return cast("Context", self)

    def _enter(self, command: Command, /, **fields: object) -> None:
        self._begin(command, fields)

    def _begin(self, command: Command, fields: dict[str, object]) -> None:
        if self._closed:
            raise command.refuse(errno.EBADF, "this context was closed: open another")
        command.check(fields)

    def _take(self, command: Command, allowance: Allowance, what: str) -> None:
        """Have one more of what all contexts share, or refuse."""
        if not allowance.take():
            raise command.refuse(errno.ENOSPC, f"the clients have all the {what} they may have together: free some")

    def _pay(self, command: Command, before: int, undo: Callable[[], object]) -> None:
        """Pages of tables that were taken since there were so many are this context's. Where it may have no more of
        them, `undo` gives them back, and the command is refused."""
        taken = self._core.table_pages - before
        if taken > 0 and not self.share.table_pages.take(taken):
            undo()
            raise command.refuse(
                errno.ENOSPC, f"{taken} pages of tables more than the clients may have together: free some, or map less"
            )
        if taken < 0:
            self.share.table_pages.give(-taken)

    def _space(self, command: Command, ioasid: int, /, **fields: object) -> Space:
        """The IOASID, on whose kind the command is legal. Fields, where given, are checked first."""
        if fields:
            self._begin(command, fields)
        space = self._spaces.get(ioasid)
        if space is None:
            raise command.refuse(
                errno.ENOENT, f"no IOASID {ioasid} in this context: use a number that ALLOC or CREATE_NESTING gave"
            )
        if space.kind not in command.kinds:
            legal = " or ".join(sorted(command.kinds))
            raise command.refuse(
                errno.EINVAL, f"IOASID {ioasid} is of kind {space.kind}, and {command.name} is for kind {legal}"
            )
        return space

    def _device(self, command: Command, rid: int, /, **fields: object) -> Device:
        """The device. Fields, where given, are checked first."""
        if fields:
            self._begin(command, fields)
        device = self.engine.devices.get(rid)
        if device is None:
            raise command.refuse(errno.ENODEV, f"no device has RID {rid:#06x}: use one that the engine knows")
        return device

    def _bound(self, command: Command, rid: int, /, **fields: object) -> Device:
        device = self._device(command, rid, **fields)
        if device.context is not self:
            raise command.refuse(errno.EINVAL, f"{device} is not bound to this context: BIND_IOASID_FD first")
        return device

    def _account(self, space: Space, mapping: Mapping, by: int) -> None:
        """Account for a mapping that comes (1) or goes (-1)."""
        if space.parent is not None:
            return
        if mapping.registered:
            for each in self.pinned.covering(mapping.vaddr, mapping.size) or ():
                each.users += by
        else:
            self.pinned.pinned += by * mapping.size

    def _format(self, command: Command, kind: Kind, fmt: PgtableFormat) -> PgtableFormat:
        """The format with all its numbers, if it is on offer for the kind."""
        rule = FORMATS.get(fmt.vendor)
        if rule is None or kind not in rule.kinds:
            offered = ", ".join(each.vendor for each in FORMATS.values() if kind in each.kinds)
            raise command.refuse(
                errno.EOPNOTSUPP, f"format {fmt.vendor!r} is not offered for kind {kind}: use one of {offered}"
            )
        if fmt.dirty and not fmt.accessed:
            raise command.refuse(errno.EINVAL, "dirty bits are kept only together with accessed bits: ask for both")
        try:
            return rule.complete(fmt)
        except ValueError as error:
            raise command.refuse(errno.EOPNOTSUPP, f"{error}; see GET_INFO for what is offered") from error


def format_fields(fmt: PgtableFormat | PasidTableFormat) -> dict[str, object]:
    """The fields of a format, by name, as Command.check takes them."""
    return {each.name: getattr(fmt, each.name) for each in fields(fmt)}


class within_limits:
    """The core or the host having no room is an answer to the caller, not the end of the backend."""

    __slots__ = ("_command",)

    def __init__(self, command: Command) -> None:
        self._command = command

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        if isinstance(error, LimitError):
            raise self._command.refuse(
                errno.ENOSPC, "the engine has no room left for tables and routes: free some first"
            ) from error
        if isinstance(error, (NoMemoryError, MemoryError)):
            raise self._command.refuse(errno.ENOMEM, "the host has no memory for it: free something first") from error


@contextmanager
def within_format(command: Command) -> Iterator[None]:
    """Neither room nor a combination of numbers that no hardware has is a mistake of ours."""
    with within_limits(command):
        try:
            yield
        except (BadValueError, KindError) as error:
            raise command.refuse(
                errno.EINVAL,
                f"no table can be so: its address must be aligned as its format asks, and numbers fit ({error})",
            ) from error
