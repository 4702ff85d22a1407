"""What all clients may hold together, through the control socket: the greedy one is refused, the others are not."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from control_serving import FIRST

from backend.control import budgets
from backend.control.alone import EngineAlone, usual_endpoints
from backend.ioasid.limits import MAX_CONTEXTS
from protocol import Client, RpcError

PAGE = 0x1000
VADDR = 1 << 30
FEW = {
    "IOASIDS": (24, 4),
    "MAPPINGS": (24, 4),
    "TABLE_PAGES": (56, 8),
    "ATTACHMENTS": (12, 2),
    "SHARED_BYTES": (24 * PAGE, 4 * PAGE),
    "SHARED_RANGES": (12, 2),
}
"""In place of the figures there are: in all, and of each of four clients at least."""


@pytest_asyncio.fixture
async def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineAlone]:
    for name, (total, least) in FEW.items():
        monkeypatch.setattr(budgets, name, total)
        monkeypatch.setattr(budgets, f"LEAST_{name}", least)
    monkeypatch.setattr(budgets, "MAX_CONTEXTS", 4)
    made = EngineAlone(tmp_path / "s", usual_endpoints(2))
    await made.start()
    yield made
    await made.close()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("client")
    os.ftruncate(fd, 64 * PAGE)
    yield fd
    os.close(fd)


def rests(alone: EngineAlone) -> dict[str, int]:
    """What is left of each budget beyond what was promised."""
    return {name: each.rest for name, each in vars(alone.control.contexts.budgets).items()}


async def until_refused(
    client: Client, method: str, *fields: dict[str, Any], fds: tuple[int, ...] = ()
) -> tuple[int, int]:
    """How often it was done, and the errno with which it was refused then."""
    for count, each in enumerate(fields):
        try:
            await client.call(method, descriptors=fds, **each)
        except RpcError as error:
            return count, error.errno or 0
    raise AssertionError(f"{method} was never refused")


async def took(client: Client, memfd: int) -> dict[str, tuple[int, int]]:
    """As much of everything as a client gets."""
    found = {"ioasids": await until_refused(client, "ioasid.alloc", *[{}] * 99)}
    maps = [{"ioasid": 1, "iova": page * PAGE, "vaddr": VADDR, "size": PAGE} for page in range(99)]
    shares = [{"vaddr": VADDR + page * PAGE, "size": PAGE} for page in range(99)]
    found["ranges"] = await until_refused(client, "memory.share", *shares, fds=(memfd,))
    found["mappings"] = await until_refused(client, "ioasid.map_dma", *maps)
    return found


async def test_a_greedy_client_leaves_the_others_their_part(alone: EngineAlone, memfd: int) -> None:
    before = rests(alone)
    async with await Client.connect(alone.control.path) as greedy, await Client.connect(alone.control.path) as other:
        no_room = errno.ENOSPC
        assert await took(greedy, memfd) == {
            "ioasids": (12, no_room),
            "ranges": (6, no_room),
            "mappings": (12, no_room),
        }
        assert await took(other, memfd) == {"ioasids": (4, no_room), "ranges": (2, no_room), "mappings": (4, no_room)}
        await greedy.call("ioasid.free", ioasid=5)
        await other.call("ioasid.alloc")
    await gone(alone, before)


async def test_shared_memory_is_counted_in_bytes(alone: EngineAlone, memfd: int) -> None:
    before = rests(alone)
    async with await Client.connect(alone.control.path) as greedy, await Client.connect(alone.control.path) as other:
        shares = [{"vaddr": VADDR * (each + 1), "size": 6 * PAGE} for each in range(3)]
        assert await until_refused(greedy, "memory.share", *shares, fds=(memfd,)) == (2, errno.ENOMEM)
        shares = [{"vaddr": VADDR * (each + 1), "size": 4 * PAGE} for each in range(3)]
        assert await until_refused(other, "memory.share", *shares, fds=(memfd,)) == (1, errno.ENOMEM)
        # what was shared keeps its addresses until the client goes: tables may hold them
        await greedy.call("memory.unshare", vaddr=VADDR, size=6 * PAGE)
        with pytest.raises(RpcError):
            await greedy.call("memory.share", descriptors=[memfd], vaddr=VADDR, size=6 * PAGE)
    await gone(alone, before)


async def test_tables_and_attachments(alone: EngineAlone) -> None:
    before = rests(alone)
    async with await Client.connect(alone.control.path) as greedy, await Client.connect(alone.control.path) as other:
        for client, rid, pages, attachments in ((greedy, FIRST, 32, 6), (other, FIRST + 8, 8, 2)):
            await client.call("ioasid.alloc")
            await client.call("vfio.bind_ioasid_fd", rid=rid)
            attached = [{"rid": rid, "ioasid": 1, "pasid": pasid} for pasid in range(1, 99)]
            assert await until_refused(client, "vfio.attach_ioasid", *attached) == (attachments, errno.ENOSPC)
            # each takes a table of each of the levels below the root
            maps = [{"ioasid": 1, "iova": each << 39, "vaddr": VADDR, "size": PAGE} for each in range(99)]
            count, refused = await until_refused(client, "ioasid.map_dma", *maps)
            assert (1 + 3 * count <= pages < 1 + 3 * (count + 1), refused) == (True, errno.ENOSPC)
    await gone(alone, before)


async def gone(alone: EngineAlone, before: dict[str, int]) -> None:
    """The clients have ended: all of it is there again."""
    async with asyncio.timeout(10):
        while alone.control.connections or alone.engine.contexts:
            await asyncio.sleep(0.01)
    assert rests(alone) == before


def test_what_remains_for_the_vm_and_for_the_process() -> None:
    """The figures as they are fit together, and leave room for what is no client's."""
    for total, least in (
        (budgets.IOASIDS, budgets.LEAST_IOASIDS),
        (budgets.MAPPINGS, budgets.LEAST_MAPPINGS),
        (budgets.RECORDS, budgets.LEAST_RECORDS),
        (budgets.PROCESSES, budgets.LEAST_PROCESSES),
    ):
        assert least * MAX_CONTEXTS < total
    budgets.Budgets()
    core_pages = 262_144  # VIO_MAX_TABLE_PAGES of the core
    assert budgets.LEAST_TABLE_PAGES * MAX_CONTEXTS < budgets.TABLE_PAGES <= core_pages * 3 // 4
    assert budgets.ATTACHMENTS <= 65536 // 2
    assert budgets.SHARED_RANGES <= 65530 * 3 // 4
    assert budgets.SHARED_BYTES <= (1 << 47) // 2
