"""Clients that mean ill: each may harm its own connection, and no other client may notice."""

import contextlib
import errno
import fcntl
import logging
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pci_serving import IDENTITY, LIVENESS, SCRATCH, EduFunction, Serving
from vfio_user_client import (
    ACTION_MASK,
    ACTION_TRIGGER,
    ACTION_UNMASK,
    COMMAND,
    DATA_BOOL,
    DATA_EVENTFD,
    DATA_NONE,
    DEVICE_RESET,
    DEVICE_SET_IRQS,
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    MSI,
    MSIX,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    VERSION,
    GuestMemory,
    VfioUserClient,
    VfioUserError,
    signals,
)
from vfu import libvfio_user
from victim import Victim

from backend.pci import FunctionServer
from backend.pci import server as server_module
from backend.vm.libvfio_user import LibvfioUser

__all__ = ["libvfio_user"]

PATIENCE = 0.5
"""Seconds in which every read of another client must be answered. A stalled loop takes all the time there is."""


def victim_of(path: Path) -> Victim:
    """A client of another function."""
    client = VfioUserClient(path)

    def ask(number: int) -> None:
        assert client.read(0, IDENTITY, 4) == 0x010000ED

    return Victim(ask, client.close, patience=PATIENCE)


@pytest.fixture
def serving(libvfio_user: LibvfioUser, caplog: pytest.LogCaptureFixture) -> Iterator[Serving]:
    caplog.set_level(logging.CRITICAL, logger="backend.pci.server")
    with Serving(libvfio_user.library) as made:
        yield made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "target.sock"


@pytest.fixture
def function() -> EduFunction:
    return EduFunction("target")


@pytest.fixture
def server(serving: Serving, function: EduFunction, path: Path) -> FunctionServer:
    return serving.serve(function, path)


@pytest.fixture
def victim(serving: Serving, server: FunctionServer, tmp_path: Path) -> Iterator[Victim]:
    serving.serve(EduFunction("other"), tmp_path / "other.sock")
    with victim_of(tmp_path / "other.sock") as made:
        yield made


@pytest.fixture
def client(victim: Victim, path: Path) -> Iterator[VfioUserClient]:
    with VfioUserClient(path) as made:
        yield made


def refusal(call: Callable[[], object]) -> int | None:
    with pytest.raises(VfioUserError) as caught:
        call()
    return caught.value.errno


def descriptors(serving: Serving) -> int:
    """Descriptors of this process, counted when the loop has done all that came before."""
    return serving.call(lambda: len(os.listdir("/proc/self/fd")))


def assert_served(client: VfioUserClient) -> None:
    assert client.read(0, IDENTITY, 4) == 0x010000ED


HELLO = struct.pack("<HH", 0, 0) + b"{}\0"

UNFINISHED = {
    "nothing": b"",
    "half a header": HEADER.pack(1, VERSION, 40, 0, 0)[:9],
    "a header without its body": HEADER.pack(1, VERSION, 40, 0, 0),
    "a body that ends too early": HEADER.pack(1, VERSION, 40, 0, 0) + b"\0\0\0\0{",
}

BROKEN = {
    "a size of nothing": HEADER.pack(1, REGION_READ, 0, 0, 0),
    "a size below the header's": HEADER.pack(1, REGION_READ, 15, 0, 0),
    "a size beyond all bounds": HEADER.pack(1, REGION_READ, 0xFFFF_FFFF, 0, 0),
    "a size just beyond ours": HEADER.pack(1, REGION_READ, 65537, 0, 0),
    "a reply": HEADER.pack(1, REGION_READ, 16, REPLY, 0),
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


# -- Before the version ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_an_unfinished_greeting_stalls_nobody(victim: Victim, path: Path, sent: bytes) -> None:
    with VfioUserClient(path, greet=False) as silent:
        silent.socket.sendall(sent)
        time.sleep(0.05)
        with VfioUserClient(path) as client:  # not even the same function's next client
            assert_served(client)


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_an_unfinished_greeting_ends(
    serving: Serving, path: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "GREETING_SECONDS", 0.05)
    serving.serve(EduFunction("target"), path)
    with VfioUserClient(path, greet=False) as silent:
        silent.socket.sendall(sent)
        assert silent.at_end()


def test_many_silent_connections_keep_nobody_out(victim: Victim, path: Path) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(VfioUserClient(path, greet=False)) for _ in range(30)]
        with VfioUserClient(path) as client:
            assert_served(client)
        assert silent[0].at_end()


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_greeting_ends_at_once(victim: Victim, path: Path, sent: bytes) -> None:
    with VfioUserClient(path, greet=False) as broken:
        broken.socket.sendall(sent)
        assert broken.at_end()
    with VfioUserClient(path) as client:
        assert_served(client)


