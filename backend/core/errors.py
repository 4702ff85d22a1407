"""Errors of the core: misuse by this process's own code. What a guest does wrong is a `Fault`, an answer.

CoreError                     root of all; carries the IOASID and the range the call was about, where it had them
├── BadValueError             an address, size, level or access that cannot be
├── UnknownIdError            no such space, route or format
├── ExistsError               the IOASID is in use
├── BusyError                 the space still has children or routes
├── OverlapError              part of the range is mapped already
├── NotMappedError            part of the range is not mapped
├── KindError                 this kind of space has no such operation
├── LimitError                a bound of the core is reached
├── NoMemoryError             the host has no memory left
├── BufferGoneError           the caller's own buffer (a mapped file) went away under the call
├── UntrackedError            dirty pages were asked for, and the space does not track them
└── ClosedError               the core was closed
"""

from __future__ import annotations

from typing import Final

from backend.core._native import lib


class CoreError(Exception):
    """Root of the core's errors. Attributes say what the call was about; None where it did not apply."""

    meaning = "the core refused the call"

    def __init__(
        self, message: str = "", *, ioasid: int | None = None, iova: int | None = None, size: int | None = None
    ) -> None:
        where = "" if ioasid is None else f" (IOASID {ioasid}"
        if where and iova is not None:
            where += f", IOVA {iova:#x}" + ("" if size is None else f", {size:#x} bytes")
        super().__init__((message or self.meaning) + (where and where + ")"))
        self.ioasid = ioasid
        self.iova = iova
        self.size = size


class BadValueError(CoreError):
    meaning = (
        "addresses and sizes must be whole pages (4 KiB, or Arm's granule) inside the table's reach, levels, options"
        " and access legal in its format"
    )


class UnknownIdError(CoreError):
    meaning = "no such space, route or format"


class ExistsError(CoreError):
    meaning = "a space of this IOASID exists"


class BusyError(CoreError):
    meaning = "the space still has children or routes: destroy and detach them first"


class OverlapError(CoreError):
    meaning = "part of the range is mapped already: unmap it first"


class NotMappedError(CoreError):
    meaning = "part of the range is not mapped"


class KindError(CoreError):
    meaning = "this kind of space has no such operation, or the format cannot stand there"


class LimitError(CoreError):
    meaning = "a bound of the core is reached"


class NoMemoryError(CoreError):
    meaning = "the host has no memory left"


class BufferGoneError(CoreError):
    meaning = "the buffer given to the call is a mapping that went away (file truncated?)"


class UntrackedError(CoreError):
    meaning = "the space does not track dirty pages: switch that on first"


class ClosedError(CoreError):
    meaning = "the core is closed"


ERRORS: Final[dict[int, type[CoreError]]] = {
    lib.VIO_ERR_VALUE: BadValueError,
    lib.VIO_ERR_UNKNOWN: UnknownIdError,
    lib.VIO_ERR_EXISTS: ExistsError,
    lib.VIO_ERR_BUSY: BusyError,
    lib.VIO_ERR_OVERLAP: OverlapError,
    lib.VIO_ERR_NOT_MAPPED: NotMappedError,
    lib.VIO_ERR_KIND: KindError,
    lib.VIO_ERR_LIMIT: LimitError,
    lib.VIO_ERR_MEMORY: NoMemoryError,
    lib.VIO_ERR_BUFFER: BufferGoneError,
    lib.VIO_ERR_UNTRACKED: UntrackedError,
}
