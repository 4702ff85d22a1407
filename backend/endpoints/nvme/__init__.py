"""An NVMe controller with one namespace, in memory or in a file."""

from backend.endpoints.nvme.controller import NvmeController, NvmeCounters
from backend.endpoints.nvme.identity import Identity
from backend.endpoints.nvme.namespace import Namespace, NamespaceError
from backend.endpoints.nvme.transfers import Transfer, TransferCounters

__all__ = ["Identity", "Namespace", "NamespaceError", "NvmeController", "NvmeCounters", "Transfer", "TransferCounters"]
