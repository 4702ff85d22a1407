"""What all clients leave here together is bounded, and none of them can take what another one needs at least."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from rpc_serving import RawClient, RpcServing

from protocol import Limits
from protocol.connection import Connection

SMALL = 64 << 10
LIMITS = Limits(
    connections=8, small=SMALL, waiting=8 * SMALL + (512 << 10), large=2, large_seconds=60, pending=40, pending_least=4
)
REST = 512 << 10
hasty = pytest.mark.parametrize("serving", [replace(LIMITS, large_seconds=0.2)], indirect=True)


@pytest.fixture(params=[LIMITS])
def serving(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RpcServing]:
    """With those limits; nothing is taken of any budget at the end."""
    with RpcServing(tmp_path / "rpc.sock", limits=request.param) as made:
        yield made
        made.wait_until_alone()
        assert made.server.waiting.rest == REST
        assert made.server.pending.rest == LIMITS.pending - 8 * LIMITS.pending_least
        assert len(made.server.large) == 0


@contextlib.contextmanager
def clients(serving: RpcServing, count: int) -> Iterator[list[RawClient]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(RawClient(serving.path)) for _ in range(count)]


def waits(connection: Connection) -> int:
    """Bytes that the server keeps for a client to read."""
    return len(connection._unsent) + connection._outbox.size


def quiet(serving: RpcServing) -> list[int]:
    """What waits for each client, once nothing moves any more."""
    before: list[int] = []
    while (now := serving.call(lambda: [waits(each) for each in serving.server.connections])) != before:
        before = now
        time.sleep(0.05)
    return now


def packed(msgid: int, method: str, **fields: Any) -> bytes:
    message = msgpack.packb([0, msgid, method, [fields]])
    assert isinstance(message, bytes)
    return message


# -- Replies and notifications -----------------------------------------------------------------------------------------


def test_replies_that_nobody_reads(serving: RpcServing) -> None:
    """Seven clients ask for 3 MB each and read nothing; the eighth is served all the while."""
    size, count = 400_000, 7
    with clients(serving, 7) as greedy, RawClient(serving.path) as other:
        for client in greedy:
            client.socket.sendall(b"".join(packed(msgid, "blob", size=size) for msgid in range(count)))
        kept = quiet(serving)
        slack = 7 * 200  # an error in place of a reply each
        assert sum(kept) <= LIMITS.waiting + slack
        assert serving.server.waiting.rest < size - SMALL, "there is no room for another one"
        assert other.ask(1, "blob", size=30_000)[3] == bytes(30_000)
        answers = []
        for client in greedy:  # once they read, each request of each is answered
            for msgid in range(count):
                kind, number, error, result = client.receive()
                assert (kind, number) == (1, msgid)
                answers.append(error[0] if error else len(result))
        assert set(answers) == {size, errno.ENOMEM}
        assert other.ask(2, "blob", size=size)[3] == bytes(size)


def test_notifications_that_nobody_reads(serving: RpcServing) -> None:
    """The oldest are dropped earlier than they would be if nobody else were there; and the client is told how many."""
    with clients(serving, 7) as slow:
        for client in slow:
            assert client.ask(1, "add", a=1, b=2)[3] == 3  # it is there
        for _ in range(3):
            serving.call(lambda: tell_all(serving, 1000))
            kept = quiet(serving)
        assert REST < sum(kept) <= LIMITS.waiting
        for client in slow:
            came = lost = 0
            while came + lost < 3000:
                _, name, params = client.receive()
                came += name == "tick"
                lost += params[0]["count"] if name == "lost" else 0
            assert lost


def tell_all(serving: RpcServing, count: int) -> None:
    for session in serving.sessions.open:
        for _ in range(count):
            session.connection.notify("tick", bytes(1000))


def test_who_goes_without_reading_leaves_nothing(serving: RpcServing) -> None:
    with clients(serving, 3) as greedy:
        for client in greedy:
            client.socket.sendall(packed(1, "blob", size=400_000))
        quiet(serving)
        assert serving.server.waiting.rest < REST


def test_the_turn_at_hand_is_the_last_of_a_connection_that_ended_with_replies_unread(serving: RpcServing) -> None:
    turns_taken: list[int] = []
    with RawClient(serving.path) as client:
        assert client.ask(1, "add", a=1, b=1)[3] == 2

        def end() -> None:
            (connection,) = serving.server.connections
            turn = connection._turn

            def counted() -> None:
                turns_taken.append(1)
                turn()

            vars(connection)["_turn"] = counted
            connection._outbox.reply(bytes(LIMITS.unsent + 1))
            connection.abort()
            connection._turn()

        serving.call(end)
        for _ in range(3):
            serving.call(lambda: None)
    assert len(turns_taken) == 1


# -- Large messages ----------------------------------------------------------------------------------------------------

LARGE = packed(7, "add", a=1, b=2, more=bytes(500_000))
"""add looks at no more than it needs."""


def begin(client: RawClient) -> None:
    """Send the half of a large message, and have the server read it."""
    client.socket.sendall(LARGE[: len(LARGE) // 2])


def turns(serving: RpcServing, count: int) -> None:
    serving.wait_for(lambda: len(serving.server.large) == count, f"{count} large messages under way")


def test_large_messages_take_turns(serving: RpcServing) -> None:
    with clients(serving, 6) as sending:
        for client in sending[:2]:
            begin(client)
        turns(serving, 2)
        for client in sending[2:]:
            client.socket.setblocking(False)
            assert client.socket.send(LARGE) < len(LARGE), "the system keeps no more"
        turns(serving, 6)
        held = serving.call(lambda: [each._decoder.unfinished for each in serving.server.connections])
        assert sorted(held)[:4] <= [SMALL + LIMITS.read] * 4 and sum(each > 2 * SMALL for each in held) == 2
        for client in sending[:2]:
            client.socket.sendall(LARGE[len(LARGE) // 2 :])
            assert client.receive() == [1, 7, None, 3]
            assert client.ask(8, "add", a=3, b=4)[3] == 7


@hasty
def test_who_does_not_end_its_message_loses_its_turn(serving: RpcServing) -> None:
    with clients(serving, 2) as stalling, RawClient(serving.path) as other, RawClient(serving.path) as small:
        for client in stalling:
            begin(client)
        turns(serving, 2)
        other.socket.sendall(LARGE)
        assert small.ask(1, "add", a=1, b=1)[3] == 2
        assert other.receive() == [1, 7, None, 3]
        ended = [client for client in stalling if _ended(client)]
        assert ended
        for client in ended:
            kind, method, [fields] = client.rest()[-1]
            assert (kind, method, fields["errno"]) == (2, "closing", errno.ETIMEDOUT)


def _ended(client: RawClient) -> bool:
    client.socket.setblocking(False)
    try:
        return bool(client.socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        client.socket.settimeout(10)


@hasty
def test_who_keeps_nobody_waiting_may_take_its_time(serving: RpcServing) -> None:
    with RawClient(serving.path) as slow:
        begin(slow)
        time.sleep(0.6)
        slow.socket.sendall(LARGE[len(LARGE) // 2 :])
        assert slow.receive() == [1, 7, None, 3]


def test_who_is_found_gone_while_its_message_grows_keeps_no_turn(serving: RpcServing) -> None:
    """What shows that it reads no more is a write of the very turn in which more of its message has arrived."""
    with RawClient(serving.path) as leaving:
        begin(leaving)
        turns(serving, 1)
        quiet(serving)

        def arrive_and_write() -> None:
            (connection,) = serving.server.connections
            leaving.socket.shutdown(socket.SHUT_RD)
            leaving.socket.send(bytes(100))
            connection.notify("tick")
            connection._readable()

        serving.call(arrive_and_write)
        turns(serving, 0)


def test_who_goes_gives_its_turn_away(serving: RpcServing) -> None:
    with clients(serving, 3) as sending:
        for client in sending[:2]:
            begin(client)
        turns(serving, 2)
        sending[2].socket.setblocking(False)
        sent = sending[2].socket.send(LARGE)
        turns(serving, 3)
        sending[0].socket.close()
        turns(serving, 2)
        sending[2].socket.settimeout(10)
        sending[2].socket.sendall(LARGE[sent:])
        assert sending[2].receive() == [1, 7, None, 3]


# -- Requests that are waited for --------------------------------------------------------------------------------------


def test_requests_that_are_waited_for(serving: RpcServing) -> None:
    rest = LIMITS.pending - 8 * LIMITS.pending_least
    with RawClient(serving.path) as greedy, RawClient(serving.path) as other:
        for client, least in ((greedy, LIMITS.pending_least + rest), (other, LIMITS.pending_least)):
            client.socket.sendall(b"".join(packed(each, "later", seconds=60) for each in range(least + 3)))
            refused = [client.receive() for _ in range(3)]
            assert [each[1] for each in refused] == [least, least + 1, least + 2]
            assert {each[2][0] for each in refused} == {errno.EAGAIN}
            assert client.ask(99, "add", a=1, b=2)[3] == 3
