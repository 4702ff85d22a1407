"""Rows of the table of commands: tables of the guest's."""

import errno

from .command import Command, Field, Unit
from .rows import FORMAT, IOASID, IOVA, NO_DEVICE, NOT_BOUND, ON_USER, PASID, RID, SIZE, UNKNOWN, WRONG

_BIND_ERRORS = {
    errno.ENOENT: UNKNOWN,
    errno.EBUSY: "a table is bound already",
    errno.EOPNOTSUPP: "a format or an option that GET_INFO does not list",
    errno.ENOSPC: "the engine has all the routes it may have",
    errno.ENOMEM: "no memory for it",
}

BIND_PGTABLE = Command(
    "BIND_PGTABLE",
    9,
    "the guest's page table at GPA root serves every device attached to this child",
    (IOASID, Field("root", Unit.TABLE, text="GPA of the root table"), *FORMAT),
    ON_USER,
    {
        errno.EINVAL: WRONG + ", the IOASID is not guest-managed, root does not fit the format's root tables, numbers "
        "that no table of the format has, or a device that is attached cannot walk it",
        **_BIND_ERRORS,
    },
)
UNBIND_PGTABLE = Command(
    "UNBIND_PGTABLE",
    10,
    "the guest's page table goes; DMA through the child faults from then on",
    (IOASID,),
    ON_USER,
    {errno.EINVAL: WRONG + ", the IOASID is not guest-managed, or no page table is bound", errno.ENOENT: UNKNOWN},
)
BIND_PASID_TABLE = Command(
    "BIND_PASID_TABLE",
    11,
    "the guest's PASID table at GPA root serves all PASIDs of every device attached to this child",
    (
        IOASID,
        Field("root", Unit.TABLE, text="GPA of the root table or directory"),
        Field("vendor", Unit.NAME, True, "the format's name, as GET_INFO lists it"),
        Field("levels", Unit.COUNT, True, "AMD GLX + 1; RISC-V PD8, PD17, PD20"),
        Field("pasid_bits", Unit.COUNT, True, "VT-d PDTS + 13; Arm S1CDMax; AMD PASmax + 1"),
        Field("leaf", Unit.BYTES, True, "Arm: of a lower table; 0: the table is linear"),
        Field("table_levels", Unit.COUNT, True, "AMD: of the page tables found"),
        Field("output_width", Unit.BITS, True, "of the addresses in entries; 0: the usual one"),
        Field("options", Unit.NAMES, True, "of the page tables found, as GET_INFO lists them"),
        Field("untagged", Unit.NAME, True, "requests without a PASID: blocked, parent (past the child), or pasid"),
        Field("untagged_pasid", Unit.PASID, True, "whose table they use then"),
    ),
    ON_USER,
    {
        errno.EINVAL: WRONG + ", the IOASID is not guest-managed, root does not fit the format, numbers that no table "
        "of it has, the IOASID has children, or a device that is attached has its PASIDs from elsewhere",
        **_BIND_ERRORS,
    },
)
UNBIND_PASID_TABLE = Command(
    "UNBIND_PASID_TABLE",
    12,
    "the guest's PASID table goes; DMA through the child faults from then on",
    (IOASID,),
    ON_USER,
    {errno.EINVAL: WRONG + ", the IOASID is not guest-managed, or no PASID table is bound", errno.ENOENT: UNKNOWN},
)
INVALIDATE_CACHE = Command(
    "INVALIDATE_CACHE",
    13,
    "what is cached of the guest's tables is forgotten; one invalidation, or an array that ends at the first bad one",
    (
        IOASID,
        Field("granularity", Unit.NAME, True, "all, range (of one PASID or of all), pasid, or device"),
        Field("iova", Unit.ADDRESS, True),
        Field("size", Unit.LENGTH, True),
        PASID,
        Field("rid", Unit.RID, True, "granularity device: whose; else: of this device's TLB alone"),
        Field("caches", Unit.NAMES, True, "iotlb, device-tlb, pasid; none: all there are"),
        Field("entries", Unit.ENTRIES, True, "records of the fields above but ioasid, in place of them"),
    ),
    ON_USER,
    {
        errno.EINVAL: f"{WRONG}, the IOASID is not guest-managed, fields that do not go with the granularity, "
        f"a PASID or a device that does not use the IOASID, or {NOT_BOUND}",
        errno.ENOENT: UNKNOWN,
        errno.ENODEV: NO_DEVICE,
        errno.EOPNOTSUPP: "no such granularity, or no such cache",
        errno.EOVERFLOW: "iova + size wraps",
    },
    answer="for entries: how many were done, and why the next one was not",
)
LOOKUP = Command(
    "LOOKUP",
    None,
    "the whole path of one IOVA: every entry of every table, and where it ends; without a trace of it",
    (
        IOASID,
        Field("iova", Unit.COUNT64, text="any byte"),
        PASID,
        Field("access", Unit.ACCESS, True, "that it is for"),
    ),
    errors={
        errno.EINVAL: WRONG + ", or access is none",
        errno.ENOENT: UNKNOWN,
        errno.ENOSPC: "the engine has all the routes it may have",
        errno.ENOMEM: "no memory for it",
    },
    answer="Path",
)

PREFETCH = Command(
    "PREFETCH",
    None,
    "translations that a device will need are looked for now, as its reads would; nothing happens where there are none",
    (RID, IOVA, SIZE, PASID),
    errors={
        errno.EINVAL: f"{WRONG}, more than 1 MiB, or {NOT_BOUND}",
        errno.ENODEV: NO_DEVICE,
        errno.EOVERFLOW: "iova + size wraps",
    },
    group="vfio",
)

ROWS = (BIND_PGTABLE, UNBIND_PGTABLE, BIND_PASID_TABLE, UNBIND_PASID_TABLE, INVALIDATE_CACHE, LOOKUP, PREFETCH)
