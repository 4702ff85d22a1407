"""What stands behind a new IOASID: one maker a kind."""

from __future__ import annotations

import errno
import os
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
from .share import Allowance
from .spaces import Body, CoreBody, Space

if TYPE_CHECKING:
    from .context import Context
    from .engine import Engine


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of ALLOC or CREATE_NESTING: `format` is on offer for the kind, as `parent` is."""

    command: Command
    """To refuse with."""
    context: Context
    core_id: int
    """Of the space in the core that the maker makes."""
    format: PgtableFormat
    parent: Space | None
    pid: int | None

    @property
    def engine(self) -> Engine:
        return self.context.engine

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
            request.context.merged_room,
            above,
            leave=leave,
            memory=request.context.memory,
            width=rule.address_width(fmt, host=True),
            write_only=rule.write_only,
        )
    except BaseException:
        request.core.destroy_space(request.core_id)
        raise


def sva(request: Request) -> Body:
    """The address space of a process."""
    assert request.pid is not None
    engine, allowance = request.engine, request.context.share.processes
    if engine.processes >= MAX_PROCESSES or not allowance.take():
        raise request.command.refuse(
            errno.ENOSPC, f"{engine.processes} IOASIDs stand for processes already: free one first"
        )
    try:
        process = open_process(request.pid)
        try:
            request.core.create_process_space(request.core_id, process.memory)
        except BaseException:
            process.close()
            raise
    except BaseException as error:
        allowance.give()
        if isinstance(error, IoasidError):
            raise request.command.refuse(error.errno or 0, error.sentence) from error
        raise
    engine.processes += 1
    return ProcessBody(engine, request.core_id, process, allowance)


@dataclass(slots=True)
class ProcessBody:
    """A process's address space in the core, and the process itself, held as long as the IOASID is."""

    engine: Engine
    core_id: int
    process: Process
    allowance: Allowance

    @property
    def foreign(self) -> bool:
        return self.process.pid != os.getpid()

    def close(self) -> None:
        self.engine.core.destroy_space(self.core_id)
        self.process.close()
        self.engine.processes -= 1
        self.allowance.give()


def user(request: Request) -> Body:
    """A place for a table of the guest's beneath the parent's."""
    assert request.parent is not None
    request.core.create_nested_space(request.core_id, request.parent.core_id)
    return CoreBody(request.core, request.core_id)


MAKERS: Mapping[Kind, Callable[[Request], Body]] = MappingProxyType(
    {Kind.KERNEL: kernel, Kind.SVA: sva, Kind.VM: vm, Kind.USER: user}
)
"""Raise IoasidError (by the request's command), or a CoreError that stands for want of room; nothing is made then."""
