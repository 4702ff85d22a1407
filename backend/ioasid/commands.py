"""The commands of the uAPI as one table: number, fields with their units, kinds they are legal on, errors.

Source: "[RFC] /dev/ioasid uAPI proposal", v1 section 4 for names and numbers; errno habits are those of Linux
iommufd. Whoever calls a command (a front end, a test, the guest) passes through `Command.check`, and nothing is
refused with an errno that the command's row does not list.
"""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from backend.core import RW, Access

from .errors import IoasidError
from .formats import PAGE_SIZE
from .kinds import Kind
from .limits import MAX_PASID, MAX_RID

COMMON_ERRORS = MappingProxyType({errno.EBADF: "the context was closed"})
"""What any command can answer."""

U32_END = 1 << 32
U64_END = 1 << 64


def _number(value: object, end: int) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return "is no number"
    return None if 0 <= value < end else f"does not lie in [0, {end:#x})"


def _pages(value: object, end: int) -> str | None:
    wrong = _number(value, end)
    if wrong is None and isinstance(value, int) and value % PAGE_SIZE:
        return f"is not a multiple of {PAGE_SIZE}: round it to whole pages"
    return wrong


def _access(value: object) -> str | None:
    if not isinstance(value, Access) or int(value) > int(RW):
        return "is none of read, write and both"
    return None


def _name(value: object) -> str | None:
    return None if isinstance(value, str) and value else "is no name"


class Unit(Enum):
    """What a field holds: its description, and a check that answers with what is wrong or None."""

    IOASID = ("number local to the context", lambda v: _number(v, U32_END))
    RID = ("bus/device/function, 16 bits", lambda v: _number(v, MAX_RID + 1))
    PASID = ("20 bits", lambda v: _number(v, MAX_PASID + 1))
    ADDRESS = ("bytes, a multiple of 4096", lambda v: _pages(v, U64_END))
    SIZE = (
        "bytes, a multiple of 4096, not 0",
        lambda v: "is 0: name at least one page" if v == 0 else _pages(v, U64_END + 1),
    )
    LENGTH = ("bytes, a multiple of 4096, may be 0", lambda v: _pages(v, U64_END + 1))
    COUNT = ("number", lambda v: _number(v, U32_END))
    COOKIE = ("64 bits chosen by the user", lambda v: _number(v, U64_END))
    ACCESS = ("READ, WRITE or both", _access)
    NAME = ("name", _name)
    FLAG = ("yes or no", lambda v: None if isinstance(v, bool) else "is neither yes nor no")

    def __init__(self, text: str, check: Callable[[object], str | None]) -> None:
        self.text = text
        self.check = check


@dataclass(frozen=True, slots=True)
class Field:
    """One input of a command. An optional one may be None."""

    name: str
    unit: Unit
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """One row. `number`: n of _IO(IOASID_TYPE, IOASID_BASE + n) where v1 has one; `kinds`: of the IOASID that it
    names."""

    name: str
    number: int | None
    summary: str
    fields: tuple[Field, ...] = ()
    kinds: frozenset[Kind] = frozenset(Kind)
    errors: Mapping[int, str] = field(default_factory=dict)

    @property
    def takes_ioasid(self) -> bool:
        """Whether a field names an IOASID."""
        return any(each.unit is Unit.IOASID for each in self.fields)

    def refuse(self, code: int, sentence: str) -> IoasidError:
        """The error to raise. An errno that the row does not list is a mistake of ours: KeyError."""
        if code not in self.errors and code not in COMMON_ERRORS:
            raise KeyError(f"{self.name} does not list {errno.errorcode[code]} (while refusing: {sentence})")
        return IoasidError(code, f"{self.name}: {sentence}")

    def check(self, **values: object) -> None:
        """Raise EINVAL where a field does not hold what its unit says."""
        for each in self.fields:
            value = values[each.name]
            if value is None and each.optional:
                continue
            wrong = each.unit.check(value)
            if wrong is not None:
                shown = f"{value:#x}" if isinstance(value, int) else repr(value)
                raise self.refuse(errno.EINVAL, f"{each.name} {shown} {wrong}")

    def check_range(self, name: str, start: int, size: int) -> None:
        """Raise EOVERFLOW where start + size wraps around 64 bits."""
        if start + size > U64_END:
            raise self.refuse(errno.EOVERFLOW, f"{name} {start:#x} + size {size:#x} goes past 2^64: shorten it")


