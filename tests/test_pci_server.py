"""A function served to real vfio-user clients, by the client written from the specification."""

import asyncio
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pci_serving import IDENTITY, LIVENESS, SCRATCH, STATUS, WIDE, EduFunction, Serving
from vfio_user_client import (
    ACTION_TRIGGER,
    CONFIG_REGION,
    DATA_EVENTFD,
    DEVICE_SET_IRQS,
    ERR,
    INTX,
    MSI,
    MSIX,
    NO_REPLY,
    REGION_READ,
    REQ,
    VERSION,
    GuestMemory,
    VfioUserClient,
    VfioUserError,
    signals,
)
from vfu import libvfio_user

from backend.core import Access
from backend.pci import FunctionServer, PciFunction, ResetKind, SocketRefused
from backend.vm.libvfio_user import LibvfioUser

__all__ = ["libvfio_user"]

RW, RO = Access.READ | Access.WRITE, Access.READ
COMMAND, BUS_MASTER = 0x04, 1 << 2


@pytest.fixture
def serving(libvfio_user: LibvfioUser) -> Iterator[Serving]:
    with Serving(libvfio_user.library) as made:
        yield made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edu.sock"


@pytest.fixture
def function() -> EduFunction:
    return EduFunction()


@pytest.fixture
def server(serving: Serving, function: EduFunction, path: Path) -> FunctionServer:
    return serving.serve(function, path)


@pytest.fixture
def client(server: FunctionServer, path: Path) -> Iterator[VfioUserClient]:
    with VfioUserClient(path) as made:
        yield made


def msix_offset(function: PciFunction) -> int:
    offset = function.config.find(0x11)
    assert offset is not None
    return offset


# -- What a client is told ---------------------------------------------------------------------------------------------


def test_the_version_is_the_clients_own(client: VfioUserClient) -> None:
    assert client.server_version == (0, 0)
    assert client.server_capabilities["max_data_xfer_size"] == 1 << 20


def test_the_device_is_described(client: VfioUserClient) -> None:
    flags, regions, irqs = client.device_info()
    assert (flags & 3, regions, irqs) == (3, 10, 5)  # resettable, PCI
    sizes = [client.region_info(index)[1] for index in range(9)]
    assert sizes == [0x4000, 0, 0x20, 0, 0, 0, 0, 4096, 0]
    assert client.region_info(0)[0] & 3 == 3


def test_err_and_req_interrupts_do_not_exist(client: VfioUserClient) -> None:
    """The library would put their eventfds where vector 0 belongs, and the first interrupt would stop the VM."""
    assert [client.irq_count(index) for index in (INTX, MSI, MSIX, ERR, REQ)] == [0, 4, 4, 0, 0]
    for index in (ERR, REQ, INTX):
        with pytest.raises(VfioUserError) as caught:
            client.set_irqs(index, 1)
        assert caught.value.errno == errno.EINVAL


# -- Registers ---------------------------------------------------------------------------------------------------------


def test_registers_are_read_and_written(client: VfioUserClient, function: EduFunction) -> None:
    assert client.read(0, IDENTITY, 4) == 0x010000ED
    client.write(0, LIVENESS, 4, 0x1234_5678)
    assert client.read(0, LIVENESS, 4) == 0xEDCB_A987
    client.write(0, WIDE, 8, 0x1122_3344_5566_7788)
    assert client.read(0, WIDE, 8) == 0x1122_3344_5566_7000
    assert client.read(0, WIDE + 4, 4) == 0x1122_3344
    client.write(0, WIDE + 6, 2, 0xABCD)
    assert client.read(0, WIDE, 8) == 0xABCD_3344_5566_7000
    function.table["STATUS"] = 0x8F
    client.write(0, STATUS, 1, 0x85)
    assert client.read(0, STATUS, 4) == 0x8A


def test_posted_writes_come_before_what_follows(client: VfioUserClient) -> None:
    for value in range(100):
        client.write(0, SCRATCH + 4 * (value % 8), 4, value, posted=True)
    assert [client.read(0, SCRATCH + 4 * n, 4) for n in range(8)] == [96, 97, 98, 99, 92, 93, 94, 95]


