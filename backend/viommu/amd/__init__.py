"""The AMD IOMMU: what a guest's driver sees of it, turned into IOASID commands."""

from backend.viommu.amd.features import EFR
from backend.viommu.amd.iommu import AmdIommu
from backend.viommu.amd.ivrs import Ivhd, ivrs_table, whole_ivrs_table

__all__ = ["EFR", "AmdIommu", "Ivhd", "ivrs_table", "whole_ivrs_table"]
