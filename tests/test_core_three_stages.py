"""A guest's table over another one of the guest's over ours: against the reference's walkers, one upon the other."""

from __future__ import annotations

import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from core_formats import STAGE2, Ram, core_access, core_format, core_reason, permitted
from reference import cases, nested
from reference import common as ref
from reference.formats import FIRST_STAGES, SECOND_STAGES, Variant
from reference.nested_cases import HOST_BYTES, NestedCase, lift

from backend.core import RW, Access, Core, Fault, Translation

MIDDLE, TOP, RID = 2, 3, 0x0108
PAGE = 4096
TOPS, MIDDLES = (
    [each for each in stages if each.name != "amd-v1-4-readonly"] for stages in (FIRST_STAGES, SECOND_STAGES)
)
"""Without what a route says, not a table: the device table entry's IR and IW."""
SEED = int(os.environ.get("VIO_SEED", "0"))
SCALE = float(os.environ.get("VIO_CASES", "1"))


@dataclass
class HostList:
    """Ours, as it was asked for: (first GPA, its end, what is permitted) of pages that lie at the same offset of RAM.

    Leaves are 4 KiB: RAM begins a page beyond what larger ones would have to be aligned to.
    """

    extents: list[tuple[int, int, Access]] = field(default_factory=list)

    def walk(self, memory: Any, config: Any, address: int, access: ref.Access) -> ref.Result | ref.Fault:
        del memory, config
        for first, end, rights in self.extents:
            if first <= address < end:
                write = bool(rights & Access.WRITE)
                if access.kind is ref.Kind.WRITE and not write:
                    return ref.Fault(ref.Reason.PERMISSION, 1)
                return ref.Result(address, PAGE, True, write, True, True)
        reason = ref.Reason.NOT_PRESENT if address < 1 << 48 else ref.Reason.ADDRESS_WIDTH
        return ref.Fault(reason, 1)


class Judge:
    def __init__(self, *, walk_caches: bool) -> None:
        self.memory = Ram(HOST_BYTES + PAGE, 2 << 20)
        self.hva = self.memory.hva + PAGE
        self.core = Core(iotlb_entries=0, walk_caches=walk_caches)
        self.seen: Counter[str] = Counter()
        self.ran: set[str] = set()

    def close(self) -> None:
        self.core.close()
        self.memory.close()

    def word(self, address: int) -> int:
        return self.memory.words[address + PAGE >> 3]

    def put(self, address: int, word: int) -> None:
        self.memory.words[address + PAGE >> 3] = word

    def judge(self, case: NestedCase, host: HostList, name: str) -> None:
        both = nested.under(case.second, nested.Stage(host.walk, None))
        top, middle, words = case.first.config, case.second.config, dict(case.memory.words)
        core = self.core
        core.create_host_space(STAGE2)
        for first, end, rights in host.extents:
            core.map(STAGE2, first, self.hva + first, end - first, rights)
        for ioasid, config in ((MIDDLE, middle), (TOP, top)):
            core.create_nested_space(ioasid, ioasid - 1)
            made, root = core_format(config)
            core.bind_table(ioasid, fmt=made, root=root)
        core.attach(RID, None, TOP)
        for address, word in words.items():
            self.put(address, word)
        try:
            for iova, access in case.accesses:
                answer = nested.walk(case.memory, case.first, both, iova, access)
                self.one(iova, access, answer, words, f"{name}\n{top}\n{middle}\n{host}\n{iova:#x} {access}")
        finally:
            for address in words:
                self.put(address, 0)
            core.detach(RID, None)
            for ioasid in (TOP, MIDDLE, STAGE2):
                core.destroy_space(ioasid)

    def one(self, iova: int, access: ref.Access, answer: Any, words: dict[int, int], name: str) -> None:
        self.core.invalidate_all()
        told = self.core.lookup(RID, iova, access=core_access(access)).result
        got = self.core.translate(RID, iova, core_access(access))
        failed = isinstance(answer, nested.NestedFault)
        updates = {each.address: each for each in (answer.may_update if failed else answer.updates)}
        used = 0
        for each in updates.values():
            used |= each.set | each.clear
        if isinstance(got, Fault) and isinstance(told, Fault):
            # What was read once more after its own accessed bit had been set.
            got, told = (replace(each, entry=each.entry & ~used) for each in (got, told))
        assert got == told, f"{name}: LOOKUP tells {told}"
        for address in {*words, *updates}:
            before, now = words.get(address, 0), self.word(address)
            update = updates.get(address, ref.Update(address, 0))
            after = (before | update.set) & ~update.clear
            assert now == after or (failed and not (now ^ before) & ~(update.set | update.clear)), (
                f"{name}: {address:#x} was {before:#x}, must be {after:#x} and is {now:#x}"
            )
        for address in updates:
            self.put(address, words.get(address, 0))
        if isinstance(answer, nested.NestedResult):
            self.seen["found"] += 1
            size = answer.size
            assert isinstance(got, Translation), f"{name}: {got}, not {answer}"
            expected = (self.hva + answer.output, size - iova % size, permitted(answer))
            assert (got.hva, got.size, got.access) == expected, f"{name}: {got}, not {answer}"
            assert got.gpa == got.hva - self.hva
            return
        assert isinstance(got, Fault), f"{name}: {got}, not {answer}"
        stage, inner = answer.stage, answer.inner
        if inner is None:  # of the table on top
            assert stage == 1
            assert (got.stage, got.middle, got.level, got.reason) == (
                1, None, answer.level, core_reason(answer.reason),
            ), f"{name}: {got}, not {answer}"  # fmt: skip
            assert (got.gpa or 0, got.entry) == (answer.gpa or 0, (answer.entry or 0) & ~used), (
                f"{name}: {got}, not {answer}"
            )
            self.seen[f"top {answer.reason.name}"] += 1
            return
        assert (got.stage, got.middle, got.reason) == (inner.stage, answer.gpa, core_reason(inner.reason)), (
            f"{name}: {got}, not {answer}"
        )
        assert got.gpa == inner.gpa or (inner.gpa is None and got.gpa is None), f"{name}: {got}, not {answer}"
        assert got.table == (answer.implicit or inner.implicit), f"{name}: {got}, not {answer}"
        if inner.stage == 1:
            assert (got.level, got.entry) == (inner.level, (inner.entry or 0) & ~used), f"{name}: {got}, not {answer}"
        self.seen[f"{'middle' if inner.stage == 1 else 'host'} {inner.reason.name}"] += 1


