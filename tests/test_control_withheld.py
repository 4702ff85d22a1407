"""A client whose memory does not come waits alone: others are served, and nothing of it is left when it goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
from control_serving import FIRST, SIZE, VADDR, Served, counts, memory, serving
from withheld_memory import PAGE, Withholding, helpers_of, threads_of, withholding

from protocol import BlockingClient

DEVICE, OTHER = FIRST, FIRST + 8
SECONDS = 30
KEPT = 4
"""Helpers, and threads, that are kept when they have nothing to do."""

SERVER = """
import asyncio, signal, sys
from pathlib import Path
from backend.control.alone import EngineAlone, usual_endpoints
from backend.core import Core

async def main():
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    alone = EngineAlone(Path(sys.argv[1]), usual_endpoints(40), Core(patience=3600))
    await alone.start()
    print("ready", flush=True)
    await over.wait()
    await alone.close()

asyncio.run(main())
"""


@contextmanager
def patient(path: Path) -> Iterator[Served]:
    """A server that waits for withheld pages for an hour: whoever waits with it fails its test. It must end well."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Served(path, process, [FIRST + 8 * index for index in range(40)])
    finally:
        process.terminate()
        try:
            _, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, err) == (0, "")
    assert helpers_of(process.pid) == 0


@pytest.fixture
def child() -> Iterator[Withholding]:
    with withholding() as child:
        yield child


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with patient(tmp_path / "s") as found:
        yield found


class Raw:
    """A connection whose requests are sent without waiting for replies."""

    def __init__(self, served: Served, child: Withholding, rid: int = DEVICE) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(served.path))
        self._unpacker = msgpack.Unpacker()
        self._sent = 0
        self.rid = rid
        self.send("ioasid.alloc", kind="sva", pid=child.pid)
        self.send("vfio.bind_ioasid_fd", rid=rid)
        self.send("vfio.attach_ioasid", rid=rid, ioasid=1)
        for _ in range(3):
            assert self.reply()[1] is None

    def send(self, method: str, **fields: Any) -> None:
        self._sent += 1
        self._socket.sendall(msgpack.packb([0, self._sent, method, [fields]]))

    def read(self, iova: int, length: int = 8) -> None:
        self.send("endpoint.dma_read", rid=self.rid, iova=iova, length=length)

    def write(self, iova: int, data: bytes) -> None:
        self.send("endpoint.dma_write", rid=self.rid, iova=iova, data=data)

    def reply(self) -> tuple[int, Any, Any]:
        """Number, error and result of the next one."""
        while True:
            for kind, number, error, result in self._unpacker:
                assert kind == 1
                return number, error, result
            data = self._socket.recv(1 << 16)
            assert data, "the server has ended the connection"
            self._unpacker.feed(data)

    @property
    def waits(self) -> bool:
        """Whether no reply has come."""
        time.sleep(0.05)
        self._socket.setblocking(False)
        try:
            self._unpacker.feed(self._socket.recv(1 << 16))
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(SECONDS)
        return False

    def end(self) -> None:
        """Send no more."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


def settled(client: BlockingClient, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the server holds, once it is what is wanted, or after a while what it is then."""
    deadline = time.monotonic() + SECONDS
    while (now := held(client)) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return now


def held(client: BlockingClient) -> dict[str, Any]:
    """Helpers and threads beyond those that are kept, and all that counts() tells."""
    found = counts(client)
    server = client.call("vm.status")["pid"]
    return {**found, "helpers": max(helpers_of(server), KEPT), "threads": max(threads_of(server), 1 + KEPT)}


