"""What the core answers: a translation or a fault, and what it counts. Numbers are those of api.h."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

from backend.core._native import lib


class Access(IntFlag):
    """What a request does; also what a mapping or a route permits."""

    READ = lib.VIO_READ
    WRITE = lib.VIO_WRITE
    EXECUTE = lib.VIO_EXECUTE
    PRIVILEGED = lib.VIO_PRIVILEGED
    """Of a request: with supervisor privilege."""


RW = Access.READ | Access.WRITE


class AddressType(IntEnum):
    """What the address of a request is: the AT field of PCI Express (Base Specification 5.0, 10.2.1)."""

    UNTRANSLATED = 0
    TRANSLATION_REQUEST = lib.VIO_AT_REQUEST
    """Untranslated, and the request asks for no more than its translation."""
    TRANSLATED = lib.VIO_AT_TRANSLATED


class Reason(IntEnum):
    """Why a request was answered by a fault; one table for every page-table format."""

    explain: str
    """The reason in a sentence."""

    def __new__(cls, number: int, explain: str = "") -> Reason:
        member = int.__new__(cls, number)
        member._value_, member.explain = number, explain
        return member

    NO_ROUTE = lib.VIO_REASON_NO_ROUTE, "Nobody said where requests of this (RID, PASID) go."
    BLOCKED = lib.VIO_REASON_BLOCKED, "The route exists and lets nothing through."
    NOT_BOUND = lib.VIO_REASON_NOT_BOUND, "The route leads to a nested space that has no table."
    NOT_PRESENT = lib.VIO_REASON_NOT_PRESENT, "The entry is not present."
    PERMISSION = lib.VIO_REASON_PERMISSION, "The route (stage 0) or an entry (stage 1, 2) does not permit the access."
    RESERVED_BITS = lib.VIO_REASON_RESERVED_BITS, "A reserved bit of the entry is set."
    ADDRESS_WIDTH = (
        lib.VIO_REASON_ADDRESS_WIDTH,
        "Address bits beyond what the table or a skipped level covers; stage 0: the request wraps around 2^64.",
    )
    BAD_LEVEL = lib.VIO_REASON_BAD_LEVEL, "The entry's next level or page size is not legal where it stands."
    MISALIGNED = (
        lib.VIO_REASON_MISALIGNED,
        "A leaf's base is not aligned to its size; stage 0: a single store or load is not aligned to its width.",
    )
    MEMORY_GONE = (
        lib.VIO_REASON_MEMORY_GONE,
        "The memory was taken away by its owner. Stage 1: that of a table entry; stage 2: that of the data.",
    )
    BUS_MASTER_OFF = lib.VIO_REASON_BUS_MASTER_OFF, "The function may not send requests; said by the layers above."
    ENTRY_CHANGED = lib.VIO_REASON_ENTRY_CHANGED, "The entry changed at every attempt to set its accessed or dirty bit."
    ACCESS_FLAG = lib.VIO_REASON_ACCESS_FLAG, "The accessed bit is clear, and hardware is not to set it."
    DIRTY = lib.VIO_REASON_DIRTY, "The dirty bit is clear at a write, and hardware is not to set it."
    UNSUPPORTED = (
        lib.VIO_REASON_UNSUPPORTED,
        "Memory of another process serves neither AtomicOps nor walks of tables that lie in it.",
    )
    PASID_OFF = lib.VIO_REASON_PASID_OFF, "The function may not send this PASID; said by the layers above."
    ATS_OFF = (
        lib.VIO_REASON_ATS_OFF,
        "The route serves neither translation requests nor requests with translated addresses (ATS).",
    )
    WITHHELD = (
        lib.VIO_REASON_WITHHELD,
        "Another process's memory did not come in time: something keeps it (userfaultfd, a file system in user space).",
    )
    RESERVED_RANGE = (
        lib.VIO_REASON_RESERVED_RANGE,
        "Requests of the device to that address never reach memory: on x86 they are interrupts.",
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """A request that could not be served: an answer, not an exception."""

    rid: int
    pasid: int | None
    ioasid: int
    """0 without a route."""
    iova: int
    """Where in the request: the first byte that could not be reached, in the order in which bytes are moved."""
    access: Access
    stage: int
    """1: a table of the guest's; 2: ours; 0 if no walk took place."""
    level: int
    """Of the entry at fault, 1 holding the smallest leaves; 0 if none was at fault."""
    gpa: int | None
    """Stage 1: GPA of the table entry, or, over a table in the middle, the address that it has there; stage 2: the GPA
    that was to be translated."""
    entry: int
    """The entry as read, 0 if none was. Stage 2: it holds an address of this process, so not for a guest's eyes."""
    reason: Reason
    done: int
    """Bytes moved before the fault."""
    pasid_table: bool = False
    """It befell an entry of a PASID table: level (1: what describes an address space), gpa and entry are of that."""
    table: bool = False
    """It befell a table entry of stage 1 (its memory gone, or stage 2 not leading to it), and not the data."""
    type: AddressType = AddressType.UNTRANSLATED
    """What iova is."""
    middle: int | None = None
    """Three stages: the address that the guest's table in the middle was to translate. Stage 1 is that table then, not
    the one above it; stage 2 was met on the way from there. None: it was not at work."""


