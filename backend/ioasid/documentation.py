"""The commands in words: Markdown made from their table."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from .command import COMMON_ERRORS, Command
from .commands import COMMANDS
from .formats import FORMATS
from .kinds import Kind
from .pasid_formats import PASID_FORMATS

GROUPS = {"ioasid": "IOASIDs", "vfio": "Devices (VFIO)", "kvm": "The CPU (KVM)"}


def render_markdown() -> str:
    """All commands, formats and PASID tables; ends with a newline."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# The commands of the uAPI"
    yield ""
    yield "Made from the table of commands in `backend/ioasid`. Numbers are those of v1 of the RFC, n of"
    yield "`_IO(IOASID_TYPE, IOASID_BASE + n)`. A command does all it says, or answers with an errno and a sentence and"
    yield "changes nothing. Fields in brackets may be left out."
    for group, title in GROUPS.items():
        yield ""
        yield f"## {title}"
        for command in COMMANDS.values():
            if command.group == group:
                yield from _command(command)
    yield from _common()
    yield from _formats()


def _command(command: Command) -> Iterator[str]:
    number = f" ({command.number})" if command.number is not None else ""
    yield ""
    yield f"### {command.name}{number}"
    yield ""
    yield f"`{command.group}.{command.name.lower()}`: {command.summary}."
    yield ""
    if command.fields:
        yield "| field | type | meaning |"
        yield "| --- | --- | --- |"
        for field in command.fields:
            name = f"[{field.name}]" if field.optional else field.name
            yield f"| {name} | {field.unit.text} | {_cell(field.text)} |"
    said = []
    if command.takes_ioasid and command.kinds != frozenset(Kind):
        said.append(f"Legal on kind {' and '.join(kind for kind in Kind if kind in command.kinds)}.")
    if command.answer:
        said.append(f"Answers with {command.answer}.")
    if said:
        yield ""
        yield " ".join(said)
    yield ""
    for code, text in command.errors.items():
        yield f"- {errno.errorcode[code].replace('ENOTSUP', 'EOPNOTSUPP')}: {text}"


def _common() -> Iterator[str]:
    yield ""
    yield "## Errors that any command can answer"
    yield ""
    for code, text in COMMON_ERRORS.items():
        yield f"- {errno.errorcode[code]}: {text}"


def _formats() -> Iterator[str]:
    yield ""
    yield "## Page-table formats"
    yield ""
    yield "| vendor | levels | IOVA bits | granules | options | source |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for rule in FORMATS.values():
        levels = f"{rule.levels[0]}-{rule.levels[-1]}"
        widths = ", ".join(str(rule.widest(each)) for each in rule.levels)
        granules = ", ".join(map(str, rule.granules))
        yield f"| {rule.vendor} | {levels} | {widths} | {granules} | {', '.join(rule.options)} | {rule.source} |"
    yield ""
    yield "## PASID tables"
    yield ""
    yield "| vendor | fields | leads to | options | source |"
    yield "| --- | --- | --- | --- | --- |"
    for table in PASID_FORMATS.values():
        leads = ", ".join(table.leads_to)
        yield f"| {table.vendor} | {', '.join(table.numbers)} | {leads} | {', '.join(table.options)} | {table.source} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
