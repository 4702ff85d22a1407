"""The table of commands as methods of the RPC: whatever joins the table joins here, under its name in lower case."""

from __future__ import annotations

import dataclasses
import errno
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from backend.ioasid import COMMANDS, Command, Context, IoasidError

from .wire import Converter, converter, plain, text

METHODS = {
    "BIND_IOASID_FD": "bind_device",
    "UNBIND_IOASID_FD": "unbind_device",
    "ATTACH_IOASID": "attach",
    "DETACH_IOASID": "detach",
}
"""Commands whose method of Context is not called after them: a method needs no word to say whose it is."""

OF_PYTHON = frozenset({"answered"})
"""Parameters that are no fields: what a process calls back has no place in a message."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: an entry of the map that it takes."""

    name: str
    required: bool
    convert: Converter | None
    record: str | None = None
    """The parameter of the Python method that collects it together with others; None: it is one itself."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A command as a method: `rpc` is its name there, `call` the method of Context."""

    command: Command
    rpc: str
    call: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    records: Mapping[str, type]

    def __call__(self, context: Context, params: Mapping[Any, Any]) -> Any:
        """Do it. Raises IoasidError: the command's own, or EINVAL for a parameter too many or too few."""
        known = self.parameters
        values: dict[str, Any] = {}
        for key, value in params.items():
            parameter = known.get(key) or self._named(key)
            name = parameter.name
            values[name] = value if parameter.convert is None else parameter.convert(value)
        if len(values) < len(known):
            for parameter in known.values():
                if parameter.required and parameter.name not in values:
                    raise self._refuse(f"{parameter.name} is missing: {self.usage()}")
        if self.records:
            values = self._gather(values)
        return plain(self.call(context, **values))

    def usage(self) -> str:
        """What it takes, in words."""
        if not self.parameters:
            return "it takes no parameters"
        return "it takes " + ", ".join(
            each.name if each.required else f"{each.name} (optional)" for each in self.parameters.values()
        )

    def _named(self, key: object) -> Parameter:
        found = self.parameters.get(str(text(key)))  # a client may send its keys as BIN
        if found is None:
            raise self._refuse(f"no parameter {key!r}: {self.usage()}")
        return found

    def _gather(self, values: dict[str, Any]) -> dict[str, Any]:
        parts: dict[str, dict[str, Any]] = {name: {} for name in self.records}
        rest: dict[str, Any] = {}
        for name, value in values.items():
            record = self.parameters[name].record
            (rest if record is None else parts[record])[name] = value
        return {**rest, **{name: self.records[name](**given) for name, given in parts.items()}}

    def _refuse(self, sentence: str) -> IoasidError:
        return IoasidError(errno.EINVAL, f"{self.command.name}: {sentence}")


def bind(command: Command) -> Bound:
    """One command, bound to the method of Context that does it. LookupError: a row without a method, or a field that
    the method does not take."""
    name = METHODS.get(command.name, command.name.lower())
    call = getattr(Context, name, None)
    if call is None:
        raise LookupError(f"{command.name} has no method {name} of Context")
    hints = get_type_hints(call)
    signature = inspect.signature(call).parameters
    parameters: dict[str, Parameter] = {}
    records: dict[str, type] = {}
    names = {each.name for each in command.fields}
    for argument in list(signature.values())[1:]:
        if argument.name in OF_PYTHON:
            continue
        hint = hints[argument.name]
        if argument.name in names:
            required = argument.default is inspect.Parameter.empty
            parameters[argument.name] = Parameter(argument.name, required, converter(hint))
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            # A record of Python stands for several fields, which RPC names one by one.
            records[argument.name] = hint
            inner = get_type_hints(hint)
            for each in dataclasses.fields(hint):
                required = each.default is dataclasses.MISSING
                parameters[each.name] = Parameter(each.name, required, converter(inner[each.name]), argument.name)
        else:
            raise LookupError(f"{command.name} has no field {argument.name}, which its method takes")
    if names != parameters.keys():
        raise LookupError(f"{command.name}: fields {sorted(names)}, and its method takes {sorted(parameters)}")
    ordered = {each.name: parameters[each.name] for each in command.fields}
    return Bound(command, f"{command.group}.{command.name.lower()}", call, ordered, records)


def bind_all() -> dict[str, Bound]:
    """Every command of the table, by its name in the RPC."""
    return {bound.rpc: bound for bound in map(bind, COMMANDS.values())}
