"""A process whose memory requests can reach."""

from __future__ import annotations

from typing import Any

from backend.core._native import ffi, lib
from backend.core.native import check, small

FOREIGN: int = lib.VIO_FOREIGN
"""Set in an address that is one of another process's."""


class HostProcess:
    """Holds a process's address space, so that another one which has its pid later on is never taken for it.

    Its permission to be touched (ptrace(2)) is checked by the kernel at each request. Spaces of any core can stand for
    it; they hold it as well.
    """

    def __init__(self, pid: int, pagemap: int) -> None:
        """`pagemap`: file descriptor of its /proc/PID/pagemap, by which its end is seen; duplicated.

        Raises: BadValueError (no such descriptor), LimitError (descriptors of this process), NoMemoryError.
        """
        self.pid = pid
        out = ffi.new("vio_process **")
        check(lib.vio_process_hold(small(pid), small(pagemap), out))
        self.native: Any = ffi.gc(out[0], lib.vio_process_release)

    def close(self) -> None:
        """Let go of it; it is held as long as a space stands for it."""
        ffi.release(self.native)
