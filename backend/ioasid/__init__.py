"""The IOASID uAPI: the only way in which translation state changes."""

from .changes import Change, What
from .command import Command
from .commands import COMMANDS
from .context import Context
from .device import Device, DeviceTlb
from .documentation import render_markdown
from .engine import Engine
from .errors import IoasidError
from .fault_queue import Code, FaultRecord, Faults, PageResponse
from .formats import FORMATS, PAGE_SIZE, FormatRule, PgtableFormat
from .info import AttachmentInfo, DeviceInfo, FormatInfo, Info, PasidTableInfo
from .invalidation import Cache, Granularity, Invalidated, Invalidation
from .kinds import Kind
from .pasid_formats import PASID_FORMATS, PasidTableFormat, PasidTableRule
from .pasid_pool import PasidMode
from .port import DevicePort
from .processes import Process, open_process
from .share import Share
from .spaces import Untagged
from .traits import BEHIND_X86, MSI_WINDOW, Traits, Window
from .user_memory import OwnMemory, UserMemory
from .vm_memory import VmMemorySource

__all__ = [
    "BEHIND_X86",
    "COMMANDS",
    "FORMATS",
    "MSI_WINDOW",
    "PAGE_SIZE",
    "PASID_FORMATS",
    "AttachmentInfo",
    "Cache",
    "Change",
    "Code",
    "Command",
    "Context",
    "Device",
    "DeviceInfo",
    "DevicePort",
    "DeviceTlb",
    "Engine",
    "FaultRecord",
    "Faults",
    "FormatInfo",
    "FormatRule",
    "Granularity",
    "Info",
    "Invalidated",
    "Invalidation",
    "IoasidError",
    "Kind",
    "OwnMemory",
    "PageResponse",
    "PasidMode",
    "PasidTableFormat",
    "PasidTableInfo",
    "PasidTableRule",
    "PgtableFormat",
    "Process",
    "Share",
    "Traits",
    "Untagged",
    "UserMemory",
    "VmMemorySource",
    "What",
    "Window",
    "open_process",
    "render_markdown",
]
