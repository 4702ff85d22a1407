"""The contexts of an engine as everybody sees them: a number and a name each, and when those of clients end."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

from backend.ioasid import Context, Device, Engine, IoasidError

from .budgets import Budgets
from .session import ClientMemory, Session


class Contexts:
    """Every context has a number that is never used again.

    A client's context goes with its connection, unless a device bound to it is held by another one: as an open device
    file keeps what lies behind it, the context stays until nobody holds such a device.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.budgets = Budgets()
        """What all clients may hold together."""
        self._numbers: WeakKeyDictionary[Context, int] = WeakKeyDictionary()
        self._names: WeakKeyDictionary[Context, str] = WeakKeyDictionary()
        self._sessions: dict[Context, Session] = {}
        self._last = 0
        self._holders: dict[int, set[Session]] = {}
        self._left: dict[Context, ClientMemory] = {}
        self.on_left: Callable[[Session], None] | None = None
        """Called when a connection has gone."""
        self.on_opened: Callable[[Session, Context], None] | None = None
        """Called when a connection has opened its context."""
        for context in engine.contexts:
            self.name(context, "vm")

    def name(self, context: Context, name: str) -> None:
        """What it is called in listings."""
        self._names[context] = name

    def open(self, session: Session) -> Context:
        """A context for a connection."""
        context = self.engine.open(session.memory, share=self.budgets.share())
        self.name(context, f"client of pid {session.pid}")
        self.number(context)
        self._sessions[context] = session
        if self.on_opened is not None:
            self.on_opened(session, context)
        return context

    def session(self, context: Context) -> Session | None:
        """Whose context it is, while the connection lasts."""
        return self._sessions.get(context)

    def number(self, context: Context) -> int:
        """The context's number, from 1."""
        found = self._numbers.get(context)
        if found is None:
            self._last += 1
            found = self._numbers[context] = self._last
        return found

    def called(self, context: Context) -> str:
        """The context's name."""
        return self._names.get(context, "unnamed")

    def __iter__(self) -> Iterator[Context]:
        """All of them, by number."""
        return iter(sorted(self.engine.contexts, key=self.number))

    def find(self, number: int) -> Context:
        """ENOENT: no context has this number."""
        for context in self.engine.contexts:
            if self.number(context) == number:
                return context
        raise IoasidError(errno.ENOENT, f"no context has number {number}: vm.contexts lists them")

    # Held devices

    def hold(self, session: Session, rid: int) -> None:
        """The connection holds the device from now on."""
        self._holders.setdefault(rid, set()).add(session)
        session.held.add(rid)

    def release(self, session: Session, rid: int) -> None:
        """It does no longer. ENOENT: it never did."""
        if rid not in session.held:
            raise IoasidError(errno.ENOENT, f"endpoint.release: this connection does not hold RID {rid:#06x}")
        session.held.discard(rid)
        self._holders[rid].discard(session)
        if not self._holders[rid]:
            del self._holders[rid]
        self._end_unneeded()

    def holders(self, device: Device) -> int:
        """How many connections hold it."""
        return len(self._holders.get(device.rid, ()))

    def left(self, session: Session) -> None:
        """A connection has gone: so has what it owned and nobody needs."""
        if self.on_left is not None:
            self.on_left(session)
        for rid in list(session.held):
            self.release(session, rid)
        context = session.own
        if context is None:
            session.memory.close()
        else:
            del self._sessions[context]
            self._left[context] = session.memory
            self.name(context, f"{self.called(context)} (gone)")
            self._end_unneeded()

    def close(self) -> None:
        """End what is left of clients' contexts."""
        self._holders.clear()
        self._end_unneeded()

    def _end_unneeded(self) -> None:
        if not self._left:
            return
        needed = {device.context for rid in self._holders if (device := self.engine.devices.get(rid)) is not None}
        for context in [each for each in self._left if each not in needed]:
            context.close()
            self._left.pop(context).close()
