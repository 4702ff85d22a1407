"""`vioasid serve`: serve a machine's functions for a QEMU of your own, or with --no-vm an engine without a guest."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from backend.cli import serve_engine
from backend.cli.options import add_machine_options, chosen_machine, namespaces
from backend.cli.supervisor import EXIT_OK, guarded, supervise
from backend.viommu.amd import BAR_SIZE
from backend.vm.backend import Backend
from backend.vm.errors import CannotRun
from backend.vm.firmware import placement_of
from backend.vm.machine import Machine
from backend.vm.parts import Parts
from backend.vm.placement import Placement
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
        action="append",
        default=[],
        metavar="[NAME=]ADDRESS",
        help="where your firmware puts an IOMMU's BAR 0, if it is not where ours does; again for each IOMMU",
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
        "--endpoints",
        metavar="N|FILE",
        help="with --no-vm: how many software endpoints there are (4), or a TOML file of them (docs/control.md)",
    )
    parser.add_argument(
        "--endpoint",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="with --no-vm: one endpoint, of name, rid, group, snoop, pasid-bits, pasid-mode, address-width, formats, "
        "reserved; again for more",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print one line {"ready", "sockets", "control", "arguments", "bars"} in place of text; with --no-vm '
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
    if args.endpoints is not None or args.endpoint:
        raise CannotRun("--endpoints and --endpoint go with --no-vm: a VM's are in its machine file, see --machine")
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
    placement = await _placement(machine, args, folder, parts, disks)
    machine = machine.with_buses(placement.buses)
    backend = Backend(machine, folder.sockets(machine), disks, parts.libvfio_user, control=folder.socket(CONTROL))
    try:
        await backend.start()
        if not args.command:
            _say_ready(machine, args, parts, folder, placement)
            await backend.watch(asyncio.Event().wait())
            return EXIT_OK
        return await backend.watch(_command(args.command))
    finally:
        await backend.close()


async def _placement(
    machine: Machine, args: argparse.Namespace, folder: RunFolder, parts: Parts, disks: dict[str, Namespace]
) -> Placement:
    """What --bar says goes before what was learnt. A command brings an IVRS of its own: of BARs it need not know."""
    bars = _bars(machine, args.bar)
    if not machine.ports and (args.command or len(bars) == len(machine.iommus)):
        return Placement(bars, {function.name: function.bus for function in machine.functions})
    learnt = await placement_of(machine, parts, folder, disks)
    return replace(learnt, bars={**learnt.bars, **bars})


def _bars(machine: Machine, said: Sequence[str]) -> dict[str, int]:
    """--bar by the IOMMU's name; without one it is that of the first IOMMU."""
    names = [iommu.name for iommu in machine.iommus]
    bars = {}
    for text in said:
        name, equals, address = text.rpartition("=")
        name = name if equals else names[0]
        if name not in names:
            raise CannotRun(f"--bar {text}: {name} is no IOMMU of {machine.name}; it has {', '.join(names)}")
        try:
            bars[name] = int(address, 0)
        except ValueError as error:
            raise CannotRun(f"--bar {text}: {address} is no address; give one as 0xfebf4000") from error
        if not 0 < bars[name] < 1 << 32 or bars[name] % BAR_SIZE:
            raise CannotRun(f"--bar {text}: a multiple of {BAR_SIZE:#x} below 4 GiB is where such a BAR can be")
    return bars


def _say_ready(
    machine: Machine, args: argparse.Namespace, parts: Parts, folder: RunFolder, placement: Placement
) -> None:
    control, sockets = folder.socket(CONTROL), folder.sockets(machine)
    arguments = parts.command(machine, sockets).with_ivrs(parts.ivrs(machine, placement)).functions()
    if args.json:
        ready = {
            "ready": True,
            "sockets": {name: str(path) for name, path in sockets.items()},
            "control": str(control),
            "arguments": arguments,
            "bars": dict(placement.bars),
        }
        print(json.dumps(ready), flush=True)
        return
    places = " and ".join(f"of {name} at {bar:#x}" for name, bar in placement.bars.items())
    ports = ", and the buses behind root ports as in ours" if machine.ports else ""
    print(
        f"# {machine.name} is served. Give your QEMU (10.1 or newer, with vfio-user-pci) these arguments:\n"
        f"{shlex.join(arguments)}\n"
        f"# and the kernel line intremap=off. The IVRS says that the firmware puts the registers {places},\n"
        f"# as QEMU {parts.qemu.version} does with this memory{ports};\n"
        "# if yours puts them elsewhere (info pci), start again with --bar NAME=ADDRESS.\n"
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
