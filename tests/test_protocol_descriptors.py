"""Files that come with requests (SCM_RIGHTS): which request has them, and that none is ever left open."""

import array
import contextlib
import errno
import os
import resource
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgpack
import pytest
from rpc_serving import RawClient, RpcServing

from protocol import Limits


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[RpcServing]:
    with RpcServing(tmp_path / "rpc.sock") as made:
        yield made


@pytest.fixture
def client(serving: RpcServing) -> Iterator[RawClient]:
    with RawClient(serving.path) as made:
        yield made


@contextmanager
def files(*contents: bytes) -> Iterator[list[int]]:
    made = [os.memfd_create("vioasid-test") for _ in contents]
    try:
        for file, content in zip(made, contents, strict=True):
            os.write(file, content)
        yield made
    finally:
        for file in made:
            os.close(file)


@pytest.fixture(autouse=True)
def nothing_left_open(serving: RpcServing, client: RawClient) -> Iterator[None]:
    """The server's process is this one: what it leaves open is seen here."""
    assert client.ask(1, "add", a=1, b=2)[3] == 3
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert client.ask(1, "add", a=1, b=2)[3] == 3
    assert serving.call(lambda: len(os.listdir("/proc/self/fd"))) == before


def send_with(sock: socket.socket, data: bytes, descriptors: Sequence[int]) -> int:
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def request(msgid: int, method: str, **fields: object) -> bytes:
    packed: bytes = msgpack.packb([0, msgid, method, [fields]])
    return packed


@pytest.mark.parametrize("method", ["read_files", "read_files_later"])
def test_a_method_has_the_files_of_its_request(client: RawClient, method: str) -> None:
    with files(b"one", b"two") as made:
        send_with(client.socket, request(1, method, seconds=0.01), made)
    assert client.receive() == [1, 1, None, [b"one", b"two"]]
    assert client.ask(2, method, seconds=0)[3] == []


def test_each_request_of_many_has_its_own(client: RawClient) -> None:
    """Sent without waiting, so that the server finds them side by side."""
    for number in range(50):
        if number % 3:
            client.socket.sendall(request(number, "read_files"))
        else:
            with files(b"%d" % number) as made:
                send_with(client.socket, request(number, "read_files"), made)
    for number in range(50):
        assert client.receive() == [1, number, None, [] if number % 3 else [b"%d" % number]]


def test_requests_that_wait_side_by_side_have_their_own(client: RawClient) -> None:
    for number in range(20):
        with files(b"%d" % number) as made:
            send_with(client.socket, request(number, "read_files_later", seconds=0.02), made)
    replies = {reply[1]: reply[3] for reply in (client.receive() for _ in range(20))}
    assert replies == {number: [b"%d" % number] for number in range(20)}


def test_a_request_in_pieces_keeps_its_files(client: RawClient) -> None:
    packed = request(1, "read_files", data=bytes(300_000))
    with files(b"first", b"last") as made:
        sent = send_with(client.socket, packed[:200], made[:1])
        sent += client.socket.send(packed[sent:-5])
        client.socket.sendall(packed[sent:-5])
        send_with(client.socket, packed[-5:], made[1:])
    assert client.receive() == [1, 1, None, [b"first", b"last"]]


def test_the_first_byte_of_a_request_may_bring_them(serving: RpcServing, client: RawClient) -> None:
    """Read together with the request before, which they do not belong to."""
    packed = request(2, "read_files")
    with files(b"x") as made:
        for _ in range(5):
            serving.loop.call_soon_threadsafe(time.sleep, 0.02)
            client.socket.sendall(request(1, "read_files"))
            send_with(client.socket, packed[:1], made)
            client.socket.sendall(packed[1:])
            assert client.receive() == [1, 1, None, []]
            assert client.receive() == [1, 2, None, [b"x"]]


def test_a_large_request_in_one_call_keeps_its_files(client: RawClient) -> None:
    packed = request(1, "read_files", data=bytes(150_000))
    client.socket.sendall(request(0, "add", a=1, b=2))
    with files(b"memory") as made:
        sent = send_with(client.socket, packed, made)
    client.socket.sendall(packed[sent:] + request(2, "read_files"))
    assert client.receive()[1] == 0
    assert client.receive() == [1, 1, None, [b"memory"]]
    assert client.receive() == [1, 2, None, []]


def test_files_that_nobody_takes_are_closed(client: RawClient) -> None:
    with files(b"x") as made:
        for message in ([0, 1, "add", [{"a": 1, "b": 2}]], [0, 2, "nothing", []], [0, 3, "fail", []], [2, "tick", []]):
            send_with(client.socket, msgpack.packb(message), made)
        send_with(client.socket, request(4, "later", seconds=0.01), made)
        send_with(client.socket, b"\x92\x00\x05", made)  # a request that is none, answered
    assert sorted(client.receive()[1] for _ in range(5)) == [1, 2, 3, 4, 5]


def test_files_of_a_client_that_goes_are_closed(serving: RpcServing) -> None:
    with files(b"x") as made:
        for data in (b"\x94", request(1, "later", seconds=60), b"\xc1", request(1, "read_files_later", seconds=60)):
            with RawClient(serving.path) as client:
                send_with(client.socket, data, made)
        serving.wait_for(lambda: len(serving.server.connections) == 1, "the others' end")


def test_too_many_files_are_refused_and_closed(serving: RpcServing, client: RawClient) -> None:
    most = Limits().descriptors
    with files(*[b"x"] * (most + 1)) as made:
        send_with(client.socket, request(1, "read_files"), made[:most])
        assert client.receive() == [1, 1, None, [b"x"] * most]
        send_with(client.socket, request(2, "read_files"), made)
        assert client.receive()[2][0] == errno.E2BIG
        send_with(client.socket, request(3, "read_files"), made * 28)  # 252: the most that the system lets through
        assert client.receive()[2][0] == errno.E2BIG


def test_files_on_every_byte_of_a_message_end_the_connection(serving: RpcServing) -> None:
    with files(b"x") as made, RawClient(serving.path) as client:
        packed = request(1, "read_files", data=bytes(1000))
        with contextlib.suppress(OSError):
            for position in range(500):
                send_with(client.socket, packed[position : position + 1], made * 8)
        assert client.rest()[-1][2][0]["errno"] == errno.E2BIG
        serving.wait_for(lambda: len(serving.server.connections) == 1, "the end")


def test_files_for_which_there_is_no_room_are_refused(serving: RpcServing, client: RawClient) -> None:
    """Where the server has no free descriptor left, the system drops them; the request must not go on without."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with files(b"x", b"y") as made:
        with os.scandir("/proc/self/fd") as entries:
            highest = max(int(entry.name) for entry in entries)
        filler = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
            while True:
                try:
                    filler.append(os.dup(0))
                except OSError:
                    break
            send_with(client.socket, request(1, "read_files"), made)
            assert client.receive()[2][0] == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for file in filler:
                os.close(file)
