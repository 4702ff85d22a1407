"""Invalidations of device TLBs that are under way (sections 2.4.4 and 2.5.8 of publication 48882).

An invalidation is over when its device has answered, or when software's time-out is. COMPLETION_WAIT waits for all of
them, and another invalidation of the same device where too many are under way; the command buffer goes on by itself.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

from backend.viommu.amd.commands import InvalidateDeviceTlb
from backend.viommu.amd.event_log import EventCode, event

MOST_AT_ONCE = 32
"""Of one device: PCI Express gives an invalidation a tag of 5 bits (10.3.2)."""

_SECONDS = (None, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, None)
"""InvTimeOut, bits 7:5 of the control register: 0 waits for ever, 7 is reserved."""


class Timer(Protocol):
    """What runs out later, unless it is cancelled."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


def call_later(seconds: float, call: Callable[[], None]) -> Timer:
    """By the loop that runs."""
    return asyncio.get_running_loop().call_later(seconds, call)


def time_out(control: int) -> float | None:
    """Seconds that software gives a device for its answer, from the control register; None: any time."""
    return _SECONDS[control >> 5 & 7]


@dataclass(slots=True)
class _Invalidation:
    device_id: int
    address: int  # of its command
    timer: Timer | None = None


class DeviceTlbs:
    """Those under way: at most MOST_AT_ONCE a device.

    `tell(command, answered)` passes one on; `resume` is called when one is over that was not at once; `report`
    logs an event.
    """

    def __init__(
        self,
        tell: Callable[[InvalidateDeviceTlb, Callable[[], None]], None],
        resume: Callable[[], None],
        report: Callable[[bytes], object],
        later: CallLater,
    ) -> None:
        self._tell = tell
        self._resume = resume
        self._report = report
        self._later = later
        self._pending: dict[int, _Invalidation] = {}
        self._numbers = count()

    @property
    def waiting(self) -> bool:
        """Whether any has not been answered."""
        return bool(self._pending)

    def invalidate(self, command: InvalidateDeviceTlb, address: int, seconds: float | None) -> bool:
        """Begin one; False: the device has as many to answer as it takes. `seconds` that it has for it, None: any."""
        most = min(command.at_once or MOST_AT_ONCE, MOST_AT_ONCE)
        if sum(each.device_id == command.device_id for each in self._pending.values()) >= most:
            return False
        number = next(self._numbers)
        begun = self._pending[number] = _Invalidation(command.device_id, address)
        self._tell(command, partial(self._answered, number))
        if number in self._pending and seconds is not None:
            begun.timer = self._later(seconds, partial(self._expired, number))
        return True

    def forget(self) -> None:
        """Nobody waits any more."""
        for each in self._pending.values():
            if each.timer is not None:
                each.timer.cancel()
        self._pending.clear()

    def _answered(self, number: int) -> None:
        """An answer that comes late, after its time or after a reset, is none."""
        over = self._pending.pop(number, None)
        if over is None:
            return
        if over.timer is not None:
            over.timer.cancel()
        self._resume()

    def _expired(self, number: int) -> None:
        over = self._pending.pop(number)
        self._report(event(EventCode.IOTLB_INV_TIMEOUT, device_id=over.device_id, address=over.address))
        self._resume()
