"""Pages of another process that do not come: who asked for them waits, and nobody else, and for no longer than told."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from core_guest import Ram
from core_sanitizers import build, run
from withheld_memory import PAGE, Withholding, helpers_of, threads_of, withholding

from backend.core import (
    ANY_PASID,
    FOREIGN,
    RW,
    Access,
    AmdGcr3,
    BadValueError,
    Core,
    Fault,
    HostProcess,
    Reason,
)

SVA, PLAIN, LENT, OTHER_SVA = 1, 2, 3, 4
RID, PLAIN_RID, LENT_RID, OTHER_RID = 8, 9, 10, 11
FOREVER = 600.0
"""Longer than any test lasts: whoever waits for the page waits until the test's own time is over."""
SECONDS = 60.0


def hold(pid: int) -> HostProcess:
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        return HostProcess(pid, pagemap)
    finally:
        os.close(pagemap)


class Stage:
    """A device in a process that withholds pages, one in that process's memory as it was lent, one in plain memory."""

    def __init__(self, patience: float, child: Withholding) -> None:
        self.child = child
        self.core = core = Core(patience=patience)
        process = hold(child.pid)
        core.create_process_space(SVA, process)
        core.create_host_space(LENT)
        core.lend_process(LENT, process)
        process.close()
        core.create_host_space(PLAIN)
        self.ram = Ram(16 * PAGE)
        core.map(PLAIN, 0, self.ram.hva, self.ram.size, RW)
        core.attach(RID, None, SVA)
        core.attach(LENT_RID, None, LENT)
        core.attach(PLAIN_RID, None, PLAIN)
        self.at = child.userfault(16 * PAGE)

    def close(self) -> None:
        self.core.close()
        self.ram.close()


@pytest.fixture
def child() -> Iterator[Withholding]:
    with withholding() as child:
        yield child


@pytest.fixture
def stage(child: Withholding) -> Iterator[Stage]:
    """Who comes to a withheld page waits for a fifth of a second."""
    with closing(Stage(0.2, child)) as stage:
        yield stage


@pytest.fixture
def patient(child: Withholding) -> Iterator[Stage]:
    """Who comes to a withheld page waits as long as the test lasts."""
    with closing(Stage(FOREVER, child)) as stage:
        yield stage


