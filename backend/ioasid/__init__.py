"""The IOASID uAPI: the only way in which translation state changes."""

from .changes import Change, What
from .command import Command
from .commands import COMMANDS
from .context import Context
from .device import Device
from .engine import Engine
from .errors import IoasidError
from .formats import FORMATS, PAGE_SIZE, FormatRule, PgtableFormat
from .info import FormatInfo, Info
from .kinds import Kind
from .port import DevicePort
from .user_memory import OwnMemory, UserMemory
from .vm_memory import VmMemorySource

__all__ = [
    "COMMANDS",
    "FORMATS",
    "PAGE_SIZE",
    "Change",
    "Command",
    "Context",
    "Device",
    "DevicePort",
    "Engine",
    "FormatInfo",
    "FormatRule",
    "Info",
    "IoasidError",
    "Kind",
    "OwnMemory",
    "PgtableFormat",
    "UserMemory",
    "VmMemorySource",
    "What",
]
