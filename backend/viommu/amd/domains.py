"""Domains of the guest, and the routes of its devices, said in IOASID commands.

A domain is a table of the guest under a domain ID: one IOASID, shared by the devices whose entries name it. A host (v1)
table is nested beneath the VM's stage 2. A GCR3 table, and with it the guest (v2) tables of all PASIDs, is nested
beneath the host table of its entry, or beneath stage 2 where the entry has none. The guest's domain ID is only a tag
for its invalidations, so the table belongs to the key: two entries that misuse one ID for two tables still get their
own each.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from backend.ioasid import PAGE_SIZE, Context, IoasidError, PasidTableFormat, PgtableFormat, Untagged
from backend.viommu.amd.commands import AddressRange
from backend.viommu.amd.device_table import Decision, GuestTables, Verdict
from backend.viommu.amd.features import PASID_BITS

_IOMMU_CACHES = ("iotlb", "pasid")  # those of the IOMMU itself: a device forgets by a command of its own

MOST_PREFETCHED = 16 * PAGE_SIZE
"""By one command: a ring holds 32,768 of them, and the loop has other work."""


class HostKey(NamedTuple):
    """What makes two device table entries share a host translation."""

    domain_id: int
    root: int  # GPA of the root table
    levels: int
    accessed: bool = False
    dirty: bool = False


class GuestKey(NamedTuple):
    """What makes two device table entries share their guest translations."""

    domain_id: int
    tables: GuestTables
    host: HostKey | None  # the table beneath


DomainKey = HostKey | GuestKey


@dataclass(slots=True)
class Domain:
    ioasid: int
    users: int  # routes, and guest translations above a host table


def keys_of(verdict: Verdict) -> tuple[DomainKey, ...]:
    """The domains that a routed entry goes through, from stage 2 upwards."""
    host = None
    if verdict.decision is Decision.TRANSLATE:
        host = HostKey(verdict.domain_id, verdict.root, verdict.levels, verdict.accessed, verdict.dirty)
    guest = GuestKey(verdict.domain_id, verdict.guest, host) if verdict.guest is not None else None
    return tuple(key for key in (host, guest) if key is not None)


def _leads(key: DomainKey, pasid: int) -> bool:
    """Whether a PASID is one of a domain's."""
    return isinstance(key, GuestKey) and not pasid >> min(9 * key.tables.levels, PASID_BITS)