def host_of(words: dict[int, int], chance: random.Random) -> HostList:
    """All of memory; or with some pages that hold tables missing or read-only."""
    if chance.random() < 0.5:
        return HostList([(0, HOST_BYTES, RW)])
    pages = sorted({address & -PAGE for address in words})
    spoilt = sorted(chance.sample(pages, min(3, len(pages))))
    extents, at = [], 0
    for page in spoilt:
        if page > at:
            extents.append((at, page, RW))
        if chance.random() < 0.6:
            extents.append((page, page + PAGE, Access.READ))
        at = page + PAGE
    return HostList([*extents, (at, HOST_BYTES, RW)])


def three(first: Variant, second: Variant, chance: random.Random) -> Iterator[tuple[NestedCase, str]]:
    """Valid and hostile tables on top, each over a random table in the middle; and hostile ones in the middle."""
    limit = cases.MEMORY_BYTES
    yield lift(cases.valid(first, chance, count=16, output_limit=limit), second, chance), "valid"
    yield lift(cases.garbage(first, chance, count=16, output_limit=limit), second, chance), "garbage"
    for generator in (cases.cycles, cases.beyond, cases.leaf_levels):
        found = list(generator(first, chance))
        yield lift(chance.choice(found), second, chance), generator.__name__
    broken = lift(cases.valid(first, chance, count=16, output_limit=limit), second, chance)
    memory = broken.memory.copy()
    tables = [address for address in memory.words if address < 64 << 20]
    for address in chance.sample(tables, min(4, len(tables))):
        memory.words[address] ^= 1 << chance.randrange(64)
    yield replace(broken, memory=memory), "broken middle"


@pytest.fixture(scope="module", params=[True, False], ids=["caches", "no-caches"])
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    made = Judge(walk_caches=request.param)
    yield made
    assert not any(made.memory.words), "the core wrote where no entry was"
    made.close()


@pytest.mark.parametrize("first", TOPS, ids=lambda variant: variant.name)
def test_three_stages(judge: Judge, first: Variant) -> None:
    judge.ran.add(first.name)
    chance = random.Random(zlib.crc32(first.name.encode()) + SEED)
    for _ in range(max(1, round(2 * SCALE))):
        second = chance.choice(MIDDLES)
        for case, kind in three(first, second, chance):
            judge.judge(case, host_of(case.memory.words, chance), f"{kind} {case.kind}")


def test_enough_was_compared(judge: Judge) -> None:
    """Of what the tests above have compared: some of each kind."""
    if len(judge.ran) != len(TOPS):
        pytest.skip("only part of the suite was asked for: run all of tests/test_core_three_stages.py")
    kinds = ("found", "top NOT_PRESENT", "top PERMISSION", "middle NOT_PRESENT", "middle PERMISSION",
             "middle RESERVED_BITS", "host NOT_PRESENT", "host PERMISSION")  # fmt: skip
    assert min(judge.seen[kind] for kind in kinds) >= 10, judge.seen
