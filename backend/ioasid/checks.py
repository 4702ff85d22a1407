"""What every command of a context begins with: its fields checked, its IOASID and device found."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from backend.core import LimitError, NoMemoryError

from .command import Command
from .device import Device
from .formats import FORMATS, FormatRule, PgtableFormat
from .kinds import Kind
from .spaces import Space
from .user_memory import OwnMemory, UserMemory

if TYPE_CHECKING:
    from .context import Context
    from .engine import Engine


class Checks:
    """What a context owns, and the refusals that all groups of commands share."""

    def __init__(self, engine: Engine, memory: UserMemory | None = None) -> None:
        self.engine = engine
        self.memory = memory if memory is not None else OwnMemory()
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
        if self._closed:
            raise command.refuse(errno.EBADF, "this context was closed: open another")
        command.check(**fields)

    def _space(self, command: Command, ioasid: int, /, **fields: object) -> Space:
        """The IOASID, on whose kind the command is legal. Fields, where given, are checked first."""
        if fields:
            self._enter(command, **fields)
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
        self._enter(command, **fields)
        device = self.engine.devices.get(rid)
        if device is None:
            raise command.refuse(errno.ENODEV, f"no device has RID {rid:#06x}: use one that the engine knows")
        return device

    def _bound(self, command: Command, rid: int, /, **fields: object) -> Device:
        device = self._device(command, rid, **fields)
        if device.context is not self:
            raise command.refuse(errno.EINVAL, f"{device} is not bound to this context: BIND_IOASID_FD first")
        return device

    def _format(self, command: Command, kind: Kind, fmt: PgtableFormat) -> FormatRule:
        """The rule of a format that is on offer for a kind."""
        rule = FORMATS.get(fmt.vendor)
        builder = Kind.KERNEL if kind == Kind.VM else kind  # both are tables that the host builds
        if rule is None or builder not in rule.kinds:
            offered = ", ".join(each.vendor for each in FORMATS.values() if builder in each.kinds)
            raise command.refuse(
                errno.EOPNOTSUPP, f"format {fmt.vendor!r} is not offered for kind {kind}: use one of {offered}"
            )
        if fmt.levels not in rule.levels:
            raise command.refuse(
                errno.EOPNOTSUPP,
                f"{fmt.vendor} with {fmt.levels} levels is not offered: use {rule.levels[0]} to {rule.levels[-1]}",
            )
        return rule


@contextmanager
def within_limits(command: Command) -> Iterator[None]:
    """The core or the host having no room is an answer to the caller, not the end of the backend."""
    try:
        yield
    except LimitError as error:
        raise command.refuse(
            errno.ENOSPC, "the engine has no room left for tables and routes: free some first"
        ) from error
    except (NoMemoryError, MemoryError) as error:
        raise command.refuse(errno.ENOMEM, "the host has no memory for it: free something first") from error
