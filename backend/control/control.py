"""The control socket of a run: all of its methods, and the server that carries them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from backend.ioasid import Context, Engine
from backend.ioasid.limits import MAX_PROCESSES
from protocol import Connection, Method, Server
from protocol.sockets import allow_descriptors

from .binding import Bound, bind_all
from .contexts import Contexts
from .endpoints import Endpoints
from .events import TOPICS, Events
from .parameters import Params
from .session import Session
from .status import Status
from .threads import Threads

DESCRIPTORS = 4
"""Of a connection: its socket, a memfd on its way, and what holds its client's process. IOASIDs of kind sva take two
each."""

Look = Callable[[Session, Params], Any]


def no_facts() -> Mapping[str, Any]:
    """Nothing to say of the run."""
    return {}


class Control:
    """The engine's commands to every connection, as to each open of /dev/ioasid.

    Args:
        path: of the socket.
        facts: what `vm.status` says of the run beside the engine's numbers.
        endpoints: RIDs of devices that clients may do DMA with.
        names: of contexts that are open already.
    """

    def __init__(
        self,
        engine: Engine,
        path: Path,
        *,
        facts: Callable[[], Mapping[str, Any]] = no_facts,
        endpoints: Collection[int] = (),
        names: Mapping[Context, str] | None = None,
    ) -> None:
        self.contexts = Contexts(engine)
        for context, name in (names or {}).items():
            self.contexts.name(context, name)
        self._events = Events(self.contexts)
        self.contexts.on_left = self._events.forget
        self.contexts.on_opened = self._events.follow
        self._threads = Threads()
        self.looks: Mapping[str, Look] = {
            **Status(self.contexts, lambda: {**facts(), "socket": path}).methods(),
            **self._events.methods(),
            **Endpoints(self.contexts, endpoints, self._threads.run).methods(),
            "memory.share": share,
            "memory.unshare": unshare,
        }
        """Methods that are no commands."""
        methods: dict[str, Method] = {name: partial(_look, name, look) for name, look in self.looks.items()}
        methods.update({name: partial(_command, bound) for name, bound in bind_all().items()})
        self._server = Server(methods, path, on_connect=partial(Session, self.contexts), notifications=TOPICS)

    @property
    def path(self) -> Path:
        """Of the socket."""
        return self._server.path

    @property
    def connections(self) -> Collection[Connection]:
        """Those that are open."""
        return self._server.connections

    async def start(self) -> None:
        """Listen. Raises protocol.SocketRefused."""
        allow_descriptors(self._server.limits.connections * DESCRIPTORS + 2 * MAX_PROCESSES)
        await self._server.start()

    async def close(self) -> None:
        """End every connection, and what its client owned."""
        await self._server.close()
        self.contexts.close()
        self._threads.close()  # what they wait for was attached to those contexts


def share(session: Session, params: Params) -> dict[str, Any]:
    """Let the client's [`vaddr`, `vaddr` + `size`) be the memfd sent along, from [`offset`] on, for MAP_DMA."""
    vaddr = params.number("vaddr", 1 << 64)
    size = params.number("size", 1 << 64)
    offset = params.number("offset", 1 << 63, 0)
    params.end()
    fd = session.take_fd("memory.share")
    try:
        _ = session.context  # who shares memory is one of those whom there is a part of it for
        shared = session.memory.shared.add(fd, vaddr, size, offset)
    finally:
        os.close(fd)
    return {"vaddr": shared.vaddr, "size": shared.size, "writable": shared.writable}


def unshare(session: Session, params: Params) -> None:
    """Take [`vaddr`, `vaddr` + `size`) back: DMA to what an IOASID still maps of it faults."""
    vaddr = params.number("vaddr", 1 << 64)
    size = params.number("size", 1 << 64)
    params.end()
    session.memory.shared.remove(vaddr, size)


def _look(name: str, look: Look, session: Session, fields: Mapping[str, Any]) -> Any:
    return look(session, Params(name, fields))


def _command(bound: Bound, session: Session, fields: Mapping[str, Any]) -> Any:
    return bound(session.context, fields)
