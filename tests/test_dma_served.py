"""The DMA engine as a VMM reaches it: over vfio-user, beside another function on the same loop."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from dma_driver import Host, Ring
from dma_header import VDMA
from paged_host import MIB
from pci_serving import IDENTITY, EduFunction, Serving
from vfio_user_client import MSIX, VfioUserClient, signals
from vfu import libvfio_user

from backend.vm.libvfio_user import LibvfioUser

__all__ = ["libvfio_user"]

GIB = 1 << 30


class ServedHost(Host):
    """A Host whose registers are reached by a client; its engine is used on the server's loop alone."""

    client: VfioUserClient | None = None

    def get(self, offset: int, size: int = 4) -> int:
        return super().get(offset, size) if self.client is None else self.client.read(VDMA["BAR"], offset, size)

    def put(self, offset: int, value: int, size: int = 4) -> None:
        assert self.client is not None
        self.client.write(VDMA["BAR"], offset, size, value, posted=True)


@pytest.fixture
def host(libvfio_user: LibvfioUser, tmp_path: Path) -> Iterator[ServedHost]:
    host = ServedHost()
    for gpa in range(0, 4 * GIB, 2 * MIB):  # 4 GiB of addresses, the same memory again and again
        host.context.map_dma(host.space, gpa, host.ram.hva + 4 * MIB, 2 * MIB)
    with Serving(libvfio_user.library) as serving:
        serving.serve(host.function, tmp_path / "dma.sock")
        serving.serve(EduFunction(), tmp_path / "edu.sock")
        with VfioUserClient(tmp_path / "dma.sock") as client:
            host.client = client
            client.set_config(0x04, 2, 0x0006)
            client.set_config(host.capability(0x11) + 2, 2, 0x8000)
            yield host
    host.close()


def test_a_job_and_its_interrupt(host: ServedHost) -> None:
    assert host.client is not None
    events = host.client.set_irqs(MSIX, host.reg("QUEUES"))
    assert [host.client.region_info(bar) for bar in (0, 2)] == [(3, 0x20000), (3, 0x1000)]
    ring, target = Ring(host, 3, 4), host.allocate()
    ring.start()
    where = ring.push("FILL", flags=VDMA["FLAG_INTERRUPT"], target=target, length=64, value=7)
    ring.doorbell()
    assert signals(events[3], seconds=5) == 1
    assert host.record(where).status == VDMA["STATUS_SUCCESS"]
    assert host.peek(target, 64) == struct.pack("<Q", 7) * 8
    assert [signals(event) for event in events] == [0] * 8


def test_endless_jobs_leave_others_their_turn(host: ServedHost, tmp_path: Path) -> None:
    """While every queue goes through 4 GiB again and again, registers of this function and of another one answer,
    doorbells are heard, and small jobs end."""
    rings = [Ring(host, number, 5) for number in range(8)]
    for ring in rings:
        ring.start()
        for _ in range(8):
            ring.push("CRC32", source=0, length=4 * GIB)
        ring.doorbell()
    with VfioUserClient(tmp_path / "edu.sock") as other:
        done = [host.reg("BYTES", 8)]
        for ring in rings * 3:
            assert other.read(0, IDENTITY, 4) == 0x010000ED
            ended = ring.get("COMPLETED")
            ring.push("NOP")
            ring.doorbell()
            while ring.get("COMPLETED") == ended:
                pass
            done.append(host.reg("JOBS", 8))
    assert done[-1] == 24
    assert [ring.get("HEAD") for ring in rings] == [11] * 8
    for ring in rings:
        ring.set("COMMAND", VDMA["COMMAND_ABORT"])
        assert ring.state == VDMA["STATE_DISABLED"]
    done = [host.reg("BYTES", 8) for _ in range(20)]
    assert done[0] == done[-1] > 0
