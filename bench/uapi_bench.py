"""The uAPI: commands a second over the control socket, page requests there and back, MAP and UNMAP of pages,
ALLOC+BIND+ATTACH among many IOASIDs.

Rates over the socket stand beside the least code that can answer MessagePack-RPC at all: one blocking loop in Python
that unpacks requests and packs a constant answer. Both serve the same client, in turns, from a process of their own.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgpack

from backend.core import RW
from backend.ioasid import PAGE_SIZE, Context, Engine, Kind
from bench.result import Result
from protocol import Client

ROUNDS = 5
COMMANDS = 20_000
"""Of a round: about a second."""
TARGET_RATE = 15_000
POPULATIONS = (1, 1_000, 100_000)
REPEATS = 300
"""Of ALLOC+BIND+ATTACH at each population; the median counts."""
FLAT = 1.5
"""Times the cost with one IOASID: noise, and caches that hold less."""
MAPPED = 10_000
TARGET_MAPPING = {"MAP_DMA": 7, "UNMAP_DMA": 5}
"""Microseconds: a guest that maps and unmaps a buffer for each request of a disk shares its time with them."""
HVA = 0x4000_0000
"""Nothing need lie there: nobody reads it."""
RID = 0x0100
SMALL = ("ioasid.invalidate_cache", {"ioasid": 2, "granularity": "range", "iova": 0x1000, "size": 0x1000})


def results() -> list[Result]:
    """All of it."""
    return [*rates(), page_requests(), *mappings(), *populations()]


# Commands over the socket


def rates() -> list[Result]:
    """Small commands a second, pipelined, and one at a time."""
    found: dict[str, list[float]] = {"pipelined": [], "one by one": [], "floor pipelined": [], "floor one by one": []}
    with tempfile.TemporaryDirectory(prefix="vioasid-") as folder:
        path = Path(folder) / "s"
        for _ in range(ROUNDS):
            with _floor(path):
                found["floor pipelined"].append(_measure(path, COMMANDS, 512))
                found["floor one by one"].append(_measure(path, COMMANDS // 10, 1))
            with _served(path):
                found["pipelined"].append(_measure(path, COMMANDS, 512))
                found["one by one"].append(_measure(path, COMMANDS // 10, 1))
    lines: list[Result] = []
    for how, target in (("pipelined", TARGET_RATE), ("one by one", None)):
        ours, floor = max(found[how]), max(found[f"floor {how}"])
        lines.append(
            {
                "name": f"INVALIDATE_CACHE over the socket, {how}",
                "value": ours,
                "unit": "/s",
                "floor": floor,
                "ratio": ours / floor,
                "target": None if target is None else f">= {target} /s",
                "met": None if target is None else ours >= target,
            }
        )
    return lines


def _measure(path: Path, count: int, window: int) -> float:
    """Requests answered in a second, with at most so many under way."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        replies = msgpack.Unpacker()
        for method, fields in (("ioasid.alloc", {}), ("ioasid.create_nesting", {"parent": 1})):
            connection.sendall(msgpack.packb([0, 0, method, [fields]]))
            _take(connection, replies, 1)
        requests = [msgpack.packb([0, number, SMALL[0], [SMALL[1]]]) for number in range(count)]
        batches = [b"".join(requests[at : at + window]) for at in range(0, count, window)]
        begin = time.perf_counter()
        if window == 1:
            for batch in batches:
                connection.sendall(batch)
                _take(connection, replies, 1)
        else:
            sender = threading.Thread(target=connection.sendall, args=(b"".join(batches),))
            sender.start()
            _take(connection, replies, count)
            sender.join()
        return count / (time.perf_counter() - begin)


def _take(connection: socket.socket, replies: msgpack.Unpacker, count: int) -> None:
    while count:
        replies.feed(connection.recv(1 << 16))
        for _, _, error, _ in replies:
            if error is not None:
                raise RuntimeError(str(error))
            count -= 1


@contextmanager
def _served(path: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "backend.cli.main", "serve", "--no-vm", "--socket", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[1]) as server:
        try:
            assert server.stdout is not None
            if not json.loads(server.stdout.readline() or b"{}").get("ready"):
                raise RuntimeError("the server did not start")
            yield
        finally:
            server.terminate()


@contextmanager
def _floor(path: Path) -> Iterator[None]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    server = multiprocessing.get_context("fork").Process(target=_answer, args=(listener,), daemon=True)
    server.start()
    listener.close()
    try:
        yield
    finally:
        server.terminate()
        server.join()
        os.unlink(path)


def _answer(listener: socket.socket) -> None:
    """The least server there can be: one client at a time, every request answered by nil."""
    pack = msgpack.Packer().pack
    while True:
        connection, _ = listener.accept()
        requests = msgpack.Unpacker()
        while data := connection.recv(1 << 16):
            requests.feed(data)
            connection.sendall(b"".join([pack([1, msgid, None, None]) for _, msgid, _, _ in requests]))


# Page requests


