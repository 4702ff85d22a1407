"""Page requests behind the AMD IOMMU: the PPR log, COMPLETE_PPR_REQUEST, and requests that nobody wants."""

import struct

import pytest
from amd_driver import (
    COMMAND_RUN,
    DATA,
    ENDPOINT,
    EVENT_INT,
    EVENT_INT_EN,
    EVENT_RUN,
    EXECUTE_PPR,
    GN_PPR,
    INVALID_PPR,
    IOMMU_EN,
    MEMORY,
    NOWHERE,
    PPR_EN,
    PPR_HEAD,
    PPR_INT,
    PPR_INT_EN,
    PPR_LOG_EN,
    PPR_OVERFLOW,
    PPR_RUN,
    PPR_TAIL,
    PPRS,
    READ,
    READ_PPR,
    SECOND,
    STATUS,
    TABLES,
    US_PPR,
    WRITE,
    WRITE_PPR,
    Gcr3Table,
    GuestTable,
    PageRequest,
    Vm,
    complete_ppr,
    device_entry,
    guest_entry,
    invalidate_entry,
    parse_page_request,
)
from guest_ram import PAGE

from backend.core import Access
from backend.ioasid import Code, FaultRecord, PageResponse
from backend.pci import ResetKind
from backend.viommu.amd.ppr_log import entry

PASID = 0xB005
ADDRESS = 0x7F12_3456_7000
PPR = 1 << 52
EXCLUSION_LIMIT = 0x28
READ_ACCESS = Access.READ


class Device:
    """An endpoint's page request interface, with the answers that it got."""

    def __init__(self, vm: Vm, rid: int = ENDPOINT) -> None:
        self.device = vm.engine.devices[rid]
        self.answers: list[PageResponse] = []

    def ask(
        self,
        group: int = 3,
        *,
        pasid: int | None = PASID,
        iova: int = ADDRESS,
        access: Access = READ_ACCESS,
        last: bool = True,
    ) -> None:
        self.device.page_request(pasid, iova, access, group=group, last=last, answer=self.answers.append)

    def codes(self) -> list[tuple[int, Code]]:
        found = [(answer.group, answer.code) for answer in self.answers]
        self.answers.clear()
        return found


@pytest.fixture
def sva(started: Vm) -> Vm:
    """Both endpoints may ask for pages of any PASID; the tables of PASIDs 5 and 0xB005 are empty."""
    gcr3 = Gcr3Table(started.ram, TABLES, 2)
    for pasid, base in ((PASID, TABLES + 16 * PAGE), (5, TABLES + 32 * PAGE)):
        gcr3.set(pasid, GuestTable(started.ram, base).root | 1)
    started.start_pprs()
    for device in (ENDPOINT, SECOND):
        started.set_entry(device, guest_entry(gcr3.root, glx=1, domain=9, low=3 | READ | WRITE | PPR))
        started.engine.devices[device].port.read(ADDRESS, 1, PASID)  # its entry is read
    started.events()
    return started


