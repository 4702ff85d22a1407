"""PASID tables: what the core finds in them, against the reference's look-ups; caching, invalidation, routes."""

from __future__ import annotations

import os
import random
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from core_guest import Ram
from reference import amd_gcr3, arm_cd, arm_lpae, common, riscv, riscv_pdt, vtd_pasid, vtd_second_stage, x86
from reference.memory import Memory, Region

from backend.core import (
    ANY_PASID,
    RW,
    Access,
    AmdGcr3,
    ArmCd,
    BadValueError,
    Core,
    Fault,
    KindError,
    PasidFormat,
    Reason,
    RiscVPdt,
    Translation,
    UnknownIdError,
    VtdPasid,
)

PAGE = 4096
SIZE = 0x90000
STAGE2, DEVICE_SPACE, RID = 1, 2, 0x10
IOVA = 0x7654_3000
PASIDS = (0, 1, 5, 63, 64, 200)

TREES: dict[str, Callable[[Memory, Region], Any]] = {
    "x86": x86.Builder,
    "second": lambda memory, region: vtd_second_stage.Builder(memory, region, levels=4),
    "arm": lambda memory, region: arm_lpae.Builder(memory, region, granule=12, input_bits=39),
    "riscv": lambda memory, region: riscv.Builder(memory, region, levels=3),
}


@dataclass
class Kind(ABC):
    """One kind of PASID table in one shape.

    `expect`: the stage-1 walk of a PASID as (walk, configuration), None for no stage 1, or the fault; and whether
    privileged requests are let in.
    """

    name: str
    bind: dict[str, Any]
    memory: Memory
    config: Any
    tables: list[int]
    """Addresses of words that lead somewhere: of PASID tables, and of the page tables below."""

    @abstractmethod
    def lookup(self, memory: Memory, pasid: int) -> tuple[Any, bool] | common.Fault:
        """The reference's answer."""


class Gcr3Kind(Kind):
    def lookup(self, memory: Memory, pasid: int) -> tuple[Any, bool] | common.Fault:
        root = amd_gcr3.lookup(memory, self.config, pasid)
        if isinstance(root, common.Fault):
            return root
        return (x86.walk, x86.Config(root, 4, sign_extended=pasid != 0)), True


class VtdKind(Kind):
    def lookup(self, memory: Memory, pasid: int) -> tuple[Any, bool] | common.Fault:
        found = vtd_pasid.lookup(memory, self.config, pasid)
        directory = memory.read64(self.config.directory + 8 * (pasid >> 6)) or 0
        at = (directory >> 12 << 12) + 64 * (pasid & 63)
        at_table = (isinstance(found, common.Fault) and found.reason == common.Reason.BAD_LEVEL) or isinstance(
            found, vtd_pasid.Entry
        )
        low = (memory.read64(at) or 0) if at_table else 0
        if low >> 6 & 7 == 3:  # nested by the guest: stage 2 is not its own
            return common.Fault(common.Reason.RESERVED_BITS, 1, at, low)
        if isinstance(found, common.Fault):
            return found
        if found.first:
            return (x86.walk, found.first), found.supervisor_requests
        if found.second:
            return (vtd_second_stage.walk, found.second), found.supervisor_requests
        return None, found.supervisor_requests


class CdKind(Kind):
    def lookup(self, memory: Memory, pasid: int) -> tuple[Any, bool] | common.Fault:
        found = arm_cd.lookup(memory, self.config, pasid)
        return found if isinstance(found, common.Fault) else ((arm_lpae.walk_stage1, found.stage1), True)


class PdtKind(Kind):
    def lookup(self, memory: Memory, pasid: int) -> tuple[Any, bool] | common.Fault:
        found = riscv_pdt.lookup(memory, self.config, pasid)
        if isinstance(found, common.Fault):
            return found
        return ((riscv.walk, found.stage1) if found.stage1 else None), found.supervisor


def tree(memory: Memory, region: Region, name: str, number: int) -> Any:
    """A tree that leads IOVA to a page of its own."""
    made = TREES[name](memory, region)
    made.map(IOVA, 0x80000 + number * PAGE, PAGE)
    return made


