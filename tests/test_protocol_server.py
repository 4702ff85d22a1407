"""The server, as bytes on its socket show it."""

import errno
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from rpc_serving import METHODS, RawClient, RpcServing

from protocol import VERSION, Limits, Server, SocketRefused


@pytest.fixture
def serving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[RpcServing]:
    caplog.set_level(logging.CRITICAL, logger="protocol.server")
    with RpcServing(tmp_path / "rpc.sock") as made:
        yield made


@pytest.fixture
def client(serving: RpcServing) -> Iterator[RawClient]:
    with RawClient(serving.path) as made:
        yield made


# -- Requests ----------------------------------------------------------------------------------------------------------


def test_hello_says_what_there_is(client: RawClient) -> None:
    client.send([0, 0, "hello", []])
    kind, msgid, error, result = client.receive()
    assert (kind, msgid, error) == (1, 0, None)
    assert result["version"] == VERSION == 1
    assert result["methods"] == sorted(["hello", *METHODS])
    assert result["notifications"] == ["closing", "lost", "tick"]
    assert result["limits"]["message"] == Limits().message


def test_hello_bears_what_clients_say_of_themselves(client: RawClient) -> None:
    assert client.ask(1, "hello", client="a script", version=99)[2] is None


@pytest.mark.parametrize("params", [[], [{}], [[]]])
def test_no_fields_can_be_said_in_three_ways(client: RawClient, params: list[object]) -> None:
    client.send([0, 1, "echo", params])  # the last is what Lua makes of an empty table
    assert client.receive() == [1, 1, None, {}]


def test_names_may_be_binary(client: RawClient) -> None:
    client.send([0, 1, b"add", [{b"a": 1, "b": 2}]])
    assert client.receive() == [1, 1, None, 3]


@pytest.mark.parametrize("params", [[1], ["a"], [{}, {}], [[1]], [None], [{b"a": 1, "a": 2}], [{b"\xff": 1}]])
def test_params_that_are_not_one_map_are_refused(client: RawClient, params: list[object]) -> None:
    client.send([0, 1, "echo", params])
    _, msgid, error, result = client.receive()
    assert (msgid, error[0], result) == (1, errno.EINVAL, None)


def test_an_unknown_method_is_answered(client: RawClient) -> None:
    _, msgid, error, result = client.ask(0xFFFF_FFFF, "ioasid.nothing")
    assert (msgid, error[0], result) == (0xFFFF_FFFF, errno.ENOTTY, None)
    assert "ioasid.nothing" in error[1]


def test_an_error_is_exactly_a_number_and_a_sentence(client: RawClient) -> None:
    assert client.ask(1, "refuse", errno=2, sentence="no IOASID 7: ALLOC one") == [
        1,
        1,
        [2, "no IOASID 7: ALLOC one"],
        None,
    ]
    assert client.ask(2, "refuse", errno=errno.EBUSY, sentence="µ") == [1, 2, [16, "µ"], None]


def test_a_mistake_of_the_server_is_answered_and_kept(client: RawClient, serving: RpcServing) -> None:
    for msgid in range(100):
        _, answered, error, result = client.ask(msgid, "fail")
        assert (answered, error[0], result) == (msgid, errno.EIO, None)
    assert client.ask(1, "add", a=1, b=2) == [1, 1, None, 3]
    assert 0 < len(serving.server.errors) < 100
    assert all(isinstance(error, ZeroDivisionError) for error in serving.server.errors)


def test_a_result_that_has_no_form_is_a_mistake_of_the_server(client: RawClient) -> None:
    assert client.ask(1, "add", a=(1 << 64) - 1, b=1)[2][0] == errno.EIO
    assert client.ask(2, "add", a=1, b=1) == [1, 2, None, 2]


def test_a_result_that_is_too_long_is_refused(client: RawClient) -> None:
    limit = Limits().message
    assert client.ask(1, "blob", size=limit)[2][0] == errno.EMSGSIZE
    assert len(client.ask(2, "blob", size=limit - 100)[3]) == limit - 100


def test_notifications_and_stray_replies_are_ignored(client: RawClient) -> None:
    client.send([2, "nvim_set_client_info", ["client", {}, "remote", {}, {}]], [2, "add", [{"a": 1}]], [1, 5, None, 1])
    client.send([2, "tick", [b"\xff", {}]], [1, 0, "text", None])
    assert client.ask(1, "add", a=1, b=2) == [1, 1, None, 3]


def test_requests_may_share_a_msgid(client: RawClient) -> None:
    client.send([0, 7, "add", [{"a": 1, "b": 2}]], [0, 7, "add", [{"a": 3, "b": 4}]])
    assert [client.receive()[3], client.receive()[3]] == [3, 7]


def test_what_is_waited_for_stops_nothing(client: RawClient) -> None:
    client.send([0, 1, "later", [{"seconds": 0.2, "value": "slow"}]], [0, 2, "add", [{"a": 1, "b": 2}]])
    assert client.receive() == [1, 2, None, 3]
    assert client.receive() == [1, 1, None, "slow"]


def test_requests_in_flight_are_bounded(tmp_path: Path) -> None:
    limits = Limits(in_flight=5)
    with RpcServing(tmp_path / "few.sock", limits=limits) as serving, RawClient(serving.path) as client:
        client.send(*([0, n, "later", [{"seconds": 0.1}]] for n in range(8)), [0, 9, "add", [{"a": 1, "b": 2}]])
        replies = [client.receive() for _ in range(9)]
        assert [reply[1] for reply in replies[:4]] == [5, 6, 7, 9]  # what is answered at once still is
        assert [reply[2][0] for reply in replies[:3]] == [errno.EAGAIN] * 3
        assert sorted(reply[1] for reply in replies[4:]) == [0, 1, 2, 3, 4]
        assert client.ask(1, "later", seconds=0)[2] is None


