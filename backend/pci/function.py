"""One PCI function: the class to write a device with."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from backend.pci.ats_control import Announce, AtsControl
from backend.pci.bars import Bar
from backend.pci.capabilities import (
    EXP_DEVCTL_FLR,
    PMCSR,
    PMCSR_STATE,
    Ats,
    Capability,
    Msi,
    Msix,
    Pasid,
    PciExpress,
    PowerManagement,
    Pri,
)
from backend.pci.config_space import COMMAND, COMMAND_BUS_MASTER, ConfigSpace
from backend.pci.device_memory import DeviceMemory
from backend.pci.device_tlb import DeviceTlb
from backend.pci.ids import PciIds
from backend.pci.interrupts import Interrupts, Signal
from backend.pci.page_requests import PageRequests, Send
from backend.pci.pasid_control import PasidControl

if TYPE_CHECKING:
    from backend.pci.dma import DmaPort, FunctionPort

C = TypeVar("C", bound=Capability)


class ResetKind(enum.Enum):
    """Why a function is reset."""

    DEVICE = "device"
    """The client asked for it: a machine starts or reboots."""
    FLR = "flr"
    """The guest asked for it through the PCIe capability (PCIe 5.0, 6.6.2)."""
    LOST_CONNECTION = "lost connection"
    """The client is gone; the next one must find the function as new."""


class PciFunction:
    """A PCI function with its config space, registers, interrupts and DMA port.

    A device subclasses it, declares its registers as tables, and overrides what it does itself. Nothing here
    knows a transport: FunctionServer carries a function over vfio-user, a test drives it by plain calls.
    """

    def __init__(
        self,
        *,
        name: str,
        ids: PciIds,
        bars: Mapping[int, Bar] | None = None,
        capabilities: Sequence[Capability] = (),
        force_bus_master: bool = False,
    ) -> None:
        self.name = name
        self.ids = ids
        self.bars: Mapping[int, Bar] = dict(bars or {})
        self.rid = 0
        self.config = ConfigSpace(ids, self.bars, capabilities, force_bus_master=force_bus_master)
        self._pm_offset = self.config.find(PowerManagement.id) or 0
        self._bus_master = self._may_master()
        self._dma: DmaPort | None = None
        self._memory: DeviceMemory | None = None
        self.pasids = PasidControl(self.config, _first(capabilities, Pasid), self._pasids_changed)
        """Which PASIDs the guest lets the function put on its requests."""
        self.ats = AtsControl(self.config, _first(capabilities, Ats), self._may_send_changed)
        """Whether the guest lets the function keep translations, and the device TLB that holds them."""
        pri = _first(capabilities, Pri)
        self.page_requests = PageRequests(self.config, pri, self.pasids, self._may_ask) if pri else None
        """What the function may ask the guest for; None without a PRI capability."""
        self._msix = _first(capabilities, Msix)
        self._check_msix()
        self.interrupts = Interrupts(self.config, _first(capabilities, Msi), self._msix, lambda: self._bus_master)
        """What was raised and could not be sent yet, and where it goes."""
        self._pba = (self._msix.pba_bar, self._msix.pba_offset, self._msix.pba_end) if self._msix else (-1, 0, 0)
        self._exp_offset = self.config.find(PciExpress.id) or 0
        self.config.on_write(COMMAND, 2, self._mastering_written)
        if self._pm_offset:
            self.config.on_write(self._pm_offset + PMCSR, 2, self._mastering_written)
        if any(item.flr for item in capabilities if isinstance(item, PciExpress)):
            self.config.on_write(self._exp_offset + 8, 2, self._device_control_written)

    # DMA

    @property
    def dma(self) -> DmaPort:
        """The port to guest memory; RuntimeError before connect_dma."""
        if self._dma is None:
            raise RuntimeError(f"{self.name}: no DMA port is connected: call connect_dma first")
        return self._dma

    def connect_dma(self, port: FunctionPort) -> None:
        """Give the function its port; from now on the command register's bus master bit gates it."""
        self._dma = port
        port.enabled = lambda: self._bus_master
        self._memory = DeviceMemory(lambda: self.rid, port, self.pasids, self.ats)

    @property
    def memory(self) -> DeviceMemory:
        """Guest memory as the guest lets the function reach it: with PASIDs, and with its own translations, where
        those are enabled. RuntimeError before connect_dma."""
        if self._memory is None:
            raise RuntimeError(f"{self.name}: no DMA port is connected: call connect_dma first")
        return self._memory

    @property
    def tlb(self) -> DeviceTlb | None:
        """The device TLB, which must hear of every invalidation; None while the guest has not enabled ATS."""
        return self.ats.tlb

    def connect_tlb(self, announce: Announce | None) -> None:
        """`announce` is called with `tlb`, now and whenever it has changed (Engine.set_tlb); None: nobody is told."""
        self.ats.connect(announce)

    def connect_page_requests(self, send: Send | None) -> None:
        """`send` takes the function's page request messages (Device.page_request); None: nobody does."""
        if self.page_requests is not None:
            self.page_requests.connect(send)

    @property
    def bus_master(self) -> bool:
        """Whether the guest lets the function send requests and interrupts: the command register's bit 2 (PCI 3.0,
        6.2.2), in power state D0 (PM 1.2, 5.4)."""
        return self._bus_master

    # BARs

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """A guest's read of 1, 2, 4 or 8 bytes; from the BAR's registers unless a device overrides it."""
        registers = self.bars[bar].registers
        pba_bar, start, end = self._pba
        if bar == pba_bar and start <= offset < end:
            return self.interrupts.read_pending(offset - start, size)
        return 0 if registers is None else registers.read(offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """A guest's write of 1, 2, 4 or 8 bytes; to the BAR's registers unless a device overrides it."""
        registers = self.bars[bar].registers
        if registers is not None:
            registers.write(offset, size, value)

    # Life

    def reset(self, kind: ResetKind) -> None:
        """Registers, config space and pending interrupts to reset values; devices extend it."""
        self.config.reset()
        self._bus_master = self._may_master()
        self.interrupts.reset()
        for bar in self.bars.values():
            if bar.registers is not None:
                bar.registers.reset()
        self.pasids.reset()
        self.ats.reset()
        if self.page_requests is not None:
            self.page_requests.reset()

    def drained(self) -> None:
        """Called after the transport has handled every message at hand: raise one interrupt a batch here."""

    # Interrupts

    def connect_interrupts(self, signal: Signal | None) -> None:
        """`signal(vector)` sends an interrupt and says whether the other side has taken it; None: nobody listens."""
        self.interrupts.connect(signal)

    def interrupt(self, vector: int = 0) -> None:
        """Raise a vector: sent if MSI-X or MSI is enabled and unmasked and the function masters the bus, else kept."""
        if not 0 <= vector < self.interrupts.vectors:
            raise ValueError(f"{self.name}: vector {vector} of {self.interrupts.vectors}")
        self.interrupts.interrupt(vector)

    # What the guest writes to config space

    def _check_msix(self) -> None:
        if self._msix is None:
            return
        for what, bar, end in (
            ("table", self._msix.table_bar, self._msix.table_end),
            ("pending bits", self._msix.pba_bar, self._msix.pba_end),
        ):
            if bar not in self.bars or end > self.bars[bar].size:
                raise ValueError(f"{self.name}: the MSI-X {what} ends at {end:#x} of BAR{bar}, which is smaller")

    def _may_master(self) -> bool:
        awake = not self._pm_offset or not self.config.read(self._pm_offset + PMCSR, 2) & PMCSR_STATE
        return awake and bool(self.config.read(COMMAND, 2) & COMMAND_BUS_MASTER)

    def _mastering_written(self) -> None:
        self._bus_master = self._may_master()
        self.interrupts.deliver_pending()
        self._may_send_changed()

    def _pasids_changed(self) -> None:
        self.ats.forget()
        self._may_send_changed()

    def _may_ask(self) -> bool:
        """Page requests are of use to what translates, and are requests like others."""
        return self._bus_master and self.ats.tlb is not None

    def _may_send_changed(self) -> None:
        if self.page_requests is not None:
            self.page_requests.update()

    def _device_control_written(self) -> None:
        control = self.config.read(self._exp_offset + 8, 2)
        if control & EXP_DEVCTL_FLR:
            self.reset(ResetKind.FLR)


def _first(capabilities: Sequence[Capability], kind: type[C]) -> C | None:
    """The capability of a kind, if there is one."""
    return next((each for each in capabilities if isinstance(each, kind)), None)