def kind_of(name: str) -> Kind:
    memory, region = Memory(SIZE), Region(0x1000, 0x70000)
    trees = [tree(memory, region, {"gcr3": "x86", "vtd": "x86", "cd": "arm", "pdt": "riscv"}[name.partition("-")[0]], i)
             for i in range(len(PASIDS))]  # fmt: skip
    bind: dict[str, Any]
    builder: Any
    match name.split("-"):
        case ["gcr3", levels]:
            builder = amd_gcr3.Builder(memory, region, int(levels))
            for pasid, one in zip(PASIDS, trees, strict=True):
                builder.set(pasid, one.root)
            bind = {"fmt": AmdGcr3(levels=int(levels)), "root": builder.root}
            made: Kind = Gcr3Kind(name, bind, memory, builder.config(), [])
        case ["vtd", pdts]:
            builder = vtd_pasid.Builder(memory, region, int(pdts))
            for number, (pasid, one) in enumerate(zip(PASIDS, trees, strict=True)):
                second = tree(memory, region, "second", 20)
                match number:
                    case 1:
                        builder.set(pasid, domain=1, second=(second.root, 4))
                    case 2:
                        builder.set(pasid, domain=1)
                    case 3:
                        builder.set(pasid, domain=1, first=(one.root, 4), second=(second.root, 4))
                    case _:
                        builder.set(pasid, domain=1, first=(one.root, 4), write_protect=number != 4)
            bind = {"fmt": VtdPasid(pasid_bits=min(int(pdts) + 13, 20)), "root": builder.directory}
            made = VtdKind(name, bind, memory, builder.config(), [])
        case ["cd", split, max_bits]:
            builder = arm_cd.Builder(memory, region, int(split), int(max_bits))
            for pasid, one in zip(PASIDS, trees, strict=True):
                if pasid >> int(max_bits) == 0:
                    builder.set(pasid, asid=pasid, root=one.root, t0sz=25)
            leaf = {0: None, 6: 4096, 10: 65536}[int(split)]
            bind = {"fmt": ArmCd(pasid_bits=int(max_bits), leaf=leaf, output_bits=52), "root": builder.root}
            made = CdKind(name, bind, memory, builder.config(), [])
        case ["pdt", levels, *hardware]:
            builder = riscv_pdt.Builder(memory, region, int(levels))
            for number, (pasid, one) in enumerate(zip(PASIDS, trees, strict=True)):
                builder.set(pasid, pscid=1, root=one.root, mode=0 if number == 3 else 8, flags=(1, 3, 7)[number % 3])
            bind = {"fmt": RiscVPdt(levels=int(levels), accessed_dirty=bool(hardware)), "root": builder.root}
            made = PdtKind(name, bind, memory, builder.config(hardware_ad=bool(hardware)), [])
        case _:
            raise ValueError(name)
    made.tables = sorted(memory.words)
    return made


KINDS = (
    "gcr3-1", "gcr3-2", "gcr3-3", "vtd-0", "vtd-5", "cd-0-0", "cd-0-8", "cd-6-9", "cd-10-12", "pdt-1", "pdt-2-hw",
    "pdt-3",
)  # fmt: skip


class Guest:
    """Guest memory at GPA 0, and a nested space for all PASIDs of one device."""

    def __init__(self) -> None:
        self.ram = Ram(SIZE)
        self.memory = Memory(SIZE)
        """What guest memory holds, as the test laid it."""
        self.core = Core(iotlb_entries=64)
        self.core.create_host_space(STAGE2, levels=6)  # all of 64 bits, so that what lies beyond memory is not present
        self.core.map(STAGE2, 0, self.ram.hva, SIZE, RW)
        self.core.create_nested_space(DEVICE_SPACE, STAGE2)
        self.core.attach(RID, ANY_PASID, DEVICE_SPACE)

    def load(self, memory: Memory) -> None:
        words = bytearray(SIZE)
        for at, word in memory.words.items():
            struct.pack_into("<Q", words, at, word)
        self.ram.write(0, bytes(words))
        self.memory = memory

    def put(self, at: int, word: int) -> None:
        self.ram.write(at, struct.pack("<Q", word))

    def close(self) -> None:
        self.core.close()
        self.ram.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def stage_fault(fault: common.Fault, *, pasid_table: bool) -> dict[str, Any]:
    if fault.reason == common.Reason.TABLE_ACCESS:
        return {"stage": 2, "gpa": fault.address, "reason": Reason.NOT_PRESENT, "pasid_table": pasid_table}
    return {
        "stage": 1,
        "level": fault.level,
        "gpa": fault.address,
        "entry": fault.entry or 0,
        "reason": Reason[fault.reason.name],
        "pasid_table": pasid_table,
    }


