"""Guest memory as a function reaches it: by translations of its own where the guest has enabled them, else by none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from backend.core import RW, Access, Fault, Reason, RouteCounters
from backend.pci.pasid_control import PasidControl

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from backend.pci.dma import DmaPort


class DeviceMemory:
    """A DmaPort over the function's own port. Requests carry a PASID only where the guest has enabled that."""

    def __init__(self, rid: Callable[[], int], port: DmaPort, pasids: PasidControl) -> None:
        self._rid = rid
        self._port = port
        self._pasids = pasids
        self.enabled = port.enabled

    def read(self, iova: int, length: int, pasid: int | None = None) -> bytes | Fault:
        """As DmaPort.read; so are the others."""
        return self._refused(pasid, iova, Access.READ) or self._port.read(iova, length, pasid)

    def read_into(self, iova: int, buffer: WriteableBuffer, pasid: int | None = None) -> Fault | None:
        return self._refused(pasid, iova, Access.READ) or self._port.read_into(iova, buffer, pasid)

    def write(self, iova: int, data: ReadableBuffer, pasid: int | None = None) -> Fault | None:
        return self._refused(pasid, iova, Access.WRITE) or self._port.write(iova, data, pasid)

    def scatter(
        self, sg: Sequence[tuple[int, int]], buffer: ReadableBuffer, *, write: bool, pasid: int | None = None
    ) -> Fault | None:
        refused = self._refused(pasid, sg[0][0] if sg else 0, Access.WRITE if write else Access.READ)
        return refused or self._port.scatter(sg, buffer, write=write, pasid=pasid)

    def store(self, iova: int, value: int, width: int, pasid: int | None = None) -> Fault | None:
        return self._refused(pasid, iova, Access.WRITE) or self._port.store(iova, value, width, pasid)

    def load(self, iova: int, width: int, pasid: int | None = None) -> int | Fault:
        return self._refused(pasid, iova, Access.READ) or self._port.load(iova, width, pasid)

    def fill(self, iova: int, length: int, pattern: int = 0, width: int = 1, pasid: int | None = None) -> Fault | None:
        return self._refused(pasid, iova, Access.WRITE) or self._port.fill(iova, length, pattern, width, pasid)

    def copy(
        self, source: int, target: int, length: int, pasid: int | None = None, *, target_pasid: int | None = None
    ) -> Fault | None:
        refused = self._refused(pasid, source, Access.READ) or self._refused(target_pasid, target, Access.WRITE)
        return refused or self._port.copy(source, target, length, pasid, target_pasid=target_pasid)

    def fetch_add(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        return self._refused(pasid, iova, RW) or self._port.fetch_add(iova, value, width, pasid)

    def swap(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        return self._refused(pasid, iova, RW) or self._port.swap(iova, value, width, pasid)

    def compare_exchange(
        self, iova: int, compare: int, value: int, width: int, pasid: int | None = None
    ) -> int | Fault:
        return self._refused(pasid, iova, RW) or self._port.compare_exchange(iova, compare, value, width, pasid)

    def missing(self, pasid: int | None, iova: int, length: int, access: Access, most: int) -> list[int]:
        """IOVAs of the pages of [iova, iova + length), `most` at the most, that have no translation for `access` now.

        None are known to be missing where the function has no translations of its own.
        """
        return []

    @property
    def counters(self) -> RouteCounters:
        """Of the port."""
        return self._port.counters

    def _refused(self, pasid: int | None, iova: int, access: Access) -> Fault | None:
        if pasid is None or self._pasids.may_send(pasid, access):
            return None
        return Fault(
            rid=self._rid(),
            pasid=pasid,
            ioasid=0,
            iova=iova,
            access=access,
            stage=0,
            level=0,
            gpa=None,
            entry=0,
            reason=Reason.PASID_OFF,
            done=0,
        )
