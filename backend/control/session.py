"""One connection: its context, the memory its client shares, the devices it holds."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from backend.core import FOREIGN, Access, HostProcess
from backend.ioasid import Context, IoasidError, Process, open_process
from backend.ioasid.limits import USER_END
from protocol import Connection

from .shared_memory import SharedMemory

if TYPE_CHECKING:
    from .contexts import Contexts


class ClientMemory:
    """The client's addresses. What it shared as a memfd is mapped here, the fast way; the rest is reached where it is,
    in the client's process."""

    def __init__(self, pid: int | None = None, shared: SharedMemory | None = None) -> None:
        """`pid`: of the client; None: what it did not share cannot be reached."""
        self.shared = shared if shared is not None else SharedMemory()
        self._pid = pid
        self._held: Process | None = None

    @property
    def process(self) -> HostProcess | None:
        """The client's, once something of it was asked for that it did not share."""
        return self._held.memory if self._held is not None else None

    def hva(self, vaddr: int, size: int, access: Access) -> int:
        """Where the client's [vaddr, vaddr + size) is mapped here; where it shared nothing, the same address, FOREIGN.

        EFAULT: shared in parts, or no addresses of a process; EPERM: shared read-only, or the process may not be
        touched.
        """
        share = self.shared.find(vaddr, size)
        if share is None:
            return self._own(vaddr, size) | FOREIGN
        if access & Access.WRITE and not share.writable:
            raise IoasidError(errno.EPERM, f"vaddr {vaddr:#x} was shared read-only: map it for reading alone")
        return share.hva + vaddr - share.vaddr

    def _own(self, vaddr: int, size: int) -> int:
        where = f"vaddr [{vaddr:#x}, {vaddr + size:#x})"
        if self._pid is None:
            raise IoasidError(errno.EFAULT, f"{where} lies in no memory you shared: memory.share it first")
        if self.shared.touches(vaddr, size):
            raise IoasidError(errno.EFAULT, f"{where} lies in memory you shared, in parts: map each by itself")
        if not 0 < vaddr <= USER_END - size:
            raise IoasidError(errno.EFAULT, f"{where} are no addresses of a process: give those of a mapping of yours")
        if self._held is None:
            try:
                self._held = open_process(self._pid)
            except IoasidError as error:
                code = errno.EPERM if error.errno == errno.EPERM else errno.EFAULT
                raise IoasidError(code, f"{where} cannot be reached, memory.share it: {error.sentence}") from error
        return vaddr

    def vaddr(self, hva: int) -> int | None:
        """The client's address for one of ours, or for a FOREIGN one."""
        return hva & ~FOREIGN if hva & FOREIGN else self.shared.vaddr_of(hva)

    def close(self) -> None:
        """Give all of it back. No IOASID may map it."""
        self.shared.close()
        if self._held is not None:
            self._held.close()
            self._held = None


class Session:
    """State of one connection. What it owns goes when it goes: `closed`."""

    def __init__(self, contexts: Contexts, connection: Connection) -> None:
        self._contexts = contexts
        self.connection = connection
        self.pid = connection.peer.pid
        budgets = contexts.budgets
        shared = SharedMemory(budgets.shared_bytes.account(), budgets.shared_ranges.account())
        self.memory = ClientMemory(self.pid, shared)
        self.held: set[int] = set()
        """RIDs of endpoints that this connection holds as an open device file would."""
        self._context: Context | None = None

    @property
    def context(self) -> Context:
        """Opened with the first command: who only looks has none. ENOSPC: the engine has all it may have."""
        if self._context is None:
            self._context = self._contexts.open(self)
        return self._context

    @property
    def own(self) -> Context | None:
        """The context, if it was opened."""
        return self._context

    def take_fd(self, what: str) -> int:
        """The one file descriptor sent with the request under way; the caller closes it. EINVAL: none, or several."""
        fds = self.connection.take_fds()
        if len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise IoasidError(
                errno.EINVAL, f"{what}: {len(fds)} files came with the request: send one memfd by SCM_RIGHTS"
            )
        return fds[0]

    def closed(self) -> None:
        """The connection is gone."""
        self._contexts.left(self)
