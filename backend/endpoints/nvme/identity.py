"""Who the controller says it is, the same in config space and in Identify."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from backend.pci.ids import PciIds

MODEL = "vioasid NVMe Controller"
FIRMWARE = "1.0"

# 0x1234 belongs to no member of the PCI-SIG; the stock driver binds by class and has no quirk for it.
PCI_IDS = PciIds(vendor=0x1234, device=0x10A5, class_code=0x010802)


@dataclass(frozen=True, slots=True)
class Identity:
    """Names a guest tells controllers apart by. `serial`: up to 20 printable ASCII characters."""

    serial: str

    def __post_init__(self) -> None:
        if not self.serial.isascii() or not self.serial.isprintable() or not 1 <= len(self.serial) <= 20:
            raise ValueError(f"serial number {self.serial!r}: give 1 to 20 printable ASCII characters")

    @classmethod
    def named(cls, name: str) -> Identity:
        """The identity of a function of this name: two in one machine must differ, or the guest takes one for both."""
        fitting = "".join(letter for letter in name if letter.isascii() and letter.isprintable())
        return cls(serial=f"vioasid-{fitting}"[:20])

    @property
    def subsystem_name(self) -> str:
        """The NVMe Qualified Name in its UUID form (7.9), the same for the same serial number."""
        return f"nqn.2014-08.org.nvmexpress:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, 'vioasid.' + self.serial)}"
