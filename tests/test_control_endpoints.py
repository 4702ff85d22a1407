"""Software endpoints, events and status over the control socket, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from control_serving import FIRST, VADDR, Memory, memory

from backend.control import events
from backend.control.alone import EngineAlone, usual_endpoints
from protocol import Client, Notification, RpcError, SocketRefused

PAGE = 0x1000
SIZE = 1 << 20


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[EngineAlone]:
    made = EngineAlone(tmp_path / "s", usual_endpoints(3))
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def client(alone: EngineAlone) -> AsyncIterator[Client]:
    async with await Client.connect(alone.control.path) as made:
        yield made


@pytest.fixture
async def ram(client: Client) -> AsyncIterator[Memory]:
    """The first endpoint reaches 1 MiB of memory at IOVA 0."""
    with memory(SIZE) as made:
        await client.call("memory.share", descriptors=[made.fd], vaddr=VADDR, size=SIZE)
        await client.call("ioasid.alloc")
        await client.call("ioasid.map_dma", ioasid=1, iova=0, vaddr=VADDR, size=SIZE)
        await client.call("vfio.bind_ioasid_fd", rid=FIRST, cookie=77)
        await client.call("vfio.attach_ioasid", rid=FIRST, ioasid=1)
        yield made


async def refused(client: Client, method: str, **fields: Any) -> int:
    with pytest.raises(RpcError) as caught:
        await client.call(method, **fields)
    assert caught.value.sentence
    return caught.value.errno or 0


async def next_one(notifications: AsyncIterator[Notification]) -> tuple[str, dict[str, Any]]:
    found = await asyncio.wait_for(anext(notifications), 10)
    return found.method, found.params[0]


async def test_every_kind_of_dma(client: Client, ram: Memory) -> None:
    ok = {"fault": None}
    assert await client.call("endpoint.dma_write", rid=FIRST, iova=0x10, data=b"abcdefgh") == ok
    assert await client.call("endpoint.dma_copy", rid=FIRST, iova=0x10, target=0x30, length=4) == ok
    assert ram.get(0x10, 8) == b"abcdefgh" and ram.get(0x30, 5) == b"abcd\0"
    assert await client.call("endpoint.dma_fill", rid=FIRST, iova=0x40, length=5, pattern=0x5958, width=2) == ok
    assert ram.get(0x40, 6) == b"XYXYX\0"
    assert await client.call("endpoint.store", rid=FIRST, iova=0x50, value=0x0102, width=2) == ok
    assert ram.get(0x50, 2) == b"\2\1"
    assert await client.call("endpoint.load", rid=FIRST, iova=0x50, width=2) == {"value": 0x0102, **ok}
    assert await client.call("endpoint.fetch_add", rid=FIRST, iova=0x50, value=2, width=4) == {"value": 0x0102, **ok}
    assert await client.call("endpoint.swap", rid=FIRST, iova=0x50, value=9, width=4) == {"value": 0x0104, **ok}
    answer = await client.call("endpoint.compare_exchange", rid=FIRST, iova=0x50, compare=9, value=8, width=8)
    assert answer == {"value": 9, **ok} and ram.get(0x50, 1) == b"\x08"
    assert await client.call("endpoint.dma_read", rid=FIRST, iova=0x10, length=8) == {"data": b"abcdefgh", **ok}
    assert await client.call("endpoint.dma_write", rid=FIRST, iova=0, data="text") == ok
    assert ram.get(0, 4) == b"text"


async def test_compare_exchange_of_16_bytes(client: Client, ram: Memory) -> None:
    """Two numbers of 64 bits are too small for it: bytes go both ways, in the order in which they lie in memory."""
    before, after = bytes(range(1, 17)), bytes(range(255, 239, -1))
    ram.put(0x60, before + b"beyond")
    fields: dict[str, Any] = {"rid": FIRST, "iova": 0x60, "width": 16}
    answer = await client.call("endpoint.compare_exchange", compare=after, value=bytes(16), **fields)
    assert answer == {"value": before, "fault": None}, "it is something else"
    assert ram.get(0x60, 16) == before
    answer = await client.call("endpoint.compare_exchange", compare=before, value=after, **fields)
    assert answer == {"value": before, "fault": None}
    assert ram.get(0x60, 22) == after + b"beyond"
    fault = await client.call("endpoint.compare_exchange", compare=before, value=after, **{**fields, "iova": SIZE})
    assert (fault["value"], fault["fault"]["reason"], fault["fault"]["access"]) == (None, "NOT_PRESENT", "rw")


async def test_a_fault_says_what_moved_before(client: Client, ram: Memory) -> None:
    answer = await client.call("endpoint.dma_write", rid=FIRST, iova=SIZE - 8, data=bytes(16))
    fault = answer["fault"]
    assert (fault["reason"], fault["iova"], fault["done"], fault["access"]) == ("NOT_PRESENT", SIZE, 8, "w")


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("endpoint.dma_read", {"iova": 0}),
        ("endpoint.dma_read", {"iova": 0, "length": (1 << 20) + 1}),
        ("endpoint.dma_read", {"iova": -1, "length": 1}),
        ("endpoint.dma_read", {"iova": 0, "length": 1, "pasid": 1 << 20}),
        ("endpoint.dma_read", {"iova": 0, "length": 1, "colour": 1}),
        ("endpoint.dma_write", {"iova": 0, "data": 5}),
        ("endpoint.dma_fill", {"iova": 0, "length": (16 << 20) + 1}),
        ("endpoint.dma_fill", {"iova": 0, "length": 1, "pattern": 256}),
        ("endpoint.dma_fill", {"iova": 0, "length": 1, "width": 3}),
        ("endpoint.store", {"iova": 0, "value": 256, "width": 1}),
        ("endpoint.store", {"iova": 0, "value": 1, "width": True}),
        ("endpoint.load", {"iova": 0, "width": 16}),
        ("endpoint.fetch_add", {"iova": 0, "value": 1, "width": 2}),
        ("endpoint.compare_exchange", {"iova": 0, "width": 16, "compare": bytes(16), "value": bytes(15)}),
        ("endpoint.compare_exchange", {"iova": 0, "width": 16, "compare": 1, "value": bytes(16)}),
        ("endpoint.compare_exchange", {"iova": 0, "width": 16, "compare": bytes(17), "value": bytes(16)}),
        ("endpoint.compare_exchange", {"iova": 0, "width": 8, "compare": bytes(8), "value": 1}),
        ("endpoint.compare_exchange", {"iova": 0, "width": 2, "compare": 1, "value": 1}),
        ("endpoint.hold", {"iova": 0}),
        ("vm.spaces", {"limit": 65}),
        ("vm.faults", {"after": -1}),
        ("vm.status", {"x": 1}),
        ("subscribe", {"topics": ["ioasid.nothing"]}),
        ("subscribe", {"topics": [[]]}),
        ("memory.share", {"vaddr": VADDR, "size": PAGE}),
    ],
)
async def test_what_makes_no_sense_is_refused(client: Client, method: str, fields: dict[str, Any]) -> None:
    more = {"rid": FIRST} if method.startswith("endpoint.") else {}
    assert await refused(client, method, **more, **fields) == errno.EINVAL


async def test_only_software_endpoints_do_what_they_are_told(client: Client, alone: EngineAlone) -> None:
    alone.engine.add_device(8, "of-the-vm")
    assert await refused(client, "endpoint.dma_read", rid=8, iova=0, length=1) == errno.ENODEV
    assert [each["name"] for each in await client.call("endpoint.list")] == ["sw0", "sw1", "sw2"]


async def test_notifications_of_ones_own_context_and_of_all(client: Client, alone: EngineAlone, ram: Memory) -> None:
    async with await Client.connect(alone.control.path) as watcher, await Client.connect(alone.control.path) as other:
        mine, all_of_them = client.notifications(), watcher.notifications()
        await client.call("subscribe")
        topics = ["vm.fault", "vm.attach", "vm.detach", "vm.invalidate"]
        assert await watcher.call("subscribe", topics=topics) == sorted(topics)
        await other.call("vfio.bind_ioasid_fd", rid=FIRST + 8)
        await other.call("ioasid.alloc")
        await other.call("vfio.attach_ioasid", rid=FIRST + 8, ioasid=1)
        method, record = await next_one(all_of_them)
        assert (method, record["rid"], record["ioasid"]) == ("vm.attach", FIRST + 8, 1)
        theirs = record["context"]
        await client.call("ioasid.create_nesting", parent=1)
        await client.call("vfio.attach_ioasid", rid=FIRST, ioasid=2)
        await client.call("ioasid.invalidate_cache", ioasid=2, granularity="range", iova=PAGE, size=PAGE)
        await client.call("endpoint.dma_read", rid=FIRST, iova=PAGE, length=1)
        await client.call("vfio.detach_ioasid", rid=FIRST)
        for told, group in ((all_of_them, "vm"), (mine, "ioasid")):
            seen = [await next_one(told) for _ in range(4)]
            if group == "ioasid":  # READ_FAULTS has the fault, too
                assert seen.pop(2) == ("ioasid.ready", {"unread": 1})
                seen.append(await next_one(told))
            assert [name for name, _ in seen] == [f"{group}.{e}" for e in ("attach", "invalidate", "fault", "detach")]
            assert {record["context"] for _, record in seen} != {theirs}
            assert all(record["ioasid"] == 2 for _, record in seen)
            invalidated, fault = seen[1][1], seen[2][1]
            assert (invalidated["iova"], invalidated["size"]) == (PAGE, PAGE)
            assert (fault["reason"], fault["cookie"], fault["device"], fault["iova"]) == ("NOT_BOUND", 77, "sw0", PAGE)
        await watcher.call("unsubscribe", topics=["vm.detach"])
        await client.call("unsubscribe")
        await client.call("vfio.detach_ioasid", rid=FIRST)
        await client.call("endpoint.dma_read", rid=FIRST, iova=PAGE, length=1)
        assert (await next_one(all_of_them))[0] == "vm.fault"


async def test_nobody_pays_for_what_nobody_watches(client: Client, alone: EngineAlone) -> None:
    assert not alone.engine.watched
    await client.call("subscribe", topics=["ioasid.fault"])
    assert not alone.engine.watched
    await client.call("subscribe", topics=["ioasid.attach"])
    assert alone.engine.watched
    await client.call("unsubscribe")
    assert not alone.engine.watched
    async with await Client.connect(alone.control.path) as leaver:
        await leaver.call("subscribe")
    while alone.engine.watched:
        await asyncio.sleep(0.01)


async def test_faults_are_kept_up_to_a_bound(
    client: Client, alone: EngineAlone, ram: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await client.call("vm.faults") == {"faults": [], "lost": 0, "more": False}
    kept = events.FAULTS_KEPT
    for number in range(kept + 10):
        await client.call("endpoint.dma_read", rid=FIRST, iova=SIZE + number * PAGE, length=1)
    page = await client.call("vm.faults")
    assert (page["lost"], page["more"], len(page["faults"])) == (10, True, 256)
    assert [each["number"] for each in page["faults"]] == list(range(11, 267))
    assert page["faults"][0]["iova"] == SIZE + 10 * PAGE
    last = await client.call("vm.faults", after=kept + 8)
    assert ([each["number"] for each in last["faults"]], last["more"]) == ([kept + 9, kept + 10], False)
    assert await client.call("vm.faults", after=1 << 40) == {"faults": [], "lost": 0, "more": False}


async def test_a_page_request_that_nobody_answers_ends_in_time(alone: EngineAlone) -> None:
    alone.engine.page_timeout = 0.05
    async with await Client.connect(alone.control.path) as client:
        await client.call("ioasid.alloc")
        await client.call("vfio.bind_ioasid_fd", rid=FIRST)
        await client.call("vfio.attach_ioasid", rid=FIRST, ioasid=1)
        for group in (1, 2):
            asked = client.call("endpoint.page_request", rid=FIRST, iova=PAGE, access="r", group=group)
            assert await asyncio.wait_for(asked, 10) == {"code": "invalid"}


async def test_spaces_come_in_pages(client: Client, alone: EngineAlone) -> None:
    for _ in range(150):
        await client.call("ioasid.alloc", levels=3)
    async with await Client.connect(alone.control.path) as watcher:
        (context,) = await watcher.call("vm.contexts")
        assert (context["ioasids"], context["own"]) == (150, False)
        seen: list[int] = []
        more = True
        while more:
            page = await watcher.call("vm.spaces", context=context["context"], after=seen[-1] if seen else 0)
            seen += [each["ioasid"] for each in page["spaces"]]
            more = page["more"]
        assert seen == list(range(1, 151))
        assert await refused(watcher, "vm.spaces", context=99) == errno.ENOENT
        assert (await watcher.call("vm.status"))["contexts"] == 1  # who only looks has none


async def test_who_is_attached_and_where_requests_go(client: Client, ram: Memory) -> None:
    await client.call("ioasid.create_nesting", parent=1)
    await client.call("vfio.attach_ioasid", rid=FIRST, ioasid=2, access="r")
    await client.call("vfio.attach_ioasid", rid=FIRST, ioasid=2, pasid=3)
    parent, child = (await client.call("vm.spaces"))["spaces"]
    whose = {"rid": FIRST, "name": "sw0"}
    assert parent["attached"] == [{**whose, "pasid": None, "access": "rw", "routes": False}]
    assert child["attached"] == [
        {**whose, "pasid": None, "access": "r", "routes": True},
        {**whose, "pasid": 3, "access": "rw", "routes": True},
    ]
    assert (child["parent"], child["kind"], parent["children"]) == (1, "user", 1)


async def test_a_socket_that_will_not_do(tmp_path: Path, alone: EngineAlone) -> None:
    for path in (alone.control.path, tmp_path / ("x" * 120)):
        second = EngineAlone(path, usual_endpoints(1))
        with pytest.raises(SocketRefused):
            await second.start()
        with contextlib.suppress(OSError):
            await second.close()
    assert alone.control.path.exists()
