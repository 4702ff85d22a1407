"""Calls into C: numbers on the way in, statuses and faults on the way out."""

from __future__ import annotations

from typing import Any

from backend.core._native import ffi, lib
from backend.core.answers import Access, AddressType, Fault, Reason, Translation
from backend.core.errors import ERRORS, BadValueError, CoreError, UnknownIdError
from backend.core.path import Path, Step

NO_PASID: int = lib.VIO_NO_PASID
ANY_PASID: int = lib.VIO_ANY_PASID
"""In place of a PASID where requests are led: all those of a device that have no route of their own."""


class _Translated(int):
    """No number that a guest could name is one of these."""


TRANSLATED = _Translated(lib.VIO_TRANSLATED)
"""In place of the PASID of requests that carry translated addresses (ATS), and of where they are led."""
LAST_ADDRESS = (1 << 64) - 1
MAX_IOASID = (1 << 32) - 1
PAGE = 4096
MAX_DIRTY_BITS = 1 << 30
"""A bitmap of dirty pages is made for the caller: 128 MiB stand for 4 TiB of pages, and he may ask again."""


def check(status: int, ioasid: int | None = None, iova: int | None = None, size: int | None = None) -> None:
    if status:
        raise ERRORS.get(status, CoreError)(ioasid=ioasid, iova=iova, size=size)


def fault_of(status: int) -> Fault:
    """Return this thread's last fault, or raise what the negative status stands for."""
    if status < 0:
        check(status)
    return fault_record(lib.vio_last_fault())


def fault_record(fault: Any) -> Fault:
    """Return a vio_fault as Python sees it."""
    return Fault(
        rid=fault.rid,
        pasid=None if fault.pasid in (NO_PASID, TRANSLATED) else fault.pasid,
        ioasid=fault.ioasid,
        iova=fault.iova,
        access=Access(fault.access),
        stage=fault.stage,
        level=fault.level,
        gpa=fault.gpa if fault.has_gpa else None,
        entry=fault.entry,
        reason=Reason(fault.reason),
        done=fault.done,
        pasid_table=bool(fault.pasid_table),
        table=bool(fault.table),
        type=AddressType(fault.type),
        middle=fault.middle if fault.has_middle else None,
    )


def path_of(path: Any, rid: int, pasid: int | None, iova: int, access: Access) -> Path:
    """Return a vio_path as Python sees it."""
    nested = path.parent != 0
    stage1, stage2 = (path.format, path.parent_format) if nested else (-1, path.format)
    found = path.translation
    return Path(
        rid=rid,
        pasid=pasid,
        iova=iova,
        access=access,
        ioasid=path.ioasid or None,
        parent=path.parent or None,
        stage1=_format_name(stage1),
        stage2=_format_name(stage2),
        middle=_format_name(path.middle_format),
        steps=tuple(_step(path.steps[i]) for i in range(path.count)),
        result=Translation(found.hva, found.size, found.gpa, Access(found.access))
        if path.found
        else fault_record(path.fault),
    )


def _step(step: Any) -> Step:
    known = not step.permissions & lib.VIO_PRIVILEGED
    return Step(
        stage=step.stage,
        level=step.level,
        table_of=step.table_of or None,
        pasid_table=bool(step.pasid_table),
        middle=bool(step.middle),
        input=step.input,
        address=step.address,
        entry=step.entry if step.read else None,
        leaf=bool(step.decoded and not step.next),
        output=step.output if step.decoded else None,
        size=1 << step.size_lg2 if step.decoded and not step.next else None,
        access=Access(step.permissions) if known else None,
        accessed=None if step.accessed < 0 else bool(step.accessed),
        dirty=None if step.dirty < 0 else bool(step.dirty),
        reason=Reason(step.reason) if step.reason else None,
    )


def _format_name(number: int) -> str | None:
    return None if number < 0 else ffi.string(lib.vio_format_name(number)).decode()


def beyond(rid: int, pasid: int | None, iova: int, access: Access) -> Fault:
    """Answer a request whose numbers are not of 64 bits: a device added to an address until it left the space."""
    if iova <= LAST_ADDRESS:
        raise BadValueError("a request's numbers must fit their fields: RID 16 bits, addresses, sizes and values 64")
    return Fault(
        rid=rid,
        pasid=None if pasid is TRANSLATED else pasid,
        ioasid=0,
        iova=iova,
        access=access,
        stage=0,
        level=0,
        gpa=None,
        entry=0,
        reason=Reason.ADDRESS_WIDTH,
        done=0,
        type=AddressType.TRANSLATED if pasid is TRANSLATED else AddressType.UNTRANSLATED,
    )


def number(value: int, limit: int, name: str) -> int:
    if not 0 <= value <= limit:
        raise BadValueError(f"{name} is {value}: it must be within 0 and {limit:#x}")
    return value


def address(value: int, name: str) -> int:
    return number(value, LAST_ADDRESS, name)


def ioasid_of(ioasid: int) -> int:
    return number(ioasid, MAX_IOASID, "ioasid")


def small(value: int) -> int:
    """Return a number that C takes as 32 bits and judges itself."""
    return number(value, MAX_IOASID, "argument")


def pasid_of(pasid: int | None) -> int:
    if pasid is None:
        return NO_PASID
    return pasid if pasid is TRANSLATED else number(pasid, (1 << 20) - 1, "pasid")


def route_pasid(pasid: int | None) -> int:
    """Return the PASID of a route, which may be ANY_PASID."""
    return ANY_PASID if pasid == ANY_PASID else pasid_of(pasid)


def bitmap_for(iova: int, size: int, page_size: int) -> tuple[bytearray, int]:
    """Return a bitmap of a range's pages, all clear, and log2 of the page size."""
    address(iova, "iova")
    address(size, "size")
    if page_size < PAGE or page_size & (page_size - 1) or not size or (iova | size) & (page_size - 1):
        raise BadValueError(
            f"{size:#x} bytes at IOVA {iova:#x} by pages of {page_size:#x}: the page size must be a power of two, 4 KiB"
            " or more, that divides both"
        )
    if size // page_size > MAX_DIRTY_BITS:
        raise BadValueError(f"{size // page_size} pages at once: {MAX_DIRTY_BITS} at most")
    return bytearray((size // page_size + 7) // 8), page_size.bit_length() - 1


def format_of(name: str) -> int:
    number: int = lib.vio_format_find(name.encode())
    if number < 0:
        raise UnknownIdError(f"no page-table format is named {name!r}")
    return number