def test_config_space_is_read_in_one_piece_as_qemu_does(client: VfioUserClient, function: EduFunction) -> None:
    whole = client.read_bytes(CONFIG_REGION, 0, 4096)
    assert struct.unpack_from("<HH", whole) == (0x1234, 0x11E8)
    assert whole == function.config.read_bytes(0, 4096)
    client.set_config(COMMAND, 2, 0xFFFF)
    assert client.config(COMMAND, 2) == 0x0547


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (0, 0x4000, 4),
        (0, 0x3FFE, 4),
        (0, 2**64 - 4, 4),
        (1, 0, 4),
        (CONFIG_REGION, 4096, 1),
        (10, 0, 4),
        (2**32 - 1, 0, 1),
    ],
)
def test_an_access_outside_is_refused(client: VfioUserClient, region: int, offset: int, count: int) -> None:
    for call in (lambda: client.read_bytes(region, offset, count), lambda: client.write(region, offset, count, 0)):
        with pytest.raises(VfioUserError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert client.read(0, IDENTITY, 4) == 0x010000ED


@pytest.mark.parametrize("count", [3, 5, 16, 4096])
def test_an_access_no_processor_makes_is_refused_and_blamed_on_the_client(
    client: VfioUserClient, server: FunctionServer, count: int
) -> None:
    with pytest.raises(VfioUserError) as caught:
        client.read_bytes(0, 0, count)
    assert caught.value.errno == errno.EINVAL
    assert server.errors == []


def test_an_empty_access_is_answered(client: VfioUserClient) -> None:
    identity = client.send(REGION_READ, struct.pack("<QII", 0, 0, 0))
    assert client.receive(identity, REGION_READ) == b""


def test_a_batch_ends_with_one_drained(client: VfioUserClient, function: EduFunction, serving: Serving) -> None:
    client.read(0, IDENTITY, 4)
    serving.call(function.writes_a_drain.clear)
    body = struct.pack("<QII", SCRATCH, 0, 4) + bytes(4)
    burst = b"".join(struct.pack("<HHIII", n, 10, 16 + len(body), NO_REPLY, 0) + body for n in range(40))
    client.socket.sendall(burst)
    client.read(0, IDENTITY, 4)
    serving.wait_for(lambda: sum(function.writes_a_drain) == 40, "the last drain")
    assert len(function.writes_a_drain) <= 2


# -- Interrupts --------------------------------------------------------------------------------------------------------


def test_msix_reaches_its_vector_when_enabled(client: VfioUserClient, function: EduFunction, serving: Serving) -> None:
    eventfds = client.set_irqs(MSIX, 4)
    control = msix_offset(function) + 2
    serving.call(lambda: function.interrupt(2))
    assert [signals(eventfd) for eventfd in eventfds] == [0, 0, 0, 0]
    client.set_config(COMMAND, 2, BUS_MASTER)
    client.set_config(control, 2, 0xC000)
    assert [signals(eventfd) for eventfd in eventfds] == [0, 0, 0, 0]
    client.set_config(control, 2, 0x8000)
    assert [signals(eventfd) for eventfd in eventfds] == [0, 0, 1, 0]
    serving.call(lambda: function.interrupt(3))
    assert [signals(eventfd) for eventfd in eventfds] == [0, 0, 0, 1]


def test_an_interrupt_waits_for_its_eventfd(client: VfioUserClient, function: EduFunction, serving: Serving) -> None:
    """QEMU writes the enable bit first and brings the eventfds afterwards: what is raised between must not be lost."""
    client.set_config(COMMAND, 2, BUS_MASTER)
    client.set_config(msix_offset(function) + 2, 2, 0x8000)
    serving.call(lambda: function.interrupt(1))
    assert function.interrupts.pending == {1}
    eventfds = client.set_irqs(MSIX, 4)
    assert [signals(eventfd) for eventfd in eventfds] == [0, 1, 0, 0]
    assert function.interrupts.pending == frozenset()


def test_taken_back_eventfds_are_not_signalled(client: VfioUserClient, function: EduFunction, serving: Serving) -> None:
    (first, *_) = client.set_irqs(MSIX, 4)
    client.set_config(COMMAND, 2, BUS_MASTER)
    client.set_config(msix_offset(function) + 2, 2, 0x8000)
    client.clear_irqs(MSIX)
    serving.call(lambda: function.interrupt(0))
    assert signals(first) == 0
    (second, *_) = client.set_irqs(MSIX, 4)
    assert (signals(first), signals(second)) == (0, 1)


def test_one_vector_can_be_taken_back(client: VfioUserClient, function: EduFunction, serving: Serving) -> None:
    """QEMU does so, by SET_IRQS with data type eventfd and none beside it."""
    eventfds = client.set_irqs(MSIX, 4)
    client.set_config(COMMAND, 2, BUS_MASTER)
    client.set_config(msix_offset(function) + 2, 2, 0x8000)
    client.call(DEVICE_SET_IRQS, struct.pack("<IIIII", 20, DATA_EVENTFD | ACTION_TRIGGER, MSIX, 2, 1))
    for vector in range(4):
        serving.call(lambda vector=vector: function.interrupt(vector))  # type: ignore[misc]
    assert [signals(eventfd) for eventfd in eventfds] == [1, 1, 0, 1]


# -- Memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_mapped_and_unmapped(client: VfioUserClient, serving: Serving) -> None:
    regions = serving.regions["edu"]
    with GuestMemory(0x10000) as memory:
        client.dma_map(0, 0x8000, memory.descriptor)
        client.dma_map(0x10_0000, 0x4000, memory.descriptor, offset=0x8000, write=False)
        client.dma_map(0xFFFC_0000, 0x4_0000)
        assert [(region.gpa, region.size, region.access) for region in regions] == [
            (0, 0x8000, RW),
            (0x10_0000, 0x4000, RO),
            (0xFFFC_0000, 0x4_0000, RW),
        ]
        assert [region.hva is None for region in regions] == [False, False, True]
        client.dma_unmap(0x10_0000, 0x4000)
        assert [region.gpa for region in regions] == [0, 0xFFFC_0000]
        client.dma_unmap(0, 0, flags=2)  # all of it
        assert regions == []


def test_a_map_that_the_owner_refuses_is_refused_to_the_client(
    client: VfioUserClient, serving: Serving, server: FunctionServer
) -> None:
    with GuestMemory(0x4000) as memory:
        serving.map_error = OSError(errno.ENOSPC, "no room")
        with pytest.raises(VfioUserError) as caught:
            client.dma_map(0, 0x4000, memory.descriptor)
        assert caught.value.errno == errno.ENOSPC
        assert server.errors == [serving.map_error]
        serving.map_error = None
        client.dma_map(0x1000, 0x2000, memory.descriptor)  # it would overlap, had anything of that been left mapped
        assert [(region.gpa, region.size) for region in serving.regions["edu"]] == [(0x1000, 0x2000)]


# -- Reset and reconnection --------------------------------------------------------------------------------------------


def test_a_device_reset_resets(client: VfioUserClient, function: EduFunction) -> None:
    client.write(0, SCRATCH, 4, 5)
    client.set_config(COMMAND, 2, BUS_MASTER)
    client.reset()
    assert (client.read(0, SCRATCH, 4), client.config(COMMAND, 2)) == (0, 0)
    assert function.resets == [ResetKind.DEVICE]


def test_a_function_level_reset_comes_by_config_space(client: VfioUserClient, function: EduFunction) -> None:
    offset = function.config.find(0x10)
    assert offset is not None
    assert client.config(offset + 4, 4) >> 28 & 1 == 1
    client.write(0, SCRATCH, 4, 5)
    client.set_config(offset + 8, 2, 1 << 15)
    assert (client.read(0, SCRATCH, 4), client.config(offset + 8, 2) >> 15) == (0, 0)
    assert function.resets == [ResetKind.FLR]


def test_the_next_client_finds_the_function_as_new(
    server: FunctionServer, function: EduFunction, serving: Serving, path: Path
) -> None:
    for served in range(1, 4):
        with VfioUserClient(path) as client, GuestMemory(0x4000) as memory:
            assert (client.read(0, SCRATCH, 4), client.config(COMMAND, 2)) == (0, 0)
            client.write(0, SCRATCH, 4, 5)
            client.set_config(COMMAND, 2, BUS_MASTER)
            client.dma_map(0, 0x4000, memory.descriptor)
            client.set_irqs(MSIX, 4)
            serving.call(lambda: function.interrupt(0))
            assert server.connected
        serving.wait_for(lambda: not server.connected, "the client's end")
        assert function.resets == [ResetKind.LOST_CONNECTION] * served
        assert function.interrupts.pending == frozenset()
        assert serving.regions["edu"] == []
        assert serving.disconnects == served


def test_a_client_may_reconnect_before_its_end_was_noticed(server: FunctionServer, path: Path) -> None:
    for _ in range(20):
        with VfioUserClient(path) as client:
            client.write(0, SCRATCH, 4, 1, posted=True)


def test_the_next_client_is_served_though_the_last_ones_end_is_yet_to_be_seen(
    server: FunctionServer, serving: Serving, path: Path
) -> None:
    with VfioUserClient(path) as last, VfioUserClient(path, greet=False) as following:
        identities: list[int] = []

        def both() -> None:
            """On the loop, so that it sees both afterwards: the greeting first, then the end."""
            identities.append(following.send(VERSION, struct.pack("<HH", 0, 0) + b"{}\0"))
            last.close()

        serving.call(both)
        following.receive(identities[0], VERSION)
        assert following.read(0, IDENTITY, 4) == 0x010000ED


def test_a_second_client_is_told_that_the_function_is_busy(client: VfioUserClient, path: Path) -> None:
    with pytest.raises(VfioUserError) as caught:
        VfioUserClient(path)
    assert caught.value.errno == errno.EBUSY
    assert client.read(0, IDENTITY, 4) == 0x010000ED


def test_an_interrupt_without_a_client_is_kept(server: FunctionServer, function: EduFunction, serving: Serving) -> None:
    serving.call(lambda: function.interrupt(1))
    assert function.interrupts.pending == {1}


def test_reconnecting_costs_no_descriptors(server: FunctionServer, serving: Serving, path: Path) -> None:
    def once() -> None:
        with VfioUserClient(path) as client, GuestMemory(0x4000) as memory:
            client.dma_map(0, 0x4000, memory.descriptor)
            client.set_irqs(MSI, 4)
        serving.wait_for(lambda: not server.connected, "the client's end")

    once()
    before = serving.call(lambda: len(os.listdir("/proc/self/fd")))
    for _ in range(10):
        once()
    assert serving.call(lambda: len(os.listdir("/proc/self/fd"))) == before


# -- The function's own errors -----------------------------------------------------------------------------------------


def test_an_exception_of_the_function_is_not_lost(
    client: VfioUserClient, server: FunctionServer, function: EduFunction, serving: Serving
) -> None:
    function.raised = RuntimeError("a bug in the device")
    for call in (lambda: client.read(0, 0, 4), lambda: client.write(0, 0, 4, 0)):
        with pytest.raises(VfioUserError) as caught:
            call()
        assert caught.value.errno == errno.EIO
    client.write(0, 0, 4, 0, posted=True)
    serving.wait_for(lambda: len(server.errors) == 3, "the posted write")
    raised, function.raised = function.raised, None
    assert client.read(0, IDENTITY, 4) == 0x010000ED  # served on
    assert server.errors == [raised] * 3
    assert serving.run(asyncio.wait_for(server.failed(), 1)) is raised


# -- The socket --------------------------------------------------------------------------------------------------------


def refused(serving: Serving, path: Path) -> str:
    with pytest.raises(SocketRefused) as caught:
        serving.serve(EduFunction("other"), path)
    return str(caught.value)


def test_the_socket_is_the_users_own_and_goes_with_the_server(serving: Serving, path: Path) -> None:
    server = serving.serve(EduFunction(), path)
    assert path.stat().st_mode & 0o777 == 0o600
    serving.run(server.close())
    assert not path.exists()


def test_a_path_too_long_is_refused(serving: Serving, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * (108 - len(os.fsencode(tmp_path))))
    assert len(os.fsencode(deep)) == 109
    assert "has 109 bytes" in refused(serving, deep)


def test_a_path_of_the_greatest_length_serves(serving: Serving, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * (106 - len(os.fsencode(tmp_path))))
    assert len(os.fsencode(deep)) == 107
    serving.serve(EduFunction(), deep)
    with VfioUserClient(deep) as client:
        assert client.read(0, IDENTITY, 4) == 0x010000ED


def test_a_socket_in_use_is_refused_and_left_alone(serving: Serving, server: FunctionServer, path: Path) -> None:
    assert "served by another process" in refused(serving, path)
    with VfioUserClient(path) as client:
        assert client.read(0, IDENTITY, 4) == 0x010000ED


def test_a_socket_left_by_a_dead_server_is_replaced(serving: Serving, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    serving.serve(EduFunction(), path)
    with VfioUserClient(path) as client:
        assert client.read(0, IDENTITY, 4) == 0x010000ED


def test_a_file_at_the_path_is_refused_and_kept(serving: Serving, path: Path) -> None:
    path.write_text("precious")
    assert "exists and is no socket" in refused(serving, path)
    assert path.read_text() == "precious"


def test_a_missing_folder_is_refused(serving: Serving, tmp_path: Path) -> None:
    assert "No such file or directory" in refused(serving, tmp_path / "nowhere" / "edu.sock")


def test_a_socket_taken_over_by_another_server_is_left_to_it(serving: Serving, path: Path) -> None:
    server = serving.serve(EduFunction(), path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        serving.run(server.close())
        assert path.exists()


def test_closing_ends_a_clients_connection(serving: Serving, function: EduFunction, path: Path) -> None:
    server = serving.serve(function, path)
    with VfioUserClient(path) as client:
        started = time.monotonic()
        serving.run(server.close())
        assert client.at_end()
        assert time.monotonic() - started < 1
    assert function.resets == [ResetKind.LOST_CONNECTION]
    assert serving.regions["edu"] == []
