"""Domains of the guest, and the routes of its devices, said in IOASID commands.

A domain is a page table of the guest under a domain ID: one IOASID nested beneath the VM's stage 2, shared by the
devices whose entries name it. The guest's domain ID is only a tag for its invalidations, so the table belongs to the
key: two entries that misuse one ID for two tables still get their own each.
"""

import errno
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from backend.core import Access
from backend.ioasid import Context, IoasidError, PgtableFormat
from backend.viommu.amd.commands import AddressRange

_FORMAT = "amd-v1"


class DomainKey(NamedTuple):
    """What makes two device table entries share a translation."""

    domain_id: int
    root: int  # GPA of the root table
    levels: int


@dataclass(slots=True)
class Domain:
    ioasid: int
    users: int  # routes


class Domains:
    """Routes of devices and the IOASIDs behind them.

    A route exists from a device's first request until its entry is invalidated, a domain while a route uses it: there
    are never more of either than endpoints. An endpoint is attached to `stage2` and, when translated, to the domain's
    IOASID on top of it, as nesting asks for.
    """

    def __init__(self, context: Context, stage2: int) -> None:
        self._context = context
        self._stage2 = stage2
        self._domains: dict[DomainKey, Domain] = {}
        self._routes: dict[int, DomainKey | None] = {}  # by RID; None: stage 2 alone

    @property
    def ioasids(self) -> dict[DomainKey, int]:
        """The IOASID of each domain that is in use."""
        return {key: domain.ioasid for key, domain in self._domains.items()}

    def bypass(self, rid: int, access: Access) -> None:
        """Route a device's requests to stage 2. Raises IoasidError, with nothing changed."""
        self.drop(rid)
        self._context.attach(rid, self._stage2, access=access)
        self._routes[rid] = None

    def translate(self, rid: int, key: DomainKey, access: Access) -> None:
        """Route a device's requests through a domain's table. Raises IoasidError, with no route left."""
        self.drop(rid)
        with ExitStack() as undo:
            domain = self._use(key)
            undo.callback(self._release, key)
            self._context.attach(rid, self._stage2)
            undo.callback(self._context.detach, rid)
            self._context.attach(rid, domain.ioasid, access=access)
            undo.pop_all()
        self._routes[rid] = key

    def drop(self, rid: int) -> None:
        """Take a device's route away, so that its next request asks again."""
        if rid not in self._routes:
            return
        key = self._routes.pop(rid)
        self._detach(rid)
        if key is not None:
            self._detach(rid)  # the first gave routing back to stage 2
            self._release(key)

    def drop_all(self) -> None:
        for rid in list(self._routes):
            self.drop(rid)

    def invalidate(self, domain_id: int, addresses: AddressRange) -> None:
        """Forget what is cached of every table under this domain ID."""
        for key, domain in self._domains.items():
            if key.domain_id != domain_id:
                continue
            if addresses.everything:
                self._context.invalidate_cache(domain.ioasid, granularity="all")
            else:
                self._context.invalidate_cache(
                    domain.ioasid, granularity="range", iova=addresses.start, size=addresses.size
                )

    def _detach(self, rid: int) -> None:
        """Another user of the context may have detached or unbound the device: then it is where it should be."""
        try:
            self._context.detach(rid)
        except IoasidError as error:
            if error.errno == errno.EBUSY:
                raise

    def _use(self, key: DomainKey) -> Domain:
        domain = self._domains.get(key)
        if domain is None:
            ioasid = self._context.create_nesting(self._stage2)
            try:
                self._context.bind_pgtable(ioasid, key.root, PgtableFormat(vendor=_FORMAT, levels=key.levels))
            except IoasidError:
                self._context.free(ioasid)
                raise
            domain = self._domains[key] = Domain(ioasid, 0)
        domain.users += 1
        return domain

    def _release(self, key: DomainKey) -> None:
        domain = self._domains[key]
        domain.users -= 1
        if domain.users == 0:
            del self._domains[key]
            self._context.unbind_pgtable(domain.ioasid)
            self._context.free(domain.ioasid)
