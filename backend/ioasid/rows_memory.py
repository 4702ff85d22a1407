"""Rows of the table of commands: memory, and what the host maps."""

import errno

from .command import Command, Field, Unit
from .rows import IOASID, IOVA, ON_KERNEL, SIZE, UNKNOWN, WRONG

VADDR = Field("vaddr", Unit.ADDRESS, text="an address of the user's")

REGISTER_MEMORY = Command(
    "REGISTER_MEMORY",
    1,
    "memory is pinned and accounted, once for all that maps it; from then on nothing else can be mapped",
    (VADDR, SIZE),
    errors={
        errno.EINVAL: WRONG,
        errno.EOVERFLOW: "vaddr + size wraps",
        errno.EFAULT: "no memory of the user",
        errno.EPERM: "the user's memory may not be touched, or the user is a guest",
        errno.EEXIST: "a part of the range is registered",
        errno.ENOMEM: "more than the context may pin",
        errno.ENOSPC: "the context has all the registered ranges it may have",
    },
)
UNREGISTER_MEMORY = Command(
    "UNREGISTER_MEMORY",
    2,
    "memory is pinned no longer",
    (VADDR, SIZE),
    errors={
        errno.EINVAL: WRONG + ", or the size is not the one that was registered",
        errno.EOVERFLOW: "vaddr + size wraps",
        errno.ENOENT: "no registered range begins at vaddr",
        errno.EBUSY: "mappings use it",
    },
)
MAP_DMA = Command(
    "MAP_DMA",
    6,
    "[iova, iova + size) stands for the user's memory at vaddr; beneath a parent, for the parent's addresses there",
    (IOASID, IOVA, VADDR, SIZE, Field("access", Unit.ACCESS, True)),
    ON_KERNEL,
    {
        errno.EINVAL: WRONG + ", the IOASID is not host-managed, the range lies beyond its address width or is no "
        "multiple of its pages, its format has no such access, or the memory is not registered while other memory is",
        errno.ENOENT: UNKNOWN,
        errno.EFAULT: "no memory of the user: the null page, beyond 2^47, or not shared",
        errno.EPERM: "the user's memory may not be written, or the user is a guest, and vaddr no memory of its VM",
        errno.EOVERFLOW: "iova + size or vaddr + size wraps",
        errno.EEXIST: "a part of the range is mapped",
        errno.EADDRINUSE: "a part of the range is reserved by an attached device",
        errno.ENOSPC: "the IOASID has all the mappings, or the engine all the tables, it may have",
        errno.ENOMEM: "no memory for the table, or more than the context may pin",
    },
)
UNMAP_DMA = Command(
    "UNMAP_DMA",
    7,
    "a mapping goes; nothing uses it once this returned",
    (IOASID, IOVA, SIZE),
    ON_KERNEL,
    {
        errno.EINVAL: WRONG + ", the IOASID is not host-managed, or the size is not the one that was mapped",
        errno.ENOENT: UNKNOWN + ", or no mapping begins at iova",
        errno.EOVERFLOW: "iova + size wraps",
    },
)
SET_DIRTY_TRACKING = Command(
    "SET_DIRTY_TRACKING",
    None,
    "from now on, or no longer, it is noted which pages DMA writes, through children, too; off forgets",
    (IOASID, Field("on", Unit.FLAG)),
    ON_KERNEL,
    {
        errno.EINVAL: WRONG + ", or the IOASID is not host-managed",
        errno.ENOENT: UNKNOWN,
        errno.ENOSPC: "the engine has all the pages for it that it may have",
        errno.ENOMEM: "no memory for it",
    },
)
GET_DIRTY_BITMAP = Command(
    "GET_DIRTY_BITMAP",
    None,
    "which pages of a range were written",
    (
        IOASID,
        IOVA,
        SIZE,
        Field("page_size", Unit.BYTES, True, "that a bit stands for: a power of two that divides iova and size"),
        Field("clear", Unit.FLAG, True, "forget what was told"),
    ),
    ON_KERNEL,
    {
        errno.EINVAL: WRONG + ", the IOASID is not host-managed or not tracked, or page_size does not divide the range",
        errno.ENOENT: UNKNOWN,
        errno.EOVERFLOW: "iova + size wraps",
        errno.ENOMEM: "no memory for the bitmap, or it is too large for one answer",
    },
    answer="bytes: page i of the range in bit i % 8 of byte i // 8",
)

ROWS = (REGISTER_MEMORY, UNREGISTER_MEMORY, MAP_DMA, UNMAP_DMA, SET_DIRTY_TRACKING, GET_DIRTY_BITMAP)
