"""What a connection owns goes with it, however it goes, unless a device still needs it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
from control_serving import FIRST, SIZE, VADDR, Served, counts, memory, refusal, serving

from backend.control.binding import bind_all
from protocol import BlockingClient

PAGE = 0x1000
SECONDS = 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("lifetime") / "s", endpoints=8) as found:
        yield found


def settled(client: BlockingClient, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the engine holds, once it is what is wanted, or after a while what it is then."""
    deadline = time.monotonic() + SECONDS
    while (now := counts(client)) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return now


def whole_set(client: BlockingClient, rid: int) -> None:
    """An object of every kind: memory, IOASIDs, a table, a device, attachments, a hold, a subscription."""
    with memory(SIZE) as ram:
        ram.share(client)
    client.call("subscribe")
    client.call("ioasid.alloc")
    client.call("ioasid.map_dma", ioasid=1, iova=0, vaddr=VADDR, size=SIZE)
    client.call("ioasid.create_nesting", parent=1)
    client.call("ioasid.bind_pgtable", ioasid=2, root=0x3000, levels=3)
    client.call("endpoint.hold", rid=rid)
    client.call("vfio.bind_ioasid_fd", rid=rid)
    client.call("vfio.attach_ioasid", rid=rid, ioasid=1)
    client.call("vfio.attach_ioasid", rid=rid, ioasid=2)
    client.call("vfio.attach_ioasid", rid=rid, ioasid=2, pasid=7)
    client.call("endpoint.dma_read", rid=rid, iova=0, length=64)


def test_everything_goes_with_the_connection(served: Served) -> None:
    with served.client() as watcher:
        before = counts(watcher)
        with served.client() as client:
            whole_set(client, FIRST)
            during = counts(watcher)
            assert during["ioasids"] == before["ioasids"] + 2 and during["bound"] == [*before["bound"], FIRST]
            assert during["memfds"] == before["memfds"] + 1
        assert settled(watcher, before) == before


def test_a_device_that_somebody_holds_keeps_what_it_is_bound_to(served: Served) -> None:
    """As an open device file keeps the translation behind it when the file of /dev/ioasid is closed."""
    with served.client() as watcher, memory(SIZE) as ram:
        before = counts(watcher)
        with served.client() as holder:
            owner = served.client()
            assert refusal(holder, "endpoint.release", rid=FIRST)[0] == errno.ENOENT
            holder.call("endpoint.hold", rid=FIRST)
            ram.share(owner)
            owner.call("ioasid.alloc")
            owner.call("ioasid.map_dma", ioasid=1, iova=0, vaddr=VADDR, size=SIZE)
            owner.call("vfio.bind_ioasid_fd", rid=FIRST, cookie=3)
            owner.call("vfio.attach_ioasid", rid=FIRST, ioasid=1)
            ram.put(0x5000, b"kept")
            owner.close()
            while any("gone" not in each["name"] for each in watcher.call("vm.contexts")):
                time.sleep(0.01)
            answer = holder.call("endpoint.dma_read", rid=FIRST, iova=0x5000, length=4)
            assert answer == {"data": b"kept", "fault": None}
            assert refusal(holder, "vfio.bind_ioasid_fd", rid=FIRST)[0] == errno.EBUSY
            holder.call("endpoint.release", rid=FIRST)
            assert [each["ioasids"] for each in watcher.call("vm.contexts") if each["ioasids"]] == []
            gone = holder.call("endpoint.dma_read", rid=FIRST, iova=0x5000, length=4)
            assert gone["fault"]["reason"] == "NO_ROUTE"
        assert settled(watcher, before) == before


def test_another_connections_device_does_no_dma_for_us(served: Served) -> None:
    with served.client() as owner, served.client() as other:
        owner.call("vfio.bind_ioasid_fd", rid=FIRST)
        number, sentence = refusal(other, "endpoint.dma_read", rid=FIRST, iova=0, length=1)
        assert (number, "endpoint.hold" in sentence) == (errno.EPERM, True)


KILLED = """
import socket, sys, time
request = bytes.fromhex(sys.argv[2])
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(bytes.fromhex(sys.argv[3]))
count = int(sys.argv[4])
import msgpack
replies = msgpack.Unpacker()
while count:
    replies.feed(connection.recv(1 << 16))
    count -= sum(1 for _ in replies)
connection.sendall(request)
print("sent", flush=True)
time.sleep(100)
"""


