"""The ACPI IVRS table that tells a guest of this IOMMU (section 5.2 of publication 48882).

A table of revision 2 with one IVHD block of type 0x11, whose copy of the feature register the guest has before it can
read the registers. It lists the endpoints one by one: an entry for "all devices" would hand QEMU's own devices, whose
requests never pass here, to the guest's IOMMU driver.
"""

import struct
from collections.abc import Iterable

from backend.viommu.amd.features import ADDRESS_SIZES, CAPABILITY_OFFSET, EFR, EFR2

SIGNATURE = b"IVRS"
REVISION = 2
ACPI_HEADER_SIZE = 36
_IVINFO_EFR_VALID = 1 << 0
_IVHD_TYPE_WITH_EFR = 0x11
_DEV_SELECT = 2


def ivrs_table(bar_address: int, iommu_rid: int, endpoint_rids: Iterable[int], efr: int = EFR) -> bytes:
    """The table from offset 36 on: what QEMU's `-acpitable sig=IVRS,rev=2,data=FILE` takes.

    `bar_address` is the guest physical address of BAR 0. Raises ValueError if it cannot be one, if a RID is none, if
    there is no endpoint, or if the IOMMU stands among its own endpoints.
    """
    rids = sorted(set(endpoint_rids))
    for rid in (iommu_rid, *rids):
        if not 0 <= rid <= 0xFFFF:
            raise ValueError(f"{rid:#x} is no RID: bus, device and function have 16 bits")
    if bar_address <= 0 or bar_address % 0x4000:
        raise ValueError(f"BAR 0 at {bar_address:#x}: the register block is 16 KiB and stands at a multiple of that")
    if not rids:
        raise ValueError("an IVHD without endpoints: nothing would stand behind this IOMMU")
    if iommu_rid in rids:
        raise ValueError(f"RID {iommu_rid:#06x} is the IOMMU itself, which does not translate its own requests")
    entries = b"".join(struct.pack("<BHB", _DEV_SELECT, rid, 0) for rid in rids)
    ivhd = struct.pack(
        "<BBHHHQHHIQQ",
        _IVHD_TYPE_WITH_EFR,
        0,  # flags: none of the HyperTransport and ordering settings
        40 + len(entries),
        iommu_rid,
        CAPABILITY_OFFSET,
        bar_address,
        0,  # PCI segment
        0,  # MSI number 0, unit ID 0
        0,  # attributes: no counters
        efr,
        EFR2,
    )
    return struct.pack("<IQ", _IVINFO_EFR_VALID | ADDRESS_SIZES, 0) + ivhd + entries


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
