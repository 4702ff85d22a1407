"""IOASIDs that stand for a process's address space: by pid, and beside one giant mapping of the same."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
from guest_ram import Ram
from host_process import PAGE, HostProcess

from backend.core import Access, Fault, Reason
from backend.ioasid import COMMANDS, Context, Engine, IoasidError, Kind
from backend.ioasid.limits import MAX_PROCESSES
from protocol.sockets import allow_descriptors

RID = 8
PASID = 5
LOW, END = 1 << 32, 1 << 47
"""Where a process's memory lies: above what devices reserve."""
R = mmap.PROT_READ


class Machine:
    """A device whose own requests go to memory of the VM's, and those of a PASID to a process."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.ctx: Context = self.engine.open()
        self.device = self.engine.add_device(RID, "device")
        self.port = self.device.port
        self.ctx.bind_device(RID)

    def close(self) -> None:
        self.engine.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with closing(Machine()) as machine:
        yield machine


@pytest.fixture
def child() -> Iterator[HostProcess]:
    with closing(HostProcess()) as child:
        yield child


def refused(call: object) -> int:
    assert callable(call)
    with pytest.raises(IoasidError) as error:
        call()
    return error.value.errno or 0


def test_dma_of_a_pasid_in_a_process(machine: Machine, child: HostProcess) -> None:
    plain = machine.ctx.alloc()
    machine.ctx.attach(RID, plain)
    sva = machine.ctx.alloc(Kind.SVA, pid=child.pid)
    machine.ctx.attach(RID, sva, pasid=PASID)
    at = child.map(1 << 30)  # far more than is ever touched
    assert machine.port.read(at + 12345, 100, PASID) == bytes(100)
    assert machine.port.write(at + PAGE - 3, b"a device", PASID) is None
    assert child.read(at + PAGE - 3, 8) == b"a device"
    without = machine.port.read(at, 8)
    assert isinstance(without, Fault) and (without.reason, without.ioasid) == (Reason.NOT_PRESENT, plain)
    child.protect(at, PAGE, R)
    stopped = machine.port.write(at + PAGE - 8, bytes(16), PASID)
    assert isinstance(stopped, Fault)
    assert (stopped.reason, stopped.ioasid, stopped.pasid, stopped.done) == (Reason.PERMISSION, sva, PASID, 0)
    child.unmap(at + PAGE, PAGE)
    lost = machine.port.read(at, 2 * PAGE, PASID)
    assert isinstance(lost, Fault) and (lost.reason, lost.iova, lost.done) == (Reason.NOT_PRESENT, at + PAGE, PAGE)


def test_a_process_killed_in_the_middle(machine: Machine, child: HostProcess) -> None:
    sva = machine.ctx.alloc(Kind.SVA, pid=child.pid)
    machine.ctx.attach(RID, sva)
    at = child.map(PAGE)
    assert machine.ctx.get_info(sva).pid == child.pid
    told: list[Fault] = []
    machine.engine.on_fault(told.append)
    assert machine.port.store(at, 1, 8) is None
    child.kill()
    gone = machine.port.load(at, 8)
    assert isinstance(gone, Fault) and gone.reason is Reason.MEMORY_GONE
    assert told == [gone]
    assert machine.ctx.get_info(sva).pid is None, "the number may be another's by now"
    machine.ctx.detach(RID)
    machine.ctx.free(sva)
    assert refused(lambda: machine.ctx.alloc(Kind.SVA, pid=child.pid)) == errno.ESRCH


def test_what_it_is_and_what_is_legal(machine: Machine, child: HostProcess) -> None:
    sva = machine.ctx.alloc(Kind.SVA, pid=child.pid)
    info = machine.ctx.get_info(sva)
    assert (info.kind, info.format, info.parent, info.address_width, info.mappings) == (Kind.SVA, None, None, 47, 0)
    assert {name for name in info.commands if COMMANDS[name].kinds != set(Kind)} == set()
    for call in (
        lambda: machine.ctx.map_dma(sva, PAGE, PAGE, PAGE),
        lambda: machine.ctx.unmap_dma(sva, PAGE, PAGE),
        lambda: machine.ctx.create_nesting(sva),
        lambda: machine.ctx.invalidate_cache(sva),
        lambda: machine.ctx.alloc(Kind.SVA),
        lambda: machine.ctx.alloc(Kind.SVA, pid=child.pid, parent=machine.ctx.alloc()),
        lambda: machine.ctx.alloc(Kind.KERNEL, pid=child.pid),
        lambda: machine.ctx.alloc(Kind.SVA, pid=-1),
    ):
        assert refused(call) == errno.EINVAL


def test_what_is_no_process_of_ours(machine: Machine) -> None:
    before = machine.engine.core.counters().spaces
    descriptors = len(os.listdir("/proc/self/fd"))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert refused(lambda: machine.ctx.alloc(Kind.SVA, pid=ended.pid)) == errno.ESRCH
    assert refused(lambda: machine.ctx.alloc(Kind.SVA, pid=0)) == errno.ESRCH
    assert refused(lambda: machine.ctx.alloc(Kind.SVA, pid=(1 << 32) - 1)) == errno.ESRCH
    assert machine.engine.core.counters().spaces == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_thread_of_the_kernel_has_no_memory(machine: Machine) -> None:
    with open("/proc/2/status", encoding="ascii") as status:
        if "kthreadd" not in status.readline():
            pytest.skip("threads of the kernel are not to be seen here: run outside a container")
    assert refused(lambda: machine.ctx.alloc(Kind.SVA, pid=2)) in {errno.ESRCH, errno.EPERM}


ANOTHER = """
import errno, os, sys
from backend.ioasid import Engine, IoasidError, Kind
os.setresgid(65534, 65534, 65534); os.setgroups([]); os.setresuid(65534, 65534, 65534)
try:
    Engine().open().alloc(Kind.SVA, pid=int(sys.argv[1]))