def packed(*calls: tuple[str, dict[str, Any]]) -> bytes:
    return b"".join(msgpack.packb([0, number, method, [fields]]) for number, (method, fields) in enumerate(calls))


# Before each command, what it needs so as to be done and not refused; IOASID 1 is a kernel one, 2 its child.
BEGIN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ioasid.alloc", {}),
    ("ioasid.create_nesting", {"parent": 1}),
    ("vfio.bind_ioasid_fd", {"rid": FIRST}),
)
ATTACHED = (*BEGIN, ("vfio.attach_ioasid", {"rid": FIRST, "ioasid": 1}))
TRACKED = (*BEGIN, ("ioasid.set_dirty_tracking", {"ioasid": 1, "on": True}))
REGISTERED = (*BEGIN, ("ioasid.register_memory", {"vaddr": VADDR, "size": PAGE}))
MAPPED = (*ATTACHED, ("ioasid.map_dma", {"ioasid": 1, "iova": 0, "vaddr": VADDR, "size": 1 << 20}))
GCR3 = {"ioasid": 2, "root": 0x3000, "vendor": "amd-gcr3", "levels": 1}
CALLS: tuple[tuple[tuple[tuple[str, dict[str, Any]], ...], str, dict[str, Any]], ...] = (
    (BEGIN, "ioasid.check_extension", {"extension": "lookup"}),
    (BEGIN, "ioasid.register_memory", {"vaddr": VADDR, "size": PAGE}),
    (REGISTERED, "ioasid.unregister_memory", {"vaddr": VADDR, "size": PAGE}),
    (BEGIN, "ioasid.alloc", {"kind": "kernel", "levels": 5}),
    (BEGIN, "ioasid.alloc", {"kind": "sva", "pid": os.getpid()}),
    (BEGIN, "ioasid.alloc", {"kind": "vm"}),
    (BEGIN, "ioasid.alloc", {"kind": "user", "parent": 1, "root": 0x3000}),
    (BEGIN, "ioasid.free", {"ioasid": 2}),
    (BEGIN, "ioasid.get_info", {"ioasid": 2}),
    (BEGIN, "ioasid.map_dma", {"ioasid": 1, "iova": 0, "vaddr": VADDR, "size": 1 << 20}),
    (MAPPED, "ioasid.unmap_dma", {"ioasid": 1, "iova": 0, "size": 1 << 20}),
    (MAPPED, "ioasid.create_nesting", {"parent": 1, "kind": "kernel"}),
    (BEGIN, "ioasid.create_nesting", {"parent": 1}),
    (BEGIN, "ioasid.bind_pgtable", {"ioasid": 2, "root": 0x3000, "levels": 3}),
    ((*BEGIN, ("ioasid.bind_pgtable", {"ioasid": 2, "root": 0x3000})), "ioasid.unbind_pgtable", {"ioasid": 2}),
    (BEGIN, "ioasid.bind_pasid_table", GCR3),
    ((*BEGIN, ("ioasid.bind_pasid_table", GCR3)), "ioasid.unbind_pasid_table", {"ioasid": 2}),
    (BEGIN, "ioasid.invalidate_cache", {"ioasid": 2}),
    (BEGIN, "ioasid.lookup", {"ioasid": 2, "iova": 0}),
    (BEGIN, "ioasid.set_dirty_tracking", {"ioasid": 1, "on": True}),
    (TRACKED, "ioasid.get_dirty_bitmap", {"ioasid": 1, "iova": 0, "size": 1 << 30}),
    (ATTACHED, "ioasid.read_faults", {}),
    (ATTACHED, "ioasid.page_response", {"rid": FIRST, "group": 1, "code": "success"}),
    (BEGIN[:2], "vfio.bind_ioasid_fd", {"rid": FIRST}),
    (BEGIN, "vfio.unbind_ioasid_fd", {"rid": FIRST}),
    (BEGIN, "vfio.attach_ioasid", {"rid": FIRST, "ioasid": 1}),
    (ATTACHED, "vfio.attach_ioasid", {"rid": FIRST, "ioasid": 2, "pasid": 9}),
    (ATTACHED, "vfio.detach_ioasid", {"rid": FIRST}),
    (ATTACHED, "vfio.prefetch", {"rid": FIRST, "iova": 0, "size": 1 << 16}),
    (ATTACHED, "kvm.map_pasid", {"pasid": 9, "ioasid": 1}),
    (ATTACHED, "kvm.unmap_pasid", {"pasid": 9}),
    (ATTACHED, "endpoint.dma_read", {"rid": FIRST, "iova": 0, "length": 1 << 20}),
    (ATTACHED, "endpoint.dma_write", {"rid": FIRST, "iova": 0, "data": bytes(1 << 20)}),
    (ATTACHED, "endpoint.page_request", {"rid": FIRST, "iova": 0, "access": "w", "group": 1}),
    (BEGIN, "endpoint.hold", {"rid": FIRST}),
    (BEGIN, "subscribe", {}),
    (BEGIN, "vm.spaces", {}),
)


