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


Check = Callable[[object], str | None]
"""What is wrong with a value; None: nothing."""


def _number(end: int, unit: int = 1, why: str = "") -> Check:
    """Numbers in [0, end) that are multiples of `unit`."""

    def check(value: object) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return "is no number"
        if not 0 <= value < end:
            return f"does not lie in [0, {end:#x})"
        return f"is not a multiple of {unit}: {why}" if value % unit else None

    return check


def _pages(end: int) -> Check:
    return _number(end, PAGE_SIZE, "round it to whole pages")


_length = _pages(U64_END + 1)


def _size(value: object) -> str | None:
    return "is 0: name at least one page" if value == 0 else _length(value)


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

    IOASID = ("number local to the context", _number(U32_END))
    RID = ("bus/device/function, 16 bits", _number(MAX_RID + 1))
    PASID = ("20 bits", _number(MAX_PASID + 1))
    ADDRESS = ("bytes, a multiple of 4096", _pages(U64_END))
    TABLE = (
        "bytes, a GPA, aligned as its format asks, to 64 at least",
        _number(U64_END, 64, "no format has such a root"),
    )
    SIZE = ("bytes, a multiple of 4096, not 0", _size)
    LENGTH = ("bytes, a multiple of 4096, may be 0", _length)
    COUNT = ("number", _number(U32_END))
    COUNT64 = ("bytes, 64 bits", _number(U64_END))
    COOKIE = ("64 bits chosen by the user", _number(U64_END))
    ACCESS = ("READ, WRITE or both", _access)
    NAME = ("name", _name)
    NAMES = ("list of names", _names)
    PID = ("process number", _number(U32_END))
    BITS = ("bits, up to 64", _number(65))
    BYTES = ("bytes", _number(U32_END))
    GROUP = ("page request group index, 9 bits", _number(MAX_GROUP + 1))
    ENTRIES = (
        "list of records",
        lambda v: (
            None
            if isinstance(v, tuple | list) and len(v) <= MAX_ENTRIES
            else f"is no list of at most {MAX_ENTRIES} records"
        ),
    )
    FLAG = ("yes or no", lambda v: None if isinstance(v, bool) else "is neither yes nor no")

    def __init__(self, text: str, check: Check) -> None:
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

    def check(self, values: Mapping[str, object]) -> None:
        """Raise EINVAL where a field does not hold what its unit says. `values`: of all fields."""
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
