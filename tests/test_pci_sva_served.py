"""ATS, PASID and PRI as a client of the vfio-user socket sees and switches them, as Linux in a guest does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pci_serving import Serving
from pci_sva import (
    EXP_DEVCTL,
    EXP_FLR,
    EXT_ATS,
    EXT_PASID,
    EXT_PRI,
    PASID_CAP,
    PRI_CTRL,
    PRI_ENABLE,
    PRI_MAX_REQ,
    PRI_PASID,
    PRI_RESET,
    PRI_STATUS,
    PRI_STOPPED,
    Asked,
    Machine,
    Registers,
)
from vfio_user_client import VfioUserClient
from vfu import libvfio_user

from backend.core import Fault, Reason
from backend.ioasid import Code
from backend.pci import ResetKind
from backend.vm.libvfio_user import LibvfioUser

__all__ = ["libvfio_user"]

AT = 0x7F12_3456_7000


class ClientConfig:
    """Config space over the socket."""

    def __init__(self, client: VfioUserClient) -> None:
        self._client = client

    def read(self, offset: int, size: int) -> int:
        return self._client.config(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._client.set_config(offset, size, value)


class Served:
    """A machine whose function is served; everything of the engine's happens on the loop's thread."""

    def __init__(self, serving: Serving, path: Path) -> None:
        self.machine = Machine()
        self.machine.function.reset(ResetKind.DEVICE)
        self.machine.processes[1].map(AT, self.machine.data)
        self.machine.ram.poke(self.machine.data, b"here")
        self._serving = serving
        serving.serve(self.machine.function, path)
        self.client = VfioUserClient(path)
        self.registers = Registers(ClientConfig(self.client))

    def on_loop(self, act: Callable[[], object]) -> object:
        return self._serving.call(act)

    def read(self) -> object:
        answer = self.on_loop(lambda: self.machine.memory.read(AT, 4, 1))
        return answer.reason if isinstance(answer, Fault) else answer

    def gone(self) -> None:
        """The client goes away, and the server has noticed."""
        self.client.close()
        self._serving.wait_for(lambda: self._serving.disconnects > 0, "the client is gone")


@pytest.fixture
def served(libvfio_user: LibvfioUser, tmp_path: Path) -> Iterator[Served]:
    with Serving(libvfio_user.library) as serving:
        served = Served(serving, tmp_path / "sva.sock")
        yield served
        served.client.close()
    served.machine.close()


def test_what_linux_finds_and_enables(served: Served) -> None:
    registers = served.registers
    assert registers.read(EXT_PASID, PASID_CAP) == 8 << 8
    assert registers.read(EXT_ATS, 4) == 0x20, "32 invalidations, pages"
    assert registers.read(EXT_PRI, PRI_STATUS) == PRI_PASID | PRI_STOPPED
    assert registers.read(EXT_PRI, PRI_MAX_REQ, 4) == 32
    assert served.read() == Reason.PASID_OFF
    registers.enable_ats()
    registers.enable_pasid()
    assert served.read() == Reason.BUS_MASTER_OFF
    registers.reset_pri()
    registers.enable_pri()
    registers.set_master()
    assert served.read() == b"here" and served.machine.kept() == 1
    registers.set_master(False)
    assert served.read() == Reason.BUS_MASTER_OFF


def test_posted_writes_and_bytes(served: Served) -> None:
    """A register may be written by its bytes, and in a dword with its neighbour."""
    registers, client = served.registers, served.client
    ats, pasid, pri = (registers.find(each) for each in (EXT_ATS, EXT_PASID, EXT_PRI))
    client.write(7, ats + 7, 1, 0x80, posted=True)
    client.write(7, pasid + 4, 4, 1 << 16, posted=True)
    client.write(7, 4, 1, 4, posted=True)
    assert served.read() == b"here" and served.machine.kept() == 1
    client.set_config(pri + 12, 4, 7)
    client.set_config(pri + 4, 4, PRI_ENABLE)
    requests = served.machine.function.page_requests
    assert requests is not None and served.on_loop(lambda: requests.capacity) == 7
    client.set_config(ats + 4, 4, 0)
    assert served.machine.kept() == 0 and not served.on_loop(lambda: requests.usable)


def test_a_flood_of_switches_is_harmless(served: Served) -> None:
    registers, client = served.registers, served.client
    ats, pasid, pri = (registers.find(each) for each in (EXT_ATS, EXT_PASID, EXT_PRI))
    for number in range(300):
        client.write(7, ats + 6, 2, 0xFFFF * (number & 1), posted=True)
        client.write(7, pasid + 6, 2, 0xFFFF * (number >> 1 & 1), posted=True)
        client.write(7, pri + PRI_CTRL, 2, number & 3, posted=True)
        client.write(7, pri + 12, 4, number * 0x01234567 & 0xFFFF_FFFF, posted=True)
    assert registers.read(EXT_PRI, PRI_CTRL) in {0, PRI_ENABLE}, "Reset reads as 0"
    registers.disable_pri()
    registers.write(EXT_PRI, PRI_CTRL, PRI_RESET)
    assert registers.pri_status & PRI_STOPPED


def ask(served: Served) -> Asked:
    served.registers.enable_all()
    asked = Asked(served.machine.function)
    assert served.on_loop(lambda: asked.ask("sent", 32, pasid=1)) and served.on_loop(lambda: asked.ask("waits"))
    assert served.read() == b"here"
    assert asked.answers == []
    return asked


def test_a_function_level_reset(served: Served) -> None:
    asked = ask(served)
    function = served.machine.function
    served.client.set_config((function.config.find(0x10) or 0) + EXP_DEVCTL, 2, EXP_FLR)
    assert asked.answers == [("sent", Code.FAILURE), ("waits", Code.FAILURE)]
    assert function.tlb is None and served.machine.guest.dev1.tlb is None
    assert served.read() == Reason.PASID_OFF


def test_a_client_that_goes_leaves_nothing_behind(served: Served) -> None:
    asked = ask(served)
    served.gone()
    assert asked.answers == [("sent", Code.FAILURE), ("waits", Code.FAILURE)]
    function = served.machine.function
    assert function.tlb is None and served.machine.guest.dev1.tlb is None and not function.bus_master
    waiting = served.on_loop(lambda: served.machine.guest.ctx.faults.waiting)
    assert waiting == 32, "the guest's IOMMU has them still"


def test_the_next_client_finds_it_as_new(served: Served, tmp_path: Path) -> None:
    fresh = served.client.read_bytes(7, 0, 4096)
    ask(served)
    served.gone()
    with VfioUserClient(tmp_path / "sva.sock") as client:
        assert client.read_bytes(7, 0, 4096) == fresh
        Registers(ClientConfig(client)).enable_all()
        asked = Asked(served.machine.function)
        assert served.on_loop(lambda: asked.ask("next", 32, pasid=1)) and served.read() == b"here"
