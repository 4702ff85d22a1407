"""Identify data structures (NVM Express 1.4, 5.15), each laid out as a table of (offset, width in bytes, value)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from backend.endpoints.nvme.commands import BYTE_CDW10, BYTE_NSID, NSID_BROADCAST, Command
from backend.endpoints.nvme.events import MAX_REQUESTS
from backend.endpoints.nvme.features import CRITICAL_TEMPERATURE, RECOMMENDED_BURST, WARNING_TEMPERATURE
from backend.endpoints.nvme.identity import FIRMWARE, MODEL, PCI_IDS, Identity
from backend.endpoints.nvme.logs import ERROR_ENTRIES
from backend.endpoints.nvme.namespace import Namespace
from backend.endpoints.nvme.registers import VERSION_1_4
from backend.endpoints.nvme.status import CommandFailed, Status
from backend.endpoints.nvme.transfers import MDTS

SIZE = 4096  # bytes of every structure
NAMESPACES = 1
_LAST_NSID = 0xFFFF_FFFD  # the two above are no starting point for a list of namespaces

OACS_DOORBELL_BUFFER_CONFIG = 1 << 8
ONCS_COMPARE, ONCS_DATASET_MANAGEMENT, ONCS_WRITE_ZEROES, ONCS_SELECT = 1 << 0, 1 << 2, 1 << 3, 1 << 4
LPA_PER_NAMESPACE, LPA_COMMANDS, LPA_EXTENDED = 1 << 0, 1 << 1, 1 << 2
VWC_PRESENT, VWC_FLUSH_ALL = 1 << 0, 3 << 1
DLFEAT_ZEROES, DLFEAT_WRITE_ZEROES_DEALLOCATES = 1 << 0, 1 << 3

_NIDT_UUID = 3

Layout = Iterable[tuple[int, int, int | str | bytes]]


class Structure(IntEnum):
    """CNS, dword 10, bits 7:0: the structures an I/O controller without namespace management must have."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03


def structure(command: Command, identity: Identity, namespace: Namespace) -> bytes:
    """The 4096 bytes that an Identify command asks for. Raises CommandFailed."""
    try:
        which = Structure(command.cdw10 & 0xFF)
    except ValueError:
        raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW10) from None
    if which is Structure.CONTROLLER:
        return controller(identity, namespace)
    if which is Structure.ACTIVE_NAMESPACES:
        if command.nsid > _LAST_NSID:
            raise CommandFailed(Status.INVALID_NAMESPACE_OR_FORMAT, byte=BYTE_NSID)
        return _lay(((4 * index, 4, nsid) for index, nsid in enumerate(range(command.nsid + 1, NAMESPACES + 1))))
    # The broadcast id asks what all namespaces have in common: with one namespace, that one.
    broadcast = which is Structure.NAMESPACE and command.nsid == NSID_BROADCAST
    if command.nsid != 1 and not broadcast:
        raise CommandFailed(Status.INVALID_NAMESPACE_OR_FORMAT, byte=BYTE_NSID)
    if which is Structure.NAMESPACE_DESCRIPTORS:
        return _lay(((0, 1, _NIDT_UUID), (1, 1, 16), (4, 16, namespace.uuid.bytes)))
    return block_namespace(namespace)


def controller(identity: Identity, namespace: Namespace) -> bytes:
    """Identify Controller, Figure 247."""
    oncs = ONCS_COMPARE | ONCS_WRITE_ZEROES | ONCS_SELECT | (ONCS_DATASET_MANAGEMENT if namespace.holes else 0)
    return _lay(
        (
            (0, 2, PCI_IDS.vendor),  # VID
            (2, 2, PCI_IDS.subsystem_vendor),  # SSVID
            (4, 20, identity.serial),  # SN
            (24, 40, MODEL),  # MN
            (64, 8, FIRMWARE),  # FR
            (72, 1, RECOMMENDED_BURST),  # RAB
            (77, 1, MDTS),
            (80, 4, VERSION_1_4),  # VER
            (111, 1, 1),  # CNTRLTYPE: I/O controller
            (256, 2, OACS_DOORBELL_BUFFER_CONFIG),
            (258, 1, 3),  # ACL, 0's based
            (259, 1, MAX_REQUESTS - 1),  # AERL, 0's based
            (260, 1, 1 << 1 | 1),  # FRMW: one slot, read-only
            (261, 1, LPA_PER_NAMESPACE | LPA_COMMANDS | LPA_EXTENDED),
            (262, 1, ERROR_ENTRIES - 1),  # ELPE, 0's based
            (266, 2, WARNING_TEMPERATURE),  # WCTEMP
            (268, 2, CRITICAL_TEMPERATURE),  # CCTEMP
            (280, 16, namespace.size),  # TNVMCAP
            (512, 1, 0x66),  # SQES: 2^6 bytes, required and largest
            (513, 1, 0x44),  # CQES: 2^4 bytes
            (516, 4, NAMESPACES),  # NN
            (520, 2, oncs),
            (525, 1, VWC_PRESENT | VWC_FLUSH_ALL),
            (768, 256, identity.subsystem_name.encode()),  # SUBNQN, zero padded
        )
    )


def block_namespace(namespace: Namespace) -> bytes:
    """Identify Namespace, Figure 245: one LBA format, no metadata, no protection."""
    return _lay(
        (
            (0, 8, namespace.blocks),  # NSZE
            (8, 8, namespace.blocks),  # NCAP
            (16, 8, namespace.blocks),  # NUSE: blocks are not counted one by one
            (33, 1, (DLFEAT_ZEROES | DLFEAT_WRITE_ZEROES_DEALLOCATES) if namespace.holes else 0),
            (48, 16, namespace.size),  # NVMCAP
            (128, 4, (namespace.block_size.bit_length() - 1) << 16),  # LBAF0: data size 2^n
        )
    )


def _lay(fields: Layout) -> bytes:
    """Numbers little endian, text padded with spaces, bytes with zeroes."""
    page = bytearray(SIZE)
    for offset, width, value in fields:
        if isinstance(value, int):
            content = value.to_bytes(width, "little")
        elif isinstance(value, str):
            content = value.encode("ascii").ljust(width)
        else:
            content = value.ljust(width, b"\0")
        assert len(content) == width, f"Identify field at {offset} has {len(content)} bytes, not {width}"
        page[offset : offset + width] = content
    return bytes(page)
