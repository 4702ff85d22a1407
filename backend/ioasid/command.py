"""What one command of the uAPI is declared by: its fields with their units, the kinds it is legal on, its errors."""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from backend.core import RW, Access

from .errors import IoasidError
from .formats import PAGE_SIZE
from .kinds import Kind
from .limits import MAX_ENTRIES, MAX_GROUP, MAX_NAMES, MAX_PASID, MAX_RID

COMMON_ERRORS = MappingProxyType({errno.EBADF: "the context was closed"})
"""What any command can answer."""

U32_END = 1 << 32
U64_END = 1 << 64


def _number(value: object, end: int) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return "is no number"
    return None if 0 <= value < end else f"does not lie in [0, {end:#x})"


def _pages(value: object, end: int) -> str | None:
    wrong = _number(value, end)
    if wrong is None and isinstance(value, int) and value % PAGE_SIZE:
        return f"is not a multiple of {PAGE_SIZE}: round it to whole pages"
    return wrong


def _table(value: object) -> str | None:
    wrong = _number(value, U64_END)
    if wrong is None and isinstance(value, int) and value % 64:
        return "is not a multiple of 64: no format has such a root"
    return wrong


def _access(value: object) -> str | None:
    if not isinstance(value, Access) or int(value) > int(RW):
        return "is none of read, write and both"
    return None


def _name(value: object) -> str | None:
    return None if isinstance(value, str) and value else "is no name"


def _names(value: object) -> str | None:
    if not isinstance(value, tuple | list | frozenset) or len(value) > MAX_NAMES:
        return f"is no list of at most {MAX_NAMES} names"
    return next((f"holds {each!r}, which is no name" for each in value if _name(each)), None)


class Unit(Enum):
    """What a field holds: its description, and a check that answers with what is wrong or None."""

    IOASID = ("number local to the context", lambda v: _number(v, U32_END))
    RID = ("bus/device/function, 16 bits", lambda v: _number(v, MAX_RID + 1))
    PASID = ("20 bits", lambda v: _number(v, MAX_PASID + 1))
    ADDRESS = ("bytes, a multiple of 4096", lambda v: _pages(v, U64_END))
    TABLE = ("bytes, a GPA, aligned as its format asks, to 64 at least", _table)
    SIZE = (
        "bytes, a multiple of 4096, not 0",
        lambda v: "is 0: name at least one page" if v == 0 else _pages(v, U64_END + 1),
    )
    LENGTH = ("bytes, a multiple of 4096, may be 0", lambda v: _pages(v, U64_END + 1))
    COUNT = ("number", lambda v: _number(v, U32_END))
    COUNT64 = ("bytes, 64 bits", lambda v: _number(v, U64_END))
    COOKIE = ("64 bits chosen by the user", lambda v: _number(v, U64_END))
    ACCESS = ("READ, WRITE or both", _access)
    NAME = ("name", _name)
    NAMES = ("list of names", _names)
    PID = ("process number", lambda v: _number(v, U32_END))
    BITS = ("bits, up to 64", lambda v: _number(v, 65))
    BYTES = ("bytes", lambda v: _number(v, U32_END))
    GROUP = ("page request group index, 9 bits", lambda v: _number(v, MAX_GROUP + 1))
    ENTRIES = (
        "list of records",
        lambda v: (
            None
            if isinstance(v, tuple | list) and len(v) <= MAX_ENTRIES
            else f"is no list of at most {MAX_ENTRIES} records"
        ),
    )
    FLAG = ("yes or no", lambda v: None if isinstance(v, bool) else "is neither yes nor no")

    def __init__(self, text: str, check: Callable[[object], str | None]) -> None:
        self.text = text
        self.check = check


@dataclass(frozen=True, slots=True)
class Field:
    """One input of a command. An optional one may be None."""

    name: str
    unit: Unit
    optional: bool = False
    text: str = ""
    """What it says, where its name and unit do not."""


@dataclass(frozen=True, slots=True)
class Command:
    """One row. `number`: n of _IO(IOASID_TYPE, IOASID_BASE + n) where v1 has one; `kinds`: of the IOASID that it
    names; `group`: whose command it is: ioasid, vfio or kvm; `answer`: what it answers with, "" for nothing."""

    name: str
    number: int | None
    summary: str
    fields: tuple[Field, ...] = ()
    kinds: frozenset[Kind] = frozenset(Kind)
    errors: Mapping[int, str] = field(default_factory=dict)
    group: str = "ioasid"
    answer: str = ""

    @property
    def takes_ioasid(self) -> bool:
        """Whether a field names the IOASID that it is about."""
        return any(each.unit is Unit.IOASID and (each.name == "ioasid" or not each.optional) for each in self.fields)

    def refuse(self, code: int, sentence: str) -> IoasidError:
        """The error to raise. An errno that the row does not list is a mistake of ours: KeyError."""
        if code not in self.errors and code not in COMMON_ERRORS:
            raise KeyError(f"{self.name} does not list {errno.errorcode[code]} (while refusing: {sentence})")
        return IoasidError(code, f"{self.name}: {sentence}")

    def check(self, **values: object) -> None:
        """Raise EINVAL where a field does not hold what its unit says."""
        for each in self.fields:
            value = values[each.name]
            if value is None and each.optional:
                continue
            wrong = each.unit.check(value)
            if wrong is not None:
                shown = f"{value:#x}" if isinstance(value, int) else repr(value)
                raise self.refuse(errno.EINVAL, f"{each.name} {shown} {wrong}")

    def check_range(self, name: str, start: int, size: int) -> None:
        """Raise EOVERFLOW where start + size wraps around 64 bits."""
        if start + size > U64_END:
            raise self.refuse(errno.EOVERFLOW, f"{name} {start:#x} + size {size:#x} goes past 2^64: shorten it")
