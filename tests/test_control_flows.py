"""The flows of section 5 of the RFC, with its numbers, through the RPC of another process.

GPA [0, 1G) stands at HVA 0x40000000; the guest maps GIOVA 0x2000 to GPA 0x1000. So what a device finds at 0x2000 lies
at HVA 0x40001000.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_serving import FIRST, SIZE, VADDR, Memory, Served, memory, refusal, serving

from protocol import BlockingClient

DEV1, DEV2 = FIRST, FIRST + 8
GIOVA, GPA, PAGE = 0x2000, 0x1000, 0x1000
ROOT = 0x3000
# AMD v1 (48882, 2.2.3): a page of 4 KiB at level 1, present (bit 0), readable (61) and writable (62)
LEAF = GPA | 1 | 1 << 61 | 1 << 62


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("flows") / "s", endpoints=2) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[BlockingClient]:
    with served.client() as found:
        yield found


@pytest.fixture
def ram(client: BlockingClient) -> Iterator[Memory]:
    with memory() as found:
        found.share(client)
        yield found


def gpa_space(client: BlockingClient, *devices: int) -> int:
    """An IOASID that stands for the VM's memory, its devices attached."""
    ioasid = client.call("ioasid.alloc", kind="kernel")
    client.call("ioasid.map_dma", ioasid=ioasid, iova=0, vaddr=VADDR, size=SIZE)
    for cookie, rid in enumerate(devices, 1):
        client.call("vfio.bind_ioasid_fd", rid=rid, cookie=cookie)
        client.call("vfio.attach_ioasid", rid=rid, ioasid=ioasid)
    assert isinstance(ioasid, int)
    return ioasid


def reads(client: BlockingClient, rid: int, iova: int, length: int) -> bytes:
    answer = client.call("endpoint.dma_read", rid=rid, iova=iova, length=length)
    assert answer["fault"] is None
    data = answer["data"]
    assert isinstance(data, bytes)
    return data


def reason(client: BlockingClient, rid: int, iova: int) -> str:
    return str(client.call("endpoint.dma_read", rid=rid, iova=iova, length=1)["fault"]["reason"])


def test_a_simple_example(client: BlockingClient, ram: Memory) -> None:
    """5.1: both devices on the IOASID of the VM's memory."""
    gpa_space(client, DEV1, DEV2)
    ram.put(GPA, b"from the guest")
    assert reads(client, DEV1, GPA, 14) == b"from the guest"
    assert client.call("endpoint.dma_write", rid=DEV2, iova=GPA, data=b"from device two") == {"fault": None}
    assert ram.get(GPA, 15) == b"from device two"
    assert reason(client, DEV1, SIZE) == "NOT_PRESENT"


def test_multiple_ioasids_without_nesting(client: BlockingClient, ram: Memory) -> None:
    """5.2: device two leaves gpa for giova, into which the VMM maps what the guest's table says, as a shadow."""
    gpa_space(client, DEV1, DEV2)
    giova = client.call("ioasid.alloc", kind="kernel")
    assert refusal(client, "vfio.attach_ioasid", rid=DEV2, ioasid=giova)[0] == errno.EBUSY
    client.call("vfio.detach_ioasid", rid=DEV2)
    client.call("vfio.attach_ioasid", rid=DEV2, ioasid=giova)
    client.call("ioasid.map_dma", ioasid=giova, iova=GIOVA, vaddr=0x4000_1000, size=PAGE)
    ram.put(GPA, b"shadow")
    assert reads(client, DEV2, GIOVA, 6) == b"shadow"
    assert reason(client, DEV2, GPA) == "NOT_PRESENT"
    assert reads(client, DEV1, GPA, 6) == b"shadow"


