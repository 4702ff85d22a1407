"""What the clients of an engine may hold together, each figure with its reason; each of them may always have a part."""

from __future__ import annotations

from backend.ioasid import Share
from backend.ioasid.limits import MAX_CONTEXTS, MAX_IOASIDS
from protocol import Budget

IOASIDS = MAX_IOASIDS + 64 * MAX_CONTEXTS
"""One client may have as many as a context can, when each other one has 64: two devices with a few PASIDs each. They
take some 2.5 KiB each, half a GiB in all."""
LEAST_IOASIDS = 64

MAPPINGS = 1 << 21
"""As many as 32 IOASIDs can have, and some 300 bytes each: 600 MiB."""
LEAST_MAPPINGS = 256
"""A VM's memory is a few, what VMMs map for devices' own memory some dozens."""

TABLE_PAGES = 3 << 16
"""768 MiB of host-managed tables. The core has 1 GiB; a quarter remains for the VM's own, and maps 128 GiB of memory
even in pages of 4 KiB."""
LEAST_TABLE_PAGES = 64
"""128 MiB of memory in pages of 4 KiB, or any amount in large ones."""

ATTACHMENTS = 1 << 15
"""Half of the core's routes: the other half remains for the VM's own devices."""
LEAST_ATTACHMENTS = 8

RECORDS = 1 << 18
"""Of fault queues: some 350 bytes each, 90 MiB."""
LEAST_RECORDS = 64

PROCESSES = MAX_CONTEXTS + 128
"""IOASIDs of kind sva: one of each client, and 128 more; two descriptors each (backend.ioasid.limits)."""
LEAST_PROCESSES = 1

SHARED_BYTES = 1 << 46
"""Of memory that clients share: half of the addresses that a process has, so that the other half remains for its own
memory and the VM's."""
LEAST_SHARED_BYTES = 1 << 35
"""32 GiB: a VM's memory; a thousand of them are half of it."""

SHARED_RANGES = 48_000
"""Three quarters of the 65,530 mappings that Linux gives a process (vm.max_map_count)."""
LEAST_SHARED_RANGES = 16
"""A VM's memory has fewer than ten parts."""


class Budgets:
    """One of each, for as many clients as there can be contexts."""

    def __init__(self) -> None:
        self._ioasids = _budget(IOASIDS, LEAST_IOASIDS)
        self._mappings = _budget(MAPPINGS, LEAST_MAPPINGS)
        self._table_pages = _budget(TABLE_PAGES, LEAST_TABLE_PAGES)
        self._attachments = _budget(ATTACHMENTS, LEAST_ATTACHMENTS)
        self._records = _budget(RECORDS, LEAST_RECORDS)
        self._processes = _budget(PROCESSES, LEAST_PROCESSES)
        self.shared_bytes = _budget(SHARED_BYTES, LEAST_SHARED_BYTES)
        self.shared_ranges = _budget(SHARED_RANGES, LEAST_SHARED_RANGES)

    def share(self) -> Share:
        """For one more context."""
        return Share(
            ioasids=self._ioasids.account(),
            mappings=self._mappings.account(),
            table_pages=self._table_pages.account(),
            attachments=self._attachments.account(),
            records=self._records.account(),
            processes=self._processes.account(),
        )


def _budget(total: int, least: int) -> Budget:
    return Budget(total, least=least, holders=MAX_CONTEXTS)
