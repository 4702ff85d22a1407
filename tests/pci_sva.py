"""A function with PASID, ATS and PRI over a real engine, and what Linux writes to its config space.

Register numbers are those of <linux/pci_regs.h>; nothing here is taken from the code under test.
"""

from __future__ import annotations

from collections.abc import Sequence

from guest_ram import PAGE
from ioasid_guest import DEV1, Guest

from backend.core import Access
from backend.ioasid import Code
from backend.pci import Ats, Capability, Pasid, PciExpress, PciFunction, PciIds, Pri

EXT_ATS, EXT_PRI, EXT_PASID = 0x0F, 0x13, 0x1B
COMMAND, MASTER = 0x04, 0x4
ATS_CTRL, ATS_ENABLE = 6, 0x8000
PRI_CTRL, PRI_STATUS, PRI_MAX_REQ, PRI_ALLOC_REQ = 4, 6, 8, 12
PRI_ENABLE, PRI_RESET = 1, 2
PRI_RF, PRI_UPRGI, PRI_STOPPED, PRI_PASID = 0x1, 0x2, 0x100, 0x8000
PASID_CAP, PASID_CTRL = 4, 6
PASID_ENABLE, PASID_EXEC, PASID_PRIV = 1, 2, 4
EXP_DEVCTL, EXP_FLR = 8, 0x8000

READ = Access.READ


class Registers:
    """Config space by capability and register, as a driver sees it."""

    def __init__(self, function: PciFunction) -> None:
        self._config = function.config

    def find(self, capability: int) -> int:
        """pci_find_ext_capability: walk the chain from 0x100."""
        position = 0x100
        while position:
            header = self._config.read(position, 4)
            if header & 0xFFFF == capability:
                return position
            position = header >> 20
        raise LookupError(f"extended capability {capability:#x}")

    def read(self, capability: int, register: int, size: int = 2) -> int:
        return self._config.read(self.find(capability) + register, size)

    def write(self, capability: int, register: int, value: int, size: int = 2) -> None:
        self._config.write(self.find(capability) + register, size, value)

    def set_master(self, on: bool = True) -> None:
        command = self._config.read(COMMAND, 2)
        self._config.write(COMMAND, 2, command | MASTER if on else command & ~MASTER)

    # drivers/pci/ats.c

    def enable_ats(self, shift: int = 12) -> None:
        self.write(EXT_ATS, ATS_CTRL, ATS_ENABLE | shift - 12)

    def disable_ats(self) -> None:
        self.write(EXT_ATS, ATS_CTRL, self.read(EXT_ATS, ATS_CTRL) & ~ATS_ENABLE)

    def enable_pasid(self, features: int = 0) -> None:
        assert not self.read(EXT_PASID, PASID_CTRL) & PASID_ENABLE
        assert self.read(EXT_PASID, PASID_CAP) & features == features
        self.write(EXT_PASID, PASID_CTRL, PASID_ENABLE | features)

    def disable_pasid(self) -> None:
        self.write(EXT_PASID, PASID_CTRL, 0)

    def reset_pri(self) -> None:
        control = self.read(EXT_PRI, PRI_CTRL)
        assert not control & PRI_ENABLE
        self.write(EXT_PRI, PRI_CTRL, control | PRI_RESET)

    def enable_pri(self, requests: int = 32) -> None:
        control = self.read(EXT_PRI, PRI_CTRL)
        assert not control & PRI_ENABLE
        assert self.read(EXT_PRI, PRI_STATUS) & PRI_STOPPED
        self.write(EXT_PRI, PRI_ALLOC_REQ, min(self.read(EXT_PRI, PRI_MAX_REQ, 4), requests), 4)
        self.write(EXT_PRI, PRI_CTRL, control | PRI_ENABLE)

    def disable_pri(self) -> None:
        self.write(EXT_PRI, PRI_CTRL, self.read(EXT_PRI, PRI_CTRL) & ~PRI_ENABLE)

    @property
    def pri_status(self) -> int:
        """As pci_pri_status: Stopped means nothing while the interface is enabled."""
        status = self.read(EXT_PRI, PRI_STATUS)
        return status & ~PRI_STOPPED if self.read(EXT_PRI, PRI_CTRL) & PRI_ENABLE else status

    def enable_all(self) -> None:
        """Bus mastering by the driver; before that, in the order of the AMD driver's pdev_enable_caps."""
        self.enable_ats()
        self.enable_pasid()
        self.reset_pri()
        self.enable_pri()
        self.set_master()


class Asked:
    """Groups that were asked, and what became of them."""

    def __init__(self, function: PciFunction) -> None:
        assert function.page_requests is not None
        self.requests = function.page_requests
        self.answers: list[tuple[str, Code]] = []

    def ask(self, name: str, pages: int | Sequence[tuple[int, Access]] = 1, pasid: int | None = 5) -> bool:
        if isinstance(pages, int):
            pages = [(index * PAGE, READ) for index in range(pages)]
        return self.requests.ask(pasid, pages, lambda code: self.answers.append((name, code)))


def sva_function(*capabilities: Capability) -> PciFunction:
    chain = capabilities or (Ats(), Pasid(width=8), Pri())
    return PciFunction(
        name="sva",
        ids=PciIds(0x1234, 0x10A5),
        capabilities=[PciExpress(integrated=True, prefixes=True), *chain],
    )


def connected(guest: Guest, *capabilities: Capability) -> tuple[PciFunction, Registers]:
    """A function in place of dev1 of the guest."""
    function = sva_function(*capabilities)
    function.rid = DEV1
    function.connect_dma(guest.dev1.port)
    function.connect_page_requests(guest.dev1.page_request)
    return function, Registers(function)
