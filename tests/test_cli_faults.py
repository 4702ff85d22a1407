"""`vioasid faults`, those that are kept and those to come."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from control_serving import COMMAND, FIRST, SECONDS, Served, serving, vioasid

from protocol import Connection, Server


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "s", endpoints=2) as found:
        yield found


def test_a_fault_in_a_line(served: Served) -> None:
    with served.client() as client:
        client.call("ioasid.alloc", kind="kernel")
        client.call("vfio.bind_ioasid_fd", rid=FIRST)
        client.call("vfio.attach_ioasid", rid=FIRST, ioasid=1)
        client.call("ioasid.map_dma", ioasid=1, iova=0, vaddr=0x10000, size=0x10000)
        client.call("ioasid.create_nesting", parent=1)
        client.call("ioasid.bind_pgtable", ioasid=2, root=0x100000, levels=3)
        client.call("vfio.attach_ioasid", rid=FIRST, ioasid=2)
        client.call("endpoint.dma_read", rid=FIRST, iova=0x5000, length=4)
        client.call("endpoint.dma_write", rid=FIRST, iova=0x5000, data=b"x", pasid=7)
        (context,) = client.call("vm.contexts")
    socket_option = ["--socket", str(served.path)]
    first, second = vioasid("faults", *socket_option).stdout.splitlines()
    assert first.partition(" ")[2] == (
        f"#1 sw0 01:00.0: read at IOVA 0x5000, IOASID 2 of context {context['context']}: NOT_PRESENT, "
        "stage 2 level 1, GPA 0x100000"  # in the 2 MiB that have a table already
    )
    assert second.partition(" ")[2] == "#2 sw0 01:00.0 PASID 7: write at IOVA 0x5000, no IOASID: NO_ROUTE"
    faults = json.loads(vioasid("faults", "--json", *socket_option).stdout)["faults"]
    assert [(each["iova"], each["reason"], each["device"], each["pasid"]) for each in faults] == [
        (0x5000, "NOT_PRESENT", "sw0", None), (0x5000, "NO_ROUTE", "sw0", 7),
    ]  # fmt: skip


def test_faults_that_are_yet_to_come(tmp_path: Path) -> None:
    with serving(tmp_path / "s", endpoints=1) as served, served.client() as client:
        client.call("endpoint.dma_read", rid=FIRST, iova=0x1000, length=1)
        command = [*COMMAND, "faults", "--follow", "--json", "--socket", str(served.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            assert json.loads(following.stdout.readline())["iova"] == 0x1000
            client.call("endpoint.dma_read", rid=FIRST, iova=0x2000, length=1)
            assert json.loads(following.stdout.readline())["iova"] == 0x2000
            served.process.terminate()  # the run ends, and so does what follows it
            assert following.stdout.readline() == ""
            assert following.wait(SECONDS) == 0
        served.process.wait(SECONDS)


class Told:
    """A connection to a server where a fault comes between the subscription and the look at those that are kept."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def subscribe(self, fields: Mapping[str, Any]) -> list[str]:
        assert fields == {"topics": ["vm.fault"]}
        return ["vm.fault"]

    def faults(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        del fields
        for number in (2, 3):
            self.connection.notify("vm.fault", {"number": number})
        asyncio.get_running_loop().call_soon(self.connection.close, 108, "that was all")
        return {"faults": [{"number": 1}, {"number": 2}], "lost": 0, "more": False}

    def closed(self) -> None:
        pass


async def test_a_fault_that_is_kept_and_told_is_said_once(tmp_path: Path) -> None:
    methods = {"subscribe": Told.subscribe, "vm.faults": Told.faults}
    server = Server(methods, tmp_path / "s", on_connect=Told)
    await server.start()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "faults", "--follow", "--json", "--socket", str(server.path), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    await server.close()
    assert [json.loads(line)["number"] for line in out.splitlines()] == [1, 2, 3]
