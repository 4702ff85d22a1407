"""Log pages (NVM Express 1.4, 5.14.1)."""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from backend.endpoints.nvme.commands import NSID_BROADCAST, AdminOpcode, IoOpcode
from backend.endpoints.nvme.identity import FIRMWARE

ERROR_ENTRIES = 64  # one page of them
_ERROR = struct.Struct("<QHHHHQIBBHQH22x")
assert _ERROR.size == 64
NO_PARAMETER = 0xFFFF  # the error lies in no field of the command
NO_COMMAND = 0xFFFF

COMPOSITE_KELVIN = 300  # a model of a device has no sensor: the temperature of a room
_TEMPERATURE_WARNING = 1 << 1
_TRANSPORT_PCIE = 0

_EFFECT_SUPPORTED, _EFFECT_CONTENT_CHANGE = 1 << 0, 1 << 1


class LogPage(IntEnum):
    """Figure 191 of NVM Express 1.4: those that are kept."""

    ERROR = 0x01
    HEALTH = 0x02
    FIRMWARE_SLOT = 0x03
    COMMANDS_SUPPORTED = 0x05


class ErrorLog:
    """The newest errors, and how many there ever were (5.14.1.1)."""

    def __init__(self) -> None:
        self.count = 0
        self._entries: deque[bytes] = deque(maxlen=ERROR_ENTRIES)

    def add(
        self,
        *,
        sqid: int,
        cid: int,
        status_field: int,
        byte: int | None,
        lba: int = 0,
        nsid: int = 0,
        fault_iova: int = 0,
    ) -> None:
        """Note an error. `status_field` without phase bit, `byte` where in the command, `fault_iova` of a DMA fault."""
        self.count += 1
        location = NO_PARAMETER if byte is None else byte
        entry = (self.count, sqid, cid, status_field << 1 & 0xFFFF, location, lba, nsid, 0, _TRANSPORT_PCIE, 0)
        self._entries.appendleft(_ERROR.pack(*entry, fault_iova, 0))

    def page(self) -> bytes:
        """Newest first, the rest of the page zero."""
        return b"".join(self._entries).ljust(ERROR_ENTRIES * _ERROR.size, b"\0")


@dataclass(slots=True)
class Health:
    """What the SMART / Health Information page counts (5.14.1.2). Bytes and commands since this controller was made."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_commands: int = 0
    write_commands: int = 0
    power_cycles: int = 1
    unsafe_shutdowns: int = 0
    media_errors: int = 0
    started: float = field(default_factory=time.monotonic)

    def page(self, *, errors: int, temperature_warning: bool) -> bytes:
        """512 bytes; the counters are 128 bits wide, data in units of 1,000 blocks of 512 bytes, rounded up."""
        hours = int(time.monotonic() - self.started) // 3600
        counters: Iterable[int] = (
            -(-self.bytes_read // 512_000),
            -(-self.bytes_written // 512_000),
            self.read_commands,
            self.write_commands,
            0,  # controller busy time, minutes
            self.power_cycles,
            hours,
            self.unsafe_shutdowns,
            self.media_errors,
            errors,
        )
        head = struct.pack(
            "<BHBBB", _TEMPERATURE_WARNING if temperature_warning else 0, COMPOSITE_KELVIN, 100, 10, 0
        )  # warnings, temperature, spare in percent, its threshold, percentage used
        body = b"".join(value.to_bytes(16, "little") for value in counters)
        return (head.ljust(32, b"\0") + body).ljust(512, b"\0")


def firmware_slots() -> bytes:
    """Firmware Slot Information, 5.14.1.3: slot 1 is active, and the only one."""
    return (b"\x01".ljust(8, b"\0") + FIRMWARE.encode().ljust(8)).ljust(512, b"\0")


def commands_supported(*, dataset_management: bool) -> bytes:
    """Commands Supported and Effects, 5.14.1.5: 256 dwords of admin commands, 256 of I/O commands."""
    page = bytearray(4096)
    changes = {IoOpcode.WRITE, IoOpcode.WRITE_ZEROES, IoOpcode.DATASET_MANAGEMENT}
    for admin in AdminOpcode:
        struct.pack_into("<I", page, 4 * admin, _EFFECT_SUPPORTED)
    for io in IoOpcode:
        if io is IoOpcode.DATASET_MANAGEMENT and not dataset_management:
            continue
        effects = _EFFECT_SUPPORTED | (_EFFECT_CONTENT_CHANGE if io in changes else 0)
        struct.pack_into("<I", page, 1024 + 4 * io, effects)
    return bytes(page)


def covers(nsid: int) -> bool:
    """Whether a log page can be asked for with this namespace id: the controller's own, or its one namespace's."""
    return nsid in (0, 1, NSID_BROADCAST)
