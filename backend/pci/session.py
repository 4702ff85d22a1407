"""What a served client has on the library's side: a context, the checks before it, and the callbacks behind it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

from backend.core import Access
from backend.pci.config_space import CONFIG_SIZE
from backend.pci.dma import DmaRegion
from backend.pci.function import PciFunction, ResetKind
from backend.pci.messages import DMA_MAP, DMA_UNMAP, HEADER, SET_IRQS, Message
from backend.pci.vetting import Vetoed, Vetting
from ctypes_bindings import Context, Library, MappedRegion, Region, errno_of
from ctypes_bindings import declarations as vfu

CONFIG_REGION = vfu.VFU_PCI_DEV_CFG_REGION_IDX

_RESETS = {
    vfu.VFU_RESET_DEVICE: ResetKind.DEVICE,
    vfu.VFU_RESET_LOST_CONN: ResetKind.LOST_CONNECTION,
    vfu.VFU_RESET_PCI_FLR: ResetKind.FLR,
}
_WORTH_A_WARNING = 4
"""Syslog's LOG_WARNING: the library reports a client's errors at this level and below."""


class Host(Protocol):
    """Where a session's news go."""

    function: PciFunction
    on_dma_map: Callable[[DmaRegion], None]
    on_dma_unmap: Callable[[DmaRegion], None]

    def note(self, text: str) -> None:
        """Something that the client did and should not have; logged up to a bound."""

    def record(self, error: BaseException) -> None:
        """The function's own code, or the owner's, raised."""


class Session:
    """One libvfio-user context for one client; it implements ctypes_bindings.Handlers."""

    def __init__(self, host: Host, library: Library) -> None:
        self._host = host
        self._function = host.function
        self._map_error: Exception | None = None
        self._attached = False
        vectors = self._function.interrupts.counts
        irqs = {vfu.VFU_DEV_MSI_IRQ: vectors[0], vfu.VFU_DEV_MSIX_IRQ: vectors[1]}
        regions = {index: Region(bar.size, memory=not bar.is_io) for index, bar in self._function.bars.items()}
        regions[CONFIG_REGION] = Region(CONFIG_SIZE, memory=False)
        self._vetting = Vetting(irqs)
        self._context = Context(library, regions=regions, irqs=irqs, handlers=self)

    def attach(self, version: bytes) -> bytes:
        """The reply to a client's VERSION; ctypes_bindings.Refused if it is none we can serve."""
        reply = self._context.attach(version)
        self._attached = True
        return reply

    def request(self, message: Message) -> bytes | None:
        """The reply to any other message; LibraryError if the client can be served no longer."""
        try:
            self._vetting.check(message)
        except Vetoed as veto:
            self._host.note(f"refused: {veto.strerror}")
            return message.refusal(veto.errno or errno.EINVAL) if message.wants_reply else None
        self._map_error = None
        reply = self._context.exchange(message.data, message.descriptors)
        if message.command == SET_IRQS and not _is_error(reply):
            self._vetting.accepted_irqs(message)
            self._function.interrupts.deliver_pending()
        elif message.command == DMA_MAP and self._map_error is not None:
            self._take_back(message)
            reply = message.refusal(errno_of(self._map_error)) if message.wants_reply else None
        return reply

    def signal(self, vector: int) -> bool:
        """Signal a vector's eventfd; False if there is none, or if signalling it could wait for the client."""
        return self._vetting.may_signal(vector) and self._context.trigger(vector)

    def close(self) -> None:
        """Unmap what is mapped, reset the function, let go of everything."""
        self._context.close()
        self._vetting.close()

    # Called by the library, through ctypes_bindings.Context

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """An access that the fast path did not take: config space in bulk, or a BAR in an odd size."""
        if region == CONFIG_REGION:
            return self._function.config.read_bytes(offset, count)
        _check_width(region, offset, count)
        return self._function.bar_read(region, offset, count).to_bytes(count, "little")

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        """As region_read, the other way."""
        if region == CONFIG_REGION:
            self._function.config.write_bytes(offset, data)
            return
        _check_width(region, offset, len(data))
        self._function.bar_write(region, offset, len(data), int.from_bytes(data, "little"))

    def dma_mapped(self, region: MappedRegion) -> None:
        """The library has mapped a region; the owner may still refuse it by an exception."""
        try:
            self._host.on_dma_map(_dma_region(region))
        except Exception as error:
            self._map_error = error
            raise
        self._vetting.regions[region.gpa] = region.size

    def dma_unmapped(self, region: MappedRegion) -> None:
        """The library is about to unmap a region."""
        if self._vetting.regions.pop(region.gpa, None) is not None:
            self._host.on_dma_unmap(_dma_region(region))

    def reset(self, kind: int) -> None:
        """A client asked for it, or is gone (which a context that never had one is told as well)."""
        if self._attached:
            self._function.reset(_RESETS[kind])

    def log(self, level: int, text: str) -> None:
        """The library's own words."""
        if level <= _WORTH_A_WARNING:
            self._host.note(f"libvfio-user: {text}")

    def failed(self, error: BaseException) -> None:
        """A handler above raised."""
        self._host.record(error)

    def _take_back(self, message: Message) -> None:
        """Unmap what the owner refused: the client is told that it is not mapped, so it must not stay mapped."""
        request = vfu.DmaMap.from_buffer_copy(message.body)
        unmap = vfu.DmaUnmap(argsz=24, flags=0, addr=request.addr, size=request.size)
        self._context.exchange(HEADER.pack(message.id, DMA_UNMAP, HEADER.size + 24, 0, 0) + bytes(unmap))


def _check_width(region: int, offset: int, count: int) -> None:
    """Registers are reached by loads and stores, so by 1, 2, 4 or 8 bytes."""
    if count not in (1, 2, 4, 8):
        raise OddAccess(errno.EINVAL, f"BAR{region}: an access of {count} bytes at {offset:#x}")


class OddAccess(OSError):
    """A client's access that no load or store makes; its fault, not the function's."""


def _dma_region(region: MappedRegion) -> DmaRegion:
    # PROT_READ and PROT_WRITE are 1 and 2, as READ and WRITE are.
    return DmaRegion(region.gpa, region.size, region.hva, Access(region.prot & 3))


def _is_error(reply: bytes | None) -> bool:
    """Whether a reply of the library carries an error; a posted message has none to look at."""
    return reply is not None and HEADER.unpack_from(reply)[4] != 0
