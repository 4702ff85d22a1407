"""ATS behind the AMD IOMMU: who may ask for translations, and invalidations that devices answer in their own time."""

import pytest
from amd_driver import (
    ALL_PAGES,
    COMMAND_EN,
    COMMAND_HEAD,
    COMMAND_TAIL,
    COMMANDS,
    DATA,
    ENDPOINT,
    GN,
    ILLEGAL_ENTRY,
    INVALID_REQUEST,
    IOMMU_EN,
    IOTLB_TIMEOUT,
    IOVA,
    PAGE_FAULT,
    PR,
    READ,
    RZ,
    SEMAPHORE,
    TABLES,
    WRITE,
    Event,
    Gcr3Table,
    GuestTable,
    PageTable,
    Tlb,
    Vm,
    completion_wait,
    device_entry,
    guest_entry,
    invalidate_device_tlb,
    invalidate_entry,
    reason,
)
from guest_ram import PAGE

from backend.core import Access, Reason
from backend.pci import ResetKind

I_BIT = 1 << 32  # bit 96 of an entry
TR = 1 << 8
TYPE_001 = 1 << 9
US_OF_REQUEST = 1 << 1
PASID = 5
ADDRESS = 0x7F12_3456_7000
DOMAIN = 7


def stored(vm: Vm) -> int:
    return int.from_bytes(vm.ram.peek(SEMAPHORE, 8), "little")


@pytest.fixture
def ats(started: Vm) -> Vm:
    """The endpoint has a host table, and may ask for translations."""
    table = PageTable(started.ram, TABLES, 4)
    table.map(IOVA, DATA)
    started.set_entry(ENDPOINT, device_entry(table.root, 4, DOMAIN, high=I_BIT))
    return started


@pytest.fixture
def tlb(ats: Vm) -> Tlb:
    """A device TLB of the endpoint's, that answers when it is asked to."""
    tlb = Tlb()
    ats.engine.set_tlb(ats.engine.devices[ENDPOINT], tlb)
    assert isinstance(ats.endpoint.read(IOVA, 1), bytes)
    tlb.take()
    tlb.unanswered.clear()
    return tlb


class TestTranslation:
    def test_a_device_asks_and_uses_what_it_was_told(self, ats: Vm) -> None:
        reply = ats.endpoint.translate(IOVA, PAGE, Access.READ | Access.WRITE)
        assert reply.fault is None
        (found,) = reply.translations
        assert (found.iova, found.size, found.address) == (IOVA, PAGE, DATA)
        assert ats.endpoint.translated.write(DATA + 8, b"ats") is None
        assert ats.ram.peek(DATA + 8, 3) == b"ats"
        assert ats.events() == []

    def test_a_page_that_is_not_there_is_no_event(self, ats: Vm) -> None:
        reply = ats.endpoint.translate(IOVA + PAGE, PAGE, Access.READ)
        assert reply.fault is not None
        assert reply.fault.reason == Reason.NOT_PRESENT
        assert ats.events() == []

    def test_a_malformed_table_is_one_and_says_that_it_was_a_translation(self, ats: Vm) -> None:
        PageTable(ats.ram, TABLES, 4).set(IOVA, 1 | DATA | READ | WRITE | 1 << 52)
        assert ats.endpoint.translate(IOVA, PAGE, Access.WRITE).fault is not None
        assert ats.events() == [Event(PAGE_FAULT, ENDPOINT, DOMAIN, PR | RZ | TR, IOVA)]

    def test_bypass_answers_with_the_address_itself(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, device_entry(domain=DOMAIN, high=I_BIT))
        reply = started.endpoint.translate(DATA, PAGE, Access.READ)
        assert reply.fault is None
        assert reply.translations[0].address <= DATA
        assert reply.translations[0].iova == reply.translations[0].address
        assert isinstance(started.endpoint.translated.read(DATA, 4), bytes)

    def test_pasids(self, started: Vm) -> None:
        gcr3 = Gcr3Table(started.ram, TABLES, 1)
        table = GuestTable(started.ram, TABLES + 16 * PAGE)
        table.map(ADDRESS, DATA + PAGE)
        gcr3.set(PASID, table.root | 1)
        started.set_entry(ENDPOINT, guest_entry(gcr3.root, domain=DOMAIN, high=I_BIT))
        reply = started.endpoint.translate(ADDRESS, PAGE, Access.READ | Access.WRITE, PASID)
        assert [(each.iova, each.size, each.address) for each in reply.translations] == [(ADDRESS, PAGE, DATA + PAGE)]
        assert table.get(ADDRESS) & 0x60 == 0x60  # a request for writes sets the dirty bit


