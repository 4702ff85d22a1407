"""Whatever order commands come in, each does what a small model says or is refused and changes nothing."""

from collections.abc import Callable

import pytest
from guest_ram import PAGE, AmdTables, Ram
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backend.core import Fault, Reason
from backend.ioasid import Engine, IoasidError, Kind, PgtableFormat

RIDS = (0x10, 0x11)
PASIDS = (None, 1)
KEYS = [(rid, pasid) for rid in RIDS for pasid in PASIDS]
RAM_PAGES = 48
IOVAS = 4


class Commands(RuleBasedStateMachine):
    """Model: `spaces`: number -> parent, None of a root; `maps`: root -> page -> page of RAM."""

    rids = st.sampled_from(RIDS)
    pasids = st.sampled_from(PASIDS)
    ids = st.integers(1, 5)
    pages = st.integers(0, IOVAS - 1)

    def __init__(self) -> None:
        super().__init__()
        self.ram = Ram(RAM_PAGES * PAGE)
        for page in range(RAM_PAGES):
            self.ram.poke(page * PAGE + 8, page.to_bytes(8, "little"))
        # The guest's table: IOVA page n -> GPA page IOVAS-1-n. Table pages: GPA pages 16 to 19.
        self.tables = AmdTables(self.ram, 16 * PAGE)
        for page in range(IOVAS):
            self.tables.map(page * PAGE, (IOVAS - 1 - page) * PAGE)
        self.engine = Engine()
        self.ctx = self.engine.open()
        for rid in RIDS:
            self.engine.add_device(rid, f"device {rid:#x}")
            self.ctx.bind_device(rid)
        self.spaces: dict[int, int | None] = {}
        self.maps: dict[int, dict[int, int]] = {}
        self.bound: set[int] = set()
        self.stacks: dict[tuple[int, int | None], list[int]] = {key: [] for key in KEYS}

    def attempt(self, legal: bool, call: Callable[[], object]) -> bool:
        """Make the call; it must be refused exactly where the model says so."""
        if legal:
            call()
        else:
            with pytest.raises(IoasidError):
                call()
        return legal

    @rule()
    def alloc(self) -> None:
        if len(self.spaces) < 5:
            ioasid = self.ctx.alloc(Kind.KERNEL)
            assert ioasid not in self.spaces
            self.spaces[ioasid] = None
            # The tables of a child are reachable through each root, beyond the pages that this test maps.
            self.ctx.map_dma(ioasid, 16 * PAGE, self.ram.hva + 16 * PAGE, 4 * PAGE)
            self.maps[ioasid] = {}

    @rule(parent=ids)
    def nest(self, parent: int) -> None:
        if len(self.spaces) < 5:
            legal = parent in self.spaces and self.spaces[parent] is None
            made: list[int] = []
            if self.attempt(legal, lambda: made.append(self.ctx.create_nesting(parent))):
                self.spaces[made[0]] = parent

    @rule(ioasid=ids)
    def free(self, ioasid: int) -> None:
        used = any(ioasid in stack for stack in self.stacks.values()) or ioasid in self.spaces.values()
        if self.attempt(ioasid in self.spaces and not used, lambda: self.ctx.free(ioasid)):
            del self.spaces[ioasid]
            self.maps.pop(ioasid, None)
            self.bound.discard(ioasid)

    @rule(ioasid=ids, page=pages, content=st.integers(0, 15))
    def map(self, ioasid: int, page: int, content: int) -> None:
        legal = ioasid in self.maps and page not in self.maps[ioasid]
        vaddr = self.ram.hva + content * PAGE
        if self.attempt(legal, lambda: self.ctx.map_dma(ioasid, page * PAGE, vaddr, PAGE)):
            self.maps[ioasid][page] = content

    @rule(ioasid=ids, page=pages)
    def unmap(self, ioasid: int, page: int) -> None:
        legal = ioasid in self.maps and page in self.maps[ioasid]
        if self.attempt(legal, lambda: self.ctx.unmap_dma(ioasid, page * PAGE, PAGE)):
            del self.maps[ioasid][page]

    @rule(ioasid=ids)
    def bind(self, ioasid: int) -> None:
        legal = self.spaces.get(ioasid) is not None and ioasid not in self.bound
        if self.attempt(legal, lambda: self.ctx.bind_pgtable(ioasid, self.tables.root, PgtableFormat())):
            self.bound.add(ioasid)

    @rule(ioasid=ids)
    def unbind(self, ioasid: int) -> None:
        if self.attempt(ioasid in self.bound, lambda: self.ctx.unbind_pgtable(ioasid)):
            self.bound.remove(ioasid)

    @rule(rid=rids, pasid=pasids, ioasid=ids)
    def attach(self, rid: int, pasid: int | None, ioasid: int) -> None:
        stack = self.stacks[rid, pasid]
        parent = self.spaces.get(ioasid)
        if ioasid not in self.spaces:
            legal = False
        elif parent is None:
            legal = not stack
        elif stack:
            legal = stack[-1] == parent
        else:
            legal = pasid is not None and parent in self.stacks[rid, None]
        if self.attempt(legal, lambda: self.ctx.attach(rid, ioasid, pasid=pasid)):
            stack.append(ioasid)

    @rule(rid=rids, pasid=pasids)
    def detach(self, rid: int, pasid: int | None) -> None:
        stack = self.stacks[rid, pasid]
        leaning = any(
            other and self.spaces[other[0]] == stack[-1]
            for (whose, of), other in self.stacks.items()
            if stack and pasid is None and whose == rid and of is not None
        )
        if self.attempt(bool(stack) and not leaning, lambda: self.ctx.detach(rid, pasid=pasid)):
            stack.pop()

    @invariant()
    def every_request_ends_where_the_model_says(self) -> None:
        for rid, pasid in KEYS:
            for page in range(IOVAS):
                answer = self.engine.devices[rid].port.load(page * PAGE + 8, 8, pasid=pasid)
                expected = self.expected(rid, pasid, page)
                assert (answer.reason if isinstance(answer, Fault) else answer) == expected

    def expected(self, rid: int, pasid: int | None, page: int) -> int | Reason:
        stack = self.stacks[rid, pasid]
        if not stack:
            return Reason.NO_ROUTE
        parent = self.spaces[stack[-1]]
        if parent is None:
            return self.maps[stack[-1]].get(page, Reason.NOT_PRESENT)
        if stack[-1] not in self.bound:
            return Reason.NOT_BOUND
        return self.maps[parent].get(IOVAS - 1 - page, Reason.NOT_PRESENT)

    @invariant()
    def info_tells_the_same(self) -> None:
        for ioasid, parent in self.spaces.items():
            info = self.ctx.get_info(ioasid)
            assert info.parent == parent
            assert info.children == sum(above == ioasid for above in self.spaces.values())
            assert info.attachments == sum(stack.count(ioasid) for stack in self.stacks.values())
            assert info.mappings == (0 if parent is not None else len(self.maps[ioasid]) + 1)
        assert self.engine.core.counters().spaces == len(self.spaces)

    def teardown(self) -> None:
        self.ctx.close()
        assert self.engine.core.counters().spaces == 0
        self.engine.close()
        self.ram.close()


TestCommands = Commands.TestCase
TestCommands.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
