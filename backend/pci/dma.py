"""The DMA port: a function's only way to guest memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from backend.core import Access, AtsReply, Fault, RouteCounters


class DmaPort(Protocol):
    """Requests of one RID, translated by whatever it is attached to. Addresses are IOVAs, lengths are bytes.

    A request that could not be translated answers with a Fault and has moved `Fault.done` bytes before it.
    """

    def read(self, iova: int, length: int, pasid: int | None = None) -> bytes | Fault: ...

    def read_into(self, iova: int, buffer: WriteableBuffer, pasid: int | None = None) -> Fault | None: ...

    def write(self, iova: int, data: ReadableBuffer, pasid: int | None = None) -> Fault | None: ...

    def scatter(
        self, sg: Sequence[tuple[int, int]], buffer: ReadableBuffer, *, write: bool, pasid: int | None = None
    ) -> Fault | None:
        """Move a list of (iova, length) in one call; write: from `buffer` to the guest, else into `buffer`."""

    def store(self, iova: int, value: int, width: int, pasid: int | None = None) -> Fault | None:
        """One aligned release store of 1, 2, 4 or 8 bytes: for words that a guest polls."""

    def load(self, iova: int, width: int, pasid: int | None = None) -> int | Fault:
        """One aligned acquire load of 1, 2, 4 or 8 bytes."""

    def fill(self, iova: int, length: int, pattern: int = 0, width: int = 1, pasid: int | None = None) -> Fault | None:
        """A pattern of 1, 2, 4 or 8 bytes, over and over."""

    def copy(
        self, source: int, target: int, length: int, pasid: int | None = None, *, target_pasid: int | None = None
    ) -> Fault | None:
        """Within guest memory: read with `pasid`, write with `target_pasid`; ranges that overlap as by memmove."""

    def fetch_add(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        """AtomicOp FetchAdd of 4 or 8 aligned bytes; the value before."""

    def swap(self, iova: int, value: int, width: int, pasid: int | None = None) -> int | Fault:
        """AtomicOp Swap of 4 or 8 aligned bytes; the value before."""

    def compare_exchange(
        self, iova: int, compare: int, value: int, width: int, pasid: int | None = None
    ) -> int | Fault:
        """AtomicOp CAS of 4, 8 or 16 aligned bytes; the value before."""

    @property
    def counters(self) -> RouteCounters: ...


class FunctionPort(DmaPort, Protocol):
    """The port of a function to its IOMMU, which also translates for it (PCI Express Base 5.0, 10.2)."""

    enabled: Callable[[], bool]
    """Whether the function may master the bus; while it says no, every request is Fault(BUS_MASTER_OFF)."""

    def translate(self, iova: int, length: int, access: Access, pasid: int | None = None) -> AtsReply:
        """A translation request for the pages of [iova, iova + length): what is found of them, in order, without gaps,
        and the fault at which that ends."""

    def missing(self, iova: int, length: int, access: Access, most: int, pasid: int | None = None) -> list[int]:
        """Pages of [iova, iova + length), `most` at the most, of which translation requests would not give all of
        `access`."""

    @property
    def translated(self) -> DmaPort:
        """For requests whose addresses `translate` gave; they carry no PASID."""


@dataclass(frozen=True, slots=True)
class DmaRegion:
    """Guest memory that a client mapped for a function. Address and size are bytes, whole pages of 4 KiB.

    `hva` is where it lies in this process, valid until the region is unmapped; None for memory without a file (ROM).
    """

    gpa: int
    size: int
    hva: int | None
    access: Access
