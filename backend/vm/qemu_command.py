"""The QEMU command line of a machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backend.vm.machine import Machine


@dataclass(frozen=True, slots=True)
class QemuCommand:
    """All that QEMU needs; `qemu` is how it is called (its loader and folders included)."""

    qemu: Sequence[str]
    machine: Machine
    accel: str
    sockets: Mapping[str, Path]  # function name -> its vfio-user socket
    kernel: Path
    initrd: Path
    ivrs: Path | None = None  # None in the short first run that learns where the firmware puts things

    def with_ivrs(self, ivrs: Path) -> QemuCommand:
        """The same with the table that tells the guest of its IOMMU."""
        return replace(self, ivrs=ivrs)

    def functions(self) -> list[str]:
        """What makes any QEMU of one's own use the served functions: shared memory, the functions, the IVRS."""
        machine = self.machine
        argv = [
            "-machine", f"{machine.type},memory-backend=ram",
            "-m", f"{machine.memory >> 20}M",
            # share=on is what lets the backend see guest memory; without it every DMA would need a message
            "-object", f"memory-backend-memfd,id=ram,size={machine.memory >> 20}M,share=on",
        ]  # fmt: skip
        for number, port in enumerate(machine.ports, start=1):
            root = {"driver": "pcie-root-port", "id": port.name, "chassis": number, "slot": number}
            argv += _device({**root, "bus": "pcie.0", "addr": f"{port.slot:x}.0"})
        for function in machine.functions:
            argv += _device(
                {
                    "driver": "vfio-user-pci",
                    "id": function.name,  # by which query-pci tells where the firmware has put it
                    "socket": {"type": "unix", "path": str(self.sockets[function.name])},
                    "bus": function.port or "pcie.0",
                    "addr": f"{function.slot:x}.0",
                }
            )
        if self.ivrs is not None:
            argv += ["-acpitable", f"sig=IVRS,rev=2,oem_id=VIOASI,oem_table_id=VIOASID,data={_comma(self.ivrs)}"]
        return argv

    def guest(self) -> list[str]:
        """The processor, the kernel and its initramfs."""
        machine = self.machine
        # Where there can only be one CPU, TCG does atomic instructions in two steps, and what a device writes between
        # them is lost: its atomics, and accessed and dirty bits in the guest's page tables.
        cpus = f"cpus={machine.cpus},maxcpus={max(2, machine.cpus)}"
        return [
            "-accel", self.accel, "-cpu", "host" if self.accel == "kvm" else machine.cpu, "-smp", cpus,
            "-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", machine.kernel_line,
        ]  # fmt: skip

    def argv(self) -> list[str]:
        """The whole line but for consoles and monitor, which differ between a run of ours and one by hand."""
        return [*self.qemu, "-nodefaults", "-no-user-config", "-display", "none", *self.functions(), *self.guest()]

    def by_hand(self) -> list[str]:
        """As a person runs it: the guest's console on the terminal."""
        return [*self.argv(), "-serial", "mon:stdio"]

    def driven(self, *, monitor: Path, channel: Path, console: Path) -> list[str]:
        """As the runner runs it: stopped until told to go, monitor and guest channel on sockets that we listen on."""
        return [
            *self.argv(), "-S",
            "-chardev", f"socket,id=monitor,path={_comma(monitor)}", "-mon", "chardev=monitor,mode=control",
            "-chardev", f"file,id=console,path={_comma(console)}", "-serial", "chardev:console",
            "-chardev", f"socket,id=channel,path={_comma(channel)}", "-serial", "chardev:channel",
        ]  # fmt: skip


def _device(properties: Mapping[str, object]) -> list[str]:
    return ["-device", json.dumps(properties, separators=(",", ":"))]


def _comma(path: Path) -> str:
    """A comma in an option's value is written twice (QEMU, docs/system/invocation)."""
    return str(path).replace(",", ",,")
