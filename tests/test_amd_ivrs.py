"""The IVRS table: read back by hand, and by ACPICA's disassembler."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from backend.viommu.amd import EFR, Ivhd, ivrs_table, whole_ivrs_table

BAR = 0xFEBF_4000
IOMMU, ENDPOINTS = 0x0010, [0x0021, 0x0018]
FIRST = Ivhd(BAR, IOMMU, ENDPOINTS)
SECOND = Ivhd(BAR - 0x4000, 0x0030, [0x0100])


def test_table_by_hand() -> None:
    table = whole_ivrs_table(ivrs_table([FIRST], EFR))
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
    body = ivrs_table([FIRST], EFR)
    assert whole_ivrs_table(body)[36:] == body


def test_an_iommu_is_a_block() -> None:
    """Two IOMMUs, the second with an endpoint behind a root port, whose bus is 1."""
    body = ivrs_table([FIRST, SECOND], EFR)
    assert body[: len(ivrs_table([FIRST]))] == ivrs_table([FIRST])
    second = body[12 + 40 + 8 :]
    assert struct.unpack_from("<BBHHHQ", second, 0) == (0x11, 0, 44, 0x0030, 0x40, BAR - 0x4000)
    assert [struct.unpack_from("<BHB", second, at) for at in range(40, len(second), 4)] == [(2, 0x0100, 0)]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "without an IVHD"),
        ([Ivhd(0, IOMMU, ENDPOINTS)], "BAR 0 at 0x0"),
        ([Ivhd(BAR + 0x1000, IOMMU, ENDPOINTS)], "multiple"),
        ([Ivhd(BAR, IOMMU, [])], "without endpoints"),
        ([Ivhd(BAR, IOMMU, [0x18, IOMMU])], "0x0010 is an IOMMU itself"),
        ([Ivhd(BAR, IOMMU, [0x10000])], "0x10000"),
        ([Ivhd(BAR, -1, ENDPOINTS)], "-0x1"),
        ([FIRST, SECOND._replace(endpoints=[0x18])], "0x0018 stands behind the IOMMUs 0x0010 and 0x0030"),
        ([FIRST, SECOND._replace(endpoints=[IOMMU])], "0x0010 is an IOMMU itself"),
        ([FIRST, SECOND._replace(rid=IOMMU)], "share a RID"),
        ([FIRST, SECOND._replace(bar_address=BAR)], "share an address"),
    ],
)
def test_bad_input(units: list[Ivhd], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ivrs_table(units)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="no iasl: install it with `apt-get install acpica-tools`")
def test_acpica_reads_it(tmp_path: Path) -> None:
    (tmp_path / "ivrs.aml").write_bytes(whole_ivrs_table(ivrs_table([FIRST, SECOND], EFR)))
    subprocess.run(["iasl", "-d", "ivrs.aml"], cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path / "ivrs.dsl").read_text()
    assert "Invalid" not in text
    fields = re.findall(r"^\[[^]]*\] +(.*?) : (\S+)", text, re.MULTILINE)
    assert fields[-31:-14] == [
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
    second = [("DeviceId", "0030"), ("Capability Offset", "0040"), ("Base Address", f"{BAR - 0x4000:016X}")]
    assert fields[-11:-8] == second
    assert fields[-3:] == [("Entry Type", "02"), ("Device ID", "0100"), ("Data Setting", "00")]
