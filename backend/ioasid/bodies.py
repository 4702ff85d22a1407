"""What stands behind a new IOASID: one maker a kind."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from backend.core import Core

from .command import Command
from .errors import IoasidError
from .formats import FORMATS, PgtableFormat
from .kinds import Kind
from .limits import MAX_PROCESSES
from .merged import HostTable
from .processes import Process, open_process
from .spaces import Body, CoreBody, Space
from .user_memory import UserMemory

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of ALLOC or CREATE_NESTING: `format` is on offer for the kind, `parent` host-managed or None."""

    command: Command
    """To refuse with."""
    engine: Engine
    core_id: int
    """Of the space in the core that the maker makes."""
    format: PgtableFormat
    parent: Space | None
    memory: UserMemory
    """Of the user."""
    pid: int | None

    @property
    def core(self) -> Core:
        return self.engine.core


def kernel(request: Request) -> Body:
    """A table of ours, empty; beneath a parent, merged with the parent's."""
    above = request.parent.table if request.parent is not None else None
    return _table(request, above)


def vm(request: Request) -> Body:
    """A table of ours, kept like the VM's memory."""
    memory = request.engine.vm_memory
    table = _table(request, None, memory.leave)
    try:
        memory.follow(table)
    except BaseException:
        request.core.destroy_space(request.core_id)
        raise
    return table


def _table(request: Request, above: HostTable | None, leave: Callable[[HostTable], None] | None = None) -> HostTable:
    fmt = request.format
    rule = FORMATS[fmt.vendor]
    request.core.create_host_space(request.core_id, fmt=rule.table(fmt))
    try:
        return HostTable(
            request.core,
            request.core_id,
            request.engine.merged_room,
            above,
            leave=leave,
            memory=request.memory,
            width=rule.address_width(fmt, host=True),
            write_only=rule.write_only,
        )
    except BaseException:
        request.core.destroy_space(request.core_id)
        raise


def sva(request: Request) -> Body:
    """The address space of a process."""
    assert request.pid is not None
    engine = request.engine
    if engine.processes >= MAX_PROCESSES:
        raise request.command.refuse(
            errno.ENOSPC, f"{MAX_PROCESSES} IOASIDs stand for processes already: free one first"
        )
    try:
        process = open_process(request.pid)
    except IoasidError as error:
        raise request.command.refuse(error.errno or 0, error.sentence) from error
    try:
        request.core.create_process_space(request.core_id, process.memory)
    except BaseException:
        process.close()
        raise
    engine.processes += 1
    return ProcessBody(engine, request.core_id, process)


@dataclass(slots=True)
class ProcessBody:
    """A process's address space in the core, and the process itself, held as long as the IOASID is."""

    engine: Engine
    core_id: int
    process: Process

    def close(self) -> None:
        self.engine.core.destroy_space(self.core_id)
        self.process.close()
        self.engine.processes -= 1


def user(request: Request) -> Body:
    """A place for a table of the guest's beneath the parent's."""
    assert request.parent is not None
    request.core.create_nested_space(request.core_id, request.parent.core_id)
    return CoreBody(request.core, request.core_id)


MAKERS: Mapping[Kind, Callable[[Request], Body]] = MappingProxyType(
    {Kind.KERNEL: kernel, Kind.SVA: sva, Kind.VM: vm, Kind.USER: user}
)
"""Raise IoasidError (by the request's command), or a CoreError that stands for want of room; nothing is made then."""