def test_no_command_is_left_out() -> None:
    assert {method for _, method, _ in CALLS} >= bind_all().keys()


@pytest.mark.parametrize(("before", "method", "fields"), CALLS, ids=[method for _, method, _ in CALLS])
@pytest.mark.parametrize("cut", [0.5, 1.0])
def test_a_client_killed_in_the_middle_of_a_command(
    served: Served, before: tuple[Any, ...], method: str, fields: dict[str, Any], cut: float
) -> None:
    """Killed with half of the request sent, or with all of it and the reply not read."""
    request = packed((method, fields))
    sent = request[: max(1, int(len(request) * cut))]
    with served.client() as watcher:
        begin = counts(watcher)
        # a request of 1 MiB is sent here, as no argument list holds it
        if len(sent) > 100_000:
            killed_here(served, packed(*before), len(before), sent)
        else:
            arguments = [str(served.path), sent.hex(), packed(*before).hex(), str(len(before))]
            with subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None and process.stdout.readline() == b"sent\n"
                process.send_signal(signal.SIGKILL)
        assert settled(watcher, begin) == begin
        assert watcher.call("hello")["version"] == 1


def killed_here(served: Served, before: bytes, count: int, request: bytes) -> None:
    """As a process that is killed: its socket is closed with replies unread, which resets the connection."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(served.path))
        connection.sendall(before)
        replies = msgpack.Unpacker()
        while count:
            replies.feed(connection.recv(1 << 16))
            count -= sum(1 for _ in replies)
        connection.sendall(request)


def test_a_thousand_connections_each_with_objects(served: Served) -> None:
    allowed = more_files(1200)
    try:
        with served.client() as watcher:
            before = counts(watcher)
            clients: list[BlockingClient] = []
            try:
                for _ in range(1000):
                    clients.append(client := served.client())
                    assert client.call("ioasid.alloc") == 1
                    with memory(PAGE) as page:  # closed at once: the server's mapping keeps it
                        page.share(client)
                    client.call("ioasid.map_dma", ioasid=1, iova=0, vaddr=VADDR, size=PAGE)
                    client.call("ioasid.map_dma", ioasid=1, iova=PAGE, vaddr=VADDR + PAGE, size=PAGE)  # not shared
                    assert client.call("ioasid.create_nesting", parent=1) == 2
                clients[0].call("vfio.bind_ioasid_fd", rid=FIRST)
                during = watcher.call("vm.status")
                assert (during["connections"], during["ioasids"]) == (1001, 2000)
                # all are served to the end, the last one too, and others are refused in words
                assert clients[-1].call("ioasid.get_info", ioasid=2)["parent"] == 1
            finally:
                for client in clients:
                    client.close()
            assert settled(watcher, before) == before
    finally:
        allowed()


def more_files(count: int) -> Callable[[], None]:
    """Let this process have so many files open; what to call afterwards."""
    import resource  # noqa: PLC0415

    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    if old[0] < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, old[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, old)


def test_a_server_that_ends_leaves_clients_nothing_to_wait_for(tmp_path: Any) -> None:
    with serving(tmp_path / "s") as ending:
        client = ending.client()
        whole_set(client, FIRST)
    with pytest.raises(ConnectionError):
        client.call("hello")
    client.close()
    assert not os.path.exists(tmp_path / "s")
