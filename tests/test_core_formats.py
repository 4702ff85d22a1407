"""Every format in every configuration, walked by the core and by the brute-force reference: equal in all they say.

Result, permission, size, changes made to entries, and of a fault its reason, level, entry and where that lies.
"""

from __future__ import annotations

import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator

import pytest
from core_formats import CHUNK, GUEST, Host, Nested, Ram, Single, Void
from reference import arm_lpae, cases
from reference.common import Access, Kind, Reason
from reference.formats import VARIANTS, Variant
from reference.memory import Memory, Region
from reference.nested_cases import HOST_BYTES, lift, nested_cases

SEED = int(os.environ.get("VIO_SEED", "0"))
SCALE = float(os.environ.get("VIO_CASES", "1"))
"""How much of the usual number of cases: `VIO_CASES=10 pytest tests/test_core_formats.py` tries ten times as many."""
seen: Counter[str] = Counter()
"""What was compared: names of results, one each."""
runs = 0


@pytest.fixture(autouse=True)
def count_runs() -> Iterator[None]:
    global runs
    yield
    runs += 1


@pytest.fixture(scope="module")
def ram() -> Iterator[Ram]:
    made = Ram(GUEST, 1 << 30)
    yield made
    assert not any(made.words), "the core wrote where no entry was"
    made.close()


@pytest.fixture(scope="module", params=[True, False], ids=["caches", "no-caches"])
def single(request: pytest.FixtureRequest, ram: Ram) -> Iterator[Single]:
    void = Void(CHUNK)
    made = Single(ram, void, walk_caches=request.param, seen=seen)
    yield made
    made.close()
    void.close()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_single_stage(single: Single, variant: Variant) -> None:
    chance = random.Random(zlib.crc32(variant.name.encode()) + SEED)
    for _ in range(max(1, round(SCALE))):
        for case in cases.adversarial(variant, chance):
            single.judge(case.kind, case.memory, case.config, case.accesses, case.answers())
        for case in cases.bit_flips(variant, chance):
            single.judge(case.kind, case.memory, case.config, case.accesses, case.answers())


@pytest.mark.parametrize("granules", [(12, 16), (14, 12), (16, 14), (14, 14)], ids=str)
def test_two_ranges(single: Single, granules: tuple[int, int]) -> None:
    """Arm's, each with a granule of its own; addresses of one that the other has, too."""
    memory, region = Memory(cases.MEMORY_BYTES), Region(1 << 20, 15 << 20)
    chance, accesses = random.Random(sum(granules)), []
    trees = [arm_lpae.Builder(memory, region, granule, 39, upper=bool(upper)) for upper, granule in enumerate(granules)]
    for tree in trees:
        for size in tree.sizes[-2:]:
            at = chance.randrange(1, 8) * size
            tree.map(at, chance.randrange(8) * size, size)
            for other in trees:
                accesses += [(other.extend(at + offset), Access(Kind.WRITE)) for offset in (0, size - 8, size)]
    accesses += [(1 << 55, Access(Kind.READ)), ((1 << 64) - (1 << 40), Access(Kind.READ))]
    config = arm_lpae.Stage1(trees[0].tables_config(), trees[1].tables_config())
    answers = [arm_lpae.walk_stage1(memory, config, *access) for access in accesses]
    single.judge("two ranges", memory, config, accesses, answers)


HOSTS = tuple(
    variant
    for variant in VARIANTS
    if variant.name in {
        "x86-4", "vtd-ss-3", "vtd-ss-5", "ept-4", "ept-5-plain", "amd-v1-3", "amd-v1-4", "amd-v1-6", "arm-s1-4k-48",
        "arm-s1-64k-48", "arm-s2-4k-40-join2", "arm-s2-4k-43-join16", "arm-s2-16k-40-join16", "arm-s2-64k-52",
        "riscv-sv39", "riscv-sv48", "riscv-sv39x4", "riscv-sv57x4",
    }
)  # fmt: skip
"""Second stages of the reference that the core's own tables can equal: no options, and room for the guest."""


@pytest.fixture(scope="module")
def host_ram() -> Iterator[Ram]:
    made = Ram(HOST_BYTES, 1 << 30)
    yield made
    assert not any(made.words), "the core wrote where no entry was"
    made.close()


@pytest.fixture(scope="module", params=[True, False], ids=["caches", "no-caches"])
def pair(request: pytest.FixtureRequest, host_ram: Ram) -> Iterator[Nested]:
    made = Nested(host_ram, walk_caches=request.param, seen=seen)
    yield made
    made.close()


@pytest.mark.parametrize("first", VARIANTS, ids=lambda variant: variant.name)
def test_nested(pair: Nested, first: Variant) -> None:
    """Each configuration over three second stages, so that each format meets most others; more with VIO_CASES."""
    chance = random.Random(zlib.crc32(first.name.encode()) + 1 + SEED)
    number = VARIANTS.index(first)
    for turn in range(max(1, round(4 * SCALE))):
        host = Host.of(HOSTS[(number * 4 + turn) % len(HOSTS)])
        for case in nested_cases(first, host.variant, chance):
            pair.judge(case, host)
        for _ in range(2):
            valid = cases.valid(first, chance, output_limit=cases.MEMORY_BYTES)
            pair.judge(lift(valid, host.variant, chance), host)


def test_enough_was_compared() -> None:
    """What the tests above have compared, all told: enough, and some of each kind."""
    if runs != 2 * (2 * len(VARIANTS) + 4):
        pytest.skip("only part of the suite was asked for: run all of tests/test_core_formats.py")
    assert sum(seen.values()) >= 200_000 * min(SCALE, 1)
    assert min(seen[kind] for kind in ("found", *Reason.__members__)) >= 100, seen
