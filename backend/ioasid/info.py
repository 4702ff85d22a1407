"""What GET_INFO tells of an IOASID and of a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backend.core import Core, RouteCounters, SpaceCounters

from .bodies import ProcessBody
from .commands import COMMANDS
from .device import Device
from .formats import FORMATS, FormatRule, PgtableFormat
from .kinds import Kind
from .limits import USER_END
from .pasid_formats import PASID_FORMATS, PasidTableFormat
from .spaces import Space
from .traits import Window


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """A format on offer: BIND_PGTABLE's for a guest-managed IOASID, ALLOC's and nesting's for a host-managed one."""

    vendor: str
    levels: tuple[int, ...]
    address_widths: tuple[int, ...]
    """Bits, in the order of `levels`: of a guest's table, at most."""
    granules: tuple[int, ...]
    """Bytes of the smallest page; the usual one first."""
    options: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class PasidTableInfo:
    """A PASID table on offer for BIND_PASID_TABLE."""

    vendor: str
    leads_to: tuple[str, ...]
    """Page-table formats of what it finds."""
    fields: tuple[str, ...]
    """Numbers that it takes."""
    options: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class IovaRange:
    """From the first address to the last: where one ends may be no number of 64 bits."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ReservedRange:
    """IOVAs that a device cannot use, from the first to the last."""

    first: int
    last: int
    why: str


@dataclass(frozen=True, slots=True)
class Info:
    """The answer of GET_INFO for an IOASID."""

    ioasid: int
    kind: Kind
    format: PgtableFormat | None
    """Of the table in use; None for a guest-managed IOASID without one."""
    pasid_table: PasidTableFormat | None
    """Of the bound PASID table."""
    root: int | None
    """GPA of the bound table."""
    address_width: int | None
    """Bits of an IOVA; None where no table says."""
    page_sizes: tuple[int, ...]
    """Bytes, smallest first."""
    reserved: tuple[ReservedRange, ...]
    """IOVAs that attached devices cannot use."""
    pid: int | None
    """The process that one of kind sva stands for, while it runs: later on, its number may be another's."""
    enforce_snoop: bool
    parent: int | None
    children: int
    attachments: int
    mappings: int
    """What MAP_DMA mapped; of kind vm, the extents of the VM's memory."""
    mapped: int
    """Bytes."""
    nesting: tuple[str, ...]
    """What CREATE_NESTING can put beneath it: hardware (guest-managed), software (host-managed)."""
    commands: tuple[str, ...]
    """Those that take an IOASID and are legal on this kind."""
    bindable: tuple[FormatInfo, ...]
    """What BIND_PGTABLE takes: on this IOASID if it is guest-managed, else on children created beneath it."""
    pasid_tables: tuple[PasidTableInfo, ...]
    """What BIND_PASID_TABLE takes, likewise."""
    counters: SpaceCounters


@dataclass(frozen=True, slots=True)
class AttachmentInfo:
    """What (device, PASID) is attached to; the last one of a PASID routes."""

    pasid: int | None
    """As the guest sees it."""
    ioasid: int
    ats: bool
    """The device may ask for translations."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The answer of GET_INFO for a device."""

    rid: int
    name: str
    cookie: int | None
    group: str
    group_rids: tuple[int, ...]
    """All that must move together."""
    formats: tuple[FormatInfo, ...]
    """Of tables that the IOMMU before it can walk, in either stage."""
    pasid_tables: tuple[PasidTableInfo, ...]
    """None where its PASIDs come from a pool."""
    page_sizes: tuple[int, ...]
    """Bytes of mappings that every format has."""
    permitted: tuple[IovaRange, ...]
    """IOVAs that it can use."""
    reserved: tuple[ReservedRange, ...]
    nesting: tuple[str, ...]
    pasid_bits: int
    pasid_mode: str
    ats: bool
    """It can ask for translations."""
    snoop: bool
    """Its DMA can be made coherent."""
    attachments: tuple[AttachmentInfo, ...]
    counters: RouteCounters
    """Of its requests without a PASID."""


