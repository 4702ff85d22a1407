"""Message signalled interrupts of a function: what is raised, masked, pending and sent (PCI 3.0, 6.8)."""

from __future__ import annotations

from collections.abc import Callable

from backend.pci.capabilities import MSI_ENABLE, MSIX_ENABLE, MSIX_FUNCTION_MASK, Msi, Msix
from backend.pci.config_space import ConfigSpace

Signal = Callable[[int], bool]


class Interrupts:
    """MSI-X where the guest has enabled it, else MSI; without either, nothing can be raised."""

    def __init__(self, config: ConfigSpace, msi: Msi | None, msix: Msix | None, may_send: Callable[[], bool]) -> None:
        """`may_send`: whether the function masters the bus."""
        self._config = config
        self._msi = msi
        self._msix = msix
        self._may_send = may_send
        self._msi_base = config.find(Msi.id) or 0
        self._msix_base = config.find(Msix.id) or 0
        self._signal: Signal | None = None
        self._pending = 0  # a bit a vector
        if msi is not None:
            config.on_write(self._msi_base, msi.size, self.deliver_pending)
        if msix is not None:
            config.on_write(self._msix_base, msix.size, self.deliver_pending)

    @property
    def vectors(self) -> int:
        """The most that MSI or MSI-X offers; 0 for a function without interrupts."""
        return max(self.counts)

    @property
    def counts(self) -> tuple[int, int]:
        """Vectors of MSI and of MSI-X."""
        return self._msi.vectors if self._msi else 0, self._msix.vectors if self._msix else 0

    @property
    def pending(self) -> frozenset[int]:
        """Vectors raised while they could not be sent."""
        return frozenset(_bits(self._pending))

    def connect(self, signal: Signal | None) -> None:
        """`signal(vector)` sends an interrupt and says whether the other side has taken it; None: nobody listens."""
        self._signal = signal

    def interrupt(self, vector: int) -> None:
        """Raise a vector (0 to `vectors` - 1): sent if it can be, else kept."""
        if not self._send(vector):
            self._set_pending(self._pending | 1 << vector)

    def deliver_pending(self) -> None:
        """Send what was kept, as far as it can be sent now."""
        if self._pending:
            sent = sum(1 << vector for vector in _bits(self._pending) if self._send(vector))
            self._set_pending(self._pending & ~sent)

    def reset(self) -> None:
        """The registers are reset: nothing is pending."""
        self._pending = 0

    def read_pending(self, offset: int, size: int) -> int:
        """What a guest reads of MSI-X's pending bits (6.8.2.10)."""
        return self._pending >> 8 * offset & (1 << 8 * size) - 1

    def _set_pending(self, pending: int) -> None:
        self._pending = pending
        if self._msi is not None and self._msi.per_vector_mask:
            bits = (1 << self._msi.vectors) - 1
            self._config.set(self._msi_base + self._msi.mask_offset + 4, 4, pending & bits)

    def _send(self, vector: int) -> bool:
        if self._signal is None or not self._may_send():
            return False
        if self._msix is not None:
            control = self._config.read(self._msix_base + 2, 2)
            if control & MSIX_ENABLE:
                return not control & MSIX_FUNCTION_MASK and vector < self._msix.vectors and self._signal(vector)
        if self._msi is not None:
            control = self._config.read(self._msi_base + 2, 2)
            if control & MSI_ENABLE:
                # The guest may grant fewer messages than the function asked for (6.8.1.3): share them.
                granted = min(1 << (control >> 4 & 7), self._msi.vectors)
                message = vector % granted
                if self._msi.per_vector_mask:
                    masked = self._config.read(self._msi_base + self._msi.mask_offset, 4)
                    if masked >> message & 1:
                        return False
                return self._signal(message)
        return False


def _bits(mask: int) -> list[int]:
    """The numbers of the bits set, lowest first."""
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
