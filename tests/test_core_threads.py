"""Requests and changes at once: neither waits for the other's end, and each sees whole what it sees."""

from __future__ import annotations

import threading
import time

from core_guest import DIRECT, PAGE, STAGE2, Ram

from backend.core import RW, Core, Fault, Reason

OTHER, OTHER_RID = 2, 0x0118
MIB = 1 << 20


def spaces(ram: Ram) -> Core:
    core = Core()
    for ioasid, rid in ((STAGE2, DIRECT), (OTHER, OTHER_RID)):
        core.create_host_space(ioasid)
        core.attach(rid, None, ioasid)
    core.map(OTHER, 0, ram.hva, PAGE, RW)
    return core


def test_changes_do_not_wait_for_the_end_of_a_long_request() -> None:
    """One request of 256 MiB, of four page by page: many changes come and go before it ends."""
    ram = Ram(64 * MIB)
    core = spaces(ram)
    for page in range(0, 256 * MIB, 64 * MIB):
        core.map(STAGE2, page, ram.hva, 64 * MIB, RW)
    running = threading.Event()
    answers: list[Fault | None] = []

    def device() -> None:
        running.set()
        answers.append(core.dma_fill(DIRECT, 0, 256 * MIB, 0x5A))

    thread = threading.Thread(target=device)
    thread.start()
    running.wait(10)
    changes = 0
    while thread.is_alive():
        core.map(OTHER, 1 << 30, ram.hva, PAGE, RW)
        core.unmap(OTHER, 1 << 30, PAGE)
        core.attach(OTHER_RID, None, OTHER)
        core.invalidate_all()
        changes += 4 * thread.is_alive()
    thread.join()
    assert answers == [None]
    assert changes > 40, "a change waits for the rest of the request"
    assert ram.read(63 * MIB, 16) == b"\x5a" * 16
    core.close()
    ram.close()


def test_a_long_request_ends_where_its_way_was_taken_away() -> None:
    """Detached in its middle: a fault that tells how far it came, and nothing moves after detach has returned."""
    ram = Ram(64 * MIB)
    core = spaces(ram)
    core.map(STAGE2, 0, ram.hva, 64 * MIB, RW)
    for _ in range(5):
        core.dma_fill(DIRECT, 0, 64 * MIB)
        answers: list[Fault | None] = []
        thread = threading.Thread(target=lambda: answers.append(core.dma_fill(DIRECT, 0, 64 * MIB, 0x5A)))  # noqa: B023
        thread.start()
        until = time.monotonic() + 10
        while ram.read(MIB, 1) == b"\0" and time.monotonic() < until:
            pass
        core.detach(DIRECT, None)
        found = ram.read(0, 64 * MIB)
        thread.join()
        assert ram.read(0, 64 * MIB) == found
        core.attach(DIRECT, None, STAGE2)
        (answer,) = answers
        if answer is not None:  # else it was quicker
            assert (answer.reason, answer.iova) == (Reason.NO_ROUTE, answer.done)
            assert found == b"\x5a" * answer.done + bytes(64 * MIB - answer.done)
            break
    else:
        raise AssertionError("no request was ever cut off")
    core.close()
    ram.close()


def test_requests_beside_a_long_mapping() -> None:
    """A quarter of a million leaves come and go in one call each; a request sees its page or none, never another."""
    ram = Ram(PAGE)
    core = spaces(ram)
    ram.write(0, b"one page")
    core.map(STAGE2, 1 << 40, ram.hva, PAGE, RW)
    stop = threading.Event()
    wrong: list[object] = []
    seen = 0

    def device() -> None:
        nonlocal seen
        while not stop.is_set():
            for at, there in ((1 << 40, True), (0, False), ((1 << 30) - PAGE, False)):
                answer = core.dma_read(DIRECT, at, 8) if there else core.translate(DIRECT, at, RW)
                lost = isinstance(answer, Fault) and answer.reason != Reason.NOT_PRESENT
                if lost or (there and answer != b"one page"):
                    wrong.append(answer)
                seen += 1

    thread = threading.Thread(target=device)
    thread.start()
    until = time.monotonic() + 10
    while seen <= 60 and time.monotonic() < until:
        core.map(STAGE2, 0, (1 << 46) + PAGE, 1 << 30, RW)  # addresses that nothing touches
        assert not isinstance(core.translate(DIRECT, 1 << 29, RW), Fault)
        core.unmap(STAGE2, 0, 1 << 30)
        assert isinstance(core.translate(DIRECT, 1 << 29, RW), Fault)
    stop.set()
    thread.join()
    assert not wrong
    assert seen > 20
    core.close()
    ram.close()
