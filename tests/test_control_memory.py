"""Memory that a client shares as a memfd."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.control import shared_memory
from backend.control.session import ClientMemory
from backend.control.shared_memory import SharedMemory
from backend.core import RW, Access, Fault, Reason
from backend.ioasid import Context, Engine, IoasidError

PAGE = 0x1000
VADDR = 0x4000_0000
SIZE = 4 << 20


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("client", os.MFD_ALLOW_SEALING)
    os.ftruncate(made, SIZE)
    yield made
    os.close(made)


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    found = SharedMemory()
    yield found
    found.close()


def refused(shared: SharedMemory, fd: int, vaddr: int, size: int, offset: int = 0) -> int:
    with pytest.raises(IoasidError) as caught:
        shared.add(fd, vaddr, size, offset)
    assert caught.value.errno is not None
    return caught.value.errno


def test_it_is_the_clients_memory(shared: SharedMemory, fd: int) -> None:
    share = shared.add(fd, VADDR, SIZE - PAGE, PAGE)
    os.pwrite(fd, b"from the client", 3 * PAGE)
    assert ctypes.string_at(share.hva + 2 * PAGE, 15) == b"from the client"
    assert shared.vaddr_of(share.hva + 5) == VADDR + 5
    assert shared.vaddr_of(share.hva + SIZE) is None


def test_it_lies_so_that_large_leaves_fit(shared: SharedMemory, fd: int) -> None:
    for vaddr in (VADDR, VADDR + SIZE, 0x7F00_0012_3000):
        assert (shared.add(fd, vaddr, SIZE).hva - vaddr) % (2 << 20) == 0


def test_what_is_no_memory_is_refused(shared: SharedMemory, fd: int, tmp_path: Path) -> None:
    for vaddr, size, offset in (
        (VADDR + 1, PAGE, 0), (VADDR, 1, 0), (VADDR, 0, 0), (VADDR, PAGE, 8), (0, PAGE, 0), ((1 << 47) - PAGE, SIZE, 0),
        (VADDR, SIZE + PAGE, 0), (VADDR, SIZE, PAGE), (VADDR, PAGE, 1 << 62),
    ):  # fmt: skip
        assert refused(shared, fd, vaddr, size, offset) == errno.EINVAL
    # a file whose pages come from a disk, or from another process, could keep the server waiting
    for path in ("/dev/zero", "/proc/self/maps"):
        with open(path, "rb") as file:
            assert refused(shared, file.fileno(), VADDR, PAGE) == errno.EINVAL
    reader, writer = os.pipe()
    assert refused(shared, reader, VADDR, PAGE) == errno.EINVAL
    os.close(reader)
    os.close(writer)


def test_ranges_do_not_overlap(shared: SharedMemory, fd: int) -> None:
    shared.add(fd, VADDR, 2 * PAGE)
    for vaddr in (VADDR, VADDR + PAGE, VADDR - PAGE):
        assert refused(shared, fd, vaddr, 2 * PAGE) == errno.EEXIST
    shared.add(fd, VADDR + 2 * PAGE, PAGE)
    shared.remove(VADDR, 2 * PAGE)
    shared.add(fd, VADDR - PAGE, 2 * PAGE)
    with pytest.raises(IoasidError, match="is not what was shared"):
        shared.remove(VADDR, PAGE)


def test_how_many_there_can_be(shared: SharedMemory, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MAX_SHARES", 2)
    monkeypatch.setattr(shared_memory, "MAX_PLACES", 3)
    shared.add(fd, VADDR, PAGE)
    shared.add(fd, VADDR + PAGE, PAGE)
    assert refused(shared, fd, VADDR + 2 * PAGE, PAGE) == errno.ENOSPC
    shared.remove(VADDR, PAGE)
    shared.add(fd, VADDR, PAGE)
    shared.remove(VADDR, PAGE)
    assert refused(shared, fd, VADDR, PAGE) == errno.ENOSPC


def test_memory_that_may_not_be_written(shared: SharedMemory, fd: int) -> None:
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert not shared.add(reading, VADDR, PAGE).writable
    os.close(reading)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not shared.add(fd, VADDR + PAGE, PAGE).writable


@pytest.fixture
def mapped(fd: int) -> Iterator[tuple[Context, ClientMemory]]:
    """A device (RID 8) on an IOASID that maps the client's memory at IOVA 0."""
    engine = Engine()
    engine.add_device(8, "d")
    memory = ClientMemory()
    memory.shared.add(fd, VADDR, SIZE)
    context = engine.open(memory)
    context.alloc()
    context.bind_device(8)
    context.attach(8, 1)
    context.map_dma(1, 0, VADDR, SIZE)
    yield context, memory
    engine.close()
    memory.shared.close()


def test_dma_to_memory_that_the_client_takes_away_faults(mapped: tuple[Context, ClientMemory], fd: int) -> None:
    context, memory = mapped
    port = context.engine.devices[8].port
    assert port.write(PAGE, b"here") is None
    assert os.pread(fd, 4, PAGE) == b"here"
    os.ftruncate(fd, PAGE)
    lost = port.read(PAGE, 4)
    assert isinstance(lost, Fault) and lost.reason == Reason.MEMORY_GONE
    memory.shared.remove(VADDR, SIZE)
    lost = port.read(0, 4)
    assert isinstance(lost, Fault) and lost.reason == Reason.MEMORY_GONE


def test_read_only_memory_is_mapped_for_reading_alone(fd: int) -> None:
    engine = Engine()
    memory = ClientMemory()
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    memory.shared.add(reading, VADDR, SIZE)
    os.close(reading)
    context = engine.open(memory)
    context.alloc()
    with pytest.raises(IoasidError) as caught:
        context.map_dma(1, 0, VADDR, SIZE, RW)
    assert caught.value.errno == errno.EPERM
    context.map_dma(1, 0, VADDR, SIZE, Access.READ)
    engine.close()
    memory.shared.close()
