"""The controller's registers (NVM Express 1.4, 3.1) as a data table, and the layout of its BAR.

Controller registers at 0x0000, doorbells at 0x1000, the MSI-X table at 0x2000, its pending bits at 0x3000.
"""

from __future__ import annotations

from backend.pci.registers import Register, RegisterTable

BAR_SIZE = 0x4000
DOORBELLS = 0x1000
MSIX_TABLE = 0x2000
MSIX_PENDING = 0x3000

# 1,024 entries are what the stock driver asks for; a queue of that size is 64 KiB of guest memory.
MAX_QUEUE_ENTRIES = 1024
# Reset is immediate here; the driver allows ten seconds for a backend that is held up.
TIMEOUT_HALF_SECONDS = 20
MIN_PAGE_SHIFT = 12
MAX_PAGE_SHIFT = 16  # the largest page size of a stock arm64 or ppc64 kernel

VERSION_1_4 = 0x0001_0400

CAP = (
    (MAX_QUEUE_ENTRIES - 1)  # MQES, 0's based
    | 1 << 16  # CQR: queues are physically contiguous
    | TIMEOUT_HALF_SECONDS << 24  # TO
    | 0 << 32  # DSTRD: doorbells 4 bytes apart
    | 0 << 36  # NSSRS: no subsystem reset
    | 1 << 37  # CSS: the NVM command set
    | (MIN_PAGE_SHIFT - 12) << 48  # MPSMIN
    | (MAX_PAGE_SHIFT - 12) << 52  # MPSMAX
)

CC_ENABLE = 1 << 0
CC_CSS_SHIFT, CC_CSS_MASK = 4, 0x7
CC_MPS_SHIFT, CC_MPS_MASK = 7, 0xF
CC_AMS_SHIFT, CC_AMS_MASK = 11, 0x7
CC_SHN_MASK = 3 << 14
CC_IOSQES_SHIFT, CC_IOCQES_SHIFT, CC_ENTRY_SIZE_MASK = 16, 20, 0xF

CSTS_READY = 1 << 0
CSTS_FATAL = 1 << 1
CSTS_SHUTDOWN_COMPLETE = 2 << 2
CSTS_SHUTDOWN_MASK = 3 << 2

_ALL32 = 0xFFFF_FFFF
_ALL64 = 0xFFFF_FFFF_FFFF_FFFF
_PAGE_ALIGNED = _ALL64 & ~0xFFF

REGISTERS = (
    Register("CAP", 0x00, 8, reset=CAP, ro=_ALL64, section="3.1.1 Controller Capabilities"),
    Register("VS", 0x08, 4, reset=VERSION_1_4, ro=_ALL32, section="3.1.2 Version"),
    Register("INTMS", 0x0C, 4, rw=_ALL32, section="3.1.3 Interrupt Mask Set"),
    Register("INTMC", 0x10, 4, rw=_ALL32, section="3.1.4 Interrupt Mask Clear"),
    Register("CC", 0x14, 4, rw=0x00FF_FFF1, section="3.1.5 Controller Configuration"),
    Register("CSTS", 0x1C, 4, ro=0x0000_000F, section="3.1.6 Controller Status"),
    Register("AQA", 0x24, 4, rw=0x0FFF_0FFF, section="3.1.8 Admin Queue Attributes"),
    Register("ASQ", 0x28, 8, rw=_PAGE_ALIGNED, section="3.1.9 Admin Submission Queue Base Address"),
    Register("ACQ", 0x30, 8, rw=_PAGE_ALIGNED, section="3.1.10 Admin Completion Queue Base Address"),
)


def new_table() -> RegisterTable:
    """The registers at their reset values."""
    return RegisterTable(REGISTERS)


def page_shift(cc: int) -> int:
    """log2 of the host's memory page size in bytes, from CC.MPS."""
    return 12 + (cc >> CC_MPS_SHIFT & CC_MPS_MASK)
