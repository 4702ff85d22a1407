"""Rows of the table of commands: devices, PASIDs and faults."""

import errno

from .command import Command, Field, Unit
from .rows import IOASID, NO_DEVICE, NOT_BOUND, PASID, RID, UNKNOWN, WRONG

VPASID = Field("vpasid", Unit.PASID, True, "a PASID as the guest sees it, in place of pasid")

BIND_IOASID_FD = Command(
    "BIND_IOASID_FD",
    None,
    "a device belongs to this context, under a cookie that the user chose",
    (RID, Field("cookie", Unit.COOKIE, optional=True)),
    errors={
        errno.EINVAL: WRONG,
        errno.ENODEV: NO_DEVICE,
        errno.EBUSY: "the device is bound already, or a device of its group to another context",
    },
    group="vfio",
)
UNBIND_IOASID_FD = Command(
    "UNBIND_IOASID_FD",
    None,
    "a device leaves this context",
    (RID,),
    errors={
        errno.EINVAL: f"{WRONG}, or {NOT_BOUND}",
        errno.ENODEV: NO_DEVICE,
        errno.EBUSY: "the device, or one of its group, is attached",
    },
    group="vfio",
)
ATTACH_IOASID = Command(
    "ATTACH_IOASID",
    None,
    "DMA of a device (or of one of its PASIDs) goes through this IOASID",
    (
        *(RID, IOASID, PASID, VPASID),
        Field("access", Unit.ACCESS, True, "what requests may do at most"),
        Field("ats", Unit.FLAG, True, "the device may ask for translations (ATS) and use them; not otherwise"),
        Field("direct_iova", Unit.ADDRESS, True, "where requests without a PASID are not translated (AMD: exclusion)"),
        Field("direct_size", Unit.LENGTH, True, "0: nowhere"),
    ),
    errors={
        errno.EINVAL: f"{WRONG}; {NOT_BOUND}; the IOASID is a child and the device (or its whole group) is not "
        "attached to its parent; the group is elsewhere or not bound as a whole; a format that the device's IOMMU "
        "cannot walk; a PASID where the PASID table is the guest's own, none where the device tags all requests, or "
        "one that it does not have; a device that cannot be made to snoop, and the IOASID enforces it; "
        "ats for a device without, for a process, or over another host-managed IOASID than its other attachments; "
        "direct addresses with a PASID, or without a size",
        errno.ENODEV: NO_DEVICE,
        errno.ENOENT: UNKNOWN,
        errno.EBUSY: "the device (or PASID) is attached already",
        errno.EADDRINUSE: "a mapping lies where the device's IOVAs are reserved",
        errno.EOVERFLOW: "direct_iova + direct_size wraps",
        errno.ENOSPC: "the device has all the attachments or PASIDs, or the engine all the routes, it may have",
        errno.ENOMEM: "no memory for the route",
    },
    group="vfio",
)
DETACH_IOASID = Command(
    "DETACH_IOASID",
    None,
    "the newest attachment of a device (or PASID) goes; routing returns to the parent beneath it, if any",
    (RID, PASID, VPASID),
    errors={
        errno.EINVAL: f"{WRONG}, or {NOT_BOUND}",
        errno.ENODEV: NO_DEVICE,
        errno.ENOENT: "the device (or PASID) is not attached",
        errno.EBUSY: "a PASID of the device is attached to a child of the IOASID; or a PASID of its group at all",
    },
    group="vfio",
)
MAP_PASID = Command(
    "MAP_PASID",
    None,
    "work that the guest submits with this PASID (ENQCMD) reaches devices under the PASID of its host",
    (Field("pasid", Unit.PASID, text="as the guest sees it"), IOASID),
    errors={
        errno.EINVAL: WRONG + ", or no device is attached to the IOASID under a PASID of the global pool",
        errno.ENOENT: UNKNOWN,
        errno.EEXIST: "the PASID is mapped",
        errno.ENOSPC: "all the PASIDs are mapped that there may be",
    },
    group="kvm",
)
UNMAP_PASID = Command(
    "UNMAP_PASID",
    None,
    "work that the guest submits with this PASID is refused from now on",
    (Field("pasid", Unit.PASID, text="as the guest sees it"),),
    errors={errno.EINVAL: WRONG, errno.ENOENT: "the PASID is not mapped"},
    group="kvm",
)
READ_FAULTS = Command(
    "READ_FAULTS",
    None,
    "the faults that nobody read yet, oldest first: page requests, which wait for PAGE_RESPONSE, and others",
    (Field("count", Unit.COUNT, True, "at most so many; 0: all"),),
    errors={errno.EINVAL: WRONG},
    answer="records, and how many more were lost for want of room",
)
PAGE_RESPONSE = Command(
    "PAGE_RESPONSE",
    None,
    "a group of page requests is answered, after what it asked for was mapped, or cannot be",
    (
        RID,
        Field("group", Unit.GROUP),
        Field("code", Unit.NAME, text="success: try again; invalid: there is no such memory; failure: ask no more"),
        Field("pasid", Unit.PASID, True, "as in the record, where it had one"),
    ),
    errors={
        errno.EINVAL: f"{WRONG}, or {NOT_BOUND}",
        errno.ENODEV: NO_DEVICE,
        errno.ENOENT: "no such group waits for an answer: not asked, answered, timed out, or its last page is to come",
        errno.EOPNOTSUPP: "no such code",
    },
)

ROWS = (
    *(BIND_IOASID_FD, UNBIND_IOASID_FD, ATTACH_IOASID, DETACH_IOASID),
    *(MAP_PASID, UNMAP_PASID, READ_FAULTS, PAGE_RESPONSE),
)