def expected(kind: Kind, memory: Memory, pasid: int, iova: int, access: Access) -> int | dict[str, Any]:
    """The GPA, or the fields of the fault."""
    found = kind.lookup(memory, pasid)
    if isinstance(found, common.Fault):
        return stage_fault(found, pasid_table=True)
    walk, privileged_ok = found
    privileged = bool(access & Access.PRIVILEGED)
    if privileged and not privileged_ok:
        return {"stage": 1, "level": 0, "gpa": None, "reason": Reason.PERMISSION, "pasid_table": True}
    gpa = iova
    if walk is not None:
        asked = common.Kind.WRITE if access & Access.WRITE else common.Kind.READ
        answer = walk[0](memory, walk[1], iova, common.Access(asked, privileged))
        if isinstance(answer, common.Fault):
            return stage_fault(answer, pasid_table=False)
        gpa = answer.output
    if gpa >= SIZE:
        return {"stage": 2, "gpa": gpa, "reason": Reason.NOT_PRESENT, "pasid_table": False}
    return gpa


def check(guest: Guest, kind: Kind, pasid: int, iova: int, access: Access) -> Translation | Fault:
    answer = guest.core.translate(RID, iova, access, pasid=pasid)
    want = expected(kind, guest.memory, pasid, iova, access)
    told = f"{kind.name} PASID {pasid} IOVA {iova:#x} {access!r}"
    if isinstance(want, int):
        assert isinstance(answer, Translation), f"{told}: {answer}, not GPA {want:#x}"
        assert (answer.gpa, answer.hva) == (want, guest.ram.hva + want), told
    else:
        assert isinstance(answer, Fault), f"{told}: {answer}, not {want}"
        assert {name: getattr(answer, name) for name in want} == want, told
        assert (answer.rid, answer.pasid, answer.ioasid, answer.iova) == (RID, pasid, DEVICE_SPACE, iova)
    return answer


def some_access(chance: random.Random) -> Access:
    access = chance.choice((Access.READ, Access.READ, Access.WRITE))
    return access | Access.PRIVILEGED if chance.random() < 0.3 else access


def some_pasid(chance: random.Random) -> int:
    return chance.choice(PASIDS) if chance.random() < 0.9 else chance.choice((2, 255, 256, 511, 8192, (1 << 20) - 1))


@pytest.mark.parametrize("name", KINDS)
def test_every_pasid_leads_to_its_own_table(guest: Guest, name: str) -> None:
    kind = kind_of(name)
    guest.load(kind.memory)
    guest.core.bind_pasid_table(DEVICE_SPACE, **kind.bind)
    chance = random.Random(1)
    for _ in range(3):  # also from what was kept
        for pasid in (*PASIDS, 2, 255, 256, 511, 512, 1 << 17, (1 << 20) - 1):
            for iova in (IOVA, IOVA + PAGE, 0x80000, 1 << 62):
                check(guest, kind, pasid, iova, some_access(chance))


@pytest.mark.parametrize("name", KINDS)
def test_hostile_contents(guest: Guest, name: str) -> None:
    """Every single-bit flip of a word that leads somewhere, garbage, pointers in circles and beyond memory."""
    kind = kind_of(name)
    core, chance = guest.core, random.Random(name)
    guest.load(kind.memory)
    core.bind_pasid_table(DEVICE_SPACE, **kind.bind)
    changes = [(at, kind.memory.words[at] ^ 1 << bit) for at in kind.tables for bit in range(64)]
    changes = chance.sample(changes, min(len(changes), 600))
    changes += [
        (at, chance.choice((chance.getrandbits(64), 0, chance.choice(kind.tables) | 1, SIZE | 1, (1 << 64) - 1)))
        for at in (chance.choice(kind.tables) & ~63 | chance.randrange(0, 64, 8) for _ in range(250))
    ]
    for at, word in changes:
        memory = kind.memory.copy()
        memory.write64(at, word)
        guest.load(memory)
        core.invalidate(DEVICE_SPACE)
        for _ in range(3):
            iova = IOVA if chance.random() < 0.9 else chance.choice((IOVA ^ 1 << chance.randrange(12, 64), 0x3000))
            pasid, access = some_pasid(chance), some_access(chance)
            looked_up = core.lookup(RID, iova, pasid=pasid, access=access)
            assert check(guest, kind, pasid, iova, access) == looked_up.result
            guest.load(memory)  # without the accessed and dirty bits that were set
        guest.load(kind.memory)


