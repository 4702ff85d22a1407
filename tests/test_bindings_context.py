"""Loading libvfio-user, and a context fed by hand: whole messages in, replies out, no exception lost."""

import errno
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from vfio_user_client import (
    ACTION_TRIGGER,
    DATA_EVENTFD,
    DEVICE_RESET,
    DEVICE_SET_IRQS,
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    VERSION,
    GuestMemory,
    signals,
)
from vfu import library, libvfio_user

from ctypes_bindings import (
    LIBRARY_VARIABLE,
    MESSAGE_MAX,
    Context,
    Library,
    LibraryError,
    LibraryMissing,
    MappedRegion,
    Refused,
    Region,
    load,
)

__all__ = ["library", "libvfio_user"]

MSIX = 2


@dataclass
class Recorder:
    """Handlers that note what they are called with, and raise what they are told to."""

    calls: list[tuple[object, ...]] = field(default_factory=list)
    regions: list[MappedRegion] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    raised: BaseException | None = None
    answer: bytes | None = None

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if self.raised is not None:
            raise self.raised

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        self._note("read", region, offset, count)
        return bytes(range(offset, offset + count)) if self.answer is None else self.answer

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        self._note("write", region, offset, data)

    def dma_mapped(self, region: MappedRegion) -> None:
        self.regions.append(region)
        self._note("mapped", region.gpa, region.size)

    def dma_unmapped(self, region: MappedRegion) -> None:
        self._note("unmapped", region.gpa, region.size)

    def reset(self, kind: int) -> None:
        self._note("reset", kind)

    def log(self, level: int, text: str) -> None:
        self.lines.append(text)

    def failed(self, error: BaseException) -> None:
        self.failures.append(error)


def message(command: int, body: bytes = b"", *, flags: int = 0) -> bytes:
    return HEADER.pack(7, command, HEADER.size + len(body), flags, 0) + body


def answer(reply: bytes | None, command: int) -> tuple[int, bytes]:
    """(errno, body) of a reply."""
    assert reply is not None
    identity, answered, size, flags, error = HEADER.unpack_from(reply)
    assert (identity, answered, size, flags & 0xF) == (7, command, len(reply), 1)
    assert bool(flags & 1 << 5) == bool(error)
    return error, reply[HEADER.size :]


HELLO = message(VERSION, struct.pack("<HH", 0, 0) + b"{}\0")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def context(library: Library, recorder: Recorder) -> Iterator[Context]:
    regions = {0: Region(0x1000), 7: Region(0x1000, memory=False)}
    made = Context(library, regions=regions, irqs={MSIX: 4}, handlers=recorder)
    made.attach(HELLO)
    yield made
    recorder.raised = None
    made.close()


# -- Loading ---------------------------------------------------------------------------------------------------------


def test_an_explicit_path_comes_before_the_environment(
    libvfio_user: object, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, "/nowhere/at/all.so")
    assert load(Path(library.name)).name == library.name
    with pytest.raises(LibraryMissing, match=r"/nowhere/at/all\.so .*VIOASID_LIBVFIO_USER"):
        load()
    monkeypatch.setenv(LIBRARY_VARIABLE, library.name)
    assert load().name == library.name


def test_a_library_that_is_another_one_is_told_apart() -> None:
    with pytest.raises(LibraryMissing, match=r"libc\.so\.6 .* no libvfio-user that fits: .*vfu_create_ctx"):
        load(Path("libc.so.6"))


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "libvfio-user.so.0"
    file.write_bytes(b"not a library" * 100)
    with pytest.raises(LibraryMissing, match=r"cannot load .*libvfio-user\.so\.0.*invalid ELF header"):
        load(file)


# -- Life of a context -----------------------------------------------------------------------------------------------


