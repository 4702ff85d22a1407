"""A short run in which the firmware places the functions and no kernel follows: what the IVRS must say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from backend.endpoints.nvme import Namespace
from backend.vm.backend import Backend
from backend.vm.lost import VmLost
from backend.vm.machine import Machine
from backend.vm.parts import Parts
from backend.vm.placement import Placement, PlacementMemory
from backend.vm.qemu_session import started
from backend.vm.run_folder import RunFolder


async def placement_of(
    machine: Machine,
    parts: Parts,
    folder: RunFolder,
    disks: Mapping[str, Namespace],
    progress: Callable[[str], None] = lambda _: None,
) -> Placement:
    """Remembered, or learnt with a backend of its own, for a backend must know its functions' buses when it starts.

    VmLost: the firmware does not come to it.
    """
    memory = PlacementMemory(parts.cache, machine, parts.qemu.version)
    known = memory.recall()
    if known is not None:
        return known
    progress("learning where the firmware puts the functions")
    sockets = folder.sockets(machine)
    backend = Backend(machine, sockets, disks, parts.libvfio_user)
    try:
        await backend.start()
        placement = await backend.watch(_learn(machine, parts, folder))
    finally:
        await backend.close()
    memory.learn(placement)
    return placement


async def _learn(machine: Machine, parts: Parts, folder: RunFolder) -> Placement:
    async with started(parts.command(machine, folder.sockets(machine)), folder, "firmware") as session:
        await session.qemu.resume()
        try:
            return await session.qemu.while_alive(session.qemu.placed(machine), machine.limits.firmware)
        except TimeoutError as error:
            raise VmLost(
                "guest", f"the firmware did not place all functions within {machine.limits.firmware:g} s"
            ) from error
