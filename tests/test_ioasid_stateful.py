"""All commands in whatever order: each does what a small model says, or is refused and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from guest_ram import PAGE, AmdTables, Ram
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ioasid_guest import Clock, gcr3_table, x86_tables

from backend.core import RW, Access, Fault, Reason
from backend.ioasid import (
    Code,
    Device,
    Engine,
    Invalidation,
    IoasidError,
    Kind,
    PageResponse,
    PasidMode,
    PasidTableFormat,
    PgtableFormat,
    Traits,
)

WHOLE, SHARED = 0x10, 0x11
"""A whole device, whose PASIDs are the guest's, and one whose PASIDs come from the global pool."""
PASIDS = (None, 1, 2)
KEYS = [(rid, pasid) for rid in (WHOLE, SHARED) for pasid in PASIDS]
IOVAS = 4
TABLES, TABLE_PAGES = 16, 10
"""Pages of the guest's tables: AMD's from 16, x86's from 20, the GCR3 table at 24."""
RAM_PAGES = 32
SPACES = 7


@dataclass
class Model:
    """An IOASID: what is mapped (page -> page of RAM, or of the parent), and what is bound."""

    kind: Kind
    parent: int | None
    maps: dict[int, int] = field(default_factory=dict)
    counted: int = 0
    """Pages that are accounted for by their mappings."""
    using: int = 0
    """Mappings that use registered memory."""
    bound: str = ""
    dirty: set[int] | None = None
    seen: set[int] = field(default_factory=set)
    """Pages that were dirty since they are tracked."""