@pytest.mark.parametrize(
    ("command", "body"),
    [
        (VERSION, struct.pack("<HH", 1, 0) + b"{}\0"),
        (VERSION, struct.pack("<HH", 0, 0) + b"{\0"),
        (VERSION, struct.pack("<HH", 0, 0) + random.Random(3000).randbytes(3000)),
        (VERSION, struct.pack("<HH", 0, 0) + b'{"capabilities": ' * 1000 + b"\0"),
        (VERSION, b""),
        (REGION_READ, struct.pack("<QII", 0, 0, 4)),
        (DEVICE_RESET, b""),
    ],
)
def test_a_wrong_greeting_is_refused(
    victim: Victim, function: EduFunction, path: Path, command: int, body: bytes
) -> None:
    with VfioUserClient(path, greet=False) as wrong:
        assert refusal(lambda: wrong.call(command, body)) == errno.EINVAL
        assert wrong.at_end()
    assert function.resets == []  # it never was a client
    with VfioUserClient(path) as client:
        assert_served(client)


def test_a_greeting_in_single_bytes_is_a_greeting(victim: Victim, path: Path) -> None:
    with VfioUserClient(path, greet=False) as slow:
        for byte in HEADER.pack(9, VERSION, HEADER.size + len(HELLO), 0, 0) + HELLO:
            slow.socket.sendall(bytes((byte,)))
        slow.receive(9, VERSION)
        for byte in HEADER.pack(10, REGION_READ, HEADER.size + 16, 0, 0) + struct.pack("<QII", IDENTITY, 0, 4):
            slow.socket.sendall(bytes((byte,)))
        assert slow.receive(10, REGION_READ)[16:] == struct.pack("<I", 0x010000ED)


# -- Framing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_an_unfinished_message_stalls_nobody(victim: Victim, client: VfioUserClient, sent: bytes) -> None:
    client.socket.sendall(sent)
    time.sleep(0.05)


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_message_ends_the_connection(
    client: VfioUserClient, server: FunctionServer, serving: Serving, path: Path, sent: bytes
) -> None:
    client.socket.sendall(sent)
    assert client.at_end()
    serving.wait_for(lambda: not server.connected, "the client's end")
    with VfioUserClient(path) as other:
        assert_served(other)


@pytest.mark.parametrize("command", [0, VERSION, 6, 11, 12, 14, 15, 0xFFFF])
@pytest.mark.parametrize("body", [b"", b"\0", bytes(64), b"\xff" * 64])
def test_a_command_that_is_none_is_answered(client: VfioUserClient, command: int, body: bytes) -> None:
    assert refusal(lambda: client.call(command, body)) in (errno.EINVAL, errno.ENOTSUP)
    assert_served(client)


@pytest.mark.parametrize("command", range(2, 11))
def test_a_body_too_short_is_answered(client: VfioUserClient, command: int) -> None:
    for length in range(16):
        assert refusal(lambda length=length: client.call(command, bytes(length))) == errno.EINVAL  # type: ignore[misc]
    assert_served(client)


def test_an_access_that_would_not_fit_a_reply_is_refused(client: VfioUserClient) -> None:
    for count in (65536 - 31, 1 << 20, 0xFFFF_FFFF):
        body = struct.pack("<QII", 0, 0, count)
        assert refusal(lambda body=body: client.call(REGION_READ, body)) == errno.E2BIG  # type: ignore[misc]


# -- Reading and writing -----------------------------------------------------------------------------------------------


def test_a_client_that_never_reads_is_not_read_from(victim: Victim, client: VfioUserClient) -> None:
    request = struct.pack("<HHIIIQII", 1, REGION_READ, 32, COMMAND, 0, LIVENESS, 0, 4)
    client.socket.settimeout(0.3)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 1 << 30:
            sent += client.socket.send(request * 64)
    assert sent < 1 << 30
    client.socket.settimeout(5)
    asked = sent // len(request)
    assert asked > 100
    for _ in range(asked):  # once it reads, each of its requests is answered, in order
        assert len(client.receive(1, REGION_READ)) == 20
    client.socket.sendall((request * 2)[sent % 32 or 32 :])
    assert len(client.receive(1, REGION_READ)) == 20


