"""The host's side of the checks: what the guest cannot see for itself, and the DMA that it did not ask for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

from backend.core import Access, Fault, Path, Reason, Translation
from backend.endpoints.nvme import NvmeController
from backend.vm import ktap
from backend.vm.backend import Backend
from backend.vm.errors import CannotRun
from backend.vm.guest_protocol import Answer, GuestResult, HeldPage, OrderedFault, Step
from backend.vm.machine import FunctionConfig
from backend.vm.placement import Placement
from backend.vm.qemu_process import QemuProcess
from backend.vm.report import Check, DmaExample
from backend.vm.sva_side import SvaSide
from backend.vm.traffic import Traffic

PAGE = 4096
COMMAND_BYTES = 64  # a submission queue entry (NVM Express 1.4, 4.2)
MARK = b"vioasid isolation probe " * 8  # found in guest memory, it would name who wrote it
UNMAP_SECONDS = 5  # a lazy kernel flushes after 10 ms; a loaded TCG guest gets five hundred times that
NEVER_MAPPED = range(
    0x4000_0000, 0x8000_0000, PAGE
)  # Linux gives IOVAs from 4 GiB downwards, and only as many as it needs


class Moved(CannotRun):
    """The firmware put something elsewhere than the IVRS says."""


class HostSide:
    """Handlers (backend.vm.guest_protocol) of one boot; `checks` and `traffic` hold what came of it."""

    def __init__(
        self,
        backend: Backend,
        qemu: QemuProcess,
        placement: Placement,
        *,
        step: Step,
        progress: Callable[[str], None],
        tables: str | None = None,
    ) -> None:
        self._backend = backend
        self.qemu = qemu
        self._placement = placement
        self._step = step
        self._progress = progress
        self._tables = tables
        self.checks: list[Check] = []
        self.traffic = Traffic()
        self.example: DmaExample | None = None
        self.pages: dict[str, int] = {}
        self.pasids: dict[str, dict[str, int]] = {}
        self._sva = SvaSide(backend) if any(name.startswith("sva-") for name in backend.machine.checks) else None
        self._commands_before = {name: iommu.commands.copy() for name, iommu in backend.iommus.items()}

    async def ready(self, facts: Mapping[str, str]) -> None:
        """Is all where the IVRS says? The IOMMU's driver has used it already: late to find out, not silent."""
        self._progress("checking")
        found = await self.qemu.placement(self._backend.machine)
        moved = "not all of the functions are there" if found is None else found.difference(self._placement)
        if moved:
            raise Moved(
                f"{moved}, as the IVRS told the guest, learnt in an earlier run; that has been forgotten: run again to "
                "learn anew"
            )

    async def checked(self, test: ktap.Test) -> None:
        self._progress(f"{test.name}: {test.status}")

    async def data_written(self, nvme: str, offset: int, length: int, sha256: str) -> Answer:
        """The guest's hash of what it wrote against that of the backing store."""
        found = self._endpoint(nvme)
        if found is None:
            return Answer.fail(f"{nvme} is no function of this backend")
        namespace = found[1].namespace
        if offset + length > namespace.size:
            return Answer.fail(f"the disk has {namespace.size} bytes")
        ours = await asyncio.to_thread(namespace.digest, offset, length)
        if ours != sha256:
            return Answer.fail(f"the backing store's SHA-256 is {ours}, the guest's {sha256}")
        return Answer.ok(f"the backing store holds the same {length >> 20} MiB, SHA-256 {ours[:16]}...")

    async def isolation_never_mapped(self, nvme: str) -> OrderedFault | Answer:
        """DMA to an IOVA that the guest never gave to anybody."""
        found = self._endpoint(nvme)
        if found is None:
            return Answer.fail(f"{nvme} is no function of this backend")
        config, controller = found
        iova = random.choice(NEVER_MAPPED)
        used = {transfer.iova // PAGE for transfer in controller.transfers.recent}
        while iova // PAGE in used:
            iova += PAGE
        return await self._probe(config, controller, iova)

    async def isolation_unmapped(self, page: HeldPage) -> OrderedFault | Answer:
        """DMA to the IOVA of the transfer that the guest has just had and unmapped."""
        found = self._endpoint(page.nvme)
        if found is None:
            return Answer.fail(f"{page.nvme} is no function of this backend")
        config, controller = found
        last = next((t for t in reversed(controller.transfers.recent) if t.write and t.length == page.length), None)
        if last is None:
            return Answer.fail(f"no transfer of {page.length} bytes to the guest is on record")
        try:
            async with asyncio.timeout(UNMAP_SECONDS):
                while self._mapped(config, last.iova):
                    await asyncio.sleep(0.01)  # the guest may flush lazily
        except TimeoutError:
            return Answer.fail(f"IOVA {last.iova:#x} was still mapped {UNMAP_SECONDS} s after its transfer")
        return await self._probe(config, controller, last.iova)

    async def isolation_bus_master(self, nvme: str) -> Answer:
        """A read of the admin submission queue, which the controller may do at any other time."""
        found = self._endpoint(nvme)
        if found is None:
            return Answer.fail(f"{nvme} is no function of this backend")
        iova = found[1].admin_queue
        read = found[1].probe_read(iova, COMMAND_BYTES)
        if isinstance(read, Fault) and read.reason == Reason.BUS_MASTER_OFF:
            return Answer.ok(f"a read at {iova:#x}, which is mapped, was not sent")
        said = f"faulted as {read.reason.name}" if isinstance(read, Fault) else "went through"
        return Answer.fail(f"a read at {iova:#x} {said}")

    async def next_step(self, result: GuestResult) -> Step:
        """Counted here, before a power-off turns the IOMMU off."""
        self.traffic = self._backend.traffic()
        self.example = self._example()
        self.checks += self._traffic_checks()
        if self.example is not None:
            self.checks.append(self._tables_check(self.example))
        if self._sva is not None:
            self.checks += self._sva.checks()
            self.pages, self.pasids = self._backend.pages.figures(), self._backend.pages.pasid_figures()
        return self._step

    def _endpoint(self, bdf: str) -> tuple[FunctionConfig, NvmeController] | None:
        for config in self._backend.machine.endpoints:
            if config.bdf == bdf and config.name in self._backend.controllers:
                return config, self._backend.controllers[config.name]
        return None

    def _mapped(self, config: FunctionConfig, iova: int) -> bool:
        path = self._backend.look_up(config.rid, iova, Access.WRITE)
        return path is not None and isinstance(path.result, Translation)

    async def _probe(self, config: FunctionConfig, controller: NvmeController, iova: int) -> OrderedFault | Answer:
        """Write and read at `iova` with the VM stopped, and compare all of its memory.

        Only the IOMMU's own event log may change: that is where the guest is told.
        """
        await self.qemu.pause()
        try:
            exclude = [self._backend.iommu_of(config.rid).event_log_range]
            before = await asyncio.to_thread(self._backend.memory.snapshot, exclude)
            written = controller.probe_write(iova, MARK)
            read = controller.probe_read(iova, PAGE)
            after = await asyncio.to_thread(self._backend.memory.snapshot, exclude)
        finally:
            await self.qemu.resume()
        changed = before.changed(after)
        if written is None or not isinstance(read, Fault):
            what = "write" if written is None else "read"
            return Answer.fail(f"a {what} at IOVA {iova:#x}, which is not mapped, went through")
        if changed:
            return Answer.fail(f"guest memory changed at GPA {changed[0]:#x} by a DMA that faulted")
        text = f"write and read at {iova:#x} refused ({written.reason.name}), no byte of guest memory changed"
        return OrderedFault(config.bdf, iova, text)

    def _example(self) -> DmaExample | None:
        """The path of a controller's own reads of its admin submission queue, which stays mapped."""
        controllers = self._backend.controllers
        config = next((each for each in self._backend.machine.endpoints if each.name in controllers), None)
        if config is None:
            return None
        iova = controllers[config.name].admin_queue
        path = self._backend.look_up(config.rid, iova)
        if path is None or isinstance(path.result, Fault) or path.stage1 is None:
            return None
        found = path.result
        return DmaExample(
            config.bdf, "read", COMMAND_BYTES, iova, found.gpa, found.hva,
            stage1=tables(path, 1), stage2=tables(path, 2),
        )  # fmt: skip

    def _tables_check(self, example: DmaExample) -> Check:
        """Whether the guest's driver built what it was asked for, as it was walked."""
        seen = f"{example.stage1}, over ours: {example.stage2}"
        if self._tables is not None and example.stage1 != self._tables:
            return Check("dma/tables", "fail", f"{seen}; the guest was to use {self._tables}")
        return Check("dma/tables", "pass", seen)

    def _traffic_checks(self) -> list[Check]:
        traffic = self.traffic
        each = {name: self._backend.meters[name].traffic() for name in self._backend.controllers}
        translated = all(found.moved for found in each.values())
        moved = f"{traffic.moved} of {traffic.translations} translated requests found a GPA other than the IOVA"
        if len(each) > 1:
            moved += f" ({', '.join(f'{found.moved} of {name}' for name, found in each.items())})"
        bypassed = traffic.bypassed
        passed = f"{bypassed} requests since the guest enabled its IOMMU, {traffic.before_iommu} before (firmware)"
        return [
            Check("dma/translated", "pass" if translated else "fail", moved),
            Check("dma/bypassed", "fail" if bypassed else "pass", passed),
            *self._command_checks(),
        ]

    def _command_checks(self) -> list[Check]:
        """Each IOMMU of the machine has work: several are told apart by their names."""
        several = len(self._backend.iommus) > 1
        checks = []
        for name, iommu in self._backend.iommus.items():
            given = iommu.commands - self._commands_before[name]
            commands = ", ".join(f"{count} {opcode.name}" for opcode, count in sorted(given.items()))
            checks.append(
                Check(
                    f"dma/{name}-commands" if several else "dma/iommu-commands",
                    "pass" if commands else "fail",
                    commands or f"the guest gave {name} no command",
                )
            )
        return checks


def tables(path: Path, stage: int) -> str:
    """The tables of a stage of a path, in words: "x86, 5 levels"."""
    levels = [step.level for step in path.steps if step.stage == stage and not step.pasid_table]
    return f"{path.stage1 if stage == 1 else path.stage2}, {max(levels, default=0)} levels"
