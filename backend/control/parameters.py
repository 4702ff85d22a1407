"""The parameters of the methods that are no commands of the uAPI: read one by one, refused with a sentence."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

from backend.core import RW, Access
from backend.ioasid import IoasidError

from .wire import access_from, text

_REQUIRED = -1


class Params:
    """The map of a request. Each reader takes one entry out; `end` refuses what nobody took.

    All raise IoasidError EINVAL that says which entry is wrong and how.
    """

    def __init__(self, method: str, given: Mapping[str, Any]) -> None:
        self.method = method
        self._given = dict(given)

    def number(self, name: str, end: int, default: int = _REQUIRED) -> int:
        """A number in [0, end)."""
        value = self._given.pop(name, None if default == _REQUIRED else default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
            raise self.refuse(f"{name} must be a number in [0, {end:#x}), and is {_shown(value)}")
        return value

    def optional(self, name: str, end: int) -> int | None:
        """A number in [0, end), or None."""
        if self._given.get(name) is None:
            self._given.pop(name, None)
            return None
        return self.number(name, end)

    def one_of(self, name: str, values: Sequence[int], default: int = _REQUIRED) -> int:
        """One of some numbers."""
        value = self._given.pop(name, None if default == _REQUIRED else default)
        if type(value) is not int or value not in values:
            raise self.refuse(f"{name} must be one of {', '.join(map(str, values))}, and is {_shown(value)}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """Yes or no."""
        value = self._given.pop(name, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{name} must be true or false, and is {_shown(value)}")
        return value

    def access(self, name: str) -> Access:
        """Letters: "r", "w" or "rw"."""
        value = self._given.pop(name, None)
        found = access_from(text(value))
        if not isinstance(found, Access) or not found or found & ~RW:
            raise self.refuse(f'{name} must be "r", "w" or "rw", and is {_shown(value)}')
        return found

    def data(self, name: str, longest: int) -> bytes:
        """Bytes; a string stands for its UTF-8."""
        value = self._given.pop(name, None)
        if isinstance(value, str):
            value = value.encode()
        if not isinstance(value, bytes):
            raise self.refuse(f"{name} must be bytes or a string, and is {_shown(value)}")
        if len(value) > longest:
            raise self.refuse(f"{name} has {len(value)} bytes, and at most {longest} go at once")
        return value

    def word(self, name: str, words: Sequence[str], default: str | None = None) -> str:
        """One of some words."""
        value = text(self._given.pop(name, default))
        if not isinstance(value, str) or value not in words:
            raise self.refuse(f"{name} must be one of {', '.join(words)}, and is {_shown(value)}")
        return value

    def words(self, name: str, words: Sequence[str], default: Sequence[str]) -> frozenset[str]:
        """A list of some words, or one of them."""
        value = self._given.pop(name, default)
        given = [text(each) for each in (value if isinstance(value, list | tuple) else [value])]
        for each in given:
            if each not in words:
                raise self.refuse(f"{name} are some of {', '.join(words)}, and {_shown(each)} is none")
        return frozenset(map(str, given))

    def end(self) -> None:
        """Nothing else may have been given."""
        for name in self._given:
            raise self.refuse(f"it takes no parameter {_shown(name)}")

    def refuse(self, sentence: str) -> IoasidError:
        """The error to raise."""
        return IoasidError(errno.EINVAL, f"{self.method}: {sentence}")


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
