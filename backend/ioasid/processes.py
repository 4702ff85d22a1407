"""Processes of the host whose address spaces IOASIDs stand for."""

from __future__ import annotations

import ctypes
import errno
import os
import select
from dataclasses import dataclass

from backend.core import HostProcess, LimitError

from .errors import IoasidError


class _IoVec(ctypes.Structure):
    """struct iovec of <sys/uio.h>."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


NO_ADDRESS = 1 << 63

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


@dataclass(slots=True, eq=False)
class Process:
    """A process and its address space, held by descriptors: its pid may be another's once it has ended."""

    pid: int
    pidfd: int
    memory: HostProcess
    """Bound to the address space: what the core takes."""

    @property
    def alive(self) -> bool:
        """Whether the process itself still runs."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.pidfd)
        self.memory.close()


def open_process(pid: int) -> Process:
    """Hold a process whose memory this one may touch.

    Raises IoasidError: ESRCH no such process, or it has no memory (it ended; a kernel thread); EPERM ptrace(2) would
    not be let: another user's without CAP_SYS_PTRACE, not dumpable, or forbidden by kernel.yama.ptrace_scope; ENOSPC
    this process has all the descriptors it may have.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise _refusal(pid, error) from error
    except OverflowError as error:  # wider than any pid
        raise _refusal(pid, OSError(errno.ESRCH, "")) from error
    try:
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            process = Process(pid, pidfd, HostProcess(pid, pagemap))
        finally:
            os.close(pagemap)
    except (OSError, LimitError) as error:
        os.close(pidfd)
        raise _refusal(pid, error if isinstance(error, OSError) else OSError(errno.EMFILE, "")) from error
    why = _access(pid)
    if not why and not process.alive:  # so up to here, the number was this one's
        why = errno.ESRCH
    if why:
        process.close()
        raise _refusal(pid, OSError(why, os.strerror(why)))
    return process


def _access(pid: int) -> int:
    """0, or the errno with which the kernel refuses to let us touch a process. It is asked for an address that none
    has: the null page could be mapped, and withheld."""
    byte = ctypes.create_string_buffer(1)
    local, remote = _IoVec(ctypes.addressof(byte), 1), _IoVec(NO_ADDRESS, 1)
    if _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) >= 0:
        return 0
    why = ctypes.get_errno()
    return 0 if why == errno.EFAULT else why  # the permission comes first: who gets as far as the page may touch it


def _refusal(pid: int, error: OSError) -> IoasidError:
    if error.errno in {errno.EPERM, errno.EACCES}:
        return IoasidError(
            errno.EPERM,
            f"process {pid} may not be touched: it is another user's, hides its memory, or kernel.yama.ptrace_scope "
            "forbids it; become its user or have CAP_SYS_PTRACE",
        )
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return IoasidError(errno.ENOSPC, f"no file descriptors are left to hold process {pid}: free an IOASID first")
    return IoasidError(errno.ESRCH, f"no process {pid} with memory of its own: give the pid of one that runs")
