"""A function without a transport: interrupts, bus mastering, reset, the DMA port."""

import pytest

from backend.pci import (
    Bar,
    Msi,
    Msix,
    PciExpress,
    PciFunction,
    PciIds,
    PowerManagement,
    Register,
    RegisterTable,
    ResetKind,
)

COMMAND, BUS_MASTER = 0x04, 4
MSI, MSIX = 0x05, 0x11


class Line:
    """Where interrupts arrive."""

    def __init__(self, function: PciFunction, *, taken: bool = True) -> None:
        self.vectors: list[int] = []
        self.taken = taken
        function.connect_interrupts(self)

    def __call__(self, vector: int) -> bool:
        if self.taken:
            self.vectors.append(vector)
        return self.taken


def made(*, msi: Msi | None = None, msix: Msix | None = None, force_bus_master: bool = False) -> PciFunction:
    registers = RegisterTable([Register("R", 0, 4, 7, rw=0xFF)])
    return PciFunction(
        name="made",
        ids=PciIds(1, 2),
        bars={0: Bar(0x1000, registers), 1: Bar(0x1000)},
        capabilities=[each for each in (msi, msix, PciExpress()) if each is not None],
        force_bus_master=force_bus_master,
    )


def enable(function: PciFunction, capability: int, control: int) -> None:
    offset = function.config.find(capability)
    assert offset is not None
    function.config.write(offset + 2, 2, control)


def test_an_interrupt_needs_enable_and_bus_master() -> None:
    function = made(msi=Msi())
    line = Line(function)
    function.interrupt()
    enable(function, MSI, 1)
    assert (line.vectors, function.interrupts.pending) == ([], frozenset({0}))
    function.config.write(COMMAND, 2, BUS_MASTER)
    assert (line.vectors, function.interrupts.pending) == ([0], frozenset())
    function.config.write(COMMAND, 2, 0)
    function.interrupt()
    function.interrupt()
    assert line.vectors == [0]
    function.config.write(COMMAND, 1, BUS_MASTER)
    assert line.vectors == [0, 0]  # a vector pends once, however often it was raised


def test_a_function_that_sleeps_sends_nothing() -> None:
    """D3hot: no requests and no interrupts until it is in D0 again (PM 1.2, 5.4.1)."""
    function = PciFunction(name="sleepy", ids=PciIds(1, 2), capabilities=[PowerManagement(), Msi()])
    line = Line(function)
    power = function.config.find(0x01)
    assert power is not None
    enable(function, MSI, 1)
    function.config.write(COMMAND, 2, BUS_MASTER)
    function.config.write(power + 4, 2, 3)
    function.interrupt()
    assert (function.bus_master, line.vectors) == (False, [])
    function.config.write(power + 4, 1, 0)
    assert (function.bus_master, line.vectors) == (True, [0])
    function.config.write(power + 4, 2, 3)
    function.reset(ResetKind.DEVICE)
    function.config.write(COMMAND, 2, BUS_MASTER)
    assert function.bus_master


def test_a_forced_bus_master_interrupts_without_the_guests_leave() -> None:
    function = made(msi=Msi(), force_bus_master=True)
    line = Line(function)
    enable(function, MSI, 1)
    function.config.write(COMMAND, 2, 0)
    function.interrupt()
    assert (function.bus_master, line.vectors) == (True, [0])


@pytest.mark.parametrize(
    ("granted", "messages"), [(0, [0] * 4), (1, [0, 1, 0, 1]), (2, [0, 1, 2, 3]), (5, [0, 1, 2, 3])]
)
def test_msi_vectors_share_the_messages_granted(granted: int, messages: list[int]) -> None:
    function = made(msi=Msi(vectors=4), force_bus_master=True)
    line = Line(function)
    enable(function, MSI, granted << 4 | 1)
    for vector in range(4):
        function.interrupt(vector)
    assert line.vectors == messages


def test_a_masked_msi_message_waits() -> None:
    function = made(msi=Msi(vectors=2, per_vector_mask=True), force_bus_master=True)
    line = Line(function)
    offset = function.config.find(MSI)
    assert offset is not None
    enable(function, MSI, 1 << 4 | 1)
    function.config.write(offset + 0x10, 4, 0b10)
    function.interrupt(0)
    function.interrupt(1)
    assert (line.vectors, function.interrupts.pending) == ([0], frozenset({1}))
    assert function.config.read(offset + 0x14, 4) == 0b10
    function.config.write(offset + 0x10, 4, 0)
    assert line.vectors == [0, 1]
    assert function.config.read(offset + 0x14, 4) == 0


