"""Config space against bytes laid out by hand from the specifications, and against a model of single bytes."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.pci import (
    Ats,
    Bar,
    Capability,
    ConfigSpace,
    Dsn,
    Msi,
    Msix,
    Pasid,
    PciExpress,
    PciIds,
    PowerManagement,
    Pri,
    RawCapability,
    Register,
    RegisterTable,
    VendorSpecific,
)

IDS = PciIds(0x1022, 0x1419, subsystem_vendor=0x1AF4, subsystem=0x1100, revision=0x5A, class_code=0x080600)


def space(*capabilities: Capability, bars: dict[int, Bar] | None = None, force_bus_master: bool = False) -> ConfigSpace:
    return ConfigSpace(IDS, bars, capabilities, force_bus_master=force_bus_master)


# -- Header ------------------------------------------------------------------------------------------------------------


def test_the_header_is_laid_out_as_specified() -> None:
    """PCI Local Bus 3.0, figure 6-1."""
    expected = bytearray(4096)
    struct.pack_into("<HH", expected, 0x00, 0x1022, 0x1419)
    expected[0x08:0x0C] = bytes((0x5A, 0x00, 0x06, 0x08))
    struct.pack_into("<HH", expected, 0x2C, 0x1AF4, 0x1100)
    assert space().read_bytes(0, 4096) == expected


def test_a_function_without_a_subsystem_has_its_own_ids() -> None:
    assert ConfigSpace(PciIds(0x1B36, 0x0010)).read(0x2C, 4) == 0x0010_1B36


def test_what_a_guest_may_write_of_the_header() -> None:
    config = space()
    config.write_bytes(0, b"\xff" * 64)
    assert config.read(0x00, 4) == 0x1419_1022
    assert config.read(0x04, 2) == 0x0547  # I/O, memory, bus master, parity, SERR, INTx disable
    assert config.read(0x06, 2) == 0
    assert config.read(0x0C, 4) == 0x0000_00FF  # cache line size; no latency timer, header type 0, no BIST
    assert config.read(0x10, 24) == 0
    assert config.read(0x30, 4) == 0  # no expansion ROM
    assert config.read(0x3C, 4) == 0x0000_00FF  # interrupt line; no pin
    config.reset()
    assert config.read(0x04, 4) == 0


def test_errors_in_status_are_cleared_by_writing_one() -> None:
    config = space(PowerManagement())
    config.set(0x06, 2, 0xF910)
    config.write(0x06, 2, 0x8110)
    assert config.read(0x06, 2) == 0x7810


def test_a_forced_bus_master_stays_one() -> None:
    config = space(force_bus_master=True)
    assert config.read(0x04, 2) == 0x0004
    config.write(0x04, 2, 0)
    assert config.read(0x04, 2) == 0x0004
    config.reset()
    assert config.read(0x04, 2) == 0x0004


# -- BARs --------------------------------------------------------------------------------------------------------------


def sized(config: ConfigSpace, index: int) -> int:
    """What firmware reads after writing ones (PCI 3.0, 6.2.5.1)."""
    config.write(0x10 + 4 * index, 4, 0xFFFF_FFFF)
    return config.read(0x10 + 4 * index, 4)


def test_bars_answer_to_sizing() -> None:
    bars = {
        0: Bar(0x4000),
        1: Bar(0x20, is_io=True),
        2: Bar(0x10_0000, is_64bit=True, prefetchable=True),
        4: Bar(16, prefetchable=True),
        5: Bar(4, is_io=True),
    }
    config = space(bars=bars)
    assert [config.read(0x10 + 4 * n, 4) for n in range(6)] == [0, 1, 0xC, 0, 8, 1]
    assert [sized(config, n) for n in range(6)] == [
        0xFFFF_C000,
        0xFFFF_FFE1,
        0xFFF0_000C,
        0xFFFF_FFFF,
        0xFFFF_FFF8,
        0xFFFF_FFFD,
    ]
    config.write(0x10, 4, 0xFEBF_4123)
    assert config.read(0x10, 4) == 0xFEBF_4000


@pytest.mark.parametrize(
    ("bar", "complaint"),
    [
        (lambda: Bar(0x3000), "power of two"),
        (lambda: Bar(8), "from 16"),
        (lambda: Bar(0), "power of two"),
        (lambda: Bar(1 << 32), "to 0x80000000"),
        (lambda: Bar(0x100, is_io=True, is_64bit=True), "neither 64-bit"),
        (lambda: Bar(16, RegisterTable([Register("R", 16, 4)])), "registers end at 0x14"),
        (lambda: space(bars={6: Bar(16)}), "BAR6"),
        (lambda: space(bars={5: Bar(16, is_64bit=True)}), "BAR5"),
        (lambda: space(bars={0: Bar(16, is_64bit=True), 1: Bar(16)}), "BAR1 holds the upper half"),
    ],
)
def test_bars_that_cannot_be_are_refused(bar: object, complaint: str) -> None:
    assert callable(bar)
    with pytest.raises(ValueError, match=complaint):
        bar()


# -- Capabilities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "reset", "writable"),
    [
        (PowerManagement(), "01 00 0300 0800 00 00", "00 00 0000 0300 00 00"),
        (Msi(), "05 00 8000 00000000 00000000 0000", "00 00 7100 fcffffff ffffffff ffff"),
        (Msi(vectors=8, is_64bit=False), "05 00 0600 00000000 0000", "00 00 7100 fcffffff ffff"),
        (
            Msi(vectors=32, per_vector_mask=True),
            "05 00 8a01 00000000 00000000 0000 0000 00000000 00000000",
            "00 00 7100 fcffffff ffffffff ffff 0000 ffffffff 00000000",
        ),
        (
            Msi(vectors=4, is_64bit=False, per_vector_mask=True),
            "05 00 0401 00000000 0000 0000 00000000 00000000",
            "00 00 7100 fcffffff ffff 0000 0f000000 00000000",
        ),
        (Msix(33, 4, 0x2000, 0x3000), "11 00 2000 04200000 04300000", "00 00 00c0 00000000 00000000"),
        (Msix(2048, 0, 0, 8, pba_bar=1), "11 00 ff07 00000000 09000000", "00 00 00c0 00000000 00000000"),
        (
            PciExpress(),
            "10 00 0200 01800010 1028 0000 11000000 0000 1100"
            + "00" * 16 + "00000000 0000 0000 02000000 0100 0000" + "00" * 8,
            "00 00 0000 00000000 ffff 0000 00000000 cb01 0000"
            + "00" * 16 + "00000000 ffff 0000 00000000 ffff 0000" + "00" * 8,
        ),
        (
            PciExpress(integrated=True, flr=False, payload=128, prefixes=True),
            "10 00 9200 00800000 1028 0000 00000000 0000 0000"
            + "00" * 16 + "00002000 0000 0000 00000000 0000 0000" + "00" * 8,
            "00 00 0000 00000000 ff7f 0000 00000000 0000 0000"
            + "00" * 16 + "00000000 ffff 0000 00000000 0000 0000" + "00" * 8,
        ),
        (VendorSpecific(b"vio"), "09 00 06 76696f", "00 00 00 000000"),
        (RawCapability(0x0F, bytes.fromhex("0b09 01000000")), "0f 00 0b09 01000000", "00 00 0000 00000000"),
        (RawCapability(0x0F, b"\1\2\3", writable=b"\xf0"), "0f 00 01 02 03", "00 00 f0 00 00"),
    ],
)  # fmt: skip
def test_capabilities_are_laid_out_as_specified(capability: Capability, reset: str, writable: str) -> None:
    config = space(capability)
    expected = bytes.fromhex(reset)
    assert (config.read(0x06, 2), config.read(0x34, 1), config.find(capability.id)) == (0x10, 0x40, 0x40)
    assert config.read_bytes(0x40, 192) == expected.ljust(192, b"\0")
    config.write_bytes(0x40, b"\xff" * 192)
    mask = bytes.fromhex(writable)
    assert config.read_bytes(0x40, 192) == bytes(a | b for a, b in zip(expected, mask, strict=True)).ljust(192, b"\0")


@pytest.mark.parametrize(
    ("capability", "reset", "writable"),
    [
        (Dsn(0x1122_3344_5566_7788), "03000100 88776655 44332211", "00000000 00000000 00000000"),
        (Ats(), "0f000100 2000 0000", "00000000 0000 1f80"),
        (Ats(queue_depth=5, page_aligned=False), "0f000100 0500 0000", "00000000 0000 1f80"),
        (Pri(outstanding=0x1234), "13000100 0000 0081 34120000 00000000", "00000000 0300 0000 00000000 ffffffff"),
        (Pasid(), "1b000100 0010 0000", "00000000 0000 0100"),
        (Pasid(width=20, execute=True, privileged=True), "1b000100 0614 0000", "00000000 0000 0700"),
    ],
)
def test_extended_capabilities_are_laid_out_as_specified(capability: Capability, reset: str, writable: str) -> None:
    config = space(capability)
    expected = bytes.fromhex(reset)
    assert config.find(capability.id, extended=True) == 0x100
    assert config.read_bytes(0x100, 256) == expected.ljust(256, b"\0")
    config.write_bytes(0x100, b"\xff" * 256)
    mask = bytes.fromhex(writable)
    assert config.read_bytes(0x100, 256) == bytes(a | b for a, b in zip(expected, mask, strict=True)).ljust(256, b"\0")


def test_the_amd_iommu_as_a_stock_kernel_expects_it() -> None:
    """Capability 0F at 0x40 whose next is the MSI capability at 0x60."""
    amd = RawCapability(0x0F, struct.pack("<HI", 0x090B, 1) + bytes(16), offset=0x40)
    config = space(amd, Msi(offset=0x60), force_bus_master=True)
    assert (config.read(0x34, 1), config.read(0x40, 4), config.read(0x44, 4)) == (0x40, 0x090B_600F, 1)
    assert config.read(0x60, 4) == 0x0080_0005


def chain(config: ConfigSpace) -> list[tuple[int, int]]:
    """(offset, id) by following the links, as a guest does."""
    found = []
    offset = config.read(0x34, 1)
    while offset:
        found.append((offset, config.read(offset, 1)))
        offset = config.read(offset + 1, 1)
    return found


def extended_chain(config: ConfigSpace) -> list[tuple[int, int, int]]:
    """(offset, id, version)."""
    found = []
    offset = 0x100
    while offset:
        header = config.read(offset, 4)
        found.append((offset, header & 0xFFFF, header >> 16 & 0xF))
        offset = header >> 20
    return found


def test_chains_lead_to_every_capability_in_the_order_given() -> None:
    config = space(
        PciExpress(),
        Dsn(1),
        PowerManagement(offset=0x40),
        Msi(),
        Pasid(),
        Ats(offset=0x200),
        VendorSpecific(b"x"),
        Pri(),
    )
    assert [identity for _, identity in chain(config)] == [0x10, 0x01, 0x05, 0x09]
    assert (0x40, 0x01) in chain(config)
    assert [(identity, version) for _, identity, version in extended_chain(config)] == [
        (3, 1),
        (0x1B, 1),
        (0xF, 1),
        (0x13, 1),
    ]
    assert (0x200, 0xF, 1) in extended_chain(config)
    assert config.find(0x11) is None


@pytest.mark.parametrize(
    ("capabilities", "complaint"),
    [
        ([RawCapability(0x0F, bytes(20), offset=0x3C)], r"0xf \(22 bytes\) does not fit at 0x3c"),
        ([RawCapability(0x0F, bytes(20), offset=0x42)], "does not fit at 0x42"),
        ([RawCapability(0x0F, bytes(20), offset=0xF0)], "does not fit at 0xf0"),
        ([RawCapability(0x0F, bytes(20), offset=0x40), Msi(offset=0x50)], "0x5 .* does not fit at 0x50"),
        ([RawCapability(0x0F, bytes(150)), PciExpress()], "does not fit anywhere"),
        ([Dsn(1, offset=0x140)], "the first extended capability stands at 0x100"),
        ([Dsn(1, offset=0x80)], "does not fit at 0x80"),
    ],
)
def test_capabilities_that_do_not_fit_are_refused(capabilities: list[Capability], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        space(*capabilities)


@pytest.mark.parametrize(
    "capability",
    [
        lambda: Msi(vectors=3),
        lambda: Msix(0, 0, 0, 0x800),
        lambda: Msix(2049, 0, 0, 0x10000),
        lambda: Msix(4, 0, 4, 0x800),
        lambda: Msix(4, 0, 0, 0x20),
        lambda: space(PciExpress(payload=300)),
        lambda: space(Ats(queue_depth=33)),
        lambda: space(Pasid(width=21)),
    ],
)
def test_capabilities_that_cannot_be_are_refused(capability: object) -> None:
    assert callable(capability)
    with pytest.raises(ValueError, match=r"vectors|MSI-X|payload|queue depth|PASIDs"):
        capability()


# -- Accesses ----------------------------------------------------------------------------------------------------------


def writable_map(config: ConfigSpace) -> list[tuple[int, int]]:
    """(writable, cleared by one) of each byte, found out by writing to a space of ones, or zeros."""
    found = []
    for offset in range(4096):
        config.set(offset, 1, 0x00)
        config.write(offset, 1, 0xFF)
        writable = config.read(offset, 1)
        config.set(offset, 1, 0xFF)
        config.write(offset, 1, 0xFF)
        cleared = 0xFF & ~config.read(offset, 1)
        found.append((writable, cleared))
    config.reset()
    return found


FULL = (PowerManagement(), Msi(4), PciExpress(), Dsn(7), Pasid(), Pri())
FULL_BARS = {0: Bar(0x4000), 2: Bar(0x1000, is_64bit=True)}
MAP = writable_map(space(*FULL, bars=FULL_BARS))


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 0x1FF), st.integers(0, 4095)),
            st.sampled_from((1, 2, 3, 4, 8, 64)),
            st.integers(0, 2**64 - 1),
        ),
        max_size=40,
    )
)
def test_any_write_obeys_each_bytes_masks(writes: list[tuple[int, int, int]]) -> None:
    config = space(*FULL, bars=FULL_BARS)
    model = bytearray(config.read_bytes(0, 4096))
    for offset, size, value in writes:
        data = (value.to_bytes(8, "little") * 8)[:size]
        config.write_bytes(offset, data)
        for index, byte in enumerate(data, offset):
            if index < 4096:
                writable, cleared = MAP[index]
                model[index] = (model[index] & ~writable | byte & writable) & ~(byte & cleared)
    assert config.read_bytes(0, 4096) == model


def test_the_masks_of_that_test_are_what_the_specifications_say() -> None:
    config = space(*FULL, bars=FULL_BARS)
    express = config.find(0x10)
    assert express is not None
    assert MAP[0x04] == (0x47, 0)
    assert MAP[0x07] == (0, 0xF9)
    assert [MAP[at][0] for at in range(0x10, 0x20)] == [0, 0xC0, 0xFF, 0xFF] + [0] * 4 + [0, 0xF0] + [0xFF] * 6
    assert MAP[express + 0xA] == (0, 0xF)


def test_hooks_run_for_the_writes_that_touch_them() -> None:
    config = space(Msi())
    seen: list[str] = []
    config.on_write(0x04, 2, lambda: seen.append("command"))
    config.on_write(0x40, 14, lambda: seen.append("msi"))
    config.write(0x06, 2, 0)
    config.write(0x3C, 4, 0)
    assert seen == []
    config.write(0x02, 4, 0)
    config.write(0x4C, 2, 0)
    config.write(0x4D, 1, 0)
    assert seen == ["command", "msi", "msi"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("vendor", 0x10000), ("device", -1), ("revision", 256), ("class_code", 1 << 24), ("subsystem", 0x10000)],
)
def test_ids_that_do_not_fit_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        PciIds(**{"vendor": 1, "device": 2, field: value})
