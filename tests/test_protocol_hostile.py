"""Clients that mean ill: each may harm its own connection, no other notices, and nothing of it is left."""

import contextlib
import errno
import gc
import logging
import os
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from rpc_serving import RawClient, RpcServing
from victim import Victim

from protocol import Limits
from protocol import server as server_module

PATIENCE = 1.0
"""Seconds in which every request of another client must be answered. A stalled loop takes all the time there is."""


def victim_of(path: Path) -> Victim:
    """Another client."""
    client = RawClient(path)

    def ask(number: int) -> None:
        assert client.ask(number, "add", a=number, b=1)[3] == number + 1

    return Victim(ask, client.socket.close, patience=PATIENCE)


@pytest.fixture
def serving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[RpcServing]:
    """A server that after all that a test does has as many descriptors, tasks and sessions as before."""
    caplog.set_level(logging.CRITICAL, logger="protocol.server")
    with RpcServing(tmp_path / "rpc.sock") as made:
        gc.collect()
        before = made.call(lambda: len(os.listdir("/proc/self/fd")))
        with victim_of(made.path):
            yield made
        made.wait_until_alone()
        assert made.call(lambda: len(os.listdir("/proc/self/fd"))) == before


def ending(client: RawClient) -> int:
    """The errno with which the server ended the connection."""
    messages = client.rest()
    assert messages, "the connection ended without a word"
    kind, method, [fields] = messages[-1]
    assert (kind, method) == (2, "closing")
    assert fields["sentence"]
    number: int = fields["errno"]
    return number


# -- Bytes that are ill ------------------------------------------------------------------------------------------------

FATAL = {
    "no MessagePack": (b"\xc1" * 100, errno.EPROTO),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", errno.EPROTO),
    "a value that is no message": (b"\xa5hello", errno.EPROTO),
    "a msgid that is too wide": (msgpack.packb([0, 1 << 32, "add", []]), errno.EPROTO),
    "arrays within each other": (b"\x91" * 5000, errno.EPROTO),
    "a message that is too long": (b"\x94\x00\x01\xc6\x7f\xff\xff\xff" + bytes(2 << 20), errno.EMSGSIZE),
    "an array of 4 billion": (b"\xdd\xff\xff\xff\xff" + bytes(2 << 20), errno.EMSGSIZE),
}


@pytest.mark.parametrize(("data", "number"), FATAL.values(), ids=FATAL.keys())
def test_bytes_that_are_no_messages_end_the_connection(serving: RpcServing, data: bytes, number: int) -> None:
    with RawClient(serving.path) as client:
        with contextlib.suppress(ConnectionError):
            client.socket.sendall(msgpack.packb([0, 1, "add", [{"a": 1, "b": 2}]]) + data)
        assert client.receive() == [1, 1, None, 3]  # what came before was answered
        assert ending(client) == number


@pytest.mark.parametrize("length", [1, 5, 10, 14])
def test_a_truncated_request_leaves_nothing(serving: RpcServing, length: int) -> None:
    with RawClient(serving.path) as client:
        client.socket.sendall(msgpack.packb([0, 1, "add", [{"a": 1, "b": 2}]])[:length])
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == []


def test_deep_and_ill_requests_are_answered(serving: RpcServing) -> None:
    deep: list[object] = []
    for _ in range(400):
        deep = [deep]
    with RawClient(serving.path) as client:
        client.send([0, 1, "echo", [{"deep": deep}]])
        assert client.receive()[2][0] == errno.EINVAL
        assert client.ask(2, "add", a=1, b=2)[3] == 3


def test_random_bytes_harm_nobody(serving: RpcServing) -> None:
    for seed in range(60):
        with RawClient(serving.path) as client:
            with contextlib.suppress(ConnectionError):
                client.socket.sendall(bytes([0x94, 0x00, seed]) + random.Random(seed).randbytes(200))
                client.socket.shutdown(socket.SHUT_WR)
            client.rest()


def test_what_a_message_claims_is_not_allocated(serving: RpcServing) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clients = [RawClient(serving.path) for _ in range(50)]
    for client in clients:
        client.socket.sendall(b"\x94\x00\x01\xa1m" + b"\xdd\x0f\xff\xff\xff" * 800)
    with RawClient(serving.path) as other:
        assert other.ask(1, "add", a=1, b=2)[3] == 3
    for client in clients:
        client.socket.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB; claimed: 10 TB


