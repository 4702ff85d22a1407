"""What KVM keeps for a VM's ENQCMD: the guest's PASID in the instruction's operand becomes the host's."""

from __future__ import annotations

from .limits import MAX_KVM_PASIDS
from .share import Allowance

Reach = tuple[int, int]
"""A physical PASID, and the IOASID (its number in the core) that it reaches."""


class KvmPasids:
    """(VM, guest's PASID) -> physical PASID and the IOASID it was mapped for."""

    def __init__(self) -> None:
        self._map: dict[tuple[object, int], tuple[Reach, Allowance]] = {}
        self._keys: dict[Reach, set[tuple[object, int]]] = {}

    def __len__(self) -> int:
        return len(self._map)

    @property
    def full(self) -> bool:
        """Whether no more can be mapped."""
        return len(self._map) >= MAX_KVM_PASIDS

    def translate(self, vm: object, pasid: int) -> int | None:
        """The physical PASID that work of the guest is submitted under; None: the instruction is refused."""
        found = self._map.get((vm, pasid))
        return found[0][0] if found is not None else None

    def put(self, vm: object, pasid: int, reach: Reach, allowance: Allowance) -> None:
        """Map one that is not mapped. It was taken of the allowance, and is given back as it goes."""
        self._map[vm, pasid] = reach, allowance
        self._keys.setdefault(reach, set()).add((vm, pasid))

    def take(self, vm: object, pasid: int) -> bool:
        """Unmap one; False: it is not mapped."""
        found = self._map.pop((vm, pasid), None)
        if found is None:
            return False
        reach, allowance = found
        allowance.give()
        keys = self._keys[reach]
        keys.remove((vm, pasid))
        if not keys:
            del self._keys[reach]
        return True

    def forget(self, reach: Reach) -> None:
        """The IOASID is reached under that PASID no more."""
        for key in self._keys.pop(reach, ()):
            _, allowance = self._map.pop(key)
            allowance.give()
