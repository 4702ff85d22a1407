"""What a context may have beside others: each command that makes something takes of its share, and is refused without
room; everything is given back when it goes, one by one or with the context."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
from guest_ram import PAGE
from ioasid_guest import DEV1, DEV2, GOLDEN, Guest, refused

from backend.core import Access
from backend.ioasid import Code, Context, Kind, PasidMode, Share, Traits
from protocol import Account, Budget

MUCH = 1000
REGISTERED = GOLDEN + 32 * PAGE


def share(**room: int) -> Share:
    """So much of what is named, and of the rest as much as is needed."""
    return Share(**{
        each.name: Budget(room.get(each.name, MUCH), least=0, holders=1).account() for each in fields(Share)
    })  # fmt: skip


def used(context: Context) -> dict[str, int]:
    found = {}
    for each in fields(Share):
        account = getattr(context.share, each.name)
        assert isinstance(account, Account)
        found[each.name] = account.used
    return found


@pytest.fixture
def guest() -> Iterator[Guest]:
    """dev1 and dev2 are free."""
    made = Guest(Traits(pasid_mode=PasidMode.GLOBAL))
    made.ctx.close()
    yield made
    made.close()


def opened(guest: Guest, **room: int) -> Context:
    """A context with dev1 and dev2, 1 a kernel IOASID over some memory and dev1 on it."""
    context = guest.engine.open(share=share(**room))
    for rid in (DEV1, DEV2):
        context.bind_device(rid)
    context.alloc()
    context.map_dma(1, 0, GOLDEN, 8 * PAGE)
    context.attach(DEV1, 1)
    return context


def asked(context: Context, group: int) -> list[Code]:
    codes: list[Code] = []
    device = context.engine.devices[DEV1]
    device.page_request(None, PAGE, Access.READ, group=group, last=True, answer=lambda got: codes.append(got.code))
    return codes


COMMANDS: dict[str, tuple[str, int, Callable[[Context], Any], Callable[[Context], Any]]] = {
    "ALLOC": ("ioasids", 1, lambda c: c.alloc(), lambda c: c.free(2)),
    "ALLOC user": ("ioasids", 1, lambda c: c.alloc(Kind.USER, parent=1, root=0x8000), lambda c: c.free(2)),
    "ALLOC sva": ("processes", 0, lambda c: c.alloc(Kind.SVA, pid=os.getpid()), lambda c: c.free(2)),
    "CREATE_NESTING": ("ioasids", 1, lambda c: c.create_nesting(1), lambda c: c.free(2)),
    "MAP_DMA": ("mappings", 1, lambda c: c.map_dma(1, 1 << 20, GOLDEN, PAGE), lambda c: c.unmap_dma(1, 1 << 20, PAGE)),
    "MAP_DMA's tables": (
        "table_pages", 4, lambda c: c.map_dma(1, 1 << 40, GOLDEN, PAGE), lambda c: c.unmap_dma(1, 1 << 40, PAGE),
    ),
    "ALLOC's tables": ("table_pages", 4, lambda c: c.alloc(), lambda c: c.free(2)),
    "SET_DIRTY_TRACKING": (
        "table_pages", 4, lambda c: c.set_dirty_tracking(1, True), lambda c: c.set_dirty_tracking(1, False),
    ),
    "REGISTER_MEMORY": (
        "mappings", 1, lambda c: c.register_memory(REGISTERED, PAGE), lambda c: c.unregister_memory(REGISTERED, PAGE),
    ),
    "ATTACH_IOASID": ("attachments", 1, lambda c: c.attach(DEV2, 1), lambda c: c.detach(DEV2)),
    "ATTACH_IOASID of a vPASID": (
        "attachments", 1, lambda c: c.attach(DEV1, 1, vpasid=5), lambda c: c.detach(DEV1, vpasid=5),
    ),
}  # fmt: skip
"""Of each: what it takes, how much of that `opened` has, the command, and what undoes it."""


@pytest.mark.parametrize("name", COMMANDS)
def test_without_room_it_is_refused_and_nothing_has_changed(guest: Guest, name: str) -> None:
    what, before, command, _ = COMMANDS[name]
    context = opened(guest, **{what: before})
    assert used(context)[what] == before
    everything, pages = used(context), guest.engine.core.table_pages
    ioasids, info = context.ioasids, context.get_info(1)
    assert refused(lambda: command(context)) == errno.ENOSPC
    assert (used(context), guest.engine.core.table_pages) == (everything, pages)
    assert (context.ioasids, context.get_info(1)) == (ioasids, info)
    context.close()
    assert not any(used(context).values())


@pytest.mark.parametrize("name", COMMANDS)
def test_it_is_given_back(guest: Guest, name: str) -> None:
    what, before, command, undo = COMMANDS[name]
    context = opened(guest)
    everything = used(context)
    assert everything[what] == before
    for _ in range(3):
        command(context)
        assert used(context)[what] > before
        undo(context)
        assert used(context) == everything
    command(context)
    context.close()
    assert not any(used(context).values())


def test_merged_tables_take_of_their_contexts_share(guest: Guest) -> None:
    """A child's mapping and its piece are two; without room for the piece, the parent's mapping is refused as well."""
    context = opened(guest, mappings=4)
    child = context.create_nesting(1, Kind.KERNEL)
    context.map_dma(child, 0, 0, PAGE)
    assert used(context)["mappings"] == 3
    context.map_dma(child, 1 << 20, 1 << 20, PAGE)
    assert used(context)["mappings"] == 4, "nothing is there yet in the parent"
    assert refused(lambda: context.map_dma(1, 1 << 20, GOLDEN, PAGE)) == errno.ENOSPC
    assert used(context)["mappings"] == 4
    context.unmap_dma(1, 0, 8 * PAGE)
    assert used(context)["mappings"] == 2
    context.map_dma(1, 1 << 20, GOLDEN, PAGE)
    assert used(context)["mappings"] == 4
    context.close()
    assert not any(used(context).values())


def test_kvms_pasids(guest: Guest) -> None:
    context = opened(guest, mappings=2)
    context.attach(DEV1, 1, vpasid=5)
    context.map_pasid(5, 1)
    assert refused(lambda: context.map_pasid(6, 1)) == errno.ENOSPC
    context.unmap_pasid(5)
    context.map_pasid(6, 1)
    context.detach(DEV1, vpasid=5)  # what it reached is gone, and so is the entry
    assert used(context)["mappings"] == 1
    context.attach(DEV1, 1, vpasid=5)
    context.map_pasid(6, 1)
    context.close()
    assert not any(used(context).values())


def test_records_of_faults(guest: Guest) -> None:
    """Of the unrecoverable ones the newest are lost, page requests fail; what is read or answered makes room."""
    context = opened(guest, records=3)
    port = guest.dev1.port
    for page in range(5):
        port.read((1 << 30) + page * PAGE, 1)
    faults = context.read_faults()
    assert ([each.iova for each in faults.records], faults.lost) == ([(1 << 30) + page * PAGE for page in range(3)], 2)
    waiting = [asked(context, group) for group in range(4)]
    assert waiting == [[], [], [], [Code.FAILURE]]
    port.read(1 << 30, 1)
    assert (len(context.read_faults().records), used(context)["records"]) == (3, 3), "they wait for an answer still"
    context.page_response(DEV1, 1, Code.SUCCESS)
    assert (waiting[1], used(context)["records"]) == ([Code.SUCCESS], 2)
    guest.clock.now += 11
    guest.engine.expire()
    assert (waiting[0], used(context)["records"]) == ([Code.INVALID], 0)
    port.read(1 << 30, 1)
    asked(context, 7)
    context.close()
    assert not any(used(context).values())


def test_one_does_not_take_what_another_needs(guest: Guest) -> None:
    """Two contexts of one budget: however much one takes, the other has its least."""
    budget = Budget(20, least=5, holders=2)
    greedy, other = (guest.engine.open(share=Share(ioasids=budget.account())) for _ in range(2))
    for _ in range(15):
        greedy.alloc()
    assert refused(greedy.alloc) == errno.ENOSPC
    for _ in range(5):
        other.alloc()
    assert refused(other.alloc) == errno.ENOSPC
    greedy.free(1)
    other.alloc()
    assert refused(greedy.alloc) == errno.ENOSPC
    greedy.close()
    other.close()
    assert budget.rest == 10
