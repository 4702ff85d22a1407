"""A QEMU of ours with all that it talks to: its monitor, the guest's channel, its logs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import NamedTuple

from backend.vm.qemu_command import QemuCommand
from backend.vm.qemu_process import QemuProcess
from backend.vm.run_folder import RunFolder

CHANNEL_SECONDS = 10  # QEMU connects its chardevs before it answers on the monitor


class QemuSession(NamedTuple):
    """A QEMU that is about to run, and the guest's channel."""

    qemu: QemuProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@contextlib.asynccontextmanager
async def started(command: QemuCommand, folder: RunFolder, name: str) -> AsyncIterator[QemuSession]:
    """QEMU stopped before its first instruction; it ends with the context. Its logs are called after `name`."""
    monitor, channel = folder.socket("monitor"), folder.socket("channel")
    connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
        asyncio.get_running_loop().create_future()
    )

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if connected.done():
            writer.close()  # the guest has one channel
        else:
            connected.set_result((reader, writer))

    for path in (monitor, channel):
        path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(accept, channel)
    argv = command.driven(monitor=monitor, channel=channel, console=folder.console(name))
    (folder.logs / f"{name}-qemu.args").write_text("\n".join(argv) + "\n")
    qemu = QemuProcess(argv, monitor, folder.logs / f"{name}-qemu.log")
    try:
        await qemu.start()
        yield QemuSession(qemu, *await asyncio.wait_for(connected, CHANNEL_SECONDS))
    finally:
        await qemu.close()
        server.close()
        if connected.done() and not connected.cancelled():
            connected.result()[1].close()
        for path in (monitor, channel):
            path.unlink(missing_ok=True)
