"""A backend without a QEMU: which IOMMU is asked about which device, and what is said of a guest that did nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.core import Access, Fault, Reason
from backend.endpoints.nvme import Namespace
from backend.ioasid import Code, PageResponse
from backend.viommu.amd.commands import CompletePpr
from backend.vm import machine
from backend.vm.backend import Backend
from backend.vm.sva_side import SvaSide


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Backend]:
    """The machine with two IOMMUs, each function on the bus that SeaBIOS would give it; nothing listens."""
    found = machine.load("q35-amd-two")
    disks = {name: Namespace.in_memory(1 << 20) for name in ("nvme0", "nvme1", "nvme2")}
    sockets = {each.name: tmp_path / each.name for each in found.functions}
    backend = Backend(found, sockets, disks)
    yield backend
    backend.memory.close()
    backend.engine.close()
    for disk in disks.values():
        disk.close()


def rid_of(backend: Backend, name: str) -> int:
    return next(each.rid for each in backend.machine.functions if each.name == name)


def test_each_endpoint_has_its_iommu(two: Backend) -> None:
    behind = {name: two.iommu_of(rid_of(two, name)).name for name in two.endpoints}
    assert behind == {
        "nvme0": "iommu0", "nvme1": "iommu1", "nvme2": "iommu1", "dma0": "iommu1", "dma1": "iommu0",
    }  # fmt: skip
    assert two.iommus["iommu0"].endpoints == {0x100, 0x48}
    assert two.iommus["iommu1"].endpoints == {0x200, 0x28, 0x300}


def test_requests_before_the_guest_has_turned_its_iommus_on_go_by_our_table(two: Backend) -> None:
    """There is no memory: they find nothing, and count as what the endpoint did, not as what the guest translated."""
    for name in two.endpoints:
        device = two.engine.devices[rid_of(two, name)]
        device.port.enabled = lambda: True
        fault = device.port.read(0x1000, 8)
        assert isinstance(fault, Fault) and fault.reason == Reason.NOT_PRESENT
        assert (two.meters[name].traffic().faults, two.meters[name].traffic().translations) == (1, 0)
    assert two.traffic().faults == len(two.endpoints)
    path = two.look_up(rid_of(two, "nvme1"), 0x1000)
    assert path is not None and path.stage1 is None and isinstance(path.result, Fault)


def test_an_iommus_own_requests_are_nobodys_to_route(two: Backend) -> None:
    assert not two.engine.find_route(rid_of(two, "iommu0"), None)
    assert not two.engine.find_route(0x7777, None)


async def test_a_guest_that_used_no_pasid_fails(two: Backend) -> None:
    side = SvaSide(two)
    assert [(check.name, check.status) for check in side.checks()] == [("sva/pasids", "fail")]


async def test_what_is_missing_of_shared_virtual_addressing_is_named(two: Backend) -> None:
    """One group, refused because the device has no route for PASIDs: it was answered, and nothing else happened."""
    side, heard = SvaSide(two), list[PageResponse]()
    device = two.engine.devices[rid_of(two, "dma0")]
    two.pages.request(device, 5, 0x7000, Access.READ, group=1, last=True, answer=heard.append)
    assert [each.code for each in heard] == [Code.INVALID]
    found = {check.name: check.status for check in side.checks()}
    assert found == {
        "sva/pasids": "pass",
        "sva/page-requests": "pass",
        "sva/device-tlb": "fail",
        "sva/accessed-dirty": "skip",
        "sva/translated-requests": "fail",
        "sva/events": "pass",
    }


def test_an_endpoint_notes_answers_that_it_does_not_wait_for(two: Backend) -> None:
    """UPRGI in the PRI status of the one that it is for (PCI Express 5.0, 10.5.2.3); what has no PRI notes nothing."""
    config = two.endpoints["dma0"].config
    pri, ats = (config.find(capability, extended=True) or 0 for capability in (0x13, 0x0F))
    config.write(ats + 6, 2, 0x8000)
    config.write(pri + 4, 2, 1)
    log = two.iommus["iommu1"].ppr_log
    log.complete(CompletePpr(rid_of(two, "nvme1"), 3, 0, None))
    assert not config.read(pri + 6, 2) & 2
    log.complete(CompletePpr(rid_of(two, "dma0"), 3, 0, None))
    assert config.read(pri + 6, 2) & 2 and log.unexpected == 2
