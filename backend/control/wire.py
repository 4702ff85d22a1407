"""Values of commands as MessagePack has them, and back: maps, lists, numbers, strings and bytes.

What a caller sends is converted by the annotation of the parameter that takes it. What does not fit is handed on as it
is, for the command's own check to refuse: it names the field.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum, IntFlag
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from backend.core import Access

Converter = Callable[[Any], Any]

ACCESS_LETTERS = {"r": Access.READ, "w": Access.WRITE, "x": Access.EXECUTE, "p": Access.PRIVILEGED}
"""An access is written as letters, "rw"; the empty string allows nothing."""


def access_from(value: object) -> object:
    """An Access from letters ("r", "w", "rw", ""), or from its number."""
    if isinstance(value, str):
        found = Access(0)
        for letter in value.lower():
            if letter not in ACCESS_LETTERS:
                return value
            found |= ACCESS_LETTERS[letter]
        return found
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= sum(Access):
        return Access(value)
    return value


def text(value: object) -> object:
    """A string, also where a client sends strings as BIN."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def converter(annotation: Any) -> Converter | None:
    """How a value from the wire becomes what this annotation says; None: it is that already."""
    origin = get_origin(annotation)
    if origin in {Union, types.UnionType}:
        arms = [arm for arm in get_args(annotation) if arm is not type(None)]
        if len(arms) != 1:
            return _first_of([found for arm in arms if (found := converter(arm)) is not None])
        inner = converter(arms[0])
        return None if inner is None else lambda value: None if value is None else inner(value)
    if origin in {list, tuple, Sequence, set, frozenset}:
        return _sequence(next((converter(arg) for arg in get_args(annotation) if arg is not Ellipsis), None), origin)
    if annotation is str or origin is Literal:
        return text
    if annotation is Access:
        return lambda value: access_from(text(value))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _enum(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _record(annotation)
    return None


def _first_of(found: Sequence[Converter]) -> Converter | None:
    if not found:
        return None

    def convert(value: Any) -> Any:
        for each in found:
            converted = each(value)
            if converted is not value:
                return converted
        return value

    return convert


def _sequence(inner: Converter | None, origin: Any) -> Converter:
    make = tuple if origin is tuple else list

    def convert(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return make(value if inner is None else map(inner, value))

    return convert


def _enum(annotation: type[Enum]) -> Converter:
    by_value: dict[Any, Enum] = {member.value: member for member in annotation}
    by_name = {member.name.lower(): member for member in annotation}

    def convert(value: Any) -> Any:
        value = text(value)
        if isinstance(value, str):
            return by_value.get(value) or by_name.get(value.lower(), value)
        return by_value.get(value, value) if isinstance(value, int) else value

    return convert


def _record(annotation: type) -> Converter:
    hints = get_type_hints(annotation)
    names = {each.name: converter(hints[each.name]) for each in dataclasses.fields(annotation)}
    needed = {
        each.name
        for each in dataclasses.fields(annotation)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }

    def convert(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = {str(text(key)): each for key, each in value.items()}
        if not needed <= given.keys() <= names.keys():
            return value
        return annotation(**{key: convert_(each) if (convert_ := names[key]) else each for key, each in given.items()})

    return convert


def plain(value: Any) -> Any:
    """An answer as MessagePack can carry it: records become maps, flags letters, other enumerations names."""
    if value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, Enum):
        return _plain_enum(value)
    if isinstance(value, int | float | str):
        return value
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Path):
        return str(value)
    return [plain(each) for each in value]


def _plain_enum(value: Enum) -> Any:
    if isinstance(value, Access):
        return "".join(letter for letter, flag in ACCESS_LETTERS.items() if flag in value)
    if isinstance(value, str):
        return value.value
    return value.value if isinstance(value, IntFlag) or not isinstance(value, IntEnum) else value.name
