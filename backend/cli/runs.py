"""Finding the control socket of a run, and talking to it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from backend.cli.supervisor import EXIT_CHECK_FAILED
from backend.vm.errors import CannotRun
from backend.vm.run_folder import CONTROL, runtime_folder
from protocol import Client, Disconnected, Malformed, RpcError

PROBE_SECONDS = 2  # a server that is alive accepts at once; a full queue of connections ends sooner than that


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Which run is meant."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--name", metavar="NAME", help="the run's name (the only run there is)")
    which.add_argument("--socket", type=Path, metavar="PATH", help="the control socket itself")


def control_socket(args: argparse.Namespace) -> Path:
    """The socket that the options name. CannotRun says which runs there are."""
    if args.socket is not None:
        return Path(args.socket)
    found = running()
    if args.name is not None:
        if args.name not in found:
            raise CannotRun(f"no run is called {args.name!r}: {_listed(found)}")
        return found[args.name]
    if len(found) != 1:
        raise CannotRun(f"which run is meant? {_listed(found)}")
    return next(iter(found.values()))


def running() -> dict[str, Path]:
    """The control sockets on which a run of this user listens, by the run's name."""
    paths = sorted(runtime_folder().glob(f"*/{CONTROL}.sock"))
    return {path.parent.name: path for path in paths if _listening(path)}


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Client]:
    """A connection. CannotRun where nobody listens, or where the other side ends it."""
    try:
        client = await Client.connect(path)
    except Disconnected as error:
        raise CannotRun(str(error)) from error
    try:
        yield client
    except (Disconnected, Malformed) as error:
        raise CannotRun(f"the connection to {path} ended: {error}") from error
    finally:
        await client.close()


def talk(args: argparse.Namespace, work: Callable[[Client], Awaitable[int]]) -> int:
    """The exit code of `work` over a connection; 1 where the server refused something, in a sentence."""

    async def run() -> int:
        async with connected(control_socket(args)) as client:
            return await work(client)

    try:
        return asyncio.run(run())
    except RpcError as error:
        refused(error, as_json=args.json)
        return EXIT_CHECK_FAILED


def refused(error: RpcError, *, as_json: bool, **more: Any) -> None:
    """Say that the server refused: a line on stderr, or with --json an object on stdout."""
    if as_json:
        what = {"errno": error.errno, "name": error.name, "sentence": error.sentence}
        print(json.dumps({**more, "ok": False, "error": what}), flush=True)
    else:
        print(f"vioasid: {error}", file=sys.stderr, flush=True)


def _listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(os.fsencode(path))
        except OSError:
            return False  # what a run that died left behind
    return True


def _listed(found: dict[str, Path]) -> str:
    if not found:
        return "there is none; start one by `vioasid boot` or `vioasid serve`, or give --socket PATH"
    return f"there are {', '.join(found)}; give --name" if len(found) > 1 else f"there is {next(iter(found))}"
