"""Our two clients against our server, and against servers that are not in order."""

import asyncio
import errno
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from rpc_serving import METHODS, RpcServing, Sessions

from protocol import BlockingClient, Client, Disconnected, Limits, Malformed, Notification, RpcError, Server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rpc.sock"


@pytest.fixture
async def server(path: Path) -> AsyncIterator[Server]:
    """On the test's own loop, as the asyncio client is."""
    sessions = Sessions()
    server = Server(METHODS, path, on_connect=sessions)
    await server.start()
    yield server
    await server.close()
    assert sessions.open == []


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with await Client.connect(server.path) as made:
        yield made


@pytest.fixture
def serving(path: Path) -> Iterator[RpcServing]:
    with RpcServing(path) as made:
        yield made


@pytest.fixture
def blocking(serving: RpcServing) -> Iterator[BlockingClient]:
    with BlockingClient(serving.path, timeout=10) as made:
        yield made


class Script:
    """A server that sends given bytes to each client and keeps what it reads."""

    def __init__(self, path: Path, answer: bytes, *, hang: bool = False) -> None:
        self.read = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(answer, hang), daemon=True)
        self._thread.start()

    def _serve(self, answer: bytes, hang: bool) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            self.read = connection.recv(1 << 16)
            connection.sendall(answer)
            while hang and connection.recv(1 << 16):
                pass


# -- On asyncio --------------------------------------------------------------------------------------------------------


async def test_a_call_has_its_result_or_its_refusal(client: Client) -> None:
    assert await client.call("add", a=1, b=2) == 3
    assert await client.call("echo") == {}
    with pytest.raises(RpcError) as caught:
        await client.call("refuse", errno=2, sentence="no such thing")
    assert (caught.value.errno, caught.value.sentence, caught.value.name) == (2, "no such thing", "ENOENT")
    with pytest.raises(RpcError) as caught:
        await client.call("nothing")
    assert caught.value.errno == errno.ENOTTY


async def test_calls_at_once_have_their_own_results(client: Client) -> None:
    calls = [client.call("later", seconds=0.02 - n / 10_000, value=n) for n in range(200)]
    calls += [client.call("add", a=n, b=0) for n in range(200)]
    assert await asyncio.gather(*calls) == [*range(200), *range(200)]


async def test_what_cannot_be_sent_disturbs_nothing(client: Client) -> None:
    with pytest.raises(TypeError):
        await client.call("echo", thing=object())
    with pytest.raises(OverflowError):
        await client.call("echo", thing=1 << 64)
    with pytest.raises(RpcError) as caught:
        await client.call("echo", data=bytes(2 << 20))
    assert caught.value.errno == errno.EMSGSIZE
    with pytest.raises(OSError, match="Bad file descriptor"):
        await client.call("read_files", descriptors=[9999])
    assert await client.call("add", a=1, b=2) == 3


async def test_a_call_that_is_cancelled_is_forgotten(client: Client) -> None:
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.call("later", seconds=0.2), 0.01)
    assert client._calls == {}
    assert client._caller._waiting == set()
    await asyncio.sleep(0.25)  # the replies come
    assert await client.call("add", a=1, b=2) == 3


async def test_files_go_along(client: Client) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = [os.memfd_create("vioasid-test") for _ in range(3)]
    for number, file in enumerate(files):
        os.write(file, b"%d" % number)
    calls = []
    for file in files:
        calls.append(asyncio.ensure_future(client.call("read_files", descriptors=[file])))
        calls.append(asyncio.ensure_future(client.call("read_files")))
    await asyncio.sleep(0)  # the calls are queued by now; the files are no longer needed
    for file in files:
        os.close(file)
    assert await asyncio.gather(*calls) == [[b"0"], [], [b"1"], [], [b"2"], []]
    assert len(os.listdir("/proc/self/fd")) == before


async def test_notifications_are_iterated(client: Client, server: Server) -> None:
    received: list[int] = []

    async def follow() -> None:
        async for notification in client.notifications():
            assert notification.method == "tick"
            received.append(notification.params[0]["number"])

    following = asyncio.create_task(follow())
    await client.call("notify", count=3)
    await asyncio.sleep(0.02)
    await client.call("notify", count=2)
    await asyncio.sleep(0.02)
    assert received == [0, 1, 2, 0, 1]
    await server.close()
    await asyncio.wait_for(following, 5)  # the end of the connection is the end of the iteration


