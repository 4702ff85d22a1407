"""The engine's registers as a data table, and the layout of BAR0 (docs/dma-engine.md).

Names and numbers are those of guest-tests/modules/vioasid_dma_regs.h. The register page is the kernel's; each queue has
a doorbell page of its own, which a kernel may map into a process.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from backend.pci.registers import Register, RegisterTable

ID = 0x414D4456
VERSION = 1
RESET = 1

QUEUES_MAX = 16  # what fits behind QUEUE_BASE in the register page
QUEUE_BASE, QUEUE_STRIDE = 0x800, 0x80
DOORBELL_BASE, DOORBELL_STRIDE = 0x10000, 0x1000
BAR_SIZE = 0x20000

MSIX_BAR = 2  # on its own, so that the doorbell pages can be mapped without it
MSIX_BAR_SIZE = 0x1000
MSIX_TABLE, MSIX_PENDING = 0x000, 0x800

ORDER_MAX = 12  # 4,096 descriptors, 256 KiB of guest memory: more than a driver keeps in flight
RING_ALIGNMENT = 0x1000
DEPTH = 16  # jobs of one queue held in this process, a few hundred bytes each; enough to overlap their page faults
LENGTH_MAX = 1 << 32  # a longer job is several: `done` and the counters stay far from 2^64

ERROR_SHIFT = 8
PASID_MASK = 0xF_FFFF

_ALL32 = 0xFFFF_FFFF
_ALL64 = 0xFFFF_FFFF_FFFF_FFFF


class Feature(IntFlag):
    """FEATURES: what the guest has enabled."""

    PASID = 0x1
    ATS = 0x2
    PAGE_REQUESTS = 0x4


class Control(IntFlag):
    """CONTROL of a queue."""

    PASID = 0x1
    RING_PASID = 0x2
    UNTAGGED = 0x4


class Command(IntEnum):
    """COMMAND of a queue; any other value does nothing."""

    START = 1
    DRAIN = 2
    ABORT = 3


class State(IntEnum):
    """STATUS of a queue, bits 7:0."""

    DISABLED = 0
    RUNNING = 1
    DRAINING = 2
    ERROR = 3


class Error(IntEnum):
    """STATUS of a queue, bits 15:8: why it is in ERROR."""

    NONE = 0
    SETTING = 1
    DOORBELL = 2
    RING = 3
    COMPLETION = 4


SETTINGS = ("CONTROL", "PASID", "RING", "ORDER", "VECTOR")
"""Registers of a queue that a guest writes while it is DISABLED."""


def of_queue(name: str, queue: int) -> str:
    """The register's name in the table."""
    return f"Q{queue}_{name}"


def new_table(queues: int, operations: int) -> RegisterTable:
    """The registers of a device with so many queues; `operations` has a bit for each opcode."""
    registers = [
        Register("ID", 0x000, 4, ID, ro=_ALL32),
        Register("VERSION", 0x004, 4, VERSION, ro=_ALL32),
        Register("QUEUES", 0x008, 4, queues, ro=_ALL32),
        Register("ORDER_MAX", 0x00C, 4, ORDER_MAX, ro=_ALL32),
        Register("DEPTH", 0x010, 4, DEPTH, ro=_ALL32),
        Register("FEATURES", 0x014, 4, ro=_ALL32),
        Register("LENGTH_MAX", 0x018, 8, LENGTH_MAX, ro=_ALL64),
        Register("OPERATIONS", 0x020, 4, operations, ro=_ALL32),
        Register("RESET", 0x024, 4, rw=_ALL32),
        Register("JOBS", 0x040, 8, ro=_ALL64),
        Register("BYTES", 0x048, 8, ro=_ALL64),
        Register("FAULTS", 0x050, 8, ro=_ALL64),
        Register("PAGE_GROUPS", 0x058, 8, ro=_ALL64),
        Register("PAGE_REQUESTS", 0x060, 8, ro=_ALL64),
        Register("PAGE_ANSWERS", 0x068, 8, ro=_ALL64),
    ]
    for queue in range(queues):
        registers += _queue_block(queue) + _doorbell_page(queue)
    return RegisterTable(registers)


def _queue_block(queue: int) -> list[Register]:
    base = QUEUE_BASE + queue * QUEUE_STRIDE
    return [
        Register(of_queue("CONTROL", queue), base + 0x00, 4, rw=0x7),
        Register(of_queue("PASID", queue), base + 0x04, 4, rw=PASID_MASK),
        Register(of_queue("RING", queue), base + 0x08, 8, rw=_ALL64),
        Register(of_queue("ORDER", queue), base + 0x10, 4, rw=_ALL32),
        Register(of_queue("VECTOR", queue), base + 0x14, 4, queue, rw=_ALL32),
        Register(of_queue("COMMAND", queue), base + 0x18, 4, rw=_ALL32),
        Register(of_queue("STATUS", queue), base + 0x1C, 4, ro=_ALL32),
        Register(of_queue("TAIL", queue), base + 0x20, 4, ro=_ALL32),
        Register(of_queue("HEAD", queue), base + 0x24, 4, ro=_ALL32),
        Register(of_queue("COMPLETED", queue), base + 0x28, 4, ro=_ALL32),
        Register(of_queue("WAITING", queue), base + 0x2C, 4, ro=_ALL32),
        Register(of_queue("ERROR_ADDRESS", queue), base + 0x30, 8, ro=_ALL64),
        Register(of_queue("UNANSWERED", queue), base + 0x38, 4, ro=_ALL32),
    ]


def _doorbell_page(queue: int) -> list[Register]:
    base = DOORBELL_BASE + queue * DOORBELL_STRIDE
    return [
        Register(of_queue("DB_TAIL", queue), base + 0x0, 4, rw=_ALL32),
        Register(of_queue("DB_HEAD", queue), base + 0x4, 4, ro=_ALL32),
        Register(of_queue("DB_COMPLETED", queue), base + 0x8, 4, ro=_ALL32),
        Register(of_queue("DB_STATUS", queue), base + 0xC, 4, ro=_ALL32),
    ]
