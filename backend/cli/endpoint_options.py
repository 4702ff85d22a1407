"""`vioasid serve --no-vm`: which software endpoints there are and what each of them can do, from options or a file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backend.control.alone import FIRST_RID, MAX_ENDPOINTS, SoftwareEndpoint, usual_endpoints
from backend.ioasid import BEHIND_X86, FORMATS, PAGE_SIZE, PasidMode, Traits, Window
from backend.ioasid.limits import MAX_PASID, MAX_RID
from backend.vm.errors import CannotRun

USUAL = 4
MAX_FILE = 1 << 20
"""Bytes of a file: 1,024 endpoints with every trait are a third of it."""
MAX_WINDOWS = 16
"""Reserved ranges of an endpoint: firmware and interrupt windows of a real device are three or four, and each is looked
at by every MAP_DMA of what it is attached to."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_BDF = re.compile(r"([0-9a-fA-F]{2}):([01][0-9a-fA-F])\.([0-7])")
_RANGE = re.compile(r"(0[xX][0-9a-fA-F]+|\d+)-(0[xX][0-9a-fA-F]+|\d+)")


def chosen_endpoints(count_or_file: str | None, options: Sequence[str]) -> list[SoftwareEndpoint]:
    """Those of --endpoints (a number, or a file) and of each --endpoint. CannotRun with what is wrong in them."""
    found: list[SoftwareEndpoint] = []
    if count_or_file is None and not options:
        count_or_file = str(USUAL)
    if count_or_file is not None:
        if re.fullmatch(r"-?\d+", count_or_file):
            if not 0 < int(count_or_file) <= MAX_ENDPOINTS:
                raise CannotRun(f"--endpoints {count_or_file}: give 1 to {MAX_ENDPOINTS}")
            found += usual_endpoints(int(count_or_file))
        else:
            _from_file(Path(count_or_file), found)
    for option in options:
        _take(found, f"--endpoint {option}", _pairs(option))
    return found


def _from_file(path: Path, found: list[SoftwareEndpoint]) -> None:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE + 1)
        if len(text) > MAX_FILE:
            raise CannotRun(f"--endpoints {path}: the file has more than {MAX_FILE} bytes: give fewer endpoints")
        data = tomllib.loads(text.decode())
    except OSError as error:
        raise CannotRun(f"--endpoints {path}: {error.strerror}; give a number, or a TOML file") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CannotRun(f"--endpoints {path}: {error}; correct the file") from error
    entries = data.pop("endpoint", [])
    if data or not isinstance(entries, list) or not entries or not all(isinstance(each, dict) for each in entries):
        raise CannotRun(f"--endpoints {path}: it must hold [[endpoint]] tables, and nothing else")
    for number, entry in enumerate(entries, 1):
        _take(found, f"--endpoints {path}: [[endpoint]] {number}", entry)


