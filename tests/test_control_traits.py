"""What each trait that `vioasid serve --no-vm` can be given changes, seen from a client in another process."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from control_serving import VADDR, Memory, Served, memory, refusal, serving

from protocol import BlockingClient

PAGE = 0x1000
SIZE = 0x100000
FILE = """
[[endpoint]]
name = "left"
rid = "02:00.0"
group = "slot"

[[endpoint]]
name = "right"
rid = 0x0201
group = "slot"

[[endpoint]]
name = "loud"
rid = "03:00.0"
snoop = false

[[endpoint]]
name = "mediated"
rid = "04:00.0"
pasid-mode = "per-rid"
pasid-bits = 2

[[endpoint]]
name = "narrow"
rid = "05:00.0"
address-width = 32
reserved = []
"""
OPTIONS = (
    "name=shared1,rid=06:00.0,pasid-mode=global",
    "name=shared2,rid=06:01.0,pasid-mode=global",
    "name=simple,rid=07:00.0,pasid-bits=0,formats=x86+ept",
    "name=holes,rid=0x0800,reserved=0x10000-0x10fff+0x20000-0x2ffff",
)
LEFT, RIGHT, LOUD, MEDIATED, NARROW = 0x0200, 0x0201, 0x0300, 0x0400, 0x0500
SHARED1, SHARED2, SIMPLE, HOLES = 0x0600, 0x0608, 0x0700, 0x0800


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("traits")
    (folder / "endpoints.toml").write_text(FILE)
    with serving(folder / "s", endpoints=folder / "endpoints.toml", more=OPTIONS) as found:
        assert found.endpoints == [LEFT, RIGHT, LOUD, MEDIATED, NARROW, SHARED1, SHARED2, SIMPLE, HOLES]
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[BlockingClient]:
    with served.client() as found:
        yield found


@pytest.fixture
def ram(client: BlockingClient) -> Iterator[Memory]:
    with memory(SIZE) as found:
        found.share(client)
        yield found


def mapped(client: BlockingClient, *bound: int, iova: int = 0, **fields: Any) -> int:
    """An IOASID over all the memory, and devices bound."""
    ioasid = client.call("ioasid.alloc", **fields)
    client.call("ioasid.map_dma", ioasid=ioasid, iova=iova, vaddr=VADDR, size=SIZE)
    for rid in bound:
        client.call("vfio.bind_ioasid_fd", rid=rid)
    assert isinstance(ioasid, int)
    return ioasid


def found_at(client: BlockingClient, rid: int, iova: int, **fields: Any) -> bytes | str:
    """Four bytes, or the reason of a fault."""
    answer = client.call("endpoint.dma_read", rid=rid, iova=iova, length=4, **fields)
    return answer["data"] if answer["fault"] is None else str(answer["fault"]["reason"])


def test_a_group_moves_together(served: Served, client: BlockingClient, ram: Memory) -> None:
    ram.put(PAGE, b"both")
    ioasid = mapped(client, LEFT)
    with served.client() as other:
        assert refusal(other, "vfio.bind_ioasid_fd", rid=RIGHT)[0] == errno.EBUSY
    client.call("vfio.bind_ioasid_fd", rid=RIGHT)
    assert client.call("ioasid.get_info", rid=LEFT)["group_rids"] == [LEFT, RIGHT]
    assert {each["name"]: each["group"] for each in client.call("endpoint.list")}["right"] == "slot"
    client.call("vfio.attach_ioasid", rid=LEFT, ioasid=ioasid)
    assert found_at(client, LEFT, PAGE) == "BLOCKED", "the other one is not attached yet"
    client.call("vfio.attach_ioasid", rid=RIGHT, ioasid=ioasid)
    assert found_at(client, LEFT, PAGE) == found_at(client, RIGHT, PAGE) == b"both"
    assert refusal(client, "vfio.unbind_ioasid_fd", rid=LEFT)[0] == errno.EBUSY
    client.call("vfio.detach_ioasid", rid=LEFT)
    assert found_at(client, RIGHT, PAGE) == "BLOCKED"
    code, sentence = refusal(client, "vfio.unbind_ioasid_fd", rid=LEFT)
    assert (code, "right" in sentence) == (errno.EBUSY, True)


def test_dma_that_cannot_be_made_to_snoop(client: BlockingClient, ram: Memory) -> None:
    coherent = mapped(client, LOUD, enforce_snoop=True)
    assert client.call("ioasid.get_info", rid=LOUD)["snoop"] is False
    code, sentence = refusal(client, "vfio.attach_ioasid", rid=LOUD, ioasid=coherent)
    assert (code, "cannot be made to snoop" in sentence) == (errno.EINVAL, True)
    ram.put(0, b"loud")
    client.call("vfio.attach_ioasid", rid=LOUD, ioasid=mapped(client))
    assert found_at(client, LOUD, 0) == b"loud"


def test_pasids_of_a_mediated_device_come_from_its_rids_pool(client: BlockingClient, ram: Memory) -> None:
    """Two bits of PASID: three physical ones, whatever their numbers in the guest."""
    ram.put(2 * PAGE, b"mine")
    ioasid = mapped(client, MEDIATED)
    client.call("vfio.attach_ioasid", rid=MEDIATED, ioasid=ioasid)
    assert client.call("endpoint.pasid", rid=MEDIATED, pasid=700) == {"physical": None, "enqcmd": None}
    assert refusal(client, "vfio.attach_ioasid", rid=MEDIATED, ioasid=ioasid, pasid=1)[0] == errno.EINVAL
    for vpasid in (700, 800, 900):
        client.call("vfio.attach_ioasid", rid=MEDIATED, ioasid=ioasid, vpasid=vpasid)
    assert refusal(client, "vfio.attach_ioasid", rid=MEDIATED, ioasid=ioasid, vpasid=5)[0] == errno.ENOSPC
    physical = {client.call("endpoint.pasid", rid=MEDIATED, pasid=each)["physical"] for each in (700, 800, 900)}
    assert physical == {1, 2, 3}
    assert found_at(client, MEDIATED, 2 * PAGE, pasid=800) == b"mine"
    # what is told of a request carries the number that the guest knows
    fault = client.call("endpoint.dma_read", rid=MEDIATED, iova=SIZE, length=1, pasid=800)["fault"]
    assert (fault["pasid"], fault["reason"]) == (800, "NOT_PRESENT")
    client.call("vfio.detach_ioasid", rid=MEDIATED, vpasid=800)
    assert client.call("endpoint.pasid", rid=MEDIATED, pasid=800)["physical"] is None
    client.call("vfio.attach_ioasid", rid=MEDIATED, ioasid=ioasid, vpasid=5)


def test_one_physical_pasid_for_all_devices_that_the_cpu_submits_to(
    served: Served, client: BlockingClient, ram: Memory
) -> None:
    ram.put(0, b"work")
    ioasid = mapped(client, SHARED1, SHARED2)
    for rid in (SHARED1, SHARED2):
        client.call("vfio.attach_ioasid", rid=rid, ioasid=ioasid)
    client.call("vfio.attach_ioasid", rid=SHARED1, ioasid=ioasid, vpasid=9)
    physical = client.call("endpoint.pasid", rid=SHARED1, pasid=9)["physical"]
    assert physical != 9
    client.call("vfio.attach_ioasid", rid=SHARED2, ioasid=ioasid, vpasid=9)
    assert client.call("endpoint.pasid", rid=SHARED2, pasid=9) == {"physical": physical, "enqcmd": None}
    client.call("kvm.map_pasid", pasid=9, ioasid=ioasid)
    assert client.call("endpoint.pasid", rid=SHARED2, pasid=9) == {"physical": physical, "enqcmd": physical}
    assert found_at(client, SHARED1, 0, pasid=physical) == found_at(client, SHARED1, 0, pasid=9) == b"work"
    with served.client() as other:
        assert refusal(other, "endpoint.pasid", rid=SHARED1, pasid=9)[0] == errno.EPERM
    client.call("vfio.detach_ioasid", rid=SHARED1, vpasid=9)
    assert client.call("endpoint.pasid", rid=SHARED2, pasid=9)["enqcmd"] == physical
    client.call("vfio.detach_ioasid", rid=SHARED2, vpasid=9)
    assert client.call("endpoint.pasid", rid=SHARED2, pasid=9) == {"physical": None, "enqcmd": None}


def test_each_vm_has_global_pasids_of_its_own(served: Served) -> None:
    """Each connection is a VM of its own; both use PASID 9."""
    with served.client() as one, served.client() as two:
        found = []
        for client, rid in ((one, SHARED1), (two, SHARED2)):
            client.call("vfio.bind_ioasid_fd", rid=rid)
            ioasid = client.call("ioasid.alloc")
            client.call("vfio.attach_ioasid", rid=rid, ioasid=ioasid)
            client.call("vfio.attach_ioasid", rid=rid, ioasid=ioasid, vpasid=9)
            found.append(client.call("endpoint.pasid", rid=rid, pasid=9)["physical"])
        assert found[0] != found[1]


def test_a_whole_device_shows_its_pasids(client: BlockingClient) -> None:
    client.call("vfio.bind_ioasid_fd", rid=LOUD)
    assert client.call("ioasid.get_info", rid=LOUD)["pasid_mode"] == "whole"
    assert client.call("endpoint.pasid", rid=LOUD, pasid=9)["physical"] == 9


def test_an_endpoint_counts_as_far_as_it_can(client: BlockingClient, ram: Memory) -> None:
    ram.put(0, b"high")
    top = (1 << 32) - SIZE
    ioasid = mapped(client, NARROW, iova=top)
    client.call("vfio.attach_ioasid", rid=NARROW, ioasid=ioasid)
    assert client.call("ioasid.get_info", rid=NARROW)["permitted"] == [{"first": 0, "last": (1 << 32) - 1}]
    assert found_at(client, NARROW, top) == b"high"
    code, sentence = refusal(client, "endpoint.dma_read", rid=NARROW, iova=1 << 32, length=4)
    assert (code, "32 bits" in sentence) == (errno.EINVAL, True)
    assert refusal(client, "endpoint.dma_copy", rid=NARROW, iova=top, target=1 << 32, length=4)[0] == errno.EINVAL
    code, _ = refusal(client, "ioasid.map_dma", ioasid=ioasid, iova=1 << 32, vaddr=VADDR, size=PAGE)
    assert code == errno.EADDRINUSE
    assert refusal(client, "vfio.attach_ioasid", rid=NARROW, ioasid=mapped(client, iova=1 << 40))[0] != 0
    # and it reserves nothing, not even what an x86 IOMMU takes for interrupts
    client.call("ioasid.map_dma", ioasid=ioasid, iova=0xFEE00000, vaddr=VADDR, size=PAGE)


def test_reserved_ranges(client: BlockingClient, ram: Memory) -> None:
    ioasid = client.call("ioasid.alloc")
    client.call("vfio.bind_ioasid_fd", rid=HOLES)
    permitted = [(each["first"], each["last"]) for each in client.call("ioasid.get_info", rid=HOLES)["permitted"]]
    assert permitted == [(0, 0xFFFF), (0x11000, 0x1FFFF), (0x30000, (1 << 64) - 1)]
    client.call("ioasid.map_dma", ioasid=ioasid, iova=0x2F000, vaddr=VADDR, size=2 * PAGE)
    assert refusal(client, "vfio.attach_ioasid", rid=HOLES, ioasid=ioasid)[0] == errno.EADDRINUSE
    client.call("ioasid.unmap_dma", ioasid=ioasid, iova=0x2F000, size=2 * PAGE)
    client.call("vfio.attach_ioasid", rid=HOLES, ioasid=ioasid)
    for iova, code in ((0x10000, errno.EADDRINUSE), (0x2F000, errno.EADDRINUSE), (0xF000, 0), (0x30000, 0)):
        fields = {"ioasid": ioasid, "iova": iova, "vaddr": VADDR, "size": PAGE}
        if code:
            assert refusal(client, "ioasid.map_dma", **fields)[0] == code
        else:
            client.call("ioasid.map_dma", **fields)


def test_formats_and_no_pasids(client: BlockingClient, ram: Memory) -> None:
    client.call("vfio.bind_ioasid_fd", rid=SIMPLE)
    assert [each["vendor"] for each in client.call("ioasid.get_info", rid=SIMPLE)["formats"]] == ["x86", "ept"]
    code, sentence = refusal(client, "vfio.attach_ioasid", rid=SIMPLE, ioasid=mapped(client))
    assert (code, "cannot walk amd-v1" in sentence) == (errno.EINVAL, True)
    ioasid = mapped(client, vendor="ept")
    client.call("vfio.attach_ioasid", rid=SIMPLE, ioasid=ioasid)
    assert refusal(client, "vfio.attach_ioasid", rid=SIMPLE, ioasid=ioasid, pasid=1)[0] == errno.EINVAL
