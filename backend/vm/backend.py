"""The backend of one VM: its engine, the functions served to it, and the wiring between them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from backend.control.control import Control
from backend.core import Fault
from backend.endpoints.nvme import Namespace, NvmeController
from backend.ioasid import BEHIND_X86, Engine, Kind
from backend.ioasid.page_timer import PageTimer
from backend.pci import DmaRegion, FunctionServer, LibraryError, LibraryMissing, PciFunction, SocketRefused
from backend.viommu.amd import AmdIommu
from backend.vm.backing import private_to
from backend.vm.errors import CannotRun
from backend.vm.lost import VmLost
from backend.vm.machine import Machine
from backend.vm.memory import VmMemory
from backend.vm.traffic import TrafficMeter
from protocol import SocketRefused as ControlRefused

T = TypeVar("T")

FAULTS_KEPT = 256  # the newest, for report and checks; a guest can cause any number


class Backend:
    """One engine a VM. It serves one QEMU after another: when a client goes, its functions wait for the next."""

    def __init__(
        self,
        machine: Machine,
        sockets: Mapping[str, Path],
        namespaces: Mapping[str, Namespace],
        libvfio_user: Path | None = None,
        *,
        control: Path | None = None,
    ) -> None:
        """`libvfio_user` is the library's file; None: the system's. `control`: of the control socket; None: none."""
        self.machine = machine
        self._libvfio_user = libvfio_user
        self.engine = Engine()
        self._timer = PageTimer(self.engine)
        self.context = self.engine.open()
        self.stage2 = self.context.alloc(Kind.VM)
        self.memory = VmMemory(self.engine.vm_memory, self.context.get_info(self.stage2).address_width or 0)
        self.iommu = AmdIommu(self.context, self.stage2, [f.rid for f in machine.endpoints], name=machine.iommu.name)
        self.controllers = {f.name: NvmeController(namespaces[f.name], name=f.name) for f in machine.endpoints}
        self._unshared = asyncio.Event()
        self.faults: deque[Fault] = deque(maxlen=FAULTS_KEPT)
        self.servers = [self._connect(function, rid, sockets) for function, rid in self._functions()]
        meter = TrafficMeter([controller.dma for controller in self.controllers.values()])
        self.iommu.on_enable = lambda: meter.switch(on=True)
        self.iommu.on_disable = lambda: meter.switch(on=False)
        self.meter = meter
        self.context.attach(machine.iommu.rid, self.stage2)
        self.engine.set_router(self.iommu.route)
        self.engine.on_fault(self.iommu.on_fault)
        self.engine.on_fault(self._faulted)
        names = {self.context: machine.name}
        self.control = None if control is None else Control(self.engine, control, facts=self._facts, names=names)

    async def start(self) -> None:
        """Listen on every function's socket, then on the control socket. CannotRun if a path will not do, or
        libvfio-user will not."""
        for server in self.servers:
            try:
                await server.start()
            except (SocketRefused, LibraryMissing, LibraryError) as error:
                raise CannotRun(f"{server.function.name} cannot be served: {error}") from error
        if self.control is not None:
            try:
                await self.control.start()
            except ControlRefused as error:
                raise CannotRun(f"the control socket cannot be served: {error}") from error
        self._timer.start()

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; VmLost as soon as a function's own code fails, for its guest may wait for ever.

        CannotRun when a QEMU does not share its guest's memory: every DMA would fault.
        """
        task = asyncio.ensure_future(work)
        failed = [asyncio.ensure_future(server.failed()) for server in self.servers]
        unshared = asyncio.ensure_future(self._unshared.wait())
        try:
            await asyncio.wait({task, unshared, *failed}, return_when=asyncio.FIRST_COMPLETED)
            if unshared.done():
                raise CannotRun(
                    "QEMU keeps its guest's memory to itself, so no function can reach it; give QEMU "
                    "-object memory-backend-memfd,id=ram,size=SIZE,share=on and -machine memory-backend=ram"
                )
            for server, failure in zip(self.servers, failed, strict=True):
                if failure.done():
                    error = failure.result()
                    raise VmLost(
                        "backend", f"{server.function.name} failed: {type(error).__name__}: {error}"
                    ) from error
            return task.result()
        finally:
            for each in (task, unshared, *failed):
                each.cancel()
            await asyncio.gather(task, unshared, *failed, return_exceptions=True)

    async def close(self) -> None:
        """End every connection and give all memory back."""
        if self.control is not None:
            await self.control.close()
        for server in self.servers:
            await server.close()
        self._timer.close()
        self.memory.close()
        self.engine.close()

    def _facts(self) -> Mapping[str, object]:
        """What the control socket's `vm.status` says of the VM."""
        return {
            "kind": "vm",
            "machine": self.machine.name,
            "translating": self.iommu.enabled,
            "functions": {server.function.name: server.connected for server in self.servers},
            "connections": 0 if self.control is None else len(self.control.connections),
        }

    def _faulted(self, fault: Fault) -> None:
        self.faults.append(fault)
        if fault.rid in self.iommu.endpoints:
            self.meter.faulted()

    def _functions(self) -> list[tuple[PciFunction, int]]:
        by_name: dict[str, PciFunction] = {self.machine.iommu.name: self.iommu, **self.controllers}
        return [(by_name[config.name], config.rid) for config in self.machine.functions]

    def _connect(self, function: PciFunction, rid: int, sockets: Mapping[str, Path]) -> FunctionServer:
        device = self.engine.add_device(rid, function.name, BEHIND_X86)
        function.rid = rid
        function.connect_dma(device.port)
        self.context.bind_device(rid)

        def mapped(region: DmaRegion) -> None:
            # RAM begins at 0; elsewhere, ROM may well have no file
            if region.gpa == 0 and (region.hva is None or private_to(server.peer_pid, region.hva, region.size)):
                self._unshared.set()
            self.memory.map(function.name, region)

        def unmapped(region: DmaRegion) -> None:
            self.memory.unmap(function.name, region)

        path = sockets[function.name]
        server = FunctionServer(function, path, on_dma_map=mapped, on_dma_unmap=unmapped, library=self._libvfio_user)
        return server
