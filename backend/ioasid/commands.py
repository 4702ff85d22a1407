"""The commands of the uAPI as one table: number, fields with their units, kinds they are legal on, errors.

Source: "[RFC] /dev/ioasid uAPI proposal", v1 section 4 for names and numbers; errno habits are those of Linux
iommufd. Whoever calls a command (a front end, a test, the guest) passes through `Command.check`, and nothing is
refused with an errno that the command's row does not list.
"""

import errno
from collections.abc import Mapping
from types import MappingProxyType

from .command import Command, Field, Unit
from .kinds import Kind

_UNKNOWN = "no IOASID of this number in this context"
_FIELD = "a field does not hold what its unit says"
_NOT_BOUND = "the device is not bound to this context"
_IOASID = Field("ioasid", Unit.IOASID)
_RID = Field("rid", Unit.RID)
_PASID = Field("pasid", Unit.PASID, optional=True)
_FORMAT = (Field("vendor", Unit.NAME), Field("levels", Unit.COUNT))
_ON_KERNEL = frozenset({Kind.KERNEL})
_ON_HOST_TABLE = frozenset({Kind.KERNEL, Kind.VM})
_ON_USER = frozenset({Kind.USER})

ALLOC = Command(
    "ALLOC",
    3,
    "a new IOASID of a kind and a format; answers with its number",
    (
        Field("kind", Unit.NAME),
        *_FORMAT,
        Field("accessed", Unit.FLAG),
        Field("dirty", Unit.FLAG),
        Field("parent", Unit.IOASID, optional=True),
        Field("root", Unit.ADDRESS, optional=True),
        Field("pid", Unit.COUNT, optional=True),
    ),
    errors={
        errno.EINVAL: _FIELD + ", or fields that do not go with the kind: user needs a parent, sva a process",
        errno.ENOENT: _UNKNOWN + " (the parent)",
        errno.EOPNOTSUPP: "no such kind, or the format is not offered for it",
        errno.ENOSPC: "the context has all the IOASIDs, or the engine all the tables and processes, it may have",
        errno.ENOMEM: "no memory for the table",
        errno.ESRCH: "no process of this pid with memory of its own",
        errno.EPERM: "the process may not be touched: ptrace(2) would be refused",
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
    "[iova, iova + size) stands for the user's memory at vaddr; beneath a parent, for the parent's addresses",
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
    "an IOASID beneath a host-managed one, guest-managed or (kernel) host-managed; answers with its number",
    (Field("parent", Unit.IOASID), Field("kind", Unit.NAME)),
    _ON_HOST_TABLE,
    {
        errno.EINVAL: _FIELD + ", or the parent has no table of the host's (sva, user)",
        errno.EOPNOTSUPP: "no nesting of this kind",
        errno.ENOENT: _UNKNOWN,
        errno.ENOSPC: "the context has all the IOASIDs, the parent all the children or depth, it may have",
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
