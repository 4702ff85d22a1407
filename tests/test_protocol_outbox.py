"""What waits to be sent: nothing of the replies is lost, the oldest of the notifications, and that is told."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import Limits
from protocol.outbox import Outbox


def outbox(limits: Limits) -> Outbox:
    return Outbox(limits, lambda count: b"<%d lost>" % count)


def drain(box: Outbox) -> bytes:
    return b"".join(iter(box.take, b""))


def test_replies_come_before_notifications_and_the_end_comes_last() -> None:
    box = outbox(Limits())
    assert not box
    box.end(b"end")
    box.notify(b"n1")
    box.reply(b"r1")
    box.notify(b"n2")
    box.reply(b"r2")
    assert box
    assert drain(box) == b"r1r2n1n2end"
    assert not box
    for _ in range(5):
        box.notify(b"x" * 20_000)
    box.end(b"end")
    assert drain(box) == b"x" * 100_000 + b"end"


def test_the_oldest_notifications_go_and_are_counted() -> None:
    box = outbox(Limits(notifications=3))
    for number in range(10):
        box.notify(b"%d" % number)
    assert box.lost == 7
    assert drain(box) == b"<7 lost>789"
    assert (box.lost, box.notification_bytes) == (0, 0)
    box.notify(b"x")
    assert drain(box) == b"x"  # told once


def test_large_ones_are_bounded_by_their_bytes() -> None:
    box = outbox(Limits(notifications=1000, notification_bytes=100))
    for number in range(10):
        box.notify(b"%d" % number * 30)
        assert box.notification_bytes <= 100
    assert drain(box) == b"<7 lost>" + b"7" * 30 + b"8" * 30 + b"9" * 30


def test_one_that_is_larger_than_all_of_them_may_be_is_kept_alone() -> None:
    box = outbox(Limits(notification_bytes=100))
    box.notify(b"a")
    box.notify(b"b" * 200)
    assert drain(box) == b"<1 lost>" + b"b" * 200


@given(st.lists(st.sampled_from(["reply", "notify", "take"]), max_size=200), st.integers(1, 5))
def test_against_a_plain_list(steps: list[str], room: int) -> None:
    """What was sent, and what was said to be lost, is all there was, in order."""
    box = Outbox(Limits(notifications=room), lambda count: b"L%d " % count)
    numbers = itertools.count()
    replies: list[bytes] = []
    notified = 0
    sent = b""
    for step in [*steps, "take", "take"]:
        if step == "take":
            sent += box.take()
        elif step == "reply":
            replies.append(b"r%d " % next(numbers))
            box.reply(replies[-1])
        else:
            box.notify(b"n%d " % notified)
            notified += 1
    words = sent.split()
    assert [word for word in words if word.startswith(b"r")] == [reply.strip() for reply in replies]
    following = 0
    for word in words:
        if word.startswith(b"L"):
            following += int(word[1:])
        elif word.startswith(b"n"):
            assert int(word[1:]) == following
            following += 1
    assert following == notified


@pytest.mark.parametrize("size", [100, 20_000])
def test_notifications_leave_a_part_at_a_time(size: int) -> None:
    """The rest stays where the oldest can be dropped, should the client not read."""
    box = outbox(Limits())
    for _ in range(10):
        box.notify(bytes(size))
    assert len(box.take()) <= 32768 + size