def test_a_context_leaves_nothing_behind(
    library: Library, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 120)  # deeper than a socket's path can be
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    before = os.listdir("/proc/self/fd")
    made = Context(library, regions={0: Region(0x1000)}, irqs={}, handlers=recorder)
    assert os.listdir(deep) == []
    made.attach(HELLO)
    with GuestMemory(0x4000) as memory:
        made.exchange(message(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 0x4000)), [memory.descriptor])
    made.close()
    made.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert recorder.calls == [("mapped", 0, 0x4000), ("unmapped", 0, 0x4000), ("reset", 1)]


def test_a_context_that_cannot_be_set_up_leaves_nothing_behind(library: Library, recorder: Recorder) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(LibraryError) as caught:
        Context(library, regions={10: Region(0x1000)}, irqs={}, handlers=recorder)
    assert (caught.value.function, caught.value.errno) == ("vfu_setup_region", errno.EINVAL)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize(
    "version",
    [
        message(VERSION, struct.pack("<HH", 1, 0) + b"{}\0"),
        message(VERSION, struct.pack("<HH", 0, 0) + b"{}"),
        message(VERSION, struct.pack("<HH", 0, 0) + b'{"capabilities": 7}\0'),
        message(VERSION, struct.pack("<HH", 0, 0) + b'{"capabilities": {"max_msg_fds": 9999}}\0'),
        message(VERSION, struct.pack("<HH", 0, 0) + b"[" * 5000 + b"\0"),
        message(VERSION, b"\0\0"),
        message(DEVICE_RESET),
    ],
)
def test_a_version_that_will_not_do_is_refused_with_a_reply(
    library: Library, recorder: Recorder, version: bytes
) -> None:
    made = Context(library, regions={}, irqs={}, handlers=recorder)
    with pytest.raises(Refused) as caught:
        made.attach(version)
    made.close()
    if caught.value.reply:  # a version message without a body is refused before there is anything to answer
        assert HEADER.unpack_from(caught.value.reply)[4] == errno.EINVAL


def test_the_version_is_never_above_the_clients(library: Library, recorder: Recorder) -> None:
    """QEMU offers 0.0 and hangs up on 0.1."""
    made = Context(library, regions={}, irqs={}, handlers=recorder)
    error, body = answer(made.attach(HELLO), VERSION)
    made.close()
    assert (error, struct.unpack_from("<HH", body)) == (0, (0, 0))


# -- Messages --------------------------------------------------------------------------------------------------------


def test_accesses_reach_the_handlers(context: Context, recorder: Recorder) -> None:
    read = message(REGION_READ, struct.pack("<QII", 8, 0, 4))
    assert answer(context.exchange(read), REGION_READ) == (0, struct.pack("<QII", 8, 0, 4) + bytes((8, 9, 10, 11)))
    write = struct.pack("<QII", 16, 7, 3)
    assert answer(context.exchange(message(REGION_WRITE, write + b"abc")), REGION_WRITE) == (0, write)
    assert context.exchange(message(REGION_WRITE, write + b"def", flags=NO_REPLY)) is None
    assert recorder.calls == [("read", 0, 8, 4), ("write", 7, 16, b"abc"), ("write", 7, 16, b"def")]


def test_the_longest_message_is_exchanged_in_one_go(context: Context, recorder: Recorder) -> None:
    """Both ways: if either did not fit the sockets, this would hang or fail."""
    recorder.answer = bytes(0x1000)
    body = struct.pack("<II", 0, 0) + bytes(MESSAGE_MAX - HEADER.size - 8)
    assert answer(context.exchange(message(99, body)), 99)[0] == errno.EINVAL
    with pytest.raises(ValueError, match="65537 bytes"):
        context.exchange(bytes(MESSAGE_MAX + 1))
    assert answer(context.exchange(message(REGION_READ, struct.pack("<QII", 0, 0, 0x1000))), REGION_READ)[0] == 0


