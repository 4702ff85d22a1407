"""`vioasid spaces`: the IOASIDs of a run as a tree: kinds, formats, parents, who is attached, counters."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Iterator
from typing import Any

from backend.cli.runs import add_run_options, talk
from backend.cli.supervisor import EXIT_OK
from backend.cli.values import for_json
from protocol import Client, RpcError

Record = dict[str, Any]


def fill_parser(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = __doc__
    parser.add_argument(
        "--json", action="store_true", help='print {"contexts": [{"context", "name", "devices", "spaces": [...]}]}'
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, 2 could not connect."""
    return talk(args, lambda client: _show(client, args))


async def _show(client: Client, args: argparse.Namespace) -> int:
    contexts: list[Record] = []
    for each in await client.call("vm.contexts"):
        try:
            contexts.append({**each, "spaces": await spaces_of(client, each["context"])})
        except RpcError as error:
            if error.errno != errno.ENOENT:  # it ended since it was listed
                raise
    if args.json:
        print(json.dumps({"contexts": for_json(contexts)}))
    elif not contexts:
        print("no contexts: nobody has opened one")
    else:
        for context in contexts:
            print("\n".join(tree(context)))
    return EXIT_OK


async def spaces_of(client: Client, context: int) -> list[Record]:
    """All IOASIDs of a context, by number."""
    found: list[Record] = []
    more = True
    while more:
        page = await client.call("vm.spaces", context=context, after=found[-1]["ioasid"] if found else 0)
        found += page["spaces"]
        more = page["more"]
    return found


def tree(context: Record) -> list[str]:
    """One context as lines."""
    children: dict[int | None, list[Record]] = {}
    for space in context["spaces"]:
        children.setdefault(space["parent"], []).append(space)
    head = f"context {context['context']}, {context['name']}: {_count(len(context['spaces']), 'IOASID')}"
    return [f"{head}, {_count(context['devices'], 'device')}", *_branches(children, None, "")]


def _branches(children: dict[int | None, list[Record]], parent: int | None, indent: str) -> Iterator[str]:
    spaces = children.get(parent, [])
    for index, space in enumerate(spaces):
        last = index == len(spaces) - 1
        yield f"{indent}{'└─' if last else '├─'} {headline(space)}"
        inner = f"{indent}{'   ' if last else '│  '}"
        bar = "│" if space["ioasid"] in children else " "
        for attachment in space["attached"]:
            yield f"{inner}{bar}  attached: {attached(attachment)}"
        yield f"{inner}{bar}  {counters(space['counters'])}"
        yield from _branches(children, space["ioasid"], inner)


def headline(space: Record) -> str:
    """What an IOASID is."""
    words = [f"{space['ioasid']} {space['kind']}"]
    fmt = space["format"]
    if fmt is not None:
        words.append(f"{fmt['vendor']} {_count(fmt['levels'], 'level')}")
    if space["address_width"] is not None:
        words.append(f"{space['address_width']} bits")
    table = space["pasid_table"]
    if table is not None:
        words.append(f"PASID table {table['vendor']}")
    if space["pid"] is not None:
        words.append(f"process {space['pid']}")
    if space["enforce_snoop"]:
        words.append("snoop enforced")
    if space["root"] is not None:
        words.append(f"root {space['root']:#x}")
    elif space["kind"] == "user":
        words.append("no table bound")
    if space["mappings"]:
        words.append(f"{_count(space['mappings'], 'mapping')} of {_bytes(space['mapped'])}")
    return ", ".join(words)


def attached(attachment: Record) -> str:
    """Who is attached, and whether its requests go here."""
    rid = attachment["rid"]
    words = f"{attachment['name']} {rid >> 8:02x}:{rid >> 3 & 31:02x}.{rid & 7}"
    if attachment["pasid"] is not None:
        words += f" PASID {attachment['pasid']}"
    if attachment["access"] != "rw":
        words += f" ({attachment['access'] or 'no access'})"
    return words if attachment["routes"] else f"{words}, routed to a child"


def counters(counted: Record) -> str:
    """What went through."""
    words = [_count(counted["requests"], "request"), _bytes(counted["bytes"]), _count(counted["faults"], "fault")]
    asked = counted["iotlb_hits"] + counted["iotlb_misses"]
    if asked:
        words.append(f"IOTLB hits {100 * counted['iotlb_hits'] / asked:.0f} %")
    return ", ".join(words)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _bytes(number: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number} bytes" if number != 1 else "1 byte"
