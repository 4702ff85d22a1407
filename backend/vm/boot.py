"""One run: guests booted one after another on one backend, and what came of each."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from backend.endpoints.nvme import Namespace
from backend.vm.backend import Backend
from backend.vm.errors import CannotRun
from backend.vm.firmware import placement_of
from backend.vm.guest_protocol import GuestLost, GuestResult, GuestSession, Step, Times
from backend.vm.host_side import HostSide, Moved
from backend.vm.lost import VmLost
from backend.vm.machine import Machine
from backend.vm.parts import Parts
from backend.vm.placement import Placement, PlacementMemory
from backend.vm.qemu_command import QemuCommand
from backend.vm.qemu_process import QemuProcess, how_ended
from backend.vm.qemu_session import started
from backend.vm.report import Check, DmaExample
from backend.vm.run_folder import RunFolder
from backend.vm.traffic import Traffic

POWER_OFF_SECONDS = 30  # Linux takes 0.2 s from the answer to the end of QEMU
QEMU_GONE_SECONDS = 0.5  # between the end of QEMU's sockets and the end of its process; seen: 0.05
RESETS_A_REBOOT = 2  # the guest's own, and another by SeaBIOS where it finds its memory as the guest left it
V2_CHECKS = ("iommu", "data", "isolation", "log")  # what differs with the guest's tables
CONSOLE_TAIL = 1 << 16  # bytes at the end of the console's log in which a panic is looked for


@dataclass(frozen=True, slots=True)
class Round:
    """One QEMU of the run: its machine, and how often its guest boots in it."""

    name: str
    machine: Machine
    boots: Sequence[str] = ("boot",)
    placement: Placement | None = None
    """Where the firmware puts the functions; `Boot` needs to know."""
    tables: str | None = None
    """What the guest's driver must have built for the first NVMe controller; None: whatever it likes."""


@dataclass(slots=True)
class Outcome:
    """What one boot of a guest came to."""

    name: str
    result: GuestResult
    checks: list[Check]
    traffic: Traffic
    example: DmaExample | None
    seconds: float
    pages: dict[str, int]
    """Page requests as the server saw them."""
    pasids: dict[str, dict[str, int]]
    """The same of each PASID."""


def rounds(machine: Machine, *, full: bool, five_levels: bool = True) -> list[Round]:
    """One boot; a full run reboots too, then has a strict guest in a second QEMU, a large one in a third, and guests
    with v2 tables of four levels and, where the processor has `five_levels`, of five."""
    if not full:
        return [Round("boot", machine)]
    large = dataclasses.replace(machine, memory=4 << 30, cpus=2)
    short = dataclasses.replace(machine, checks=tuple(name for name in machine.checks if name in V2_CHECKS))
    v2 = short.with_options(append="amd_iommu=pgtbl_v2")
    four = Round("v2-4-levels", v2.with_options(append="no5lvl"), ("v2-4-levels",), tables="x86, 4 levels")
    la57 = v2.with_options(cpu=f"{v2.cpu},+la57")
    five = [Round("v2-5-levels", la57, ("v2-5-levels",), tables="x86, 5 levels")] if five_levels else []
    return [
        Round("boot", machine, ("boot", "reboot")),
        Round("second-qemu-strict", machine.with_options(append="iommu.strict=1"), ("second-qemu-strict",)),
        Round("two-cpus-4-gib", large, ("two-cpus-4-gib",)),
        four,
        *five,
    ]


async def placed(
    plan: Sequence[Round],
    parts: Parts,
    folder: RunFolder,
    disks: Mapping[str, Namespace],
    progress: Callable[[str], None],
) -> list[Round]:
    """The rounds with what the firmware makes of each machine, before a backend serves any of them."""
    found: list[Round] = []
    for each in plan:
        placement = await placement_of(each.machine, parts, folder, disks, progress)
        machine = each.machine.with_buses(placement.buses)
        if found and machine.functions != found[0].machine.functions:
            raise CannotRun(
                f"the firmware numbers the buses of {each.name} otherwise than those of {found[0].name}: "
                "boot these machines in runs of their own"
            )
        found.append(dataclasses.replace(each, machine=machine, placement=placement))
    return found