def test_memory_is_described_as_it_is_mapped(context: Context, recorder: Recorder) -> None:
    with GuestMemory(0x8000) as memory:
        memory.bytes[0x2000:0x2005] = b"hello"
        body = struct.pack("<IIQQQ", 32, 1, 0x2000, 0x10000, 0x3000)
        assert answer(context.exchange(message(DMA_MAP, body), [memory.descriptor]), DMA_MAP)[0] == 0
        (region,) = recorder.regions
        assert (region.gpa, region.size, region.prot) == (0x10000, 0x3000, 1)
        assert region.hva is not None
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:guest" in line]
        (found,) = [line for line in lines if int(line[0].split("-")[0], 16) == region.hva]
        assert (found[1], int(found[2], 16)) == ("r--s", 0x2000)
        unmap = struct.pack("<IIQQ", 24, 0, 0x10000, 0x3000)
        assert answer(context.exchange(message(DMA_UNMAP, unmap)), DMA_UNMAP)[0] == 0
    without_file = struct.pack("<IIQQQ", 32, 1, 0, 0x20000, 0x1000)
    assert answer(context.exchange(message(DMA_MAP, without_file)), DMA_MAP)[0] == 0
    assert recorder.regions[1] == MappedRegion(0x20000, 0x1000, None, 1)


def test_interrupts_go_to_the_eventfds_given(context: Context) -> None:
    assert context.trigger(0) is False
    eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    body = struct.pack("<IIIII", 20, DATA_EVENTFD | ACTION_TRIGGER, MSIX, 1, 2)
    assert answer(context.exchange(message(DEVICE_SET_IRQS, body), eventfds), DEVICE_SET_IRQS)[0] == 0
    assert [context.trigger(vector) for vector in range(5)] == [False, True, True, False, False]
    assert context.trigger(2) is True
    assert [signals(eventfd) for eventfd in eventfds] == [1, 2]
    os.eventfd_write(eventfds[0], 2**64 - 2)
    assert context.trigger(1) is True  # full: what was signalled is yet to be read
    for eventfd in eventfds:
        os.close(eventfd)


# -- Exceptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (RuntimeError("a bug"), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("without a number"), errno.EIO),
    ],
)
@pytest.mark.parametrize(
    "request_",
    [
        message(REGION_READ, struct.pack("<QII", 0, 0, 4)),
        message(REGION_WRITE, struct.pack("<QII", 0, 0, 4) + b"abcd"),
        message(DEVICE_RESET),
    ],
)
def test_an_exception_is_recorded_and_told_as_an_errno(
    context: Context, recorder: Recorder, request_: bytes, raised: Exception, number: int
) -> None:
    recorder.raised = raised
    error, _ = answer(context.exchange(request_), struct.unpack_from("<HH", request_)[1])
    assert error == number
    assert context.errors == recorder.failures == [raised]
    recorder.raised = None
    error, _ = answer(context.exchange(message(REGION_READ, struct.pack("<QII", 0, 0, 4))), REGION_READ)
    assert error == 0


def test_an_exception_where_the_library_expects_none_is_recorded(context: Context, recorder: Recorder) -> None:
    recorder.raised = RuntimeError("no room")
    context.exchange(message(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 0x1000)))
    assert recorder.failures == [recorder.raised]


def test_a_read_of_the_wrong_length_is_an_exception(context: Context, recorder: Recorder) -> None:
    recorder.answer = b"abc"
    error, _ = answer(context.exchange(message(REGION_READ, struct.pack("<QII", 0, 0, 4))), REGION_READ)
    assert error == errno.EIO
    assert "3 bytes for a read of 4" in str(recorder.failures[0])


def test_an_interrupted_program_is_interrupted(context: Context, recorder: Recorder) -> None:
    recorder.raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        context.exchange(message(REGION_READ, struct.pack("<QII", 0, 0, 4)))
    assert recorder.failures == [recorder.raised]


def test_what_is_recorded_is_bounded_what_is_reported_is_not(context: Context, recorder: Recorder) -> None:
    recorder.raised = RuntimeError("again")
    for _ in range(40):
        context.exchange(message(REGION_READ, struct.pack("<QII", 0, 0, 4)))
    assert (len(context.errors), len(recorder.failures)) == (16, 40)