def test_msix_comes_before_msi_and_obeys_its_function_mask() -> None:
    function = made(msi=Msi(), msix=Msix(3, 0, 0x100, 0x200), force_bus_master=True)
    line = Line(function)
    enable(function, MSI, 1)
    enable(function, MSIX, 0xC000)
    function.interrupt(2)
    assert function.interrupts.pending == {2}
    enable(function, MSIX, 0x8000)
    assert line.vectors == [2]
    enable(function, MSIX, 0)
    function.interrupt(2)  # now by MSI, with its one message
    assert line.vectors == [2, 0]


def test_an_interrupt_that_nobody_takes_is_kept() -> None:
    function = made(msix=Msix(4, 0, 0x100, 0x200), force_bus_master=True)
    function.interrupt(3)
    line = Line(function, taken=False)
    enable(function, MSIX, 0x8000)
    function.interrupt(1)
    assert function.interrupts.pending == {1, 3}
    line.taken = True
    function.interrupts.deliver_pending()
    assert line.vectors == [1, 3]


def test_the_pending_bit_array_shows_what_waits() -> None:
    """One bit a vector, read in dwords or qwords (PCI 3.0, 6.8.2.10)."""
    function = made(msix=Msix(70, 0, 0x100, 0x800), force_bus_master=True)
    for vector in (0, 33, 69):
        function.interrupt(vector)
    assert [function.bar_read(0, offset, 4) for offset in range(0x800, 0x810, 4)] == [1, 2, 0x20, 0]
    assert function.bar_read(0, 0x800, 8) == 0x2_0000_0001
    Line(function)
    enable(function, MSIX, 0x8000)
    assert function.bar_read(0, 0x800, 8) == 0


def test_a_vector_that_is_none_is_the_devices_mistake() -> None:
    with pytest.raises(ValueError, match="made: vector 4 of 4"):
        made(msi=Msi(vectors=2), msix=Msix(4, 0, 0x100, 0x200)).interrupt(4)
    with pytest.raises(ValueError, match="vector 0 of 0"):
        made().interrupt()


@pytest.mark.parametrize(
    "msix", [Msix(4, 2, 0, 0x100), Msix(4, 0, 0xFC8, 0), Msix(4, 0, 0, 0x1000), Msix(4, 0, 0, 0, pba_bar=3)]
)
def test_msix_must_lie_inside_a_bar(msix: Msix) -> None:
    with pytest.raises(ValueError, match="made: the MSI-X"):
        made(msix=msix)


def test_reset_brings_back_what_was_at_first() -> None:
    function = made(msi=Msi())
    fresh = function.config.read_bytes(0, 4096)
    function.interrupt()
    function.bar_write(0, 0, 4, 0x55)
    function.config.write_bytes(0, b"\xff" * 0x44)
    function.reset(ResetKind.DEVICE)
    assert function.bar_read(0, 0, 4) == 7
    assert function.config.read_bytes(0, 4096) == fresh
    assert function.interrupts.pending == frozenset()


def test_a_function_level_reset_is_a_write_to_device_control() -> None:
    kinds: list[ResetKind] = []

    class Noting(PciFunction):
        def reset(self, kind: ResetKind) -> None:
            super().reset(kind)
            kinds.append(kind)

    function = Noting(name="noting", ids=PciIds(1, 2), capabilities=[PciExpress()])
    offset = function.config.find(0x10)
    assert offset is not None
    function.config.write(COMMAND, 2, BUS_MASTER)
    function.config.write(offset + 8, 2, 0x7FFF)
    assert kinds == []
    function.config.write(offset + 8, 2, 0x8000)
    assert kinds == [ResetKind.FLR]
    assert (function.bus_master, function.config.read(offset + 8, 2)) == (False, 0x2810)


def test_a_bar_without_registers_reads_as_zero() -> None:
    function = made()
    function.bar_write(1, 0, 4, 5)
    assert function.bar_read(1, 0, 4) == 0


def test_no_memory_without_a_port() -> None:
    with pytest.raises(RuntimeError, match="made: no DMA port is connected"):
        _ = made().dma