def _pairs(option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in option.split(","):
        key, equals, value = pair.partition("=")
        if not equals or key in found:
            wrong = "is given twice" if equals else "is no key=value"
            raise CannotRun(f"--endpoint {option}: {pair!r} {wrong}; write it as name=nic0,group=slot,snoop=no")
        found[key] = value
    return found


def _take(found: list[SoftwareEndpoint], where: str, given: Mapping[str, Any]) -> None:
    """One more endpoint, with what was said of it."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        read = _KEYS.get(key)
        if read is None:
            raise CannotRun(f"{where}: there is no {key!r} (known: {', '.join(_KEYS)})")
        try:
            values[key.replace("-", "_")] = read(value)
        except ValueError as error:
            raise CannotRun(f"{where}: {key} {error}, and is {value!r}") from error
    if len(found) >= MAX_ENDPOINTS:
        raise CannotRun(f"{where}: there are {MAX_ENDPOINTS} endpoints already: give fewer")
    taken = {each.rid for each in found}
    name = values.pop("name", f"sw{len(found)}")
    rid = values.pop("rid", None)
    if rid is None:
        rid = next(each for each in range(FIRST_RID, MAX_RID, 8) if each not in taken)
    group = values.pop("group", None)
    if rid in taken or name in {each.name for each in found}:
        raise CannotRun(f"{where}: another endpoint has RID {rid:#06x} or the name {name!r}: choose others")
    found.append(SoftwareEndpoint(rid, name, replace(BEHIND_X86, **values), group))
    _refuse_odd(where, found[-1].traits)


def _refuse_odd(where: str, traits: Traits) -> None:
    """Traits that go together with no device."""
    if traits.pasid_mode == PasidMode.GLOBAL and traits.pasid_bits != MAX_PASID.bit_length():
        raise CannotRun(f"{where}: pasid-mode global has 20 bits of PASID, as ENQCMD does: leave pasid-bits out")
    if traits.pasid_mode != PasidMode.WHOLE and not traits.pasid_bits:
        raise CannotRun(f"{where}: pasid-mode {traits.pasid_mode} draws from a pool, which needs pasid-bits of 1 to 20")


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError("must be 1 to 32 of A-Z, a-z, 0-9, '.', '_' and '-'")
    return value


def _number(least: int, most: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        number = _int(value)
        if number is None or not least <= number <= most:
            raise ValueError(f"must be a number from {least} to {most}")
        return number

    return read


def _rid(value: object) -> int:
    bdf = _BDF.fullmatch(value) if isinstance(value, str) else None
    if bdf is not None:
        bus, device, function = (int(part, 16) for part in bdf.groups())
        return bus << 8 | device << 3 | function
    number = _int(value)
    if number is None or not 0 <= number <= MAX_RID:
        raise ValueError("must be bus:device.function as 01:00.0, or a number of 16 bits as 0x0100")
    return number


def _flag(value: object) -> bool:
    known = {True: True, False: False, "yes": True, "no": False}
    if not isinstance(value, bool | str) or value not in known:
        raise ValueError("must be yes or no")
    return known[value]


def _mode(value: object) -> PasidMode:
    if value not in list(PasidMode):
        raise ValueError(f"must be one of {', '.join(PasidMode)}")
    return PasidMode(str(value))


def _formats(value: object) -> frozenset[str]:
    names = _list(value)
    if not names or not FORMATS.keys() >= set(names):
        raise ValueError(f"must be some of {', '.join(FORMATS)}, with + between them")
    return frozenset(names)


def _reserved(value: object) -> tuple[Window, ...]:
    """As /sys/kernel/iommu_groups/*/reserved_regions shows them: the first address and the last."""
    ranges = _list(value)
    windows = []
    for each in ranges:
        found = _RANGE.fullmatch(each)
        first, last = (int(part, 0) for part in found.groups()) if found is not None else (1, 0)
        if first > last or last >> 64 or first % PAGE_SIZE or (last + 1) % PAGE_SIZE:
            raise ValueError("must be ranges of whole pages, first-last as 0xfee00000-0xfeefffff, with + between them")
        windows.append(Window(first, last + 1, "reserved"))
    if len(windows) > MAX_WINDOWS:
        raise ValueError(f"must be {MAX_WINDOWS} ranges at most")
    return tuple(windows)


def _list(value: object) -> list[str]:
    """Of a file a list, of an option what stands between plus signs; nothing for an empty one."""
    if isinstance(value, str):
        return value.split("+") if value else []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("must be a list of strings")
    return value


def _int(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"0[xX][0-9a-fA-F]+|[1-9]\d*|0", value):
        return int(value, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


_KEYS: Mapping[str, Callable[[object], Any]] = {
    "name": _name,
    "rid": _rid,
    "group": _name,
    "snoop": _flag,
    "pasid-bits": _number(0, MAX_PASID.bit_length()),
    "pasid-mode": _mode,
    "address-width": _number(12, 64),
    "formats": _formats,
    "reserved": _reserved,
}
"""What can be said of an endpoint, and how it is read. Numbers of an option may stand in a file as text, too."""
