"""`vioasid ctl`: call methods of a run's control socket. Without METHOD, lines of stdin are called one after another on
one connection, and so in one context.

key=value: numbers (0x1000), sizes (4K, 1G), true, false, null, bytes (hex:00ff), JSON ({...}, [...], "..."), else
strings.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TextIO

from backend.cli.own_memory import OwnMemory
from backend.cli.runs import add_run_options, refused, talk
from backend.cli.supervisor import EXIT_CHECK_FAILED, EXIT_OK
from backend.cli.values import for_json, parameters, readable
from backend.vm.errors import CannotRun
from protocol import Client, RpcError

LOCAL = ("memory.read", "memory.write")


def fill_parser(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "In a line of stdin, # begins a comment, and a - before the method lets the rest go on if it is refused.\n"
        "hello lists the methods. exit codes: 0 done, 1 refused, 2 could not connect"
    )
    parser.add_argument("method", nargs="?", metavar="METHOD", help="as ioasid.alloc")
    parser.add_argument("parameters", nargs="*", metavar="key=value")
    parser.add_argument(
        "--memory",
        metavar="SIZE[@VADDR]",
        help="share this much memory of this command's own; memory.read and memory.write are its ends",
    )
    parser.add_argument("--json", action="store_true", help='print {"method", "ok", "result" or "error"} a line')
    add_run_options(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class Line:
    """One call. `may_fail`: go on if it is refused."""

    method: str
    fields: dict[str, Any]
    may_fail: bool = False


def run(args: argparse.Namespace) -> int:
    """The exit code; see the epilog."""
    one = None if args.method is None else Line(args.method, parameters(args.parameters))
    lines = parsed(sys.stdin) if one is None else iter([one])
    with ExitStack() as stack:
        memory = stack.enter_context(OwnMemory(args.memory)) if args.memory is not None else None
        return talk(args, lambda client: _call_all(client, memory, lines, as_json=args.json))


def parsed(text: TextIO) -> Iterator[Line]:
    """The calls that lines of text ask for. CannotRun names the line that is wrong."""
    for number, raw in enumerate(text, 1):
        try:
            words = shlex.split(raw, comments=True)
            if not words:
                continue
            may_fail = words[0].startswith("-")
            method = words[0][1:] if may_fail else words[0]
            yield Line(method, parameters(words[1:]), may_fail)
        except (ValueError, CannotRun) as error:
            raise CannotRun(f"line {number}: {error}") from error


async def _call_all(client: Client, memory: OwnMemory | None, lines: Iterator[Line], *, as_json: bool) -> int:
    if memory is not None:
        await memory.share(client)
    for line in lines:
        try:
            if line.method in LOCAL and memory is not None:
                result = memory.call(line.method, line.fields)
            else:
                result = await client.call(line.method, **line.fields)
        except RpcError as error:
            if line.may_fail and not as_json:
                print(f"refused: {error}", flush=True)
            else:
                refused(error, as_json=as_json, method=line.method)
            if not line.may_fail:
                return EXIT_CHECK_FAILED
            continue
        if as_json:
            print(json.dumps({"method": line.method, "ok": True, "result": for_json(result)}), flush=True)
        else:
            print("\n".join(["ok"] if result is None else readable(result)), flush=True)
    return EXIT_OK
