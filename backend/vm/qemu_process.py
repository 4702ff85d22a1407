"""QEMU as a child process: started stopped, steered over QMP, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from qemu.qmp import EventListener, QMPClient, QMPError

from backend.vm.errors import CannotRun
from backend.vm.lost import VmLost
from backend.vm.machine import Machine
from backend.vm.placement import Placement

T = TypeVar("T")

START_SECONDS = 20  # QEMU answers on its monitor within 0.3 s here; a loaded machine gets sixty times that
QUIT_SECONDS = 5  # between asking QEMU to go, and killing it
POLL_SECONDS = 0.02  # QMP has no event for "the firmware has placed the BARs"
LOG_TAIL = 600  # characters of QEMU's own words that go into an error

PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """For a child between fork and exec: it is killed when we end, however we end."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class QemuProcess:
    """One QEMU, stopped before its first instruction until `resume`."""

    def __init__(self, argv: Sequence[str], monitor: Path, log: Path) -> None:
        self._argv = list(argv)
        self._monitor = monitor
        self._log = log
        self._qmp = QMPClient("vioasid")
        # what says that the guest itself went: a panic resets it (panic=-1), a power-off ends QEMU
        self._events = EventListener(("RESET", "SHUTDOWN"))
        self._exit: asyncio.Task[int] | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Spawn QEMU and negotiate QMP; CannotRun with QEMU's own words if it gives up."""
        self._qmp.register_listener(self._events)
        await self._qmp.start_server(str(self._monitor))
        try:
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._argv, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                    process_group=0,  # Ctrl-C is for us: we end QEMU in order
                    preexec_fn=die_with_parent,
                )  # fmt: skip
        except OSError as error:
            raise CannotRun(f"QEMU ({self._argv[0]}) did not start: {error.strerror}; run `vioasid doctor`") from error
        self._exit = asyncio.create_task(self._process.wait())
        try:
            await self.while_alive(self._qmp.accept(), START_SECONDS)
        except VmLost as lost:
            raise CannotRun(f"QEMU gave up before the guest ran: {self.last_words() or lost}") from lost
        except TimeoutError as error:
            raise CannotRun(
                f"QEMU did not answer on its monitor within {START_SECONDS} s: {self.last_words() or 'it said nothing'}"
            ) from error

    async def while_alive(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """The result of `work`; VmLost as soon as QEMU ends before it, TimeoutError after `seconds`."""
        assert self._exit is not None
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._exit}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._exit.done():
                raise VmLost(
                    "qemu", f"QEMU ended {how_ended(self._exit.result())}: {self.last_words() or 'it said nothing'}"
                )
            raise TimeoutError
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def execute(self, command: str, **arguments: object) -> object:
        """One QMP command; VmLost if QEMU goes before it answers."""
        try:
            return await self._qmp.execute(command, arguments or None)
        except (QMPError, EOFError, OSError) as error:
            raise VmLost("qemu", f"QEMU did not carry out {command!r}: {error}") from error

    async def resume(self) -> None:
        await self.execute("cont")

    async def pause(self) -> None:
        await self.execute("stop")

    async def next_event(self) -> tuple[str, str]:
        """Name and reason of the next RESET or SHUTDOWN."""
        message = await self._events.get()
        data = cast("dict[str, Any]", message.get("data", {}))
        return str(message["event"]), str(data.get("reason", ""))

    async def placement(self, machine: Machine) -> Placement | None:
        """Where the firmware or the guest has put the machine's functions (query-pci); None: not everywhere yet."""
        return Placement.seen(await self.execute("query-pci"), machine)

    async def placed(self, machine: Machine) -> Placement:
        """The same as soon as it is known."""
        while (found := await self.placement(machine)) is None:
            await asyncio.sleep(POLL_SECONDS)
        return found

    async def wait(self) -> int:
        assert self._exit is not None
        return await asyncio.shield(self._exit)

    def last_words(self) -> str:
        """The end of what QEMU itself printed."""
        try:
            return self._log.read_text(errors="replace").strip()[-LOG_TAIL:]
        except OSError:
            return ""

    async def close(self) -> None:
        """End QEMU, in order if it listens, by force if not."""
        if self._process is not None and self._exit is not None:
            if not self._exit.done():
                with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
                    await asyncio.wait_for(self._qmp.execute("quit"), QUIT_SECONDS)
                await asyncio.wait({self._exit}, timeout=QUIT_SECONDS)
            if not self._exit.done():
                self._process.kill()
            await self._exit
        with contextlib.suppress(QMPError, OSError, EOFError):  # it is gone, and says so
            await self._qmp.disconnect()


def how_ended(code: int) -> str:
    """What an exit code of a process says: "by SIGKILL", "with exit code 1"."""
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
