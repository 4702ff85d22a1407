"""`vioasid boot`: a stock guest behind our IOMMU, its checks, and the report."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from backend.cli.options import add_machine_options, chosen_machine, namespaces
from backend.cli.supervisor import EXIT_CHECK_FAILED, EXIT_OK, guarded, supervise
from backend.vm.backend import Backend
from backend.vm.boot import Boot, Round, placed, rounds
from backend.vm.firmware import placement_of
from backend.vm.lost import VmLost
from backend.vm.machine import Machine
from backend.vm.parts import Parts
from backend.vm.progress import notice, shown
from backend.vm.report import Report
from backend.vm.run_folder import CONTROL, RunFolder
from backend.vm.summary import report_of


def fill_parser(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = __doc__
    add_machine_options(parser)
    parser.add_argument(
        "--full",
        action="store_true",
        help="also a reboot, and QEMUs with iommu.strict=1, with 2 CPUs and 4 GiB, with v2 tables of 4 and 5 levels",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on stdout")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print a line that serves the functions and runs this QEMU, and do not run it",
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs of a run that passed, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit code; see the command's epilog."""
    machine = chosen_machine(args)
    if args.dry_run:
        return _dry_run(machine, args)
    with RunFolder(f"{machine.name}-{os.getpid()}") as folder:
        folder.keep_logs = True

        def crashed(sentence: str) -> None:
            _print(Report.lost("backend", sentence, folder.logs), args)

        code = supervise(lambda: guarded(lambda: _boot(machine, args, folder)), crashed)
        folder.keep_logs = args.keep or code != EXIT_OK
        if folder.keep_logs and any(folder.logs.iterdir()):
            notice(f"logs: {folder.logs}")
    return code


def _boot(machine: Machine, args: argparse.Namespace, folder: RunFolder) -> int:
    with namespaces(machine, args) as disks, shown("boot") as progress:
        parts = Parts.gather(machine, kernel=args.kernel, initrd=args.initrd, accel=args.accel)
        folder.sockets(machine)
        folder.socket("monitor")  # said now if it is too long, not in the middle
        control = folder.socket(CONTROL)

        async def boot() -> Report:
            wanted = rounds(machine, full=args.full, five_levels=parts.five_levels)
            plan = await placed(wanted, parts, folder, disks, progress)
            served = plan[0].machine
            backend = Backend(served, folder.sockets(served), disks, parts.libvfio_user, control=control)
            return await _run(backend, Boot(backend, parts, folder, progress), plan)

        report = asyncio.run(boot())
    if args.keep or not report.ok:
        report = replace(report, log_dir=folder.logs)
    _print(report, args)
    if report.lost_part is not None:
        raise VmLost(report.lost_part, report.lost_reason)
    return EXIT_OK if report.ok else EXIT_CHECK_FAILED


async def _run(backend: Backend, boot: Boot, plan: list[Round]) -> Report:
    """What was known when the VM was lost is reported as well."""
    try:
        await backend.start()
        await backend.watch(boot.run(plan))
    except VmLost as lost:
        return report_of(boot, lost)
    else:
        return report_of(boot)
    finally:
        await backend.close()


def _dry_run(machine: Machine, args: argparse.Namespace) -> int:
    """The line is complete: its files lie in the cache folder, and `serve` runs it as soon as the sockets listen."""
    with RunFolder(machine.name) as folder, namespaces(machine, args) as disks, shown("dry run"):
        folder.keep_logs = False
        parts = Parts.gather(machine, kernel=args.kernel, initrd=args.initrd, accel=args.accel)
        placement = asyncio.run(placement_of(machine, parts, folder, disks))
        command = parts.command(machine, folder.sockets(machine))
    program = Path(sys.executable).with_name("vioasid")
    command_name = [str(program)] if program.exists() else [sys.executable, "-m", "backend.cli.main"]
    serve = [*command_name, "serve", "--machine", args.machine]
    for option in ("memory", "cpu", "cpus", "disk", "disk_size"):
        value = getattr(args, option)
        if value is not None:
            serve += [f"--{option.replace('_', '-')}", str(value.absolute() if isinstance(value, Path) else value)]
    print(shlex.join([*serve, "--", *command.with_ivrs(parts.ivrs(machine, placement)).by_hand()]))
    return EXIT_OK


def _print(report: Report, args: argparse.Namespace) -> None:
    if args.json:
        print(report.to_json())
    else:
        report.render()
