"""Endpoints: device models that do DMA through the IOMMU."""
