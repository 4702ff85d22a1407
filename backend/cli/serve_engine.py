"""`vioasid serve --no-vm`: an engine with software endpoints, to attach and do DMA with over its control socket."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from backend.cli.endpoint_options import chosen_endpoints
from backend.cli.supervisor import EXIT_OK, guarded, supervise
from backend.control.alone import EngineAlone, SoftwareEndpoint
from backend.vm.errors import CannotRun
from backend.vm.run_folder import CONTROL, RunFolder
from protocol import SocketRefused

RUN_NAME = "engine"

Command = Callable[[list[str]], Awaitable[int]]


def run(args: argparse.Namespace, command: Command) -> int:
    """Serves until SIGINT or SIGTERM, which is its normal end, or until COMMAND ends (run by `command`)."""
    endpoints = chosen_endpoints(args.endpoints, args.endpoint)
    with ExitStack() as stack:
        path = args.socket
        if path is None:
            path = stack.enter_context(RunFolder(args.name or RUN_NAME)).socket(CONTROL)
        return supervise(
            lambda: guarded(lambda: asyncio.run(_serve(args, path, endpoints, command))),
            lambda _: None,
            own_group=not args.command,
        )


async def _serve(args: argparse.Namespace, path: Path, endpoints: Sequence[SoftwareEndpoint], command: Command) -> int:
    alone = EngineAlone(path, endpoints)
    try:
        try:
            await alone.start()
        except SocketRefused as error:
            raise CannotRun(str(error)) from error
        if args.command:
            return await command(args.command)
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        _say_ready(args, alone)
        await ended.wait()
        return EXIT_OK
    finally:
        await alone.close()


def _say_ready(args: argparse.Namespace, alone: EngineAlone) -> None:
    path = alone.control.path.absolute()
    if args.json:
        endpoints = [{"rid": rid, "name": name} for rid, name in alone.endpoints.items()]
        print(json.dumps({"ready": True, "socket": str(path), "endpoints": endpoints}), flush=True)
    else:
        first = next(iter(alone.endpoints))
        print(f"ready {shlex.quote(str(path))} ({len(alone.endpoints)} endpoints from RID {first:#06x})", flush=True)
    sys.stdout.flush()
