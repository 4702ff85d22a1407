"""The core and the reference side by side: configurations turned from one to the other, tables laid, answers compared.

A single stage is judged over a stage 2 that lets everything through: 16 MiB of memory, and beyond it, up to 2^52, pages
with nothing behind them. The core then says MEMORY_GONE where the reference has no memory (TABLE_ACCESS).
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reference import amd_v1, arm_lpae, ept, nested, riscv, vtd_second_stage, x86
from reference import common as ref
from reference.building import Builder
from reference.common import RWX, Perms
from reference.formats import Variant
from reference.memory import Memory, Region
from reference.nested_cases import HOST_FRAMES, NestedCase

from backend.core import (
    RW,
    X86,
    Access,
    AmdV1,
    ArmStage1,
    ArmStage2,
    ArmTree,
    Core,
    Ept,
    ExecuteDisable,
    Reason,
    RiscV,
    RiscVSecondStage,
    TableFormat,
    Translations,
    VtdSecondStage,
)

STAGE2, CHILD, RID = 1, 2, 0x0108
GIB, GUEST, REACH = 1 << 30, 16 << 20, 1 << 52
MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on
CHUNK = 512 << 30
"""The largest leaf of stage 2 here: larger ones would have to lie at HVA 0."""


def arm_tree(tables: arm_lpae.Tables) -> ArmTree:
    return ArmTree(
        tables.input_bits,
        1 << tables.granule,
        levels=4 - tables.first,
        ignore_top_byte=tables.tbi,
        hierarchical=tables.hierarchical,
        root=tables.root,
    )


def core_format(config: Any) -> tuple[TableFormat, int]:
    """(format, root) of a reference's configuration."""
    c = config
    if isinstance(c, arm_lpae.Stage1):
        lower, upper = (arm_tree(tables) if tables else None for tables in (c.ttbr0, c.ttbr1))
        return ArmStage1(lower, upper, c.pa_bits, c.lpa, c.ha, c.hd, not c.affd), lower.root if lower else 0
    if isinstance(c, arm_lpae.Stage2):
        tree = arm_tree(c.tables)
        return ArmStage2(tree, c.pa_bits, c.lpa, c.ha, c.hd, not c.affd, c.xnx), tree.root
    made: TableFormat
    if isinstance(c, x86.Config):
        xd = ExecuteDisable[c.xd.name]
        made = X86(c.levels, c.sign_extended, c.pa_bits, c.gigabyte_pages, c.write_protect, xd, c.smep)
    elif isinstance(c, vtd_second_stage.Config):
        made = VtdSecondStage(c.levels, c.pa_bits, c.access_dirty, c.large_2m, c.large_1g, c.snoop_control)
    elif isinstance(c, ept.Config):
        modes = c.mode_based_execute
        made = Ept(c.levels, c.pa_bits, c.access_dirty, c.execute_only, modes, c.large_2m, c.large_1g)
    elif isinstance(c, amd_v1.Config):
        made = AmdV1(c.levels, c.accessed, c.dirty)
    elif c.second_stage:
        assert isinstance(c, riscv.Config)
        made = RiscVSecondStage(c.levels, c.hardware_ad, c.svnapot, c.svpbmt, c.svrsw60t59b)
    else:
        made = RiscV(c.levels, c.hardware_ad, c.sum, c.svnapot, c.svpbmt, c.svrsw60t59b)
    root: int = c.root
    return made, root


def core_access(access: ref.Access) -> Access:
    kind = {ref.Kind.READ: Access.READ, ref.Kind.WRITE: Access.WRITE, ref.Kind.EXECUTE: Access.EXECUTE}[access.kind]
    return kind | (Access.PRIVILEGED if access.privileged else Access(0))


def permitted(result: ref.Result | nested.NestedResult) -> int:
    return result.read * Access.READ | result.write * Access.WRITE | result.execute * Access.EXECUTE


