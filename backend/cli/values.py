"""Parameters and answers of the RPC as one writes and reads them on a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from backend.vm.errors import CannotRun
from backend.vm.machine import parse_size

_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)")
_SIZE = re.compile(r"\d+[KMGT](i?B)?")
_WORDS = {"true": True, "false": False, "null": None}
_HEX = "hex:"

ADDRESSES = frozenset(
    {"iova", "vaddr", "size", "mapped", "gpa", "hva", "root", "entry", "address", "rid", "input", "output", "target"}
)
"""What is read in hexadecimal."""


def parameter(word: str) -> tuple[str, Any]:
    """`key=value`. CannotRun where it is none."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise CannotRun(f"{word!r} is no parameter: write key=value, as ioasid=1")
    try:
        return key, parse(value)
    except ValueError as error:
        raise CannotRun(f"{key}={value}: {error}") from error


def parameters(words: Sequence[str]) -> dict[str, Any]:
    """All of them; a key that comes twice is a mistake."""
    found: dict[str, Any] = {}
    for word in words:
        key, value = parameter(word)
        if key in found:
            raise CannotRun(f"{key} is given twice")
        found[key] = value
    return found


def parse(value: str) -> Any:
    """A number (0x1000, 12), a size (4K, 1G), true, false, null, bytes (hex:00ff), JSON ({...}, [...], "..."), or else
    a string. ValueError for JSON or hexadecimal digits that are wrong."""
    if value in _WORDS:
        return _WORDS[value]
    if _NUMBER.fullmatch(value):
        return int(value, 0) if "x" in value.lower() else int(value)
    if _SIZE.fullmatch(value):
        return parse_size(value)
    if value.startswith(_HEX):
        try:
            return bytes.fromhex(value.removeprefix(_HEX))
        except ValueError as error:
            raise ValueError("hex: is followed by pairs of hexadecimal digits") from error
    if value[:1] in ("{", "[", '"'):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"this is no JSON ({error}); quote a string that begins so: '\"...\"'") from error
    return value


def for_json(value: Any) -> Any:
    """An answer as JSON can hold it: bytes are "hex:..."."""
    if isinstance(value, bytes):
        return _HEX + value.hex()
    if isinstance(value, Mapping):
        return {str(key): for_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(each) for each in value]
    return value


def readable(value: Any, indent: str = "") -> list[str]:
    """An answer as lines: maps and lists as an indented outline, addresses in hexadecimal."""
    if isinstance(value, Mapping):
        lines: list[str] = []
        for key, each in value.items():
            lines += _entry(f"{indent}{key}:", each, indent, str(key))
        return lines or [f"{indent}(empty)"]
    if isinstance(value, list | tuple):
        lines = []
        for each in value:
            if isinstance(each, Mapping | list | tuple) and each:
                inner = readable(each, f"{indent}  ")
                lines += [f"{indent}- {inner[0].lstrip()}", *inner[1:]]
            else:
                lines.append(f"{indent}- {word(each)}")
        return lines or [f"{indent}(none)"]
    return [f"{indent}{word(value)}"]


def _entry(head: str, value: Any, indent: str, key: str) -> list[str]:
    if isinstance(value, Mapping | list | tuple) and value:
        if isinstance(value, list | tuple) and not any(isinstance(each, Mapping | list | tuple) for each in value):
            return [f"{head} {', '.join(word(each, key) for each in value)}"]
        return [head, *readable(value, f"{indent}  ")]
    return [f"{head} {word(value, key)}"]


def word(value: Any, key: str = "") -> str:
    """One value."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, bytes):
        return repr(value.decode()) if _printable(value) else _HEX + value.hex()
    if isinstance(value, int) and key in ADDRESSES:
        return f"{value:#x}"
    return str(value) if not isinstance(value, Mapping | list | tuple) else "none"


def _printable(value: bytes) -> bool:
    return bool(value) and all(0x20 <= byte < 0x7F for byte in value)
