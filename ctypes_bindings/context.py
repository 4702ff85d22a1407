"""A libvfio-user context as a Pythonic object that is fed whole messages and never waits.

The library reads a client's version, and the body of every message, with blocking calls: a client that stops in the
middle would stop the process. So the library is never given a client's socket. It accepts one private connection,
whose other end this object holds; whoever serves the client reads from it as it likes, and hands over one whole
message at a time. What the library reads is there when it reads, and what it answers fits the socket's buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ctypes_bindings import declarations as vfu
from ctypes_bindings.library import Library, LibraryError

MESSAGE_MAX = 64 * 1024
"""Bytes of the longest message taken or answered. Both fit a socket's default buffer (208 KiB) with all overhead."""

RECORDED_ERRORS = 16
"""Exceptions kept for the owner to look at; a client that causes more changes nothing (all are logged)."""

_SYSLOG_INFO = 6

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Region:
    """A region to be served by callbacks: size in bytes, and whether it is memory (else I/O or config space)."""

    size: int
    memory: bool = True


@dataclass(frozen=True, slots=True)
class MappedRegion:
    """Guest memory that the client offers: guest physical address, bytes, address here (None: not mapped), PROT_*."""

    gpa: int
    size: int
    hva: int | None
    prot: int


class Handlers(Protocol):
    """What a context calls. An exception is recorded, given to `failed`, and told to the client as an errno."""

    def region_read(self, region: int, offset: int, count: int) -> bytes: ...

    def region_write(self, region: int, offset: int, data: bytes) -> None: ...

    def dma_mapped(self, region: MappedRegion) -> None: ...

    def dma_unmapped(self, region: MappedRegion) -> None: ...

    def reset(self, kind: int) -> None: ...

    def log(self, level: int, text: str) -> None: ...

    def failed(self, error: BaseException) -> None: ...


class Refused(Exception):
    """The library refused a client's version; `reply` is what to tell it."""

    def __init__(self, reply: bytes) -> None:
        super().__init__("the version that the client offered was refused")
        self.reply = reply


