"""Serving a PCI function to vfio-user clients, one after another, on a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from backend.pci.client import Client, State
from backend.pci.dma import DmaRegion
from backend.pci.function import PciFunction
from backend.pci.messages import Message
from backend.pci.session import OddAccess, Session
from ctypes_bindings import Library, LibraryError, Refused, load

GREETING_SECONDS = 5.0
"""For a client's version to arrive; QEMU sends it with its first breath."""
GREETINGS_MAX = 8
"""Connections that have not sent their version; one more drops the oldest, so that silent ones keep nobody out."""
ERRORS_KEPT = 16
"""Exceptions of the function kept and logged with their traceback; a guest could cause the same one for ever."""
NOTES_LOGGED = 32
"""Lines logged about one client's bad messages, for the same reason."""
ACCEPT_PAUSE_SECONDS = 1.0
"""Without a free file descriptor, how long to wait before accepting again."""
PATH_MAX = 107
"""Bytes of a Unix socket's path (unix(7): sun_path, without its terminating zero)."""


class SocketRefused(Exception):
    """The socket cannot be opened: what is wrong with its path, and what to do."""


class FunctionServer:
    """Serves one function on one socket, on the running asyncio loop.

    One client at a time is served; a second one is told EBUSY. When a client goes, its memory is unmapped, the
    function is reset (ResetKind.LOST_CONNECTION) and waits for the next.
    """

    def __init__(
        self,
        function: PciFunction,
        socket_path: Path,
        *,
        on_dma_map: Callable[[DmaRegion], None],
        on_dma_unmap: Callable[[DmaRegion], None],
        library: Path | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        """`library` is libvfio-user's file (see ctypes_bindings.load). An exception of on_dma_map refuses the map."""
        self.function = function
        self.socket_path = Path(socket_path)
        self.on_dma_map = on_dma_map
        self.on_dma_unmap = on_dma_unmap
        self.on_disconnect: Callable[[], None] | None = None
        """Called after a served client is gone and the function is reset."""
        self.log = log or logging.getLogger(__name__)
        self.errors: list[BaseException] = []
        """What the function's own code raised, the first ERRORS_KEPT of it."""
        self._library_path = library
        self._library: Library | None = None
        self._listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._served: Client | None = None
        self._greeting: dict[Client, asyncio.TimerHandle] = {}
        self._pause: asyncio.TimerHandle | None = None
        self._error_count = 0
        self._noted = 0
        self._failed = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether a client is served."""
        return self._served is not None

    @property
    def peer_pid(self) -> int:
        """The process id of the client that is served; 0 for none, or for one that cannot be seen from here."""
        return self._served.peer_pid if self._served is not None else 0

    async def start(self) -> None:
        """Listen. SocketRefused for a bad path, LibraryMissing or LibraryError if the library will not do."""
        self._library = load(self._library_path)
        Session(self, self._library).close()  # what the library will not set up shows now, not at the first client
        self._listener = listen(self.socket_path)
        status = os.stat(self.socket_path)
        self._identity = status.st_dev, status.st_ino
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def close(self) -> None:
        """End every connection, stop listening, remove the socket."""
        for client in (*self._greeting, self._served):
            if client is not None:
                client.close("the server is closing")
        if self._pause is not None:
            self._pause.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                status = os.stat(self.socket_path)
                if (status.st_dev, status.st_ino) == self._identity:
                    os.unlink(self.socket_path)

    async def failed(self) -> BaseException:
        """Wait until the function's own code raises; the first exception. The function is served on all the same."""
        await self._failed.wait()
        return self.errors[0]

    # Called by clients and sessions

    def greeted(self, client: Client, version: Message) -> None:
        """A client has sent its version: serve it, or say why not."""
        if self._served is not None and self._served.hung_up:
            self._served.close("closed by the other side")
        if self._served is not None:
            self._refuse(client, version.refusal(errno.EBUSY), "another client is served")
            return
        assert self._library is not None
        self._noted = 0
        session: Session | None = None
        try:
            session = Session(self, self._library)
            reply = session.attach(version.data)
        except (Refused, LibraryError, OSError) as error:
            if session is not None:
                session.close()
            number = error.errno or errno.EIO if isinstance(error, OSError) else errno.EINVAL
            reply = error.reply if isinstance(error, Refused) else b""
            self._refuse(client, reply or version.refusal(number), str(error))
            return
        self._greeting.pop(client).cancel()
        self._served = client
        client.serve(session)
        self.function.connect_interrupts(session.signal)
        self.log.info("%s: client attached", self.function.name)
        client.send(reply)

    def lost(self, client: Client) -> None:
        """A client's connection has ended."""
        timer = self._greeting.pop(client, None)
        if timer is not None:
            timer.cancel()
        if client is not self._served:
            return
        self._served = None
        self.function.connect_interrupts(None)
        if client.session is not None:
            client.session.close()
        if self.on_disconnect is not None:
            self.on_disconnect()

    def record(self, error: BaseException) -> None:
        """Code behind a request raised: keep it, log it, and let failed() know unless the client is to blame."""
        if isinstance(error, OddAccess):
            self.note(f"refused: {error.strerror}")
            return
        self._error_count += 1
        if self._error_count <= ERRORS_KEPT:
            self.errors.append(error)
            self.log.error("%s: %s", self.function.name, error, exc_info=error)
        elif self._error_count == ERRORS_KEPT + 1:
            self.log.error("%s: still failing; no more of it is logged", self.function.name)
        self._failed.set()

    def note(self, text: str) -> None:
        """Log what a client did wrong, up to NOTES_LOGGED lines a client."""
        self._noted += 1
        if self._noted <= NOTES_LOGGED:
            self.log.warning("%s: %s", self.function.name, text)
        if self._noted == NOTES_LOGGED:
            self.log.warning("%s: no more is logged of what this client does wrong", self.function.name)

    # Accepting

    def _accept(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        for _ in range(GREETINGS_MAX):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Still readable, so the loop would spin on it: look again when something may have been closed.
                self.log.error("%s: cannot accept a client: %s", self.function.name, error.strerror)
                loop.remove_reader(self._listener)
                self._pause = loop.call_later(ACCEPT_PAUSE_SECONDS, loop.add_reader, self._listener, self._accept)
                return
            if len(self._greeting) >= GREETINGS_MAX:
                next(iter(self._greeting)).close("silent, and others are waiting")
            client = Client(self, connection, loop)
            self._greeting[client] = loop.call_later(GREETING_SECONDS, self._too_slow, client)

    def _too_slow(self, client: Client) -> None:
        if client.state is State.GREETING:
            client.close(f"sent no version within {GREETING_SECONDS:g} seconds")

    def _refuse(self, client: Client, reply: bytes, why: str) -> None:
        client.send(reply)
        client.close(why)


def listen(path: Path) -> socket.socket:
    """A non-blocking listening socket at `path`, for this user alone; a dead server's socket file is replaced."""
    raw = os.fsencode(path)
    if len(raw) > PATH_MAX:
        raise SocketRefused(f"{path} has {len(raw)} bytes, a socket's path at most {PATH_MAX}: use a shorter folder")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SocketRefused(f"{path} exists and is no socket: remove it or choose another path")
        if _is_alive(path):
            raise SocketRefused(f"{path} is served by another process: end it or choose another path")
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(raw)
        os.chmod(path, 0o600)
        listener.listen(GREETINGS_MAX)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SocketRefused(f"{path} was taken by another process just now: choose another path") from error
        raise SocketRefused(f"cannot listen at {path}: {error.strerror}") from error
    return listener


def _is_alive(path: Path) -> bool:
    """Whether someone listens at a socket file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            return False
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: alive, with its queue full
                raise SocketRefused(f"cannot look at {path}: {error.strerror}") from error
    return True