def test_others_are_served_meanwhile(served: Served, child: Withholding) -> None:
    """Pipelined commands, DMA, changes of other spaces, of any number of other connections."""
    at = child.userfault(16 * PAGE)
    stuck = [Raw(served, child, FIRST + 8 * (2 + index)) for index in range(32)]
    for index, each in enumerate(stuck):
        page = at + index % 16 * PAGE
        if index % 2:
            each.read(page)
        else:
            each.write(page, b"8 bytes.")
    assert all(each.waits for each in stuck)
    fine = child.private(PAGE)
    with served.client() as client, memory(SIZE) as ram:
        ram.share(client)
        client.call("ioasid.alloc")
        client.call("vfio.bind_ioasid_fd", rid=DEVICE)
        client.call("vfio.attach_ioasid", rid=DEVICE, ioasid=1)
        for page in range(50):
            client.call("ioasid.map_dma", ioasid=1, iova=page * PAGE, vaddr=VADDR, size=PAGE)
            answer = client.call("endpoint.dma_write", rid=DEVICE, iova=page * PAGE + page, data=b"x")
            assert answer == {"fault": None}
            client.call("ioasid.unmap_dma", ioasid=1, iova=page * PAGE, size=PAGE)
        assert ram.get(0, 50) == b"x" * 50
        sva = client.call("ioasid.alloc", kind="sva", pid=child.pid)
        client.call("vfio.attach_ioasid", rid=DEVICE, ioasid=sva, pasid=5)
        for data in (b"one", b"two"):
            client.call("endpoint.dma_write", rid=DEVICE, iova=fine, data=data, pasid=5)
            answer = client.call("endpoint.dma_read", rid=DEVICE, iova=fine, length=3, pasid=5)
            assert answer == {"data": data, "fault": None}
    assert all(each.waits for each in stuck)
    child.supply(at, 16 * PAGE, 0x61)
    for index, each in enumerate(stuck):
        assert each.reply()[2] == ({"data": b"a" * 8, "fault": None} if index % 2 else {"fault": None})
        each.close()


def test_a_connections_requests_keep_their_order(served: Served, child: Withholding) -> None:
    at, fine = child.userfault(2 * PAGE), child.private(PAGE)
    client = Raw(served, child)
    client.write(fine, b"first...")
    client.write(at, b"second..")
    client.read(at)
    client.read(fine)
    client.write(fine, b"last....")
    client.send("vfio.detach_ioasid", rid=DEVICE)
    client.read(fine)
    assert client.reply() == (4, None, {"fault": None})
    assert client.waits
    assert child.read(fine, 8) == b"first...", "what comes after it waits"
    child.supply(at, PAGE)
    assert client.reply() == (5, None, {"fault": None})
    assert client.reply() == (6, None, {"data": b"second..", "fault": None})
    assert client.reply() == (7, None, {"data": b"first...", "fault": None})
    assert client.reply() == (8, None, {"fault": None})
    assert client.reply() == (9, None, None)
    number, error, result = client.reply()
    assert (number, error, result["fault"]["reason"]) == (10, None, "NO_ROUTE")
    assert child.read(fine, 8) == b"last...."
    client.close()


def test_more_than_is_read_while_it_waits(served: Served, child: Withholding) -> None:
    """A client that goes on sending is read from again when its turn has come."""
    at, fine = child.userfault(PAGE), child.private(1 << 20)
    client = Raw(served, child)
    client.read(at)
    client._socket.settimeout(0.2)
    sent = 0
    try:
        while sent < 40:
            client.write(fine, bytes([sent]) * 100_000)
            sent += 1
    except TimeoutError:
        pass
    client._socket.settimeout(SECONDS)
    assert 0 < sent < 40, "it was read from without a bound"
    child.supply(at, PAGE)
    for number in range(4, 4 + sent + 1):
        assert client.reply()[0] == number
    client.close()


def test_the_end_of_what_a_client_sends_is_not_its_end(served: Served, child: Withholding) -> None:
    at = child.userfault(PAGE)
    client = Raw(served, child)
    client.read(at)
    client.send("ioasid.get_info", ioasid=1)
    client.end()
    assert client.waits
    child.supply(at, PAGE, 0x62)
    assert client.reply() == (4, None, {"data": b"b" * 8, "fault": None})
    assert client.reply()[0] == 5
    with pytest.raises(AssertionError, match="ended the connection"):
        client.reply()
    client.close()


