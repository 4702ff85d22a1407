"""One connection: its context, the memory its client shares, the devices it holds."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from backend.core import Access
from backend.ioasid import Context, IoasidError
from protocol import Connection

from .shared_memory import SharedMemory

if TYPE_CHECKING:
    from .contexts import Contexts


class ClientMemory:
    """The client's addresses: what it shared as a memfd is mapped here."""

    def __init__(self) -> None:
        self.shared = SharedMemory()

    def hva(self, vaddr: int, size: int, access: Access) -> int:
        """Where the client's [vaddr, vaddr + size) is mapped here. EFAULT: not shared; EPERM: shared read-only."""
        share = self.shared.find(vaddr, size)
        if share is None:
            raise IoasidError(
                errno.EFAULT,
                f"vaddr [{vaddr:#x}, {vaddr + size:#x}) lies in no memory you shared: memory.share it first",
            )
        if access & Access.WRITE and not share.writable:
            raise IoasidError(errno.EPERM, f"vaddr {vaddr:#x} was shared read-only: map it for reading alone")
        return share.hva + vaddr - share.vaddr

    def vaddr(self, hva: int) -> int | None:
        """The client's address for one of ours."""
        return self.shared.vaddr_of(hva)


class Session:
    """State of one connection. What it owns goes when it goes: `closed`."""

    def __init__(self, contexts: Contexts, connection: Connection) -> None:
        self._contexts = contexts
        self.connection = connection
        self.pid = connection.peer.pid
        self.memory = ClientMemory()
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
