"""What the backend of a VM does by itself, without a guest."""

from __future__ import annotations

import asyncio
from pathlib import Path

from vfu import libvfio_user

from backend.core import Access
from backend.endpoints.nvme import Namespace
from backend.ioasid import Code, PageResponse
from backend.vm.backend import Backend
from backend.vm.libvfio_user import LibvfioUser
from backend.vm.machine import load

__all__ = ["libvfio_user"]


async def test_page_requests_that_nobody_answers_end(libvfio_user: LibvfioUser, tmp_path: Path) -> None:
    """A guest whose driver does not answer keeps no device waiting for ever, without a control socket as well."""
    machine = load("q35-amd")
    disks = {each.name: Namespace.in_memory(1 << 20) for each in machine.endpoints}
    sockets = {each.name: tmp_path / each.name for each in machine.functions}
    backend = Backend(machine, sockets, disks, libvfio_user.library)
    await backend.start()
    engine = backend.engine
    engine.page_timeout = 0.05
    device = engine.add_device(0xFF00, "asks")
    context = engine.open()
    context.bind_device(device.rid)
    context.attach(device.rid, context.alloc())
    answered: asyncio.Future[PageResponse] = asyncio.get_running_loop().create_future()
    device.page_request(None, 0x5000, Access.READ, group=1, last=True, answer=answered.set_result)
    assert (await asyncio.wait_for(answered, 10)).code == Code.INVALID
    await backend.close()
    for disk in disks.values():
        disk.close()
