"""Spaces that stand for a process's address space: DMA in the memory of real processes."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from core_guest import Ram
from host_process import PAGE, HostProcess

from backend.core import (
    FOREIGN,
    RW,
    Access,
    AmdGcr3,
    BadValueError,
    Core,
    ExistsError,
    Fault,
    KindError,
    Reason,
    Translation,
)
from backend.core import HostProcess as Held

SVA, PLAIN = 1, 2
RID, OTHER = 8, 9
READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE


def hold(pid: int) -> Held:
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        return Held(pid, pagemap)
    finally:
        os.close(pagemap)


def attach_process(core: Core, pid: int, rid: int = RID, ioasid: int = SVA) -> None:
    process = hold(pid)
    core.create_process_space(ioasid, process)
    process.close()  # the space holds it
    core.attach(rid, None, ioasid)


@pytest.fixture
def core() -> Iterator[Core]:
    with closing(Core()) as core:
        yield core


@pytest.fixture
def child(core: Core) -> Iterator[HostProcess]:
    with closing(HostProcess()) as child:
        attach_process(core, child.pid)
        yield child


def fault(answer: object) -> Fault:
    assert isinstance(answer, Fault)
    return answer


def test_reads_and_writes_land_in_the_process(core: Core, child: HostProcess) -> None:
    at = child.map(4 * PAGE) + PAGE - 5  # over a page boundary, aligned to nothing
    child.write(at, b"from the child")
    assert core.dma_read(RID, at, 14) == b"from the child"
    assert core.dma_write(RID, at + 3, b"and to the child") is None
    assert child.read(at, 19) == b"froand to the child"


@pytest.mark.parametrize("size", [1, PAGE, (128 << 10) + 7, 3 << 20])
def test_any_length(core: Core, child: HostProcess, size: int) -> None:
    at = child.map(4 << 20) + 9
    data = os.urandom(size)
    assert core.dma_write(RID, at, data) is None
    assert core.dma_read(RID, at, size) == data
    assert child.read(at + size - 1, 2) == data[-1:] + b"\0"


def test_memory_that_was_never_touched_is_faulted_in_as_it_is_used(core: Core, child: HostProcess) -> None:
    size = 64 << 20
    at, before = child.map(size), child.resident()
    assert core.dma_read(RID, at + (5 << 20), 64) == bytes(64)
    assert core.dma_write(RID, at + (9 << 20), b"x" * PAGE) is None
    assert child.resident() - before < size // 8  # huge pages of 2 MiB, at most
    assert child.read(at + (9 << 20), 2) == b"xx"


def test_scatter_list(core: Core, child: HostProcess) -> None:
    at = child.map(8 * PAGE)
    data = os.urandom(3 * PAGE)
    sg = [(at + 5 * PAGE + 1, PAGE), (at, 0), (at + 3, PAGE - 1), (at + 2 * PAGE, PAGE + 1)]
    assert core.dma_scatter(RID, sg, data, write=True) is None
    assert child.read(at + 5 * PAGE + 1, PAGE) == data[:PAGE]
    assert child.read(at + 3, PAGE - 1) == data[PAGE : 2 * PAGE - 1]
    back = bytearray(len(data))
    assert core.dma_scatter(RID, sg, back, write=False) is None
    assert back == data


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_single_stores_and_loads(core: Core, child: HostProcess, width: int) -> None:
    at = child.map(PAGE) + 64
    value = 0x8182838485868788 & (1 << 8 * width) - 1
    assert core.store(RID, at, value, width) is None
    assert child.read(at, 16) == value.to_bytes(width, "little") + bytes(16 - width)
    assert core.load(RID, at, width) == value
    if width > 1:
        assert fault(core.store(RID, at + 1, value, width)).reason is Reason.MISALIGNED


def test_fill(core: Core, child: HostProcess) -> None:
    at = child.map(8 * PAGE)
    assert core.dma_fill(RID, at + 1, 3 * PAGE + 3, 0x04030201, 4) is None
    assert child.read(at, 3 * PAGE + 5) == b"\0" + (b"\1\2\3\4" * PAGE)[: 3 * PAGE + 3] + b"\0"


def test_copy_within_a_process_and_from_one_space_to_another(core: Core, child: HostProcess) -> None:
    at = child.map(64 * PAGE)
    data = os.urandom(9 * PAGE + 5)
    child.write(at + 7, data)
    assert core.dma_copy(RID, at + 7, at + 20 * PAGE + 1, len(data)) is None
    assert child.read(at + 20 * PAGE + 1, len(data)) == data
    assert core.dma_copy(RID, at + 20 * PAGE + 1, at + 21 * PAGE + 3, len(data)) is None  # overlapping, as memmove
    assert child.read(at + 21 * PAGE + 3, len(data)) == data
    ram = Ram(16 * PAGE)
    core.create_host_space(PLAIN)
    core.map(PLAIN, 0, ram.hva, ram.size, RW)
    core.set_dirty_tracking(PLAIN, True)
    core.attach(OTHER, None, PLAIN)
    assert core.dma_copy(RID, at + 7, PAGE + 1, len(data), writer=(OTHER, None)) is None
    assert ram.read(PAGE + 1, len(data)) == data
    assert core.read_dirty(PLAIN, 0, 16 * PAGE) == b"\xfe\x07"
    ram.write(5, b"back to the process")
    assert core.dma_copy(OTHER, 5, at + 50 * PAGE, 19, writer=(RID, None)) is None
    assert child.read(at + 50 * PAGE, 19) == b"back to the process"
    child.protect(at + 41 * PAGE, PAGE, READ)
    stopped = fault(core.dma_copy(OTHER, 0, at + 40 * PAGE, 3 * PAGE, writer=(RID, None)))
    assert (stopped.rid, stopped.iova, stopped.done, stopped.reason) == (
        RID, at + 41 * PAGE, PAGE, Reason.PERMISSION)  # fmt: skip
    child.unmap(at + 43 * PAGE, PAGE)
    stopped = fault(core.dma_copy(RID, at + 42 * PAGE, 0, 3 * PAGE, writer=(OTHER, None)))
    assert (stopped.rid, stopped.iova, stopped.done, stopped.access) == (RID, at + 43 * PAGE, PAGE, Access.READ)


def test_what_the_process_may_not_touch_faults_after_what_it_may(core: Core, child: HostProcess) -> None:
    at = child.map(8 * PAGE)
    child.write(at, b"\5" * 8 * PAGE)
    child.protect(at + 2 * PAGE, PAGE, READ)
    child.protect(at + 4 * PAGE, PAGE, 0)
    child.unmap(at + 6 * PAGE, PAGE)
    refused = fault(core.dma_write(RID, at + 100, b"\7" * 3 * PAGE))
    assert (refused.reason, refused.iova, refused.done) == (Reason.PERMISSION, at + 2 * PAGE, 2 * PAGE - 100)
    assert (refused.stage, refused.level, refused.gpa, refused.ioasid) == (1, 0, None, SVA)
    assert child.read(at, 3 * PAGE) == b"\5" * 100 + b"\7" * (2 * PAGE - 100) + b"\5" * PAGE
    for page, done in ((4, 2), (6, 1)):
        buffer = bytearray(4 * PAGE)
        lost = fault(core.dma_read_into(RID, at + (page - done) * PAGE, buffer))
        assert (lost.reason, lost.iova, lost.done) == (Reason.NOT_PRESENT, at + page * PAGE, done * PAGE)
        assert buffer == b"\5" * done * PAGE + bytes(4 * PAGE - done * PAGE)
        assert fault(core.store(RID, at + page * PAGE, 1, 8)).reason is Reason.NOT_PRESENT
    child.protect(at + 4 * PAGE, PAGE, READ | WRITE)
    assert core.store(RID, at + 4 * PAGE, 1, 8) is None  # and nothing of the refusal is kept


def test_a_file_that_ends_early_is_not_there(core: Core, child: HostProcess) -> None:
    at = child.map_file(4 * PAGE)
    assert core.dma_write(RID, at, b"y" * 4 * PAGE) is None
    child.ask("truncate", 2 * PAGE)
    lost = fault(core.dma_read(RID, at + PAGE, 2 * PAGE))
    assert (lost.reason, lost.iova, lost.done) == (Reason.NOT_PRESENT, at + 2 * PAGE, PAGE)


def test_addresses_beyond_a_process(core: Core, child: HostProcess) -> None:
    for iova in (1 << 47, (1 << 64) - PAGE):
        assert fault(core.dma_read(RID, iova, 8)).reason is Reason.ADDRESS_WIDTH
    assert fault(core.dma_read(RID, (1 << 64) - 4, 8)).reason is Reason.ADDRESS_WIDTH
    assert fault(core.dma_read(RID, 0, 8)).reason is Reason.NOT_PRESENT


def test_a_dead_process_is_a_fault(core: Core, child: HostProcess) -> None:
    at = child.map(PAGE)
    assert core.store(RID, at, 1, 8) is None
    child.kill()
    for answer in (core.dma_read(RID, at, 8), core.dma_write(RID, at, b"1"), core.store(RID, at, 1, 8),
                   core.load(RID, at, 8), core.dma_fill(RID, at, 8), core.translate(RID, at, RW)):  # fmt: skip
        gone = fault(answer)
        assert (gone.reason, gone.done, gone.iova) == (Reason.MEMORY_GONE, 0, at)


def test_the_same_pid_with_another_program_is_not_the_same_process(core: Core, child: HostProcess) -> None:
    """What a reused pid comes to: the number is alive, and the address space that it named is not."""
    at = child.map(PAGE)
    child.write(at, b"secret")
    child.become_another_program()
    later = child.map(PAGE)
    child.write(later, b"another")
    for iova in (at, later):
        gone = fault(core.dma_read(RID, iova, 7))
        assert (gone.reason, gone.done) == (Reason.MEMORY_GONE, 0)
        assert fault(core.dma_write(RID, iova, b"overwritten")).reason is Reason.MEMORY_GONE
    assert child.read(later, 7) == b"another"


def test_translations_tell_what_is_mapped(core: Core, child: HostProcess) -> None:
    at = child.map(8 * PAGE)
    child.protect(at + 2 * PAGE, PAGE, READ)
    child.unmap(at + 5 * PAGE, PAGE)
    assert core.translate(RID, at + 2 * PAGE + 5, Access.READ) == Translation(
        at + 2 * PAGE + 5 | FOREIGN, PAGE - 5, at + 2 * PAGE + 5, Access.READ)  # fmt: skip
    assert core.translate(RID, at + 3 * PAGE, RW) == Translation(at + 3 * PAGE | FOREIGN, 2 * PAGE, at + 3 * PAGE, RW)
    assert fault(core.translate(RID, at + 2 * PAGE, Access.WRITE)).reason is Reason.PERMISSION
    assert fault(core.translate(RID, at + 5 * PAGE, Access.READ)).reason is Reason.NOT_PRESENT
    assert core.lookup(RID, at + 2 * PAGE).result == core.translate(RID, at + 2 * PAGE, Access.READ)
    lost = core.lookup(RID, at + 5 * PAGE).result
    assert fault(lost).reason is Reason.NOT_PRESENT


def test_a_route_bounds_the_access(core: Core, child: HostProcess) -> None:
    at = child.map(PAGE)
    core.attach(RID, None, SVA, access=Access.READ)
    assert core.dma_read(RID, at, 4) == bytes(4)
    assert fault(core.dma_write(RID, at, b"1234")).reason is Reason.PERMISSION


def test_atomics_work_on_memory_of_this_process_alone(core: Core, child: HostProcess) -> None:
    assert fault(core.fetch_add(RID, child.map(PAGE), 1, 8)).reason is Reason.UNSUPPORTED
    ram = Ram(PAGE)
    attach_process(core, os.getpid(), OTHER, PLAIN)
    assert core.fetch_add(OTHER, ram.hva + 8, 5, 8) == 0
    assert core.compare_exchange(OTHER, ram.hva + 8, 5, 7, 8) == 5
    assert ram.read(8, 8) == (7).to_bytes(8, "little")


def test_the_own_process_is_plain_memory(core: Core) -> None:
    attach_process(core, os.getpid())
    ram = Ram(8 * PAGE, memfd=True)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    data = os.urandom(5 * PAGE)
    assert core.dma_write(RID, ram.hva + 17, data) is None
    assert ram.read(17, len(data)) == data
    assert core.dma_read(RID, ram.hva + 17, len(data)) == data
    libc.mprotect(ram.hva + 2 * PAGE, PAGE, READ)
    refused = fault(core.dma_write(RID, ram.hva + PAGE, bytes(3 * PAGE)))
    assert (refused.reason, refused.iova, refused.done) == (Reason.PERMISSION, ram.hva + 2 * PAGE, PAGE)
    libc.mprotect(ram.hva + 2 * PAGE, PAGE, 0)
    lost = fault(core.dma_read(RID, ram.hva + PAGE, 3 * PAGE))
    assert (lost.reason, lost.iova, lost.done) == (Reason.NOT_PRESENT, ram.hva + 2 * PAGE, PAGE)
    libc.mprotect(ram.hva + 2 * PAGE, PAGE, READ | WRITE)
    os.ftruncate(ram.fd, PAGE)
    lost = fault(core.dma_read(RID, ram.hva, 2 * PAGE))
    assert (lost.reason, lost.iova, lost.done) == (Reason.NOT_PRESENT, ram.hva + PAGE, PAGE)
    ram.close()


def test_such_a_space_has_no_table(core: Core, child: HostProcess) -> None:
    refusals: list[Callable[[], None]] = [
        lambda: core.map(SVA, PAGE, 1 << 32, PAGE, RW),
        lambda: core.unmap(SVA, PAGE, PAGE),
        lambda: core.protect(SVA, PAGE, PAGE, RW),
        lambda: core.create_nested_space(PLAIN, SVA),
        lambda: core.set_dirty_tracking(SVA, True),
        lambda: core.lend_process(SVA, hold(child.pid)),
        lambda: core.bind_table(SVA, fmt="amd-v1", root=0, levels=4),
    ]
    for refused in refusals:
        with pytest.raises(KindError):
            refused()
    with pytest.raises(BadValueError):
        Held(child.pid, 1 << 20)


def test_spaces_give_their_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with closing(Core()) as core:
        attach_process(core, os.getpid())
        attach_process(core, os.getpid(), OTHER, PLAIN)
        core.detach(RID, None)
        core.destroy_space(SVA)
    assert len(os.listdir("/proc/self/fd")) == before


# Tables that lead to memory of another process


@pytest.fixture
def table(core: Core, child: HostProcess) -> tuple[int, Ram]:
    """IOVA pages 0 to 7 lead to the child's memory, page 8 on to ours: the child's address and our RAM."""
    at, ram = child.map(8 * PAGE), Ram(8 * PAGE)
    core.create_host_space(PLAIN)
    core.lend_process(PLAIN, hold(child.pid))
    core.map(PLAIN, 0, at | FOREIGN, 8 * PAGE, RW)
    core.map(PLAIN, 8 * PAGE, ram.hva, 8 * PAGE, RW)
    core.attach(OTHER, None, PLAIN)
    return at, ram


def test_one_transfer_over_memory_of_two_processes(core: Core, child: HostProcess, table: tuple[int, Ram]) -> None:
    at, ram = table
    data = os.urandom(12 * PAGE)
    assert core.dma_write(OTHER, 2 * PAGE + 5, data) is None
    assert child.read(at + 2 * PAGE + 5, 6 * PAGE - 5) == data[: 6 * PAGE - 5]
    assert ram.read(0, 6 * PAGE + 5) == data[6 * PAGE - 5 :]
    assert core.dma_read(OTHER, 2 * PAGE + 5, len(data)) == data
    assert core.translate(OTHER, 3, RW) == Translation(at + 3 | FOREIGN, PAGE - 3, 3, RW | Access.EXECUTE)
    assert core.lookup(OTHER, 3).result == core.translate(OTHER, 3, Access.READ)
    core.unmap(PLAIN, 0, 8 * PAGE)
    assert fault(core.dma_read(OTHER, 0, 8)).reason is Reason.NOT_PRESENT


def test_what_cannot_be_touched_there(core: Core, child: HostProcess, table: tuple[int, Ram]) -> None:
    at, _ = table
    core.set_dirty_tracking(PLAIN, True)
    child.protect(at + 2 * PAGE, PAGE, READ)
    child.unmap(at + 5 * PAGE, PAGE)
    refused = fault(core.dma_write(OTHER, PAGE + 7, bytes(2 * PAGE)))
    assert (refused.reason, refused.stage, refused.gpa, refused.iova, refused.done) == (
        Reason.PERMISSION, 2, 2 * PAGE, 2 * PAGE, PAGE - 7)  # fmt: skip
    lost = fault(core.dma_read(OTHER, 4 * PAGE + 7, 3 * PAGE))
    assert (lost.reason, lost.gpa, lost.done) == (Reason.NOT_PRESENT, 5 * PAGE, PAGE - 7)
    assert fault(core.fetch_add(OTHER, 0, 1, 8)).reason is Reason.UNSUPPORTED
    assert core.read_dirty(PLAIN, 0, 8 * PAGE)[0] & 2
    child.kill()
    assert fault(core.dma_read(OTHER, 0, 8)).reason is Reason.MEMORY_GONE
    assert core.dma_read(OTHER, 8 * PAGE, 8) == bytes(8)


def test_a_guests_table_there_is_not_walked(core: Core, child: HostProcess, table: tuple[int, Ram]) -> None:
    nested = 3
    core.create_nested_space(nested, PLAIN)
    core.attach(OTHER, 1, nested)
    core.bind_table(nested, fmt="amd-v1", root=PAGE, levels=4)
    lost = fault(core.dma_read(OTHER, 0, 8, pasid=1))
    assert (lost.reason, lost.stage, lost.table, lost.gpa) == (Reason.UNSUPPORTED, 2, True, PAGE)
    assert fault(core.lookup(OTHER, 0, pasid=1).result).reason is Reason.UNSUPPORTED
    core.bind_pasid_table(nested, fmt=AmdGcr3(), root=2 * PAGE)
    lost = fault(core.dma_read(OTHER, 0, 8, pasid=1))
    assert (lost.reason, lost.table, lost.pasid_table, lost.gpa) == (Reason.UNSUPPORTED, True, True, 2 * PAGE + 8)
    assert fault(core.lookup(OTHER, 0, pasid=1).result).reason is Reason.UNSUPPORTED


def test_a_guests_table_of_ours_leads_there(core: Core, child: HostProcess, table: tuple[int, Ram]) -> None:
    at, ram = table
    nested = 3
    leaf = 1 | 3 << 61 | PAGE  # AMD v1 (48882, 2.2.3): PR, NextLevel 0, IR, IW; GPA page 1 is the child's
    ram.write(8 * 3, leaf.to_bytes(8, "little"))
    core.create_nested_space(nested, PLAIN)
    core.attach(OTHER, 1, nested)
    core.bind_table(nested, fmt="amd-v1", root=8 * PAGE, levels=1)
    assert core.dma_write(OTHER, 3 * PAGE + 9, b"nested", pasid=1) is None
    assert child.read(at + PAGE + 9, 6) == b"nested"
    child.unmap(at + PAGE, PAGE)
    lost = fault(core.dma_read(OTHER, 3 * PAGE, 8, pasid=1))
    assert (lost.reason, lost.stage, lost.gpa, lost.iova) == (Reason.NOT_PRESENT, 2, PAGE, 3 * PAGE)


def test_addresses_of_a_process_that_was_not_lent(core: Core, child: HostProcess) -> None:
    core.create_host_space(PLAIN)
    with pytest.raises(BadValueError):
        core.map(PLAIN, 0, PAGE | FOREIGN, PAGE, RW)
    core.lend_process(PLAIN, hold(os.getpid()))
    with pytest.raises(ExistsError):
        core.lend_process(PLAIN, hold(child.pid))
    ram = Ram(PAGE)
    core.map(PLAIN, 0, ram.hva | FOREIGN, PAGE, RW)  # one's own are plain memory
    core.attach(OTHER, None, PLAIN)
    assert core.fetch_add(OTHER, 0, 5, 8) == 0
    assert ram.read(0, 1) == b"\5"
