"""The IVRS table: read back by hand, and by ACPICA's disassembler."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from backend.viommu.amd import EFR, ivrs_table, whole_ivrs_table

BAR = 0xFEBF_4000
IOMMU, ENDPOINTS = 0x0010, [0x0021, 0x0018]


def test_table_by_hand() -> None:
    table = whole_ivrs_table(ivrs_table(BAR, IOMMU, ENDPOINTS, EFR))
    signature, length, revision = struct.unpack_from("<4sIB", table, 0)
    assert (signature, length, revision) == (b"IVRS", len(table), 2)
    assert sum(table) % 256 == 0
    info, reserved = struct.unpack_from("<IQ", table, 36)
    assert info & 1  # EFRSup: the IVHD's copy of the feature register counts
    assert info >> 8 & 0x7F == 52
    assert info >> 15 & 0x7F == 64
    assert info >> 22 == 0
    assert reserved == 0

    (kind, flags, size, device, capability, base, segment, interrupt, attributes, efr, efr2) = struct.unpack_from(
        "<BBHHHQHHIQQ", table, 48
    )
    assert (kind, flags, size) == (0x11, 0, len(table) - 48)
    assert (device, capability, base, segment) == (IOMMU, 0x40, BAR, 0)
    assert (interrupt, attributes) == (0, 0)
    assert (efr, efr2) == (EFR, 0)
    entries = [struct.unpack_from("<BHB", table, at) for at in range(48 + 40, len(table), 4)]
    assert entries == [(2, 0x0018, 0), (2, 0x0021, 0)]  # DEV_SELECT of each endpoint, in order


def test_body_is_what_follows_the_header() -> None:
    body = ivrs_table(BAR, IOMMU, ENDPOINTS, EFR)
    assert whole_ivrs_table(body)[36:] == body


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, IOMMU, ENDPOINTS), "BAR 0 at 0x0"),
        ((BAR + 0x1000, IOMMU, ENDPOINTS), "multiple"),
        ((BAR, IOMMU, []), "without endpoints"),
        ((BAR, IOMMU, [0x18, IOMMU]), "0x0010 is the IOMMU itself"),
        ((BAR, IOMMU, [0x10000]), "0x10000"),
        ((BAR, -1, ENDPOINTS), "-0x1"),
    ],
)
def test_bad_input(arguments: tuple[int, int, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ivrs_table(*arguments)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="no iasl: install it with `apt-get install acpica-tools`")
def test_acpica_reads_it(tmp_path: Path) -> None:
    (tmp_path / "ivrs.aml").write_bytes(whole_ivrs_table(ivrs_table(BAR, IOMMU, ENDPOINTS, EFR)))
    subprocess.run(["iasl", "-d", "ivrs.aml"], cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path / "ivrs.dsl").read_text()
    assert "Invalid" not in text
    fields = re.findall(r"^\[[^]]*\] +(.*?) : (\S+)", text, re.MULTILINE)
    assert fields[-17:] == [
        ("Subtable Type", "11"),
        ("Flags", "00"),
        ("Length", "0030"),
        ("DeviceId", f"{IOMMU:04X}"),
        ("Capability Offset", "0040"),
        ("Base Address", f"{BAR:016X}"),
        ("PCI Segment Group", "0000"),
        ("Virtualization Info", "0000"),
        ("Attributes", "00000000"),
        ("EFR Image", f"{EFR:016X}"),
        ("Reserved", "0000000000000000"),
        ("Entry Type", "02"),
        ("Device ID", "0018"),
        ("Data Setting", "00"),
        ("Entry Type", "02"),
        ("Device ID", "0021"),
        ("Data Setting", "00"),
    ]
