"""Nested cases: any single-stage case becomes the guest of a random stage 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from . import cases, nested
from .common import Access, Perms
from .formats import Variant
from .memory import Memory, Region

HOST_BYTES = 256 << 20
HOST_FRAMES = 64 << 20  # guest frames lie from here on, stage-2 tables below
DATA_PAGES = 8  # guest pages besides its tables that a scattered stage 2 maps


@dataclass(frozen=True)
class NestedCase:
    """A host memory that holds the guest's, both stages, and what to ask."""

    kind: str
    memory: Memory
    first: nested.Stage
    second: nested.Stage
    accesses: list[tuple[int, Access]]

    def answers(self) -> list[nested.NestedResult | nested.NestedFault]:
        """What the reference says to each access."""
        return [nested.walk(self.memory, self.first, self.second, iova, access) for iova, access in self.accesses]


def lift(case: cases.Case, second: Variant, rng: Random) -> NestedCase:
    """Puts the case's memory under a stage 2: in one piece by large leaves, or scattered, with pages missing,
    read-only or not executable."""
    host = Memory(HOST_BYTES)
    builder = second.make(host, Region(1 << 20, HOST_FRAMES))
    page = builder.sizes[-1]
    guest_bytes = min(cases.MEMORY_BYTES, 1 << builder.input_bits)
    frames: dict[int, int] = {}
    if rng.random() < 0.4:
        base = HOST_FRAMES + rng.randrange(4) * (32 << 20)
        frames = {gpa: base + gpa for gpa in range(0, guest_bytes, page)}
        perms = Perms(write=rng.random() < 0.8)
        builder.map(0, base, guest_bytes, perms)
    else:
        wanted = {gpa for start, size in case.tables for gpa in range(start & -page, start + size, page)}
        wanted |= {rng.randrange(cases.MEMORY_BYTES // page) * page for _ in range(DATA_PAGES)} | {0}
        places = rng.sample(range((HOST_BYTES - HOST_FRAMES) // page), len(wanted))
        for gpa, place in zip(sorted(wanted), places, strict=True):
            frames[gpa] = HOST_FRAMES + place * page
            if gpa < guest_bytes and rng.random() < 0.97:
                spoilt = rng.random() < 0.1
                perms = Perms(not spoilt or rng.random() < 0.5, not spoilt, rng.random() < 0.9)
                builder.map(gpa, frames[gpa], page, perms, leaf=page)
    for address, word in case.memory.words.items():
        if address & -page in frames:
            host.write64(frames[address & -page] + address % page, word)
    stage1, stage2 = case.variant.as_stage(case.config), second.as_stage(second.config(builder))
    return NestedCase(f"{case.kind} under {second.name}", host, stage1, stage2, case.accesses)


def nested_cases(first: Variant, second: Variant, rng: Random, *, rounds: int = 1) -> Iterator[NestedCase]:
    """Valid, garbage and broken guests of `first` under stage 2 of `second`."""
    for _ in range(rounds):
        yield lift(cases.valid(first, rng, output_limit=cases.MEMORY_BYTES), second, rng)
        yield lift(cases.garbage(first, rng, output_limit=cases.MEMORY_BYTES), second, rng)
        for generator in (cases.cycles, cases.beyond, cases.leaf_levels):
            for case in generator(first, rng):
                if rng.random() < 0.3:
                    yield lift(case, second, rng)
