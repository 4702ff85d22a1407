"""Merged tables against brute force: a dictionary of mappings, each translation followed from one to the next."""

from __future__ import annotations

from typing import NamedTuple

from guest_ram import PAGE, Ram
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backend.core import Access, Fault
from backend.ioasid import Engine, Kind
from backend.ioasid.intervals import Intervals
from backend.ioasid.limits import MAX_MERGED

RW = Access.READ | Access.WRITE
PAGES = 10
RAM_PAGES = 16


class Said(NamedTuple):
    """A MAP_DMA, in pages."""

    target: int
    pages: int
    access: Access


class Nesting(RuleBasedStateMachine):
    """`parents`: IOASID -> the one above, or None; `said`: IOASID -> first page -> what was mapped there."""

    spaces = st.integers(0, 5)
    pages = st.integers(0, PAGES - 1)
    sizes = st.integers(1, 5)
    rights = st.sampled_from([Access.READ, Access.WRITE, Access.READ | Access.WRITE])

    def __init__(self) -> None:
        super().__init__()
        self.ram = Ram((RAM_PAGES + PAGES) * PAGE)
        for page in range(RAM_PAGES + PAGES):
            self.ram.poke(page * PAGE, page.to_bytes(8, "little"))
        self.engine = Engine()
        self.ctx = self.engine.open()
        self.parents: dict[int, int | None] = {}
        self.said: dict[int, dict[int, Said]] = {}
        self.rids: dict[int, int] = {}
        self.next_rid = 1

    def pick(self, number: int) -> int | None:
        return list(self.parents)[number % len(self.parents)] if self.parents else None

    def entered(self, ioasid: int, parent: int | None) -> None:
        self.parents[ioasid], self.said[ioasid] = parent, {}
        rid = self.rids[ioasid] = self.next_rid
        self.next_rid += 1
        self.engine.add_device(rid, f"device {rid}")
        self.ctx.bind_device(rid)
        chain: list[int] = []
        at: int | None = ioasid
        while at is not None:
            chain.append(at)
            at = self.parents[at]
        for each in reversed(chain):
            self.ctx.attach(rid, each)

    @initialize(above=st.lists(spaces, min_size=2, max_size=4), begin=st.lists(st.tuples(pages, pages, sizes)))
    def begin(self, above: list[int], begin: list[tuple[int, int, int]]) -> None:
        """A tree, and something mapped in each of it: else most sequences would come to little."""
        self.entered(self.ctx.alloc(), None)
        for number in above:
            self.nest(number)
        for number in range(len(self.parents)):
            for page, place, size in begin:
                self.map(number, page, place, size, RW)

    @rule()
    def alloc(self) -> None:
        if len(self.parents) < 6:
            self.entered(self.ctx.alloc(), None)

    @rule(number=spaces)
    def nest(self, number: int) -> None:
        parent = self.pick(number)
        if parent is not None and len(self.parents) < 6:
            self.entered(self.ctx.create_nesting(parent, Kind.KERNEL), parent)

    @rule(number=spaces)
    def free(self, number: int) -> None:
        ioasid = self.pick(number)
        if ioasid is not None and ioasid not in self.parents.values() and len(self.parents) > 3:
            rid = self.rids.pop(ioasid)
            while self.engine.devices[rid].stacks:
                self.ctx.detach(rid)
            self.ctx.free(ioasid)
            del self.parents[ioasid], self.said[ioasid]

    @rule(number=spaces, page=pages, place=pages, size=sizes, access=rights)
    def map(self, number: int, page: int, place: int, size: int, access: Access) -> None:
        ioasid = self.pick(number)
        if ioasid is None or any(
            page < at + other.pages and at < page + size for at, other in self.said[ioasid].items()
        ):
            return
        base = self.ram.hva if self.parents[ioasid] is None else 0
        self.ctx.map_dma(ioasid, page * PAGE, base + place * PAGE, size * PAGE, access)
        self.said[ioasid][page] = Said(place, size, access)

    @rule(number=spaces, which=st.integers(0, 9))
    def unmap(self, number: int, which: int) -> None:
        ioasid = self.pick(number)
        if ioasid is not None and self.said[ioasid]:
            page = list(self.said[ioasid])[which % len(self.said[ioasid])]
            said = self.said[ioasid].pop(page)
            self.ctx.unmap_dma(ioasid, page * PAGE, said.pages * PAGE)

    def leads(self, ioasid: int, page: int) -> tuple[int, Access] | None:
        """The page of RAM, and the rights on the way there."""
        for at, said in self.said[ioasid].items():
            if at <= page < at + said.pages:
                target, parent = said.target + page - at, self.parents[ioasid]
                if parent is None:
                    return target, said.access
                above = self.leads(parent, target)
                return None if above is None else (above[0], above[1] & said.access)
        return None

    @invariant()
    def every_page_leads_where_the_mappings_say(self) -> None:
        for ioasid, rid in self.rids.items():
            for page in range(PAGES + 5):
                leads = self.leads(ioasid, page)
                for access in (Access.READ, Access.WRITE):
                    answer = self.engine.core.translate(rid, page * PAGE, access)
                    if leads is None or not leads[1] & access:
                        assert isinstance(answer, Fault)
                    else:
                        assert not isinstance(answer, Fault)
                        assert (answer.hva, answer.access & RW) == (self.ram.hva + leads[0] * PAGE, leads[1])

    def teardown(self) -> None:
        left = self.ctx.merged_room.left
        self.ctx.close()
        assert self.engine.core.counters().table_pages == 0
        assert self.ctx.merged_room.left >= left
        assert self.ctx.merged_room.left == MAX_MERGED
        self.engine.close()
        self.ram.close()


TestNesting = Nesting.TestCase
TestNesting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Span:
    """A range, by its pages."""

    def __init__(self, page: int, pages: int) -> None:
        self.start, self.size = page * PAGE, pages * PAGE


class Finding(RuleBasedStateMachine):
    """Intervals against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Intervals[Span] = Intervals()
        self.spans: list[Span] = []

    places = st.one_of(st.integers(0, 40), st.integers((1 << 52) - 40, (1 << 52) - 1), st.just(1 << 40))

    @rule(page=places, pages=st.one_of(st.integers(1, 20), st.just(1 << 30)))
    def add(self, page: int, pages: int) -> None:
        span = Span(page, min(pages, (1 << 52) - page))
        self.spans.append(span)
        self.found.add(span)

    @rule(which=st.integers(0, 50))
    def remove(self, which: int) -> None:
        if self.spans:
            self.found.remove(self.spans.pop(which % len(self.spans)))

    @rule(page=places, pages=st.one_of(st.integers(1, 20), st.just(1 << 51)))
    def look(self, page: int, pages: int) -> None:
        start, end = page * PAGE, (page + pages) * PAGE
        expected = {each for each in self.spans if each.start < end and start < each.start + each.size}
        answer = self.found.overlapping(start, end - start)
        assert len(answer) == len(expected) and set(answer) == expected

    @invariant()
    def counts(self) -> None:
        assert len(self.found) == len(self.spans)


TestFinding = Finding.TestCase
TestFinding.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
