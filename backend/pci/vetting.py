"""What a client's message must satisfy before libvfio-user sees it.

The library was written for clients that mean well. Here stands what it would take amiss: sums that wrap, descriptors
that it would leak, close twice or block on. Each refusal is an errno for the client and a sentence for the log.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Mapping
from typing import TypeVar

from backend.pci.messages import DMA_MAP, DMA_UNMAP, REGION_READ, REGION_WRITE, SET_IRQS, Message
from ctypes_bindings import MESSAGE_MAX
from ctypes_bindings import declarations as vfu

PAGE = 4096
REGIONS_MAX = 16
"""DMA regions of a client, as in libvfio-user (MAX_DMA_REGIONS); QEMU's PC needs 6."""
MAPPED_MAX = 8 << 40
"""Bytes that one client may map, 8 TiB: more than any guest here, 1/16 of the process's address space."""
ADDRESS_END = 1 << 64

S = TypeVar("S", bound=ctypes.Structure)

_ACTION = vfu.VFIO_IRQ_SET_ACTION_MASK | vfu.VFIO_IRQ_SET_ACTION_UNMASK | vfu.VFIO_IRQ_SET_ACTION_TRIGGER
_DATA = vfu.VFIO_IRQ_SET_DATA_NONE | vfu.VFIO_IRQ_SET_DATA_BOOL | vfu.VFIO_IRQ_SET_DATA_EVENTFD


class Vetoed(OSError):
    """A message that is not to be handed on: errno for the client, and why."""