@pytest.mark.parametrize("value", [b"\x80", b"\x90", b"\xd4\x01\x00", b"\x81\xa1a\x80", b"\xa0"])
def test_a_million_values_stall_nobody(serving: RpcServing, value: bytes) -> None:
    """To build a MiB of empty arrays takes a second."""
    count = (1 << 20) // len(value)
    with RawClient(serving.path) as client:
        for msgid in range(5):
            client.socket.sendall(
                bytes([0x94, 0, msgid]) + b"\xa4echo\x91\xdd" + struct.pack(">I", count) + value * count
            )
            assert client.receive()[2][0] == errno.EINVAL
            count = 16_000 // len(value)  # as many as may be, many times over
            client.socket.sendall((b"\x93\x02\xa1n\x91\xdd" + struct.pack(">I", count) + value * count) * 40)


# -- Clients that do not read ------------------------------------------------------------------------------------------


def test_a_client_that_never_reads_is_not_read_from(serving: RpcServing) -> None:
    request = msgpack.packb([0, 1, "blob", [{"size": 1000}]]) * 64
    with RawClient(serving.path) as client:
        client.socket.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 1 << 30:
                sent += client.socket.send(request)
        assert sent < 16 << 20
        held = serving.call(lambda: max(connection._unread for connection in serving.server.connections))
        assert held <= Limits().unsent + 1100  # and one more reply
        client.socket.settimeout(10)
        for _ in range(sent // (len(request) // 64)):  # once it reads, all is answered
            assert client.receive()[2] is None


def test_late_replies_that_nobody_reads_end_the_connection(serving: RpcServing) -> None:
    with RawClient(serving.path) as client:
        for number in range(100):
            client.send([0, number, "later", [{"seconds": 0.3, "value": bytes(200_000)}]])
        time.sleep(0.6)
        serving.wait_for(lambda: len(serving.server.connections) == 1, "the end of who does not read")
        assert len(client.rest()) < 100


def test_a_client_that_sends_a_byte_at_a_time_stalls_nobody(serving: RpcServing) -> None:
    with RawClient(serving.path) as client:
        for byte in msgpack.packb([0, 1, "add", [{"a": 1, "b": 2}]]):
            client.socket.sendall(bytes([byte]))
        assert client.receive() == [1, 1, None, 3]


def test_slow_commands_in_a_row_stall_nobody(serving: RpcServing) -> None:
    """All of them arrive in one read."""
    with RawClient(serving.path) as client:
        client.send(*([0, n, "work", [{"seconds": 0.005}]] for n in range(600)))
        for number in range(300):
            assert client.receive()[1] == number


def test_a_client_that_sends_without_end_stalls_nobody(serving: RpcServing) -> None:
    batch = msgpack.packb([0, 1, "add", [{"a": 1, "b": 2}]]) * 2000
    with RawClient(serving.path) as client:
        reading = threading.Thread(target=client.rest)
        reading.start()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            client.socket.sendall(batch)
        client.socket.shutdown(socket.SHUT_RDWR)
        reading.join()


# -- Clients that go ---------------------------------------------------------------------------------------------------

KILLED = """
import msgpack, os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
packed = msgpack.packb([0, 1, sys.argv[2], [{"seconds": 60, "a": 1, "b": 2, "count": 10000, "size": 1000}]])
sock.sendall(packed * int(sys.argv[3]) + packed[:int(sys.argv[4])])
print("sent", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("method", "count", "more"), [("later", 200, 0), ("add", 0, 10), ("blob", 100, 5), ("notify", 3, 0), ("fail", 5, 3)]
)
def test_a_client_killed_in_the_middle_leaves_nothing(serving: RpcServing, method: str, count: int, more: int) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(serving.path), method, str(count), str(more)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"sent\n"
        before = serving.sessions.closed
        killed.send_signal(signal.SIGKILL)
        serving.wait_for(lambda: serving.sessions.closed == before + 1, "the session's end")


def test_a_client_that_goes_with_replies_unread(serving: RpcServing) -> None:
    """The system calls that a reset, not an end."""
    for _ in range(5):
        before = serving.sessions.closed
        with RawClient(serving.path) as client:
            client.send([0, 1, "later", [{"seconds": 60}]], [0, 2, "add", [{"a": 1, "b": 2}]])
            select.select([client.socket], [], [], 10)
        serving.wait_for(lambda before=before: serving.sessions.closed == before + 1, "the session's end")  # type: ignore[misc]


@pytest.mark.filterwarnings("error")
def test_a_client_that_is_gone_before_its_request_is_begun(serving: RpcServing) -> None:
    for _ in range(5):
        before = serving.sessions.closed
        busy = serving.loop.call_soon_threadsafe
        with RawClient(serving.path) as client:
            client.ask(1, "add", a=1, b=2)
            busy(time.sleep, 0.02)
            client.send([0, 1, "later", [{"seconds": 60}]], [0, 2, "add", [{"a": 1, "b": 2}]])
        serving.wait_for(lambda before=before: serving.sessions.closed == before + 1, "the session's end")  # type: ignore[misc]
        gc.collect()


def test_a_client_that_goes_while_it_is_answered(serving: RpcServing) -> None:
    for _ in range(30):
        with RawClient(serving.path) as client:
            client.send(*([0, n, "blob", [{"size": 100_000}]] for n in range(20)))


def test_a_client_that_goes_before_anything_was_said(serving: RpcServing) -> None:
    for _ in range(100):
        RawClient(serving.path).socket.close()


# -- Many clients ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3000:
        pytest.skip(f"this process may have {hard} open files, 3,000 are needed: raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_connections(serving: RpcServing) -> None:
    with many_files():
        clients = [RawClient(serving.path) for _ in range(1000)]
        try:
            for number, client in enumerate(clients):
                client.send([0, number, "add", [{"a": number, "b": 1}]])
            for number, client in enumerate(clients):
                assert client.receive() == [1, number, None, number + 1]
            assert serving.call(lambda: len(serving.sessions.open)) == 1001  # and the one that asks all the while
        finally:
            for client in clients:
                client.socket.close()
        serving.wait_for(lambda: len(serving.sessions.open) == 1, "the end of a thousand")


def test_one_more_than_may_connect_is_told(tmp_path: Path) -> None:
    with RpcServing(tmp_path / "few.sock", limits=Limits(connections=3)) as serving:
        clients = [RawClient(serving.path) for _ in range(3)]
        assert [client.ask(1, "add", a=1, b=2)[3] for client in clients] == [3, 3, 3]
        with RawClient(serving.path) as more:
            assert ending(more) == errno.EUSERS
        clients.pop().socket.close()
        serving.wait_for(lambda: len(serving.server.connections) == 2, "room")
        with RawClient(serving.path) as more:
            assert more.ask(1, "add", a=1, b=2)[3] == 3
        for client in clients:
            client.socket.close()
        serving.wait_until_alone()
        assert serving.sessions.closed == 4  # who was refused never was a session


def test_without_free_descriptors_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ACCEPT_PAUSE_SECONDS", 0.02)
    with RpcServing(tmp_path / "rpc.sock") as serving, RawClient(serving.path) as there:
        assert there.ask(1, "add", a=1, b=2)[3] == 3
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        filler: list[int] = []
        waiting = socket.socket(socket.AF_UNIX)
        try:
            with os.scandir("/proc/self/fd") as entries:
                highest = max(int(entry.name) for entry in entries)
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
            with contextlib.suppress(OSError):
                while True:
                    filler.append(os.dup(0))
            waiting.connect(str(serving.path))
            waiting.sendall(msgpack.packb([0, 1, "add", [{"a": 1, "b": 2}]]))
            time.sleep(0.1)
            assert there.ask(1, "add", a=1, b=2)[3] == 3  # served on
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for file in filler:
                os.close(file)
        waiting.settimeout(5)
        assert msgpack.unpackb(waiting.recv(100)) == [1, 1, None, 3]
        waiting.close()


# -- Other users -------------------------------------------------------------------------------------------------------

AS_NOBODY = """
import msgpack, os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
    sock.settimeout(5)
    try:
        sock.sendall(msgpack.packb([0, 1, "add", [{"a": 1, "b": 2}]]))
    except ConnectionError:
        pass
    print(msgpack.unpackb(sock.recv(1000)))
except PermissionError as error:
    print(error.errno)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to connect as: run the tests as root for this one")
def test_another_user_is_refused() -> None:
    with tempfile.TemporaryDirectory(prefix="vioasid-") as name, RpcServing(Path(name, "rpc.sock")) as serving:

        def connect() -> str:
            argv = [sys.executable, "-c", AS_NOBODY, str(serving.path)]
            return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20).stdout

        assert connect() == f"{errno.EACCES}\n"  # by the modes alone
        serving.path.chmod(0o777)
        serving.path.parent.chmod(0o755)
        refusal = {"errno": errno.EPERM, "sentence": "another user's server: connect as its user, or as root"}
        assert connect() == str([2, "closing", [refusal]]) + "\n"
        assert serving.sessions.closed == 0


def test_a_peer_is_who_the_system_says(serving: RpcServing) -> None:
    with RawClient(serving.path) as client:
        assert client.ask(1, "add", a=1, b=2)[3] == 3
        peer = serving.call(lambda: serving.sessions.open[-1].connection.peer)
        assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())


def test_root_and_the_own_user_may_connect(serving: RpcServing, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawClient(serving.path) as client:
        assert client.ask(1, "add", a=1, b=2)[3] == 3
    monkeypatch.setattr(os, "geteuid", lambda: 1234567)
    with RawClient(serving.path) as client:
        if os.getuid() == 0:
            assert client.ask(1, "add", a=1, b=2)[3] == 3
        else:
            assert ending(client) == errno.EPERM