class Domains:
    """Routes of devices and the IOASIDs behind them.

    A route exists from a device's first request until its entry is invalidated, a domain while a route uses it: there
    are never more routes than endpoints, nor more than two domains a route. An endpoint is attached to `stage2` and,
    when translated, to the IOASIDs of its domains on top of it, as nesting asks for.
    """

    def __init__(self, context: Context, stage2: int) -> None:
        self._context = context
        self._stage2 = stage2
        self._domains: dict[DomainKey, Domain] = {}
        self._routes: dict[int, tuple[DomainKey, ...]] = {}  # by RID; empty: stage 2 alone
        self._going: set[int] = set()

    @property
    def ioasids(self) -> dict[DomainKey, int]:
        """The IOASID of each domain that is in use."""
        return {key: domain.ioasid for key, domain in self._domains.items()}

    def __contains__(self, rid: int) -> bool:
        """Whether a device has a route."""
        return rid in self._routes

    def going(self, rid: int) -> bool:
        """Whether a device's route is being taken away: its page requests are answered then, and it may ask at once."""
        return rid in self._going

    def route(self, rid: int, verdict: Verdict, excluded: tuple[int, int] | None = None) -> None:
        """Route a device's requests as its entry says, but for those to the addresses [start, end) that are excluded
        from translation. Raises IoasidError, with no route left."""
        self.drop(rid)
        keys = keys_of(verdict)
        with ExitStack() as undo:
            ioasids = []
            for key in keys:
                ioasids.append(self._use(key).ioasid)
                undo.callback(self._release, key)
            start, end = excluded or (0, 0)
            ats = verdict.device_tlb and self._context.get_info(rid=rid).ats
            for ioasid in (self._stage2, *ioasids):
                self._context.attach(
                    rid, ioasid, access=verdict.access, ats=ats, direct_iova=start, direct_size=end - start
                )
                undo.callback(self._context.detach, rid)
            undo.pop_all()
        self._routes[rid] = keys

    def drop(self, rid: int) -> None:
        """Take a device's route away, so that its next request asks again."""
        keys = self._routes.pop(rid, None)
        if keys is None:
            return
        self._going.add(rid)
        try:
            for _ in (self._stage2, *keys):  # each gives routing back to the one beneath
                self._detach(rid)
        finally:
            self._going.discard(rid)
        for key in reversed(keys):
            self._release(key)

    def drop_all(self) -> None:
        for rid in list(self._routes):
            self.drop(rid)

    def invalidate(self, domain_id: int, addresses: AddressRange) -> None:
        """Forget what is cached of every host table under this domain ID, and of guest tables, whose translations go
        through it."""
        for key, domain in self._under(domain_id):
            if isinstance(key, HostKey):
                self._forget(domain, addresses)
            else:
                self._context.invalidate_cache(domain.ioasid, granularity="all", caches=_IOMMU_CACHES)

    def invalidate_guest(self, domain_id: int, pasid: int, addresses: AddressRange) -> None:
        """Forget what is cached of the guest table of a PASID under this domain ID; all of it: its GCR3 entry too."""
        for key, domain in self._under(domain_id):
            if _leads(key, pasid):
                self._forget(domain, addresses, pasid)

    def invalidate_device(
        self, rid: int, pasid: int | None, addresses: AddressRange, answered: Callable[[], None]
    ) -> None:
        """Have a device forget translations of a PASID; None: of requests without one. `answered` is called when it
        has; at once where it keeps none, for it has no route, or there is nothing above stage 2, which tells itself."""
        keys = self._routes.get(rid)
        top = keys[-1] if keys else None
        if isinstance(top, GuestKey) and top.tables.untagged and pasid == 0:
            pasid = None  # what has PASID 0 here has none on the way
        if top is None or (pasid is not None and not _leads(top, pasid)):
            answered()
            return
        what: dict[str, Any] = {"granularity": "device" if pasid is None else "pasid", "pasid": pasid}
        if not addresses.everything:
            what |= {"granularity": "range", "iova": addresses.start, "size": addresses.size}
        try:
            self._context.invalidate_cache(
                self._domains[top].ioasid, rid=rid, caches=("device-tlb",), answered=answered, **what
            )
        except IoasidError:
            answered()  # somebody else detached it, and it was told to forget everything then

    def prefetch(self, rid: int, pasid: int | None, addresses: AddressRange, *, invalidate: bool) -> None:
        """Look for translations that a routed device will need, from the start of a range on, as many as are looked for
        at once; `invalidate`: anew."""
        for key in self._routes.get(rid, ()) if invalidate else ():
            if isinstance(key, GuestKey) == (pasid is not None) and (pasid is None or _leads(key, pasid)):
                self._forget(self._domains[key], addresses, pasid)
        size = min(addresses.size, MOST_PREFETCHED, (1 << 64) - addresses.start)
        self._context.prefetch(rid, addresses.start, size, pasid=pasid)

    def _under(self, domain_id: int) -> Iterator[tuple[DomainKey, Domain]]:
        return ((key, domain) for key, domain in self._domains.items() if key.domain_id == domain_id)

    def _forget(self, domain: Domain, addresses: AddressRange, pasid: int | None = None) -> None:
        context, ioasid = self._context, domain.ioasid
        if not addresses.everything:
            context.invalidate_cache(
                ioasid,
                granularity="range",
                iova=addresses.start,
                size=addresses.size,
                pasid=pasid,
                caches=_IOMMU_CACHES,
            )
        elif pasid is None:
            context.invalidate_cache(ioasid, granularity="all", caches=_IOMMU_CACHES)
        else:
            context.invalidate_cache(ioasid, granularity="pasid", pasid=pasid, caches=_IOMMU_CACHES)

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
            domain = self._domains[key] = Domain(self._make(key), 0)
        domain.users += 1
        return domain

    def _make(self, key: DomainKey) -> int:
        """The IOASID of a new domain, its table bound."""
        context = self._context
        host = key.host if isinstance(key, GuestKey) else None
        with ExitStack() as undo:
            parent = self._stage2
            if host is not None:
                parent = self._use(host).ioasid
                undo.callback(self._release, host)
            ioasid = context.create_nesting(parent)
            undo.callback(context.free, ioasid)
            if isinstance(key, HostKey):
                fmt = PgtableFormat(vendor="amd-v1", levels=key.levels, accessed=key.accessed, dirty=key.dirty)
                context.bind_pgtable(ioasid, key.root, fmt)
            else:
                tables = key.tables
                table = PasidTableFormat(
                    vendor="amd-gcr3",
                    levels=tables.levels,
                    table_levels=tables.table_levels,
                    pasid_bits=min(9 * tables.levels, PASID_BITS),
                )
                if tables.untagged:
                    context.bind_pasid_table(ioasid, tables.root, table, Untagged.PASID, 0)
                else:
                    context.bind_pasid_table(ioasid, tables.root, table, Untagged.PARENT)
            undo.pop_all()
        return ioasid

    def _release(self, key: DomainKey) -> None:
        domain = self._domains[key]
        domain.users -= 1
        if domain.users:
            return
        del self._domains[key]
        if isinstance(key, HostKey):
            self._context.unbind_pgtable(domain.ioasid)
        else:
            self._context.unbind_pasid_table(domain.ioasid)
        self._context.free(domain.ioasid)
        if isinstance(key, GuestKey) and key.host is not None:
            self._release(key.host)
