"""Features as a data table (NVM Express 1.4, 5.14 Get Features, 5.21 Set Features).

None is saveable: the controller has no place of its own to save to, and a feature returns to its default with each
controller reset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from backend.endpoints.nvme.commands import BYTE_CDW10, BYTE_CDW11, BYTE_NSID, NSID_BROADCAST, Command
from backend.endpoints.nvme.queues import MAX_IO_QUEUES, VECTORS
from backend.endpoints.nvme.status import CommandFailed, Status

CELSIUS_0 = 273
WARNING_TEMPERATURE = CELSIUS_0 + 70  # kelvin
CRITICAL_TEMPERATURE = CELSIUS_0 + 100

RECOMMENDED_BURST = 5  # log2 of the commands that one read of a submission queue fetches

_QUEUES = MAX_IO_QUEUES - 1  # 0's based
_NUMBER_OF_QUEUES = _QUEUES | _QUEUES << 16
_SAVE = 1 << 31  # SV, dword 10 of Set Features
_CHANGEABLE, _PER_NAMESPACE = 1 << 2, 1 << 1
_COALESCING_DISABLE = 1 << 16


class FeatureId(IntEnum):
    """Figure 271 of NVM Express 1.4: those that an I/O controller must have."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR_CONFIGURATION = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENT_CONFIGURATION = 0x0B