class Waiting:
    """A request in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._answers: list[object] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(call()))
        self._thread.start()

    @property
    def waits(self) -> bool:
        self._thread.join(0.05)
        return self._thread.is_alive()

    def answer(self) -> object:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self._answers[0]


def fault(answer: object) -> Fault:
    assert isinstance(answer, Fault), answer
    return answer


def facts(answer: object) -> tuple[Reason, int, int]:
    found = fault(answer)
    return found.reason, found.iova, found.done


def test_every_request_ends_in_a_fault(stage: Stage) -> None:
    core, at = stage.core, stage.at
    for answer in (
        core.dma_read(RID, at + 5, 10),
        core.dma_write(RID, at + 5, b"x"),
        core.dma_fill(RID, at + 5, 3 * PAGE, 1),
        core.store(RID, at + 5, 1, 1),
        core.load(RID, at + 5, 1),
    ):
        assert facts(answer) == (Reason.WITHHELD, at + 5, 0)
        assert (fault(answer).stage, fault(answer).gpa) == (1, None)
    copied = fault(core.dma_copy(RID, at, 0, PAGE, writer=(PLAIN_RID, None)))
    assert (copied.reason, copied.rid, copied.iova, copied.access) == (Reason.WITHHELD, RID, at, Access.READ)
    copied = fault(core.dma_copy(PLAIN_RID, 0, at + 1, PAGE, writer=(RID, None)))
    assert (copied.reason, copied.rid, copied.iova, copied.access) == (Reason.WITHHELD, RID, at + 1, Access.WRITE)
    atomic = fault(core.fetch_add(RID, at, 1, 8))
    assert atomic.reason is Reason.UNSUPPORTED, "without a look at the page"
    assert core.counters().faults == 8
    assert "userfaultfd" in Reason.WITHHELD.explain


def test_the_page_at_fault_is_known(stage: Stage) -> None:
    core, at, child = stage.core, stage.at, stage.child
    child.supply(at, 5 * PAGE, 0x61)
    read = bytearray(16 * PAGE)
    assert facts(core.dma_read_into(RID, at + 9, memoryview(read)[: 9 * PAGE])) == (
        Reason.WITHHELD, at + 5 * PAGE, 5 * PAGE - 9)  # fmt: skip
    assert read[: 5 * PAGE - 9] == b"a" * (5 * PAGE - 9)
    core.map(LENT, 0, (at + 4 * PAGE) | FOREIGN, 4 * PAGE, RW)
    stopped = fault(core.dma_write(LENT_RID, 8, bytes(2 * PAGE)))
    assert (stopped.reason, stopped.iova, stopped.done) == (Reason.WITHHELD, PAGE, PAGE - 8)
    assert (stopped.stage, stopped.gpa) == (2, PAGE)
    assert child.read(at + 4 * PAGE, PAGE) == b"a" * 8 + bytes(PAGE - 8)
    sg = [(at, 3), (at + 3 * PAGE, 4), (at + 6 * PAGE, 1), (at, 1)]
    assert facts(core.dma_scatter(RID, sg, bytearray(9), write=False)) == (Reason.WITHHELD, at + 6 * PAGE, 7)
    stopped = fault(core.dma_copy(RID, at, 0, 8 * PAGE, writer=(PLAIN_RID, None)))
    assert facts(stopped) == (Reason.WITHHELD, at + 5 * PAGE, 5 * PAGE)
    assert stage.ram.read(0, 6 * PAGE) == b"a" * (4 * PAGE + 8) + bytes(2 * PAGE - 8)


def test_what_comes_in_the_end_is_moved(patient: Stage) -> None:
    reading = Waiting(lambda: patient.core.dma_read(RID, patient.at + 1, 2 * PAGE))
    writing = Waiting(lambda: patient.core.dma_write(RID, patient.at + 4 * PAGE, b"hello"))
    assert reading.waits and writing.waits
    patient.child.supply(patient.at, 3 * PAGE, 0x62)
    assert reading.answer() == b"b" * 2 * PAGE
    assert writing.waits
    patient.child.supply(patient.at + 4 * PAGE, PAGE, 0x63)
    assert writing.answer() is None
    assert patient.child.read(patient.at + 4 * PAGE, 7) == b"hellocc"


def test_nobody_else_waits(patient: Stage) -> None:
    """Requests to other memory, to the same process's, and every change of anything else."""
    core, at = patient.core, patient.at
    stuck = [Waiting(lambda: core.dma_read(RID, at, 8)) for _ in range(3)]
    stuck.append(Waiting(lambda: core.dma_write(RID, at + PAGE, b"8")))
    assert all(each.waits for each in stuck)
    fine = patient.child.private(PAGE)
    assert core.dma_write(RID, fine, b"beside it") is None
    assert core.dma_read(RID, fine, 9) == b"beside it"
    assert core.dma_write(PLAIN_RID, 5, b"others") is None
    assert core.dma_copy(PLAIN_RID, 5, PAGE, 6) is None
    core.unmap(PLAIN, 0, PAGE)
    core.map(PLAIN, 0, patient.ram.hva, PAGE, RW)
    core.protect(PLAIN, 0, PAGE, Access.READ)
    core.set_dirty_tracking(PLAIN, True)
    core.create_process_space(OTHER_SVA, hold(patient.child.pid))
    core.attach(RID, 7, OTHER_SVA)
    core.detach(RID, 7)
    core.destroy_space(OTHER_SVA)
    core.invalidate(PLAIN)
    core.invalidate_device(PLAIN_RID)
    core.detach(PLAIN_RID, None)
    core.counters()
    assert all(each.waits for each in stuck)
    assert helpers_of() == 5, "one each, and one for what was done meanwhile"
    core.detach(RID, None)
    for each in stuck:
        assert fault(each.answer()).reason is Reason.NO_ROUTE


@pytest.mark.parametrize("kind", ["detach", "block", "replace", "windows", "destroy", "unmap", "protect"])
def test_a_change_ends_what_was_under_way(patient: Stage, kind: str) -> None:
    """Once it has returned nothing moves by what it ended, though the page comes only then."""
    core, at, child = patient.core, patient.at, patient.child
    core.map(LENT, 0, at | FOREIGN, 8 * PAGE, RW)
    rid, start = (RID, at) if kind in {"detach", "block", "replace", "windows"} else (LENT_RID, 0)
    writing = Waiting(lambda: core.dma_write(rid, start, b"too late"))
    reading = Waiting(lambda: core.dma_read(rid, start + PAGE, 8))
    assert writing.waits and reading.waits
    if kind == "detach":
        core.detach(rid, None)
    elif kind == "block":
        core.block(rid, None)
    elif kind == "replace":
        core.attach(rid, None, PLAIN)
    elif kind == "windows":
        core.set_windows(rid, [(at, at + 8 * PAGE - 1, None)])
    elif kind == "destroy":
        core.detach(rid, None)
        core.destroy_space(LENT)
    elif kind == "unmap":
        core.unmap(LENT, 0, 8 * PAGE)
    else:
        core.protect(LENT, 0, 8 * PAGE, Access.READ)
    child.supply(at, 2 * PAGE, 0x64)
    assert child.read(at, 8) == b"d" * 8
    expected = {
        "detach": Reason.NO_ROUTE, "block": Reason.BLOCKED, "replace": Reason.NOT_PRESENT,
        "windows": Reason.RESERVED_RANGE, "destroy": Reason.NO_ROUTE, "unmap": Reason.NOT_PRESENT,
        "protect": Reason.PERMISSION,
    }[kind]  # fmt: skip
    assert fault(writing.answer()).reason is expected
    if kind == "protect":
        assert reading.answer() == b"d" * 8, "that is still permitted"
    else:
        assert fault(reading.answer()).reason is expected
    assert child.read(at, 8) == b"d" * 8