async def test_notifications_that_nobody_takes_are_bounded(client: Client) -> None:
    most = Limits().notifications
    for _ in range(5):
        await client.call("notify", count=most // 2)
    await asyncio.sleep(0.05)
    assert len(client._caller.notifications) == most
    assert client.lost == 5 * (most // 2) - most


async def test_the_end_of_the_server_ends_the_calls(client: Client, server: Server) -> None:
    waiting = asyncio.ensure_future(client.call("later", seconds=60))
    await asyncio.sleep(0.02)
    await server.close()
    with pytest.raises(Disconnected, match="the server is closing"):
        await waiting
    with pytest.raises(Disconnected, match="the server is closing"):
        await client.call("add", a=1, b=2)


async def test_a_large_request_is_sent_in_parts(client: Client) -> None:
    data = os.urandom(1 << 20)
    echoes = await asyncio.gather(*(client.call("echo", data=data, number=n) for n in range(5)))
    assert echoes == [{"data": data, "number": n} for n in range(5)]


async def test_closing_ends_the_calls(server: Server) -> None:
    client = await Client.connect(server.path)
    waiting = asyncio.ensure_future(client.call("later", seconds=60))
    await asyncio.sleep(0.02)
    await client.close()
    with pytest.raises(Disconnected, match="from this side"):
        await waiting
    await client.close()


async def test_nobody_to_connect_to(tmp_path: Path) -> None:
    (tmp_path / "dead").touch()
    for name in ("missing", "dead"):
        with pytest.raises(Disconnected, match="nobody serves"):
            await Client.connect(tmp_path / name)
        with pytest.raises(Disconnected, match="nobody serves"):
            BlockingClient(tmp_path / name)


ILL = {
    "garbage": (b"\xc1", Malformed, "no MessagePack"),
    "an end": (b"", Disconnected, "closed"),
    "half a reply": (msgpack.packb([1, 0, None, "x"])[:4], Disconnected, "closed"),
    "a reason": (msgpack.packb([2, "closing", [{"errno": 5, "sentence": "I am ill"}]]), Disconnected, "I am ill"),
    "a reply that cannot be read": (b"\x94\x01\x00\xc0\xa1\xff", RpcError, "UTF-8"),
    "an error in another shape": (msgpack.packb([1, 0, "text", None]), RpcError, "no known shape"),
    "an errno of nothing": (msgpack.packb([1, 0, [0, "text"], None]), RpcError, "no known shape"),
}


@pytest.mark.parametrize(("answer", "kind", "words"), ILL.values(), ids=ILL.keys())
async def test_a_server_that_is_ill(path: Path, answer: bytes, kind: type[Exception], words: str) -> None:
    Script(path, answer)
    async with await Client.connect(path) as client:
        with pytest.raises(kind, match=words):
            await asyncio.wait_for(client.call("add", a=1, b=2), 5)


# -- Without a loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "kind", "words"), ILL.values(), ids=ILL.keys())
def test_a_server_that_is_ill_and_a_script(path: Path, answer: bytes, kind: type[Exception], words: str) -> None:
    Script(path, answer)
    with BlockingClient(path, timeout=5) as client, pytest.raises(kind, match=words):
        client.call("add", a=1, b=2)


def test_a_request_is_the_bytes_that_the_document_shows(path: Path) -> None:
    script = Script(
        path, msgpack.packb([2, "other", []]) + msgpack.packb([1, 99, None, 1]) + msgpack.packb([1, 0, None, 3])
    )
    with BlockingClient(path, timeout=5) as client:
        assert client.call("add", a=1, b=2) == 3  # what else came was not for it
        assert client.notification(0) == Notification("other", [])
    assert msgpack.unpackb(script.read) == [0, 0, "add", [{"a": 1, "b": 2}]]


def test_a_script_calls(blocking: BlockingClient) -> None:
    assert blocking.call("add", a=1, b=2) == 3
    with pytest.raises(RpcError) as caught:
        blocking.call("refuse", errno=16, sentence="still attached")
    assert str(caught.value) == "still attached (EBUSY)"
    file = os.memfd_create("vioasid-test")
    os.write(file, b"memory")
    assert blocking.call("read_files", descriptors=[file]) == [b"memory"]
    os.close(file)


def test_a_script_calls_many_at_once(blocking: BlockingClient) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [("add", {"a": n, "b": 1}) for n in range(3000)]
    calls[7] = ("refuse", {"errno": 2, "sentence": "no"})
    results = blocking.call_many(calls)
    assert isinstance(results[7], RpcError)
    assert [r for n, r in enumerate(results) if n != 7] == [n + 1 for n in range(3000) if n != 7]
    assert blocking.call_many([]) == []


def test_many_large_calls_do_not_lock_up(blocking: BlockingClient) -> None:
    """Both sides' sockets are full at once: who only sends waits for ever."""
    data = bytes(200_000)
    assert all(reply["data"] == data for reply in blocking.call_many([("echo", {"data": data})] * 40))


def test_a_script_does_not_wait_for_ever(path: Path) -> None:
    Script(path, b"", hang=True)
    with BlockingClient(path, timeout=0.1) as client:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"add was not answered within 0\.1 seconds"):
            client.call("add", a=1, b=2)
        assert time.monotonic() - started < 2
        assert client.notification(0.05) is None


def test_a_script_takes_notifications(blocking: BlockingClient) -> None:
    blocking.call("notify", count=3)
    taken = [blocking.notification(5) for _ in range(3)]
    assert [n.params[0]["number"] for n in taken if n is not None] == [0, 1, 2]
    assert blocking.notification(0.01) is None
    assert blocking.lost == 0


def test_a_script_hears_of_the_end(serving: RpcServing, blocking: BlockingClient) -> None:
    assert blocking.call("add", a=1, b=2) == 3
    serving.run(serving.server.close())
    with pytest.raises(Disconnected, match="the server is closing"):
        blocking.call("add", a=1, b=2)
