"""Processes with memory whose pages do not come before a test lets them: by userfaultfd(2), and by a file of FUSE's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096

PROGRAM = r"""
import ctypes, fcntl, mmap, os, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
SYS_userfaultfd, UFFD_API = 323, 0xAA
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
FILE = 1 << 20
INIT, LOOKUP, GETATTR, OPEN, READ, RELEASE, FLUSH = 26, 1, 3, 14, 15, 18, 25
QUIET = {2, 36, 42}
held, may_come = [], threading.Event()

def private(size):
    return libc.mmap(None, size, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)

def userfault(size):
    fd = libc.syscall(SYS_userfaultfd, os.O_CLOEXEC)
    if fd < 0:
        return "-" + os.strerror(ctypes.get_errno())
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("QQQ", UFFD_API, 0, 0)))
    at = private(size)
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(struct.pack("QQQQ", at, size, 1, 0)))
    held.append(fd)
    return at

def supply(at, size, byte):
    source = ctypes.create_string_buffer(bytes([byte]) * size, size + 4096)
    start = ctypes.addressof(source)
    fcntl.ioctl(held[-1], UFFDIO_COPY, bytearray(struct.pack("QQQQq", at, start, size, 0, 0)))
    return 0

def withheld(fd, unique, offset, size):
    may_come.wait()
    os.write(fd, struct.pack("IiQ", 16 + size, 0, unique) + b"f" * size)

def answers(fd):
    attributes = lambda node: struct.pack("QQQQQQIIIIIIIIII", node, FILE, FILE // 512, 0, 0, 0, 0, 0, 0,
                                          0o40755 if node == 1 else 0o100644, 1, 0, 0, 0, 4096, 0)
    while True:
        try:
            request = os.read(fd, 1 << 17)
        except OSError:
            return
        _, operation, unique, node = struct.unpack_from("IIQQ", request)
        error, body = 0, b""
        if operation == INIT:
            body = struct.pack("IIIIHHIIHHI28x", 7, 31, 1 << 16, 0, 16, 12, 1 << 16, 1, 32, 0, 0)
        elif operation == LOOKUP:
            body = struct.pack("QQQQII", 2, 0, 3600, 3600, 0, 0) + attributes(2)
        elif operation == GETATTR:
            body = struct.pack("QII", 3600, 0, 0) + attributes(node)
        elif operation == OPEN:
            body = struct.pack("QII", 1, 0, 0)
        elif operation == READ:
            arguments = (fd, unique, *struct.unpack_from("8xQI", request, 40))
            threading.Thread(target=withheld, args=arguments, daemon=True).start()
            continue
        elif operation in QUIET:
            continue
        elif operation not in (RELEASE, FLUSH):
            error = -38
        os.write(fd, struct.pack("IiQ", 16 + len(body), error, unique) + body)

def fuse(folder, by_one):
    if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):
        return "-" + os.strerror(ctypes.get_errno())
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return "-" + error.strerror
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"test", folder.encode(), b"fuse.test", 6, options.encode()):
        return "-" + os.strerror(ctypes.get_errno())
    held.append(fd)
    threading.Thread(target=answers, args=(fd,), daemon=True).start()
    file = os.open(folder + "/file", os.O_RDONLY)
    at = libc.mmap(None, FILE, 1, mmap.MAP_PRIVATE, file, 0)
    os.close(file)  # asks FUSE, which at our end would be us
    if by_one:
        libc.madvise(at, FILE, mmap.MADV_RANDOM)
    return at

for line in sys.stdin:
    name, *rest = line.split()
    if name == "private":
        answer = private(int(rest[0]))
    elif name == "userfault":
        answer = userfault(int(rest[0]))
    elif name == "supply":
        answer = supply(*map(int, rest))
    elif name == "fuse":
        answer = fuse(rest[0], rest[1] == "1")
    elif name == "come":
        answer = may_come.set()
    elif name == "read":
        answer = ctypes.string_at(*map(int, rest)).hex()
    print(answer, flush=True)
"""


class Withholding:
    """A child of the test. Addresses are its own."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._child.pid

    def _ask(self, *words: object) -> str:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(" ".join(str(word) for word in words) + "\n")
        self._child.stdin.flush()
        return self._child.stdout.readline().strip()

    def _address(self, answer: str, what: str) -> int:
        if answer.startswith("-"):
            pytest.skip(f"{what}: {answer[1:]}")
        return int(answer)

    def private(self, size: int) -> int:
        """Memory as any other."""
        return int(self._ask("private", size))

    def userfault(self, size: int) -> int:
        """Private memory, none of which comes before `supply`."""
        what = "no userfaultfd for faults of the kernel: run as root, or with sysctl vm.unprivileged_userfaultfd=1"
        return self._address(self._ask("userfault", size), what)

    def supply(self, address: int, size: int, byte: int = 0) -> None:
        """Let pages of the last `userfault` come, full of a byte."""
        assert self._ask("supply", address, size, byte) == "0"

    def fuse(self, folder: Path, *, one_by_one: bool) -> int:
        """1 MiB of a file of FUSE's, readable alone, none of which comes before `come`. `one_by_one`: the kernel does
        not read ahead, and so waits for each page in a way that SIGKILL does not end."""
        what = "no file system in user space: run as root, with /dev/fuse"
        return self._address(self._ask("fuse", folder, int(one_by_one)), what)

    def come(self) -> None:
        """Let what FUSE was asked for, and will be, come: full of the letter f."""
        self._ask("come")

    def read(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self._ask("read", address, size))

    def kill(self) -> None:
        """End it and reap it."""
        self._child.kill()
        self._child.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def withholding() -> Iterator[Withholding]:
    child = Withholding()
    try:
        yield child
    finally:
        child.close()


def helpers_of(pid: int | None = None) -> int:
    """Processes that make system calls for a process: those of its children that are called so."""
    found = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = status.read_text().rsplit(")", 1)
        except OSError:  # it has ended
            continue
        found += name.endswith("(vioasid-helper") and int(rest.split()[1]) == (pid or os.getpid())
    return found


def threads_of(pid: int | None = None) -> int:
    return len(os.listdir(f"/proc/{pid or os.getpid()}/task"))