def test_software_nesting(client: BlockingClient, ram: Memory) -> None:
    """5.3: giova is a child of gpa, attached on top of it; what is mapped into it are GPAs, merged by the host."""
    gpa = gpa_space(client, DEV1, DEV2)
    giova = client.call("ioasid.create_nesting", parent=gpa, kind="kernel")
    client.call("vfio.attach_ioasid", rid=DEV2, ioasid=giova)
    client.call("ioasid.map_dma", ioasid=giova, iova=GIOVA, vaddr=GPA, size=PAGE)
    ram.put(GPA, b"merged")
    assert reads(client, DEV2, GIOVA, 6) == b"merged"
    # the parent's mapping goes, and takes what the child saw of it
    client.call("ioasid.unmap_dma", ioasid=gpa, iova=0, size=SIZE)
    assert reason(client, DEV2, GIOVA) == "NOT_PRESENT"
    client.call("ioasid.map_dma", ioasid=gpa, iova=0, vaddr=VADDR, size=SIZE)
    assert reads(client, DEV2, GIOVA, 6) == b"merged"


def test_hardware_nesting(client: BlockingClient, ram: Memory) -> None:
    """5.4: giova is a child whose table the guest keeps in its own memory, and tells when it changed it."""
    gpa = gpa_space(client, DEV1, DEV2)
    giova = client.call("ioasid.create_nesting", parent=gpa)
    client.call("vfio.attach_ioasid", rid=DEV2, ioasid=giova)
    ram.put(ROOT + 8 * (GIOVA // PAGE), LEAF.to_bytes(8, "little"))
    client.call("ioasid.bind_pgtable", ioasid=giova, root=ROOT, vendor="amd-v1", levels=1)
    ram.put(GPA, b"nested")
    assert reads(client, DEV2, GIOVA, 6) == b"nested"
    assert reads(client, DEV1, GPA, 6) == b"nested"
    # the guest unmaps, then invalidates
    ram.put(ROOT + 8 * (GIOVA // PAGE), bytes(8))
    client.call("ioasid.invalidate_cache", ioasid=giova, granularity="range", iova=GIOVA, size=PAGE)
    fault = client.call("endpoint.dma_write", rid=DEV2, iova=GIOVA, data=b"x")["fault"]
    assert (fault["reason"], fault["stage"], fault["level"], fault["gpa"]) == ("NOT_PRESENT", 1, 1, ROOT + 0x10)
    assert (fault["rid"], fault["ioasid"], fault["iova"], fault["access"]) == (DEV2, giova, GIOVA, "w")


def test_a_child_by_one_alloc_is_the_same(client: BlockingClient, ram: Memory) -> None:
    gpa = gpa_space(client, DEV2)
    ram.put(ROOT + 8 * (GIOVA // PAGE), LEAF.to_bytes(8, "little"))
    giova = client.call("ioasid.alloc", kind="user", parent=gpa, root=ROOT, vendor="amd-v1", levels=1)
    client.call("vfio.attach_ioasid", rid=DEV2, ioasid=giova)
    ram.put(GPA, b"at once")
    assert reads(client, DEV2, GIOVA, 7) == b"at once"


def test_guest_sva(client: BlockingClient, ram: Memory) -> None:
    """5.5: device one stays on gpa for its own requests, and reaches a process of the guest by PASID."""
    gpa = gpa_space(client, DEV1)
    gva = client.call("ioasid.create_nesting", parent=gpa)
    ram.put(ROOT + 8 * (GIOVA // PAGE), LEAF.to_bytes(8, "little"))
    client.call("ioasid.bind_pgtable", ioasid=gva, root=ROOT, vendor="amd-v1", levels=1)
    client.call("vfio.attach_ioasid", rid=DEV1, ioasid=gva, pasid=5)
    ram.put(GPA, b"of the process")
    answer = client.call("endpoint.dma_read", rid=DEV1, iova=GIOVA, length=14, pasid=5)
    assert answer == {"data": b"of the process", "fault": None}
    assert reads(client, DEV1, GPA, 14) == b"of the process"
    stray = client.call("endpoint.dma_read", rid=DEV1, iova=GIOVA, length=14, pasid=6)
    assert stray["data"] is None and stray["fault"]["reason"] == "NO_ROUTE" and stray["fault"]["pasid"] == 6


def test_the_addresses_are_the_clients_own(client: BlockingClient, ram: Memory, tmp_path: Path) -> None:
    """What is no memory of the client's, or shared in parts, is refused; no address of the server's is ever needed."""
    ioasid = client.call("ioasid.alloc")
    for vaddr in (0, (1 << 47) - PAGE, VADDR - PAGE, VADDR + SIZE - PAGE):
        number, sentence = refusal(client, "ioasid.map_dma", ioasid=ioasid, iova=0, vaddr=vaddr, size=2 * PAGE)
        assert (number, f"{vaddr:#x}" in sentence) == (errno.EFAULT, True)


def test_the_look_up_shows_the_golden_numbers(client: BlockingClient, ram: Memory) -> None:
    """GIOVA 0x2000 -> GPA 0x1000 -> HVA 0x40001000, the last of which is the client's own address."""
    gpa = gpa_space(client, DEV1)
    ram.put(ROOT + 8 * (GIOVA // PAGE), LEAF.to_bytes(8, "little"))
    giova = client.call("ioasid.alloc", kind="user", parent=gpa, root=ROOT, vendor="amd-v1", levels=1)
    path = client.call("ioasid.lookup", ioasid=giova, iova=GIOVA + 0x123)
    assert (path["ioasid"], path["parent"], path["stage1"]) == (giova, gpa, "amd-v1")
    assert (path["result"]["gpa"], path["result"]["hva"]) == (GPA + 0x123, 0x4000_1123)
    assert [step["address"] for step in path["steps"] if step["stage"] == 1] == [ROOT + 0x10]
    missing = client.call("ioasid.lookup", ioasid=giova, iova=0x5000)["result"]
    assert (missing["reason"], missing["stage"], missing["gpa"]) == ("NOT_PRESENT", 1, ROOT + 0x28)


def test_an_io_page_fault(client: BlockingClient, ram: Memory) -> None:
    """5.6: a device asks for a page; the record goes to the user, the guest mends its table, the answer goes back."""
    gpa = gpa_space(client, DEV1)
    gva = client.call("ioasid.create_nesting", parent=gpa)
    client.call("ioasid.bind_pgtable", ioasid=gva, root=ROOT, vendor="amd-v1", levels=1)
    client.call("vfio.attach_ioasid", rid=DEV1, ioasid=gva, pasid=5)
    client.call("subscribe", topics=["ioasid.ready"])
    results: list[Any] = []
    path = Path(client.call("vm.status")["socket"])
    asking = threading.Thread(target=lambda: results.append(ask_for_a_page(path, GIOVA + 0x10, pasid=5)), daemon=True)
    asking.start()
    told = client.notification(30)
    assert told is not None and told.method == "ioasid.ready"
    (record,) = client.call("ioasid.read_faults")["records"]
    assert (record["recoverable"], record["rid"], record["pasid"], record["cookie"]) == (True, DEV1, 5, 1)
    assert (record["ioasid"], record["iova"], record["access"], record["group"]) == (gva, GIOVA, "w", 3)
    assert record["last"] is True
    ram.put(ROOT + 8 * (GIOVA // PAGE), LEAF.to_bytes(8, "little"))
    client.call("ioasid.page_response", rid=DEV1, group=3, code="success", pasid=5)
    asking.join(30)
    assert results == [{"code": "success"}]
    assert client.call("endpoint.dma_write", rid=DEV1, iova=GIOVA, data=b"mended", pasid=5) == {"fault": None}
    assert ram.get(GPA, 6) == b"mended"
    assert refusal(client, "ioasid.page_response", rid=DEV1, group=3, code="success", pasid=5)[0] == errno.ENOENT


def ask_for_a_page(path: Path, iova: int, pasid: int) -> Any:
    """As the device: by a connection of its own, which holds it."""
    with BlockingClient(path) as device:
        device.call("endpoint.hold", rid=DEV1)
        return device.call("endpoint.page_request", rid=DEV1, iova=iova, access="w", group=3, pasid=pasid)


def test_page_requests_without_an_answer_end(client: BlockingClient, ram: Memory) -> None:
    """At once where nobody could answer, and when the device leaves."""
    gpa = gpa_space(client, DEV1)
    ask: dict[str, Any] = {"rid": DEV1, "iova": GIOVA, "access": "r", "group": 1}
    assert client.call("endpoint.page_request", pasid=9, **ask) == {"code": "invalid"}
    gva = client.call("ioasid.create_nesting", parent=gpa)
    client.call("vfio.attach_ioasid", rid=DEV1, ioasid=gva, pasid=9)
    assert client.call("endpoint.page_request", pasid=9, last=False, **ask) == {"code": None}
    results = client.call_many(
        [
            ("endpoint.page_request", {**ask, "pasid": 9}),
            ("vfio.detach_ioasid", {"rid": DEV1, "pasid": 9}),
        ]
    )
    assert results == [{"code": "invalid"}, None]


def test_a_pasid_table(client: BlockingClient, ram: Memory) -> None:
    """5.7: the guest's own PASID table, AMD's GCR3 table here (48882, 2.2.6): one entry of 8 bytes a PASID."""
    gpa = gpa_space(client, DEV1)
    child = client.call("ioasid.create_nesting", parent=gpa)
    gcr3, top, pasid = 0x10000, 0x11000, 5
    ram.put(gcr3 + 8 * pasid, (top | 1).to_bytes(8, "little"))
    tables = [top, 0x12000, 0x13000, 0x14000]  # x86, four levels, for addresses below 2 MiB
    for level, table in enumerate(tables[:-1]):
        ram.put(table, (tables[level + 1] | 7).to_bytes(8, "little"))
    ram.put(tables[-1] + 8 * (GIOVA // PAGE), (GPA | 7).to_bytes(8, "little"))
    client.call("ioasid.bind_pasid_table", ioasid=child, root=gcr3, vendor="amd-gcr3", levels=1)
    client.call("vfio.attach_ioasid", rid=DEV1, ioasid=child)
    ram.put(GPA, b"by its own table")
    answer = client.call("endpoint.dma_read", rid=DEV1, iova=GIOVA, length=16, pasid=pasid)
    assert answer == {"data": b"by its own table", "fault": None}
    assert client.call("endpoint.dma_read", rid=DEV1, iova=GIOVA, length=1, pasid=6)["fault"]["pasid_table"] is True
    # another PASID comes: the guest writes its entry, and needs to tell nobody; it goes, and must
    ram.put(gcr3 + 8 * pasid, bytes(8))
    entries = [{"granularity": "pasid", "pasid": pasid}, {"granularity": "nonsense"}]
    done = client.call("ioasid.invalidate_cache", ioasid=child, entries=entries)
    assert (done["done"], done["errno"]) == (1, errno.EOPNOTSUPP)
    assert client.call("endpoint.dma_read", rid=DEV1, iova=GIOVA, length=1, pasid=pasid)["fault"] is not None


def test_a_process_by_its_pid(client: BlockingClient) -> None:
    """The client's whole address space, without sharing anything."""
    here = ctypes.create_string_buffer(b"in this process", 64)
    ioasid = client.call("ioasid.alloc", kind="sva", pid=os.getpid())
    client.call("vfio.bind_ioasid_fd", rid=DEV1)
    client.call("vfio.attach_ioasid", rid=DEV1, ioasid=ioasid)
    where = ctypes.addressof(here)
    assert reads(client, DEV1, where, 15) == b"in this process"
    assert client.call("endpoint.dma_write", rid=DEV1, iova=where, data=b"IN") == {"fault": None}
    assert here.value == b"IN this process"
    assert refusal(client, "ioasid.map_dma", ioasid=ioasid, iova=0, vaddr=PAGE, size=PAGE)[0] == errno.EINVAL


def test_dirty_pages_and_registered_memory(client: BlockingClient, ram: Memory) -> None:
    client.call("ioasid.register_memory", vaddr=VADDR, size=SIZE)
    gpa = gpa_space(client, DEV1)
    client.call("ioasid.set_dirty_tracking", ioasid=gpa, on=True)
    client.call("endpoint.dma_write", rid=DEV1, iova=3 * PAGE, data=b"x")
    bits = client.call("ioasid.get_dirty_bitmap", ioasid=gpa, iova=0, size=8 * PAGE)
    assert bits == bytes([0b1000])
    assert client.call("ioasid.get_dirty_bitmap", ioasid=gpa, iova=0, size=8 * PAGE) == b"\0"
    assert refusal(client, "ioasid.unregister_memory", vaddr=VADDR, size=SIZE)[0] == errno.EBUSY
