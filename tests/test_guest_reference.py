"""The guest's checks on QEMU's own devices: what they find good, and that they see a guest which translates nothing.

A failure here is one of the checks; a failure on our devices alone is one of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from backend.vm import assets
from backend.vm import machine as machines
from backend.vm.cache import cache_dir
from backend.vm.guest_protocol import Answer, GuestResult, GuestSession, NoHost
from backend.vm.initramfs import GuestFiles, build_initramfs
from backend.vm.ktap import Status

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

MIB = 1 << 20
SKIPPED_HERE = {"never-mapped", "never-mapped-logged", "unmapped", "unmapped-logged", "page-unchanged", "bus-master"}


class Host(NoHost):
    """Holds the disk, and no function of its own."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk

    async def data_written(self, nvme: str, offset: int, length: int, sha256: str) -> Answer:
        with self.disk.open("rb") as disk:
            disk.seek(offset)
            found = hashlib.sha256(disk.read(length)).hexdigest()
        return Answer.ok("equal") if found == sha256 else Answer.fail(f"the disk has {found}")


async def boot(folder: Path, *, iommu: str, append: str) -> GuestResult:
    """One boot under TCG, with QEMU's NVMe controller behind `iommu`."""
    disk, channel = folder / "disk", folder / "channel.sock"
    with disk.open("wb") as file:
        file.truncate(256 * MIB)
    machine, kernel = machines.load("q35-amd"), assets.kernel()
    append = f"{append} vioasid.checks={','.join(machine.checks)}"
    initrd = build_initramfs(GuestFiles(assets.busybox(), kernel.modules_dir), cache_dir())
    argv = [
        *assets.qemu().argv, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-m", "512M",
        "-machine", "q35", "-device", iommu, "-device", "nvme,drive=disk,serial=reference,addr=4.0",
        "-drive", f"file={disk},if=none,id=disk,format=raw,discard=unmap",
        "-kernel", str(kernel.vmlinuz), "-initrd", str(initrd), "-append", f"console=ttyS0 panic=-1 {append}",
        "-serial", f"file:{folder / 'console.log'}",
        "-chardev", f"socket,id=channel,path={channel}", "-serial", "chardev:channel",
    ]  # fmt: skip
    connected: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_unix_server(lambda reader, writer: connected.put_nowait((reader, writer)), channel)
    qemu = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL)
    try:
        reader, writer = await asyncio.wait_for(connected.get(), 20)
        result = await GuestSession(reader, writer).run(Host(disk))
        assert await asyncio.wait_for(qemu.wait(), 20) == 0
        writer.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            qemu.kill()
        await qemu.wait()
        server.close()
    return result


def leaves(result: GuestResult) -> Mapping[str, Status]:
    return {name: test.status for group in result.results.tests for name, test in group.leaves()}


async def test_a_guest_that_bypasses_its_iommu_fails_in_that_alone(tmp_path: Path) -> None:
    said = subprocess.run(
        [*assets.qemu().argv, "-device", "amd-iommu,help"], capture_output=True, text=True, check=True
    ).stdout
    if "dma-remap" not in said:
        pytest.skip("this QEMU's amd-iommu has no dma-remap: with QEMU >= 11 it can be the reference")
    result = await boot(tmp_path, iommu="amd-iommu,dma-remap=on", append="intremap=off iommu=pt")
    found = leaves(result)
    assert result.results.problems == ()
    assert [name for name, status in found.items() if status is Status.FAIL] == ["iommu/group-type"]
    assert result.facts["group_type"] == "identity"
    skipped = {name.partition("/")[2] for name, status in found.items() if status is Status.SKIP}
    assert skipped - {"check"} == SKIPPED_HERE  # "check": without e2fsck in the initramfs
    assert found["data/host-copy"] is Status.PASS
    assert len(found) >= 29