@dataclass(slots=True)
class Boot:
    """Runs rounds on a backend that listens; `outcomes` fills as boots end, so a lost VM leaves what came before."""

    backend: Backend
    parts: Parts
    folder: RunFolder
    progress: Callable[[str], None]
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self, plan: Sequence[Round]) -> None:
        """CannotRun, or VmLost as soon as QEMU or a guest goes."""
        for each in plan:
            assert each.placement is not None
            command = self.parts.command(each.machine, self.folder.sockets(each.machine))
            await self._boot(each, command.with_ivrs(self.parts.ivrs(each.machine, each.placement)), each.placement)

    async def _boot(self, each: Round, command: QemuCommand, placement: Placement) -> None:
        async with started(command, self.folder, each.name) as (qemu, reader, writer):
            self.backend.begin_counting()
            await qemu.resume()
            watch = asyncio.create_task(self._watch(qemu, each, RESETS_A_REBOOT * (len(each.boots) - 1)))
            try:
                for name in each.boots:
                    self.progress(f"{name}: starting")
                    step = Step.POWER_OFF if name == each.boots[-1] else Step.REBOOT
                    progress = partial(self._said, name)
                    host = HostSide(
                        self.backend, qemu, placement, step=step, progress=progress, tables=each.tables
                    )
                    session = GuestSession(reader, writer, Times(each.machine.limits.boot, each.machine.limits.checks))
                    await self._session(name, each, session, host, watch)
                await self._ended(qemu)
            except Moved:
                PlacementMemory(self.parts.cache, each.machine, self.parts.qemu.version).forget()
                raise
            finally:
                watch.cancel()

    def _said(self, name: str, text: str) -> None:
        self.progress(f"{name}: {text}")

    async def _session(
        self, name: str, each: Round, session: GuestSession, host: HostSide, watch: asyncio.Task[None]
    ) -> None:
        """One boot, until the guest was told what to do next. Whoever goes first, guest, watch or QEMU, is told."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        work = asyncio.create_task(session.run(host))
        limits = each.machine.limits
        try:
            await host.qemu.while_alive(_first(work, watch), limits.boot + limits.checks + POWER_OFF_SECONDS)
        except GuestLost as lost:
            # a QEMU that died takes the guest's channel with it, and is seen to end a moment later
            await host.qemu.while_alive(asyncio.sleep(QEMU_GONE_SECONDS), POWER_OFF_SECONDS)
            if panic := self._panic(each):
                raise VmLost("guest", panic) from lost
            raise
        finally:
            work.cancel()
            await asyncio.wait({work})
            seconds = loop.time() - begin
            self.outcomes.append(
                Outcome(
                    name, session.result(), host.checks, host.traffic, host.example, seconds, host.pages, host.pasids
                )
            )
        self.backend.begin_counting()

    async def _watch(self, qemu: QemuProcess, each: Round, resets: int) -> None:
        """Ends with VmLost when the guest resets more often than it was told to: that is how a panic shows."""
        while True:
            name, reason = await qemu.next_event()
            if name == "RESET" and reason == "guest-reset":
                resets -= 1
                if resets < 0:
                    raise VmLost("guest", self._panic(each) or "the guest reset itself")

    async def _ended(self, qemu: QemuProcess) -> None:
        try:
            code = await asyncio.wait_for(qemu.wait(), POWER_OFF_SECONDS)
        except TimeoutError as error:
            raise VmLost("guest", f"the guest did not power off within {POWER_OFF_SECONDS} s") from error
        if code != 0:
            raise VmLost(
                "qemu", f"QEMU ended {how_ended(code)} at the power-off: {qemu.last_words() or 'it said nothing'}"
            )

    def _panic(self, each: Round) -> str | None:
        """The panic that the guest's console ends with, if it does."""
        try:
            with self.folder.console(each.name).open("rb") as console:
                console.seek(max(0, console.seek(0, 2) - CONSOLE_TAIL))
                text = console.read().decode(errors="replace")
        except OSError:
            return None
        found = re.search(r"Kernel panic - not syncing: [ -~]{0,200}", text)
        return f"the guest's kernel died: {found[0]}" if found else None


async def _first(work: asyncio.Task[GuestResult], watch: asyncio.Task[None]) -> None:
    """Until one of them ends; what the watch found goes before what the guest said."""
    await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
    if watch.done():
        watch.result()
    if work.done():
        work.result()