class Select(IntEnum):
    """What Get Features asks for: dword 10, bits 10:8."""

    CURRENT = 0
    DEFAULT = 1
    SAVED = 2
    CAPABILITIES = 3


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature: default, the bits of dword 11 that are kept, and those that select one of several values.

    `refuses(dword 11)` says whether a value is one that the controller does not take.
    """

    section: str
    default: int = 0
    kept: int = 0
    selector: int = 0
    per_namespace: bool = False
    refuses: Callable[[int], bool] = lambda _value: False


FEATURES: dict[FeatureId, Feature] = {
    # Arbitration burst 2^5 commands a turn; the weights are for an arbitration that CAP.AMS does not offer.
    FeatureId.ARBITRATION: Feature("5.21.1.1", default=RECOMMENDED_BURST, kept=0xFFFF_FF07),
    # One power state; the workload hint is kept.
    FeatureId.POWER_MANAGEMENT: Feature("5.21.1.2", kept=0xFF, refuses=lambda value: value & 0x1F != 0),
    # Bits 19:16 pick the sensor (only 0, the composite one, or all), bits 21:20 over or under.
    FeatureId.TEMPERATURE_THRESHOLD: Feature(
        "5.21.1.4",
        kept=0xFFFF,
        selector=0x003F_0000,
        refuses=lambda value: value >> 16 & 0xF not in (0, 0xF) or value >> 20 & 3 > 1,
    ),
    # No time limit is needed where nothing retries; errors of deallocated blocks are not reported (NSFEAT bit 2).
    FeatureId.ERROR_RECOVERY: Feature(
        "5.21.1.5", kept=0xFFFF, per_namespace=True, refuses=lambda value: value >> 16 & 1 != 0
    ),
    FeatureId.VOLATILE_WRITE_CACHE: Feature("5.21.1.6", default=1, kept=1),
    FeatureId.NUMBER_OF_QUEUES: Feature("5.21.1.7", default=_NUMBER_OF_QUEUES),
    # Completions of one batch share an interrupt whatever is asked here; nothing is ever held back for longer.
    FeatureId.INTERRUPT_COALESCING: Feature("5.21.1.8", kept=0xFFFF),
    FeatureId.INTERRUPT_VECTOR_CONFIGURATION: Feature(
        "5.21.1.9", kept=_COALESCING_DISABLE, selector=0xFFFF, refuses=lambda value: value & 0xFFFF >= VECTORS
    ),
    FeatureId.WRITE_ATOMICITY: Feature("5.21.1.10", kept=1),
    # SMART warnings; no notices are offered (OAES).
    FeatureId.ASYNC_EVENT_CONFIGURATION: Feature("5.21.1.11", kept=0xFF),
}

_OVER, _UNDER = 0, 1 << 20


class Features:
    """The present values. Bounded: a selector names 2 thresholds or 17 vectors."""

    def __init__(self) -> None:
        self._values: dict[tuple[FeatureId, int], int] = {}

    def reset(self) -> None:
        """Every feature to its default (7.8: none is saved)."""
        self._values.clear()

    def value(self, feature: FeatureId, selector: int = 0) -> int:
        """The bits that are kept of a feature."""
        return self._values.get((feature, selector), _default(feature, selector))

    @property
    def write_cache(self) -> bool:
        """Whether a write may complete before it is on stable storage."""
        return bool(self.value(FeatureId.VOLATILE_WRITE_CACHE))

    @property
    def burst(self) -> int:
        """Commands of one queue in one turn; 0 where the guest asks for no limit."""
        exponent = self.value(FeatureId.ARBITRATION) & 7
        return 0 if exponent == 7 else 1 << exponent

    def temperature_exceeds(self, kelvin: int) -> bool:
        """Whether a composite temperature is outside the guest's thresholds."""
        over = self.value(FeatureId.TEMPERATURE_THRESHOLD, _OVER)
        under = self.value(FeatureId.TEMPERATURE_THRESHOLD, _UNDER)
        return kelvin >= over or kelvin <= under

    def get(self, command: Command) -> int:
        """Dword 0 of the completion of Get Features. Raises CommandFailed."""
        feature = _feature(command)
        row = FEATURES[feature]
        if command.cdw10 >> 8 & 7 > Select.CAPABILITIES:
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW10 + 1)
        select = Select(command.cdw10 >> 8 & 7)
        if row.per_namespace and select is not Select.CAPABILITIES and command.nsid != 1:
            raise CommandFailed(Status.INVALID_NAMESPACE_OR_FORMAT, byte=BYTE_NSID)
        if select is Select.CAPABILITIES:
            return _CHANGEABLE | (_PER_NAMESPACE if row.per_namespace else 0)
        if row.selector and row.refuses(command.cdw11):
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW11)
        selector = _selector(feature, command.cdw11)
        echo = selector if feature is FeatureId.INTERRUPT_VECTOR_CONFIGURATION else 0
        if select is Select.CURRENT:
            return self.value(feature, selector) | echo
        return _default(feature, selector) | echo

    def set(self, command: Command, *, io_queues_exist: bool) -> int:
        """Dword 0 of the completion of Set Features. Raises CommandFailed."""
        if command.cdw10 & _SAVE:
            raise CommandFailed(Status.FEATURE_NOT_SAVEABLE, byte=BYTE_CDW10 + 3)
        feature = _feature(command)
        row = FEATURES[feature]
        if row.per_namespace:
            if command.nsid not in (1, NSID_BROADCAST):
                raise CommandFailed(Status.INVALID_NAMESPACE_OR_FORMAT, byte=BYTE_NSID)
        elif command.nsid not in (0, NSID_BROADCAST):
            status = Status.FEATURE_NOT_NAMESPACE_SPECIFIC if command.nsid == 1 else Status.INVALID_NAMESPACE_OR_FORMAT
            raise CommandFailed(status, byte=BYTE_NSID)
        if row.refuses(command.cdw11):
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW11)
        if feature is FeatureId.NUMBER_OF_QUEUES:
            # All queues are there from the start; a guest that wants fewer creates fewer.
            if command.cdw11 & 0xFFFF == 0xFFFF or command.cdw11 >> 16 == 0xFFFF:
                raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW11)
            if io_queues_exist:
                raise CommandFailed(Status.COMMAND_SEQUENCE_ERROR, byte=BYTE_CDW11)
            return _NUMBER_OF_QUEUES
        self._values[feature, _selector(feature, command.cdw11)] = command.cdw11 & row.kept
        return 0


def _feature(command: Command) -> FeatureId:
    try:
        return FeatureId(command.cdw10 & 0xFF)
    except ValueError:
        raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW10) from None


def _selector(feature: FeatureId, cdw11: int) -> int:
    """The bits that tell the values of one feature apart; "all sensors" means the one there is."""
    selector = cdw11 & FEATURES[feature].selector
    return selector & _UNDER if feature is FeatureId.TEMPERATURE_THRESHOLD else selector


def _default(feature: FeatureId, selector: int) -> int:
    if feature is FeatureId.TEMPERATURE_THRESHOLD and selector == _OVER:
        return WARNING_TEMPERATURE
    if feature is FeatureId.INTERRUPT_VECTOR_CONFIGURATION and selector == 0:
        return _COALESCING_DISABLE  # the admin queue's vector is never coalesced
    return FEATURES[feature].default
