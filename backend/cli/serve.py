"""`vioasid serve`: serve a machine's functions for a QEMU of your own, or with --no-vm an engine without a guest."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from backend.cli import serve_engine
from backend.cli.options import add_machine_options, chosen_machine, namespaces
from backend.cli.supervisor import EXIT_OK, guarded, supervise
from backend.vm.backend import Backend
from backend.vm.boot import Boot
from backend.vm.errors import CannotRun
from backend.vm.machine import Machine
from backend.vm.parts import Parts
from backend.vm.progress import notice, shown
from backend.vm.qemu_process import die_with_parent
from backend.vm.run_folder import CONTROL, RunFolder

if TYPE_CHECKING:
    from backend.endpoints.nvme import Namespace

COMMAND_SECONDS = 10  # between asking the command to end and killing it, when we are interrupted


def fill_parser(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = __doc__
    add_machine_options(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="the run's name, after which its sockets' folder is called (the machine's)"
    )
    parser.add_argument(
        "--bar",
        type=lambda text: int(text, 0),
        metavar="ADDRESS",
        help="where your firmware puts the IOMMU's BAR 0, if it is not where ours does",
    )
    parser.add_argument(
        "--no-vm",
        action="store_true",
        help="no guest: an engine with software endpoints, to attach and do DMA with over its control socket",
    )
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help="with --no-vm: the control socket (one in the run's folder)"
    )
    parser.add_argument(
        "--endpoints", type=int, default=4, metavar="N", help="with --no-vm: how many software endpoints there are (4)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print one line {"ready", "sockets", "control", "arguments", "bar"} in place of text; with --no-vm '
        '{"ready", "socket", "endpoints"}',
    )
    parser.add_argument(
        "command",
        nargs="*",
        metavar="COMMAND",
        help="after --: run this as soon as all sockets listen, end when it ends, with its exit code",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until interrupted, or until COMMAND ends."""
    if args.no_vm:
        return serve_engine.run(args, _command)
    if args.socket is not None:
        raise CannotRun("--socket goes with --no-vm: a VM's sockets lie in its run's folder, see --name")
    machine = chosen_machine(args)
    with RunFolder(args.name or machine.name) as folder:
        code = supervise(
            lambda: guarded(lambda: _serve(machine, args, folder)), lambda _: None, own_group=not args.command
        )
        folder.keep_logs = any(folder.logs.iterdir())
        if folder.keep_logs:
            notice(f"logs: {folder.logs}")
    return code


def _serve(machine: Machine, args: argparse.Namespace, folder: RunFolder) -> int:
    with namespaces(machine, args) as disks:
        with shown("serve"):
            parts = Parts.gather(machine, kernel=args.kernel, initrd=args.initrd, accel=args.accel)
        return asyncio.run(_until_done(machine, args, folder, parts, disks))


async def _until_done(
    machine: Machine, args: argparse.Namespace, folder: RunFolder, parts: Parts, disks: dict[str, Namespace]
) -> int:
    sockets = {function.name: folder.socket(function.name) for function in machine.functions}
    backend = Backend(machine, sockets, disks, parts.libvfio_user, control=folder.socket(CONTROL))
    try:
        await backend.start()
        bar = args.bar
        if bar is None and not args.command:
            bar = await Boot(backend, parts, folder, lambda _: None).learn(machine)
        if not args.command:
            _say_ready(machine, args, parts, sockets, bar, control=folder.socket(CONTROL))
            await backend.watch(asyncio.Event().wait())
            return EXIT_OK
        return await backend.watch(_command(args.command))
    finally:
        await backend.close()


def _say_ready(
    machine: Machine, args: argparse.Namespace, parts: Parts, sockets: dict[str, Path], bar: int, *, control: Path
) -> None:
    command = parts.command(machine, sockets).with_ivrs(parts.ivrs(machine, bar))
    arguments = command.functions()
    if args.json:
        ready = {
            "ready": True,
            "sockets": {name: str(path) for name, path in sockets.items()},
            "control": str(control),
            "arguments": arguments,
            "bar": bar,
        }
        print(json.dumps(ready), flush=True)
        return
    print(
        f"# {machine.name} is served. Give your QEMU (10.1 or newer, with vfio-user-pci) these arguments:\n"
        f"{shlex.join(arguments)}\n"
        "# and the kernel line intremap=off. The IVRS says that the firmware puts the IOMMU's registers at "
        f"{bar:#x}, as QEMU {parts.qemu.version} does with this memory;\n"
        "# if yours puts them elsewhere (info pci), start again with --bar ADDRESS.\n"
        "# A whole line that runs: vioasid boot --dry-run\n"
        f"# To look into it meanwhile: vioasid spaces --socket {shlex.quote(str(control))}\n"
        "ready",
        flush=True,
    )


async def _command(argv: list[str]) -> int:
    try:
        process = await asyncio.create_subprocess_exec(*argv, preexec_fn=die_with_parent)
    except OSError as error:
        raise CannotRun(f"{argv[0]} did not start: {error.strerror}; correct the command after --") from error
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), COMMAND_SECONDS)
            if process.returncode is None:
                process.kill()
                await process.wait()
