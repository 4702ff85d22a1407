"""A machine: what guest is started and which functions are served to it, read from one file in qemu-configs/."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.vm.endpoint_models import ENDPOINT_MODELS
from backend.vm.errors import CannotRun
from backend.vm.initramfs import GUEST_TESTS

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "qemu-configs"

IOMMU_MODELS = frozenset({"amd-iommu"})

MAX_FUNCTIONS = 16  # one socket and one libvfio-user context each; a machine file is written by a person
MAX_PORTS = 16  # a function each; firmware gives each a window of memory and of I/O, and there are 64 KiB of I/O
MAX_NAME = 16
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
class PortConfig:
    """A PCI Express root port: `slot` is its device number on the root bus."""

    name: str
    slot: int


@dataclass(frozen=True, slots=True)
class FunctionConfig:
    """One PCI function that the backend serves.

    `slot` is its device number on its bus: the root bus, or, with `port`, the bus behind that root port. Firmware
    numbers those, and `Machine.with_buses` takes in what was learnt; until then `bus` is what SeaBIOS would give.
    `iommu` names the IOMMU before an endpoint.
    """

    name: str
    model: str
    slot: int
    size: int = 0
    port: str | None = None
    iommu: str | None = None
    bus: int = 0

    @property
    def rid(self) -> int:
        return self.bus << 8 | self.slot << 3

    @property
    def bdf(self) -> str:
        return f"0000:{self.bus:02x}:{self.slot:02x}.0"


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
    ports: tuple[PortConfig, ...] = ()
    limits: Limits = Limits()
    built_modules: tuple[str, ...] = ()
    """Modules of guest-tests/modules, built for the kernel at hand."""
    checks: tuple[str, ...] = ()
    """Files of guest-tests/checks, by their names without the number; none named: all."""

    @property
    def kernel_line(self) -> str:
        """With what the guest's init reads there."""
        return f"{self.append} vioasid.checks={','.join(self.checks)}" if self.checks else self.append

    @property
    def iommus(self) -> tuple[FunctionConfig, ...]:
        return tuple(f for f in self.functions if f.model in IOMMU_MODELS)

    @property
    def endpoints(self) -> tuple[FunctionConfig, ...]:
        return tuple(f for f in self.functions if f.model in ENDPOINT_MODELS)

    def behind(self, iommu: str) -> tuple[FunctionConfig, ...]:
        """The endpoints behind the IOMMU of that name."""
        return tuple(f for f in self.endpoints if f.iommu == iommu)

    def with_buses(self, buses: Mapping[str, int]) -> Machine:
        """The same machine with each function (by name) on the bus of that number."""
        functions = tuple(dataclasses.replace(f, bus=buses[f.name]) for f in self.functions)
        return dataclasses.replace(self, functions=functions)

    def with_options(
        self, *, memory: str | None = None, cpus: int | None = None, cpu: str | None = None, append: str = ""
    ) -> Machine:
        """The same machine with what the command line asks for in place of the file's values."""
        new = dataclasses.replace(self, append=f"{self.append} {append}".strip(), cpu=cpu or self.cpu)
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
        raw = path.read_bytes()
    except OSError as error:
        if not name.endswith(".toml"):
            raise CannotRun(
                f"there is no machine {name!r}: choose one of {', '.join(names())}, or give the path of a .toml file"
            ) from error
        raise CannotRun(f"{path}: {error.strerror}; give a machine file that can be read") from error
    try:
        return parse(path.stem, tomllib.loads(raw.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise CannotRun(f"{path}: {reason}; correct the machine file") from error


def _whole(what: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{what} is {value!r}: it must be a whole number")
    return value


def parse(name: str, data: Mapping[str, Any]) -> Machine:
    """A machine from the decoded file; ValueError, TypeError or KeyError say what is wrong in it."""
    _known("the file", data, {"description", "machine", "kernel", "guest", "limits", "port", "function"})
    board, kernel = dict(data["machine"]), dict(data.get("kernel", {}))
    _known("[machine]", board, {"type", "cpu", "memory", "cpus"})
    _known("[kernel]", kernel, {"append", "modules", "built_modules"})
    guest = dict(data.get("guest", {}))
    _known("[guest]", guest, {"checks"})
    limits = dict(data.get("limits", {}))
    _known("[limits]", limits, {field.name for field in dataclasses.fields(Limits)})
    ports = tuple(_port(entry) for entry in data.get("port", ()))
    machine = Machine(
        name=name,
        description=str(data.get("description", name)),
        type=str(board["type"]),
        cpu=str(board.get("cpu", "qemu64")),
        memory=parse_size(board["memory"]),
        cpus=_whole("[machine] cpus", board.get("cpus", 1)),
        append=str(kernel.get("append", "console=ttyS0")),
        modules=tuple(kernel.get("modules", ())),
        built_modules=tuple(kernel.get("built_modules", ())),
        functions=_functions(data.get("function", ()), ports),
        ports=ports,
        checks=_checks(guest.get("checks", ())),
        limits=Limits(**{key: float(value) for key, value in limits.items()}),
    )
    _check_slots(machine)
    _check_iommus(machine)
    _check_resources(machine, "[machine]")
    return machine


def _checks(names: Sequence[str]) -> tuple[str, ...]:
    known = [path.stem.partition("-")[2] for path in sorted((GUEST_TESTS / "checks").glob("*.sh"))]
    for name in names:
        if name not in known:
            raise ValueError(f"[guest] checks names {name!r}, which is none (known: {', '.join(known)})")
    return tuple(names)


def _port(entry: Mapping[str, Any]) -> PortConfig:
    _known("[[port]]", entry, {"name", "slot"})
    return PortConfig(_name("port", entry), _slot("port", entry))


def _functions(entries: Sequence[Mapping[str, Any]], ports: Sequence[PortConfig]) -> tuple[FunctionConfig, ...]:
    """Endpoints that name no IOMMU stand behind the first. Buses as SeaBIOS numbers them: in the order of the ports'
    slots, from 1."""
    found = [_function(entry) for entry in entries]
    first = next((f.name for f in found if f.model in IOMMU_MODELS), None)
    order = [port.name for port in sorted(ports, key=lambda port: port.slot)]
    for index, function in enumerate(found):
        if function.port is not None:
            if function.port not in order:
                known = ", ".join(order) or "the file has none"
                raise ValueError(f"function {function.name!r} names the port {function.port!r} (ports: {known})")
            function = dataclasses.replace(function, bus=1 + order.index(function.port))  # noqa: PLW2901
        if function.model in ENDPOINT_MODELS and function.iommu is None:
            function = dataclasses.replace(function, iommu=first)  # noqa: PLW2901
        found[index] = function
    return tuple(found)


def _function(entry: Mapping[str, Any]) -> FunctionConfig:
    name, model = _name("function", entry), str(entry["model"])
    if model not in IOMMU_MODELS | ENDPOINT_MODELS.keys():
        known = ", ".join(sorted(IOMMU_MODELS | ENDPOINT_MODELS.keys()))
        raise ValueError(f"function {name!r} has the unknown model {model!r} (known: {known})")
    keys = {"name", "model", "slot"}
    if model in ENDPOINT_MODELS:
        keys |= {"port", "iommu"} | ({"size"} if ENDPOINT_MODELS[model].disk else set())
    _known(f"[[function]] {name!r} of model {model!r}", entry, keys)
    if ("port" in entry) == ("slot" in entry):
        raise ValueError(f"function {name!r} has either a slot (on the root bus) or a port (it is alone behind that)")
    return FunctionConfig(
        name,
        model,
        _slot("function", entry) if "slot" in entry else 0,
        parse_size(entry.get("size", 0)),
        port=str(entry["port"]) if "port" in entry else None,
        iommu=str(entry["iommu"]) if "iommu" in entry else None,
    )


def _name(what: str, entry: Mapping[str, Any]) -> str:
    name = str(entry["name"])
    if not re.fullmatch(rf"[a-z][a-z0-9-]{{0,{MAX_NAME - 1}}}", name):
        raise ValueError(
            f"{what} name {name!r} must be 1 to {MAX_NAME} of a-z, 0-9 and '-', a letter first: its socket and QEMU's "
            "device are named after it"
        )
    return name


def _slot(what: str, entry: Mapping[str, Any]) -> int:
    slot = _whole(f"the slot of {what} {entry['name']!r}", entry["slot"])
    if not 1 <= slot <= 30:
        raise ValueError(f"{what} {entry['name']!r} has slot {slot}: 1 to 30 are free on q35's root bus")
    return slot


def _check_slots(machine: Machine) -> None:
    functions, ports = machine.functions, machine.ports
    if len(functions) > MAX_FUNCTIONS:
        raise ValueError(f"{len(functions)} functions, at most {MAX_FUNCTIONS} can be served")
    if len(ports) > MAX_PORTS:
        raise ValueError(f"{len(ports)} ports, at most {MAX_PORTS} can be numbered")
    on_root = [f for f in functions if f.port is None]
    taken: dict[str, list[str]] = {
        "name": [f.name for f in functions] + [port.name for port in ports],
        "slot": [str(f.slot) for f in on_root] + [str(port.slot) for port in ports],
        "port": [f.port for f in functions if f.port is not None],
    }
    for what, values in taken.items():
        if len(set(values)) != len(values):
            raise ValueError(f"two functions or ports share a {what}: {', '.join(values)}")
    empty = {port.name for port in ports} - {function.port for function in functions}
    if empty:
        raise ValueError(f"nothing stands behind port {min(empty)!r}: give a function port = {min(empty)!r}")


def _check_iommus(machine: Machine) -> None:
    models = ", ".join(sorted(IOMMU_MODELS))
    if not machine.iommus:
        raise ValueError(f"a machine has at least one IOMMU function (models: {models})")
    names = [iommu.name for iommu in machine.iommus]
    for endpoint in machine.endpoints:
        if endpoint.iommu not in names:
            raise ValueError(
                f"endpoint {endpoint.name!r} stands behind {endpoint.iommu!r}, which is no IOMMU of this machine "
                f"({', '.join(names)})"
            )
    for name in names:
        if not machine.behind(name):
            raise ValueError(f"a machine has at least one endpoint behind each IOMMU, and {name!r} has none")


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