def test_what_was_found_is_kept_until_it_is_invalidated(guest: Guest) -> None:
    kind = kind_of("gcr3-2")
    core = guest.core
    guest.load(kind.memory)
    core.bind_pasid_table(DEVICE_SPACE, **kind.bind)
    first, second = (0x80000 + i * PAGE for i in (1, 2))
    builder_slot = next(at for at in kind.tables if kind.memory.words[at] == x86_root(kind, 1) | 1)

    def gpa(pasid: int) -> int | Reason:
        answer = core.translate(RID, IOVA, Access.READ, pasid=pasid)
        return answer.reason if isinstance(answer, Fault) else answer.gpa

    assert (gpa(1), gpa(5)) == (first, second)
    guest.put(builder_slot, x86_root(kind, 2) | 1)
    assert gpa(1) == first, "kept"
    core.invalidate(DEVICE_SPACE, pasid=5)
    core.invalidate(DEVICE_SPACE, IOVA, PAGE, pasid=1)
    walks = core.counters().walks
    assert gpa(1) == first, "the page alone was invalidated, not what the PASID table said"
    assert core.counters().walks == walks + 1
    core.invalidate(DEVICE_SPACE, pasid=1)
    assert gpa(1) == second
    forgets: tuple[Callable[[], None], ...] = (
        lambda: core.invalidate(DEVICE_SPACE),
        core.invalidate_all,
        lambda: core.invalidate_device(RID),
        lambda: core.unmap(STAGE2, SIZE - PAGE, PAGE),
        lambda: core.bind_pasid_table(DEVICE_SPACE, **kind.bind),
    )
    for forget in forgets:
        guest.put(builder_slot, x86_root(kind, 1) | 1)
        core.invalidate(DEVICE_SPACE)
        assert gpa(1) == first
        guest.put(builder_slot, 0)
        assert gpa(1) == first
        forget()
        assert gpa(1) == Reason.NOT_PRESENT
        assert gpa(5) == second
    core.unbind_table(DEVICE_SPACE)
    assert gpa(5) == Reason.NOT_BOUND


def x86_root(kind: Kind, number: int) -> int:
    found = amd_gcr3.lookup(kind.memory, kind.config, PASIDS[number])
    assert isinstance(found, int)
    return found


def test_an_invalidation_of_one_pasid_leaves_the_others(guest: Guest) -> None:
    kind = kind_of("gcr3-1")
    core = guest.core
    guest.load(kind.memory)
    core.bind_pasid_table(DEVICE_SPACE, **kind.bind)
    for pasid in PASIDS:
        assert isinstance(core.translate(RID, IOVA, Access.READ, pasid=pasid), Translation)
    core.invalidate(DEVICE_SPACE, pasid=5)
    hits = core.counters().iotlb_hits
    for pasid in PASIDS:
        assert isinstance(core.translate(RID, IOVA, Access.READ, pasid=pasid), Translation)
    assert core.counters().iotlb_hits == hits + len(PASIDS) - 1


def test_routes(guest: Guest) -> None:
    """A PASID's own route goes before that of any PASID; requests without one have a PASID of the table's, or none."""
    kind = kind_of("gcr3-1")
    core = guest.core
    guest.load(kind.memory)
    core.bind_pasid_table(DEVICE_SPACE, **kind.bind)

    def answer(pasid: int | None) -> tuple[int, int] | Reason:
        found = core.translate(RID, IOVA if pasid != 63 else 0x3000, Access.READ, pasid=pasid)
        return found.reason if isinstance(found, Fault) else (found.gpa, found.size)

    assert answer(None) == Reason.NO_ROUTE
    assert answer(5) == (0x80000 + 2 * PAGE, PAGE)
    core.attach(RID, 63, STAGE2)
    assert answer(63) == (0x3000, PAGE)
    core.block(RID, 5)
    assert answer(5) == Reason.BLOCKED
    core.detach(RID, 5)
    assert answer(5) == (0x80000 + 2 * PAGE, PAGE)
    core.attach(RID, None, DEVICE_SPACE)
    assert answer(None) == Reason.BLOCKED
    core.bind_pasid_table(DEVICE_SPACE, **kind.bind, default_pasid=1)
    assert answer(None) == (0x80000 + PAGE, PAGE)
    assert core.route_counters(RID, ANY_PASID).nested == 2
    assert core.space_counters(DEVICE_SPACE).requests == 4
    core.detach(RID, ANY_PASID)
    assert answer(5) == Reason.NO_ROUTE