@dataclass(frozen=True, slots=True)
class Translation:
    """Where an IOVA lies."""

    hva: int
    """An address of this process; with FOREIGN set, one of the process that the space stands for or was lent."""
    size: int
    """Bytes valid from hva onward within this translation: to the end of the smaller page of both stages."""
    gpa: int
    access: Access
    """What both stages and the route permit."""


@dataclass(frozen=True, slots=True)
class Translations:
    """What `Core.translate_many` found: arrays as long as the IOVAs asked for, each a buffer (numpy.asarray).

    What is named as in Translation is 0 where the reason is not 0; what is named as in Fault is 0 where it is.
    """

    hva: memoryview
    """64 bits each; so are gpa, size, fault_gpa and entry. All others have 8."""
    gpa: memoryview
    size: memoryview
    access: memoryview
    reason: memoryview
    """0, or the Reason of the fault."""
    stage: memoryview
    level: memoryview
    fault_gpa: memoryview
    """`Fault.gpa`, 0 also where that is None."""
    entry: memoryview
    table: memoryview

    def __len__(self) -> int:
        return len(self.reason)


class Translated(NamedTuple):
    """What a device may keep of a translation request's answer: [iova, iova + size) lies at `address`."""

    iova: int
    size: int
    """Bytes, whole pages of 4 KiB; as many as are known, which may be more than were asked for."""
    address: int
    """For translated requests: an address of the host-managed space underneath, in a VM a GPA."""
    access: Access
    """What it may serve: writes only where the dirty bit is set or there is none."""


@dataclass(frozen=True, slots=True)
class AtsReply:
    """The answer to a translation request: the pages in order, without gaps, from the first one on."""

    translations: tuple[Translated, ...]
    fault: Fault | None
    """Why they end before the range does, at its iova; None: they do not, or there are too many for one answer."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals of a core since its creation, and what it holds now."""

    iotlb_hits: int
    iotlb_misses: int
    iotlb_evictions: int
    """Fills that displaced another entry, live or stale."""
    walks: int
    walk_cache_hits: int
    """Walks of nested spaces that knew their way down to the last table."""
    requests: int
    bytes: int
    faults: int
    spaces: int
    routes: int
    """Detached ones included: they keep their counters."""
    table_pages: int
    """4 KiB pages of tables the core built."""
    faults_dropped: int
    """Faults that found the ring of `Core.faults` full."""


@dataclass(frozen=True, slots=True)
class SpaceCounters:
    """Of one space since its creation."""

    requests: int
    bytes: int
    faults: int
    moved: int
    """Requests with an IOVA other than its GPA."""
    iotlb_hits: int
    iotlb_misses: int


@dataclass(frozen=True, slots=True)
class RouteCounters:
    """Of one (RID, PASID) since it was first attached; they go on over detach and attach."""

    requests: int
    bytes: int
    faults: int
    nested: int
    """Requests that led to a nested space: a guest's table stood between."""
    direct: int
    """Requests that led to a host-managed space. What had no route, or a blocked one, is neither."""
    moved: int
    """Requests with an IOVA other than its GPA."""
