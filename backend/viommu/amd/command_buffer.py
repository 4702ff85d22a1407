"""The command buffer: a ring in guest memory, read in order from head to tail (publication 48882, section 2.4)."""

from collections.abc import Callable, Iterator

from backend.core import Fault
from backend.viommu.amd.commands import COMMAND_SIZE

_PAGE = 0x1000


class UnreadableCommand(Exception):
    """Guest memory gave no command at `address`."""

    def __init__(self, address: int, fault: Fault) -> None:
        super().__init__(f"no command can be read at {address:#x}: {fault.reason.name}")
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
