"""Whose addresses MAP_DMA's `vaddr` are: this process's own, or those of a client elsewhere."""

from __future__ import annotations

import errno
from typing import Protocol

from backend.core import Access, HostProcess

from .errors import IoasidError
from .limits import USER_END


class UserMemory(Protocol):
    """The memory of a context's user."""

    @property
    def process(self) -> HostProcess | None:
        """Whose addresses `hva` marks as FOREIGN; None where it marks none."""

    def hva(self, vaddr: int, size: int, access: Access) -> int:
        """Where [vaddr, vaddr + size) of the user lies in this process, in one piece, or (FOREIGN) in `process`.

        Raises IoasidError: EFAULT it is no memory of the user; EPERM it is, but not for this access.
        """

    def vaddr(self, hva: int) -> int | None:
        """The user's address for one of this process; None where it has none."""


class NoMemory:
    """The user is a guest: no address that it can name is one of the host's. What it maps are addresses of its VM's
    memory, beneath an IOASID that stands for it."""

    process = None

    def hva(self, vaddr: int, size: int, access: Access) -> int:
        """EPERM."""
        raise IoasidError(
            errno.EPERM, f"vaddr {vaddr:#x} + {size:#x}: a guest has no addresses of the host, map beneath kind vm"
        )

    def vaddr(self, hva: int) -> int | None:
        """None."""
        return None


class OwnMemory:
    """The user is this process."""

    process = None

    def hva(self, vaddr: int, size: int, access: Access) -> int:
        """The same address. Whether something lies there shows when DMA reaches it."""
        if not 0 < vaddr <= USER_END - size:
            raise IoasidError(
                errno.EFAULT,
                f"vaddr {vaddr:#x} + {size:#x} is no memory of this process: give the address of a mapping",
            )
        return vaddr

    def vaddr(self, hva: int) -> int | None:
        """The same address."""
        return hva