class WholeSet(RuleBasedStateMachine):
    """Every rule makes a call that is legal or not, as the model says."""

    rids = st.sampled_from((WHOLE, SHARED))
    pasids = st.sampled_from(PASIDS)
    ids = st.sampled_from(range(3 * SPACES))
    pages = st.integers(0, IOVAS - 1)
    groups = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.ram = Ram(RAM_PAGES * PAGE)
        for page in range(TABLES):
            self.ram.poke(page * PAGE + 8, page.to_bytes(8, "little"))
        self.amd = AmdTables(self.ram, TABLES * PAGE)
        flipped = {page * PAGE: (IOVAS - 1 - page) * PAGE for page in range(IOVAS)}
        flipped |= {page * PAGE: page * PAGE for page in range(TABLES, TABLES + TABLE_PAGES)}  # for tables above
        for iova, gpa in flipped.items():
            self.amd.map(iova, gpa)
        x86 = x86_tables(self.ram, (TABLES + 4) * PAGE, flipped)
        self.gcr3 = gcr3_table(self.ram, (TABLES + 8) * PAGE, {1: x86})
        self.clock = Clock()
        self.engine = Engine(clock=self.clock, page_timeout=10)
        self.ctx = self.engine.open()
        self.devices: dict[int, Device] = {
            WHOLE: self.engine.add_device(WHOLE, "whole"),
            SHARED: self.engine.add_device(SHARED, "shared", Traits(pasid_mode=PasidMode.GLOBAL)),
        }
        for rid in self.devices:
            self.ctx.bind_device(rid)
        memory = self.engine.vm_memory
        memory.map(TABLES * PAGE, self.ram.hva + TABLES * PAGE, TABLE_PAGES * PAGE, RW)
        self.vm: dict[int, int] = {}
        self.spaces: dict[int, Model] = {}
        self.stacks: dict[tuple[int, int | None], list[int]] = {key: [] for key in KEYS}
        self.ats: dict[tuple[int, int | None], list[bool]] = {key: [] for key in KEYS}
        self.kvm: dict[int, tuple[int, int]] = {}
        self.registered = self.exclusive = False
        self.waiting: dict[tuple[int, int], int | None] = {}
        self.asked = self.answered = 0

    def attempt(self, legal: bool, call: Callable[[], object]) -> bool:
        if legal:
            call()
        else:
            with pytest.raises(IoasidError):
                call()
        return legal

    def pick(self, number: int, likely: Callable[[int], bool] = lambda ioasid: True) -> int:
        """One that is there, or now and then one that is not; twice in three one that is `likely`, if there is any:
        commands that few are fit for would do little otherwise. Below 0: the one of that number."""
        if number < 0:
            return -number
        there = sorted(self.spaces)
        if number % 3 < 2:
            there = [ioasid for ioasid in there if likely(ioasid)] or there
        return there[number % len(there)] if there and number != 3 * SPACES - 1 else 9

    @initialize(how=st.sampled_from(("by pasid", "delegated", "three tables")))
    def begin(self, how: str) -> None:
        """1: kernel, both devices on it; 2 and 3: user and kernel beneath it; 4: user beneath 3; 5: kernel, free. PASID
        1 of both devices is on 2; or of the whole device, all PASIDs are led by the table of 6, user beneath 1; or it
        is on 2 and on 6, user beneath 2."""
        self.alloc(Kind.KERNEL, None, False)
        for page in range(IOVAS):
            self.map(-1, page, page + 4)
        self.nest(-1, Kind.USER)
        self.nest(-1, Kind.KERNEL)
        self.nest(-3, Kind.USER)
        for page in range(IOVAS - 1):
            self.map(-3, page, page + 1)
        self.bind(-2)
        self.alloc(Kind.KERNEL, None, False)
        for rid in (WHOLE, SHARED):
            self.attach(rid, None, -1, ats=True)
        self.attach(SHARED, 1, -2, ats=True)
        if how == "three tables":
            self.nest(-2, Kind.USER)
            self.bind(-6)
            self.attach(WHOLE, None, -2, ats=False)
            self.attach(WHOLE, None, -6, ats=True)
        elif how == "delegated":
            self.nest(-1, Kind.USER)
            self.bind_pasids(-6)
            self.attach(WHOLE, None, -6, ats=True)
        else:
            self.attach(WHOLE, 1, -2, ats=False)

    # IOASIDs

    @rule(kind=st.sampled_from((Kind.KERNEL, Kind.VM, Kind.USER)), parent=st.none() | ids, at_once=st.booleans())
    def alloc(self, kind: Kind, parent: int | None, at_once: bool) -> None:
        parent = None if parent is None else self.pick(parent)
        if len(self.spaces) >= SPACES or (kind != Kind.USER and not self.may_map(parent)):
            return
        legal = (kind == Kind.USER) <= (parent is not None) and (kind == Kind.VM) <= (parent is None)
        legal = legal and (parent is None or self.may_nest(parent, kind))
        root = self.amd.root if kind == Kind.USER and at_once else None
        made: list[int] = []
        if not self.attempt(legal, lambda: made.append(self.ctx.alloc(kind, parent=parent, root=root))):
            return
        assert made[0] not in self.spaces
        space = self.spaces[made[0]] = Model(kind, parent, bound="table" if root is not None else "")
        if kind == Kind.KERNEL:
            vaddr = TABLES * PAGE + (0 if parent is not None else self.ram.hva)
            self.ctx.map_dma(made[0], TABLES * PAGE, vaddr, TABLE_PAGES * PAGE)
            self.account(space, TABLE_PAGES, 1)

    @rule(parent=ids, kind=st.sampled_from((Kind.USER, Kind.KERNEL)))
    def nest(self, parent: int, kind: Kind) -> None:
        parent = self.pick(parent)
        if len(self.spaces) >= SPACES:
            return
        made: list[int] = []
        if self.attempt(self.may_nest(parent, kind), lambda: made.append(self.ctx.create_nesting(parent, kind))):
            self.spaces[made[0]] = space = Model(kind, parent)
            if kind == Kind.KERNEL:
                self.ctx.map_dma(made[0], TABLES * PAGE, TABLES * PAGE, TABLE_PAGES * PAGE)
                self.account(space, TABLE_PAGES, 1)

    @rule(ioasid=ids)
    def free(self, ioasid: int) -> None:
        ioasid = self.pick(ioasid, lambda each: not self.is_used(each))
        if self.attempt(ioasid in self.spaces and not self.is_used(ioasid), lambda: self.ctx.free(ioasid)):
            del self.spaces[ioasid]

    # Memory

    @rule(ioasid=ids, page=pages, content=st.integers(0, TABLES - 1))
    def map(self, ioasid: int, page: int, content: int) -> None:
        ioasid = self.pick(ioasid)
        space = self.spaces.get(ioasid)
        legal = space is not None and space.kind == Kind.KERNEL and page not in space.maps
        nested = space is not None and space.parent is not None
        legal = legal and self.may_map(space.parent if space is not None else None)
        content = content % IOVAS if nested else content
        vaddr = content * PAGE + (0 if nested else self.ram.hva)
        if self.attempt(legal, lambda: self.ctx.map_dma(ioasid, page * PAGE, vaddr, PAGE)):
            assert space is not None
            space.maps[page] = content
            self.account(space, 1, 1)

    @rule(ioasid=ids, page=pages)
    def unmap(self, ioasid: int, page: int) -> None:
        ioasid = self.pick(ioasid)
        space = self.spaces.get(ioasid)
        before = self.ctx.pinned.pinned
        legal = space is not None and page in space.maps
        if self.attempt(legal, lambda: self.ctx.unmap_dma(ioasid, page * PAGE, PAGE)):
            assert space is not None
            del space.maps[page]
            if space.parent is None:
                if self.ctx.pinned.pinned < before:
                    space.counted -= 1
                else:
                    space.using -= 1

    @rule()
    def register(self) -> None:
        legal = not self.registered
        if self.attempt(legal, lambda: self.ctx.register_memory(self.ram.hva, self.ram.size)):
            self.registered = self.exclusive = True

    @rule()
    def unregister(self) -> None:
        legal = self.registered and not any(space.using for space in self.spaces.values())
        if self.attempt(legal, lambda: self.ctx.unregister_memory(self.ram.hva, self.ram.size)):
            self.registered = False

    @rule(page=pages, content=st.integers(0, TABLES - 1))
    def vm_memory(self, page: int, content: int) -> None:
        if page in self.vm:
            self.engine.vm_memory.unmap(page * PAGE, PAGE)
            del self.vm[page]
        else:
            self.engine.vm_memory.map(page * PAGE, self.ram.hva + content * PAGE, PAGE, RW)
            self.vm[page] = content

    @rule(ioasid=ids, on=st.booleans())
    def track(self, ioasid: int, on: bool) -> None:
        ioasid = self.pick(ioasid)
        space = self.spaces.get(ioasid)
        legal = space is not None and space.kind == Kind.KERNEL
        if self.attempt(legal, lambda: self.ctx.set_dirty_tracking(ioasid, on)):
            assert space is not None
            space.dirty = (space.dirty or set()) if on else None
            space.seen = space.seen if on else set()

    @rule(ioasid=ids, clear=st.booleans())
    def dirty(self, ioasid: int, clear: bool) -> None:
        ioasid = self.pick(ioasid)
        space = self.spaces.get(ioasid)
        legal = space is not None and space.dirty is not None
        told: list[bytes] = []
        call = lambda: told.append(self.ctx.get_dirty_bitmap(ioasid, 0, IOVAS * PAGE, clear=clear))  # noqa: E731
        if self.attempt(legal, call):
            assert space is not None and space.dirty is not None
            found = {page for page in range(IOVAS) if told[0][0] >> page & 1}
            # What was written through a child that is tracked itself is told again until it was read there.
            assert space.dirty <= found <= (space.seen if self.tracked_beneath(ioasid) else space.dirty)
            if clear:
                space.dirty.clear()

    @rule(rid=rids, pasid=pasids, page=pages)
    def write(self, rid: int, pasid: int | None, page: int) -> None:
        ends = self.expected(rid, pasid, page)
        answer = self.devices[rid].port.store(page * PAGE + 64, 1, 8, pasid=self.physical(rid, pasid))
        assert (answer is None) == (not isinstance(ends, Reason))
        space, page = self.host_of(rid, pasid, page) if answer is None else (None, 0)
        while space is not None:
            if space.dirty is not None:
                space.dirty.add(page)
                space.seen.add(page)
            if space.parent is None:
                break
            space, page = self.spaces[space.parent], space.maps[page]

    # Tables

    @rule(ioasid=ids)
    def bind(self, ioasid: int) -> None:
        ioasid = self.pick(ioasid)
        if self.attempt(self.is_unbound(ioasid), lambda: self.ctx.bind_pgtable(ioasid, self.amd.root, PgtableFormat())):
            self.spaces[ioasid].bound = "table"

    @rule(ioasid=ids)
    def bind_pasids(self, ioasid: int) -> None:
        ioasid = self.pick(ioasid, lambda each: (WHOLE, None) in self.users(each))
        users = self.users(ioasid)
        legal = self.is_unbound(ioasid) and all(user == (WHOLE, None) for user in users)
        legal = legal and not any(space.parent == ioasid for space in self.spaces.values())
        legal = legal and not (users and any(self.stacks[WHOLE, pasid] for pasid in (1, 2)))
        fmt = PasidTableFormat(levels=1)
        if self.attempt(legal, lambda: self.ctx.bind_pasid_table(ioasid, self.gcr3, fmt)):
            self.spaces[ioasid].bound = "pasids"

    @rule(ioasid=ids, fits=st.booleans())
    def unbind(self, ioasid: int, fits: bool) -> None:
        ioasid = self.pick(ioasid, lambda each: bool(self.spaces[each].bound and self.users(each)))
        space = self.spaces.get(ioasid)
        what = "pasids" if (space is not None and space.bound == "pasids") == fits else "table"
        call = self.ctx.unbind_pgtable if what == "table" else self.ctx.unbind_pasid_table
        if self.attempt(space is not None and space.bound == what, lambda: call(ioasid)):
            assert space is not None
            space.bound = ""
            for rid, pasid in self.users(ioasid):
                self.release(rid, pasid, every=what == "pasids")

    @rule(ioasid=ids, page=pages)
    def invalidate(self, ioasid: int, page: int) -> None:
        ioasid = self.pick(ioasid)
        space = self.spaces.get(ioasid)
        legal = space is not None and space.kind == Kind.USER
        entries = [Invalidation("range", page * PAGE, PAGE), Invalidation(), Invalidation("range")]
        told: list[int] = []
        if self.attempt(legal, lambda: told.append(self.ctx.invalidate_cache(ioasid, entries=entries).done)):
            assert told == [2]

    # Devices

    @rule(rid=rids, pasid=pasids, ioasid=ids, ats=st.booleans())
    def attach(self, rid: int, pasid: int | None, ioasid: int, ats: bool) -> None:
        ioasid = self.pick(ioasid, lambda each: self.attachable(rid, pasid, each))
        legal = self.attachable(rid, pasid, ioasid) and not (ats and self.elsewhere(rid, ioasid))
        if self.attempt(legal, lambda: self.ctx.attach(rid, ioasid, vpasid=pasid, ats=ats)):
            self.stacks[rid, pasid].append(ioasid)
            self.ats[rid, pasid].append(ats)

    def elsewhere(self, rid: int, ioasid: int) -> bool:
        """Whether translated addresses of the device are another IOASID's."""
        hosts = {
            self.bottom(one)
            for key in KEYS
            for one, ats in zip(self.stacks[key], self.ats[key], strict=True)
            if ats and key[0] == rid
        }
        return bool(hosts) and self.bottom(ioasid) not in hosts

    def bottom(self, ioasid: int) -> int:
        while self.spaces[ioasid].kind == Kind.USER:
            below = self.spaces[ioasid].parent
            assert below is not None
            ioasid = below
        return ioasid

    def attachable(self, rid: int, pasid: int | None, ioasid: int) -> bool:
        space, stack, own = self.spaces.get(ioasid), self.stacks[rid, pasid], self.stacks[rid, None]
        if space is None:
            return False
        if rid == SHARED and pasid is None and space.kind == Kind.USER:
            return False
        if space.bound == "pasids" and (
            pasid is not None or rid == SHARED or any(self.stacks[rid, each] for each in (1, 2))
        ):
            return False
        if pasid is not None and own and self.spaces[own[-1]].bound == "pasids":
            return False
        if stack:
            return stack[-1] == space.parent
        return space.parent is None or (pasid is not None and space.parent in own)

    @rule(rid=rids, pasid=pasids)
    def detach(self, rid: int, pasid: int | None) -> None:
        stack = self.stacks[rid, pasid]
        leaning = pasid is None and any(
            self.stacks[rid, each] and self.spaces[self.stacks[rid, each][0]].parent == stack[-1]
            for each in (1, 2)
            if stack
        )
        if not self.attempt(bool(stack) and not leaning, lambda: self.ctx.detach(rid, vpasid=pasid)):
            return
        gone = stack.pop()
        self.ats[rid, pasid].pop()
        self.release(rid, pasid, every=self.spaces[gone].bound == "pasids")
        for mapped, reach in list(self.kvm.items()):
            if rid == SHARED and reach == (pasid, gone):
                del self.kvm[mapped]

    @rule(pasid=st.integers(1, 3), ioasid=ids)
    def map_pasid(self, pasid: int, ioasid: int) -> None:
        ioasid = self.pick(ioasid)
        reached = [key for key in (1, 2) if ioasid in self.stacks[SHARED, key]]
        legal = len(reached) == 1 and pasid not in self.kvm
        if self.attempt(legal, lambda: self.ctx.map_pasid(pasid, ioasid)):
            self.kvm[pasid] = (reached[0], ioasid)

    @rule(pasid=st.integers(1, 3))
    def unmap_pasid(self, pasid: int) -> None:
        if self.attempt(pasid in self.kvm, lambda: self.ctx.unmap_pasid(pasid)):
            del self.kvm[pasid]

    # Page requests

    @rule(rid=rids, pasid=pasids, group=groups)
    def ask(self, rid: int, pasid: int | None, group: int) -> None:
        own = self.stacks[rid, None]
        stack = self.stacks[rid, pasid] or (own if own and self.spaces[own[-1]].bound == "pasids" else [])
        queued = bool(stack) and self.spaces[stack[-1]].kind != Kind.VM and (rid, group) not in self.waiting

        def answer(response: PageResponse) -> None:
            assert (response.rid, response.group) == (rid, group)
            self.answered += 1

        self.asked += 1
        physical = self.physical(rid, pasid)
        self.devices[rid].page_request(physical, 0, Access.READ, group=group, last=True, answer=answer)
        if queued:
            self.waiting[rid, group] = pasid

    @rule(rid=rids, group=groups, code=st.sampled_from(Code))
    def respond(self, rid: int, group: int, code: Code) -> None:
        if self.attempt((rid, group) in self.waiting, lambda: self.ctx.page_response(rid, group, code)):
            del self.waiting[rid, group]

    @rule()
    def time_passes(self) -> None:
        self.clock.now += 10
        assert self.engine.expire() is None
        self.waiting.clear()

    @rule()
    def read(self) -> None:
        records = self.ctx.read_faults().records
        assert all(each.recoverable <= ((each.rid, each.group) in self.waiting) for each in records)

    # What is so after every step

    @invariant()
    def every_request_ends_where_the_model_says(self) -> None:
        for rid, pasid in KEYS:
            physical = self.physical(rid, pasid)
            for page in range(IOVAS):
                answer = self.devices[rid].port.load(page * PAGE + 8, 8, pasid=physical)
                assert (answer.reason if isinstance(answer, Fault) else answer) == self.expected(rid, pasid, page)

    @invariant()
    def translations_lead_to_the_same(self) -> None:
        for rid, pasid in KEYS:
            port, page = self.devices[rid].port, 1
            own = self.ats[rid, pasid] or (self.ats[rid, None] if self.routed(rid, pasid) else [])
            ends: int | Reason | None = self.expected(rid, pasid, page)
            if own and not own[-1]:
                ends = Reason.ATS_OFF
            reply = port.translate(page * PAGE, PAGE, Access.READ, pasid=self.physical(rid, pasid))
            if reply.fault is not None:
                assert reply.fault.reason == ends and not reply.translations
            else:
                assert port.translated.load(reply.translations[0].address + 8, 8) == ends

    @invariant()
    def lookup_tells_the_same(self) -> None:
        for ioasid in self.spaces:
            for page in range(IOVAS):
                result = self.ctx.lookup(ioasid, page * PAGE + 8).result
                ends = self.resolve(ioasid, None, page)
                if isinstance(result, Fault):
                    assert result.reason == ends
                else:
                    assert result.hva == self.ram.hva + int(ends) * PAGE + 8

    @invariant()
    def info_tells_the_same(self) -> None:
        for ioasid, space in self.spaces.items():
            info = self.ctx.get_info(ioasid)
            assert (info.kind, info.parent) == (space.kind, space.parent)
            assert info.children == sum(each.parent == ioasid for each in self.spaces.values())
            assert info.attachments == len(self.users(ioasid))
            assert (info.root is not None) == bool(space.bound)
            mapped = len(space.maps) + 1 if space.kind == Kind.KERNEL else len(self.vm) + 1
            assert info.mappings == (0 if space.kind == Kind.USER else mapped)
        for rid in (WHOLE, SHARED):
            told = [(each.pasid, each.ioasid) for each in self.ctx.get_info(rid=rid).attachments]
            assert sorted(told, key=str) == sorted(
                ((pasid, each) for pasid in PASIDS for each in self.stacks[rid, pasid]), key=str
            )
        assert self.engine.core.counters().spaces == len(self.spaces)

    @invariant()
    def accounts_agree(self) -> None:
        counted = sum(space.counted for space in self.spaces.values())
        assert self.ctx.pinned.pinned == (counted + RAM_PAGES * self.registered) * PAGE
        assert self.ctx.faults.waiting == len(self.waiting) == self.asked - self.answered
        assert len(self.engine.kvm) == len(self.kvm)
        assert len(self.engine.shared_pasids) == sum(bool(self.stacks[SHARED, pasid]) for pasid in (1, 2))
        for pasid, (key, _) in self.kvm.items():
            assert self.engine.kvm.translate(self.ctx.vm, pasid) == self.devices[SHARED].physical(key)

    def teardown(self) -> None:
        self.ctx.close()
        assert self.engine.core.counters().spaces == 0
        assert len(self.engine.kvm) == len(self.engine.shared_pasids) == 0
        assert self.asked == self.answered
        self.engine.close()
        self.ram.close()

    # The model

    def is_host(self, ioasid: int) -> bool:
        return ioasid in self.spaces and self.spaces[ioasid].kind in {Kind.KERNEL, Kind.VM}

    def may_nest(self, parent: int, kind: Kind) -> bool:
        if parent not in self.spaces or self.is_host(parent):
            return parent in self.spaces
        above = self.spaces[parent]
        assert above.parent is not None
        return kind == Kind.USER and self.is_host(above.parent) and above.bound != "pasids"

    def is_used(self, ioasid: int) -> bool:
        return bool(self.users(ioasid)) or any(space.parent == ioasid for space in self.spaces.values())

    def is_unbound(self, ioasid: int) -> bool:
        space = self.spaces.get(ioasid)
        return space is not None and space.kind == Kind.USER and not space.bound

    def may_map(self, parent: int | None) -> bool:
        return parent is not None or self.registered or not self.exclusive

    def account(self, space: Model, pages: int, by: int) -> None:
        if space.parent is None:
            if self.exclusive:
                space.using += by
            else:
                space.counted += by * pages

    def users(self, ioasid: int) -> list[tuple[int, int | None]]:
        return [key for key, stack in self.stacks.items() if ioasid in stack]

    def release(self, rid: int, pasid: int | None, *, every: bool) -> None:
        for (whose, group), of in list(self.waiting.items()):
            if whose == rid and (every or of == pasid):
                del self.waiting[whose, group]

    def physical(self, rid: int, pasid: int | None) -> int | None:
        """The PASID of a request; one that stands for nothing where the guest's has none."""
        if pasid is None:
            return None
        found = self.devices[rid].physical(pasid)
        assert (found is None) <= (rid == SHARED and not self.stacks[rid, pasid])
        return found if found is not None else 0xFFF

    def routed(self, rid: int, pasid: int | None) -> bool:
        own = self.stacks[rid, None]
        return bool(self.stacks[rid, pasid]) or bool(own and self.spaces[own[-1]].bound == "pasids")

    def expected(self, rid: int, pasid: int | None, page: int) -> int | Reason:
        stack, own = self.stacks[rid, pasid], self.stacks[rid, None]
        if pasid is not None and not stack and own and self.spaces[own[-1]].bound == "pasids":
            return self.resolve(own[-1], pasid, page)
        return self.resolve(stack[-1], pasid, page) if stack else Reason.NO_ROUTE

    def resolve(self, ioasid: int, pasid: int | None, page: int) -> int | Reason:
        space = self.spaces[ioasid]
        if space.kind == Kind.VM:
            return self.vm.get(page, Reason.NOT_PRESENT)
        if space.kind == Kind.KERNEL:
            found = space.maps.get(page)
            if found is None or space.parent is None:
                return Reason.NOT_PRESENT if found is None else found
            return self.resolve(space.parent, None, found)
        if not space.bound:
            return Reason.NOT_BOUND
        if space.bound == "pasids" and pasid != 1:
            return Reason.BLOCKED if pasid is None else Reason.NOT_PRESENT
        assert space.parent is not None
        return self.resolve(space.parent, None, IOVAS - 1 - page)

    def tracked_beneath(self, ioasid: int) -> bool:
        children = [(each, space) for each, space in self.spaces.items() if space.parent == ioasid]
        return any(space.dirty is not None or self.tracked_beneath(each) for each, space in children)

    def host_of(self, rid: int, pasid: int | None, page: int) -> tuple[Model, int]:
        """The host-managed IOASID whose table a request ends in, and the page there."""
        stack = self.stacks[rid, pasid] or self.stacks[rid, None]
        space = self.spaces[stack[-1]]
        while space.kind == Kind.USER:
            assert space.parent is not None
            space, page = self.spaces[space.parent], IOVAS - 1 - page
        return space, page


TestWholeSet = WholeSet.TestCase
TestWholeSet.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