class TestLog:
    def test_an_entry_and_its_answer(self, sva: Vm) -> None:
        device = Device(sva)
        interrupts = sva.interrupts
        assert sva.status == EVENT_RUN | COMMAND_RUN | PPR_RUN
        device.ask(0x1F3, access=Access.WRITE, iova=ADDRESS + 0x123)
        assert (sva.status, sva.interrupts) == (EVENT_RUN | COMMAND_RUN | PPR_RUN | PPR_INT, interrupts + 1)
        assert sva.read(PPR_TAIL) == 16
        flags = GN_PPR | US_PPR | WRITE_PPR
        assert sva.page_requests() == [PageRequest(1, ENDPOINT, PASID, 0x1F3, True, flags, ADDRESS)]
        assert device.codes() == []
        sva.submit(complete_ppr(ENDPOINT, 0x1F3))
        assert device.answers == [PageResponse(ENDPOINT, PASID, 0x1F3, Code.SUCCESS)]
        assert sva.wait()
        assert sva.events() == []

    @pytest.mark.parametrize(
        ("access", "flags"),
        [
            (Access.READ, US_PPR | READ_PPR),
            (Access.READ | Access.WRITE, US_PPR | READ_PPR | WRITE_PPR),
            (Access.READ | Access.EXECUTE, US_PPR | READ_PPR | EXECUTE_PPR),
            (Access.WRITE | Access.PRIVILEGED, WRITE_PPR),
        ],
    )
    def test_what_a_request_is_for(self, sva: Vm, access: Access, flags: int) -> None:
        Device(sva).ask(access=access)
        assert [each.flags for each in sva.page_requests()] == [GN_PPR | flags]

    def test_a_request_without_a_pasid(self, sva: Vm) -> None:
        device = Device(sva)
        device.ask(pasid=None)
        assert sva.page_requests() == [PageRequest(1, ENDPOINT, 0, 3, True, US_PPR | READ_PPR, ADDRESS)]
        sva.submit(complete_ppr(ENDPOINT, 3, 15))
        assert device.codes() == [(3, Code.FAILURE)]

    def test_a_device_whose_entry_was_not_read_yet(self, sva: Vm) -> None:
        sva.submit(invalidate_entry(ENDPOINT))
        device = Device(sva)
        device.ask()
        assert [each.pasid for each in sva.page_requests()] == [PASID]
        sva.submit(complete_ppr(ENDPOINT, 3))
        assert device.codes() == [(3, Code.SUCCESS)]

    def test_a_pasid_where_there_is_no_guest_translation(self, sva: Vm) -> None:
        sva.set_entry(ENDPOINT, device_entry(low=3 | READ | WRITE | PPR))
        device = Device(sva)
        device.ask()
        assert device.codes() == [(3, Code.INVALID)]
        assert sva.page_requests() == []

    @pytest.mark.parametrize(
        ("code", "answer"),
        [(0, Code.SUCCESS), (1, Code.INVALID), (2, Code.FAILURE), (7, Code.FAILURE), (15, Code.FAILURE)],
    )
    def test_codes(self, sva: Vm, code: int, answer: Code) -> None:
        device = Device(sva)
        device.ask(7)
        sva.submit(complete_ppr(ENDPOINT, 7, code))
        assert device.codes() == [(7, answer)]

    def test_a_group_is_answered_once_after_its_last_request(self, sva: Vm) -> None:
        device = Device(sva)
        for number in range(3):
            device.ask(9, iova=ADDRESS + number * PAGE, last=number == 2)
            if number == 0:
                sva.submit(complete_ppr(ENDPOINT, 9))  # too early: it is not complete
        entries = sva.page_requests()
        assert [(each.tag, each.last, each.address) for each in entries] == [
            (9, number == 2, ADDRESS + number * PAGE) for number in range(3)
        ]
        assert device.codes() == []
        sva.submit(complete_ppr(ENDPOINT, 9), complete_ppr(ENDPOINT, 9))
        assert device.codes() == [(9, Code.SUCCESS)]
        assert sva.iommu.ppr_log.unexpected == 2

    def test_answers_are_matched_by_device_tag_and_pasid(self, sva: Vm) -> None:
        one, two = Device(sva), Device(sva, SECOND)
        one.ask(4)
        two.ask(4, pasid=5)
        sva.submit(
            complete_ppr(ENDPOINT, 5),
            complete_ppr(0x1234, 4),
            complete_ppr(ENDPOINT, 4, pasid=5),
            complete_ppr(SECOND, 4, 1),
        )
        assert (one.codes(), two.codes()) == ([], [(4, Code.INVALID)])
        sva.submit(complete_ppr(ENDPOINT, 4, pasid=PASID))
        assert one.codes() == [(4, Code.SUCCESS)]
        assert sva.wait()

    def test_one_interrupt_until_software_clears_it(self, sva: Vm) -> None:
        device = Device(sva)
        interrupts = sva.interrupts
        for group in range(5):
            device.ask(group)
        assert sva.interrupts == interrupts + 1
        assert len(sva.page_requests()) == 5
        device.ask(5)
        assert sva.interrupts == interrupts + 2

    def test_the_interrupt_may_be_enabled_late(self, sva: Vm) -> None:
        sva.control(clear=PPR_INT_EN)
        interrupts = sva.interrupts
        Device(sva).ask()
        assert sva.interrupts == interrupts
        sva.control(set_=PPR_INT_EN)
        assert sva.interrupts == interrupts + 1