def test_pipelined_requests_are_answered_in_order(client: RawClient) -> None:
    count = 5000
    batch = b"".join(msgpack.packb([0, n, "add", [{"a": n, "b": 1}]]) for n in range(count))
    sender = threading.Thread(target=client.socket.sendall, args=(batch,))
    sender.start()
    for number in range(count):
        assert client.receive() == [1, number, None, number + 1]
    sender.join()


def test_the_last_words_of_a_client_are_answered(client: RawClient) -> None:
    """As `printf ... | nc -U` leaves a connection: closed on its side, reading on."""
    client.send(*([0, n, "blob", [{"size": 100_000}]] for n in range(50)))
    client.socket.shutdown(socket.SHUT_WR)
    assert [reply[1] for reply in client.rest()] == list(range(50))


# -- Notifications -----------------------------------------------------------------------------------------------------


def test_notifications_arrive_in_order(client: RawClient) -> None:
    client.send([0, 1, "notify", [{"count": 300}]])
    assert client.receive() == [1, 1, None, None]
    for number in range(300):
        assert client.receive() == [2, "tick", [{"number": number, "data": b""}]]


def test_a_reader_that_is_too_slow_loses_the_oldest_and_is_told(tmp_path: Path) -> None:
    with (
        RpcServing(tmp_path / "few.sock", limits=Limits(notifications=10)) as serving,
        RawClient(serving.path) as client,
    ):
        count = 2000
        client.send([0, 1, "notify", [{"count": count, "size": 1000}]])
        assert client.receive() == [1, 1, None, None]
        assert client.receive() == [2, "lost", [{"count": count - 10}]]
        assert [client.receive()[2][0]["number"] for _ in range(10)] == list(range(count - 10, count))


def test_a_reader_that_does_not_read_costs_a_bounded_part(serving: RpcServing, client: RawClient) -> None:
    """200 MB for a client that reads nothing; then it reads: what is lost and what is there is all there was."""
    client.send([0, 1, "notify", [{"count": 0}]])
    assert client.receive() == [1, 1, None, None]
    connection = serving.sessions.open[0].connection

    def tell(first: int) -> None:
        for number in range(first, first + 1000):
            connection.notify("tick", {"number": number, "data": bytes(10_000)})

    for first in range(0, 20_000, 1000):
        serving.call(lambda first=first: tell(first))  # type: ignore[misc]
    held = serving.call(lambda: connection._outbox.notification_bytes + len(connection._unsent))
    assert held < 1 << 20
    following = 0
    while following < 20_000:
        _, method, [fields] = client.receive()
        if method == "lost":
            following += fields["count"]
        else:
            assert fields["number"] == following
            following += 1
    assert client.ask(2, "add", a=1, b=2) == [1, 2, None, 3]


# -- The socket --------------------------------------------------------------------------------------------------------


def test_the_socket_is_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with RpcServing(tmp_path / "run" / "rpc.sock") as serving:
            assert stat.S_IMODE(os.stat(serving.path).st_mode) == 0o600
            assert stat.S_IMODE(os.stat(serving.path.parent).st_mode) == 0o700
    finally:
        os.umask(before)
    assert not (tmp_path / "run" / "rpc.sock").exists()


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with RpcServing(path) as serving:
        with pytest.raises(SocketRefused, match="another process"):
            serving.run(Server({}, path).start())
        with RawClient(path) as client:
            assert client.ask(1, "add", a=1, b=2)[3] == 3


@pytest.mark.parametrize(
    ("name", "words"), [("x" * 200, "at most 107"), ("file", "is no socket"), ("file/rpc.sock", "cannot listen")]
)
def test_a_bad_path_is_refused(serving: RpcServing, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SocketRefused, match=words):
        serving.run(Server({}, tmp_path / name).start())
    assert (tmp_path / "file").exists()


def test_closing_tells_the_clients(tmp_path: Path) -> None:
    with RpcServing(tmp_path / "rpc.sock") as serving:
        with RawClient(serving.path) as waiting, RawClient(serving.path) as idle:
            waiting.send([0, 1, "later", [{"seconds": 60}]])
            assert idle.ask(1, "add", a=1, b=2)[3] == 3
            started = time.monotonic()
            serving.run(serving.server.close())
            assert time.monotonic() - started < 2
            for client in (waiting, idle):
                [kind, method, [fields]] = client.receive()
                assert (kind, method, fields["errno"]) == (2, "closing", errno.ESHUTDOWN)
                assert client.receive() is None
        assert serving.sessions.closed == 2


def test_closing_does_not_wait_for_those_who_do_not_read(tmp_path: Path) -> None:
    with RpcServing(tmp_path / "rpc.sock", limits=Limits(goodbye=0.2)) as serving, RawClient(serving.path) as client:
        client.send(*([0, n, "blob", [{"size": 1 << 20}]] for n in range(3)))
        serving.wait_for(lambda: any(c._writing for c in serving.server.connections), "a full socket")
        started = time.monotonic()
        serving.run(serving.server.close())
        assert 0.1 < time.monotonic() - started < 2