class Context:
    """One libvfio-user context, good for one client: create, attach, exchange messages, close."""

    def __init__(
        self, library: Library, *, regions: Mapping[int, Region], irqs: Mapping[int, int], handlers: Handlers
    ) -> None:
        """Set a PCI function up. `regions` by region index, `irqs` the number of vectors by kind (others have none).

        Raises LibraryError if the library refuses any of it, OSError if there is no room for a private socket.
        """
        self._library = library
        self._handlers = handlers
        self._handle: int | None = None
        self._interruption: BaseException | None = None
        self.errors: list[BaseException] = []
        # The library keeps bare pointers to these: they must live as long as the context.
        self._log_cb = vfu.LogFn(self._on_log)
        self._reset_cb = vfu.ResetCb(self._on_reset)
        self._register_cb = vfu.DmaRegisterCb(self._on_dma_register)
        self._unregister_cb = vfu.DmaUnregisterCb(self._on_dma_unregister)
        self._region_cbs = {index: self._region_callback(index) for index in regions}
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._create()
            self._set_up(regions, irqs)
        except BaseException:
            self.close()
            raise

    def attach(self, version: bytes) -> bytes:
        """Negotiate with a client's whole VERSION message; returns the reply. Refused carries the reply to send."""
        self._link.sendall(version)
        try:
            self._call("vfu_attach_ctx")
        except LibraryError:
            raise Refused(self._reply() or b"") from None
        reply = self._reply()
        if reply is None:
            raise LibraryError("vfu_attach_ctx", errno.EPROTO)
        return reply

    def exchange(self, message: bytes, descriptors: Sequence[int] = ()) -> bytes | None:
        """Give the library one whole, well-framed message; returns its reply, None if the message wanted none.

        The descriptors stay the caller's. LibraryError means that this client can be served no longer.
        """
        if len(message) > MESSAGE_MAX:
            raise ValueError(f"a message of {len(message)} bytes: at most {MESSAGE_MAX} can be handed over")
        if descriptors:
            socket.send_fds(self._link, [message], list(descriptors))
        else:
            self._link.sendall(message)
        self._call("vfu_run_ctx")
        return self._reply()

    def trigger(self, vector: int) -> bool:
        """Signal the eventfd of a vector; False if the client has not given one."""
        try:
            self._call("vfu_irq_trigger", vector)
        except LibraryError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL):
                return False
            if error.errno == errno.EAGAIN:
                return True  # the counter is full: the client has yet to look at what was signalled before
            raise
        return True

    def close(self) -> None:
        """Take the context down: every region still mapped is unmapped, then the reset callback runs."""
        if self._handle is not None:
            try:
                self._call("vfu_destroy_ctx")
            finally:
                self._handle = None
        self._link.close()

    def _create(self) -> None:
        # The library can only listen at a path. It does so in a folder that no one else can enter, for as long as it
        # takes to connect to it; named by descriptor, so that no TMPDIR is too deep for a socket's 107 bytes.
        with tempfile.TemporaryDirectory(prefix="vioasid-") as folder, _opened(folder) as descriptor:
            path = f"/proc/self/fd/{descriptor}/link"
            self._handle = self._library.call(
                "vfu_create_ctx",
                vfu.VFU_TRANS_SOCK,
                path.encode(),
                vfu.LIBVFIO_USER_FLAG_ATTACH_NB,
                None,
                vfu.VFU_DEV_TYPE_PCI,
            )
            self._link.connect(path)
        self._link.setblocking(False)

    def _set_up(self, regions: Mapping[int, Region], irqs: Mapping[int, int]) -> None:
        self._call("vfu_setup_log", self._log_cb, _SYSLOG_INFO)
        self._call("vfu_pci_init", vfu.VFU_PCI_TYPE_EXPRESS, vfu.PCI_HEADER_TYPE_NORMAL, 0)
        for index, region in regions.items():
            flags = vfu.VFU_REGION_FLAG_RW | (vfu.VFU_REGION_FLAG_MEM if region.memory else 0)
            if index == vfu.VFU_PCI_DEV_CFG_REGION_IDX:
                flags |= vfu.VFU_REGION_FLAG_ALWAYS_CB
            self._call("vfu_setup_region", index, region.size, self._region_cbs[index], flags, None, 0, -1, 0)
        self._call("vfu_setup_device_reset_cb", self._reset_cb)
        self._call("vfu_setup_device_dma", self._register_cb, self._unregister_cb)
        # Left alone, the library announces one ERR and one REQ interrupt, and an eventfd given for either lands in
        # slot 0 of the vectors: the first interrupt would stop the machine with "unrecoverable error".
        for kind in range(vfu.VFU_DEV_NUM_IRQS):
            self._call("vfu_setup_device_nr_irqs", kind, irqs.get(kind, 0))
        self._call("vfu_realize_ctx")

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call with the context, then let go what a callback could not: an interrupt of the whole program."""
        try:
            return self._library.call(function, self._handle, *arguments)
        finally:
            interruption, self._interruption = self._interruption, None
            if interruption is not None:
                raise interruption

    def _reply(self) -> bytes | None:
        """What the library answered, if it did; it is all there when its call has returned."""
        with contextlib.suppress(BlockingIOError):
            return self._link.recv(2 * MESSAGE_MAX) or None
        return None

    def _guarded(self, failure: T, handler: Callable[[], T]) -> T:
        """Run a handler so that its exception is neither lost nor thrown into C."""
        try:
            return handler()
        except BaseException as error:
            if len(self.errors) < RECORDED_ERRORS:
                self.errors.append(error)
            if not isinstance(error, Exception):
                self._interruption = error
            with contextlib.suppress(Exception):
                self._handlers.failed(error)
            self._library.set_errno(errno_of(error))
            return failure

    def _region_callback(self, index: int) -> Any:
        def access(_: int, buffer: int, count: int, offset: int, is_write: bool) -> int:
            def run() -> int:
                if is_write:
                    self._handlers.region_write(index, offset, ctypes.string_at(buffer, count))
                else:
                    data = self._handlers.region_read(index, offset, count)
                    if len(data) != count:
                        raise ValueError(f"region {index}: {len(data)} bytes for a read of {count}")
                    ctypes.memmove(buffer, data, count)
                return count

            return self._guarded(-1, run)

        return vfu.RegionAccessCb(access)

    def _on_reset(self, _: int, kind: int) -> int:
        def run() -> int:
            self._handlers.reset(kind)
            return 0

        return self._guarded(-1, run)

    def _on_dma_register(self, _: int, info: Any) -> None:
        self._guarded(None, lambda: self._handlers.dma_mapped(_mapped_region(info.contents)))

    def _on_dma_unregister(self, _: int, info: Any) -> None:
        self._guarded(None, lambda: self._handlers.dma_unmapped(_mapped_region(info.contents)))

    def _on_log(self, _: int, level: int, text: bytes) -> None:
        self._guarded(None, lambda: self._handlers.log(level, text.decode(errors="replace")))


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[int]:
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def errno_of(error: BaseException) -> int:
    """The errno that tells a client about an exception: its own if it has one, else EIO."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO


def _mapped_region(info: Any) -> MappedRegion:
    return MappedRegion(info.iova.iov_base or 0, info.iova.iov_len, info.vaddr, info.prot)
