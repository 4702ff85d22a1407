"""The device TLB by itself, against a list of pages; and with an engine, where nothing that was invalidated is used."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from guest_ram import PAGE
from ioasid_guest import GOLDEN
from pci_sva import Machine

from backend.core import RW, Access, Fault, Reason, Translated
from backend.pci.device_tlb import DeviceTlb

READ, WRITE = Access.READ, Access.WRITE
IOVA = 0x7F00_0000_0000


def nothing() -> None:
    """Nobody waits."""


def forget(tlb: DeviceTlb, pasid: int | None, iova: int = 0, size: int | None = None) -> None:
    answers: list[None] = []
    tlb(pasid, iova, size, lambda: answers.append(None))
    assert answers == [None]


@pytest.mark.parametrize("seed", range(8))
def test_it_finds_what_a_list_of_pages_finds(seed: int) -> None:
    """Entries of 1 to 4 pages; what an invalidation or a new entry touches goes as a whole."""
    rnd = random.Random(seed)
    tlb = DeviceTlb(1000)
    entries: dict[int, list[tuple[range, int, Access]]] = {1: [], 2: []}
    for step in range(1500):
        pasid = rnd.choice((1, 2))
        first, count = rnd.randrange(60), rnd.randrange(1, 5)
        pages = range(first, first + count)
        mine = entries[pasid]
        match rnd.randrange(4):
            case 0 | 1:
                run = [pages, range(pages.stop, pages.stop + rnd.randrange(1, 3))][: rnd.randrange(1, 3)]
                new = [(each, (rnd.randrange(1 << 20)) * PAGE, rnd.choice((READ, WRITE, RW))) for each in run]
                tlb.keep(pasid, [Translated(each.start * PAGE, len(each) * PAGE, to, acc) for each, to, acc in new])
                whole = range(run[0].start, run[-1].stop)
                entries[pasid] = [each for each in mine if not overlap(each[0], whole)] + new
            case 2:
                if rnd.randrange(6):
                    skip = rnd.randrange(PAGE)
                    forget(tlb, pasid, first * PAGE + skip, count * PAGE - skip)
                    entries[pasid] = [each for each in mine if not overlap(each[0], pages)]
                else:
                    forget(tlb, pasid)
                    entries[pasid] = []
            case _:
                access = rnd.choice((READ, WRITE, RW))
                start = first * PAGE + rnd.randrange(PAGE)
                end = min(start + rnd.randrange(1, 6 * PAGE), 70 * PAGE)
                assert tlb.find(pasid, start, end, int(access)) == expected(entries[pasid], start, end, access), step
        assert len(tlb) == sum(len(each) for each in entries.values())
    assert tlb.find(3, 0, PAGE, 1) == ([], 0)


def overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def expected(
    entries: list[tuple[range, int, Access]], start: int, end: int, access: Access
) -> tuple[list[tuple[int, int]], int]:
    found = []
    while start < end:
        for pages, address, permitted in entries:
            if start // PAGE in pages and access & permitted == access:
                stop = min(end, pages.stop * PAGE)
                found.append((address + start - pages.start * PAGE, stop - start))
                start = stop
                break
        else:
            break
    return found, start


def one(page: int, count: int = 1) -> list[Translated]:
    return [Translated((page + index) * PAGE, PAGE, (500 - index) * 2 * PAGE, RW) for index in range(count)]


def test_the_pasid_that_was_asked_for_least_recently_goes_first() -> None:
    tlb = DeviceTlb(10)
    for pasid in (1, 2, 3):
        tlb.keep(pasid, one(0, 3))
    tlb.keep(1, one(50))
    assert len(tlb) == 10
    tlb.keep(3, one(60))
    assert len(tlb) == 8 and tlb.find(2, 0, PAGE, 1)[1] == 0 and tlb.find(1, 0, PAGE, 1)[1] == PAGE
    for page in range(100, 200, 2):
        tlb.keep(3, one(page))
        assert len(tlb) <= 10
    assert tlb.find(3, 198 * PAGE, 199 * PAGE, 1)[1] == 199 * PAGE and tlb.find(1, 0, PAGE, 1)[1] == 0


def test_floods_leave_nothing_behind() -> None:
    """PASIDs by the million, each refused or forgotten."""
    tlb = DeviceTlb(64)
    for pasid in range(1 << 14):
        tlb.keep(pasid, one(pasid))
        tlb.refuse(pasid)
        assert len(tlb) <= 64 and len(tlb.unsupported) <= 4096
    for pasid in range(1 << 14):
        forget(tlb, pasid, pasid * PAGE, PAGE)
    assert len(tlb) == 0
    tlb.keep(7, one(3))
    forget(tlb, None)
    assert len(tlb) == 0 and not tlb.unsupported


def test_without_a_pasid_all_are_meant() -> None:
    tlb = DeviceTlb()
    for pasid in (None, 1, 2):
        tlb.keep(pasid, one(3, 3))
    forget(tlb, None, 4 * PAGE, PAGE)
    assert len(tlb) == 6
    forget(tlb, 1)
    assert len(tlb) == 4 and tlb.find(None, 3 * PAGE, 4 * PAGE, 1)[1] == 4 * PAGE
    forget(tlb, None)
    assert len(tlb) == 0


def test_an_entry_without_end() -> None:
    tlb = DeviceTlb()
    tlb.keep(None, [Translated(0, 1 << 64, 0, RW)])
    assert tlb.find(None, (1 << 64) - 5, 1 << 64, 2) == ([((1 << 64) - 5, 5)], 1 << 64)
    forget(tlb, 4, 0, 1 << 64)
    assert len(tlb) == 1
    forget(tlb, None, (1 << 64) - PAGE, PAGE)
    assert len(tlb) == 0


# Through an engine: what may be found is modelled by brute force, and includes whatever was not invalidated yet.

PAGES, DATA, PASIDS, ROOTS = 6, 10, (1, 2, 3), (1, 2, 3, 4)
Mapping = tuple[int, bool] | None
"""GPA and whether it may be written."""


class Model:
    """Which mappings a request may find: the present one, and older ones that nobody said were over."""

    def __init__(self) -> None:
        self.tables: dict[int, list[Mapping]] = {root: [None] * PAGES for root in ROOTS}
        self.roots = {pasid: {pasid} for pasid in PASIDS}
        """That may be found in the PASID table; the present one is `bound`."""
        self.bound = {pasid: pasid for pasid in PASIDS}
        self.possible: dict[int, list[set[Mapping]]] = {pasid: [{None} for _ in range(PAGES)] for pasid in PASIDS}

    def change(self, root: int, page: int, mapping: Mapping) -> None:
        self.tables[root][page] = mapping
        for pasid, roots in self.roots.items():
            if root in roots:
                self.possible[pasid][page].add(mapping)

    def bind(self, pasid: int, root: int) -> None:
        self.bound[pasid] = root
        self.roots[pasid].add(root)
        for page, mapping in enumerate(self.tables[root]):
            self.possible[pasid][page].add(mapping)

    def invalidate_pages(self, pasid: int, pages: range) -> None:
        for page in pages:
            self.possible[pasid][page] = {self.tables[root][page] for root in self.roots[pasid]}

    def invalidate_pasid(self, pasid: int) -> None:
        self.roots[pasid] = {self.bound[pasid]}
        self.invalidate_pages(pasid, range(PAGES))


class Run:
    """A machine and its model, changed alike."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.machine = Machine(pasids=ROOTS, pages=128)
        self.model = Model()
        self.gpas = [self.machine.data + 2 * index * PAGE for index in range(DATA)]
        ctx, space = self.machine.guest.ctx, self.machine.memory_ioasid
        ctx.unmap_dma(space, 0, self.machine.ram.size)
        ctx.map_dma(space, 0, GOLDEN, self.machine.data)
        for gpa in self.gpas:
            ctx.map_dma(space, gpa, GOLDEN + gpa, PAGE)
        self.absent: set[int] = set()
        self.content = {}
        for gpa in self.gpas:
            self.content[gpa] = struct.pack("<Q", gpa)
            self.machine.ram.poke(gpa, self.content[gpa])
        self.token = 0
        self.stale = self.moved = self.refused = 0

    def pages(self) -> range:
        first = self.random.randrange(PAGES)
        return range(first, self.random.randrange(first, PAGES) + 1)

    def step(self) -> None:
        weighted = [self.map, self.map, self.invalidate, self.read, self.read, self.write, self.write, self.copy]
        rare = [self.rebind, self.parent, self.half, self.toggle, self.flood]
        self.random.choice(weighted if self.random.randrange(8) else rare)()

    # What the guest does

    def map(self) -> None:
        root, page = self.random.choice(ROOTS), self.random.randrange(PAGES)
        process = self.machine.processes[root]
        if self.random.randrange(8):
            gpa, writable = self.random.choice(self.gpas), self.random.randrange(3) > 0
            process.map(IOVA + page * PAGE, gpa, writable=writable)
            self.model.change(root, page, (gpa, writable))
        else:
            process.unmap(IOVA + page * PAGE)
            self.model.change(root, page, None)

    def rebind(self) -> None:
        pasid, root = self.random.choice(PASIDS), self.random.choice(ROOTS)
        entry = struct.pack("<Q", self.machine.processes[root].root | 1)
        self.machine.ram.poke(self.machine.table + 8 * pasid, entry)
        self.model.bind(pasid, root)
        if self.random.randrange(2):
            self.machine.invalidate(pasid)
            self.model.invalidate_pasid(pasid)

    def invalidate(self) -> None:
        ctx, space, pasid = self.machine.guest.ctx, self.machine.table_ioasid, self.random.choice(PASIDS)
        pages = self.pages()
        where = {"iova": IOVA + pages.start * PAGE, "size": len(pages) * PAGE}
        match self.random.randrange(5):
            case 0:
                self.machine.invalidate(pasid)
                self.model.invalidate_pasid(pasid)
            case 1:
                self.machine.invalidate(pasid, where["iova"], where["size"])
                self.model.invalidate_pages(pasid, pages)
            case 2:  # as a guest does it: first the IOMMU's, then the device's
                for cache in ("iotlb", "device-tlb"):
                    ctx.invalidate_cache(space, granularity="range", pasid=pasid, caches=[cache], **where)  # type: ignore[call-overload]
                self.model.invalidate_pages(pasid, pages)
            case 3:
                ctx.invalidate_cache(space, granularity="range", **where)  # type: ignore[call-overload]
                for each in PASIDS:
                    self.model.invalidate_pages(each, pages)
            case _:
                ctx.invalidate_cache(space)
                for each in PASIDS:
                    self.model.invalidate_pasid(each)

    def half(self) -> None:
        """An invalidation of one cache promises nothing."""
        ctx, space = self.machine.guest.ctx, self.machine.table_ioasid
        ctx.invalidate_cache(space, caches=[self.random.choice(("iotlb", "device-tlb"))])

    def flood(self) -> None:
        pasid = self.random.choice(PASIDS)
        for _ in range(50):
            self.machine.invalidate(pasid, IOVA, PAGE)
        self.model.invalidate_pages(pasid, range(1))

    def parent(self) -> None:
        """Memory comes and goes; what is gone is gone at once."""
        ctx = self.machine.guest.ctx
        gpa = next(iter(self.absent), self.random.choice(self.gpas))
        if self.absent:
            ctx.map_dma(self.machine.memory_ioasid, gpa, GOLDEN + gpa, PAGE)
            self.absent.discard(gpa)
        else:
            ctx.unmap_dma(self.machine.memory_ioasid, gpa, PAGE)
            self.absent.add(gpa)

    def toggle(self) -> None:
        registers = self.machine.registers
        match self.random.randrange(3):
            case 0:
                registers.disable_ats()
                if self.random.randrange(2):
                    self.read()
                registers.enable_ats(12 + self.random.randrange(3))
            case 1:
                registers.disable_pasid()
                registers.enable_pasid()
            case _:
                registers.set_master(False)
                assert isinstance(self.machine.memory.read(IOVA, 8, 1), Fault)
                registers.set_master()

    # What the device does

    def fitting(self, pasid: int, page: int, *, write: bool) -> set[int]:
        """GPAs that a request may reach."""
        found = {each[0] for each in self.model.possible[pasid][page] if each is not None and (each[1] or not write)}
        return found - self.absent

    def check_end(self, answer: object, pasid: int, pages: range, *, write: bool) -> range:
        """The pages that were reached; the next one, if any, may have been refused."""
        if not isinstance(answer, Fault):
            return pages
        page = (answer.iova - IOVA) // PAGE
        assert page in pages and answer.pasid == pasid, answer
        possible = self.model.possible[pasid][page]
        gone = any(each is None or each[0] in self.absent or (write and not each[1]) for each in possible)
        assert gone, (answer, possible)
        self.refused += 1
        return range(pages.start, page)

    def note(self, pasid: int, page: int, gpa: int) -> None:
        now = self.model.tables[self.model.bound[pasid]][page]
        self.stale += now is None or now[0] != gpa
        self.moved += 1

    def read(self) -> None:
        pasid, pages = self.random.choice(PASIDS), self.pages()
        into = bytearray(len(pages) * PAGE)
        answer = self.machine.memory.read_into(IOVA + pages.start * PAGE, into, pasid)
        for page in self.check_end(answer, pasid, pages, write=False):
            content = into[(page - pages.start) * PAGE :][:8]
            found = [gpa for gpa in self.fitting(pasid, page, write=False) if self.content[gpa] == content]
            assert len(found) == 1, (pasid, page, content, self.model.possible[pasid][page])
            self.note(pasid, page, found[0])

    def write(self) -> None:
        pasid, pages = self.random.choice(PASIDS), self.pages()
        tokens = []
        for _ in pages:
            self.token += 1
            tokens.append(struct.pack("<Q", self.token))
        parts = [(IOVA + page * PAGE, 8) for page in pages]
        answer = self.machine.memory.scatter(parts, b"".join(tokens), write=True, pasid=pasid)
        written = dict(zip(self.check_end(answer, pasid, pages, write=True), tokens, strict=False))
        self.absorb(pasid, written)

    def copy(self) -> None:
        source, target = self.random.choice(PASIDS), self.random.choice(PASIDS)
        one, two = self.random.randrange(PAGES), self.random.randrange(PAGES)
        answer = self.machine.memory.copy(IOVA + one * PAGE, IOVA + two * PAGE, 8, source, target_pasid=target)
        if isinstance(answer, Fault):
            write = bool(answer.access & WRITE)
            self.check_end(answer, target if write else source, range(two, two + 1) if write else range(one, one + 1),
                           write=write)  # fmt: skip
            return
        contents = {self.content[gpa] for gpa in self.fitting(source, one, write=False)}
        now = {gpa: self.machine.ram.peek(gpa, 8) for gpa in self.gpas}
        changed = [gpa for gpa in self.gpas if now[gpa] != self.content[gpa]]
        if changed:
            assert len(changed) == 1 and now[changed[0]] in contents
            assert changed[0] in self.fitting(target, two, write=True)
            self.content[changed[0]] = now[changed[0]]
        # contents that are alike cannot be told apart from now on: make them differ
        for gpa in changed:
            self.token += 1
            self.content[gpa] = struct.pack("<Q", self.token)
            self.machine.ram.poke(gpa, self.content[gpa])

    def absorb(self, pasid: int, written: dict[int, bytes]) -> None:
        """Each token stands at a GPA that its page may have led to; a later one may have overwritten it."""
        now = {gpa: self.machine.ram.peek(gpa, 8) for gpa in self.gpas}
        changed = {gpa for gpa in self.gpas if now[gpa] != self.content[gpa]}
        for gpa in changed:
            page = next(page for page, token in written.items() if token == now[gpa])
            assert gpa in self.fitting(pasid, page, write=True), (pasid, page, gpa)
            self.note(pasid, page, gpa)
            self.content[gpa] = now[gpa]
        assert bool(changed) == bool(written)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(request.param)
    yield run
    run.machine.close()


@pytest.mark.parametrize("run", range(6), indirect=True)
def test_nothing_that_was_invalidated_is_used(run: Run) -> None:
    kept = 0
    for _ in range(4000):
        run.step()
        kept = max(kept, run.machine.kept())
    assert kept > PAGES and run.moved > 1000 and run.refused > 100
    assert run.stale > 50, "if nothing was kept the model would notice nothing"
    assert {each.reason for each in run.machine.heard} <= {Reason.NOT_PRESENT, Reason.PERMISSION}
