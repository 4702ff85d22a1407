"""Memory of `vioasid ctl` itself, shared with the server as a VMM shares its guest's."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from backend.vm.errors import CannotRun
from backend.vm.machine import parse_size
from protocol import Client

DEFAULT_VADDR = 0x4000_0000
"""Where the RFC's examples have the VM's memory."""

MAX_SIZE = 1 << 40
"""Bytes; untouched ones cost nothing."""


class OwnMemory:
    """A memfd that stands at `vaddr`. Read and written here, by the methods memory.read and memory.write."""

    def __init__(self, text: str) -> None:
        """`text`: SIZE or SIZE@VADDR."""
        size, at, vaddr = text.partition("@")
        try:
            self.size = parse_size(size)
            self.vaddr = int(vaddr, 0) if at else DEFAULT_VADDR
        except ValueError as error:
            raise CannotRun(f"--memory {text}: give SIZE or SIZE@ADDRESS, as 1G@0x40000000") from error
        if not 0 < self.size <= MAX_SIZE or self.size % 4096:
            raise CannotRun(f"--memory {text}: a size is whole pages of 4 KiB, up to 1T")
        self._fd = os.memfd_create("vioasid-ctl")
        os.ftruncate(self._fd, self.size)

    async def share(self, client: Client) -> None:
        """Let the server map it."""
        await client.call("memory.share", descriptors=[self._fd], vaddr=self.vaddr, size=self.size)

    def read(self, *, vaddr: int, length: int) -> bytes:
        """memory.read."""
        return os.pread(self._fd, length, self._offset(vaddr, length))

    def write(self, *, vaddr: int, data: bytes | str = b"", value: int | None = None, width: int = 8) -> None:
        """memory.write: data, or a number of `width` bytes, little-endian."""
        raw = data.encode() if isinstance(data, str) else data
        if value is not None:
            raw = value.to_bytes(width, "little")
        os.pwrite(self._fd, raw, self._offset(vaddr, len(raw)))

    def call(self, method: str, fields: dict[str, Any]) -> Any:
        """Do what a line says. CannotRun where it is not right."""
        try:
            return self.read(**fields) if method == "memory.read" else self.write(**fields)
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CannotRun(
                f"{method}: {error}; memory.read vaddr= length=, memory.write vaddr= data= (or value= width=)"
            ) from error

    def close(self) -> None:
        """Give it back."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _offset(self, vaddr: int, length: int) -> int:
        if not 0 <= vaddr - self.vaddr <= self.size - length:
            raise ValueError(f"{vaddr:#x} + {length:#x} lies outside [{self.vaddr:#x}, {self.vaddr + self.size:#x})")
        return vaddr - self.vaddr