except IoasidError as error:
    print(errno.errorcode[error.errno], error.sentence)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")
def test_another_users_process_is_refused(child: HostProcess) -> None:
    """As ptrace would: without the uid and without CAP_SYS_PTRACE."""
    answer = subprocess.run([sys.executable, "-c", ANOTHER, str(child.pid)], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("EPERM ALLOC: process "), answer


def test_processes_are_bounded_and_their_descriptors_given_back(machine: Machine) -> None:
    allow_descriptors(3 * MAX_PROCESSES)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(MAX_PROCESSES):
        machine.ctx.alloc(Kind.SVA, pid=os.getpid())
    assert refused(lambda: machine.ctx.alloc(Kind.SVA, pid=os.getpid())) == errno.ENOSPC
    machine.ctx.free(1)
    machine.ctx.alloc(Kind.SVA, pid=os.getpid())
    machine.ctx.close()
    assert machine.engine.processes == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_giant_mapping_gives_the_same(machine: Machine) -> None:
    """Gibson's question about the RFC: is SVA not one giant MAP of the address space onto itself?"""
    other = machine.engine.add_device(RID + 1, "other").port
    machine.ctx.bind_device(RID + 1)
    named = machine.ctx.alloc(Kind.SVA, pid=os.getpid())
    giant = machine.ctx.alloc()
    machine.ctx.map_dma(giant, LOW, LOW, END - LOW)
    machine.ctx.attach(RID, named)
    machine.ctx.attach(RID + 1, giant)
    ram = Ram(64 * PAGE)
    ram.poke(5, os.urandom(40 * PAGE))
    for offset, size in ((0, 1), (5, 7), (PAGE - 1, 2), (3, 30 * PAGE + 1), (0, 64 * PAGE)):
        assert machine.port.read(ram.hva + offset, size) == other.read(ram.hva + offset, size) == ram.peek(offset, size)
        data = os.urandom(size)
        assert machine.port.write(ram.hva + offset, data) is None
        assert other.read(ram.hva + offset, size) == data
        assert other.write(ram.hva + offset, data[::-1]) is None
        assert machine.port.read(ram.hva + offset, size) == data[::-1]
    assert machine.port.fetch_add(ram.hva, 3, 8) == other.fetch_add(ram.hva, 4, 8) - 3  # type: ignore[operator]
    os.ftruncate(ram.fd, 40 * PAGE)
    for iova in (ram.hva + 39 * PAGE, 0, 1 << 40, END - 2 * PAGE, END):
        one, two = machine.port.read(iova, 2 * PAGE), other.read(iova, 2 * PAGE)
        assert isinstance(one, Fault) and isinstance(two, Fault)
        assert (one.iova, one.done, one.access) == (two.iova, two.done, two.access), "the same byte cannot be had"
    assert machine.engine.core.counters().table_pages > 0, "the giant one has a table"
    machine.ctx.detach(RID + 1)
    machine.ctx.free(giant)
    assert machine.engine.core.counters().table_pages == 0, "the named one has none"
    assert machine.port.read(ram.hva, 8) == ram.peek(0, 8)
    ram.close()


def test_rights_of_an_attachment(machine: Machine, child: HostProcess) -> None:
    at = child.map(PAGE)
    machine.ctx.attach(RID, machine.ctx.alloc(Kind.SVA, pid=child.pid), access=Access.READ)
    assert machine.port.read(at, 4) == bytes(4)
    answer = machine.port.write(at, b"1234")
    assert isinstance(answer, Fault) and answer.reason is Reason.PERMISSION
