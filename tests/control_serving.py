"""An engine served by a process of its own, and a client with memory where the RFC's examples have it."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import BlockingClient, RpcError

COMMAND = [sys.executable, "-m", "backend.cli.main"]
SECONDS = 60

VADDR = 0x4000_0000
"""HVA of GPA 0 in section 5 of the RFC."""
SIZE = 1 << 30

FIRST = 0x0100
"""RID of the first software endpoint."""


@dataclass(frozen=True)
class Served:
    """A server process, ready."""

    path: Path
    process: subprocess.Popen[str]
    endpoints: list[int]

    def client(self) -> BlockingClient:
        return BlockingClient(self.path, timeout=SECONDS)


@contextmanager
def serving(path: Path, *, endpoints: int | Path = 4, more: Sequence[str] = ()) -> Iterator[Served]:
    """`vioasid serve --no-vm`, ended by SIGTERM: it must end well, and say nothing on stderr. `more`: an --endpoint
    each."""
    arguments = ["serve", "--no-vm", "--socket", str(path), "--endpoints", str(endpoints), "--json"]
    arguments += [word for each in more for word in ("--endpoint", each)]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        ready = json.loads(line)
        assert ready["ready"] is True
        yield Served(Path(ready["socket"]), process, [each["rid"] for each in ready["endpoints"]])
    finally:
        if process.poll() is None:
            process.terminate()
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out, err) == (0, "", "")
    assert not path.exists()


def vioasid(*arguments: str, runtime: Path | None = None, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)} if runtime is not None else None
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment, input=text, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


class Memory:
    """A memfd of this process, which a client shares: its byte 0 stands at `vaddr`."""

    def __init__(self, size: int = SIZE, vaddr: int = VADDR) -> None:
        self.size, self.vaddr = size, vaddr
        self.fd = os.memfd_create("client")
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)

    def share(self, client: BlockingClient) -> None:
        client.call("memory.share", descriptors=[self.fd], vaddr=self.vaddr, size=self.size)

    def put(self, gpa: int, data: bytes) -> None:
        self.bytes[gpa : gpa + len(data)] = data

    def get(self, gpa: int, length: int) -> bytes:
        return self.bytes[gpa : gpa + length]

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)


@contextmanager
def memory(size: int = SIZE, vaddr: int = VADDR) -> Iterator[Memory]:
    made = Memory(size, vaddr)
    try:
        yield made
    finally:
        made.close()


def refusal(client: BlockingClient, method: str, **fields: Any) -> tuple[int, str]:
    """The errno and the sentence with which a method is refused."""
    try:
        result = client.call(method, **fields)
    except RpcError as error:
        return error.errno or 0, error.sentence
    raise AssertionError(f"{method} was not refused: {result!r}")


def counts(client: BlockingClient) -> dict[str, Any]:
    """What an engine holds: equal before and after, nothing has leaked."""
    status = client.call("vm.status")
    core = status["counters"]
    bound = [each["rid"] for each in client.call("vm.devices")["devices"] if each["context"] is not None]
    return {
        **{name: status[name] for name in ("contexts", "ioasids", "connections")},
        **{name: core[name] for name in ("spaces", "table_pages")},
        "bound": bound,
        "memfds": Path(f"/proc/{status['pid']}/maps").read_text().count("memfd:client"),
        "descriptors": len(os.listdir(f"/proc/{status['pid']}/fd")),
    }
