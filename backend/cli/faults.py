"""`vioasid faults`: the DMA faults of a run, the newest last; with --follow also those to come."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from backend.cli.runs import add_run_options, talk
from backend.cli.supervisor import EXIT_OK
from backend.cli.values import for_json
from protocol import Client

TOPIC = "vm.fault"


def fill_parser(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = __doc__
    parser.add_argument("--follow", "-f", action="store_true", help="go on until interrupted, or until the run ends")
    parser.add_argument(
        "--json", action="store_true", help='print {"faults": [...], "lost"}; with --follow one object a line'
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, 2 could not connect."""
    return talk(args, lambda client: _follow(client, args) if args.follow else _print(client, args))


async def _print(client: Client, args: argparse.Namespace) -> int:
    faults: list[dict[str, Any]] = []
    lost = 0
    async for page in kept(client):
        faults += page["faults"]
        lost += page["lost"]
    if args.json:
        print(json.dumps({"faults": for_json(faults), "lost": lost}))
        return EXIT_OK
    _tell_lost(lost)
    for fault in faults:
        print(sentence(fault))
    return EXIT_OK


async def _follow(client: Client, args: argparse.Namespace) -> int:
    await client.call("subscribe", topics=[TOPIC])
    last = 0
    async for page in kept(client):
        _say_lost(page["lost"], args)
        for fault in page["faults"]:
            last = fault["number"]
            _say(fault, args)
    async for notification in client.notifications():
        if notification.method == "lost":
            _say_lost(notification.params[0]["count"], args)
        elif notification.method == TOPIC and notification.params[0]["number"] > last:
            _say(notification.params[0], args)
    return EXIT_OK


async def kept(client: Client) -> AsyncIterator[dict[str, Any]]:
    """The faults that the server keeps, page by page."""
    after, more = 0, True
    while more:
        page = await client.call("vm.faults", after=after)
        more = page["more"]
        if page["faults"]:
            after = page["faults"][-1]["number"]
        yield page


def sentence(fault: dict[str, Any]) -> str:
    """One fault in one line."""
    clock = time.strftime("%H:%M:%S", time.localtime(fault["time"]))
    rid = fault["rid"]
    who = f"{fault['device'] or 'device'} {rid >> 8:02x}:{rid >> 3 & 31:02x}.{rid & 7}"
    if fault["pasid"] is not None:
        who += f" PASID {fault['pasid']}"
    did = {"r": "read", "w": "write", "rw": "atomic"}.get(fault["access"], fault["access"])
    where = f"IOASID {fault['ioasid']} of context {fault['context']}" if fault["ioasid"] else "no IOASID"
    line = f"{clock} #{fault['number']} {who}: {did} at IOVA {fault['iova']:#x}, {where}: {fault['reason']}"
    if fault["stage"]:
        line += f", stage {fault['stage']} level {fault['level']}"
        if fault["gpa"] is not None:
            line += f", {'entry at ' if fault['stage'] == 1 else ''}GPA {fault['gpa']:#x}"
    return line


def _say(fault: dict[str, Any], args: argparse.Namespace) -> None:
    print(json.dumps(for_json(fault)) if args.json else sentence(fault), flush=True)


def _say_lost(count: int, args: argparse.Namespace) -> None:
    if args.json and count:
        print(json.dumps({"lost": count}), flush=True)
    elif not args.json:
        _tell_lost(count)


def _tell_lost(count: int) -> None:
    if count:
        print(f"({count} older ones were not kept)", flush=True)
