"""PASID virtualisation: which physical PASID stands behind the one that a guest sees."""

from __future__ import annotations

from enum import StrEnum
from heapq import heappop, heappush


class PasidMode(StrEnum):
    """Where a device's physical PASIDs come from, when its guest registers them one by one."""

    WHOLE = "whole"
    """The guest has the whole device: what it writes there goes out, so both are the same number."""
    PER_RID = "per-rid"
    """A mediated device: its PASIDs share a RID with those of others, and come from the RID's pool."""
    GLOBAL = "global"
    """The CPU submits work to it (ENQCMD), with one translation for all devices: one pool for the whole engine, and
    one physical PASID for each PASID of a VM."""


class PasidPool:
    """Numbers of 1 to 2^bits - 1, highest first: a guest counts from below, so that one taken for the other shows at
    once. 0 stays out, as VT-d and AMD-Vi let it stand for requests without a PASID.
    """

    def __init__(self, bits: int) -> None:
        self._next = (1 << bits) - 1
        self._free: list[int] = []

    def take(self) -> int | None:
        """One that is free; None: there is none."""
        if self._free:
            return -heappop(self._free)
        if self._next <= 0:
            return None
        self._next -= 1
        return self._next + 1

    def give(self, pasid: int) -> None:
        """It is free again."""
        heappush(self._free, -pasid)


class SharedPasids:
    """The global pool: (VM, guest's PASID) -> physical PASID, counted by the devices that use it."""

    def __init__(self, pool: PasidPool) -> None:
        self._pool = pool
        self._physical: dict[tuple[object, int], int] = {}
        self._users: dict[int, int] = {}

    def take(self, vm: object, vpasid: int) -> int | None:
        """The one that stands for a VM's PASID, for one more user; None: the pool is empty."""
        physical = self._physical.get((vm, vpasid))
        if physical is None:
            physical = self._pool.take()
            if physical is None:
                return None
            self._physical[vm, vpasid] = physical
        self._users[physical] = self._users.get(physical, 0) + 1
        return physical

    def give(self, vm: object, vpasid: int) -> None:
        """One user fewer; the last one gives it back."""
        physical = self._physical[vm, vpasid]
        self._users[physical] -= 1
        if not self._users[physical]:
            del self._users[physical], self._physical[vm, vpasid]
            self._pool.give(physical)

    def __len__(self) -> int:
        return len(self._physical)
