"""What stands behind a new IOASID: one maker a kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from backend.core import Core

from .command import Command
from .formats import PgtableFormat
from .kinds import Kind
from .spaces import Body, CoreBody, Space


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of ALLOC or CREATE_NESTING: `format` is on offer for the kind, `parent` host-managed or None."""

    command: Command
    """To refuse with."""
    core: Core
    core_id: int
    """Of the space in the core that the maker makes."""
    format: PgtableFormat
    parent: Space | None
    pid: int | None


def kernel(request: Request) -> Body:
    """A table of ours, empty."""
    request.core.create_host_space(request.core_id, fmt=request.format.vendor, levels=request.format.levels)
    return CoreBody(request.core, request.core_id)


def user(request: Request) -> Body:
    """A place for a table of the guest's beneath the parent's."""
    assert request.parent is not None
    request.core.create_nested_space(request.core_id, request.parent.core_id)
    return CoreBody(request.core, request.core_id)


MAKERS: Mapping[Kind, Callable[[Request], Body]] = MappingProxyType({Kind.KERNEL: kernel, Kind.USER: user})
"""Raise IoasidError (by the request's command), or a CoreError that stands for want of room; nothing is made then."""
