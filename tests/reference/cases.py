"""Random and adversarial tables for every variant: memory image, configuration and the accesses to try on it.

Everything follows from the random.Random given, so that a case is named by its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from .building import Builder
from .common import Access, Fault, Kind, Perms, Reader, Result
from .formats import Variant
from .memory import Memory, Region

MEMORY_BYTES = 16 << 20  # room for some hundred tables of 64 KiB; table pointers beyond are beyond memory
TABLES = (1 << 20, 15 << 20)
ACCESSES = tuple(Access(kind, privileged) for kind in Kind for privileged in (False, True))


@dataclass(frozen=True)
class Case:
    """One tree and what to ask of it. `tables`: (address, bytes) of each table, for whoever maps them by a stage 2."""

    kind: str
    variant: Variant
    memory: Memory
    config: Any
    accesses: list[tuple[int, Access]]
    tables: list[tuple[int, int]]

    def answers(self, reader: Reader | None = None) -> list[Result | Fault]:
        """What the reference says to each access."""
        return [self.variant.walk(reader or self.memory, self.config, iova, access) for iova, access in self.accesses]


def _tree(variant: Variant) -> Builder:
    return variant.make(Memory(MEMORY_BYTES), Region(*TABLES))


def _case(kind: str, variant: Variant, builder: Builder, accesses: list[tuple[int, Access]]) -> Case:
    return Case(kind, variant, builder.memory, variant.config(builder), accesses, builder.region.tables)


def _perms(rng: Random) -> Perms:
    read = rng.random() < 0.9
    return Perms(read, read and rng.random() < 0.7, rng.random() < 0.6, rng.random() < 0.8)


def _page(rng: Random, size: int, limit: int) -> int:
    """A multiple of `size` below `limit`, small ones being likely; 0 if there is no other."""
    pages = limit // size
    return rng.randrange(min(pages, 1 << rng.randrange(1, 41))) * size if pages else 0


def _output_limit(variant: Variant) -> int:
    return 1 << int(variant.changes.get("pa_bits", 48 if variant.name.startswith("arm") else 52))


def _populate(rng: Random, variant: Variant, builder: Builder, count: int, output_limit: int) -> list[tuple[int, int]]:
    """Maps up to `count` leaves of random sizes, close to one another or far; returns (iova, size) of each."""
    mapped: list[tuple[int, int]] = []
    base = 0
    while count > 0:
        count -= 1
        size = rng.choice(builder.sizes)
        if size > 1 << builder.input_bits:
            continue
        if rng.random() < 0.3:
            base = _page(rng, size, 1 << builder.input_bits)
        iova = (base + rng.randrange(8) * size) // size * size % (1 << builder.input_bits)
        oa = _page(rng, size, min(output_limit, _output_limit(variant)))
        try:
            builder.map(iova, oa, size, _perms(rng), leaf=size)
        except ValueError:
            continue  # overlaps an earlier leaf, or lies in levels that the tree skips
        mapped.append((iova, size))
    return mapped


def _around(rng: Random, builder: Builder, mapped: list[tuple[int, int]], count: int) -> list[tuple[int, Access]]:
    """Accesses inside mapped pages, at their edges, just outside, anywhere, and beyond the input width."""
    chosen: list[tuple[int, Access]] = []
    width = builder.input_bits
    for _ in range(count):
        iova, size = rng.choice(mapped) if mapped else (0, 1 << width)
        place = rng.randrange(10)
        if place < 5:
            raw = iova + rng.randrange(min(size, 1 << rng.randrange(3, 52)))
        elif place < 7:
            raw = iova + size - 1
        elif place == 7:
            raw = iova + rng.choice((-1, size, 2 * size))
        elif place == 8:
            raw = rng.randrange(1 << width)
        else:
            raw = rng.choice((0, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1))
        address = builder.extend(raw % (1 << width))
        if rng.random() < 0.06:
            address ^= 1 << rng.randrange(max(width - 2, 12), 64)
        chosen.append((address % (1 << 64), rng.choice(ACCESSES)))
    return chosen


def valid(variant: Variant, rng: Random, *, leaves: int = 12, count: int = 40, output_limit: int = 1 << 64) -> Case:
    """A tree without errors, of mixed leaf sizes and permissions."""
    builder = _tree(variant)
    mapped = _populate(rng, variant, builder, leaves, output_limit)
    return _case("valid", variant, builder, _around(rng, builder, mapped, count))


def bit_flips(variant: Variant, rng: Random, *, leaves: int = 2, count: int = 2) -> Iterator[Case]:
    """Every single-bit flip of every entry of a small valid tree; one access at least goes through the entry."""
    builder = _tree(variant)
    mapped: list[tuple[int, int]] = []
    while not mapped:
        mapped = _populate(rng, variant, builder, leaves, 1 << 64)
    good = builder.memory
    owners = _owners(builder)
    for address in sorted(owners):
        for bit in range(64):
            image = good.copy()
            image.write64(address, (image.read64(address) or 0) ^ (1 << bit))
            iova, size = owners[address]
            accesses = [
                (builder.extend(iova + rng.randrange(size)), rng.choice(ACCESSES)),
                *_around(rng, builder, mapped, count - 1),
            ]
            yield Case("bit-flip", variant, image, variant.config(builder), accesses, builder.region.tables)


def _owners(builder: Builder) -> dict[int, tuple[int, int]]:
    """Entry address -> a leaf (raw iova, bytes) whose translation uses it; of a size-coded leaf, first entries only."""
    owners: dict[int, tuple[int, int]] = {}
    for (level, prefix), slot in builder.leaves.items():
        iova = prefix << builder.shift(level)
        if len([a for a in owners if abs(a - slot) < 256]) > 4:
            continue  # sixteen or more equal entries of one leaf teach nothing new
        owners[slot] = (iova, 1 << builder.shift(level))
        for above, parent in builder.tables:
            if above > level and iova >> builder.shift(above) == parent:
                owners.setdefault(builder.slot(iova, above), (iova, 1 << builder.shift(level)))
    return owners


def garbage(variant: Variant, rng: Random, *, pages: int = 4, count: int = 60, output_limit: int = 1 << 64) -> Case:
    """Tables full of random words, half-right entries and pointers among themselves."""
    builder = _tree(variant)
    tables = [builder.root, *(builder.region.allocate(builder.table_bytes) for _ in range(pages))]
    chosen: list[tuple[int, Access]] = []
    for _ in range(count):
        raw = rng.randrange(1 << builder.input_bits)
        table = builder.root
        for level in range(builder.levels, 0, -1):
            slot = table + 8 * builder.index(raw, level)
            table = rng.choice(tables[1:])
            if builder.memory.read64(slot) == 0:
                word = _word(rng, variant, builder, level, table=table, output_limit=output_limit)
                builder.memory.write64(slot, word)
        chosen.append((builder.extend(raw), rng.choice(ACCESSES)))
    return _case("garbage", variant, builder, chosen)


def _word(rng: Random, variant: Variant, builder: Builder, level: int, *, table: int, output_limit: int) -> int:
    """One entry: a pointer, a leaf, either with bits flipped, or noise."""
    kind = rng.randrange(12)
    size = 1 << builder.shift(level)
    if kind == 0:
        return rng.getrandbits(64)
    if kind == 1:
        return rng.getrandbits(64) & rng.getrandbits(64) | 1
    leaf = builder.leaf_entry(level, _page(rng, size, min(output_limit, _output_limit(variant))), _perms(rng), size)
    entry = leaf if level == 1 or kind < 5 else builder.table_entry(level, table)
    if kind in (2, 3, 6):
        entry ^= 1 << rng.randrange(64)
    if kind == 7:
        entry ^= 1 << rng.randrange(12)
    return entry


def _one_path(rng: Random, variant: Variant) -> tuple[Builder, int]:
    """A tree with one smallest leaf, and its raw input address."""
    while True:
        builder = _tree(variant)
        mapped = _populate(rng, variant, builder, 1, 1 << 64)
        if mapped and mapped[0][1] == builder.sizes[-1]:
            return builder, mapped[0][0]


def _path(builder: Builder, raw: int) -> list[tuple[int, int]]:
    """(level, entry address) from the root to the leaf of level 1, levels that the tree skips left out."""
    levels = sorted({level for level, prefix in builder.tables if raw >> builder.shift(level) == prefix} | {1})
    return [(level, builder.slot(raw, level)) for level in reversed(levels)]


def _poke(
    kind: str, rng: Random, variant: Variant, entry: Callable[[Builder, int, int], int], *, count: int = 4
) -> Iterator[Case]:
    """For each entry on the path to one leaf, a tree in which that entry is entry(builder, level, its address)."""
    builder, raw = _one_path(rng, variant)
    good = builder.memory
    for level, slot in _path(builder, raw):
        builder.memory = good.copy()
        builder.memory.write64(slot, entry(builder, level, slot) % (1 << 64))
        yield _case(kind, variant, builder, _around(rng, builder, [(raw, builder.sizes[-1])], count))


def cycles(variant: Variant, rng: Random) -> Iterator[Case]:
    """Pointers to the root, to the table they stand in, and to the memory's first page."""
    for target in ("root", "self", "zero"):

        def entry(builder: Builder, level: int, slot: int, target: str = target) -> int:
            address = {"root": builder.root, "self": slot & -builder.table_bytes, "zero": 0}[target]
            return builder.table_entry(level, address)

        yield from _poke(f"cycle-{target}", rng, variant, entry)