def test_options_that_cannot_be(guest: Guest) -> None:
    core = guest.core
    with pytest.raises(UnknownIdError):
        core.bind_pasid_table(77, fmt=AmdGcr3(), root=0)
    with pytest.raises(KindError):
        core.bind_pasid_table(STAGE2, fmt=AmdGcr3(), root=0)
    with pytest.raises(KindError):
        core.invalidate(DEVICE_SPACE, pasid=1)
    bad: tuple[tuple[PasidFormat, int], ...] = (
        (AmdGcr3(levels=4), 0), (AmdGcr3(levels=0), 0), (AmdGcr3(), 8), (AmdGcr3(table_levels=6), 0),
        (AmdGcr3(levels=-1), 0), (VtdPasid(pasid_bits=12), 0), (VtdPasid(pasid_bits=21), 0), (VtdPasid(), 64),
        (VtdPasid(output_bits=46), 1 << 46), (ArmCd(), 32), (ArmCd(leaf=8192), 0), (ArmCd(leaf=-1), 0),
        (ArmCd(pasid_bits=21), 0), (ArmCd(output_bits=53), 0), (RiscVPdt(levels=4), 0), (RiscVPdt(), 1 << 60),
        (RiscVPdt(), 1 << 64),
    )  # fmt: skip
    for fmt, root in bad:
        with pytest.raises(BadValueError):
            core.bind_pasid_table(DEVICE_SPACE, fmt=fmt, root=root)
    with pytest.raises(BadValueError):
        core.bind_pasid_table(DEVICE_SPACE, fmt=AmdGcr3(), root=0, default_pasid=1 << 20)


def test_memory_that_goes_away_under_the_pasid_table() -> None:
    guest, ram = Guest(), Ram(16 * PAGE, memfd=True)
    try:
        guest.core.map(STAGE2, 1 << 40, ram.hva, 16 * PAGE, RW)
        guest.core.bind_pasid_table(DEVICE_SPACE, fmt=AmdGcr3(), root=1 << 40)
        os.ftruncate(ram.fd, 0)
        answer = guest.core.translate(RID, 0, Access.READ, pasid=3)
        assert isinstance(answer, Fault)
        assert (answer.reason, answer.stage, answer.level, answer.gpa, answer.pasid_table) == (
            Reason.MEMORY_GONE, 1, 1, (1 << 40) + 24, True,
        )  # fmt: skip
    finally:
        guest.close()
        ram.close()


def test_no_stale_pasid_after_its_invalidation(guest: Guest) -> None:
    """Devices use PASIDs while entries change: after an invalidation has returned nothing of before is used."""
    kind = kind_of("gcr3-1")
    core = guest.core
    guest.load(kind.memory)
    core.bind_pasid_table(DEVICE_SPACE, **kind.bind)
    slots = {pasid: kind.config.root + 8 * pasid for pasid in PASIDS}
    roots = [x86_root(kind, i) for i in range(len(PASIDS))]
    stop, wrong = threading.Event(), list[str]()
    known = set(range(0x80000, 0x80000 + len(PASIDS) * PAGE, PAGE))

    def device(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            answer = core.translate(RID, IOVA, Access.READ, pasid=chance.choice(PASIDS))
            if isinstance(answer, Fault) or answer.gpa not in known:
                wrong.append(str(answer))

    threads = [threading.Thread(target=device, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    chance = random.Random(9)
    for _ in range(1500):
        pasid, number = chance.choice(PASIDS), chance.randrange(len(PASIDS))
        guest.put(slots[pasid], roots[number] | 1)
        core.invalidate(DEVICE_SPACE, pasid=None if chance.random() < 0.1 else pasid)
        answer = core.translate(RID, IOVA, Access.READ, pasid=pasid)
        if isinstance(answer, Fault) or answer.gpa != 0x80000 + number * PAGE:
            wrong.append(f"PASID {pasid}: {answer} after its invalidation")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
