"""Options that several verbs share, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backend.endpoints.nvme import Namespace, NamespaceError
from backend.vm import machine as machines
from backend.vm.endpoint_models import ENDPOINT_MODELS
from backend.vm.errors import CannotRun
from backend.vm.machine import Machine

DEFAULT_MACHINE = "q35-amd"


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--machine",
        default=DEFAULT_MACHINE,
        metavar="NAME",
        help=f"a file of qemu-configs/ by its name, or a path ({DEFAULT_MACHINE})",
    )
    parser.add_argument(
        "--kernel", type=Path, metavar="FILE", help="a bzImage of your own; its modules are taken from /lib/modules"
    )
    parser.add_argument(
        "--initrd",
        type=Path,
        metavar="FILE",
        help="an initramfs of your own (it must run init of guest-tests/ for the checks)",
    )
    parser.add_argument("--append", default="", metavar="STR", help="added to the kernel line, as iommu.strict=1")
    parser.add_argument("--memory", metavar="SIZE", help="guest memory, as 4G")
    parser.add_argument("--cpu", metavar="MODEL", help="the virtual processor under TCG, as qemu64,+la57")
    parser.add_argument("--cpus", type=int, metavar="N", help="virtual CPUs")
    parser.add_argument(
        "--accel", choices=("auto", "tcg", "kvm"), default="auto", help="auto: KVM where it works, else TCG"
    )
    parser.add_argument(
        "--disk",
        type=Path,
        metavar="FILE",
        help="the namespace of the first NVMe controller (the checks overwrite it); without it, memory",
    )
    parser.add_argument("--disk-size", metavar="SIZE", help="create or extend --disk FILE to this size")


def chosen_machine(args: argparse.Namespace) -> Machine:
    return machines.load(args.machine).with_options(
        memory=args.memory, cpus=args.cpus, cpu=args.cpu, append=args.append
    )


@contextmanager
def namespaces(machine: Machine, args: argparse.Namespace) -> Iterator[dict[str, Namespace]]:
    """A namespace for every NVMe controller, given back at the end; CannotRun with what is wrong with a disk file."""
    if args.disk_size is not None and args.disk is None:
        raise CannotRun("--disk-size says how large --disk FILE shall be: give --disk as well")
    with ExitStack() as stack:
        opened: dict[str, Namespace] = {}
        with_disks = [each for each in machine.endpoints if ENDPOINT_MODELS[each.model].disk]
        if args.disk is not None and not with_disks:
            raise CannotRun(f"--disk: no function of {machine.name} has a disk; choose another --machine")
        for index, endpoint in enumerate(with_disks):
            try:
                if index == 0 and args.disk is not None:
                    size = None if args.disk_size is None else machines.parse_size(args.disk_size)
                    namespace = Namespace.open(args.disk, size=size)
                else:
                    namespace = Namespace.in_memory(endpoint.size)
            except (NamespaceError, ValueError) as error:
                raise CannotRun(str(error)) from error
            opened[endpoint.name] = namespace
            stack.callback(namespace.close)
        yield opened
