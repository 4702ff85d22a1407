"""Identify, features and log pages: NVM Express 1.4, 5.13 to 5.15 and 5.21; offsets from its figures."""

import struct
import uuid
from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from nvme_driver import (
    BROADCAST,
    CC,
    CREATE_CQ,
    FLUSH,
    GET_FEATURES,
    GET_LOG,
    IDENTIFY,
    READ,
    SET_FEATURES,
    WRITE,
    Host,
)
from paged_host import MIB

from backend.endpoints.nvme import Identity, Namespace
from backend.pci import ResetKind

BAD_OPCODE, BAD_FIELD, TRANSFER_ERROR, BAD_NAMESPACE, SEQUENCE_ERROR, BAD_PRP_OFFSET = (
    0x01,
    0x02,
    0x04,
    0x0B,
    0x0C,
    0x13,
)
BAD_LOG, NOT_SAVEABLE, NOT_PER_NAMESPACE = 0x109, 0x10D, 0x10F


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    host.enable()
    yield host
    host.close()


def test_identify_controller(host: Host) -> None:
    page = host.identify(1)
    vendor, subsystem_vendor = struct.unpack_from("<HH", page, 0)
    assert (vendor, subsystem_vendor) == (host.controller.config.read(0, 2), host.controller.config.read(0x2C, 2))
    serial, model, firmware = page[4:24], page[24:64], page[64:72]
    for text in (serial, model, firmware):
        assert text.decode("ascii").isprintable() and not text.startswith(b" ")  # ASCII, padded with spaces
    assert page[77] == 8  # MDTS: 2^8 pages of 4 KiB
    assert struct.unpack_from("<I", page, 80) == (0x0001_0400,)
    assert page[111] == 1  # I/O controller
    assert struct.unpack_from("<H", page, 256) == (1 << 8,)  # OACS: Doorbell Buffer Config alone
    assert page[259] == 3  # AERL
    assert page[260] == 0x03  # one firmware slot, read-only
    assert page[261] == 0x07  # LPA
    assert page[262] == 63  # ELPE
    assert (page[512], page[513]) == (0x66, 0x44)
    assert struct.unpack_from("<I", page, 516) == (1,)
    assert struct.unpack_from("<H", page, 520) == (0b1_1101,)  # Compare, Dataset Management, Write Zeroes, Select
    assert page[525] == 0b111
    assert struct.unpack_from("<I", page, 536) == (0,)  # no SGLs
    name = page[768:1024].rstrip(b"\0").decode()
    assert name.startswith("nqn.2014-08.org.nvmexpress:uuid:")
    uuid.UUID(name.removeprefix("nqn.2014-08.org.nvmexpress:uuid:"))
    assert int.from_bytes(page[280:296], "little") == 2 * MIB


