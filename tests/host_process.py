"""A process of its own, whose memory a test lays out; and what stands there, asked of the process itself."""

from __future__ import annotations

import subprocess
import sys
from typing import IO

PAGE = 4096

PROGRAM = r"""
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
files = []
def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096
for line in sys.stdin:
    name, *rest = line.split()
    numbers = [int(each, 0) for each in rest] if name not in ("write", "exec", "file") else rest
    if name == "map":
        answer = libc.mmap(None, numbers[0], 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    elif name == "file":
        fd = os.memfd_create("of the child")
        os.ftruncate(fd, int(rest[0]))
        files.append(fd)
        answer = libc.mmap(None, int(rest[0]), 3, mmap.MAP_SHARED, fd, 0)
    elif name == "truncate":
        answer = os.ftruncate(files[-1], numbers[0])
    elif name == "protect":
        answer = libc.mprotect(*numbers)
    elif name == "unmap":
        answer = libc.munmap(*numbers)
    elif name == "read":
        answer = ctypes.string_at(*numbers).hex()
    elif name == "write":
        ctypes.memmove(int(rest[0], 0), bytes.fromhex(rest[1]), len(rest[1]) // 2)
        answer = 0
    elif name == "resident":
        answer = rss()
    elif name == "exec":
        print(0, flush=True)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    print(answer, flush=True)
"""


class HostProcess:
    """A child of the test. Addresses are its own."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._child.pid
        self.ask("resident")  # it runs

    def ask(self, *words: object) -> str:
        """Send one command and wait for its answer."""
        to, of = _pipe(self._child.stdin), _pipe(self._child.stdout)
        to.write(" ".join(str(word) for word in words) + "\n")
        to.flush()
        return of.readline().strip()

    def map(self, size: int) -> int:
        """Private memory, not touched yet."""
        return int(self.ask("map", size))

    def map_file(self, size: int) -> int:
        """A file that the process alone knows, mapped as shared."""
        return int(self.ask("file", size))

    def protect(self, address: int, size: int, protection: int) -> None:
        assert self.ask("protect", address, size, protection) == "0"

    def unmap(self, address: int, size: int) -> None:
        assert self.ask("unmap", address, size) == "0"

    def read(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.ask("read", address, size))

    def write(self, address: int, data: bytes) -> None:
        assert self.ask("write", address, data.hex()) == "0"

    def resident(self) -> int:
        """Bytes of its memory that are there."""
        return int(self.ask("resident"))

    def become_another_program(self) -> None:
        """exec: the pid stays, the address space does not."""
        self.ask("exec")
        self.ask("resident")

    def kill(self) -> None:
        """End it and reap it: its pid may be another's from now on."""
        self._child.kill()
        self._child.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            _pipe(pipe).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