def beyond(variant: Variant, rng: Random) -> Iterator[Case]:
    """Pointers to the first byte beyond memory, to the last table inside, and far away."""
    for where in (MEMORY_BYTES, -1, (1 << 48) - (1 << 16), 1 << 40):

        def entry(builder: Builder, level: int, slot: int, where: int = where) -> int:
            del slot
            return builder.table_entry(level, MEMORY_BYTES - builder.table_bytes if where < 0 else where)

        yield from _poke("beyond", rng, variant, entry)


def leaf_levels(variant: Variant, rng: Random) -> Iterator[Case]:
    """A leaf at every level, allowed there or not, and a pointer at the last level."""

    def leaf(builder: Builder, level: int, slot: int) -> int:
        del slot
        return builder.leaf_entry(level, 0, _perms(rng), 1 << builder.shift(level))

    yield from _poke("leaf-level", rng, variant, leaf)
    yield from _poke("pointer-level", rng, variant, lambda builder, level, slot: builder.table_entry(level, 1 << 20))


def misaligned(variant: Variant, rng: Random) -> Iterator[Case]:
    """Large leaves whose base has a bit below their size."""

    def leaf(builder: Builder, level: int, slot: int) -> int:
        del slot
        low = builder.shift(1)
        base = 1 << rng.randrange(low, max(builder.shift(level), low + 1))
        return builder.leaf_entry(level, base, _perms(rng), 1 << builder.shift(level))

    yield from _poke("misaligned", rng, variant, leaf)


def reserved(variant: Variant, rng: Random, *, rounds: int = 8) -> Iterator[Case]:
    """Several bits at once set in entries that were right."""
    for _ in range(rounds):

        def entry(builder: Builder, level: int, slot: int) -> int:
            del level
            extra = rng.getrandbits(64) & rng.getrandbits(64) & rng.getrandbits(64)
            return (builder.memory.read64(slot) or 0) | extra

        yield from _poke("reserved", rng, variant, entry)


def adversarial(variant: Variant, rng: Random) -> Iterator[Case]:
    """All of the above but the exhaustive bit flips, a few of each."""
    yield valid(variant, rng)
    yield garbage(variant, rng)
    for generator in (cycles, beyond, leaf_levels, misaligned, reserved):
        yield from generator(variant, rng)