@pytest.mark.parametrize("kind", ["leaf", "space", "device", "all", "pasid", "parent", "unbind"])
def test_under_a_guests_table(patient: Stage, kind: str) -> None:
    """The guest leads a page elsewhere and invalidates: what was under way there has ended, and goes on where it leads
    now."""
    core, at, child, ram = patient.core, patient.at, patient.child, Ram(16 * PAGE)
    gpa, nested, pasid = 1 << 30, 5, 3 if kind == "pasid" else None
    core.map(LENT, 0, ram.hva, ram.size, RW)
    core.map(LENT, gpa, at | FOREIGN, 8 * PAGE, RW)
    for table in (1, 2, 3):
        ram.write(table * PAGE, ((table + 1) * PAGE | 7).to_bytes(8, "little"))
    ram.write(4 * PAGE, (gpa | 7).to_bytes(8, "little"))
    core.create_nested_space(nested, LENT)
    if pasid is None:
        core.bind_table(nested, fmt="x86", root=PAGE, levels=4)
        core.attach(LENT_RID, None, nested)
    else:
        ram.write(8 * PAGE + 8 * pasid, (PAGE | 1).to_bytes(8, "little"))
        core.bind_pasid_table(nested, fmt=AmdGcr3(levels=1), root=8 * PAGE)
        core.attach(LENT_RID, ANY_PASID, nested)
    writing = Waiting(lambda: core.dma_write(LENT_RID, 8, b"where to?", pasid=pasid))
    assert writing.waits
    ram.write(4 * PAGE, (5 * PAGE | 7).to_bytes(8, "little"))
    if kind == "leaf":
        core.invalidate(nested, 0, PAGE)
    elif kind == "space":
        core.invalidate(nested)
    elif kind == "device":
        core.invalidate_device(LENT_RID)
    elif kind == "all":
        core.invalidate_all()
    elif kind == "pasid":
        core.invalidate(nested, 0, PAGE, pasid=pasid)
    elif kind == "parent":
        core.unmap(LENT, gpa, 8 * PAGE)
    else:
        core.unbind_table(nested)
    child.supply(at, PAGE, 0x65)
    if kind == "unbind":
        assert fault(writing.answer()).reason is Reason.NOT_BOUND
    else:
        assert writing.answer() is None
        assert ram.read(5 * PAGE + 8, 9) == b"where to?"
    assert child.read(at, PAGE) == b"e" * PAGE
    core.close()
    ram.close()


def test_a_change_of_something_else_in_the_space_delays_no_more(patient: Stage) -> None:
    """What was broken off for it is begun anew, any number of times, and comes to its end."""
    core, at = patient.core, patient.at
    core.map(LENT, 0, at | FOREIGN, 8 * PAGE, RW)
    writing = Waiting(lambda: core.dma_write(LENT_RID, 3, b"in the end"))
    assert writing.waits
    for page in range(100, 120):
        core.map(LENT, page * PAGE, patient.ram.hva, PAGE, RW)
        core.unmap(LENT, page * PAGE, PAGE)
    assert writing.waits
    patient.child.supply(at, PAGE, 0x66)
    assert writing.answer() is None
    assert patient.child.read(at, 14) == b"fffin the endf"


def test_what_is_dirty_has_been_written(patient: Stage) -> None:
    """A page that a bitmap tells is written no more when it has been told, or told again."""
    core, at = patient.core, patient.at
    core.map(LENT, 0, at | FOREIGN, 8 * PAGE, RW)
    writing = Waiting(lambda: core.dma_write(LENT_RID, 2 * PAGE, b"noted"))
    assert writing.waits
    core.set_dirty_tracking(LENT, True)
    assert writing.waits
    told = core.read_dirty(LENT, 0, 8 * PAGE)[0]
    assert writing.waits
    patient.child.supply(at + 2 * PAGE, PAGE)
    assert writing.answer() is None
    assert (told, core.read_dirty(LENT, 0, 8 * PAGE)[0]) in {(4, 4), (0, 4)}


