"""Rows of the table of commands: IOASIDs themselves."""

import errno

from .command import Command, Field, Unit
from .rows import FORMAT, IOASID, NO_DEVICE, NOT_BOUND, ON_PARENT, UNKNOWN, WRONG

CHECK_EXTENSION = Command(
    "CHECK_EXTENSION",
    0,
    "whether something beyond v1 is to be had: a command, a kind, a format (format:x86)",
    (Field("extension", Unit.NAME),),
    errors={errno.EINVAL: WRONG},
    answer="1 or 0",
)
ALLOC = Command(
    "ALLOC",
    3,
    "a new IOASID of a kind and a format; of a guest-managed one parent and table in the same call",
    (
        Field("kind", Unit.NAME, True, "kernel, sva, vm or user"),
        *FORMAT,
        Field("parent", Unit.IOASID, True, "the IOASID beneath which it is nested, as of CREATE_NESTING"),
        Field("root", Unit.TABLE, True, "user: GPA of the guest's root table"),
        Field("pid", Unit.PID, True, "sva: the process"),
        Field("enforce_snoop", Unit.FLAG, True, "only devices whose DMA can be made coherent may be attached"),
    ),
    errors={
        errno.EINVAL: WRONG
        + ", or fields that do not go with the kind: user needs a parent, sva a process; or numbers that no table of "
        "the format has",
        errno.ENOENT: UNKNOWN + " (the parent)",
        errno.ESRCH: "no process of this pid with memory of its own",
        errno.EPERM: "the process may not be touched: ptrace(2) would be refused, or the context is a guest's",
        errno.EOPNOTSUPP: "no such kind, or the format is not offered for it",
        errno.ENOSPC: "the context has all the IOASIDs, the parent all the children or depth, "
        "or the engine all the tables and processes, it may have",
        errno.ENOMEM: "no memory for the table",
    },
    answer="the IOASID",
)
FREE = Command(
    "FREE",
    4,
    "an IOASID goes, with all it maps",
    (IOASID,),
    errors={errno.EINVAL: WRONG, errno.ENOENT: UNKNOWN, errno.EBUSY: "it has children or attached devices"},
)
GET_INFO = Command(
    "GET_INFO",
    5,
    "what an IOASID is and what can be asked of it; or of a device that was bound, what it can be given",
    (Field("ioasid", Unit.IOASID, True), Field("rid", Unit.RID, True, "in place of an IOASID")),
    errors={
        errno.EINVAL: f"{WRONG}, not one of both was given, or {NOT_BOUND}",
        errno.ENOENT: UNKNOWN,
        errno.ENODEV: NO_DEVICE,
    },
    answer="Info or DeviceInfo",
)
CREATE_NESTING = Command(
    "CREATE_NESTING",
    8,
    "an IOASID beneath a host-managed one: guest-managed (hardware nesting) or host-managed (software nesting); or a "
    "guest-managed one beneath one that is itself guest-managed, over a host-managed one",
    (Field("parent", Unit.IOASID), Field("kind", Unit.NAME, True, "user or kernel")),
    ON_PARENT,
    {
        errno.EINVAL: WRONG + ", or the parent is of kind sva; or it is guest-managed and the child is not, or its own "
        "parent is, too, or it has a PASID table",
        errno.ENOENT: UNKNOWN,
        errno.EOPNOTSUPP: "no nesting of this kind",
        errno.ENOSPC: "the context has all the IOASIDs, or the parent all the children or depth, it may have",
        errno.ENOMEM: "no memory for it",
    },
    answer="the IOASID",
)

ROWS = (CHECK_EXTENSION, ALLOC, FREE, GET_INFO, CREATE_NESTING)
