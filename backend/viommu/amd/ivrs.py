"""The ACPI IVRS table that tells a guest of its IOMMUs (section 5.2 of publication 48882).

A table of revision 2 with one IVHD block of type 0x11 for each IOMMU, whose copy of the feature register the guest has
before it can read the registers. A block lists its endpoints one by one: an entry for "all devices" would hand QEMU's
own devices, whose requests never pass here, to the guest's IOMMU driver.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

from backend.viommu.amd.features import ADDRESS_SIZES, CAPABILITY_OFFSET, EFR, EFR2
from backend.viommu.amd.registers import BAR_SIZE

SIGNATURE = b"IVRS"
REVISION = 2
ACPI_HEADER_SIZE = 36
_IVINFO_EFR_VALID = 1 << 0
_IVHD_TYPE_WITH_EFR = 0x11
_DEV_SELECT = 2


class Ivhd(NamedTuple):
    """One IOMMU: the guest physical address of its BAR 0, its own RID, and the RIDs of the endpoints behind it."""

    bar_address: int
    rid: int
    endpoints: Iterable[int]


def ivrs_table(ivhds: Iterable[Ivhd], efr: int = EFR) -> bytes:
    """The table from offset 36 on: what QEMU's `-acpitable sig=IVRS,rev=2,data=FILE` takes.

    Raises ValueError if there is no IOMMU, if two share a RID or an address, if a RID is none, if an IOMMU has no
    endpoint, or if an endpoint stands behind two or is an IOMMU itself.
    """
    units = [Ivhd(unit.bar_address, unit.rid, sorted(set(unit.endpoints))) for unit in ivhds]
    if not units:
        raise ValueError("an IVRS without an IVHD: nothing would be told of any IOMMU")
    _check(units)
    blocks = b"".join(_ivhd_block(unit, efr) for unit in units)
    return struct.pack("<IQ", _IVINFO_EFR_VALID | ADDRESS_SIZES, 0) + blocks


def _check(units: list[Ivhd]) -> None:
    iommus = [unit.rid for unit in units]
    behind: dict[int, int] = {}
    for unit in units:
        for rid in (unit.rid, *unit.endpoints):
            if not 0 <= rid <= 0xFFFF:
                raise ValueError(f"{rid:#x} is no RID: bus, device and function have 16 bits")
        if unit.bar_address <= 0 or unit.bar_address % BAR_SIZE:
            raise ValueError(
                f"BAR 0 at {unit.bar_address:#x}: the register block is 16 KiB and stands at a multiple of that"
            )
        if not unit.endpoints:
            raise ValueError(f"the IVHD of {unit.rid:#06x} is without endpoints: nothing would stand behind this IOMMU")
        for rid in unit.endpoints:
            if rid in iommus:
                raise ValueError(f"RID {rid:#06x} is an IOMMU itself, which does not translate its own requests")
            if rid in behind:
                raise ValueError(f"RID {rid:#06x} stands behind the IOMMUs {behind[rid]:#06x} and {unit.rid:#06x}")
            behind[rid] = unit.rid
    for what, values in (("a RID", iommus), ("an address", [unit.bar_address for unit in units])):
        if len(set(values)) != len(values):
            raise ValueError(f"two IOMMUs share {what}: {', '.join(f'{value:#x}' for value in values)}")


def _ivhd_block(unit: Ivhd, efr: int) -> bytes:
    entries = b"".join(struct.pack("<BHB", _DEV_SELECT, rid, 0) for rid in unit.endpoints)
    block = struct.pack(
        "<BBHHHQHHIQQ",
        _IVHD_TYPE_WITH_EFR,
        0,  # flags: none of the HyperTransport and ordering settings
        40 + len(entries),
        unit.rid,
        CAPABILITY_OFFSET,
        unit.bar_address,
        0,  # PCI segment
        0,  # MSI number 0, unit ID 0
        0,  # attributes: no counters
        efr,
        EFR2,
    )
    return block + entries


def whole_ivrs_table(body: bytes, *, oem_id: bytes = b"VIOASI", oem_table_id: bytes = b"VIOASID ") -> bytes:
    """The same with the ACPI header and checksum in front, as firmware shows it and as `iasl -d` reads it."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        SIGNATURE,
        ACPI_HEADER_SIZE + len(body),
        REVISION,
        0,
        oem_id,
        oem_table_id,
        1,
        b"VIOA",
        1,
    )
    table = bytearray(header + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)
