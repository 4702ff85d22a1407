"""libvfio-user's own names in ctypes: constants, structures, callback types and functions.

Only what the project uses is declared. tests/test_bindings_layout.py holds all of it against the C compiler.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_longlong, c_size_t, c_ssize_t, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

# Constants, by the names that C gives them.

LIBVFIO_USER_FLAG_ATTACH_NB = 1 << 0
VFU_TRANS_SOCK = 0
VFU_DEV_TYPE_PCI = 0
VFU_PCI_TYPE_EXPRESS = 3
PCI_HEADER_TYPE_NORMAL = 0

VFU_REGION_FLAG_READ = 1 << 0
VFU_REGION_FLAG_WRITE = 1 << 1
VFU_REGION_FLAG_RW = 3
VFU_REGION_FLAG_MEM = 1 << 2
VFU_REGION_FLAG_ALWAYS_CB = 1 << 3

VFU_PCI_DEV_BAR0_REGION_IDX = 0
VFU_PCI_DEV_CFG_REGION_IDX = 7
VFU_PCI_DEV_NUM_REGIONS = 10

VFU_DEV_INTX_IRQ = 0
VFU_DEV_MSI_IRQ = 1
VFU_DEV_MSIX_IRQ = 2
VFU_DEV_ERR_IRQ = 3
VFU_DEV_REQ_IRQ = 4
VFU_DEV_NUM_IRQS = 5

VFU_RESET_DEVICE = 0
VFU_RESET_LOST_CONN = 1
VFU_RESET_PCI_FLR = 2

VFIO_USER_VERSION = 1
VFIO_USER_DMA_MAP = 2
VFIO_USER_DMA_UNMAP = 3
VFIO_USER_DEVICE_GET_INFO = 4
VFIO_USER_DEVICE_GET_REGION_INFO = 5
VFIO_USER_DEVICE_GET_IRQ_INFO = 7
VFIO_USER_DEVICE_SET_IRQS = 8
VFIO_USER_REGION_READ = 9
VFIO_USER_REGION_WRITE = 10
VFIO_USER_DEVICE_RESET = 13

VFIO_USER_F_TYPE_COMMAND = 0
VFIO_USER_F_TYPE_REPLY = 1
VFIO_USER_F_DMA_REGION_READ = 1 << 0
VFIO_USER_F_DMA_REGION_WRITE = 1 << 1
VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1

VFIO_IRQ_SET_DATA_NONE = 1 << 0
VFIO_IRQ_SET_DATA_BOOL = 1 << 1
VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
VFIO_IRQ_SET_ACTION_MASK = 1 << 3
VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5


# Structures. `_c_name_` is how C spells the type.


class Iovec(ctypes.Structure):
    """A piece of memory: base and length in bytes."""

    _c_name_ = "struct iovec"
    _fields_ = (("iov_base", c_void_p), ("iov_len", c_size_t))


class DmaInfo(ctypes.Structure):
    """A DMA region of the client: guest physical range, and where it is mapped here (vaddr None if it is not)."""

    _c_name_ = "vfu_dma_info_t"
    _fields_ = (
        ("iova", Iovec),
        ("vaddr", c_void_p),
        ("mapping", Iovec),
        ("page_size", c_size_t),
        ("prot", c_uint32),
    )


class Header(ctypes.LittleEndianStructure):
    """What every message begins with; flags: 3:0 type, 4 no reply wanted, 5 error."""

    _c_name_ = "struct vfio_user_header"
    _pack_ = 1
    _fields_ = (
        ("msg_id", c_uint16),
        ("cmd", c_uint16),
        ("msg_size", c_uint32),
        ("flags", c_uint32),
        ("error_no", c_uint32),
    )


class Version(ctypes.LittleEndianStructure):
    """VERSION, before its JSON text."""

    _c_name_ = "struct vfio_user_version"
    _pack_ = 1
    _fields_ = (("major", c_uint16), ("minor", c_uint16))


class DmaMap(ctypes.LittleEndianStructure):
    """DMA_MAP; the memory comes as a file descriptor beside it."""

    _c_name_ = "struct vfio_user_dma_map"
    _pack_ = 1
    _fields_ = (
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("offset", c_uint64),
        ("addr", c_uint64),
        ("size", c_uint64),
    )


class DmaUnmap(ctypes.LittleEndianStructure):
    """DMA_UNMAP, before the bitmap that it may carry."""

    _c_name_ = "struct vfio_user_dma_unmap"
    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("addr", c_uint64), ("size", c_uint64))


class RegionAccess(ctypes.LittleEndianStructure):
    """REGION_READ and REGION_WRITE, before the data."""

    _c_name_ = "struct vfio_user_region_access"
    _pack_ = 1
    _fields_ = (("offset", c_uint64), ("region", c_uint32), ("count", c_uint32))


class IrqSet(ctypes.LittleEndianStructure):
    """DEVICE_SET_IRQS, before the data; eventfds come as file descriptors beside it."""

    _c_name_ = "struct vfio_irq_set"
    _fields_ = (
        ("argsz", c_uint32),
        ("flags", c_uint32),
        ("index", c_uint32),
        ("start", c_uint32),
        ("count", c_uint32),
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Iovec,
    DmaInfo,
    Header,
    Version,
    DmaMap,
    DmaUnmap,
    RegionAccess,
    IrqSet,
)


# Callback types, by the names of their typedefs without `vfu_`.

LogFn = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p)
RegionAccessCb = ctypes.CFUNCTYPE(c_ssize_t, c_void_p, c_void_p, c_size_t, c_longlong, c_bool)
ResetCb = ctypes.CFUNCTYPE(c_int, c_void_p, c_int)
DmaRegisterCb = ctypes.CFUNCTYPE(None, c_void_p, ctypes.POINTER(DmaInfo))
DmaUnregisterCb = ctypes.CFUNCTYPE(None, c_void_p, ctypes.POINTER(DmaInfo))

# Functions: name, result, arguments. A negative int or a NULL context is an error with its reason in errno.

FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("vfu_create_ctx", c_void_p, (c_int, c_char_p, c_int, c_void_p, c_int)),
    ("vfu_realize_ctx", c_int, (c_void_p,)),
    ("vfu_attach_ctx", c_int, (c_void_p,)),
    ("vfu_run_ctx", c_int, (c_void_p,)),
    ("vfu_destroy_ctx", None, (c_void_p,)),
    ("vfu_setup_log", c_int, (c_void_p, LogFn, c_int)),
    (
        "vfu_setup_region",
        c_int,
        (c_void_p, c_int, c_size_t, RegionAccessCb, c_int, ctypes.POINTER(Iovec), c_uint32, c_int, c_uint64),
    ),
    ("vfu_setup_device_reset_cb", c_int, (c_void_p, ResetCb)),
    ("vfu_setup_device_dma", c_int, (c_void_p, DmaRegisterCb, DmaUnregisterCb)),
    ("vfu_setup_device_nr_irqs", c_int, (c_void_p, c_int, c_uint32)),
    ("vfu_pci_init", c_int, (c_void_p, c_int, c_int, c_int)),
    ("vfu_irq_trigger", c_int, (c_void_p, c_uint32)),
)
