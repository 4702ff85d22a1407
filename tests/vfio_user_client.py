"""A vfio-user client written from the protocol's specification (docs/interop/vfio-user in QEMU), for tests.

It shares no declaration with the code under test: numbers are written here as the specification gives them.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

HEADER = struct.Struct("<HHIII")

VERSION = 1
DMA_MAP = 2
DMA_UNMAP = 3
DEVICE_GET_INFO = 4
DEVICE_GET_REGION_INFO = 5
DEVICE_GET_IRQ_INFO = 7
DEVICE_SET_IRQS = 8
REGION_READ = 9
REGION_WRITE = 10
DEVICE_RESET = 13

COMMAND, REPLY = 0, 1
NO_REPLY = 1 << 4
ERROR = 1 << 5

CONFIG_REGION = 7
INTX, MSI, MSIX, ERR, REQ = range(5)
DATA_NONE, DATA_BOOL, DATA_EVENTFD, ACTION_MASK, ACTION_UNMASK, ACTION_TRIGGER = (1 << bit for bit in range(6))


class VfioUserError(OSError):
    """The server answered with an error; errno is what it said."""


class VfioUserClient:
    """One connection. Methods block, up to `timeout` seconds."""

    def __init__(self, path: Path, *, timeout: float = 5.0, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))  # waits for room in the listener's queue; with a timeout it would fail at once
        self.socket.settimeout(timeout)
        self.eventfds: list[int] = []
        self._id = 0
        self.server_version: tuple[int, int] | None = None
        self.server_capabilities: dict[str, object] = {}
        if greet:
            self.negotiate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        for eventfd in self.eventfds:
            os.close(eventfd)
        self.eventfds.clear()

    # Messages

    def send(
        self, command: int, body: bytes = b"", *, flags: int = COMMAND, descriptors: list[int] | None = None
    ) -> int:
        """Send one message in one piece; returns its id."""
        self._id = self._id + 1 & 0xFFFF
        message = HEADER.pack(self._id, command, HEADER.size + len(body), flags, 0) + body
        if descriptors:
            socket.send_fds(self.socket, [message], descriptors)
        else:
            self.socket.sendall(message)
        return self._id

    def receive(self, identity: int, command: int) -> bytes:
        """The body of the reply to a message; VfioUserError if it is an error."""
        got, answered, size, flags, error = HEADER.unpack(self._exactly(HEADER.size))
        body = self._exactly(size - HEADER.size)
        assert (got, answered, flags & 0xF) == (identity, command, REPLY), (got, answered, flags)
        if flags & ERROR:
            raise VfioUserError(error, os.strerror(error))
        return body

    def call(self, command: int, body: bytes = b"", *, descriptors: list[int] | None = None) -> bytes:
        return self.receive(self.send(command, body, descriptors=descriptors), command)

    def at_end(self) -> bool:
        """Whether the server closes the connection (waits for it, up to the timeout)."""
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except ConnectionResetError:
            pass
        return True

    def _exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            piece = self.socket.recv(size - len(got))
            if not piece:
                raise ConnectionResetError("the server closed the connection")
            got += piece
        return got

    # Commands

    def negotiate(self, major: int = 0, minor: int = 0, capabilities: dict[str, object] | None = None) -> None:
        text = json.dumps({"capabilities": capabilities or {"max_msg_fds": 8}}).encode() + b"\0"
        body = self.call(VERSION, struct.pack("<HH", major, minor) + text)
        self.server_version = struct.unpack_from("<HH", body)
        self.server_capabilities = json.loads(body[4:].rstrip(b"\0"))["capabilities"]

    def device_info(self) -> tuple[int, int, int]:
        """(flags, number of regions, number of interrupt kinds)"""
        _, flags, regions, irqs = struct.unpack("<IIII", self.call(DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)))
        return flags, regions, irqs

    def region_info(self, index: int) -> tuple[int, int]:
        """(flags, size)"""
        body = self.call(DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        _, flags, got, _, size, _ = struct.unpack("<IIIIQQ", body)
        assert got == index
        return flags, size

    def irq_count(self, index: int) -> int:
        body = self.call(DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0))
        return int(struct.unpack("<IIII", body)[3])

    def read_bytes(self, region: int, offset: int, count: int) -> bytes:
        body = self.call(REGION_READ, struct.pack("<QII", offset, region, count))
        assert struct.unpack_from("<QII", body) == (offset, region, count)
        return body[16:]

    def read(self, region: int, offset: int, size: int) -> int:
        return int.from_bytes(self.read_bytes(region, offset, size), "little")

    def write(self, region: int, offset: int, size: int, value: int, *, posted: bool = False) -> None:
        body = struct.pack("<QII", offset, region, size) + value.to_bytes(size, "little")
        identity = self.send(REGION_WRITE, body, flags=NO_REPLY if posted else COMMAND)
        if not posted:
            answer = self.receive(identity, REGION_WRITE)
            assert struct.unpack("<QII", answer) == (offset, region, size)

    def config(self, offset: int, size: int) -> int:
        return self.read(CONFIG_REGION, offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.write(CONFIG_REGION, offset, size, value)

    def set_irqs(self, index: int, count: int, *, start: int = 0) -> list[int]:
        """Give the server `count` new eventfds for the vectors from `start`; returns them (closed with the client)."""
        eventfds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
        self.eventfds += eventfds
        flags = DATA_EVENTFD | ACTION_TRIGGER
        self.call(DEVICE_SET_IRQS, struct.pack("<IIIII", 20, flags, index, start, count), descriptors=eventfds)
        return eventfds

    def clear_irqs(self, index: int) -> None:
        self.call(DEVICE_SET_IRQS, struct.pack("<IIIII", 20, DATA_NONE | ACTION_TRIGGER, index, 0, 0))

    def dma_map(
        self, gpa: int, size: int, descriptor: int | None = None, *, offset: int = 0, write: bool = True
    ) -> None:
        body = struct.pack("<IIQQQ", 32, 3 if write else 1, offset, gpa, size)
        self.call(DMA_MAP, body, descriptors=None if descriptor is None else [descriptor])

    def dma_unmap(self, gpa: int, size: int, *, flags: int = 0) -> None:
        self.call(DMA_UNMAP, struct.pack("<IIQQ", 24, flags, gpa, size))

    def reset(self) -> None:
        self.call(DEVICE_RESET)


class GuestMemory:
    """A memfd as a VMM makes it for its guest's RAM, mapped here too."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor = os.memfd_create("guest")
        os.ftruncate(self.descriptor, size)
        self.bytes = mmap.mmap(self.descriptor, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bytes.close()
        os.close(self.descriptor)


def signals(eventfd: int, *, seconds: float = 0.0) -> int:
    """How often an eventfd was signalled since last asked; waits up to `seconds` for the first."""
    poll = select.poll()
    poll.register(eventfd, select.POLLIN)
    if not poll.poll(seconds * 1000):
        return 0
    return os.eventfd_read(eventfd)
