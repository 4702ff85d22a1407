"""The controller's registers and its life: NVM Express 1.4, 3.1, 7.3 and 7.6."""

from collections.abc import Iterator

import pytest
from nvme_driver import (
    ACQ,
    AQA,
    ASQ,
    CAP,
    CC,
    CSTS,
    DOORBELLS,
    ENABLE,
    FATAL,
    IDENTIFY,
    INTMC,
    INTMS,
    READY,
    VS,
    Host,
)

from backend.pci import ResetKind


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def test_config_space_says_nvme(host: Host) -> None:
    config = host.controller.config
    assert config.read(0x08, 4) >> 8 == 0x010802  # mass storage, non-volatile memory, NVMe
    config.write(0x10, 4, 0xFFFF_FFFF)
    assert config.read(0x10, 4) == 0xFFFF_C000  # 16 KiB of 32-bit, not prefetchable memory
    found = {}
    offset = config.read(0x34, 1)
    while offset:
        found[config.read(offset, 1)] = offset
        offset = config.read(offset + 1, 1)
    assert {0x01, 0x10, 0x11} <= set(found)  # power management, PCI Express, MSI-X
    msix = found[0x11]
    assert config.read(msix + 2, 2) & 0x7FF == 16  # 17 vectors: admin and 16 I/O queues
    table, pending = config.read(msix + 4, 4), config.read(msix + 8, 4)
    assert table & 7 == pending & 7 == 0
    assert 0x1000 + 4 * 2 * 17 <= table & ~7 < table + 17 * 16 <= pending & ~7 < 0x4000


def test_capabilities_and_version(host: Host) -> None:
    cap = host.get(CAP, 8)
    assert cap & 0xFFFF == 1023  # MQES
    assert cap >> 16 & 1 == 1  # CQR
    assert cap >> 24 & 0xFF > 0  # TO
    assert cap >> 32 & 0xF == 0  # DSTRD
    assert cap >> 36 & 1 == 0  # NSSRS
    assert cap >> 37 & 0xFF == 1  # CSS: NVM
    assert cap >> 48 & 0xFF == 0x40  # MPSMIN 4 KiB, MPSMAX 64 KiB
    assert host.get(CAP) | host.get(CAP + 4) << 32 == cap  # as firmware in 32-bit mode reads it
    assert host.get(VS) == 0x0001_0400
    host.put(CAP, 0)
    assert host.get(CAP, 8) == cap


def test_enable_disable_and_enable_again(host: Host) -> None:
    assert host.get(CSTS) == 0
    host.enable()
    host.identify(1)
    host.create_queue(1, 8)
    host.put(CC, ENABLE & ~1)
    assert host.get(CSTS) == 0
    assert host.get(AQA) == 31 << 16 | 31  # kept by a controller reset, 7.3.2
    assert host.get(ASQ, 8) == host.admin.sq
    assert host.get(ACQ, 8) == host.admin.cq
    host.enable()
    host.create_queue(1, 8)  # gone with the reset, so it can be created
    host.identify(1)


def test_admin_queue_bases_by_halves(host: Host) -> None:
    host.put(ASQ, 0x1000_0FFF)
    host.put(ASQ + 4, 0x12)
    assert host.get(ASQ, 8) == 0x12_1000_0000  # bits 11:0 are reserved
    host.put(ACQ, 0x9_8765_4000, 8)
    assert (host.get(ACQ), host.get(ACQ + 4)) == (0x8765_4000, 9)


@pytest.mark.parametrize(
    ("aqa", "cc"),
    [
        (0, ENABLE),  # queues of one entry
        (31, ENABLE),  # a completion queue of one entry
        (31 << 16, ENABLE),  # a submission queue of one entry
        (31 << 16 | 31, ENABLE | 1 << 4),  # a command set that is not offered
        (31 << 16 | 31, ENABLE | 1 << 11),  # weighted round robin, not offered
        (31 << 16 | 31, ENABLE | 5 << 7),  # pages of 128 KiB
        (31 << 16 | 31, ENABLE | 4 << 7),  # pages of 64 KiB, the queues below aligned to 4 KiB
    ],
)
def test_a_bad_setup_is_fatal_and_can_be_repaired(host: Host, aqa: int, cc: int) -> None:
    host.put(AQA, aqa)
    host.put(ASQ, 0x1_0000_1000, 8)
    host.put(ACQ, 0x1_0000_2000, 8)
    host.put(CC, cc)
    assert host.get(CSTS) == FATAL
    assert host.controller.last_failure
    host.doorbell(0, 1)
    host.put(CC, 0)
    assert host.get(CSTS) == 0
    host.enable()
    host.identify(1)


@pytest.mark.parametrize("kind", [1, 2])
def test_shutdown_completes_and_a_reset_ends_it(host: Host, kind: int) -> None:
    host.enable()
    host.put(CC, ENABLE | kind << 14)
    assert host.get(CSTS) == READY | 2 << 2
    host.put(CC, 0)
    assert host.get(CSTS) == 0
    host.enable()
    host.identify(1)


def test_interrupt_masks_read_back(host: Host) -> None:
    host.put(INTMS, 0x5)
    host.put(INTMS, 0x2)
    assert (host.get(INTMS), host.get(INTMC)) == (7, 7)
    host.put(INTMC, 0x3)
    assert (host.get(INTMS), host.get(INTMC)) == (4, 4)


def test_doorbells_mean_nothing_while_disabled(host: Host) -> None:
    host.doorbell(0, 1)
    host.doorbell(1, 1)
    host.enable()
    host.identify(1)
    assert host.log(0x01, 64) == bytes(64)  # nothing was noted


@pytest.mark.parametrize(("offset", "size"), [(DOORBELLS + 1, 1), (DOORBELLS, 2), (DOORBELLS, 8), (DOORBELLS + 2, 4)])
def test_a_doorbell_is_one_aligned_dword(host: Host, offset: int, size: int) -> None:
    host.enable()
    host.admin.push(host.entry(IDENTIFY, prp1=host.allocate(), cdw10=1))
    host.put(offset, 1, size)
    assert host.admin.pop() is None
    host.admin.ring()
    assert host.admin.pop() is not None


@pytest.mark.parametrize("kind", list(ResetKind))
def test_reset_of_the_function_in_the_middle(host: Host, kind: ResetKind) -> None:
    host.enable()
    queue = host.create_queue(1, 8)
    queue.push(host.entry(2, nsid=1, prp1=host.allocate()))
    host.controller.reset(kind)
    assert host.get(CSTS) == host.get(CC) == host.get(AQA) == host.get(ASQ, 8) == 0
    queue.ring()
    assert queue.pop() is None
    host.set_bus_master(True)
    host.enable()
    host.identify(1)


def test_nothing_moves_without_bus_mastering_and_nothing_is_lost(host: Host) -> None:
    host.enable()
    host.set_bus_master(False)
    host.admin.push(host.entry(IDENTIFY, prp1=host.allocate(), cdw10=1))
    host.admin.ring()
    assert host.admin.pop() is None
    assert host.get(CSTS) == READY
    host.set_bus_master(True)
    host.controller.drained()
    done = host.admin.pop()
    assert done is not None
    assert done.status == 0


def test_reads_beyond_the_registers_are_zero(host: Host) -> None:
    for offset in (0x38, 0x3C, 0xFFC, DOORBELLS, DOORBELLS + 4):
        assert host.get(offset) == 0