class Ram:
    """Anonymous memory at an HVA that is a multiple of its alignment, read and written as 64-bit words."""

    def __init__(self, size: int, align: int) -> None:
        self._map = mmap.mmap(-1, size + align, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._anchor: Any = ctypes.c_char.from_buffer(self._map)
        start = ctypes.addressof(self._anchor)
        self.hva = -(-start // align) * align
        self.words = memoryview(self._map)[self.hva - start :][:size].cast("Q")

    def close(self) -> None:
        self.words.release()
        self._anchor = None
        self._map.close()


class Void:
    """Addresses of this process with nothing behind them: reserved, and not to be touched."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        )
        self._unmap = library.munmap
        self._unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.size = 2 * size
        self.start: int = library.mmap(None, self.size, 0, flags, -1, 0)  # mmap.mmap would ask for memory
        assert self.start != ctypes.c_void_p(-1).value
        self.hva = -(-self.start // size) * size

    def close(self) -> None:
        self._unmap(self.start, self.size)


class Judge:
    """One core, and what it answered compared with what was expected of it."""

    def __init__(self, ram: Ram, *, walk_caches: bool, seen: Counter[str]) -> None:
        self.ram = ram
        self.core = Core(iotlb_entries=0, walk_caches=walk_caches)
        self.seen = seen

    def close(self) -> None:
        self.core.close()

    def attach(self, config: Any) -> Access:
        """Bind a table; what the route permits, AMD's IR and IW being there."""
        made, root = core_format(config)
        self.core.bind_table(CHILD, fmt=made, root=root)
        rights = RW
        if isinstance(config, amd_v1.Config):
            rights = Access(config.read * Access.READ | config.write * Access.WRITE)
        self.core.attach(RID, None, CHILD, access=rights)
        return rights

    def lay(self, words: dict[int, int], first: int = 0) -> None:
        for address, word in words.items():
            if address >= first:
                self.ram.words[address >> 3] = word

    def clear(self, words: Iterable[int], first: int = 0) -> None:
        for address in words:
            if address >= first:
                self.ram.words[address >> 3] = 0

    def ask(self, accesses: Sequence[tuple[int, ref.Access]]) -> list[tuple[Translations, int]]:
        """The core's answers in order: (columns, index into them); one call for each kind of access."""
        kinds: dict[Access, list[int]] = {}
        for number, (_, access) in enumerate(accesses):
            kinds.setdefault(core_access(access), []).append(number)
        answers: dict[int, tuple[Translations, int]] = {}
        for kind, numbers in kinds.items():
            found = self.core.translate_many(RID, array("Q", [accesses[number][0] for number in numbers]), kind)
            answers.update((number, (found, place)) for place, number in enumerate(numbers))
        return [answers[number] for number in range(len(accesses))]


@dataclass(frozen=True)
class Changes:
    """What a walk, or several, must and may have done to entries: address -> (set, clear)."""

    must: dict[int, tuple[int, int]]
    may: dict[int, tuple[int, int]]

    def add(self, answer: ref.Result | ref.Fault | nested.NestedResult | nested.NestedFault) -> None:
        failed = isinstance(answer, ref.Fault | nested.NestedFault)
        updates = answer.may_update if isinstance(answer, ref.Fault | nested.NestedFault) else answer.updates
        into = self.may if failed else self.must
        for update in updates:
            old = into.get(update.address, (0, 0))
            into[update.address] = (old[0] | update.set, old[1] | update.clear)

    def bits(self, address: int) -> int:
        """Bits of the entry at `address` that have changed, perhaps."""
        must, may = self.must.get(address, (0, 0)), self.may.get(address, (0, 0))
        return must[0] | must[1] | may[0] | may[1]

    def check(self, ram: Ram, words: dict[int, int], first: int = 0) -> str:
        """Why memory is not what it must be; empty if it is."""
        for address in {*words, *self.must, *self.may}:
            if address < first:
                continue
            before, now = words.get(address, 0), ram.words[address >> 3]
            if before == now and address not in self.must:
                continue
            must_set, must_clear = self.must.get(address, (0, 0))
            may_set, may_clear = self.may.get(address, (0, 0))
            least = (before | must_set) & ~must_clear
            most = must_set | must_clear | may_set | may_clear
            if (before ^ now) & ~most or (now ^ least) & (must_set | must_clear):
                return f"entry at {address:#x}: {before:#x} became {now:#x}, not {least:#x}"
        return ""


def core_reason(reason: ref.Reason) -> Reason:
    return Reason.MEMORY_GONE if reason is ref.Reason.TABLE_ACCESS else Reason[reason.name]


def told(found: Translations, i: int) -> dict[str, Any]:
    """One answer in words, for a message."""
    columns = ("hva", "gpa", "size", "fault_gpa", "entry", "access", "reason", "stage", "level", "table")
    return {name: hex(getattr(found, name)[i]) for name in columns if getattr(found, name)[i]}


class Single(Judge):
    """One stage, over a stage 2 that lets everything through."""

    def __init__(self, ram: Ram, void: Void, *, walk_caches: bool, seen: Counter[str]) -> None:
        super().__init__(ram, walk_caches=walk_caches, seen=seen)
        self.void = void
        core = self.core
        core.create_host_space(STAGE2, fmt="amd-v1", levels=6)
        core.map(STAGE2, 0, ram.hva, GUEST, RW)
        core.map(STAGE2, GUEST, void.hva + GUEST, CHUNK - GUEST, RW)
        for gpa in range(CHUNK, REACH, CHUNK):
            core.map(STAGE2, gpa, void.hva, CHUNK, RW)
        core.create_nested_space(CHILD, STAGE2)

    def expected(self, answer: ref.Result | ref.Fault, iova: int) -> tuple[tuple[int, ...], str]:
        """(hva, gpa, size, access, reason, stage, level, fault gpa, entry, table) and a name; level -1: any."""
        if isinstance(answer, ref.Result):
            gpa, size = answer.output, answer.size
            if gpa >= REACH:
                return (0, 0, 0, 0, Reason.NOT_PRESENT, 2, -1, gpa, -1, 0), "beyond stage 2"
            stage2 = (2 << 20) if gpa < GIB else GIB if gpa < CHUNK else CHUNK
            size = min(size, stage2)
            hva = (self.ram.hva if gpa < GUEST else self.void.hva) + gpa % CHUNK
            return (hva, gpa, size - iova % size, permitted(answer), 0, 0, 0, 0, 0, 0), "found"
        address, entry = answer.address or 0, answer.entry or 0
        if answer.reason is ref.Reason.TABLE_ACCESS:
            if address >= REACH:
                return (0, 0, 0, 0, Reason.NOT_PRESENT, 2, -1, address, -1, 1), "TABLE_ACCESS"
            return (0, 0, 0, 0, Reason.MEMORY_GONE, 1, answer.level, address, 0, 1), "TABLE_ACCESS"
        reason = core_reason(answer.reason)
        return (0, 0, 0, 0, reason, 1, answer.level, address, entry, 0), answer.reason.name

    def judge(
        self,
        name: str,
        memory: Memory,
        config: Any,
        accesses: Sequence[tuple[int, ref.Access]],
        answers: Sequence[ref.Result | ref.Fault],
    ) -> None:
        """Lay a table, translate all, compare answers and memory."""
        rights = self.attach(config)
        self.lay(memory.words)
        try:
            changes = Changes({}, {})
            for answer in answers:
                changes.add(answer)
            for (iova, access), (found, i), answer in zip(accesses, self.ask(accesses), answers, strict=True):
                expected, said = self.expected(answer, iova)
                if access.kind is ref.Kind.WRITE and not rights & Access.WRITE:
                    expected, said = (0, 0, 0, 0, Reason.PERMISSION, 0, 0, 0, 0, 0), "the route"
                changed = changes.bits(expected[7])
                compare(found, i, expected, changed, lambda: f"{name}: {config}\nIOVA {iova:#x} {access}: {answer}")  # noqa: B023
                self.seen[said] += 1
            wrong = changes.check(self.ram, memory.words)
            assert not wrong, f"{name}: {config}\n{wrong}"
        finally:
            self.clear({*memory.words, *changes.must, *changes.may})


def compare(found: Translations, i: int, expected: tuple[int, ...], changed: int, what: Callable[[], str]) -> None:
    """One answer with what it must be: -1 in stage 2's level and entry, which the core's own table decides.

    changed: bits of the entry at fault that accesses answered together with this one may have set before.
    """
    f = found
    got = (
        f.hva[i], f.gpa[i], f.size[i], f.access[i], f.reason[i], f.stage[i], f.level[i], f.fault_gpa[i],
        f.entry[i] & ~changed if expected[8] else f.entry[i], f.table[i],
    )  # fmt: skip
    if got == expected:
        return
    expected = (*expected[:8], expected[8] & ~changed if expected[8] > 0 else expected[8], expected[9])
    if any(a != b for a, b in zip(got, expected, strict=True) if b != -1):
        raise AssertionError(f"{what()}\nexpected {[hex(number) for number in expected]}\nthe core: {told(f, i)}")


def host_format(made: TableFormat) -> TableFormat:
    """The same geometry without options: tables of the core's own have none."""
    match made:
        case ArmStage1():
            return ArmStage1(made.lower)
        case ArmStage2():
            return ArmStage2(made.tree)
        case _:
            return type(made)(levels=made.levels)  # type: ignore[attr-defined, call-arg]


@dataclass
class Host:
    """A second stage of the reference whose mappings are written down, for the core to make them too.

    What can be read can be executed, and leaves have their levels' sizes: so the core builds its own tables.
    """

    variant: Variant
    maps: list[tuple[int, int, int, Access]]
    config: Any = None

    @classmethod
    def of(cls, variant: Variant) -> Host:
        host = cls(variant, [])

        def make(memory: Memory, region: Region) -> Builder:
            builder = variant.make(memory, region)
            builder.sizes = tuple(1 << builder.shift(builder.level_of(size)) for size in builder.sizes)
            builder.sizes = tuple(sorted(set(builder.sizes), reverse=True))
            lay = builder.map
            host.maps.clear()

            def record(iova: int, oa: int, size: int, perms: Perms = RWX, *, leaf: int | None = None) -> None:
                if perms.read:
                    lay(iova, oa, size, Perms(write=perms.write), leaf=leaf)
                    host.maps.append((iova, oa, size, RW if perms.write else Access.READ))

            builder.map = record  # type: ignore[method-assign]
            return builder

        host.variant = replace(variant, make=make)
        return host

    def last(self, made: TableFormat) -> int:
        """The highest address that the core's own table of this format can map."""
        match made:
            case X86() | RiscV():
                return (1 << (11 + 9 * made.levels)) - 1
            case ArmStage1(lower=ArmTree(input_bits=bits)):
                return (1 << bits) - 1
            case _:
                return (1 << 64) - 1


class Nested(Judge):
    """Two stages. The core's second stage is its own table, made by the same calls as the reference's."""

    def judge(self, case: NestedCase, host: Host) -> None:
        """Build both stages, translate all, compare answers and memory."""
        made = host_format(core_format(case.second.config)[0])
        last = host.last(made)
        self.core.create_host_space(STAGE2, fmt=made)
        for iova, oa, size, permission in host.maps:
            self.core.map(STAGE2, iova, self.ram.hva + oa, size, permission)
        self.core.create_nested_space(CHILD, STAGE2)
        rights = self.attach(case.first.config)
        words = {address: word for address, word in case.memory.words.items() if address >= HOST_FRAMES}
        self.lay(words)
        changes = Changes({}, {})
        try:
            accesses = case.accesses
            if isinstance(made, ArmStage1 | RiscV):  # our own first-stage tables see everybody as a user
                accesses = [(iova, replace(access, privileged=False)) for iova, access in accesses]
            answers = [nested.walk(case.memory, case.first, case.second, *access) for access in accesses]
            for answer in answers:
                changes.add(answer)
            for (iova, access), (found, i), answer in zip(accesses, self.ask(accesses), answers, strict=True):
                expected, said = self.expected(answer, iova, last)
                if access.kind is ref.Kind.WRITE and not rights & Access.WRITE:
                    expected, said = (0, 0, 0, 0, Reason.PERMISSION, 0, 0, 0, 0, 0), "the route"
                changed = self.changed(changes, case, expected[7])
                compare(found, i, expected, changed, lambda: f"{case.kind}: {case.first}\n{iova:#x} {access}: {answer}")  # noqa: B023
                self.seen[said] += 1
            wrong = changes.check(self.ram, words, HOST_FRAMES)
            assert not wrong, f"{case.kind}: {case.first}\n{wrong}"
        finally:
            self.clear({*words, *changes.must, *changes.may}, HOST_FRAMES)
            self.core.detach(RID, None)
            self.core.destroy_space(CHILD)
            self.core.destroy_space(STAGE2)

    @staticmethod
    def changed(changes: Changes, case: NestedCase, gpa: int) -> int:
        """Bits of the stage-1 entry at `gpa` that other accesses may have changed."""
        place = case.second.walk(case.memory, case.second.config, gpa & ~7, ref.Access(ref.Kind.READ))
        return changes.bits(place.output) if isinstance(place, ref.Result) else 0

    def expected(
        self, answer: nested.NestedResult | nested.NestedFault, iova: int, last: int
    ) -> tuple[tuple[int, ...], str]:
        if isinstance(answer, nested.NestedResult):
            hva, size = self.ram.hva + answer.output, answer.size
            return (hva, answer.gpa, size - iova % size, permitted(answer), 0, 0, 0, 0, 0, 0), "found"
        gpa = answer.gpa or 0
        if answer.stage == 1:
            reason = core_reason(answer.reason)
            return (0, 0, 0, 0, reason, 1, answer.level, gpa, answer.entry or 0, 0), answer.reason.name
        reason, level = core_reason(answer.reason), answer.level
        if gpa > last:
            reason, level = Reason.ADDRESS_WIDTH, 0
        return (0, 0, 0, 0, reason, 2, level, gpa, -1, answer.implicit), f"stage 2 {reason.name}"
