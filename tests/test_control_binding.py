"""The table of commands as methods: names, parameters, conversion, refusals."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum
from typing import Any

import pytest

from backend.control.binding import Bound, bind, bind_all
from backend.control.wire import converter, plain
from backend.core import Access, Reason
from backend.ioasid import COMMANDS, Command, Context, Engine, IoasidError

BOUND = bind_all()

# From the RFC: the file whose command it is, and the name.
NAMES = {
    "ioasid.alloc", "ioasid.free", "ioasid.get_info", "ioasid.map_dma", "ioasid.unmap_dma", "ioasid.create_nesting",
    "ioasid.bind_pgtable", "ioasid.unbind_pgtable", "ioasid.invalidate_cache", "vfio.bind_ioasid_fd",
    "vfio.unbind_ioasid_fd", "vfio.attach_ioasid", "vfio.detach_ioasid",
}  # fmt: skip


@pytest.fixture
def context() -> Context:
    return Engine().open()


def refused(context: Context, method: str, fields: Mapping[Any, Any]) -> IoasidError:
    with pytest.raises(IoasidError) as caught:
        BOUND[method](context, fields)
    return caught.value


def test_every_command_is_a_method_in_lower_case_in_its_group() -> None:
    assert BOUND.keys() >= NAMES
    assert {bound.rpc.partition(".")[2] for bound in BOUND.values()} == {name.lower() for name in COMMANDS}
    assert {name.partition(".")[0] for name in BOUND} <= {"ioasid", "vfio", "kvm"}


@pytest.mark.parametrize("bound", BOUND.values(), ids=BOUND.keys())
def test_parameters_are_the_declared_fields(bound: Bound) -> None:
    assert list(bound.parameters) == [each.name for each in bound.command.fields]


def test_a_row_without_a_method_or_with_a_field_of_its_own_is_found() -> None:
    with pytest.raises(LookupError, match="no method no_such_command"):
        bind(Command("NO_SUCH_COMMAND", None, "x"))
    with pytest.raises(LookupError, match="ioasid"):
        bind(Command("FREE", 4, "x"))


def test_parameters_too_few_and_too_many(context: Context) -> None:
    error = refused(context, "ioasid.unmap_dma", {"ioasid": 1, "iova": 0})
    assert (error.errno, error.sentence) == (
        errno.EINVAL,
        "UNMAP_DMA: size is missing: it takes ioasid, iova, size",
    )
    error = refused(context, "ioasid.free", {"ioasid": 1, "force": True})
    assert (error.errno, error.sentence) == (errno.EINVAL, "FREE: no parameter 'force': it takes ioasid")
    assert refused(context, "ioasid.free", {b"\xff": 1}).errno == errno.EINVAL


def test_names_and_values_may_be_bin(context: Context) -> None:
    assert BOUND["ioasid.alloc"](context, {b"kind": b"kernel", b"vendor": b"amd-v1"}) == 1
    assert BOUND["ioasid.get_info"](context, {b"ioasid": 1})["kind"] == "kernel"


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("ioasid.alloc", {"kind": []}),
        ("ioasid.alloc", {"kind": {}}),
        ("ioasid.alloc", {"kind": None}),
        ("ioasid.alloc", {"vendor": 7}),
        ("ioasid.alloc", {"levels": "four"}),
        ("ioasid.free", {"ioasid": "1"}),
        ("ioasid.free", {"ioasid": None}),
        ("ioasid.free", {"ioasid": True}),
        ("ioasid.free", {"ioasid": 1.0}),
        ("ioasid.free", {"ioasid": -1}),
        ("ioasid.map_dma", {"ioasid": 1, "iova": 0, "vaddr": 4096, "size": 4096, "access": "rwz"}),
        ("ioasid.map_dma", {"ioasid": 1, "iova": 0, "vaddr": 4096, "size": 4096, "access": {}}),
        ("ioasid.bind_pgtable", {"ioasid": 1, "root": []}),
        ("ioasid.bind_pgtable", {"ioasid": 1, "root": 0, "accessed": "yes"}),
        ("vfio.attach_ioasid", {"rid": 1 << 16, "ioasid": 1}),
        ("vfio.attach_ioasid", {"rid": 1, "ioasid": 1, "pasid": b"1"}),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_the_command(
    context: Context, method: str, fields: dict[str, Any]
) -> None:
    assert refused(context, method, fields).errno in {errno.EINVAL, errno.EOPNOTSUPP}


class Colour(StrEnum):
    DARK_RED = "dark-red"


class Level(IntEnum):
    LOW = 1


class Plain(Enum):
    A = "a"


@dataclass(frozen=True)
class Inner:
    access: Access
    colour: Colour = Colour.DARK_RED


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...]
    name: str | None = None


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (Access, "rw", Access.READ | Access.WRITE),
        (Access, "", Access(0)),
        (Access, 2, Access.WRITE),
        (Access, b"r", Access.READ),
        (Access, True, True),
        (Access, 1 << 40, 1 << 40),
        (Access, "q", "q"),
        (Access | None, None, None),
        (Colour, "dark-red", Colour.DARK_RED),
        (Colour, "DARK_RED", Colour.DARK_RED),
        (Colour, "blue", "blue"),
        (Colour, [], []),
        (Level, 1, Level.LOW),
        (Level, "low", Level.LOW),
        (Inner, {"access": "r"}, Inner(Access.READ)),
        (Inner, {b"access": "r", b"colour": b"dark-red"}, Inner(Access.READ)),
        (Inner, {"access": "r", "size": 1}, {"access": "r", "size": 1}),
        (Inner, {}, {}),
        (Inner, 5, 5),
        (list[Inner], [{"access": "w"}], [Inner(Access.WRITE)]),
        (Outer, {"inner": {"access": 1}, "many": [{"access": 2}]}, Outer(Inner(Access(1)), (Inner(Access(2)),))),
        (str, b"text", "text"),
        (str, b"\xff", b"\xff"),
    ],
)
def test_conversion_by_annotation(annotation: Any, value: Any, expected: Any) -> None:
    convert = converter(annotation)
    assert convert is not None
    found = convert(value)
    assert (found, type(found)) == (expected, type(expected))


def test_what_needs_no_conversion_has_none() -> None:
    assert converter(int) is None
    assert converter(int | None) is None
    assert converter(bytes) is None


def test_answers_are_plain() -> None:
    outer = Outer(Inner(Access.READ | Access.WRITE), (Inner(Access(0)),), "n")
    assert plain(outer) == {
        "inner": {"access": "rw", "colour": "dark-red"},
        "many": [{"access": "", "colour": "dark-red"}],
        "name": "n",
    }
    assert plain(Reason.NOT_PRESENT) == "NOT_PRESENT"
    assert plain(Plain.A) == "a"
    assert plain(bytearray(b"x")) == b"x" and plain(memoryview(b"y")) == b"y"
    assert plain({Colour.DARK_RED: frozenset({Level.LOW})}) == {"dark-red": ["LOW"]}
