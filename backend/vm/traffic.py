"""What the endpoints' DMA came to: how much of it was translated, and how much passed by the guest's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from backend.core import RouteCounters
from backend.pci import DmaPort


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of endpoints. `bypassed` and `translations` are of the time during which the guest's IOMMU was on.

    A translation went through a page table of the guest's, nested beneath ours; `moved` of them found a GPA that
    differs from the IOVA. What bypassed went by our table alone; so did what came `before_iommu`: firmware, and what
    the guest wants so, for it has given the device an `identity` domain for requests without a PASID. A fault
    is a request that was refused in the end; one that only waited for its route is none.
    """

    requests: int = 0
    bytes: int = 0
    translations: int = 0
    moved: int = 0
    bypassed: int = 0
    identity: int = 0
    before_iommu: int = 0
    faults: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Traffic)))


class TrafficMeter:
    """Reads the counters of the DMA ports behind one IOMMU when the guest turns it on and off."""

    def __init__(self, ports: Sequence[DmaPort], *, identity: bool = False) -> None:
        """`identity`: what bypasses is wanted so."""
        self._ports = ports
        self._identity = identity
        self._start = self._read()
        self._switched = self._start
        self._on = False
        self._bypassed = 0
        self._faults = 0

    def begin(self) -> None:
        """Count from here: a guest starts."""
        self._start = self._switched = self._read()
        self._bypassed = self._faults = 0

    def switch(self, *, on: bool) -> None:
        """The guest turns its IOMMU on or off; called before a route changes."""
        self._bypassed = self._bypassed_so_far()
        self._switched = self._read()
        self._on = on

    def faulted(self) -> None:
        """An endpoint's request was refused."""
        self._faults += 1

    def traffic(self) -> Traffic:
        """Since `begin`."""
        now, start = self._read(), self._start
        bypassed = self._bypassed_so_far()
        return Traffic(
            requests=now.requests - start.requests,
            bytes=now.bytes - start.bytes,
            translations=now.nested - start.nested,
            moved=now.moved - start.moved,
            bypassed=0 if self._identity else bypassed,
            identity=bypassed if self._identity else 0,
            before_iommu=now.direct - start.direct - bypassed,
            faults=self._faults,
        )

    def _bypassed_so_far(self) -> int:
        if not self._on:
            return self._bypassed
        now = self._read()
        return self._bypassed + now.direct - self._switched.direct

    def _read(self) -> RouteCounters:
        each = [port.counters for port in self._ports]
        return RouteCounters(
            requests=sum(c.requests for c in each),
            bytes=sum(c.bytes for c in each),
            faults=sum(c.faults for c in each),
            nested=sum(c.nested for c in each),
            direct=sum(c.direct for c in each),
            moved=sum(c.moved for c in each),
        )
