"""PASIDs of a function: which it may put on its requests (PCI Express Base 5.0, 6.20 and 7.8.8)."""

from __future__ import annotations

from collections.abc import Callable

from backend.core import RW, Access
from backend.pci.capabilities import Pasid
from backend.pci.config_space import ConfigSpace

CONTROL = 6
ENABLE, EXECUTE, PRIVILEGED = 1 << 0, 1 << 1, 1 << 2
_READ_WRITE = int(RW)


class PasidControl:
    """The control register of the PASID capability; without the capability nothing can be enabled."""

    def __init__(self, config: ConfigSpace, capability: Pasid | None, changed: Callable[[], None]) -> None:
        """`changed` is called when the guest enables or disables something here."""
        self._config = config
        self._base = config.find(Pasid.id, extended=True) or 0
        self._changed = changed
        self._limit = 1 << capability.width if capability is not None else 0
        self._control = 0
        if capability is not None:
            config.on_write(self._base + CONTROL, 2, self._written)

    @property
    def enabled(self) -> bool:
        """Whether requests may carry a PASID."""
        return bool(self._control & ENABLE)

    def may_send(self, pasid: int | None, access: Access) -> bool:
        """Whether a request with this PASID (None: without one) and access may leave the function.

        Only requests with a PASID can ask to execute or be privileged, and only where that is enabled, too (6.20.2).
        """
        if pasid is not None and not (self._control & ENABLE and 0 <= pasid < self._limit):
            return False
        wanted = int(access)  # operators of an IntFlag cost as much as all else here
        if wanted <= _READ_WRITE:
            return True
        needed = (EXECUTE if wanted & Access.EXECUTE.value else 0) | (
            PRIVILEGED if wanted & Access.PRIVILEGED.value else 0
        )
        return pasid is not None and not needed & ~self._control

    def reset(self) -> None:
        """The registers are reset."""
        self._control = 0

    def _written(self) -> None:
        control = self._config.read(self._base + CONTROL, 2)
        if control != self._control:
            self._control = control
            self._changed()
