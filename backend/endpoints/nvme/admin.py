"""The admin command set (NVM Express 1.4, 5): what arrives on the admin submission queue."""

from __future__ import annotations

from collections.abc import Callable

from backend.endpoints.nvme import identify, logs
from backend.endpoints.nvme.arbitration import Arbiter
from backend.endpoints.nvme.commands import (
    BYTE_CDW10,
    BYTE_CDW12,
    BYTE_FLAGS,
    BYTE_NSID,
    BYTE_PRP1,
    BYTE_PRP2,
    FUSE_MASK,
    PSDT_MASK,
    AdminOpcode,
    Command,
)
from backend.endpoints.nvme.doorbells import ShadowDoorbells
from backend.endpoints.nvme.events import AsyncEvents, Event
from backend.endpoints.nvme.features import FeatureId, Features
from backend.endpoints.nvme.identity import Identity
from backend.endpoints.nvme.logs import COMPOSITE_KELVIN, ErrorLog, Health, LogPage
from backend.endpoints.nvme.namespace import Namespace
from backend.endpoints.nvme.queues import CompletionQueue, QueueTable, SubmissionQueue
from backend.endpoints.nvme.status import CommandFailed, Status
from backend.endpoints.nvme.transfers import MAX_TRANSFER, Transfers
from backend.pci.dma import DmaPort

_TEMPERATURE_EVENTS = 1 << 1  # Asynchronous Event Configuration, critical warnings
_RETAIN_EVENT = 1 << 15  # RAE, dword 10 of Get Log Page
_NOT_ABORTED = 1 << 0  # dword 0 of the completion of Abort