def describe(space: Space, core: Core) -> Info:
    """The answer for one IOASID."""
    kind = space.kind
    held = space.table.pieces if kind == Kind.VM else space.mappings
    fmt = space.table_format
    rule = FORMATS[fmt.vendor] if fmt is not None else None
    bare = USER_END.bit_length() - 1 if kind == Kind.SVA else None
    host = kind in {Kind.KERNEL, Kind.VM}
    return Info(
        ioasid=space.ioasid,
        kind=kind,
        format=fmt,
        pasid_table=space.pasid_table.format if space.pasid_table is not None else None,
        root=space.bound_root,
        address_width=rule.address_width(fmt, host=host) if rule is not None and fmt is not None else bare,
        page_sizes=rule.page_sizes(fmt) if rule is not None and fmt is not None else (),
        reserved=_reserved({window for windows in space.windows for window in windows}),
        pid=space.body.process.pid if isinstance(space.body, ProcessBody) and space.body.process.alive else None,
        enforce_snoop=space.enforce_snoop,
        parent=space.parent.ioasid if space.parent is not None else None,
        children=space.children,
        attachments=space.attachments,
        mappings=len(held),
        mapped=held.size,
        nesting=_nesting(space),
        commands=_LEGAL[kind],
        bindable=_BINDABLE,
        pasid_tables=_PASID_TABLES,
        counters=core.space_counters(space.core_id),
    )


def _nesting(space: Space) -> tuple[str, ...]:
    if space.kind in {Kind.KERNEL, Kind.VM}:
        return ("hardware", "software")
    middle = space.kind == Kind.USER and space.parent is space.host and space.pasid_table is None
    return ("hardware",) if middle else ()


def describe_device(device: Device) -> DeviceInfo:
    """The answer for one device."""
    traits = device.traits
    rules = [rule for rule in FORMATS.values() if traits.formats is None or rule.vendor in traits.formats]
    walked = {rule.vendor for rule in rules}
    delegable = traits.pasid_bits and traits.pasid_mode == "whole"
    return DeviceInfo(
        rid=device.rid,
        name=device.name,
        cookie=device.cookie,
        group=device.group.name,
        group_rids=tuple(each.rid for each in device.group.devices),
        formats=tuple(_offer(rule) for rule in rules),
        pasid_tables=tuple(each for each in _PASID_TABLES if delegable and walked.issuperset(each.leads_to)),
        page_sizes=(1 << 12, 1 << 21, 1 << 30),
        permitted=tuple(IovaRange(start, end - 1) for start, end in traits.permitted()),
        reserved=_reserved(device.windows),
        nesting=("hardware", "software"),
        pasid_bits=traits.pasid_bits,
        pasid_mode=traits.pasid_mode,
        ats=traits.ats,
        snoop=traits.snoop,
        attachments=tuple(
            AttachmentInfo(device.virtual(pasid), each.space.ioasid, each.ats)
            for pasid, stack in device.stacks.items()
            for each in stack
        ),
        counters=device.port.counters,
    )


def _reserved(windows: Iterable[Window]) -> tuple[ReservedRange, ...]:
    ordered = sorted(windows, key=lambda window: window.start)
    return tuple(ReservedRange(window.start, window.end - 1, window.why) for window in ordered)


def _offer(rule: FormatRule) -> FormatInfo:
    return FormatInfo(
        vendor=rule.vendor,
        levels=tuple(rule.levels),
        address_widths=tuple(rule.widest(levels) for levels in rule.levels),
        granules=rule.granules,
        options=rule.options,
        source=rule.source,
    )


_BINDABLE = tuple(_offer(rule) for rule in FORMATS.values() if Kind.USER in rule.kinds)
_PASID_TABLES = tuple(
    PasidTableInfo(rule.vendor, rule.leads_to, rule.numbers, rule.options, rule.source)
    for rule in PASID_FORMATS.values()
)
_LEGAL = {
    kind: tuple(each.name for each in COMMANDS.values() if each.takes_ioasid and kind in each.kinds) for kind in Kind
}