class TestForbidden:
    """Section 2.5.9: INVALID_DEVICE_REQUEST."""

    def test_translation_requests(self, started: Vm) -> None:
        table = PageTable(started.ram, TABLES, 4)
        table.map(IOVA, DATA)
        started.set_entry(ENDPOINT, device_entry(table.root, 4, DOMAIN))
        reply = started.endpoint.translate(IOVA, PAGE, Access.READ)
        assert reply.translations == ()
        assert started.events() == [Event(INVALID_REQUEST, ENDPOINT, 0, TR, IOVA)]
        started.set_entry(ENDPOINT, device_entry(low=0, high=I_BIT))  # V clear: I does not count
        assert started.endpoint.translate(IOVA, PAGE, Access.WRITE).translations == ()
        assert started.events() == [Event(INVALID_REQUEST, ENDPOINT, 0, TR, IOVA)]
        started.set_entry(ENDPOINT, device_entry(low=1, high=I_BIT))  # TV clear
        assert started.endpoint.translate(IOVA, PAGE, Access.WRITE).translations == ()
        assert started.events() == [Event(INVALID_REQUEST, ENDPOINT, 0, TR, IOVA)]

    def test_translated_requests(self, started: Vm) -> None:
        for low in (0, 3 | READ | WRITE):
            started.set_entry(ENDPOINT, device_entry(low=low))
            assert reason(started.endpoint.translated.read(DATA, 4)) == Reason.ATS_OFF
            assert reason(started.endpoint.translated.write(DATA, b"x")) == Reason.ATS_OFF
            assert started.events() == [Event(INVALID_REQUEST, ENDPOINT, 0, TYPE_001, DATA)] * 2

    def test_with_a_pasid(self, started: Vm) -> None:
        gcr3 = Gcr3Table(started.ram, TABLES, 1)
        gcr3.set(PASID, GuestTable(started.ram, TABLES + 16 * PAGE).root | 1)
        started.set_entry(ENDPOINT, guest_entry(gcr3.root, domain=DOMAIN))
        assert started.endpoint.translate(ADDRESS, PAGE, Access.READ, PASID).translations == ()
        assert started.events() == [Event(INVALID_REQUEST, ENDPOINT, PASID, TR | GN | US_OF_REQUEST, ADDRESS)]
        started.set_entry(ENDPOINT, device_entry(domain=DOMAIN, high=I_BIT))  # GV clear
        assert started.endpoint.translate(ADDRESS, PAGE, Access.READ, PASID).translations == ()
        assert [(event.code, event.domain, event.flags & (TR | GN)) for event in started.events()] == [
            (PAGE_FAULT, PASID, TR | GN)
        ]

        started.set_entry(ENDPOINT, device_entry(domain=DOMAIN))  # I clear, too: that comes first
        assert started.endpoint.translate(ADDRESS, PAGE, Access.READ, PASID).translations == ()
        assert started.events() == [Event(INVALID_REQUEST, ENDPOINT, PASID, TR | GN | US_OF_REQUEST, ADDRESS)]

    def test_illegal_entries_say_that_it_was_a_translation(self, started: Vm) -> None:
        started.set_entry(ENDPOINT, device_entry(TABLES, 7, high=I_BIT))
        assert started.endpoint.translate(IOVA, PAGE, Access.WRITE).translations == ()
        assert started.events() == [Event(ILLEGAL_ENTRY, ENDPOINT, 0, TR, IOVA)]

    def test_ats_ends_with_its_entry(self, ats: Vm) -> None:
        assert ats.endpoint.translate(IOVA, PAGE, Access.READ).fault is None
        ats.set_entry(ENDPOINT, device_entry(TABLES, 4, DOMAIN))
        assert reason(ats.endpoint.translated.read(DATA, 4)) == Reason.ATS_OFF
        ats.control(clear=IOMMU_EN)
        assert isinstance(ats.endpoint.read(DATA, 4), bytes)
        assert reason(ats.endpoint.translated.read(DATA, 4)) == Reason.ATS_OFF


