"""Guest and host tables together behind the AMD IOMMU: GV with a paging mode, each address in a guest table translated
by the host table, but for the GCR3 table itself (section 2.2.6; GCR3TRPMode is 0)."""

import struct

import pytest
from amd_driver import (
    ALL_PAGES,
    DATA,
    ENDPOINT,
    GN,
    MASTER_ABORT,
    NOWHERE,
    PAGE_FAULT,
    PAGE_TABLE_ERROR,
    PE,
    PR,
    READ,
    RW,
    RZ,
    SECOND,
    TABLES,
    US,
    WRITE,
    Event,
    Gcr3Table,
    GuestTable,
    PageTable,
    Tlb,
    Vm,
    device_entry,
    guest_entry,
    invalidate_all,
    invalidate_device_tlb,
    invalidate_entry,
    invalidate_pages,
)
from guest_ram import PAGE

from backend.core import Access, Fault, Translation

GCR3 = TABLES
HOST = TABLES + 8 * PAGE
GUEST = TABLES + 24 * PAGE
SHIFT = 0x8000_0000
"""What lies at a GPA of the guest of the guest, `gpa` + SHIFT, lies at `gpa` of the VM."""
PASID = 5
ADDRESS = 0x7F12_3456_7000
DOMAIN = 0x33
I_BIT = 1 << 32


class Nested:
    """An entry with both: the host table maps SHIFT + x to x for the guest table's pages and the data."""

    def __init__(self, vm: Vm, *, giov: bool = False, had: int = 0, high: int = 0) -> None:
        self.vm = vm
        self.host = PageTable(vm.ram, HOST, 3)
        self.gcr3 = Gcr3Table(vm.ram, GCR3, 1)
        self.guest = Shifted(vm, GUEST)
        for page in range(16):
            self.host.map(SHIFT + GUEST + page * PAGE, GUEST + page * PAGE)
        for page in range(4):
            self.host.map(SHIFT + DATA + page * PAGE, DATA + page * PAGE)
        for pasid in (0, PASID):
            self.gcr3.set(pasid, SHIFT + self.guest.root | 1)
        self.entry = guest_entry(
            self.gcr3.root,
            giov=giov,
            domain=DOMAIN,
            mode=3,
            root=self.host.root,
            low=3 | READ | WRITE | had << 7,
            high=high,
        )
        vm.set_entry(ENDPOINT, self.entry)


class Shifted(GuestTable):
    """A guest table that lies at `base` of the VM, whose entries hold addresses of the host table's."""

    def __init__(self, vm: Vm, base: int) -> None:
        super().__init__(vm.ram, base)

    def slot(self, address: int, level: int = 1) -> int:
        table = self.root
        for above in range(4, level, -1):
            at = table + (address >> 12 + 9 * (above - 1) & 0x1FF) * 8
            (entry,) = struct.unpack("<Q", self._ram.peek(at, 8))
            if not entry & 1:
                entry = SHIFT + self._free | 7
                self._ram.poke(self._free, bytes(PAGE))
                self._ram.poke(at, struct.pack("<Q", entry))
                self._free += PAGE
            table = (entry & 0x000F_FFFF_FFFF_F000) - SHIFT
        return table + (address >> 12 + 9 * (level - 1) & 0x1FF) * 8