_UNKNOWN = "no IOASID of this number in this context"
_FIELD = "a field does not hold what its unit says"
_NOT_BOUND = "the device is not bound to this context"
_IOASID = Field("ioasid", Unit.IOASID)
_RID = Field("rid", Unit.RID)
_PASID = Field("pasid", Unit.PASID, optional=True)
_FORMAT = (Field("vendor", Unit.NAME), Field("levels", Unit.COUNT))
_ON_KERNEL = frozenset({Kind.KERNEL})
_ON_USER = frozenset({Kind.USER})

ALLOC = Command(
    "ALLOC",
    3,
    "a new IOASID of a kind and a format; answers with its number",
    (Field("kind", Unit.NAME), *_FORMAT),
    errors={
        errno.EINVAL: _FIELD + ", or the kind cannot stand without a parent",
        errno.EOPNOTSUPP: "no such kind, or the format is not offered for it",
        errno.ENOSPC: "the context has all the IOASIDs, or the engine all the tables, it may have",
        errno.ENOMEM: "no memory for the table",
    },
)
FREE = Command(
    "FREE",
    4,
    "an IOASID goes, with all it maps",
    (_IOASID,),
    errors={errno.EINVAL: _FIELD, errno.ENOENT: _UNKNOWN, errno.EBUSY: "it has children or attached devices"},
)
GET_INFO = Command(
    "GET_INFO",
    5,
    "what an IOASID is and what can be asked of it",
    (_IOASID,),
    errors={errno.EINVAL: _FIELD, errno.ENOENT: _UNKNOWN},
)
MAP_DMA = Command(
    "MAP_DMA",
    6,
    "[iova, iova + size) stands for the user's memory at vaddr",
    (
        _IOASID,
        Field("iova", Unit.ADDRESS),
        Field("vaddr", Unit.ADDRESS),
        Field("size", Unit.SIZE),
        Field("access", Unit.ACCESS),
    ),
    _ON_KERNEL,
    {
        errno.EINVAL: _FIELD + ", the IOASID is guest-managed, or the range lies beyond its address width",
        errno.ENOENT: _UNKNOWN,
        errno.EFAULT: "no memory of the user: the null page, beyond 2^47, or not shared",
        errno.EPERM: "the user's memory may not be written",
        errno.EOVERFLOW: "iova + size or vaddr + size wraps",
        errno.EEXIST: "a part of the range is mapped",
        errno.ENOSPC: "the IOASID has all the mappings, or the engine all the tables, it may have",
        errno.ENOMEM: "no memory for the table",
    },
)
UNMAP_DMA = Command(
    "UNMAP_DMA",
    7,
    "a mapping goes; nothing uses it once this returned",
    (_IOASID, Field("iova", Unit.ADDRESS), Field("size", Unit.SIZE)),
    _ON_KERNEL,
    {
        errno.EINVAL: _FIELD + ", the IOASID is guest-managed, or the size is not the one that was mapped",
        errno.ENOENT: _UNKNOWN + ", or no mapping begins at iova",
        errno.EOVERFLOW: "iova + size wraps",
    },
)
CREATE_NESTING = Command(
    "CREATE_NESTING",
    8,
    "a guest-managed IOASID beneath a host-managed one; answers with its number",
    (Field("parent", Unit.IOASID),),
    _ON_KERNEL,
    {
        errno.EINVAL: _FIELD + ", or the parent is guest-managed",
        errno.ENOENT: _UNKNOWN,
        errno.ENOSPC: "the context has all the IOASIDs, or the parent all the children, it may have",
        errno.ENOMEM: "no memory for it",
    },
)
BIND_PGTABLE = Command(
    "BIND_PGTABLE",
    9,
    "the guest's page table at GPA root serves every device attached to this child",
    (_IOASID, Field("root", Unit.ADDRESS), *_FORMAT, Field("accessed", Unit.FLAG), Field("dirty", Unit.FLAG)),
    _ON_USER,
    {
        errno.EINVAL: _FIELD
        + ", the IOASID is host-managed, root is wider than the format's table addresses, or dirty without accessed",
        errno.ENOENT: _UNKNOWN,
        errno.EBUSY: "a table is bound already",
        errno.EOPNOTSUPP: "a format that GET_INFO does not list",
    },
)
UNBIND_PGTABLE = Command(
    "UNBIND_PGTABLE",
    10,
    "the guest's page table goes; DMA through the child faults from then on",
    (_IOASID,),
    _ON_USER,
    {errno.EINVAL: _FIELD + ", the IOASID is host-managed, or no table is bound", errno.ENOENT: _UNKNOWN},
)
INVALIDATE_CACHE = Command(
    "INVALIDATE_CACHE",
    13,
    "what is cached of the guest's table is forgotten: all of it, or a range",
    (_IOASID, Field("granularity", Unit.NAME), Field("iova", Unit.ADDRESS), Field("size", Unit.LENGTH)),
    _ON_USER,
    {
        errno.EINVAL: _FIELD + ", the IOASID is host-managed, or the range does not fit the granularity",
        errno.ENOENT: _UNKNOWN,
        errno.EOPNOTSUPP: "no such granularity",
        errno.EOVERFLOW: "iova + size wraps",
    },
)
BIND_IOASID_FD = Command(
    "BIND_IOASID_FD",
    None,
    "a device belongs to this context, under a cookie that the user chose",
    (_RID, Field("cookie", Unit.COOKIE, optional=True)),
    errors={errno.EINVAL: _FIELD, errno.ENODEV: "no such device", errno.EBUSY: "the device is bound already"},
)
UNBIND_IOASID_FD = Command(
    "UNBIND_IOASID_FD",
    None,
    "a device leaves this context",
    (_RID,),
    errors={
        errno.EINVAL: f"{_FIELD}, or {_NOT_BOUND}",
        errno.ENODEV: "no such device",
        errno.EBUSY: "the device is attached",
    },
)
ATTACH_IOASID = Command(
    "ATTACH_IOASID",
    None,
    "DMA of a device (or of one of its PASIDs) goes through this IOASID",
    (_RID, _IOASID, _PASID, Field("access", Unit.ACCESS)),
    errors={
        errno.EINVAL: f"{_FIELD}, {_NOT_BOUND}, or the IOASID is a child and the device is not attached to its parent",
        errno.ENODEV: "no such device",
        errno.ENOENT: _UNKNOWN,
        errno.EBUSY: "the device (or PASID) is attached already",
        errno.ENOSPC: "the device has all the attachments, or the engine all the routes, it may have",
        errno.ENOMEM: "no memory for the route",
    },
)
DETACH_IOASID = Command(
    "DETACH_IOASID",
    None,
    "the newest attachment of a device (or PASID) goes; routing returns to the parent beneath it, if any",
    (_RID, _PASID),
    errors={
        errno.EINVAL: f"{_FIELD}, or {_NOT_BOUND}",
        errno.ENODEV: "no such device",
        errno.ENOENT: "the device (or PASID) is not attached",
        errno.EBUSY: "a PASID of the device is attached to a child of the IOASID",
    },
)

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        command.name: command
        for command in (
            *(
                ALLOC,
                FREE,
                GET_INFO,
                MAP_DMA,
                UNMAP_DMA,
                CREATE_NESTING,
                BIND_PGTABLE,
                UNBIND_PGTABLE,
                INVALIDATE_CACHE,
            ),
            *(BIND_IOASID_FD, UNBIND_IOASID_FD, ATTACH_IOASID, DETACH_IOASID),
        )
    }
)
"""Every command, by name."""
