"""A machine: what guest is started and which functions are served to it, read from one file in qemu-configs/."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.vm.errors import CannotRun

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "qemu-configs"

IOMMU_MODELS = frozenset({"amd-iommu"})
ENDPOINT_MODELS = frozenset({"nvme"})

MAX_FUNCTIONS = 16  # one socket and one libvfio-user context each; a machine file is written by a person
MIN_MEMORY = 128 << 20  # Debian's kernel does not reach userspace with less
MAX_MEMORY = 1 << 40  # beyond this the guest's addresses would not fit the 48-bit stage 2 by any sane margin
MAX_CPUS = 64  # more than a TCG host can carry; a typing error otherwise

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNIT = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes from ``512M``, ``4G`` or a plain number (binary units); ValueError otherwise."""
    match = _SIZE.fullmatch(str(text).strip())
    if not match:
        raise ValueError(f"{text!r} is no size: write a number with K, M, G or T behind it, as 512M")
    return int(match[1]) * _UNIT[match[2].upper()]


@dataclass(frozen=True, slots=True)
class FunctionConfig:
    """One PCI function that the backend serves. `slot` is its device number on the root bus; its RID is slot << 3."""

    name: str
    model: str
    slot: int
    size: int = 0

    @property
    def rid(self) -> int:
        return self.slot << 3

    @property
    def bdf(self) -> str:
        return f"0000:00:{self.slot:02x}.0"


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds after which a phase counts as hung."""

    firmware: float = 20
    boot: float = 90
    checks: float = 120


@dataclass(frozen=True, slots=True)
class Machine:
    """A whole machine; memory in bytes."""

    name: str
    description: str
    type: str
    cpu: str
    memory: int
    cpus: int
    append: str
    modules: tuple[str, ...]
    functions: tuple[FunctionConfig, ...]
    limits: Limits = Limits()
    built_modules: tuple[str, ...] = ()
    """Modules of guest-tests/modules, built for the kernel at hand."""

    @property
    def iommu(self) -> FunctionConfig:
        return next(f for f in self.functions if f.model in IOMMU_MODELS)

    @property
    def endpoints(self) -> tuple[FunctionConfig, ...]:
        return tuple(f for f in self.functions if f.model in ENDPOINT_MODELS)

    def with_options(self, *, memory: str | None = None, cpus: int | None = None, append: str = "") -> Machine:
        """The same machine with what the command line asks for in place of the file's values."""
        new = dataclasses.replace(self, append=f"{self.append} {append}".strip())
        if memory is not None:
            new = dataclasses.replace(new, memory=_size("--memory", memory))
        if cpus is not None:
            new = dataclasses.replace(new, cpus=cpus)
        _check_resources(new, "the command line")
        return new


def names() -> list[str]:
    """Names of all machines there are."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.toml"))


def load(name: str) -> Machine:
    """The machine called `name`, or the one in the file of that path."""
    path = Path(name) if name.endswith(".toml") else CONFIG_FOLDER / f"{name}.toml"
    try:
        text = path.read_text()
    except OSError as error:
        if not name.endswith(".toml"):
            raise CannotRun(
                f"there is no machine {name!r}: choose one of {', '.join(names())}, or give the path of a .toml file"
            ) from error
        raise CannotRun(f"{path}: {error.strerror}; give a machine file that can be read") from error
    try:
        return parse(path.stem, tomllib.loads(text))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise CannotRun(f"{path}: {reason}; correct the machine file") from error


def parse(name: str, data: Mapping[str, Any]) -> Machine:
    """A machine from the decoded file; ValueError, TypeError or KeyError say what is wrong in it."""
    _known("the file", data, {"description", "machine", "kernel", "limits", "function"})
    board, kernel = dict(data["machine"]), dict(data.get("kernel", {}))
    _known("[machine]", board, {"type", "cpu", "memory", "cpus"})
    _known("[kernel]", kernel, {"append", "modules", "built_modules"})
    limits = dict(data.get("limits", {}))
    _known("[limits]", limits, {field.name for field in dataclasses.fields(Limits)})
    machine = Machine(
        name=name,
        description=str(data.get("description", name)),
        type=str(board["type"]),
        cpu=str(board.get("cpu", "qemu64")),
        memory=parse_size(board["memory"]),
        cpus=int(board.get("cpus", 1)),
        append=str(kernel.get("append", "console=ttyS0")),
        modules=tuple(kernel.get("modules", ())),
        built_modules=tuple(kernel.get("built_modules", ())),
        functions=tuple(_function(entry) for entry in data.get("function", ())),
        limits=Limits(**{key: float(value) for key, value in limits.items()}),
    )
    _check_functions(machine)
    _check_resources(machine, "[machine]")
    return machine


def _function(entry: Mapping[str, Any]) -> FunctionConfig:
    _known("[[function]]", entry, {"name", "model", "slot", "size"})
    function = FunctionConfig(
        str(entry["name"]), str(entry["model"]), int(entry["slot"]), parse_size(entry.get("size", 0))
    )
    if function.model not in IOMMU_MODELS | ENDPOINT_MODELS:
        known = ", ".join(sorted(IOMMU_MODELS | ENDPOINT_MODELS))
        raise ValueError(f"function {function.name!r} has the unknown model {function.model!r} (known: {known})")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,15}", function.name):
        raise ValueError(
            f"function name {function.name!r} must be 1 to 16 of a-z, 0-9 and '-': its socket is named after it"
        )
    if not 1 <= function.slot <= 30:
        raise ValueError(f"function {function.name!r} has slot {function.slot}: 1 to 30 are free on q35's root bus")
    return function


def _check_functions(machine: Machine) -> None:
    functions = machine.functions
    if len(functions) > MAX_FUNCTIONS:
        raise ValueError(f"{len(functions)} functions, at most {MAX_FUNCTIONS} can be served")
    for what in ("name", "slot"):
        values = [getattr(f, what) for f in functions]
        if len(set(values)) != len(values):
            raise ValueError(f"two functions share a {what}: {values}")
    if sum(f.model in IOMMU_MODELS for f in functions) != 1:
        raise ValueError(f"a machine has exactly one IOMMU function (models: {', '.join(sorted(IOMMU_MODELS))})")
    if not machine.endpoints:
        raise ValueError("a machine has at least one endpoint behind its IOMMU")


def _check_resources(machine: Machine, where: str) -> None:
    if not MIN_MEMORY <= machine.memory <= MAX_MEMORY or machine.memory % (2 << 20):
        raise CannotRun(
            f"{where}: {machine.memory} bytes of guest memory cannot be used; give 128M to 1T, a multiple of 2M"
        )
    if not 1 <= machine.cpus <= MAX_CPUS:
        raise CannotRun(f"{where}: {machine.cpus} CPUs cannot be used; give 1 to {MAX_CPUS}")


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise CannotRun(f"{option}: {error}") from error


def _known(where: str, data: Mapping[str, Any], keys: set[str]) -> None:
    unknown = sorted(set(data) - keys)
    if unknown:
        raise ValueError(f"{where} holds {unknown[0]!r}, which means nothing here (known: {', '.join(sorted(keys))})")
