"""What a refused command says."""

import errno as _errno
import os


class IoasidError(OSError):
    """A refused command; nothing was changed.

    `errno` (positive) follows the habits of Linux iommufd, `sentence` says what was wrong, where, and what to do
    about it.
    """

    def __init__(self, errno: int, sentence: str) -> None:
        super().__init__(errno, sentence)
        self.sentence = sentence

    @property
    def name(self) -> str:
        """The errno's symbol, such as "EBUSY"."""
        return _errno.errorcode.get(self.errno or 0, str(self.errno))

    def __str__(self) -> str:
        return f"{self.sentence} ({self.name}: {os.strerror(self.errno or 0)})"