@pytest.mark.parametrize("block_size", [512, 4096])
def test_identify_namespace(block_size: int) -> None:
    host = Host(namespace=Namespace.in_memory(3 * MIB, block_size=block_size))
    host.enable()
    for nsid in (1, BROADCAST):
        page = host.identify(0, nsid)
        assert struct.unpack_from("<3Q", page, 0) == (3 * MIB // block_size,) * 3
        assert page[25] == page[26] == 0  # one format, in use
        assert page[33] & 7 == 1  # deallocated blocks read as zeroes
        metadata, data, _ = struct.unpack_from("<HBB", page, 128)
        assert (metadata, 1 << data) == (0, block_size)
    host.close()


def test_identify_lists(host: Host) -> None:
    assert host.identify(2, 0) == struct.pack("<I", 1) + bytes(PAGE - 4)
    assert host.identify(2, 1) == bytes(PAGE)
    kind, length, _, identity = struct.unpack_from("<BBH16s", host.identify(3, 1), 0)
    assert (kind, length) == (3, 16)
    assert identity == host.namespace.uuid.bytes
    assert host.identify(3, 1)[20:] == bytes(PAGE - 20)


@pytest.mark.parametrize(
    ("cns", "nsid", "status"),
    [
        (0, 0, BAD_NAMESPACE),
        (0, 2, BAD_NAMESPACE),
        (3, 0, BAD_NAMESPACE),
        (3, BROADCAST, BAD_NAMESPACE),
        (2, BROADCAST, BAD_NAMESPACE),
        (2, BROADCAST - 1, BAD_NAMESPACE),
        (4, 1, BAD_FIELD),
        (6, 0, BAD_FIELD),
        (0xFF, 0, BAD_FIELD),
    ],
)
def test_identify_refuses(host: Host, cns: int, nsid: int, status: int) -> None:
    done = host.submit_admin(IDENTIFY, nsid=nsid, prp1=host.allocate(), cdw10=cns)
    assert (done.status, done.do_not_retry, done.more) == (status, True, True)


def test_identify_into_two_pages_and_into_none(host: Host) -> None:
    first, second = host.allocate(), host.allocate()
    host.poke(second, b"\xee" * PAGE)
    done = host.submit_admin(IDENTIFY, prp1=first + 0x400, prp2=second, cdw10=1)
    assert done.status == 0
    assert host.peek(first + 0x400, 0xC00) + host.peek(second, 0x400) == host.identify(1)
    assert host.peek(second + 0x400, 0xC00) == b"\xee" * 0xC00
    assert host.submit_admin(IDENTIFY, prp1=first + 2, prp2=second, cdw10=1).status == BAD_PRP_OFFSET
    assert host.submit_admin(IDENTIFY, prp1=first + 4, prp2=second + 4, cdw10=1).status == BAD_PRP_OFFSET
    done = host.submit_admin(IDENTIFY, prp1=0, cdw10=1)
    assert (done.status, done.do_not_retry) == (TRANSFER_ERROR, False)


@pytest.mark.parametrize("opcode", [0x03, 0x0D, 0x10, 0x11, 0x18, 0x80, 0x81, 0xC0, 0xFF])
def test_unknown_opcodes(host: Host, opcode: int) -> None:
    assert host.submit_admin(opcode).status == BAD_OPCODE


@pytest.mark.parametrize("flags", [0x01, 0x02, 0x40, 0x80])
def test_fused_and_sgl_are_refused(host: Host, flags: int) -> None:
    done = host.submit_admin(IDENTIFY, prp1=host.allocate(), cdw10=1, flags=flags)
    assert done.status == BAD_FIELD


def test_two_controllers_are_told_apart() -> None:
    names = [Identity.named(name) for name in ("nvme0", "nvme1", "a name that is too long", "né\n")]
    assert len({identity.serial for identity in names}) == len({identity.subsystem_name for identity in names}) == 4


def test_serial_number_is_printable() -> None:
    Identity("x" * 20)
    for serial in ("", "x" * 21, "naïve", "a\nb"):
        with pytest.raises(ValueError, match="serial number"):
            Identity(serial)


# Features


def get(host: Host, feature: int, *, select: int = 0, cdw11: int = 0, nsid: int = 0) -> tuple[int, int]:
    done = host.submit_admin(GET_FEATURES, nsid=nsid, cdw10=feature | select << 8, cdw11=cdw11)
    return done.status, done.result


def put(host: Host, feature: int, value: int, *, nsid: int = 0, save: bool = False) -> int:
    return host.submit_admin(SET_FEATURES, nsid=nsid, cdw10=feature | (1 << 31 if save else 0), cdw11=value).status


def test_number_of_queues(host: Host) -> None:
    done = host.submit_admin(SET_FEATURES, cdw10=0x07, cdw11=1 << 16 | 1)
    assert (done.status, done.result) == (0, 15 << 16 | 15)
    assert get(host, 0x07) == (0, 15 << 16 | 15)
    assert put(host, 0x07, 0xFFFF) == BAD_FIELD
    assert put(host, 0x07, 0xFFFF << 16) == BAD_FIELD
    page = host.allocate()
    assert host.submit_admin(CREATE_CQ, prp1=page, cdw10=7 << 16 | 1, cdw11=1).status == 0
    assert put(host, 0x07, 1 << 16 | 1) == SEQUENCE_ERROR


@pytest.mark.parametrize(
    ("feature", "value", "kept"),
    [
        (0x01, 0x0302_0107, 0x0302_0107),
        (0x02, 0x20, 0x20),
        (0x06, 0, 0),
        (0x08, 0x1234, 0x1234),
        (0x0A, 1, 1),
        (0x0B, 0xFFFF_FFFF, 0xFF),  # no notices are offered
    ],
)
def test_set_then_get(host: Host, feature: int, value: int, kept: int) -> None:
    _, default = get(host, feature)
    assert put(host, feature, value) == 0
    assert get(host, feature) == (0, kept)
    assert get(host, feature, select=1) == get(host, feature, select=2) == (0, default)
    assert get(host, feature, select=3) == (0, 1 << 2)  # changeable
    host.put(CC, 0)
    host.enable()
    assert get(host, feature) == (0, default)  # nothing is saved over a reset


def test_temperature_thresholds(host: Host) -> None:
    assert get(host, 0x04) == (0, 343)
    assert put(host, 0x04, 310) == 0
    assert put(host, 0x04, 1 << 20 | 250) == 0
    assert get(host, 0x04) == (0, 310)
    assert get(host, 0x04, cdw11=1 << 20) == (0, 250)
    assert put(host, 0x04, 0xF << 16 | 320) == 0  # all sensors
    assert get(host, 0x04) == (0, 320)
    assert put(host, 0x04, 1 << 16 | 320) == BAD_FIELD  # there is no sensor 1
    assert put(host, 0x04, 2 << 20 | 320) == BAD_FIELD
    assert get(host, 0x04, cdw11=1 << 16)[0] == BAD_FIELD
    assert host.log(0x02, 512)[0] == 0
    assert put(host, 0x04, 1 << 20 | 330) == 0  # under 330 K is too cold
    assert host.log(0x02, 512)[0] == 2


def test_interrupt_vector_configuration(host: Host) -> None:
    assert get(host, 0x09, cdw11=5) == (0, 5)
    assert put(host, 0x09, 1 << 16 | 5) == 0
    assert get(host, 0x09, cdw11=5) == (0, 1 << 16 | 5)
    assert get(host, 0x09, cdw11=6) == (0, 6)
    assert put(host, 0x09, 17) == BAD_FIELD
    assert get(host, 0x09, cdw11=17)[0] == BAD_FIELD


def test_error_recovery_is_of_the_namespace(host: Host) -> None:
    assert put(host, 0x05, 7, nsid=1) == 0
    assert get(host, 0x05, nsid=1) == (0, 7)
    assert get(host, 0x05, nsid=1, select=3) == (0, 0b110)
    assert put(host, 0x05, 9, nsid=BROADCAST) == 0
    assert get(host, 0x05, nsid=1) == (0, 9)
    assert put(host, 0x05, 1 << 16, nsid=1) == BAD_FIELD  # DULBE is not offered
    assert put(host, 0x05, 7, nsid=0) == put(host, 0x05, 7, nsid=2) == BAD_NAMESPACE
    assert get(host, 0x05, nsid=BROADCAST)[0] == BAD_NAMESPACE


def test_features_refuse(host: Host) -> None:
    assert put(host, 0x06, 1, save=True) == NOT_SAVEABLE
    assert put(host, 0x06, 1, nsid=1) == NOT_PER_NAMESPACE
    assert put(host, 0x06, 1, nsid=9) == BAD_NAMESPACE
    assert put(host, 0x02, 1) == BAD_FIELD  # one power state
    for feature in (0x00, 0x03, 0x0C, 0x0D, 0x10, 0x80, 0xFF):
        assert put(host, feature, 1) == BAD_FIELD
        assert get(host, feature)[0] == BAD_FIELD
    assert get(host, 0x06, select=4)[0] == get(host, 0x06, select=7)[0] == BAD_FIELD


# Log pages


def test_error_log_holds_the_newest_first(host: Host) -> None:
    queue = host.create_queue(1, 8)
    assert host.log(0x01, 4096) == bytes(4096)
    host.submit_io(queue, READ, 5, 1, nsid=3, prp1=host.allocate())
    lost = host.allocate()
    host.unmap(lost)
    done = host.submit_io(queue, WRITE, 0x1F, 1, prp1=lost)
    assert (done.status, done.more, done.do_not_retry) == (TRANSFER_ERROR, True, False)
    page = host.log(0x01, 4096)
    newest = struct.unpack_from("<QHHHHQIBB2xQ", page, 0)
    assert newest == (2, 1, done.cid, (TRANSFER_ERROR | 1 << 13) << 1, 24, 0x1F, 1, 0, 0, lost)
    older = struct.unpack_from("<QHHHHQI", page, 64)
    assert (older[0], older[1], older[3], older[4:]) == (1, 1, (BAD_NAMESPACE | 3 << 13) << 1, (4, 5, 3))
    assert page[128:] == bytes(4096 - 128)
    for _ in range(100):
        host.submit_io(queue, READ, 0, 1, nsid=3)
    page = host.log(0x01, 4096)
    assert [struct.unpack_from("<Q", page, 64 * index)[0] for index in range(64)] == list(range(102, 38, -1))


def test_health_counts(host: Host) -> None:
    queue = host.create_queue(1, 8)
    buffer = host.allocate(2)
    for _ in range(3):
        assert host.submit_io(queue, READ, 0, 16, prp1=buffer, prp2=buffer + PAGE).status == 0
    assert host.submit_io(queue, WRITE, 0, 1, prp1=buffer).status == 0
    host.submit_io(queue, READ, 0, 1, nsid=2)
    page = host.log(0x02, 512)
    warning, temperature, spare, threshold, used = struct.unpack_from("<BHBBB", page, 0)
    assert (warning, spare, used) == (0, 100, 0)
    assert 273 < temperature < 343
    assert 0 < threshold < 100
    wide = [int.from_bytes(page[offset : offset + 16], "little") for offset in range(32, 192, 16)]
    assert wide[:4] == [1, 1, 3, 1]  # thousands of 512 bytes read and written, rounded up; commands
    assert wide[8:] == [0, 1]  # media errors, error log entries
    for nsid in (0, 1):
        done = host.submit_admin(GET_LOG, nsid=nsid, prp1=host.allocate(), cdw10=0x02 | 127 << 16)
        assert done.status == 0
    assert host.submit_admin(GET_LOG, nsid=2, prp1=buffer, cdw10=0x02 | 127 << 16).status == BAD_NAMESPACE


def test_firmware_slot(host: Host) -> None:
    page = host.log(0x03, 512)
    assert page[0] == 1
    assert page[8:16] == host.identify(1)[64:72]
    assert page[16:] == bytes(496)


def test_commands_supported(host: Host) -> None:
    page = host.log(0x05, 4096)
    admin = {opcode for opcode in range(256) if struct.unpack_from("<I", page, 4 * opcode)[0] & 1}
    io = {opcode: struct.unpack_from("<I", page, 1024 + 4 * opcode)[0] for opcode in range(256)}
    queue = host.create_queue(1, 8)
    for opcode in range(256):
        if opcode not in (0x0C,):
            assert (host.submit_admin(opcode, nsid=0, cdw10=0xFFFF_FFFF).status != BAD_OPCODE) == (opcode in admin)
        assert (host.submit(queue, opcode, nsid=9).status != BAD_OPCODE) == bool(io[opcode] & 1)
    assert {opcode for opcode, effects in io.items() if effects & 2} == {0x01, 0x08, 0x09}  # change the content
    assert page[2048:] == bytes(2048)


def test_log_pages_by_parts(host: Host) -> None:
    host.submit_admin(0xC0)
    whole = host.log(0x05, 4096)
    assert host.log(0x05, 8, offset=1024) == whole[1024:1032]
    assert host.log(0x05, 64, offset=4064) == whole[4064:] + bytes(32)
    assert host.log(0x05, 64, offset=4096) == bytes(64)
    buffer = host.allocate()
    for fields in ({"cdw12": 4100}, {"cdw12": 2}, {"cdw13": 1}, {"cdw11": 0xFFFF}):
        done = host.submit_admin(GET_LOG, nsid=BROADCAST, prp1=buffer, cdw10=0x05 | 15 << 16, **fields)
        assert done.status == BAD_FIELD
    for page in (0x00, 0x04, 0x06, 0x70, 0x80, 0xFF):
        assert host.submit_admin(GET_LOG, nsid=BROADCAST, prp1=buffer, cdw10=page | 15 << 16).status == BAD_LOG


def test_power_cycles_and_unsafe_shutdowns(host: Host) -> None:
    host.controller.reset(ResetKind.LOST_CONNECTION)
    host.set_bus_master(True)
    host.enable()
    page = host.log(0x02, 512)
    assert int.from_bytes(page[112:128], "little") == 2
    assert int.from_bytes(page[144:160], "little") == 1
    assert host.submit(host.create_queue(1, 4), FLUSH, nsid=1).status == 0