def test_the_process_is_killed_in_the_middle(patient: Stage) -> None:
    """And everything is as it was before: helpers, threads, descriptors."""
    threads, files = threads_of(), len(os.listdir("/proc/self/fd"))
    stuck = [Waiting(lambda: patient.core.dma_read(RID, patient.at, 8)) for _ in range(8)]
    stuck += [Waiting(lambda: patient.core.store(RID, patient.at, 1, 8)) for _ in range(8)]
    assert all(each.waits for each in stuck)
    assert helpers_of() == 16
    patient.child.kill()
    for each in stuck:  # some may be served by the last of it, before it has gone
        answer = each.answer()
        assert not isinstance(answer, Fault) or answer.reason is Reason.MEMORY_GONE
    assert fault(patient.core.load(RID, patient.at, 8)).reason is Reason.MEMORY_GONE
    assert helpers_of() <= 4, "a few are kept for the next ones"
    patient.core.close()
    assert (helpers_of(), threads_of()) == (0, threads)
    assert len(os.listdir("/proc/self/fd")) <= files


def test_helpers_go_with_the_thread_that_made_them(patient: Stage) -> None:
    """The kernel ends them with it; another one is made."""
    at = patient.child.private(PAGE)
    first = Waiting(lambda: patient.core.dma_write(RID, at, b"by a thread"))
    assert first.answer() is None
    assert patient.core.dma_read(RID, at, 11) == b"by a thread"
    with closing(Core()) as other:
        process = hold(patient.child.pid)
        other.create_process_space(SVA, process)
        process.close()
        other.attach(RID, None, SVA)
        assert other.dma_read(RID, at, 11) == b"by a thread"


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_file_in_user_space(stage: Stage, tmp_path: Path, one_by_one: bool) -> None:
    """Without reading ahead the kernel waits for FUSE's answer, which nothing else ends: such a helper is left behind,
    and goes when the answer comes."""
    core, child = stage.core, stage.child
    at = child.fuse(tmp_path, one_by_one=one_by_one)
    assert facts(core.dma_read(RID, at + 5, 2 * PAGE)) == (Reason.WITHHELD, at + 5, 0)
    assert facts(core.load(RID, at + 8, 8)) == (Reason.WITHHELD, at + 8, 0)
    left = helpers_of()
    assert left >= one_by_one, "some could not be killed"
    before = core.counters().faults
    core.detach(RID, None)
    core.attach(RID, None, SVA)
    child.come()
    while isinstance(found := core.dma_read(RID, at + 5, 2 * PAGE), Fault):
        assert found.reason is Reason.WITHHELD and core.counters().faults < before + 50
    assert found == b"f" * 2 * PAGE
    assert helpers_of() <= 1 + 4


def test_those_that_cannot_be_killed_are_bounded(child: Withholding, tmp_path: Path) -> None:
    """Four in the memory of one process: then it gets no helper until one of them has gone, and others get theirs."""
    with closing(Stage(0.05, child)) as stage, withholding() as other:
        at = child.fuse(tmp_path, one_by_one=True)
        for page in range(8):
            assert facts(stage.core.load(RID, at + page * PAGE, 8)) == (Reason.WITHHELD, at + page * PAGE, 0)
        assert helpers_of() == 4
        process = hold(other.pid)
        stage.core.create_process_space(OTHER_SVA, process)
        process.close()
        stage.core.attach(OTHER_RID, None, OTHER_SVA)
        for _ in range(8):
            assert stage.core.dma_write(OTHER_RID, other.private(PAGE), b"others") is None
        assert stage.core.dma_write(PLAIN_RID, 0, b"others") is None
        child.kill()
        while isinstance(stage.core.load(RID, at, 8), Fault) and helpers_of() > 1:
            pass


def test_patience_is_bounded() -> None:
    for patience in (0, 3601, -1):
        with pytest.raises(BadValueError):
            Core(patience=patience)


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_nothing_stale_is_used(tmp_path: Path, sanitizers: str) -> None:
    """core_errand_driver.c: requests in another process's memory against changes that break them off in the middle.
    VIOASID_STALE_SECONDS=60 looks that long."""
    driver = build(tmp_path, sanitizers, "core_errand_driver.c")
    seconds = float(os.environ.get("VIOASID_STALE_SECONDS", "1.5"))
    words = run(driver, "1", str(int(seconds * 1000)), seconds=60 + seconds).split()
    assert int(words[0]) > 50 and int(words[2]) > 20, "too little happened to tell"
