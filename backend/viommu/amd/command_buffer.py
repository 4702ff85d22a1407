"""The command buffer: a ring in guest memory, read in order from head to tail (publication 48882, section 2.4)."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from backend.core import Fault
from backend.pci import Turns
from backend.pci.registers import RegisterTable
from backend.viommu.amd.commands import COMMAND_SIZE, Command, IllegalCommand, Opcode, decode
from backend.viommu.amd.event_log import EventCode, event
from backend.viommu.amd.faults import hardware_error
from backend.viommu.amd.registers import (
    COMMAND_BASE,
    COMMAND_HEAD,
    COMMAND_TAIL,
    Status,
    ring_address,
    ring_size,
)
from backend.viommu.amd.status import StatusRegister

log = logging.getLogger(__name__)

_PAGE = 0x1000
TURN_MOST = 1024
"""Commands done in one turn: twice what Linux's ring holds, and some 100 ms of the costliest. Rings may hold 32,768."""


class UnreadableCommand(Exception):
    """Guest memory gave no command at `address`."""

    def __init__(self, address: int, fault: Fault) -> None:
        super().__init__(f"no command can be read at {address:#x}: {fault.reason.name}")
        self.address = address
        self.fault = fault


class StoreFailed(Exception):
    """Guest memory did not take the store of a COMPLETION_WAIT."""

    def __init__(self, address: int, fault: Fault) -> None:
        super().__init__(f"the completion store to {address:#x} was not taken: {fault.reason.name}")
        self.address = address
        self.fault = fault


def pending_commands(
    read: Callable[[int, int], bytes | Fault], base: int, size: int, head: int, tail: int
) -> Iterator[tuple[int, bytes]]:
    """The commands from `head` up to `tail`: pairs of (offset in the ring, 16 bytes).

    `read(gpa, length)` is the IOMMU's own DMA; `base` is a GPA at a page, the rest are bytes, head and tail below
    `size`. One read takes all that a page holds, and a page of guest memory is there or not there as a whole, so one
    that is not costs no command before it. Ends after at most one round of the ring. Raises UnreadableCommand.
    """
    offset = head
    while offset != tail:
        end = min(tail if offset < tail else size, (offset // _PAGE + 1) * _PAGE)
        raw = read(base + offset, end - offset)
        if isinstance(raw, Fault):
            raise UnreadableCommand(base + offset, raw)
        for position in range(0, end - offset, COMMAND_SIZE):
            yield offset + position, raw[position : position + COMMAND_SIZE]
        offset = end % size


class CommandBuffer:
    """Runs the commands of the ring. Its registers are the owner's.

    `execute(command, address)` does one (its GPA is for events), and answers False for one that must wait: then the
    buffer stands still with the head at it, and `run` tries it again. `report(event)` logs.
    """

    def __init__(
        self,
        registers: RegisterTable,
        status: StatusRegister,
        efr: int,
        *,
        read: Callable[[int, int], bytes | Fault],
        execute: Callable[[Command, int], bool],
        report: Callable[[bytes], object],
    ) -> None:
        self._registers = registers
        self._status = status
        self._efr = efr
        self._read = read
        self._execute = execute
        self._report = report
        self._running = False
        self._turns = Turns(self.run)
        self.done: Counter[Opcode] = Counter()
        """Commands, by opcode."""

    def run(self) -> None:
        """The commands up to the tail, while the buffer runs; TURN_MOST of them a turn, where a loop runs.

        Called again by what a command does (a device that answers at once), it has nothing to do.
        """
        if self._running:
            return
        self._running = True
        try:
            while self._status & Status.CMD_BUF_RUN and self._run() and not self._turns.defer():
                pass
        finally:
            self._running = False

    def check(self) -> None:
        """Raise what a turn raised."""
        self._turns.check()

    def _run(self) -> bool:
        """One turn; whether it left commands that do not wait."""
        registers = self._registers
        base, size = ring_address(registers[COMMAND_BASE]), ring_size(registers[COMMAND_BASE])
        head, tail = registers[COMMAND_HEAD], registers[COMMAND_TAIL]
        try:
            commands = pending_commands(self._read, base, size, head, tail)
            for offset, raw in islice(commands, TURN_MOST):
                opcode, command = decode(raw, self._efr)
                if not self._execute(command, base + offset):
                    return False
                self.done[opcode] += 1
                registers[COMMAND_HEAD] = (offset + len(raw)) % size
            return registers[COMMAND_HEAD] != tail
        except IllegalCommand as error:
            self._halt(EventCode.ILLEGAL_COMMAND_ERROR, base + registers[COMMAND_HEAD], 0, error)
        except (UnreadableCommand, StoreFailed) as error:
            self._halt(EventCode.COMMAND_HARDWARE_ERROR, error.address, hardware_error(error.fault), error)
        return False

    def _halt(self, code: EventCode, address: int, flags: int, error: Exception) -> None:
        """Stop at the command that the head pointer names (sections 2.5.6, 2.5.7)."""
        log.debug("%s: %s", code.name, error)
        self._status.change(clear=Status.CMD_BUF_RUN)
        self._report(event(code, address=address, flags=flags))
