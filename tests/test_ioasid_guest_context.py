"""A context opened for a guest: it names no process and no memory of the host, and learns no address of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1, Guest, refused

from backend.core import FOREIGN, RW, Access, Fault, HostProcess, Reason
from backend.ioasid import Context, IoasidError, Kind, PgtableFormat, open_process

DATA, TABLES = 0x5000, 0x8000


@pytest.fixture
def guest() -> Iterator[Guest]:
    """Its RAM is the VM's memory."""
    made = Guest()
    made.ctx.close()
    made.engine.vm_memory.map(0, made.ram.hva, made.ram.size, RW)
    yield made
    made.engine.vm_memory.unmap(0, made.ram.size)
    made.close()


@pytest.fixture
def ctx(guest: Guest) -> Context:
    """IOASID 1 stands for the VM's memory, dev1 is on it."""
    context = guest.engine.open(guest=True)
    context.bind_device(DEV1)
    context.alloc(Kind.VM)
    context.attach(DEV1, 1)
    return context


def sentence(error: pytest.ExceptionInfo[IoasidError]) -> str:
    assert error.value.errno == errno.EPERM
    return error.value.sentence


def test_no_process_of_the_host(ctx: Context) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for pid in (os.getpid(), 1, 1 << 30):
        with pytest.raises(IoasidError) as error:
            ctx.alloc(Kind.SVA, pid=pid)
        assert "no processes of the host" in sentence(error), "whether there is one is not told"
    assert (ctx.ioasids, len(os.listdir("/proc/self/fd"))) == ([1], before)


def test_no_memory_of_the_host(ctx: Context, guest: Guest) -> None:
    ctx.alloc()
    commands: list[Callable[[], None]] = [
        lambda: ctx.map_dma(2, 0, guest.ram.hva, PAGE),
        lambda: ctx.map_dma(2, 0, 0x1000, PAGE),
        lambda: ctx.register_memory(guest.ram.hva, PAGE),
    ]
    for command in commands:
        with pytest.raises(IoasidError) as error:
            command()
        assert "addresses of the host" in sentence(error)
    assert ctx.get_info(2).mappings == 0
    assert not ctx.pinned.exclusive


def test_what_it_maps_is_its_vms_memory(ctx: Context, guest: Guest) -> None:
    """Software nesting beneath the IOASID that stands for it, which follows it as it goes."""
    child = ctx.create_nesting(1, Kind.KERNEL)
    ctx.map_dma(child, 0x10000, DATA, PAGE)
    ctx.attach(DEV1, child)
    guest.ram.poke(DATA, b"its own")
    assert guest.dev1.port.read(0x10000, 7) == b"its own"
    guest.engine.vm_memory.unmap(0, guest.ram.size)
    answer = guest.dev1.port.read(0x10000, 7)
    assert isinstance(answer, Fault) and answer.reason == Reason.NOT_PRESENT
    guest.engine.vm_memory.map(0, guest.ram.hva, guest.ram.size, RW)


class Marked:
    """A front end's own idea of where a guest's addresses lie: half of them in some process."""

    def __init__(self, hva: int, process: HostProcess) -> None:
        self._hva = hva
        self.process = process

    def hva(self, vaddr: int, size: int, access: Access) -> int:
        return vaddr | FOREIGN if vaddr >= 1 << 32 else self._hva + vaddr

    def vaddr(self, hva: int) -> int | None:
        return hva - self._hva


def test_a_front_ends_memory_is_taken_but_never_a_processs(guest: Guest) -> None:
    process = open_process(os.getpid())
    context = guest.engine.open(Marked(guest.ram.hva, process.memory), guest=True)
    context.alloc()
    context.map_dma(1, 0, DATA, PAGE)
    assert refused(lambda: context.map_dma(1, PAGE, 1 << 40, PAGE)) == errno.EPERM
    assert refused(lambda: context.register_memory(1 << 40, PAGE)) == errno.EPERM
    process.close()


def test_a_look_shows_what_is_its_own(ctx: Context, guest: Guest) -> None:
    tables = guest.tables(TABLES)
    tables.map(0x2000, DATA)
    child = ctx.create_nesting(1)
    ctx.bind_pgtable(child, tables.root, PgtableFormat())
    path = ctx.lookup(child, 0x2000)
    assert [step.level for step in path.steps] == [4, 3, 2, 1]
    assert {step.stage for step in path.steps} == {1}
    assert path.steps[-1].output == DATA
    assert not isinstance(path.result, Fault)
    assert (path.result.gpa, path.result.hva) == (DATA, 0)
    assert ctx.lookup(1, DATA).steps == ()
    # where our table ends is told, what it holds is not
    memory = guest.engine.vm_memory
    memory.unmap(0, guest.ram.size)
    memory.map(0, guest.ram.hva, guest.ram.size, Access.READ)
    ended = ctx.lookup(child, 0x2000, access=Access.WRITE).result
    assert isinstance(ended, Fault)
    assert (ended.reason, ended.stage, ended.gpa, ended.entry) == (Reason.PERMISSION, 2, DATA, 0)
    host = guest.engine.open()
    host.alloc(Kind.VM)
    path = host.lookup(1, DATA, access=Access.WRITE)
    assert {step.stage for step in path.steps} == {2}, "others see them"
    assert isinstance(path.result, Fault) and path.result.entry
