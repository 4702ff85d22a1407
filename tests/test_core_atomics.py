"""AtomicOps: the arithmetic, what they need of memory, and that they are atomic."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator

import pytest
from amd_v1_reference import leaf
from core_guest import CHILD, DIRECT, PAGE, RID, STAGE2, Guest, Ram

from backend.core import RW, Access, BadValueError, Core, Fault, Reason

AT = 2 * PAGE + 0x40
READ_ONLY, WRITE_ONLY = 3 * PAGE, 4 * PAGE


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(iotlb_entries=64, ram=64 * PAGE)
    made.map(0, 64 * PAGE)
    made.bind(0, 1)
    made.set_entry(16, leaf(9 * PAGE))
    made.set_entry(24, leaf(10 * PAGE, write=False))
    made.set_entry(32, leaf(11 * PAGE, read=False))
    yield made
    made.close()


def put(guest: Guest, value: int, size: int = 32) -> None:
    guest.ram.write(9 * PAGE + 0x40, value.to_bytes(size, "little"))


def get(guest: Guest, size: int = 32) -> int:
    return int.from_bytes(guest.ram.read(9 * PAGE + 0x40, size), "little")


@pytest.mark.parametrize("width", [4, 8])
def test_fetch_add_and_swap(guest: Guest, width: int) -> None:
    """What lies around is not touched, and a carry goes nowhere."""
    bits = 8 * width
    for seed in range(20):
        chance = random.Random(seed)
        around, operand = chance.getrandbits(256), chance.getrandbits(bits)
        before, rest = around & ((1 << bits) - 1), around >> bits << bits
        put(guest, around)
        assert guest.core.fetch_add(RID, AT, operand, width) == before
        assert get(guest) == rest | (before + operand) % (1 << bits)
        put(guest, around)
        assert guest.core.swap(RID, AT, operand, width) == before
        assert get(guest) == rest | operand


@pytest.mark.parametrize("width", [4, 8, 16])
def test_compare_exchange(guest: Guest, width: int) -> None:
    bits = 8 * width
    for seed in range(20):
        chance = random.Random(seed)
        around, operand = chance.getrandbits(256), chance.getrandbits(bits)
        before, rest = around & ((1 << bits) - 1), around >> bits << bits
        put(guest, around)
        for bit in (0, bits - 1, chance.randrange(bits)):
            assert guest.core.compare_exchange(RID, AT, before ^ 1 << bit, operand, width) == before
            assert get(guest) == around
        assert guest.core.compare_exchange(RID, AT, before, operand, width) == before
        assert get(guest) == rest | operand


def operations(core: Core, iova: int, width: int) -> dict[str, Callable[[], int | Fault]]:
    return {
        "FetchAdd": lambda: core.fetch_add(RID, iova, 1, width),
        "Swap": lambda: core.swap(RID, iova, 1, width),
        "CAS": lambda: core.compare_exchange(RID, iova, 0, 1, width),
    }


@pytest.mark.parametrize("name", ["FetchAdd", "Swap", "CAS"])
def test_alignment_to_the_operand(guest: Guest, name: str) -> None:
    for width in (4, 8, 16) if name == "CAS" else (4, 8):
        for offset in range(1, width):
            answer = operations(guest.core, AT + offset, width)[name]()
            assert isinstance(answer, Fault)
            assert (answer.reason, answer.stage, answer.access, answer.done) == (Reason.MISALIGNED, 0, RW, 0)
    assert get(guest) == 0


@pytest.mark.parametrize("name", ["FetchAdd", "Swap", "CAS"])
@pytest.mark.parametrize("where", [READ_ONLY, WRITE_ONLY])
def test_both_permissions_are_needed(guest: Guest, name: str, where: int) -> None:
    """By CAS, too, when it would write nothing: the completer reads and may write."""
    guest.core.dma_write(DIRECT, 10 * PAGE, bytes([9]))
    guest.core.dma_write(DIRECT, 11 * PAGE, bytes([9]))
    answer = operations(guest.core, where, 8)[name]()
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.stage, answer.access, answer.ioasid) == (Reason.PERMISSION, 1, RW, CHILD)
    guest.core.attach(RID, None, CHILD, access=Access.READ)
    answer = operations(guest.core, AT, 8)[name]()
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.stage) == (Reason.PERMISSION, 0)
    assert guest.ram.read(10 * PAGE, 1) == guest.ram.read(11 * PAGE, 1) == b"\t"
    assert get(guest) == 0


def test_operands_that_are_none(guest: Guest) -> None:
    core = guest.core
    calls: tuple[Callable[[], int | Fault], ...] = (
        lambda: core.fetch_add(RID, AT, 1, 16),
        lambda: core.swap(RID, AT, 1, 16),
        lambda: core.fetch_add(RID, AT, 1, 2),
        lambda: core.compare_exchange(RID, AT, 0, 1, 1),
        lambda: core.fetch_add(RID, AT, 1 << 32, 4),
        lambda: core.swap(RID, AT, 1 << 64, 8),
        lambda: core.compare_exchange(RID, AT, 1 << 32, 0, 4),
        lambda: core.compare_exchange(RID, AT, 0, 1 << 64, 8),
        lambda: core.compare_exchange(RID, AT, 0, 1 << 128, 16),
        lambda: core.compare_exchange(RID, AT, -1, 0, 16),
        lambda: core.fetch_add(RID, AT, -1, 8),
    )
    for refused in calls:
        with pytest.raises(BadValueError):
            refused()
    answer = core.fetch_add(RID, 1 << 64, 1, 8)
    assert isinstance(answer, Fault)
    assert (answer.reason, answer.access) == (Reason.ADDRESS_WIDTH, RW)
    assert get(guest) == 0


def test_a_cas_that_writes_nothing_dirties_nothing(guest: Guest) -> None:
    core = guest.core
    core.set_dirty_tracking(STAGE2, True)
    core.compare_exchange(RID, AT, 1, 2, 8)
    assert not any(core.read_dirty(STAGE2, 0, 64 * PAGE))
    core.compare_exchange(RID, AT, 0, 2, 16)
    assert core.read_dirty(STAGE2, 0, 64 * PAGE) == bytes([0, 2, 0, 0, 0, 0, 0, 0])


def test_they_are_atomic(guest: Guest) -> None:
    """Threads of every kind of operation on one word each: no addition is lost."""
    core, rounds, threads = guest.core, 3000, 4
    wrong: list[object] = []

    def device(number: int) -> None:
        for _ in range(rounds):
            answers = [core.fetch_add(RID, AT, 1, 4), core.fetch_add(RID, AT + 8, 1 << 32, 8)]
            seen = 0
            while (found := core.compare_exchange(RID, AT + 16, seen, seen + (1 << 60) + 1, 16)) != seen:
                if isinstance(found, Fault):
                    answers.append(found)
                    break
                seen = found
            wrong.extend(answer for answer in answers if isinstance(answer, Fault))

    devices = [threading.Thread(target=device, args=(number,)) for number in range(threads)]
    for each in devices:
        each.start()
    for each in devices:
        each.join()
    assert not wrong
    total = rounds * threads
    assert get(guest) == total | total << 96 | (total * ((1 << 60) + 1)) << 128


def test_memory_that_goes_away() -> None:
    ram = Ram(4 * PAGE, memfd=True)
    core = Core()
    core.create_host_space(STAGE2)
    core.map(STAGE2, 0, ram.hva, 4 * PAGE, RW)
    core.attach(RID, None, STAGE2)
    os.ftruncate(ram.fd, 2 * PAGE)
    for _ in range(2):
        for width in (4, 8, 16):
            for name, operation in operations(core, 2 * PAGE, width).items():
                if width == 16 and name != "CAS":
                    continue
                answer = operation()
                assert isinstance(answer, Fault)
                assert (answer.reason, answer.stage, answer.gpa) == (Reason.MEMORY_GONE, 2, 2 * PAGE)
                assert (answer.done, answer.access) == (0, RW)
    assert core.fetch_add(RID, PAGE, 1, 8) == 0
    core.close()
    ram.close()