def test_the_device_is_taken_away(served: Served, child: Withholding) -> None:
    """By whoever owns the context, while another connection's DMA goes through it."""
    at = child.userfault(PAGE)
    owner = Raw(served, child)
    with served.client() as holder, served.client() as watcher:
        holder.call("endpoint.hold", rid=DEVICE)
        other = Raw(served, child, OTHER)
        other.send("endpoint.hold", rid=DEVICE)
        assert other.reply()[1] is None
        other.rid = DEVICE
        other.write(at, b"too late")
        assert other.waits
        owner.send("vfio.detach_ioasid", rid=DEVICE)
        assert owner.reply()[1] is None
        child.supply(at, PAGE, 0x63)
        assert other.reply()[2]["fault"]["reason"] == "NO_ROUTE"
        assert child.read(at, 8) == b"c" * 8
        assert watcher.call("vm.faults")["faults"][-1]["reason"] == "NO_ROUTE"
    owner.close()
    other.close()


CLIENT = """
import sys, time
sys.path[:0] = [sys.argv[1]]
from test_control_withheld import *
class Child: pid = int(sys.argv[3])
client = Raw(Served(Path(sys.argv[2]), None, []), Child)
(client.read if sys.argv[5] == "read" else lambda at: client.write(at, b"8 bytes."))(int(sys.argv[4]))
client.send("ioasid.get_info", ioasid=1)
print("sent", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_client_killed_in_the_middle_leaves_nothing(served: Served, child: Withholding, kind: str) -> None:
    at = child.userfault(4 * PAGE)
    with served.client() as watcher:
        before = held(watcher)
        tests = str(Path(__file__).parent)
        for _ in range(3):
            command = [sys.executable, "-c", CLIENT, tests, str(served.path), str(child.pid), str(at), kind]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None and client.stdout.readline() == "sent\n"
                while not helpers_of(served.process.pid):
                    time.sleep(0.01)
                os.kill(client.pid, signal.SIGKILL)
            assert settled(watcher, before) == before
    child.supply(at, PAGE, 0x64)
    assert child.read(at, 8) == b"d" * 8


def test_the_process_dies_in_the_middle(served: Served, child: Withholding) -> None:
    client = Raw(served, child)
    client.read(child.userfault(PAGE))
    assert client.waits
    child.kill()
    client.reply()
    client.read(PAGE)
    assert client.reply()[2]["fault"]["reason"] == "MEMORY_GONE"
    client.close()


def test_the_server_ends_in_the_middle(tmp_path: Path, child: Withholding) -> None:
    with patient(tmp_path / "s") as served:
        clients = [Raw(served, child, FIRST + 8 * index) for index in range(6)]
        at = child.userfault(PAGE)
        for client in clients:
            client.read(at)
        assert all(client.waits for client in clients)
    for client in clients:
        client.close()


def test_it_ends_in_a_fault_as_the_server_is_usually_run(tmp_path: Path, child: Withholding) -> None:
    with serving(tmp_path / "s", endpoints=2) as served, served.client() as watcher:
        at = child.userfault(4 * PAGE)
        client = Raw(served, child)
        child.supply(at, PAGE, 0x65)
        client.read(at + 4, PAGE)
        number, _, result = client.reply()
        fault = result["fault"]
        assert (number, result["data"]) == (4, None)
        assert (fault["reason"], fault["iova"], fault["done"]) == ("WITHHELD", at + PAGE, PAGE - 4)
        told = watcher.call("vm.faults")["faults"]
        assert [(each["reason"], each["iova"]) for each in told] == [("WITHHELD", at + PAGE)]
        client.send("endpoint.fetch_add", rid=DEVICE, iova=at + PAGE, value=1, width=8)
        assert client.reply()[2]["fault"]["reason"] == "UNSUPPORTED", "without a look at the page"
        client.close()
