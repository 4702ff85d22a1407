"""What can go wrong, as a tree:

OSError
  RpcError           a request was refused: [errno, sentence]
ConnectionError
  Disconnected       the connection ended with requests outstanding
Exception
  Malformed          bytes after which a connection cannot go on
  SocketRefused      the server's socket cannot be opened
"""

from __future__ import annotations

import errno as _errno


class RpcError(OSError):
    """A refused request; on the wire exactly [errno, sentence].

    `errno` is positive (ENOENT is 2), `sentence` says what was wrong, where, and what to do about it.
    """

    def __init__(self, errno: int, sentence: str) -> None:
        super().__init__(errno, sentence)
        self.sentence = sentence

    @property
    def name(self) -> str:
        """The errno's symbol, such as "EBUSY"."""
        return _errno.errorcode.get(self.errno or 0, str(self.errno))

    def __str__(self) -> str:
        return f"{self.sentence} ({self.name})"


class Malformed(Exception):
    """Bytes after which no later message could be trusted; the connection ends with this sentence."""

    def __init__(self, errno: int, sentence: str) -> None:
        super().__init__(sentence)
        self.errno = errno
        self.sentence = sentence


class Disconnected(ConnectionError):
    """The connection ended; the message says why, where the other side told."""


class SocketRefused(Exception):
    """The socket cannot be opened: what is wrong with its path, and what to do."""
