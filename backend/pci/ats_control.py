"""The address translation service of a function, as its guest controls it (PCI Express Base 5.0, 10.3 and 10.5.1)."""

from __future__ import annotations

from collections.abc import Callable

from backend.pci.capabilities import Ats
from backend.pci.config_space import ConfigSpace
from backend.pci.device_tlb import PAGE, DeviceTlb

CONTROL = 6
ENABLE, SMALLEST_UNIT = 1 << 15, 0x1F

Announce = Callable[[DeviceTlb | None], None]


class AtsControl:
    """The control register of the ATS capability, and the device TLB that it switches."""

    def __init__(self, config: ConfigSpace, capability: Ats | None, changed: Callable[[], None]) -> None:
        """`changed` is called when the guest has switched the service on or off."""
        self._config = config
        self._base = config.find(Ats.id, extended=True) or 0
        self._changed = changed
        self._announce: Announce | None = None
        self._kept = DeviceTlb()
        self.tlb: DeviceTlb | None = None
        """None while the service is off, or the function has none."""
        if capability is not None:
            config.on_write(self._base + CONTROL, 2, self._written)

    def connect(self, announce: Announce | None) -> None:
        """`announce` is told of the TLB that is to hear of invalidations from now on, None: of none, at each change."""
        self._announce = announce
        if announce is not None:
            announce(self.tlb)

    def forget(self) -> None:
        """Implicit invalidation, as at a change of what a PASID may do."""
        self._kept.clear()

    def reset(self) -> None:
        """The registers are reset."""
        self._kept.unit = PAGE
        self._switch(False)

    def _written(self) -> None:
        control = self._config.read(self._base + CONTROL, 2)
        self._kept.unit = PAGE << (control & SMALLEST_UNIT)
        if self._switch(bool(control & ENABLE)):
            self._changed()

    def _switch(self, on: bool) -> bool:
        """On or off, whether that is a change; either way nothing is kept from before (10.3.9)."""
        if on is (self.tlb is not None):
            return False
        self._kept.clear()
        self.tlb = self._kept if on else None
        if self._announce is not None:
            self._announce(self.tlb)
        return True
