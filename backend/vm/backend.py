"""The backend of one VM: its engine, the functions served to it, and the wiring between them."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from backend.control.control import Control
from backend.core import Access, Fault
from backend.core import Path as TranslationPath
from backend.endpoints.nvme import Namespace, NvmeController
from backend.ioasid import BEHIND_X86, Engine, Kind
from backend.ioasid.page_timer import PageTimer
from backend.pci import DmaRegion, FunctionServer, LibraryError, LibraryMissing, PciFunction, SocketRefused
from backend.viommu.amd import AmdIommu, Opcode
from backend.vm.backing import private_to
from backend.vm.endpoint_models import ENDPOINT_MODELS
from backend.vm.errors import CannotRun
from backend.vm.lost import VmLost
from backend.vm.machine import FunctionConfig, Machine
from backend.vm.memory import VmMemory
from backend.vm.page_traffic import PageMeter
from backend.vm.traffic import Traffic, TrafficMeter
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
        self.iommus = {
            iommu.name: AmdIommu(
                self.context, self.stage2, [f.rid for f in machine.behind(iommu.name)], name=iommu.name
            )
            for iommu in machine.iommus
        }
        self.endpoints = {
            f.name: ENDPOINT_MODELS[f.model].build(f.name, namespaces.get(f.name)) for f in machine.endpoints
        }
        self._iommu_of = {rid: iommu for iommu in self.iommus.values() for rid in iommu.endpoints}
        self._unshared = asyncio.Event()
        self.faults: deque[Fault] = deque(maxlen=FAULTS_KEPT)
        self.pages = PageMeter()
        self._reading = False
        self.servers = [self._connect(config, sockets) for config in machine.functions]
        self.meters = {
            f.name: TrafficMeter([self.endpoints[f.name].dma], identity=ENDPOINT_MODELS[f.model].pasids)
            for f in machine.endpoints
        }
        for config in machine.iommus:
            self.context.attach(config.rid, self.stage2)
            self.iommus[config.name].on_enable = partial(self._switched, config.name, on=True)
            self.iommus[config.name].on_disable = partial(self._switched, config.name, on=False)
            self.iommus[config.name].ppr_log.on_unexpected = self._unexpected_response
        self.engine.set_router(self._route)
        self.engine.on_fault(self._faulted)
        self.context.faults.on_ready(self._records_wait)
        names = {self.context: machine.name}
        self.control = None if control is None else Control(self.engine, control, facts=self._facts, names=names)

    def _unexpected_response(self, rid: int) -> None:
        """The guest has answered a page request that an endpoint did not send."""
        requests = next(self.endpoints[f.name].page_requests for f in self.machine.endpoints if f.rid == rid)
        if requests is not None:
            requests.unexpected()

    @property
    def controllers(self) -> dict[str, NvmeController]:
        """The NVMe controllers among the endpoints."""
        return {name: each for name, each in self.endpoints.items() if isinstance(each, NvmeController)}

    def iommu_of(self, rid: int) -> AmdIommu:
        """The IOMMU before an endpoint."""
        return self._iommu_of[rid]

    def look_up(
        self, rid: int, iova: int, access: Access = Access.READ, pasid: int | None = None
    ) -> TranslationPath | None:
        """Where a request of a device would end, without being one (GET_INFO, LOOKUP); None: it has no route now."""
        attached = self.context.get_info(rid=rid).attachments
        routed = [each.ioasid for each in attached if each.pasid is None]
        return self.context.lookup(routed[-1], iova, pasid=pasid, access=access) if routed else None

    def iommu_commands(self) -> Counter[Opcode]:
        """Commands done by all IOMMUs, by opcode."""
        return sum((iommu.commands for iommu in self.iommus.values()), Counter())

    def begin_counting(self) -> None:
        """A guest starts: traffic counts from here."""
        self.pages.begin()
        for meter in self.meters.values():
            meter.begin()

    def traffic(self) -> Traffic:
        """Of all endpoints."""
        return sum((meter.traffic() for meter in self.meters.values()), Traffic())

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
            "translating": all(iommu.enabled for iommu in self.iommus.values()),
            "functions": {server.function.name: server.connected for server in self.servers},
            "connections": 0 if self.control is None else len(self.control.connections),
        }

    def _route(self, rid: int, pasid: int | None) -> bool:
        """The engine's router: the IOMMU before the device is asked, and there is none before an IOMMU."""
        iommu = self._iommu_of.get(rid)
        return iommu is not None and iommu.route(rid, pasid)

    def _faulted(self, fault: Fault) -> None:
        self.faults.append(fault)
        iommu = self._iommu_of.get(fault.rid)
        if iommu is not None:
            self.meters[self.engine.devices[fault.rid].name].faulted()
            iommu.on_fault(fault)

    def _records_wait(self) -> None:
        """Page requests go to the IOMMU before their device; of faults, the IOMMU was told as they came.

        Not while they are being read: an IOMMU that cannot write its log faults itself.
        """
        if self._reading:
            return
        self._reading = True
        try:
            while self.context.faults.unread:
                for record in self.context.read_faults().records:
                    if record.recoverable:
                        self._iommu_of[record.rid].page_request(record)
        finally:
            self._reading = False

    def _switched(self, iommu: str, *, on: bool) -> None:
        """The guest turns an IOMMU on or off."""
        for config in self.machine.behind(iommu):
            self.meters[config.name].switch(on=on)

    def _connect(self, config: FunctionConfig, sockets: Mapping[str, Path]) -> FunctionServer:
        endpoint = self.endpoints.get(config.name)
        function: PciFunction = self.iommus[config.name] if endpoint is None else endpoint
        traits = BEHIND_X86 if endpoint is None else ENDPOINT_MODELS[config.model].traits
        device = self.engine.add_device(config.rid, config.name, traits)
        function.rid = config.rid
        function.connect_dma(device.port)
        function.connect_page_requests(partial(self.pages.request, device))
        function.connect_tlb(partial(self.engine.set_tlb, device))
        self.context.bind_device(config.rid)

        def mapped(region: DmaRegion) -> None:
            # RAM begins at 0; elsewhere, ROM may well have no file
            if region.gpa == 0 and (region.hva is None or private_to(server.peer_pid, region.hva, region.size)):
                self._unshared.set()
            self.memory.map(config.name, region)

        def unmapped(region: DmaRegion) -> None:
            self.memory.unmap(config.name, region)

        path = sockets[config.name]
        server = FunctionServer(function, path, on_dma_map=mapped, on_dma_unmap=unmapped, library=self._libvfio_user)
        return server