def page_requests() -> Result:
    """From a device's page request to its answer: over the socket the client is told, reads the record, and answers.

    The floor are three calls of the same client that do nothing: as many as go back and forth.
    """
    with tempfile.TemporaryDirectory(prefix="vioasid-") as folder:
        path = Path(folder) / "s"
        with _served(path):
            there, calls = asyncio.run(_page_requests(path))
    cost, floor = statistics.median(there), 3 * statistics.median(calls)
    return {
        "name": "page request, told, read and answered",
        "value": cost,
        "unit": "us",
        "floor": floor,
        "ratio": cost / floor,
        "target": None,
        "met": None,
    }


async def _page_requests(path: Path) -> tuple[list[float], list[float]]:
    """Microseconds of each page request, and of each call that does nothing."""
    there: list[float] = []
    calls: list[float] = []
    async with await Client.connect(path) as device, await Client.connect(path) as user:
        parent = await user.call("ioasid.alloc")
        await user.call("vfio.bind_ioasid_fd", rid=RID)
        await user.call("vfio.attach_ioasid", rid=RID, ioasid=parent)
        await user.call("subscribe", topics=["ioasid.ready"])
        await device.call("endpoint.hold", rid=RID)
        told = user.notifications()
        for _ in range(REPEATS):
            begin = time.perf_counter()
            asked = asyncio.ensure_future(
                device.call("endpoint.page_request", rid=RID, iova=0x1000, access="w", group=1)
            )
            await anext(told)
            (record,) = (await user.call("ioasid.read_faults"))["records"]
            await user.call("ioasid.page_response", rid=record["rid"], group=record["group"], code="success")
            await asked
            there.append((time.perf_counter() - begin) * 1e6)
            begin = time.perf_counter()
            await user.call("ioasid.check_extension", extension="none")
            calls.append((time.perf_counter() - begin) * 1e6)
    return there, calls


# Mapping


def mappings() -> list[Result]:
    """MAP_DMA and UNMAP_DMA of a page, from Python. The floor are the core's own calls, which keep no books."""
    ours, floor = [], []
    for _ in range(ROUNDS):
        engine = Engine()
        try:
            context = engine.open()
            ioasid = context.alloc(Kind.KERNEL)
            ours.append(_map_pages(partial(context.map_dma, ioasid), partial(context.unmap_dma, ioasid)))
            engine.core.create_host_space(1 << 31)
            floor.append(_map_pages(partial(engine.core.map, 1 << 31, access=RW), partial(engine.core.unmap, 1 << 31)))
        finally:
            engine.close()
    lines: list[Result] = []
    for index, (name, target) in enumerate(TARGET_MAPPING.items()):
        cost, least = min(each[index] for each in ours), min(each[index] for each in floor)
        lines.append(
            {
                "name": f"{name} of a page, {MAPPED:,} in all",
                "value": cost,
                "unit": "us",
                "floor": least,
                "ratio": cost / least,
                "target": f"<= {target} us",
                "met": cost <= target,
            }
        )
    return lines


def _map_pages(put: Callable[[int, int, int], None], take: Callable[[int, int], None]) -> tuple[float, float]:
    """Microseconds of each of a great many, no two of which lie side by side."""
    begin = time.perf_counter()
    for page in range(MAPPED):
        put(page << 13, HVA + (page << 13), PAGE_SIZE)
    middle = time.perf_counter()
    for page in range(MAPPED):
        take(page << 13, PAGE_SIZE)
    end = time.perf_counter()
    return (middle - begin) / MAPPED * 1e6, (end - middle) / MAPPED * 1e6


# Among many IOASIDs


def populations() -> list[Result]:
    """ALLOC+BIND+ATTACH of a guest-managed child, in microseconds, while so many IOASIDs exist."""
    found = {count: _among(count) for count in POPULATIONS}
    least = found[POPULATIONS[0]]
    return [
        {
            "name": f"ALLOC+BIND+ATTACH among {count:,} IOASIDs",
            "value": cost,
            "unit": "us",
            "floor": least,
            "ratio": cost / least,
            "target": f"<= {FLAT} x that of one",
            "met": cost / least <= FLAT,
        }
        for count, cost in found.items()
    ]


def _among(count: int) -> float:
    engine = Engine()
    try:
        engine.add_device(RID, "bench")
        context = engine.open()
        context.bind_device(RID)
        parent = context.alloc(Kind.KERNEL)
        context.attach(RID, parent)
        _populate(context, count - 1)
        return statistics.median(_sequence(context, parent) for _ in range(REPEATS))
    finally:
        engine.close()


def _populate(context: Context, count: int) -> None:
    """As guests' domains are: each beneath a stage 2, none of which has more children than AMD-Vi has domain ids."""
    while count > 0:
        parent = context.alloc(Kind.KERNEL)
        children = min(count - 1, 50_000)
        for number in range(children):
            context.alloc(Kind.USER, parent=parent, root=number << 12)
        count -= children + 1


def _sequence(context: Context, parent: int) -> float:
    """Microseconds of one."""
    begin = time.perf_counter()
    ioasid = context.alloc(Kind.USER, parent=parent, root=0x1000)
    context.attach(RID, ioasid, pasid=1)
    cost = (time.perf_counter() - begin) * 1e6
    context.detach(RID, pasid=1)
    context.free(ioasid)
    return cost


if __name__ == "__main__":
    print(json.dumps({"results": results()}, indent=2))
