"""The MMIO registers, as a table (section 3.3 of publication 48882), each of 64 bits and reached by halves as well.

Registers of features that are not offered are absent: they read as zero and ignore writes, as reserved registers do.
"""

from typing import NamedTuple

from backend.pci.registers import Register, RegisterTable
from backend.viommu.amd.features import EFR2, Efr

BAR_SIZE = 0x4000  # the register block without performance counters

ADDRESS_FIELD = 0x000F_FFFF_FFFF_F000  # 51:12
LENGTH_FIELD = 0xF << 56
LENGTH_RESET = 8 << 56  # 256 entries
POINTER_FIELD = 0x7FFF0  # 18:4


class Control:
    """The IOMMU Control Register: the bits that do something here. Plain numbers: a doorbell tests several of them."""

    IOMMU_EN = 1 << 0
    EVENT_LOG_EN = 1 << 2
    EVENT_INT_EN = 1 << 3
    COM_WAIT_INT_EN = 1 << 4
    CMD_BUF_EN = 1 << 12
    PPR_LOG_EN = 1 << 13
    PPR_INT_EN = 1 << 14
    PPR_EN = 1 << 15
    GT_EN = 1 << 16


_ACTING = Control.IOMMU_EN | Control.EVENT_LOG_EN | Control.EVENT_INT_EN | Control.COM_WAIT_INT_EN | Control.CMD_BUF_EN

# Bits that are kept and change nothing here: the timeout of device-TLB invalidations (there are none to wait for),
# ordering and coherence of the IOMMU's own requests (all of them are ordered and coherent).
_KEPT = 0b111 << 5 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11

_OPTIONAL_CONTROLS = (
    (Efr.PPR, 0b111 << 13),  # PPRLogEn, PPRIntEn, PPREn
    (Efr.GUEST_TRANSLATION, 1 << 16),  # GTEn
    (Efr.GUEST_APIC, 1 << 17),  # GAEn
    (Efr.ENHANCED_PPR, 1 << 45),  # EPHEn
    (Efr.HOST_ACCESSED, 0b11 << 46),  # HADUpdate
)


class Status:
    """The IOMMU Status Register."""

    EVENT_OVERFLOW = 1 << 0
    EVENT_LOG_INT = 1 << 1
    COM_WAIT_INT = 1 << 2
    EVENT_LOG_RUN = 1 << 3
    CMD_BUF_RUN = 1 << 4
    PPR_OVERFLOW = 1 << 5
    PPR_INT = 1 << 6
    PPR_LOG_RUN = 1 << 7


STATUS_CLEARED_BY_SOFTWARE = (
    Status.EVENT_OVERFLOW | Status.EVENT_LOG_INT | Status.COM_WAIT_INT | Status.PPR_OVERFLOW | Status.PPR_INT
)
STATUS_RUN = Status.EVENT_LOG_RUN | Status.CMD_BUF_RUN | Status.PPR_LOG_RUN

DEVICE_TABLE_BASE = "Device Table Base Address"
COMMAND_BASE = "Command Buffer Base Address"
EVENT_BASE = "Event Log Base Address"
CONTROL = "IOMMU Control"
STATUS = "IOMMU Status"
COMMAND_HEAD = "Command Buffer Head Pointer"
COMMAND_TAIL = "Command Buffer Tail Pointer"
EVENT_HEAD = "Event Log Head Pointer"
EVENT_TAIL = "Event Log Tail Pointer"
EXCLUSION_BASE = "Exclusion Range Base"
EXCLUSION_LIMIT = "Exclusion Range Limit"
PPR_BASE = "PPR Log Base Address"
PPR_HEAD = "PPR Log Head Pointer"
PPR_TAIL = "PPR Log Tail Pointer"


_EXCLUSION_FLAGS = 1 << 0 | 1 << 1  # ExEn, Allow


class Exclusion(NamedTuple):
    """The exclusion range: addresses [start, end), for all devices or for those whose entry has EX."""

    start: int
    end: int
    everyone: bool


def exclusion_range(base: int, limit: int) -> Exclusion | None:
    """What the two registers say, the limit naming the last page of the range; None: there is no range."""
    start, end = base & ADDRESS_FIELD, (limit & ADDRESS_FIELD) + 0x1000
    if not base & 1 or end <= start:
        return None
    return Exclusion(start, end, bool(base & 2))


def control_mask(efr: int) -> int:
    """Bits of the control register that software can set; those of features that are not offered stay zero."""
    mask = _ACTING | _KEPT
    for feature, bits in _OPTIONAL_CONTROLS:
        mask |= bits if feature & efr else 0
    return mask


def register_table(efr: int) -> RegisterTable:
    """The registers of an IOMMU that offers the features in `efr`, at their reset values."""
    ring = ADDRESS_FIELD | LENGTH_FIELD
    return RegisterTable(
        (
            Register(DEVICE_TABLE_BASE, 0x0000, 8, rw=ADDRESS_FIELD | 0x1FF, section="3.3.1"),
            Register(COMMAND_BASE, 0x0008, 8, reset=LENGTH_RESET, rw=ring, section="3.3.1"),
            Register(EVENT_BASE, 0x0010, 8, reset=LENGTH_RESET, rw=ring, section="3.3.1"),
            Register(CONTROL, 0x0018, 8, rw=control_mask(efr), section="3.3.1"),
            Register("Extended Feature", 0x0030, 8, reset=efr, ro=efr, section="3.3.1"),
            Register(EXCLUSION_BASE, 0x0020, 8, rw=ADDRESS_FIELD | _EXCLUSION_FLAGS, section="3.3.1"),
            Register(EXCLUSION_LIMIT, 0x0028, 8, rw=ADDRESS_FIELD, section="3.3.1"),
            Register(PPR_BASE, 0x0038, 8, reset=LENGTH_RESET, rw=ring, section="3.3.1"),
            Register("Extended Feature 2", 0x01A0, 8, reset=EFR2, ro=EFR2, section="3.3.1"),
            Register(COMMAND_HEAD, 0x2000, 8, rw=POINTER_FIELD, section="3.3.13"),
            Register(COMMAND_TAIL, 0x2008, 8, rw=POINTER_FIELD, section="3.3.13"),
            Register(EVENT_HEAD, 0x2010, 8, rw=POINTER_FIELD, section="3.3.13"),
            Register(EVENT_TAIL, 0x2018, 8, rw=POINTER_FIELD, section="3.3.13"),
            Register(STATUS, 0x2020, 8, ro=STATUS_RUN, w1c=STATUS_CLEARED_BY_SOFTWARE, section="3.3.14"),
            Register(PPR_HEAD, 0x2030, 8, rw=POINTER_FIELD, section="3.3.13"),
            Register(PPR_TAIL, 0x2038, 8, rw=POINTER_FIELD, section="3.3.13"),
        )
    )


def ring_address(base_register: int) -> int:
    """GPA that a ring's base address register names."""
    return base_register & ADDRESS_FIELD


def ring_size(base_register: int) -> int:
    """Bytes of a ring: 2^n entries of 16 bytes, n in 59:56 of its base register; below 8 it is reserved: 0 bytes."""
    length = base_register >> 56 & 0xF
    return 16 << length if length >= 8 else 0