class TestInvalidation:
    def test_what_the_device_is_told(self, ats: Vm, tlb: Tlb) -> None:
        tlb.at_once = True
        ats.submit(
            invalidate_device_tlb(ENDPOINT, IOVA),
            invalidate_device_tlb(ENDPOINT, IOVA & ~0x1FFF, size=True),
            invalidate_device_tlb(ENDPOINT, ALL_PAGES, size=True),
            invalidate_device_tlb(ENDPOINT, IOVA, pasid=PASID),  # it has no PASIDs
            invalidate_device_tlb(0x1234, IOVA),
        )
        assert tlb.take() == [(None, IOVA, PAGE), (None, IOVA & ~0x1FFF, 2 * PAGE), (None, 0, None)]
        assert ats.wait()

    def test_of_pasids(self, started: Vm) -> None:
        tlb = Tlb(at_once=True)
        started.engine.set_tlb(started.engine.devices[ENDPOINT], tlb)
        gcr3 = Gcr3Table(started.ram, TABLES, 2)
        gcr3.set(0xB005, GuestTable(started.ram, TABLES + 16 * PAGE).root | 1)
        started.set_entry(ENDPOINT, guest_entry(gcr3.root, glx=1, domain=DOMAIN, high=I_BIT))
        started.endpoint.translate(ADDRESS, PAGE, Access.READ, 0xB005)
        tlb.take()
        started.submit(
            invalidate_device_tlb(ENDPOINT, ADDRESS, pasid=0xB005),
            invalidate_device_tlb(ENDPOINT, ALL_PAGES, size=True, pasid=0xB005),
            invalidate_device_tlb(ENDPOINT, ADDRESS, pasid=0xF_B005),  # wider than there are
        )
        assert tlb.take() == [(0xB005, ADDRESS, PAGE), (0xB005, 0, None)]
        started.set_entry(ENDPOINT, guest_entry(gcr3.root, glx=1, domain=DOMAIN, giov=True, high=I_BIT))
        started.endpoint.read(ADDRESS, 1)
        tlb.take()
        started.submit(invalidate_device_tlb(ENDPOINT, ADDRESS, pasid=0))  # requests without one have PASID 0
        assert tlb.take() == [(None, ADDRESS, PAGE)]
        assert started.wait()

    def test_completion_wait_waits_and_the_loop_does_not(self, ats: Vm, tlb: Tlb) -> None:
        head = ats.read(COMMAND_HEAD)
        ats.submit(
            completion_wait(SEMAPHORE, 0x51),
            invalidate_device_tlb(ENDPOINT, IOVA, most=32),
            invalidate_device_tlb(ENDPOINT, IOVA + PAGE, most=32),
            completion_wait(SEMAPHORE, 0x52),
            completion_wait(SEMAPHORE, 0x53),
        )
        assert (stored(ats), ats.read(COMMAND_HEAD)) == (0x51, head + 48)
        ats.write(COMMAND_TAIL, ats.read(COMMAND_TAIL))  # another doorbell changes nothing
        assert stored(ats) == 0x51
        tlb.unanswered[1]()
        assert stored(ats) == 0x51
        tlb.unanswered[0]()
        assert (stored(ats), ats.read(COMMAND_HEAD)) == (0x53, head + 80)
        tlb.unanswered[0]()  # a second answer is none
        assert ats.events() == []

    @pytest.mark.parametrize("most", [1, 4, 32, 33, 255, 0])
    def test_no_more_at_once_than_the_device_takes(self, ats: Vm, tlb: Tlb, most: int) -> None:
        many = [invalidate_device_tlb(ENDPOINT, IOVA, most=most)] * 40
        ats.submit(*many, completion_wait(SEMAPHORE, 5))
        at_once = min(most or 32, 32)
        assert len(tlb.told) == at_once
        answered = 0
        while tlb.unanswered:
            tlb.unanswered.pop(0)()
            answered += 1
            assert len(tlb.told) == min(answered + at_once, 40)
        assert stored(ats) == 5

    @pytest.mark.parametrize(
        ("coded", "seconds"), [(1, 0.001), (2, 0.01), (3, 0.1), (4, 1.0), (5, 10.0), (6, 100.0), (0, None), (7, None)]
    )
    def test_time_out(self, ats: Vm, tlb: Tlb, coded: int, seconds: float | None) -> None:
        ats.control(set_=coded << 5)
        at = ats.read(COMMAND_TAIL)
        ats.submit(invalidate_device_tlb(ENDPOINT, IOVA), completion_wait(SEMAPHORE, 0x77))
        assert ats.timers.waiting == ([seconds] if seconds else [])
        ats.timers.advance(1000 if seconds is None else seconds * 0.99)
        assert stored(ats) != 0x77
        if seconds is None:
            tlb.unanswered[0]()
            assert ats.events() == []
        else:
            ats.timers.advance(seconds)
            assert ats.events() == [Event(IOTLB_TIMEOUT, ENDPOINT, 0, 0, COMMANDS + at)]
            tlb.unanswered[0]()  # too late
        assert stored(ats) == 0x77
        assert ats.timers.waiting == []

    def test_an_answer_in_time_stops_the_clock(self, ats: Vm, tlb: Tlb) -> None:
        ats.control(set_=4 << 5)
        ats.submit(invalidate_device_tlb(ENDPOINT, IOVA), completion_wait(SEMAPHORE, 0x78))
        tlb.unanswered[0]()
        ats.timers.advance(1000)
        assert (stored(ats), ats.events()) == (0x78, [])

    def test_a_device_without_a_tlb_answers_at_once(self, ats: Vm) -> None:
        ats.submit(invalidate_device_tlb(ENDPOINT, IOVA), completion_wait(SEMAPHORE, 0x79))
        assert stored(ats) == 0x79

    @pytest.mark.parametrize("action", ["reset", "disable"])
    def test_what_nobody_answered_ends_with_the_iommu(self, ats: Vm, tlb: Tlb, action: str) -> None:
        ats.control(set_=4 << 5)
        ats.submit(invalidate_device_tlb(ENDPOINT, IOVA), completion_wait(SEMAPHORE, 0x7A))
        if action == "reset":
            ats.iommu.reset(ResetKind.DEVICE)
        else:
            ats.control(clear=IOMMU_EN)
        assert ats.timers.waiting == []
        for done in tlb.unanswered:
            done()
        assert stored(ats) != 0x7A
        if action == "disable":
            ats.control(set_=IOMMU_EN)
            assert stored(ats) == 0x7A
        else:
            ats.start()
        assert ats.wait()

    def test_a_buffer_halted_in_the_middle_of_a_wait(self, ats: Vm, tlb: Tlb) -> None:
        ats.submit(invalidate_device_tlb(ENDPOINT, IOVA), completion_wait(SEMAPHORE, 0x7B))
        ats.control(clear=COMMAND_EN)
        tlb.unanswered[0]()
        assert stored(ats) != 0x7B
        ats.control(set_=COMMAND_EN)
        assert stored(ats) == 0x7B

    def test_a_buffer_moved_in_the_middle_of_a_wait(self, ats: Vm, tlb: Tlb) -> None:
        ats.submit(invalidate_device_tlb(ENDPOINT, IOVA), completion_wait(SEMAPHORE, 0x7C))
        ats.control(clear=COMMAND_EN)
        ats.set_commands(8, TABLES + 64 * PAGE)
        ats.control(set_=COMMAND_EN)
        tlb.unanswered[0]()
        assert stored(ats) != 0x7C
        assert ats.read(COMMAND_HEAD) == ats.read(COMMAND_TAIL) == 0

    def test_an_entry_invalidated_while_its_device_owes_an_answer(self, ats: Vm, tlb: Tlb) -> None:
        ats.submit(
            invalidate_device_tlb(ENDPOINT, IOVA), invalidate_entry(ENDPOINT), completion_wait(SEMAPHORE, 0x7D)
        )
        assert stored(ats) != 0x7D
        assert isinstance(ats.endpoint.read(IOVA, 1), bytes)
        tlb.unanswered[0]()
        assert stored(ats) == 0x7D
