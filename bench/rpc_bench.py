"""Small commands over the control socket, beside the least that a server in Python can do for the same bytes.

Both servers run in a process of their own, in turns, and answer the same client, which knows nothing of MessagePack: it
sends requests that were made before and counts the bytes of the replies. The floor is asyncio and msgpack alone: every
message is unpacked and its reply packed, unchecked, without a limit, whatever it asks for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from bench.result import Result
from protocol import Server

HERE = Path(__file__).resolve().parent
COMMANDS = 30_000
ROUND_TRIPS = 2_000
ROUNDS = 5
TARGET = 15_000
"""Commands a second, pipelined: what a VMM's flow of maps and invalidations takes on a busy guest, and room."""

FIELDS = {"ioasid": 1, "iova": 0x2000, "vaddr": 0x4000_1000, "size": 4096, "access": "rw"}


def results() -> list[Result]:
    """Commands a second, sent without waiting; microseconds of one at a time."""
    ours: list[tuple[float, float]] = []
    floors: list[tuple[float, float]] = []
    requests, expected = _requests(), _reply_bytes()
    with tempfile.TemporaryDirectory(prefix="vioasid-") as name:
        path = Path(name, "rpc.sock")
        for _ in range(ROUNDS):  # take turns, so that a drift of the machine meets both
            for kind, taken in (("--serve", ours), ("--floor", floors)):
                with _serving(kind, path):
                    taken.append((_rate(path, requests, expected), _round_trip(path)))
    rate, rate_floor = (max(rate for rate, _ in taken) for taken in (ours, floors))
    trip, trip_floor = (min(trip for _, trip in taken) for taken in (ours, floors))
    return [
        {
            "name": "small commands over the socket, pipelined",
            "value": rate,
            "unit": "/s",
            "floor": rate_floor,
            "ratio": rate / rate_floor,
            "target": f">= {TARGET:,} /s",
            "met": rate >= TARGET,
        },
        {
            "name": "small command over the socket, one at a time",
            "value": trip,
            "unit": "us",
            "floor": trip_floor,
            "ratio": trip / trip_floor,
            "target": None,
            "met": None,
        },
    ]


def _requests() -> bytes:
    return b"".join(msgpack.packb([0, msgid, "bench.nothing", [FIELDS]]) for msgid in range(COMMANDS))


def _reply_bytes() -> int:
    return sum(len(msgpack.packb([1, msgid, None, None])) for msgid in range(COMMANDS))


@contextmanager
def _serving(kind: str, path: Path) -> Iterator[None]:
    path.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "bench.rpc_bench", kind, str(path)]
    serving = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    try:
        assert serving.stdout is not None
        if serving.stdout.readline() != "ready\n":
            raise RuntimeError(f"the server {kind} did not start: status {serving.wait()}")
        yield
    finally:
        serving.terminate()
        serving.communicate()


def _rate(path: Path, requests: bytes, expected: int) -> float:
    """Send all, reading meanwhile; commands a second."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.setblocking(False)
        poll = select.poll()
        unsent = memoryview(requests)
        started = time.perf_counter()
        while expected > 0:
            poll.register(client, select.POLLIN | (select.POLLOUT if unsent else 0))
            for _, events in poll.poll():
                if events & select.POLLIN:
                    received = len(client.recv(1 << 18))
                    if not received:
                        raise RuntimeError("the server closed the connection")
                    expected -= received
                elif events & select.POLLOUT:
                    unsent = unsent[client.send(unsent[: 1 << 16]) :]
        return COMMANDS / (time.perf_counter() - started)


def _round_trip(path: Path) -> float:
    """The median of one command at a time, in microseconds."""
    request = msgpack.packb([0, 1, "bench.nothing", [FIELDS]])
    taken: list[float] = []
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter()
            client.sendall(request)
            client.recv(1 << 16)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1e6


class _Floor(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._write = transport.write
        self._unpacker = msgpack.Unpacker()
        self._pack = msgpack.Packer().pack

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        self._write(b"".join([self._pack([1, message[1], None, None]) for message in self._unpacker]))


def _nothing(session: object, fields: dict[str, Any]) -> None:
    """What a command costs without its work."""


async def _serve(path: Path, *, floor: bool) -> None:
    if floor:
        await asyncio.get_running_loop().create_unix_server(_Floor, str(path))
    else:
        await Server({"bench.nothing": _nothing}, path).start()
    print("ready", flush=True)
    await asyncio.get_running_loop().create_future()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rpc_bench", description=__doc__)
    parser.add_argument("--serve", type=Path, metavar="SOCKET", help="be the server")
    parser.add_argument("--floor", type=Path, metavar="SOCKET", help="be the floor")
    args = parser.parse_args(argv)
    if args.serve or args.floor:
        asyncio.run(_serve(args.serve or args.floor, floor=args.serve is None))
        return 0
    print(json.dumps({"results": results()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