def test_a_client_that_leaves_with_replies_unread_is_gone(
    client: VfioUserClient, server: FunctionServer, serving: Serving
) -> None:
    request = struct.pack("<HHIIIQII", 1, REGION_READ, 32, COMMAND, 0, LIVENESS, 0, 4)
    client.socket.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        while True:
            client.socket.send(request * 64)  # until the server has stopped reading
    client.close()
    serving.wait_for(lambda: not server.connected, "the client's end")


def test_a_flood_leaves_others_their_turn(victim: Victim, client: VfioUserClient, function: EduFunction) -> None:
    body = struct.pack("<QII", SCRATCH, 0, 4) + bytes(4)
    burst = struct.pack("<HHIII", 1, REGION_WRITE, 16 + len(body), NO_REPLY, 0) + body
    before, until = victim.answers, time.monotonic() + 0.5
    while time.monotonic() < until:
        client.socket.sendall(burst * 500)
    assert victim.answers - before > 10
    assert_served(client)
    assert max(function.writes_a_drain) <= 64


# -- Interrupts --------------------------------------------------------------------------------------------------------


def set_irqs(flags: int, index: int, start: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIIII", 20 + len(data), flags, index, start, count) + data


@pytest.mark.parametrize(
    ("body", "number"),
    [
        # start + count wraps to 0 in 32 bits: the library would close whatever lies behind its array
        (set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 1, 0xFFFF_FFFF), errno.EINVAL),
        (set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 2, 0xFFFF_FFFF), errno.EINVAL),
        (set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 3, 2), errno.EINVAL),
        (set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 4, 0), errno.EINVAL),
        (set_irqs(DATA_EVENTFD | ACTION_TRIGGER, 5, 0, 1), errno.EINVAL),
        (set_irqs(DATA_NONE | ACTION_TRIGGER, MSIX, 0, 4), errno.ENOTSUP),
        (set_irqs(DATA_BOOL | ACTION_TRIGGER, MSIX, 0, 4, b"\1\1\1\1"), errno.ENOTSUP),
        (set_irqs(DATA_NONE | ACTION_TRIGGER | ACTION_MASK, MSIX, 0, 1), errno.EINVAL),
        (set_irqs(DATA_NONE | DATA_EVENTFD | ACTION_TRIGGER, MSIX, 0, 0), errno.EINVAL),
        (set_irqs(0, MSIX, 0, 0), errno.EINVAL),
        (set_irqs(0xFFFF_FFFF, MSIX, 0, 1), errno.EINVAL),
    ],
)
def test_interrupts_out_of_range_are_refused(client: VfioUserClient, body: bytes, number: int) -> None:
    assert refusal(lambda: client.call(DEVICE_SET_IRQS, body)) == number
    assert_served(client)


def test_masking_an_interrupt_is_harmless(client: VfioUserClient) -> None:
    for action in (ACTION_MASK, ACTION_UNMASK):
        client.call(DEVICE_SET_IRQS, set_irqs(DATA_NONE | action, MSIX, 0, 4))
    assert_served(client)