class TestTranslation:
    def test_three_tables(self, started: Vm) -> None:
        nested = Nested(started)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        nested.guest.map(ADDRESS + PAGE, SHIFT + DATA + 2 * PAGE)
        assert started.endpoint.write(ADDRESS + PAGE - 4, b"abcdEFGH", PASID) is None
        assert started.ram.peek(DATA + PAGE - 4, 4) == b"abcd"
        assert started.ram.peek(DATA + 2 * PAGE, 4) == b"EFGH"
        assert started.events() == []
        # Accessed and dirty bits of the guest table, as of any.
        assert [nested.guest.get(ADDRESS, level) & 0x60 for level in (1, 2, 3, 4)] == [0x60, 0x20, 0x20, 0x20]

    @pytest.mark.parametrize("giov", [False, True])
    def test_requests_without_a_pasid(self, started: Vm, giov: bool) -> None:
        """GIoV clear: through the host table alone. Set: through the table of PASID 0, too."""
        nested = Nested(started, giov=giov)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        started.ram.poke(DATA, b"data")
        if giov:
            assert started.endpoint.read(ADDRESS, 4) == b"data"
            assert isinstance(started.endpoint.read(SHIFT + DATA, 4), Fault)
            assert started.events() == [Event(PAGE_FAULT, ENDPOINT, 0, GN | US, SHIFT + DATA)]
        else:
            assert started.endpoint.read(SHIFT + DATA, 4) == b"data"
            assert isinstance(started.endpoint.read(ADDRESS, 4), Fault)
            assert started.events() == [Event(PAGE_FAULT, ENDPOINT, DOMAIN, 0, ADDRESS)]

    def test_accessed_and_dirty_bits_of_the_host_table(self, started: Vm) -> None:
        nested = Nested(started, had=3)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), bytes)

        def bits(gpa: int) -> int:
            return int(struct.unpack("<Q", started.ram.peek(nested.host.slot(SHIFT + gpa, 1), 8))[0]) >> 5 & 3

        assert (bits(DATA), bits(DATA + PAGE)) == (1, 0)
        assert bits(GUEST) & 1
        assert started.endpoint.write(ADDRESS, b"x", PASID) is None
        assert bits(DATA) == 3

    def test_ats_answers_with_what_the_host_table_gives(self, started: Vm) -> None:
        nested = Nested(started, high=I_BIT)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        reply = started.endpoint.translate(ADDRESS, PAGE, Access.READ | Access.WRITE, PASID)
        assert [(each.iova, each.size, each.address) for each in reply.translations] == [(ADDRESS, PAGE, DATA)]
        assert started.endpoint.translated.write(DATA, b"ats") is None
        reply = started.endpoint.translate(SHIFT + DATA, PAGE, Access.READ)
        assert [each.address for each in reply.translations][:1] == [DATA]

    def test_a_device_of_the_host_domain_shares_its_table(self, started: Vm) -> None:
        nested = Nested(started)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        started.set_entry(SECOND, device_entry(nested.host.root, 3, DOMAIN))
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), bytes)
        assert isinstance(started.second.read(SHIFT + DATA, 1), bytes)
        assert len(started.iommu.domains.ioasids) == 2
        started.submit(invalidate_entry(ENDPOINT))
        assert len(started.iommu.domains.ioasids) == 1
        assert isinstance(started.second.read(SHIFT + DATA, 1), bytes)
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), bytes)
        started.submit(invalidate_entry(SECOND))
        assert len(started.iommu.domains.ioasids) == 2  # the guest table stands on it
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), bytes)
        started.submit(invalidate_all())
        assert not started.iommu.domains.ioasids
        assert started.context.get_info(started.stage2).children == 0