def test_layout_of_an_entry() -> None:
    """Section 2.6: PASID bits 15:0 in 31:16 and 19:16 in 45:42, the tag in 40:32, LAST in 41."""
    record = FaultRecord(
        recoverable=True,
        ioasid=1,
        rid=0xBEEF,
        cookie=None,
        pasid=0xA1234,
        iova=ADDRESS + 0xFFF,
        access=Access.READ | Access.WRITE,
        group=0x155,
        last=True,
        reason=None,
    )
    low = 1 << 60 | (GN_PPR | US_PPR | READ_PPR | WRITE_PPR) << 48 | 0xA << 42 | 1 << 41 | 0x155 << 32
    assert entry(record, 1) == struct.pack("<QQ", low | 0x1234 << 16 | 0xBEEF, ADDRESS)


class TestOverflow:
    def test_a_full_log_discards_until_it_is_restarted(self, sva: Vm) -> None:
        device = Device(sva)
        sva.control(clear=PPR_LOG_EN)
        sva.set_pprs(8)
        sva.control(set_=PPR_LOG_EN)
        for group in range(255):
            device.ask(group)
        assert sva.read(PPR_TAIL) == 255 * 16
        assert not sva.status & PPR_OVERFLOW
        sva.write(STATUS, PPR_INT)
        interrupts = sva.interrupts
        device.ask(300)
        assert sva.status & (PPR_OVERFLOW | PPR_RUN | PPR_INT) == PPR_OVERFLOW
        assert sva.interrupts == interrupts + 1
        assert sva.read(PPR_TAIL) == 255 * 16
        assert len(sva.page_requests()) == 255
        device.ask(301)  # room, but not restarted
        assert sva.page_requests() == []
        # As Linux restarts it.
        sva.control(clear=PPR_INT_EN)
        sva.control(clear=PPR_LOG_EN)
        sva.write(STATUS, PPR_OVERFLOW)
        sva.control(set_=PPR_INT_EN)
        sva.control(set_=PPR_LOG_EN)
        device.ask(302)
        device.ask(303)
        assert [each.tag for each in sva.page_requests()] == [302, 303]
        assert sva.read(PPR_TAIL) == 16  # around the end
        assert (sva.iommu.ppr_log.logged, sva.iommu.ppr_log.lost) == (257, 2)
        assert device.codes() == []
        assert sva.events() == []

    def test_what_was_discarded_ends_when_the_engine_gives_up(self) -> None:
        now = 0.0
        vm = Vm(clock=lambda: now)
        try:
            vm.start()
            vm.start_pprs(8)
            gcr3 = Gcr3Table(vm.ram, TABLES, 1)
            gcr3.set(5, GuestTable(vm.ram, TABLES + 16 * PAGE).root | 1)
            vm.set_entry(ENDPOINT, guest_entry(gcr3.root, domain=9, low=3 | READ | WRITE | PPR))
            vm.endpoint.read(ADDRESS, 1, 5)
            device = Device(vm)
            for group in range(256):
                device.ask(group, pasid=5)
            now = 1000.0
            vm.engine.expire()
            assert device.codes() == [(group, Code.INVALID) for group in range(256)]
            vm.submit(complete_ppr(ENDPOINT, 0))  # too late
            assert device.codes() == []
            assert vm.wait()
        finally:
            vm.close()