def test_only_eventfds_are_taken_for_interrupts(
    client: VfioUserClient, serving: Serving, server: FunctionServer
) -> None:
    """A write to a full pipe would wait for its reader: for ever."""
    read, write = os.pipe()
    body = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 0, 1)
    before = descriptors(serving)
    assert refusal(lambda: client.call(DEVICE_SET_IRQS, body, descriptors=[write])) == errno.EINVAL
    assert refusal(lambda: client.call(DEVICE_SET_IRQS, body, descriptors=[write, write])) == errno.EINVAL
    assert descriptors(serving) == before
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("clears_the_flag", [False, True])
def test_a_full_eventfd_stalls_nobody(
    client: VfioUserClient, function: EduFunction, serving: Serving, clears_the_flag: bool
) -> None:
    eventfd = os.eventfd(0, 0)  # blocking, as a client may make it
    body = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSI, 0, 1)
    client.call(DEVICE_SET_IRQS, body, descriptors=[eventfd])
    client.set_config(0x04, 2, 0x4)
    offset = function.config.find(0x05)
    assert offset is not None
    client.set_config(offset + 2, 2, 1)
    serving.call(function.interrupt)
    assert signals(eventfd) == 1
    os.eventfd_write(eventfd, 2**64 - 2)
    if clears_the_flag:
        fcntl.fcntl(eventfd, fcntl.F_SETFL, fcntl.fcntl(eventfd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    serving.call(function.interrupt)
    assert_served(client)
    os.close(eventfd)


# -- Memory ------------------------------------------------------------------------------------------------------------


def dma_map(address: int, size: int, *, offset: int = 0, flags: int = 3, argsz: int = 32) -> bytes:
    return struct.pack("<IIQQQ", argsz, flags, offset, address, size)


@pytest.mark.parametrize(
    ("body", "number"),
    [
        (dma_map(0, 0), errno.EINVAL),
        (dma_map(2**64 - 0x1000, 0x2000), errno.EINVAL),
        (dma_map(0x1000, 2**64 - 0x1000), errno.ENOSPC),
        (dma_map(0x800, 0x1000), errno.EINVAL),
        (dma_map(0, 0x1800), errno.EINVAL),
        (dma_map(0, 0x4000, offset=0x1000), errno.EINVAL),
        (dma_map(0, 0x1000, offset=2**64 - 0x1000), errno.EINVAL),
        (dma_map(0, 0x5000), errno.EINVAL),
        (dma_map(0, 0x1000, flags=7), errno.EINVAL),
        (dma_map(0, 0x1000, argsz=31), errno.EINVAL),
    ],
)
def test_a_map_that_cannot_be_is_refused(client: VfioUserClient, serving: Serving, body: bytes, number: int) -> None:
    with GuestMemory(0x4000) as memory:
        before = descriptors(serving)
        assert refusal(lambda: client.call(DMA_MAP, body, descriptors=[memory.descriptor])) == number
        assert descriptors(serving) == before
    assert serving.regions["target"] == []


def test_only_memory_is_mapped(client: VfioUserClient, serving: Serving, tmp_path: Path) -> None:
    read, write = os.pipe()
    folder = os.open(tmp_path, os.O_RDONLY)
    null = os.open("/dev/zero", os.O_RDWR)
    eventfd = os.eventfd(0)
    for descriptor in (read, write, folder, null, eventfd, client.socket.fileno()):
        assert refusal(lambda fd=descriptor: client.dma_map(0, 0x1000, fd)) == errno.EINVAL  # type: ignore[misc]
    for descriptor in (read, write, folder, null, eventfd):
        os.close(descriptor)
    assert serving.regions["target"] == []


def test_memory_is_mapped_as_its_descriptor_allows(client: VfioUserClient, tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_bytes(bytes(0x4000))
    for mode, write, allowed in (
        (os.O_RDONLY, True, False),
        (os.O_WRONLY, True, False),
        (os.O_WRONLY, False, False),
        (os.O_RDONLY, False, True),
    ):
        descriptor = os.open(file, mode)
        if allowed:
            client.dma_map(0, 0x4000, descriptor, write=write)
        else:
            assert refusal(lambda fd=descriptor, w=write: client.dma_map(0, 0x4000, fd, write=w)) == errno.EACCES  # type: ignore[misc]
        os.close(descriptor)


def test_maps_are_bounded_and_none_costs_a_descriptor(client: VfioUserClient, serving: Serving) -> None:
    with GuestMemory(0x4000) as memory:
        client.dma_map(0, 0x1000, memory.descriptor)
        before = descriptors(serving)
        for _ in range(50):  # the library would take each, and lose its descriptor
            assert refusal(lambda: client.dma_map(0, 0x1000, memory.descriptor)) == errno.EEXIST
        assert refusal(lambda: client.dma_map(0, 0x2000, memory.descriptor)) == errno.EINVAL  # overlaps
        for index in range(1, 16):
            client.dma_map(index << 12, 0x1000, memory.descriptor)
        assert refusal(lambda: client.dma_map(16 << 12, 0x1000, memory.descriptor)) == errno.ENOSPC
        assert descriptors(serving) == before + 15
        assert len(serving.regions["target"]) == 16


def test_mapped_bytes_are_bounded(client: VfioUserClient, tmp_path: Path) -> None:
    descriptor = os.memfd_create("huge")
    os.ftruncate(descriptor, 6 << 40)
    client.dma_map(0, 6 << 40, descriptor)
    assert refusal(lambda: client.dma_map(6 << 40, 6 << 40, descriptor)) == errno.ENOSPC
    client.dma_unmap(0, 6 << 40)
    client.dma_map(6 << 40, 6 << 40, descriptor)
    os.close(descriptor)


def test_unmaps_that_cannot_be_are_refused(client: VfioUserClient) -> None:
    client.dma_map(0, 0x4000)
    assert refusal(lambda: client.dma_unmap(0, 0x2000)) == errno.ENOENT
    assert refusal(lambda: client.dma_unmap(0x4000, 0x1000)) == errno.ENOENT
    assert refusal(lambda: client.dma_unmap(0, 0x4000, flags=1)) == errno.ENOTSUP
    assert refusal(lambda: client.dma_unmap(0, 0x4000, flags=2)) == errno.EINVAL
    assert refusal(lambda: client.dma_unmap(0, 0x4000, flags=4)) == errno.EINVAL
    bitmap = struct.pack("<IIQQQQ", 1 << 20, 1, 0, 0x4000, 4096, 1 << 19)
    assert refusal(lambda: client.call(DMA_UNMAP, bitmap)) == errno.ENOTSUP
    client.dma_unmap(0, 0x4000)


# -- Descriptors -------------------------------------------------------------------------------------------------------


def test_descriptors_where_none_belong_are_closed(client: VfioUserClient, serving: Serving) -> None:
    before = descriptors(serving)
    read = struct.pack("<QII", IDENTITY, 0, 4)
    for _ in range(20):
        assert refusal(lambda: client.call(REGION_READ, read, descriptors=[0] * 16)) == errno.EINVAL
    client.send(DMA_MAP, dma_map(0, 0x1000), descriptors=[0, 0], flags=NO_REPLY)
    assert_served(client)
    assert descriptors(serving) == before


def test_too_many_descriptors_end_the_connection(
    client: VfioUserClient, server: FunctionServer, serving: Serving
) -> None:
    before = descriptors(serving)
    client.send(REGION_READ, struct.pack("<QII", IDENTITY, 0, 4), descriptors=[0] * 17)
    assert client.at_end()
    serving.wait_for(lambda: not server.connected, "the client's end")
    assert descriptors(serving) < before


def test_descriptors_of_a_message_that_never_ends_are_closed(
    client: VfioUserClient, server: FunctionServer, serving: Serving
) -> None:
    before = descriptors(serving)
    header = HEADER.pack(1, DMA_MAP, 48, 0, 0)
    for piece in (header, b"\0", b"\0", b"\0"):
        socket.send_fds(client.socket, [piece], [0] * 16)
    serving.call(lambda: None)
    client.close()
    serving.wait_for(lambda: not server.connected, "the client's end")
    assert descriptors(serving) < before


# -- All of it at random -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_random_messages_break_nothing(victim: Victim, path: Path, serving: Serving, seed: int) -> None:
    """Commands of the right form with fields at random; the backend must live, whatever is answered."""
    chance = random.Random(seed)
    interesting = (0, 1, 2, 3, 4, 8, 16, 20, 24, 32, 4095, 4096, 0x8000, 0xFFFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1)

    def number(bits: int) -> int:
        value = chance.choice(interesting) if chance.random() < 0.8 else chance.getrandbits(bits)
        return value & (1 << bits) - 1

    shapes = {2: "IIQQQ", 3: "IIQQQQ", 4: "IIII", 5: "IIIIQQ", 6: "IIII", 7: "IIII", 8: "IIIII", 9: "QII", 10: "QIIQ"}
    with GuestMemory(0x10000) as memory:
        given_out = [memory.descriptor, os.eventfd(0, os.EFD_NONBLOCK), os.dup(0)]
        for _ in range(4):
            with VfioUserClient(path, timeout=5) as client:
                for _ in range(150):
                    command = chance.choice((2, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9, 10, 10, 13, 14))
                    fields = shapes.get(command, "")
                    body = struct.pack("<" + fields, *(number(32 if code == "I" else 64) for code in fields))
                    if command == 8 and chance.random() < 0.7:
                        flags = chance.choice((0x21, 0x24, 0x09, 0x11, 0x22))
                        body = struct.pack("<IIIII", 20, flags, chance.randrange(5), *(number(32) for _ in "ab"))
                    body = body[: chance.randrange(len(body) + 1)] if chance.random() < 0.1 else body
                    given = chance.sample(given_out, chance.randrange(3)) if command in (2, 8) else []
                    with contextlib.suppress(VfioUserError):
                        client.call(command, body, descriptors=given)
                assert_served(client)
        for descriptor in given_out[1:]:
            os.close(descriptor)
    serving.wait_for(lambda: serving.regions["target"] == [], "the last client's end")


def test_the_log_of_a_clients_doings_is_bounded(client: VfioUserClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="backend.pci.server")
    for _ in range(200):
        refusal(lambda: client.dma_unmap(0, 0x1000, flags=1))
    lines = [record.message for record in caplog.records if record.message.startswith("target")]
    assert 0 < len(lines) <= server_module.NOTES_LOGGED + 1
    assert "no more is logged" in lines[-1]
