"""What counts as translated, as bypassed, and as before the guest's IOMMU: against ports with counters set by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from backend.core import RouteCounters
from backend.pci import DmaPort
from backend.vm.traffic import TrafficMeter


class Port:
    def __init__(self) -> None:
        self.counters = RouteCounters(requests=0, bytes=0, faults=0, nested=0, direct=0, moved=0)

    def count(self, *, nested: int = 0, direct: int = 0, refused: int = 0) -> None:
        old = self.counters
        self.counters = replace(
            old,
            requests=old.requests + nested + direct + refused,
            nested=old.nested + nested,
            direct=old.direct + direct,
            moved=old.moved + nested,
            faults=old.faults + refused,
        )


def test_direct_requests_count_by_when_they_came() -> None:
    one, two = Port(), Port()
    one.count(direct=100)  # another guest's, before
    meter = TrafficMeter([cast(DmaPort, one), cast(DmaPort, two)])
    meter.begin()
    one.count(direct=5)  # firmware
    meter.switch(on=True)
    one.count(nested=10, refused=1)  # it had to wait for its route
    meter.faulted()
    two.count(direct=3)  # by the guest's IOMMU, which is on
    now = meter.traffic()
    assert (now.translations, now.moved, now.bypassed, now.before_iommu, now.faults) == (10, 10, 3, 5, 1)
    meter.switch(on=False)
    two.count(direct=7)  # the guest reboots
    meter.switch(on=True)
    two.count(direct=2, nested=1)
    now = meter.traffic()
    assert (now.translations, now.bypassed, now.before_iommu) == (11, 5, 12)
    assert now.requests == 10 + 1 + 1 + 3 + 5 + 7 + 2
    wanted = TrafficMeter([cast(DmaPort, one)], identity=True)
    wanted.switch(on=True)
    one.count(direct=4)
    assert (wanted.traffic().bypassed, wanted.traffic().identity) == (0, 4)
    meter.begin()
    assert (meter.traffic().requests, meter.traffic().bypassed, meter.traffic().faults) == (0, 0, 0)
