"""PCI functions: config space, registers, interrupts, and the vfio-user server that carries them."""

from backend.pci.bars import Bar
from backend.pci.capabilities import (
    Ats,
    Capability,
    Dsn,
    Msi,
    Msix,
    Pasid,
    PciExpress,
    PowerManagement,
    Pri,
    RawCapability,
    VendorSpecific,
)
from backend.pci.config_space import ConfigSpace
from backend.pci.device_memory import DeviceMemory
from backend.pci.dma import DmaPort, DmaRegion
from backend.pci.function import PciFunction, ResetKind
from backend.pci.ids import PciIds
from backend.pci.page_requests import PageRequests
from backend.pci.registers import Register, RegisterTable
from backend.pci.server import FunctionServer, SocketRefused
from backend.pci.turns import Turns
from ctypes_bindings import LibraryError, LibraryMissing

__all__ = [
    "Ats",
    "Bar",
    "Capability",
    "ConfigSpace",
    "DeviceMemory",
    "DmaPort",
    "DmaRegion",
    "Dsn",
    "FunctionServer",
    "LibraryError",
    "LibraryMissing",
    "Msi",
    "Msix",
    "PageRequests",
    "Pasid",
    "PciExpress",
    "PciFunction",
    "PciIds",
    "PowerManagement",
    "Pri",
    "RawCapability",
    "Register",
    "RegisterTable",
    "ResetKind",
    "SocketRefused",
    "Turns",
    "VendorSpecific",
]
