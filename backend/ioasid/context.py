"""A context: what one open of /dev/ioasid owns, and the commands on it."""

from __future__ import annotations

from collections.abc import Sequence

from .allocation import AllocationCommands
from .attachments import AttachmentCommands
from .invalidation import InvalidationCommands
from .memory import MemoryCommands
from .pasids import FaultCommands, PasidCommands


class Context(
    AllocationCommands, MemoryCommands, InvalidationCommands, AttachmentCommands, PasidCommands, FaultCommands
):
    """The commands of the uAPI. IOASIDs are numbers local to the context; lowest free first, from 1.

    Every command either does all it says or raises IoasidError and changes nothing. Fields, legal kinds and errors
    of each stand in backend.ioasid.commands.
    """

    @property
    def ioasids(self) -> Sequence[int]:
        """Those that are allocated, oldest first."""
        return list(self._spaces)

    def close(self) -> None:
        """Give up all that the context owns: attachments, devices, IOASIDs. Later commands are refused; closing
        again is not."""
        for device in list(self._devices.values()):
            while device.stacks:
                self._pop(device, next(reversed(device.stacks)))
            self._release(device)
        for space in sorted(self._spaces.values(), key=lambda each: each.depth, reverse=True):
            self._drop(space)
        self.share.mappings.give(len(self.pinned))
        self.faults.close()
        self._closed = True
        self.engine.contexts.discard(self)
