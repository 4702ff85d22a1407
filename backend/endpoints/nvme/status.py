"""Status values of completions, NVM Express 1.4, 4.6.1: status code type in bits 10:8, status code in bits 7:0."""

from __future__ import annotations

from enum import IntEnum

from backend.core import Fault

DO_NOT_RETRY = 1 << 14
MORE = 1 << 13  # the error log holds more about it


class Status(IntEnum):
    """Status code type and status code, as they stand in bits 10:0 of the status field (phase bit left out)."""

    # generic, 4.6.1.2.1
    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    COMMAND_ID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    COMMAND_ABORT_REQUESTED = 0x007
    INVALID_NAMESPACE_OR_FORMAT = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    INVALID_PRP_OFFSET = 0x013
    LBA_OUT_OF_RANGE = 0x080
    # command specific, 4.6.1.2.2
    COMPLETION_QUEUE_INVALID = 0x100
    INVALID_QUEUE_IDENTIFIER = 0x101
    INVALID_QUEUE_SIZE = 0x102
    ASYNC_EVENT_LIMIT_EXCEEDED = 0x105
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F
    # media and data integrity, 4.6.1.2.3
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285


# A transfer that faulted, or media that failed, may succeed when the mapping or the space is back.
_RETRYABLE = frozenset(
    {
        Status.SUCCESS,
        Status.DATA_TRANSFER_ERROR,
        Status.COMMAND_ABORT_REQUESTED,
        Status.WRITE_FAULT,
        Status.UNRECOVERED_READ_ERROR,
    }
)


class CommandFailed(Exception):
    """A command ends with this status and nothing else is disturbed. `fault`: the DMA request that failed, if one did.

    `byte` is where in the command the fault lies, for the Parameter Error Location of the error log.
    """

    def __init__(self, status: Status, *, byte: int | None = None, fault: Fault | None = None) -> None:
        super().__init__(status.name)
        self.status = status
        self.byte = byte
        self.fault = fault

    @property
    def field(self) -> int:
        """The status field of the completion without its phase bit: bits 14:0."""
        return self.status | MORE | (0 if self.status in _RETRYABLE else DO_NOT_RETRY)
