"""Mutations of the sources, each a small error that a guest's suite must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MACHINE = "q35-amd-sva"
CHECKS = "isolation,dma,sva-memory,sva-changes,sva-errors,sva-processes,sva-lifetime,sva-pressure,log"
"""Of guest-tests/checks: all of shared virtual addressing but the timings, which nothing fails."""


class DoesNotApply(ValueError):
    """The source no longer has the place that the mutation changes: bring the mutation up to date."""


@dataclass(frozen=True)
class Mutation:
    """In `file`, the text `old`, which stands there once, becomes `new`. `what` says what is wrong then."""

    name: str
    what: str
    file: str
    old: str
    new: str
    machine: str = MACHINE

    def applied(self, text: str) -> str:
        """The mutated source."""
        if text.count(self.old) != 1:
            found = text.count(self.old)
            raise DoesNotApply(f"{self.name}: {self.file} has {found} times what it changes: {self.old!r}")
        return text.replace(self.old, self.new)


AMD = "backend/viommu/amd"
PCI = "backend/pci"

MUTATIONS = (
    # Invalidations
    Mutation(
        "iommu-keeps-pages",
        "INVALIDATE_IOMMU_PAGES with a PASID is ignored",
        f"{AMD}/domains.py",
        "            if _leads(key, pasid):\n                self._forget(domain, addresses, pasid)",
        "            if _leads(key, pasid):\n                continue",
    ),
    Mutation(
        "device-tlb-keeps-pages",
        "the device TLB answers an invalidation and forgets nothing",
        f"{PCI}/device_tlb.py",
        "                self._forget(key, first, end)",
        "                pass",
    ),
    Mutation(
        "device-tlb-keeps-pasids",
        "the device TLB keeps what an invalidation of a whole PASID names",
        f"{PCI}/device_tlb.py",
        "            else:\n                self._forget_all(pasid)",
        "            else:\n                pass",
    ),
    Mutation(
        "device-tlb-not-told",
        "INVALIDATE_IOTLB_PAGES never reaches the device",
        f"{AMD}/iommu.py",
        "            self.domains.invalidate_device(command.device_id, command.pasid, command.range, answered)",
        "            answered()",
    ),
    # Entries of the guest's tables
    Mutation(
        "dirty-never-set",
        "a write leaves the dirty bit of its page alone",
        "backend/core/formats/x86.h",
        "(leaf && write ? X86_D : 0)",
        "(leaf && write ? 0 : 0)",
    ),
    Mutation(
        "accessed-dirty-never-set",
        "neither accessed nor dirty bits are set",
        "backend/core/formats/x86.h",
        "*after = entry | X86_A | (leaf && write ? X86_D : 0);",
        "*after = entry | (0 & (X86_A | (leaf && write ? X86_D : 0)));",
    ),
    Mutation(
        "read-only-is-writable",
        "a translation that permits reads alone serves writes",
        f"{PCI}/device_tlb.py",
        " or access & ~permitted:",
        ":",
    ),
    # Whose addresses
    Mutation(
        "pasid-mixed-up",
        "the device TLB serves the translations of another PASID, where it has any",
        f"{PCI}/device_tlb.py",
        "        found: Segments = []\n        table = self._tables.get(pasid)",
        "        found: Segments = []\n        table = next(iter(self._tables.values()), None)",
    ),
    Mutation(
        "page-request-of-another",
        "a page request names the PASID beside its own",
        f"{AMD}/ppr_log.py",
        "    pasid = record.pasid or 0\n",
        "    pasid = (record.pasid or 0) ^ 1\n",
    ),
    # Page requests and their answers
    Mutation(
        "tag-reused",
        "a page request group index is used again before its answer",
        f"{PCI}/page_requests.py",
        "        index = self._free.popleft()",
        "        index = self._free[0]",
    ),
    Mutation(
        "answer-by-pasid",
        "COMPLETE_PPR_REQUEST is matched by its PASID too, which the guest leaves at 0",
        f"{AMD}/ppr_log.py",
        "self._respond(command.device_id, command.tag, code, command.pasid)",
        "self._respond(command.device_id, command.tag, code, command.pasid or 0)",
    ),
    Mutation(
        "success-is-failure",
        "the guest's success reaches the device as a failure",
        f"{AMD}/ppr_log.py",
        "0: Code.SUCCESS",
        "0: Code.FAILURE",
    ),
    Mutation(
        "invalid-is-success",
        "the guest's invalid reaches the device as a success",
        f"{AMD}/ppr_log.py",
        "1: Code.INVALID}",
        "1: Code.SUCCESS}",
    ),
    Mutation(
        "last-not-said",
        "the last request of a group does not say so",
        f"{AMD}/ppr_log.py",
        "(_LAST if record.last else 0)",
        "(_LAST if record.group is None else 0)",
    ),
    Mutation(
        "write-asked-as-read",
        "a page request for a write asks for a read",
        f"{AMD}/ppr_log.py",
        "(int(Access.WRITE), PprFlag.WRITE)",
        "(int(Access.WRITE), PprFlag.READ)",
    ),
    # The function
    Mutation(
        "bus-master-ignored",
        "a function that may not master the bus does so all the same",
        f"{PCI}/function.py",
        "port.enabled = lambda: self._bus_master",
        "port.enabled = lambda: True",
    ),
)
