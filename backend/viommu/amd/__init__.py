"""The AMD IOMMU: what a guest's driver sees of it, turned into IOASID commands."""

from backend.viommu.amd.commands import Opcode
from backend.viommu.amd.event_log import EventCode
from backend.viommu.amd.features import EFR
from backend.viommu.amd.iommu import AmdIommu
from backend.viommu.amd.ivrs import Ivhd, ivrs_table, whole_ivrs_table
from backend.viommu.amd.registers import BAR_SIZE

__all__ = ["BAR_SIZE", "EFR", "AmdIommu", "EventCode", "Ivhd", "Opcode", "ivrs_table", "whole_ivrs_table"]