class TestRefused:
    def test_an_entry_that_does_not_allow_page_requests(self, sva: Vm) -> None:
        device = Device(sva)
        sva.set_entry(ENDPOINT, guest_entry(TABLES, glx=1, domain=9))
        sva.endpoint.read(ADDRESS, 1, PASID)
        sva.events()
        before = sva.interrupts
        device.ask(8, last=False)
        assert device.codes() == []
        device.ask(8, iova=ADDRESS + PAGE)
        assert device.codes() == [(8, Code.INVALID)]
        assert sva.iommu.ppr_log.unexpected == 0
        assert sva.page_requests() == []
        assert sva.status & EVENT_INT
        assert sva.interrupts == before + 1
        raw = [sva.ram.peek(at, 16) for at in range(0x20_0000 + sva.read(0x2010), 0x20_0000 + sva.read(0x2018), 16)]
        flags = GN_PPR | US_PPR | READ_PPR
        assert [parse_page_request(each) for each in raw] == [
            PageRequest(INVALID_PPR, ENDPOINT, PASID, 8, False, flags, ADDRESS),
            PageRequest(INVALID_PPR, ENDPOINT, PASID, 8, True, flags, ADDRESS + PAGE),
        ]

    def test_while_page_requests_are_off(self, sva: Vm) -> None:
        device = Device(sva)
        sva.control(clear=PPR_EN)
        device.ask()
        assert device.codes() == [(3, Code.INVALID)]
        assert [event.code for event in sva.events()] == [INVALID_PPR]
        sva.control(set_=PPR_EN)
        device.ask()
        assert len(sva.page_requests()) == 1

    def test_a_log_that_is_off_refuses(self, sva: Vm) -> None:
        device = Device(sva)
        sva.control(clear=PPR_LOG_EN)
        device.ask()
        assert device.codes() == [(3, Code.INVALID)]
        assert sva.events() == []

    @pytest.mark.parametrize("base", [NOWHERE, MEMORY])
    def test_a_log_outside_memory_stops_and_refuses(self, sva: Vm, base: int) -> None:
        device = Device(sva)
        sva.control(clear=PPR_LOG_EN)
        sva.set_pprs(9, base)
        sva.control(set_=PPR_LOG_EN)
        device.ask(1)
        device.ask(2)
        assert device.codes() == [(1, Code.INVALID), (2, Code.INVALID)]
        assert sva.status & (PPR_RUN | PPR_INT | PPR_OVERFLOW) == 0
        assert sva.read(PPR_TAIL) == 0
        assert sva.wait()

    @pytest.mark.parametrize("length", range(8))
    def test_a_log_of_a_reserved_length_does_not_run(self, sva: Vm, length: int) -> None:
        sva.control(clear=PPR_LOG_EN)
        sva.set_pprs(length)
        sva.control(set_=PPR_LOG_EN)
        assert not sva.status & PPR_RUN

    def test_heads_and_tails_that_jump(self, sva: Vm) -> None:
        device = Device(sva)
        device.ask(1)
        for offset in (PPR_HEAD, PPR_TAIL):
            before = sva.read(offset)
            sva.write(offset, 512 * 16)
            assert sva.read(offset) == before
        sva.write(PPR_TAIL, 0x50)  # not while it runs
        assert sva.read(PPR_TAIL) == 16
        sva.write(PPR_HEAD, 32)  # the next entry leaves one free
        device.ask(2)
        assert sva.status & PPR_OVERFLOW
        assert sva.read(PPR_TAIL) == 16

    @pytest.mark.parametrize("action", ["disable", "reset", "invalidate"])
    def test_requests_that_wait_end_with_their_routes(self, sva: Vm, action: str) -> None:
        device = Device(sva)
        device.ask(1)
        device.ask(2, last=False)
        if action == "disable":
            sva.control(clear=IOMMU_EN)
        elif action == "reset":
            sva.iommu.reset(ResetKind.DEVICE)
        else:
            sva.submit(invalidate_entry(ENDPOINT))
        assert device.codes() == [(1, Code.INVALID), (2, Code.INVALID)]
        device.ask(1)
        assert len(device.codes()) <= 1
        if action == "invalidate":
            sva.submit(complete_ppr(ENDPOINT, 1))
            assert sva.wait()

    def test_a_device_of_nobody_is_left_alone(self, sva: Vm) -> None:
        sva.iommu.endpoints -= {SECOND}
        device = Device(sva, SECOND)
        device.ask()
        assert sva.page_requests() == []
        sva.submit(complete_ppr(SECOND, 3))
        assert device.codes() == []
        sva.context.page_response(SECOND, 3, Code.SUCCESS)
        assert device.codes() == [(3, Code.SUCCESS)]

    def test_unrecoverable_records_are_none(self, sva: Vm) -> None:
        sva.set_entry(ENDPOINT, device_entry(low=3))
        sva.endpoint.read(DATA, 1)
        assert sva.page_requests() == []
        sva.control(clear=EVENT_INT_EN)
        assert len(sva.events()) == 1
        assert sva.ram.peek(PPRS, 16) == bytes(16)


def test_a_device_that_asks_as_its_route_goes(sva: Vm) -> None:
    """Its answer comes with the route half gone; what it asks then finds none, and the next request a whole one."""
    device, answers = Device(sva), list[Code]()

    def again(answer: PageResponse) -> None:
        answers.append(answer.code)
        device.ask(4)

    device.device.page_request(PASID, ADDRESS, READ_ACCESS, group=3, last=True, answer=again)
    sva.write(EXCLUSION_LIMIT, PAGE)  # routes go, what is known of the device table stays
    assert (answers, device.codes()) == ([Code.INVALID], [(4, Code.INVALID)])
    device.ask(5)
    assert device.codes() == []
    sva.submit(complete_ppr(ENDPOINT, 5))
    assert device.codes() == [(5, Code.SUCCESS)]
