"""The endpoint of docs/pci.md, as it stands there, with a guest before it that serves its page requests."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1
from pci_sva import Machine, Registers

from backend.ioasid import Code
from backend.pci import PciFunction, ResetKind

PAGE_OF_DOCS = Path(__file__).parents[1] / "docs" / "pci.md"
ADDRESS, LENGTH, PASID, GO, STATUS, RESULT = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x18
IDLE, BUSY, DONE, FAULT = range(4)
MSI_CONTROL = 2
AT = 0x7F12_3456_7000


class Guest:
    """A driver of the checksum endpoint; `content` is what the process has at AT, page by page, once it was touched."""

    def __init__(self) -> None:
        self.machine = Machine(pages=512)
        names: dict[str, Any] = {}
        exec(PAGE_OF_DOCS.read_text().split("```python\n")[1].split("```")[0], names)
        self.function: PciFunction = names["Checksum"]("checksum")
        guest = self.machine.guest
        self.function.rid = DEV1
        self.function.connect_dma(guest.dev1.port)
        self.function.connect_tlb(partial(guest.engine.set_tlb, guest.dev1))
        self.function.connect_page_requests(guest.dev1.page_request)
        self.interrupts: list[int] = []
        self.function.connect_interrupts(self.interrupted)
        self.registers = Registers(self.function.config)
        self.registers.enable_all()
        msi = self.function.config.find(0x05)
        assert msi is not None
        self.function.config.write(msi + MSI_CONTROL, 2, 1)
        self.groups = 0

    def interrupted(self, vector: int) -> bool:
        self.interrupts.append(vector)
        return True

    def go(self, length: int, pasid: int = 1, address: int = AT) -> None:
        for offset, size, value in ((ADDRESS, 8, address), (LENGTH, 4, length), (PASID, 4, pasid), (GO, 4, 1)):
            self.function.bar_write(0, offset, size, value)

    def read(self, offset: int, size: int = 4) -> int:
        return self.function.bar_read(0, offset, size)

    def serve(self, code: Code = Code.SUCCESS) -> None:
        """Map what is asked for, and answer each group."""
        for record in self.machine.guest.ctx.read_faults().records:
            assert record.pasid is not None
            page = (record.iova - AT) // PAGE
            if code == Code.SUCCESS:
                self.machine.processes[record.pasid].map(record.iova, self.machine.data + (2 * page + 1) * PAGE)
            if record.last:
                assert record.group is not None
                self.groups += 1
                self.machine.guest.ctx.page_response(DEV1, record.group, code)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.machine.close()


def test_untouched_pages_are_asked_for_in_groups(guest: Guest) -> None:
    machine = guest.machine
    content = [bytes([number]) * PAGE for number in range(100)]
    for number, data in enumerate(content):
        machine.ram.poke(machine.data + (2 * number + 1) * PAGE, data)
    guest.go(100 * PAGE - 7)
    assert (guest.read(STATUS), guest.interrupts) == (BUSY, [])
    while guest.read(STATUS) == BUSY:
        guest.serve()
    assert guest.read(STATUS) == DONE and guest.interrupts == [0]
    assert guest.read(RESULT, 8) == zlib.crc32(b"".join(content)[:-7])
    assert guest.groups == 4, "32 pages are allocated, so that 100 take four groups"
    guest.go(PAGE)
    assert (guest.read(STATUS), guest.read(RESULT, 8)) == (DONE, zlib.crc32(content[0]))
    assert machine.heard == []


@pytest.mark.parametrize("code", [Code.INVALID, Code.FAILURE])
def test_pages_that_are_not_to_be_had(guest: Guest, code: Code) -> None:
    guest.go(8)
    guest.go(8)  # while it is busy: nothing
    guest.serve(code)
    assert (guest.read(STATUS), guest.read(RESULT, 8), guest.interrupts) == (FAULT, AT, [0])
    guest.go(8, pasid=1 << 17)
    assert (guest.read(STATUS), guest.interrupts) == (FAULT, [0, 0])


def test_a_reset_while_it_waits(guest: Guest) -> None:
    guest.go(8)
    guest.function.reset(ResetKind.FLR)
    assert (guest.read(STATUS), guest.interrupts) == (IDLE, [])
    guest.serve()
    assert (guest.read(STATUS), guest.interrupts) == (IDLE, [])
    guest.registers.enable_all()
    guest.go(8)
    assert guest.read(STATUS) == DONE


def test_without_the_guests_leave_there_is_a_fault(guest: Guest) -> None:
    guest.registers.disable_pri()
    guest.go(8)
    assert guest.read(STATUS) == FAULT
    guest.registers.set_master(False)
    guest.go(8)
    assert guest.read(STATUS) == FAULT and len(guest.interrupts) == 1
    guest.registers.set_master()
    assert len(guest.interrupts) == 2, "the interrupt waited for bus mastering, too"
