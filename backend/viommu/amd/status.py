"""The status register, and the interrupt that its bits raise (sections 3.3.13 and 2.1.5 of publication 48882)."""

from collections.abc import Callable

from backend.pci.registers import RegisterTable
from backend.viommu.amd.registers import CONTROL, STATUS, Control, Status

_INTERRUPTS = (
    (Control.EVENT_INT_EN, Status.EVENT_LOG_INT | Status.EVENT_OVERFLOW),
    (Control.COM_WAIT_INT_EN, Status.COM_WAIT_INT),
    (Control.PPR_INT_EN, Status.PPR_INT | Status.PPR_OVERFLOW),
)
"""Bits of the control register, and those of the status register that interrupt while they are set."""


class StatusRegister:
    """Changes of the status register from the IOMMU's side. `interrupt` raises the one MSI that all sources share."""

    def __init__(self, registers: RegisterTable, interrupt: Callable[[], None]) -> None:
        self._registers = registers
        self._interrupt = interrupt
        self._raised = 0
        """Status bits whose interrupt was raised and which software has not cleared since."""

    def __and__(self, bits: int) -> int:
        return self._registers[STATUS] & bits

    def change(self, *, set_: int = 0, clear: int = 0) -> None:
        self._registers[STATUS] = self._registers[STATUS] & ~clear | set_
        self.update()

    def update(self) -> None:
        """One interrupt when a status bit and its enable bit have come together, the next after software cleared it."""
        control = self._registers[CONTROL]
        wanted = 0
        for enable, bits in _INTERRUPTS:
            wanted |= bits if control & enable else 0
        wanted &= self._registers[STATUS]
        if wanted & ~self._raised:
            self._interrupt()
        self._raised = wanted

    def reset(self) -> None:
        self._raised = 0
