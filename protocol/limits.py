"""Bounds on all that a peer can make grow, each with its reason. A server may be given others."""

from __future__ import annotations

from dataclasses import dataclass

MSGID_END = 1 << 32
"""MessagePack-RPC gives a msgid 32 bits."""

SOCKET_PATH_MAX = 107
"""Bytes of a Unix socket's path (unix(7): sun_path, without its terminating zero)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer, and all of them together, may cost."""

    message: int = (1 << 20) + 4096
    """Bytes of a message: 1 MiB of data (a DMA, or the dirty bitmap of 32 GiB in pages of 4 KiB) and what names it."""

    depth: int = 16
    """Arrays and maps within each other, the message's own array counted: no command nests more than six, and code
    that walks a value may recurse."""

    values: int = 16_384
    """Values of a request, names, arrays and maps counted: an array of 1,000 entries of a few fields each. To build a
    value costs up to 1 us and 100 bytes where it takes one byte of the message, and nothing else runs meanwhile."""

    in_flight: int = 256
    """Requests of a connection that are waited for (those that are answered at once never count): what a device has
    outstanding at most in PCI Express with 8-bit tags."""

    pending: int = 1 << 16
    """Such requests of all connections: some 3 KiB each, 200 MiB."""

    pending_least: int = 16
    """Of which each connection may always have so many."""

    connections: int = 1024
    """Each is an open context, and 1,024 is the usual limit of open files of a process."""

    descriptors: int = 8
    """File descriptors with one request: memory comes as one, and the system's limit for all is about 1,000."""

    unsent: int = 256 << 10
    """Bytes of replies that wait for the client to read; beyond, its requests are not read: about as much as the
    system itself keeps in a socket."""

    unsent_end: int = 4 << 20
    """Bytes of replies that end the connection: a few of the largest, which requests that were waited for may add
    after reading has stopped."""

    small: int = 64 << 10
    """Bytes that wait for a connection, and bytes of a message that is not whole, which it may always have here: a
    thousand of the usual requests and replies."""

    waiting: int = 192 << 20
    """Bytes of replies and notifications that wait for all connections to read: `small` for each, and what a hundred
    of them leave unread of large replies."""

    large: int = 64
    """Messages beyond `small` that arrive at a time; others are not read meanwhile. They are kept twice while they
    are cut: 128 MiB."""

    large_seconds: float = 10.0
    """Seconds that a large message may take when others wait: over a local socket it takes milliseconds."""

    notifications: int = 1024
    """Notifications kept for a slow reader, the newest: as many as a fault queue holds."""

    notification_bytes: int = 256 << 10
    """Bytes of them, should they be large."""

    read: int = 64 << 10
    """Bytes taken from a socket at once; more gains nothing."""

    turn: float = 0.002
    """Seconds in which a connection is served before others have their turn: some hundred small commands, so that
    taking turns costs nothing; a hundred busy clients still wait for each other no longer than one notices."""

    goodbye: float = 1.0
    """Seconds in which a client may read what was sent last before its connection ends."""


DEFAULT = Limits()