class AdminCommands:
    """Carries out one admin command at a time, wholly."""

    def __init__(
        self,
        *,
        identity: Identity,
        namespace: Namespace,
        port: Callable[[], DmaPort],
        transfers: Transfers,
        queues: QueueTable,
        arbiter: Arbiter,
        features: Features,
        events: AsyncEvents,
        errors: ErrorLog,
        health: Health,
    ) -> None:
        self._identity = identity
        self._namespace = namespace
        self._port = port
        self._transfers = transfers
        self._queues = queues
        self._arbiter = arbiter
        self._features = features
        self._events = events
        self._errors = errors
        self._health = health
        self._handlers: dict[int, Callable[[Command], int | None]] = {
            AdminOpcode.DELETE_SQ: self._delete_submission,
            AdminOpcode.CREATE_SQ: self._create_submission,
            AdminOpcode.GET_LOG_PAGE: self._get_log_page,
            AdminOpcode.DELETE_CQ: self._delete_completion,
            AdminOpcode.CREATE_CQ: self._create_completion,
            AdminOpcode.IDENTIFY: self._identify,
            AdminOpcode.ABORT: self._abort,
            AdminOpcode.SET_FEATURES: self._set_features,
            AdminOpcode.GET_FEATURES: self._features.get,
            AdminOpcode.ASYNC_EVENT_REQUEST: self._async_event_request,
            AdminOpcode.DOORBELL_BUFFER_CONFIG: self._doorbell_buffer_config,
        }

    def execute(self, command: Command) -> int | None:
        """Dword 0 of the completion, or None for a command that completes later. Raises CommandFailed."""
        handler = self._handlers.get(command.opcode)
        if handler is None:
            raise CommandFailed(Status.INVALID_OPCODE, byte=0)
        if command.flags & (FUSE_MASK | PSDT_MASK):
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_FLAGS)
        return handler(command)

    # Queues

    def _create_completion(self, command: Command) -> int:
        queue = self._queues.create_completion(command.prp1, command.cdw10, command.cdw11)
        self._shadow(queue, lambda: self._queues.delete_completion(queue.qid))
        return 0

    def _create_submission(self, command: Command) -> int:
        queue = self._queues.create_submission(command.prp1, command.cdw10, command.cdw11)
        self._shadow(queue, lambda: self._queues.delete_submission(queue.qid))
        return 0

    def _shadow(self, queue: SubmissionQueue | CompletionQueue, undo: Callable[[], None]) -> None:
        shadow = self._arbiter.shadow
        fault = None if shadow is None else shadow.adopt(queue)
        if fault is not None:
            undo()
            raise CommandFailed(Status.DATA_TRANSFER_ERROR, fault=fault)

    def _delete_submission(self, command: Command) -> int:
        self._queues.delete_submission(command.cdw10 & 0xFFFF)
        return 0

    def _delete_completion(self, command: Command) -> int:
        self._queues.delete_completion(command.cdw10 & 0xFFFF)
        return 0

    def _doorbell_buffer_config(self, command: Command) -> int:
        page = self._queues.page_size
        for address, byte in ((command.prp1, BYTE_PRP1), (command.prp2, BYTE_PRP2)):
            if address % page:
                raise CommandFailed(Status.INVALID_FIELD, byte=byte)
        shadow = ShadowDoorbells(self._port(), command.prp1, command.prp2)
        queues: list[SubmissionQueue | CompletionQueue] = [
            *self._queues.completion.values(),
            *self._queues.submission.values(),
        ]
        for queue in queues:
            fault = shadow.adopt(queue) if queue.qid else None
            if fault is not None:
                raise CommandFailed(Status.DATA_TRANSFER_ERROR, byte=BYTE_PRP1, fault=fault)
        self._arbiter.shadow = shadow
        return 0

    # What the controller says of itself

    def _identify(self, command: Command) -> int:
        self._transfers.to_guest(command, identify.structure(command, self._identity, self._namespace))
        return 0

    def _get_log_page(self, command: Command) -> int:
        if not logs.covers(command.nsid):
            raise CommandFailed(Status.INVALID_NAMESPACE_OR_FORMAT, byte=BYTE_NSID)
        which = command.cdw10 & 0xFF
        page = self._log_page(which)
        length = ((command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1) * 4
        offset = command.cdw12 | command.cdw13 << 32
        if length > MAX_TRANSFER:
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW10 + 2)
        if offset % 4 or offset > len(page):
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW12)
        self._transfers.to_guest(command, page[offset : offset + length].ljust(length, b"\0"))
        if not command.cdw10 & _RETAIN_EVENT:
            self._events.log_was_read(which)
        return 0

    def _log_page(self, which: int) -> bytes:
        if which == LogPage.ERROR:
            return self._errors.page()
        if which == LogPage.HEALTH:
            return self._health.page(errors=self._errors.count, temperature_warning=self._too_hot_or_cold())
        if which == LogPage.FIRMWARE_SLOT:
            return logs.firmware_slots()
        if which == LogPage.COMMANDS_SUPPORTED:
            return logs.commands_supported(dataset_management=self._namespace.holes)
        raise CommandFailed(Status.INVALID_LOG_PAGE, byte=BYTE_CDW10)

    # Features and events

    def _set_features(self, command: Command) -> int:
        result = self._features.set(command, io_queues_exist=len(self._queues.completion) > 1)
        if command.cdw10 & 0xFF in (FeatureId.TEMPERATURE_THRESHOLD, FeatureId.ASYNC_EVENT_CONFIGURATION):
            enabled = self._features.value(FeatureId.ASYNC_EVENT_CONFIGURATION) & _TEMPERATURE_EVENTS
            if enabled and self._too_hot_or_cold():
                self._events.report(Event.TEMPERATURE_THRESHOLD)
        return result

    def _too_hot_or_cold(self) -> bool:
        return self._features.temperature_exceeds(COMPOSITE_KELVIN)

    def _async_event_request(self, command: Command) -> None:
        self._events.request(command.cid)

    def _abort(self, command: Command) -> int:
        """Only event requests are ever under way: any other command has completed or was not fetched yet."""
        sqid, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
        queue = self._queues.submission.get(sqid)
        if queue is None:
            raise CommandFailed(Status.INVALID_FIELD, byte=BYTE_CDW10)
        if sqid or not self._events.abort(cid):
            return _NOT_ABORTED
        queue.completions.post(queue, cid, Status.COMMAND_ABORT_REQUESTED)
        return 0
