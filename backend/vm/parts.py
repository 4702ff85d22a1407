"""All the parts of one run, found or fetched before anything is started."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backend.viommu.amd import Ivhd, ivrs_table
from backend.vm import assets, kvm, module_build
from backend.vm.cache import cache_dir
from backend.vm.errors import CannotRun
from backend.vm.initramfs import GuestFiles, build_initramfs
from backend.vm.machine import Machine
from backend.vm.placement import Placement
from backend.vm.progress import notice
from backend.vm.qemu_binary import Qemu
from backend.vm.qemu_command import QemuCommand


@dataclass(frozen=True, slots=True)
class Parts:
    """QEMU, the kernel and the initramfs; `cache` is the folder that keeps what is made once."""

    qemu: Qemu
    kernel: Path
    kernel_version: str
    initrd: Path
    accel: str
    libvfio_user: Path
    cache: Path

    @classmethod
    def gather(cls, machine: Machine, *, kernel: Path | None, initrd: Path | None, accel: str) -> Parts:
        """Fetches and builds what is missing, with progress on a terminal. CannotRun says what to do."""
        qemu = assets.qemu()
        image = assets.kernel(kernel)
        chosen = kvm.choose(accel, qemu, image)
        if chosen.note:
            notice(chosen.note)
        if initrd is None:
            built = module_build.build(machine.built_modules, image)
            files = GuestFiles(assets.busybox(), image.modules_dir, machine.modules, assets.guest_root(), built)
            initrd = build_initramfs(files, cache_dir())
        elif not initrd.is_file():
            raise CannotRun(f"initramfs {initrd} does not exist or is no file; correct the path")
        return cls(qemu, image.vmlinuz, image.version, initrd, chosen.name, assets.libvfio_user().library, cache_dir())

    @property
    def five_levels(self) -> bool:
        """Whether a guest can have a processor with five levels: TCG has one, KVM gives the host's."""
        return self.accel != "kvm" or "la57" in Path("/proc/cpuinfo").read_text().split()

    def command(self, machine: Machine, sockets: Mapping[str, Path]) -> QemuCommand:
        """QEMU's line for a machine, as yet without an IVRS."""
        return QemuCommand(self.qemu.argv, machine, self.accel, sockets, self.kernel, self.initrd)

    def ivrs(self, machine: Machine, placement: Placement) -> Path:
        """A file with the IVRS for this machine's functions, where they were placed."""
        placed = machine.with_buses(placement.buses)
        body = ivrs_table(
            Ivhd(placement.bars[iommu.name], iommu.rid, [f.rid for f in placed.behind(iommu.name)])
            for iommu in placed.iommus
        )
        path = self.cache / "ivrs" / f"{hashlib.sha256(body).hexdigest()[:16]}.bin"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}")
            new.write_bytes(body)
            new.replace(path)
        return path