class TestEvents:
    def test_of_the_guest_table(self, started: Vm) -> None:
        nested = Nested(started)
        nested.guest.map(ADDRESS, SHIFT + DATA, writable=False)
        assert isinstance(started.endpoint.read(ADDRESS + PAGE, 1, PASID), Fault)
        assert isinstance(started.endpoint.write(ADDRESS, b"x", PASID), Fault)
        assert started.events() == [
            Event(PAGE_FAULT, ENDPOINT, PASID, GN | US, ADDRESS + PAGE),
            Event(PAGE_FAULT, ENDPOINT, PASID, GN | US | PR | PE | RW, ADDRESS),
        ]

    def test_of_the_host_table_at_the_data(self, started: Vm) -> None:
        """GN is clear, the address is the one that the host table was to translate, and the domain is told."""
        nested = Nested(started)
        for number, gpa in enumerate((SHIFT + DATA + 8 * PAGE, SHIFT + DATA, SHIFT + DATA + PAGE)):
            nested.guest.map(ADDRESS + number * PAGE, gpa)
        nested.host.map(SHIFT + DATA, DATA, READ)
        nested.host.set(SHIFT + DATA + PAGE, 1 | DATA | READ | WRITE | 1 << 52)
        assert isinstance(started.endpoint.read(ADDRESS + 16, 1, PASID), Fault)
        assert isinstance(started.endpoint.write(ADDRESS + PAGE, b"x", PASID), Fault)
        assert isinstance(started.endpoint.read(ADDRESS + 2 * PAGE, 1, PASID), Fault)
        assert started.events() == [
            Event(PAGE_FAULT, ENDPOINT, DOMAIN, 0, SHIFT + DATA + 8 * PAGE + 16),
            Event(PAGE_FAULT, ENDPOINT, DOMAIN, PR | PE | RW, SHIFT + DATA),
            Event(PAGE_FAULT, ENDPOINT, DOMAIN, PR | RZ, SHIFT + DATA + PAGE),
        ]

    def test_of_the_host_table_at_a_guest_table(self, started: Vm) -> None:
        nested = Nested(started)
        nested.gcr3.set(6, 0x4000_0000 | 1)  # a root that the host table does not map
        assert isinstance(started.endpoint.read(ADDRESS, 1, 6), Fault)
        slot = 0x4000_0000 + (ADDRESS >> 39 & 0x1FF) * 8
        assert started.events() == [Event(PAGE_FAULT, ENDPOINT, DOMAIN, 0, slot)]

    def test_where_no_memory_is(self, started: Vm) -> None:
        nested = Nested(started)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        nested.host.map(SHIFT + DATA, NOWHERE & 0x3F_FFFF_F000)
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), Fault)
        assert started.events() == []
        assert started.iommu.aborted == 1
        started.set_entry(ENDPOINT, guest_entry(NOWHERE, domain=DOMAIN, mode=3, root=HOST))
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), Fault)
        (found,) = started.events()
        assert (found.code, found.flags & MASTER_ABORT, found.address) == (
            PAGE_TABLE_ERROR,
            MASTER_ABORT,
            NOWHERE + 8 * PASID,
        )


class TestInvalidation:
    def moved(self, vm: Vm) -> tuple[Nested, bytes]:
        """A page that was read, and that the host table has elsewhere by now."""
        nested = Nested(vm)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        vm.ram.poke(DATA, b"before")
        vm.ram.poke(DATA + PAGE, b"after ")
        assert vm.endpoint.read(ADDRESS, 6, PASID) == b"before"
        nested.host.map(SHIFT + DATA, DATA + PAGE)
        return nested, b"after "

    @pytest.mark.parametrize(
        "command",
        [
            invalidate_pages(DOMAIN, SHIFT + DATA, size=False),
            invalidate_pages(DOMAIN, ALL_PAGES, size=True),
            invalidate_all(),
            invalidate_entry(ENDPOINT),
        ],
    )
    def test_of_the_host_table_reaches_what_stands_on_it(self, started: Vm, command: bytes) -> None:
        _, after = self.moved(started)
        started.submit(command)
        assert started.endpoint.read(ADDRESS, 6, PASID) == after

    def test_of_the_guest_table(self, started: Vm) -> None:
        nested = Nested(started)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), bytes)
        nested.guest.set(ADDRESS, 0)
        started.submit(invalidate_pages(DOMAIN, ADDRESS, size=False, pasid=PASID + 1))
        assert isinstance(started.engine.core.translate(ENDPOINT, ADDRESS, Access.READ, pasid=PASID), Translation)
        started.submit(invalidate_pages(DOMAIN, ADDRESS, size=False, pasid=PASID))
        assert isinstance(started.endpoint.read(ADDRESS, 1, PASID), Fault)

    def test_device_tlbs(self, started: Vm) -> None:
        tlb = Tlb(at_once=True)
        started.engine.set_tlb(started.engine.devices[ENDPOINT], tlb)
        nested = Nested(started, high=I_BIT)
        nested.guest.map(ADDRESS, SHIFT + DATA)
        started.endpoint.translate(ADDRESS, PAGE, Access.READ, PASID)
        tlb.take()
        started.submit(
            invalidate_pages(DOMAIN, ALL_PAGES, size=True),  # the IOMMU's own caches alone
            invalidate_device_tlb(ENDPOINT, ADDRESS, pasid=PASID),
            invalidate_device_tlb(ENDPOINT, SHIFT + DATA),
        )
        assert tlb.take() == [(PASID, ADDRESS, PAGE), (None, SHIFT + DATA, PAGE)]
        assert started.wait()
