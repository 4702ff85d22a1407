"""Plain memory of this process in the part of guest RAM: for tests, measurements and whoever has no guest."""

from __future__ import annotations

import mmap
import os
from types import TracebackType
from typing import Any, Self

from backend.core._native import ffi
from backend.core.errors import BadValueError, ClosedError

PAGE = 4096
ALIGNMENT = 2 << 20
"""Of the first byte: as guest RAM is, so that mappings of it can use large leaves."""


class PlainMemory:
    """Zeroed memory, GPA 0 being its first byte; read and written by slices: `memory[gpa : gpa + 8]`.

    Args:
        size: bytes, whole 4 KiB pages. They cost nothing until they are touched.
        memfd: back it by an anonymous file, as a VM's shared memory is; its descriptor is `fd`.

    Raises:
        BadValueError: size.
    """

    def __init__(self, size: int, *, memfd: bool = False) -> None:
        if size <= 0 or size % PAGE:
            raise BadValueError(f"a size of {size} bytes: memory is whole pages of {PAGE}")
        self.size = size
        self.fd = -1
        padded = size + ALIGNMENT
        if memfd:
            self.fd = os.memfd_create("plain-memory")
            os.ftruncate(self.fd, padded)
            self._map = mmap.mmap(self.fd, padded)
        else:
            self._map = mmap.mmap(-1, padded, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._anchor: Any = ffi.from_buffer(self._map)
        start = int(ffi.cast("uintptr_t", self._anchor))
        self._skip = -start % ALIGNMENT
        self._view = memoryview(self._map)[self._skip : self._skip + size]
        self.file_offset = self._skip
        """Where the first byte lies in `fd`."""
        self.hva = start + self._skip
        """Address of the first byte in this process."""

    def __getitem__(self, place: slice) -> memoryview:
        return self._view[place]

    def __setitem__(self, place: slice, data: bytes | bytearray | memoryview) -> None:
        self._view[place] = data

    def __len__(self) -> int:
        return self.size

    @property
    def pointer(self) -> Any:
        """For C calls: `void *` of the first byte, valid until close."""
        if self._anchor is None:
            raise ClosedError
        return ffi.cast("void *", self.hva)

    def close(self) -> None:
        """Give the memory back: unmap it from every core and drop slices of it first, which keep it alive."""
        self._view.release()
        self._anchor = None
        self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
