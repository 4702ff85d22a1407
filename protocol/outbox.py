"""What waits to be sent on a connection, without I/O: replies, none of them lost, and notifications, which may be."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .limits import Limits

NOTIFICATIONS_AT_ONCE = 32 << 10
"""Bytes of notifications handed to the system at once: the rest stays here, where the oldest can still be dropped."""


class Outbox:
    """A queue that does not grow beyond the limits; lost(count) makes the message that tells of those dropped."""

    def __init__(self, limits: Limits, lost: Callable[[int], bytes]) -> None:
        self._limits = limits
        self._lost_message = lost
        self._replies: list[bytes] = []
        self._notifications: deque[bytes] = deque()
        self._last = b""
        self.reply_bytes = 0
        self.notification_bytes = 0
        self.lost = 0
        """Notifications dropped since the client was last told."""

    def __bool__(self) -> bool:
        return bool(self._replies or self._notifications or self._last)

    def reply(self, data: bytes) -> None:
        """Whoever adds replies looks at reply_bytes."""
        self._replies.append(data)
        self.reply_bytes += len(data)

    @property
    def size(self) -> int:
        """Bytes of all that waits."""
        return self.reply_bytes + self.notification_bytes

    def notify(self, data: bytes, most: int | None = None) -> None:
        """Add a notification, at the expense of the oldest where there is no room: `most` bytes of them, else as the
        limits say."""
        most = self._limits.notification_bytes if most is None else most
        queue = self._notifications
        queue.append(data)
        self.notification_bytes += len(data)
        while len(queue) > 1 and (len(queue) > self._limits.notifications or self.notification_bytes > most):
            self.notification_bytes -= len(queue.popleft())
            self.lost += 1

    def end(self, data: bytes) -> None:
        """What is to be sent after all else."""
        self._last = data

    def take(self) -> bytes:
        """The next bytes to send; nothing when all are taken. How many notifications were lost stands where they would
        have stood: before the oldest that is left."""
        taken = self._replies
        self._replies = []
        self.reply_bytes = 0
        if self._notifications:
            if self.lost:
                taken.append(self._lost_message(self.lost))
                self.lost = 0
            size = 0
            while self._notifications and size < NOTIFICATIONS_AT_ONCE:
                data = self._notifications.popleft()
                size += len(data)
                taken.append(data)
            self.notification_bytes -= size
        if self._last and not self._notifications:
            taken.append(self._last)
            self._last = b""
        return taken[0] if len(taken) == 1 else b"".join(taken)
