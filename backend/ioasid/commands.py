"""The commands of the uAPI as one table: number, fields with their units, kinds they are legal on, errors.

Source: "[RFC] /dev/ioasid uAPI proposal", v1 section 4 for names and numbers; errno habits are those of Linux
iommufd. Whoever calls a command (a front end, a test, the guest) passes through `Command.check`, and nothing is
refused with an errno that the command's row does not list.
"""

from collections.abc import Mapping
from types import MappingProxyType

from . import rows_devices, rows_memory, rows_spaces, rows_tables
from .command import Command

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {command.name: command for command in (*rows_spaces.ROWS, *rows_memory.ROWS, *rows_tables.ROWS, *rows_devices.ROWS)}
)
"""Every command, by name."""
