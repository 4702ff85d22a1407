"""The namespace: the blocks that the controller serves, in a file or in anonymous memory.

Both are one thing here: a file descriptor with a shared mapping. DMA goes straight between guest memory and the mapping
(the core's copy survives a file that was truncated under it); everything this file itself does goes through the
descriptor, since a touch of the mapping from Python would raise SIGBUS there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import stat
import uuid
from pathlib import Path

MIB = 1 << 20
SMALLEST = 1 * MIB  # a partition table, a file system's headers and a few files
BLOCK_SIZES = (512, 4096)
_CHUNK = 1 * MIB  # read or written at once where no single call does it
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


class NamespaceError(Exception):
    """A disk that cannot be served: one sentence with what is wrong and what to do."""


class Namespace:
    """Blocks of `block_size` bytes. Made by `in_memory` or `open`; close() gives everything back."""

    def __init__(self, fd: int, size: int, *, block_size: int, path: Path | None, identity: uuid.UUID) -> None:
        self._fd = fd
        self.size = size
        self.block_size = block_size
        self.blocks = size // block_size
        self.path = path
        self.uuid = identity
        self._mapping = mmap.mmap(fd, size)
        self.view = memoryview(self._mapping)
        """The whole store, writable, for DMA alone. Slicing it touches nothing."""
        self.holes = self._hole_at(size, block_size)
        """Whether deallocated blocks give their space back and read as zeroes."""

    @classmethod
    def in_memory(cls, size: int, *, block_size: int = 512) -> Namespace:
        """A namespace of `size` bytes that is gone with this process. Raises NamespaceError."""
        _check_size(size, block_size, "the disk in memory")
        fd = os.memfd_create("namespace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            # Nobody can take the memory away under a DMA, not even through /proc.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size, block_size=block_size, path=None, identity=uuid.uuid4())
        except (OSError, ValueError) as error:
            os.close(fd)
            raise NamespaceError(f"no memory for a disk of {size} bytes ({error}): ask for a smaller one") from None

    @classmethod
    def open(cls, path: str | Path, *, size: int | None = None, block_size: int = 512) -> Namespace:
        """Serve a file; with `size` (bytes) a missing one is created, a shorter one extended. Raises NamespaceError."""
        path = Path(path)
        try:
            created = not path.exists()
        except OSError as error:
            raise NamespaceError(f"disk file {path} cannot be reached ({error.strerror}): correct the path") from None
        if created and size is None:
            raise NamespaceError(f"disk file {path} does not exist: give a size to create it, or correct the path")
        if size is not None:
            _check_size(size, block_size, f"disk file {path}")
        fd = _open_file(path, create=created)
        try:
            return cls._serve(fd, path, size, block_size)
        except BaseException:
            os.close(fd)
            if created:
                path.unlink(missing_ok=True)
            raise

    @classmethod
    def _serve(cls, fd: int, path: Path, size: int | None, block_size: int) -> Namespace:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise NamespaceError(f"disk file {path} is {_kind(found.st_mode)}, not a regular file: name an image file")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise NamespaceError(f"disk file {path} is in use by another run: end that run, or use a copy") from None
        if size is not None and found.st_size > size:
            raise NamespaceError(
                f"disk file {path} holds {found.st_size} bytes, more than the size of {size} asked for: "
                "leave the size out, or name another file"
            )
        _check_size(found.st_size if size is None else size, block_size, f"disk file {path}")
        try:
            if size is not None and found.st_size < size:
                os.ftruncate(fd, size)
            # The same file is the same disk to the guest, whenever it is served.
            identity = uuid.uuid5(uuid.NAMESPACE_URL, path.absolute().as_uri())
            return cls(fd, size or found.st_size, block_size=block_size, path=path, identity=identity)
        except (OSError, ValueError) as error:
            if size is not None and found.st_size < size:
                os.ftruncate(fd, found.st_size)
            raise NamespaceError(
                f"disk file {path} cannot be set up ({error}): free some space, or ask for less"
            ) from None

    def close(self) -> None:
        """Write back, then release the mapping and the lock. A second call does nothing."""
        if self._fd < 0:
            return
        self.flush()
        self.view.release()
        self._mapping.close()
        os.close(self._fd)
        self._fd = -1

    def flush(self) -> bool:
        """All that was written is on stable storage when this returns True; False when the host refused."""
        try:
            # Covers what went through the mapping too: the kernel write-protects a page again once it is written back.
            os.fdatasync(self._fd)
        except OSError:
            return False
        return True

    def intact(self, start: int, length: int) -> bool:
        """Whether the store still has these bytes, and was not truncated by somebody."""
        return os.fstat(self._fd).st_size >= start + length

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the store; fewer than `length` where it ends early or was truncated."""
        parts = []
        while length > 0:
            part = os.pread(self._fd, min(length, _CHUNK), start)
            if not part:
                break
            parts.append(part)
            start += len(part)
            length -= len(part)
        return b"".join(parts)

    def digest(self, start: int = 0, length: int | None = None) -> str:
        """SHA-256, in hexadecimal, of `length` bytes from `start` (to the end when None)."""
        end = self.size if length is None else min(self.size, start + length)
        digest = hashlib.sha256()
        while start < end:
            part = os.pread(self._fd, min(end - start, _CHUNK), start)
            if not part:
                break
            digest.update(part)
            start += len(part)
        return digest.hexdigest()

    def zero(self, start: int, length: int) -> bool:
        """Bytes that read as zeroes from now on, without space where the host can punch holes. False: it could not."""
        if not self.intact(start, length):
            return False
        if self.holes:
            return self._hole_at(start, length)
        zeroes = bytes(min(length, _CHUNK))
        try:
            while length > 0:
                done = os.pwrite(self._fd, zeroes[:length], start)
                start += done
                length -= done
        except OSError:
            return False
        return True

    def _hole_at(self, start: int, length: int) -> bool:
        """Punch a hole. One behind the end of the file changes nothing, and so asks whether the file system can."""
        while _libc.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, start, length) != 0:
            if ctypes.get_errno() != errno.EINTR:
                return False
        return True


def _check_size(size: int, block_size: int, what: str) -> None:
    if block_size not in BLOCK_SIZES:
        raise NamespaceError(f"a block size of {block_size} bytes is not served: choose 512 or 4096")
    if size < SMALLEST:
        raise NamespaceError(f"{what} would hold {size} bytes, less than 1 MiB: give it at least {SMALLEST} bytes")
    if size % block_size:
        raise NamespaceError(
            f"{what} would hold {size} bytes, no multiple of the block size {block_size}: "
            f"make it {size - size % block_size + block_size} bytes"
        )


def _open_file(path: Path, *, create: bool) -> int:
    # O_NONBLOCK: a FIFO without a writer must not hold up the start; it is refused as no regular file.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT | os.O_EXCL if create else 0)
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        raise NamespaceError(f"disk file {path} cannot be created: make the folder {path.parent} first") from None
    except IsADirectoryError:
        raise NamespaceError(f"disk file {path} is a folder, not a regular file: name an image file") from None
    except PermissionError:
        verb = f"created in {path.parent}" if create else "written"
        raise NamespaceError(f"disk file {path} may not be {verb}: correct its permissions, or use a copy") from None
    except OSError as error:
        raise NamespaceError(f"disk file {path} cannot be opened ({error.strerror}): name a writable file") from None


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISBLK, "a block device"), (stat.S_ISCHR, "a character device"))
    return next((name for test, name in kinds if test(mode)), "a socket or a pipe")