class Vetting:
    """Checks of one client's messages, with the little state they need: its regions and its eventfds."""

    def __init__(self, vectors: Mapping[int, int]) -> None:
        """`vectors`: number of vectors by kind of interrupt (VFU_DEV_*_IRQ)."""
        self._vectors = vectors
        self._eventfds: dict[int, int] = {}
        self.regions: dict[int, int] = {}
        """Size of each region that the library holds, by address."""

    def check(self, message: Message) -> None:
        """Raise Vetoed if the library must not see this."""
        if message.descriptors and message.command not in (DMA_MAP, SET_IRQS):
            raise Vetoed(errno.EINVAL, f"command {message.command} came with file descriptors")
        if message.command == DMA_MAP:
            self._check_map(message)
        elif message.command == DMA_UNMAP:
            _check_unmap(message)
        elif message.command == SET_IRQS:
            self._check_irqs(message)
        elif message.command in (REGION_READ, REGION_WRITE):
            access = _structure(message, vfu.RegionAccess)
            if access.count > MESSAGE_MAX - ctypes.sizeof(vfu.Header) - ctypes.sizeof(vfu.RegionAccess):
                raise Vetoed(errno.E2BIG, f"an access of {access.count} bytes does not fit a message")

    def accepted_irqs(self, message: Message) -> None:
        """SET_IRQS was carried out: keep its eventfds, to look at their flags before each signal."""
        request = _structure(message, vfu.IrqSet)
        if not request.flags & vfu.VFIO_IRQ_SET_ACTION_TRIGGER:
            return
        count = request.count or self._vectors[request.index]
        for vector in range(request.start, request.start + count):
            if (old := self._eventfds.pop(vector, None)) is not None:
                os.close(old)
        for vector, descriptor in enumerate(message.descriptors, request.start):
            self._eventfds[vector] = os.dup(descriptor)

    def may_signal(self, vector: int) -> bool:
        """Whether the vector has an eventfd that cannot block: the client shares that flag and can clear it."""
        descriptor = self._eventfds.get(vector)
        return descriptor is not None and bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK)

    def close(self) -> None:
        """Let go of every eventfd."""
        for descriptor in self._eventfds.values():
            os.close(descriptor)
        self._eventfds.clear()

    def _check_map(self, message: Message) -> None:
        request = _structure(message, vfu.DmaMap)
        where = f"DMA_MAP of [{request.addr:#x}, {request.addr + request.size:#x})"
        if request.size == 0 or request.addr + request.size > ADDRESS_END:
            raise Vetoed(errno.EINVAL, f"{where} is empty or wraps")
        if request.addr % PAGE or request.size % PAGE:
            raise Vetoed(errno.EINVAL, f"{where} is not made of whole pages")
        # The library takes an equal region for granted, and loses the descriptor that came with it.
        if self.regions.get(request.addr) == request.size:
            raise Vetoed(errno.EEXIST, f"{where}: already mapped")
        if len(self.regions) >= REGIONS_MAX:
            raise Vetoed(errno.ENOSPC, f"{where}: the client has {REGIONS_MAX} regions already")
        if sum(self.regions.values()) + request.size > MAPPED_MAX:
            raise Vetoed(errno.ENOSPC, f"{where}: more than {MAPPED_MAX >> 40} TiB in all")
        if len(message.descriptors) > 1:
            raise Vetoed(errno.EINVAL, f"{where} came with {len(message.descriptors)} file descriptors")
        if message.descriptors:
            _check_memory(message.descriptors[0], request, where)

    def _check_irqs(self, message: Message) -> None:
        request = _structure(message, vfu.IrqSet)
        # The library adds start and count in 32 bits, and closes what it finds behind its array if that wraps.
        if request.start + request.count > self._vectors.get(request.index, 0):
            raise Vetoed(
                errno.EINVAL,
                f"SET_IRQS of vectors [{request.start}, {request.start + request.count}) of kind {request.index}",
            )
        action, data = request.flags & _ACTION, request.flags & _DATA
        if action == vfu.VFIO_IRQ_SET_ACTION_TRIGGER and request.count and data != vfu.VFIO_IRQ_SET_DATA_EVENTFD:
            raise Vetoed(errno.ENOTSUP, "SET_IRQS that would signal an interrupt itself")
        if action != vfu.VFIO_IRQ_SET_ACTION_TRIGGER and message.descriptors:
            raise Vetoed(errno.EINVAL, "SET_IRQS with file descriptors that sets no trigger")
        if message.descriptors and len(message.descriptors) != request.count:
            raise Vetoed(errno.EINVAL, f"SET_IRQS with {len(message.descriptors)} descriptors for {request.count}")
        for descriptor in message.descriptors:
            if os.readlink(f"/proc/self/fd/{descriptor}") != "anon_inode:[eventfd]":
                raise Vetoed(errno.EINVAL, "SET_IRQS with a file descriptor that is no eventfd")
            # A full counter must give EAGAIN: a write that waits for the client would stall every other one.
            os.set_blocking(descriptor, False)


def _check_memory(descriptor: int, request: vfu.DmaMap, where: str) -> None:
    """Whatever would let the library's mmap fail: it closes the descriptor twice then."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise Vetoed(errno.EINVAL, f"{where}: the descriptor is no memory file")
    if request.offset + request.size > status.st_size:
        raise Vetoed(errno.EINVAL, f"{where}: offset {request.offset:#x} + size lies behind {status.st_size:#x} bytes")
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    writes = bool(request.flags & vfu.VFIO_USER_F_DMA_REGION_WRITE)
    if mode == os.O_WRONLY or (writes and mode != os.O_RDWR):
        raise Vetoed(errno.EACCES, f"{where}: the descriptor does not allow this access")


def _check_unmap(message: Message) -> None:
    request = _structure(message, vfu.DmaUnmap)
    if request.flags & vfu.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP:
        raise Vetoed(errno.ENOTSUP, "DMA_UNMAP asks for a dirty bitmap: there is no migration")


def _structure(message: Message, kind: type[S]) -> S:
    """The structure that a message's body begins with; Vetoed if the body is too short for it."""
    body = message.body
    if len(body) < ctypes.sizeof(kind):
        raise Vetoed(errno.EINVAL, f"command {message.command}: {len(body)} bytes, {ctypes.sizeof(kind)} are due")
    return kind.from_buffer_copy(body)
