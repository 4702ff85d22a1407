"""What GET_INFO tells of an IOASID."""

from __future__ import annotations

from dataclasses import dataclass

from backend.core import Core, SpaceCounters

from .bodies import ProcessBody
from .commands import COMMANDS
from .formats import FORMATS, FormatRule, PgtableFormat
from .kinds import Kind
from .limits import USER_END
from .spaces import Space


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """A format on offer: BIND_PGTABLE's for a guest-managed IOASID, ALLOC's and nesting's for a host-managed one."""

    vendor: str
    levels: tuple[int, ...]
    address_widths: tuple[int, ...]
    """Bits, in the order of `levels`."""
    source: str


@dataclass(frozen=True, slots=True)
class Info:
    """The answer of GET_INFO."""

    ioasid: int
    kind: Kind
    format: PgtableFormat | None
    """Of the table in use; None for a guest-managed IOASID without one."""
    root: int | None
    """GPA of the bound root table."""
    address_width: int | None
    """Bits of an IOVA; None where no table says."""
    page_sizes: tuple[int, ...]
    """Bytes, smallest first."""
    pid: int | None
    """The process that one of kind sva stands for, while it runs: later on, its number may be another's."""
    parent: int | None
    children: int
    attachments: int
    mappings: int
    """What MAP_DMA mapped; of kind vm, the extents of the VM's memory."""
    mapped: int
    """Bytes."""
    commands: tuple[str, ...]
    """Those that take an IOASID and are legal on this kind."""
    bindable: tuple[FormatInfo, ...]
    """What BIND_PGTABLE takes: on this IOASID if it is guest-managed, else on children created beneath it."""
    counters: SpaceCounters


def describe(space: Space, core: Core) -> Info:
    """The answer for one IOASID."""
    kind = space.kind
    held = space.table.pieces if kind == Kind.VM else space.mappings
    has_format = kind in {Kind.KERNEL, Kind.VM} or space.bound_root is not None
    fmt = space.format if has_format else None
    rule = FORMATS[fmt.vendor] if fmt is not None else None
    bare = USER_END.bit_length() - 1 if kind == Kind.SVA else None
    return Info(
        ioasid=space.ioasid,
        kind=kind,
        format=fmt,
        root=space.bound_root,
        address_width=rule.address_width(fmt.levels) if rule is not None and fmt is not None else bare,
        page_sizes=rule.page_sizes(fmt.levels) if rule is not None and fmt is not None else (),
        pid=space.body.process.pid if isinstance(space.body, ProcessBody) and space.body.process.alive else None,
        parent=space.parent.ioasid if space.parent is not None else None,
        children=space.children,
        attachments=space.attachments,
        mappings=len(held),
        mapped=held.size,
        commands=tuple(
            command.name for command in COMMANDS.values() if command.takes_ioasid and space.kind in command.kinds
        ),
        bindable=tuple(_offer(rule) for rule in FORMATS.values() if Kind.USER in rule.kinds),
        counters=core.space_counters(space.core_id),
    )


def _offer(rule: FormatRule) -> FormatInfo:
    return FormatInfo(
        vendor=rule.vendor,
        levels=tuple(rule.levels),
        address_widths=tuple(rule.address_width(levels) for levels in rule.levels),
        source=rule.source,
    )
