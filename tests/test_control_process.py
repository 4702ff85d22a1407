"""A client's own memory, reached in its process by a server in another one: this test is the client."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from control_serving import FIRST, Served, serving

from protocol import BlockingClient

DEVICE, OTHER = FIRST, FIRST + 8
PAGE = 0x1000
LOW, END = 1 << 32, 1 << 47
"""Where a process's memory lies: above what devices reserve."""


class Private:
    """Memory that nobody else maps."""

    def __init__(self, pages: int) -> None:
        self.map = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._anchor: Any = ctypes.c_char.from_buffer(self.map)
        self.vaddr = ctypes.addressof(self._anchor)

    def close(self) -> None:
        self._anchor = None
        self.map.close()


@contextmanager
def private(pages: int) -> Iterator[Private]:
    memory = Private(pages)
    try:
        yield memory
    finally:
        memory.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("process") / "s", endpoints=2) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[BlockingClient]:
    with served.client() as found:
        for rid in (DEVICE, OTHER):
            found.call("vfio.bind_ioasid_fd", rid=rid)
        yield found


def read(client: BlockingClient, rid: int, iova: int, length: int) -> Any:
    answer = client.call("endpoint.dma_read", rid=rid, iova=iova, length=length)
    return answer["fault"]["reason"] if answer["fault"] else answer["data"]


def test_memory_that_was_not_shared(client: BlockingClient, tmp_path: Path) -> None:
    with private(8) as memory:
        gpa = client.call("ioasid.alloc", kind="kernel")
        client.call("ioasid.map_dma", ioasid=gpa, iova=0, vaddr=memory.vaddr, size=8 * PAGE)
        client.call("vfio.attach_ioasid", rid=DEVICE, ioasid=gpa)
        memory.map[5:9] = b"here"
        assert read(client, DEVICE, 5, 4) == b"here"
        data = os.urandom(3 * PAGE)
        assert client.call("endpoint.dma_write", rid=DEVICE, iova=PAGE + 9, data=data) == {"fault": None}
        assert memory.map[PAGE + 9 : 4 * PAGE + 9] == data
        giova = client.call("ioasid.create_nesting", parent=gpa, kind="kernel")
        client.call("vfio.attach_ioasid", rid=DEVICE, ioasid=giova)
        client.call("ioasid.map_dma", ioasid=giova, iova=0x2000, vaddr=0, size=PAGE)
        assert read(client, DEVICE, 0x2005, 4) == b"here"
        client.call("ioasid.unmap_dma", ioasid=gpa, iova=0, size=8 * PAGE)
        assert read(client, DEVICE, 0x2005, 4) == "NOT_PRESENT"
        client.call("ioasid.map_dma", ioasid=gpa, iova=0, vaddr=memory.vaddr, size=8 * PAGE)
    assert read(client, DEVICE, 0x2005, 4) == "NOT_PRESENT", "the client has unmapped it"


def test_the_whole_process_by_name_and_by_one_giant_mapping(client: BlockingClient) -> None:
    named = client.call("ioasid.alloc", kind="sva", pid=os.getpid())
    client.call("vfio.attach_ioasid", rid=DEVICE, ioasid=named, pasid=7)
    giant = client.call("ioasid.alloc", kind="kernel")
    client.call("ioasid.map_dma", ioasid=giant, iova=LOW, vaddr=LOW, size=END - LOW)
    client.call("vfio.attach_ioasid", rid=OTHER, ioasid=giant)
    with private(40) as memory:
        for offset, size in ((0, 1), (PAGE - 1, 2), (7, 39 * PAGE)):
            data = os.urandom(size)
            memory.map[offset : offset + size] = data
            at = memory.vaddr + offset
            assert read(client, OTHER, at, size) == data
            answer = client.call("endpoint.dma_read", rid=DEVICE, iova=at, length=size, pasid=7)
            assert answer == {"data": data, "fault": None}
            for rid, pasid in ((DEVICE, 7), (OTHER, None)):
                data = os.urandom(size)
                answer = client.call("endpoint.dma_write", rid=rid, iova=at, data=data, pasid=pasid)
                assert answer == {"fault": None}
                assert memory.map[offset : offset + size] == data
        faults = [
            client.call("endpoint.dma_read", rid=DEVICE, iova=0x10, length=8, pasid=7)["fault"],
            client.call("endpoint.dma_read", rid=OTHER, iova=LOW, length=8)["fault"],
        ]
        assert [fault["reason"] for fault in faults] == ["NOT_PRESENT", "NOT_PRESENT"]
