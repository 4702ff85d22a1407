"""Physical region pages: the guest's description of a data buffer (NVM Express 1.4, 4.3).

PRP1 may start anywhere on a dword in its page. PRP2 is a second page where two are enough, else the address of a list
of pages; a list that reaches the end of its own page goes on at the page that its last slot names.
"""

from __future__ import annotations

import struct

from backend.core import Fault
from backend.endpoints.nvme.commands import BYTE_PRP1, BYTE_PRP2
from backend.endpoints.nvme.status import CommandFailed, Status
from backend.pci.dma import DmaPort

_ENTRY_SIZE = 8

ScatterList = list[tuple[int, int]]


def scatter_list(dma: DmaPort, prp1: int, prp2: int, length: int, page_size: int) -> ScatterList:
    """[(iova, bytes), ...] of `length` > 0 bytes, neighbours joined. Raises CommandFailed.

    Reads no more of a list than `length` needs, so a chain that never ends costs what its length allows.
    """
    if prp1 & 3:
        raise CommandFailed(Status.INVALID_PRP_OFFSET, byte=BYTE_PRP1)
    first = min(length, page_size - prp1 % page_size)
    found: ScatterList = [(prp1, first)]
    left = length - first
    if left == 0:
        return found
    if left <= page_size:
        _append(found, (prp2,), left, page_size)
        return found
    if prp2 % _ENTRY_SIZE:
        raise CommandFailed(Status.INVALID_PRP_OFFSET, byte=BYTE_PRP2)
    table = prp2
    while True:
        needed = -(-left // page_size)
        slots = (page_size - table % page_size) // _ENTRY_SIZE
        count = min(needed, slots)
        answer = dma.read(table, count * _ENTRY_SIZE)
        if isinstance(answer, Fault):
            raise CommandFailed(Status.DATA_TRANSFER_ERROR, byte=BYTE_PRP2, fault=answer)
        entries = struct.unpack(f"<{count}Q", answer)
        if needed <= slots:
            _append(found, entries, left, page_size)
            return found
        # The last slot of the page names the next page of the list, where there is room for at least 512 more.
        table = entries[-1]
        if table % page_size:
            raise CommandFailed(Status.INVALID_PRP_OFFSET, byte=BYTE_PRP2)
        _append(found, entries[:-1], (count - 1) * page_size, page_size)
        left -= (count - 1) * page_size


def _append(found: ScatterList, pages: tuple[int, ...], length: int, page_size: int) -> None:
    """Add whole pages, the last one cut to what `length` leaves of it."""
    if not pages:
        return
    first = pages[0]
    if first % page_size == 0 and pages == tuple(range(first, first + len(pages) * page_size, page_size)):
        _join(found, first, length)  # one run, as an IOMMU's addresses mostly are
        return
    for page in pages:
        if page % page_size:
            raise CommandFailed(Status.INVALID_PRP_OFFSET, byte=BYTE_PRP2)
        _join(found, page, min(length, page_size))
        length -= page_size


def _join(found: ScatterList, iova: int, length: int) -> None:
    start, size = found[-1]
    if start + size == iova:
        found[-1] = (start, size + length)
    else:
        found.append((iova, length))
