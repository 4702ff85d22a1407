"""A DMA engine: the reference device, for drivers and tests of shared virtual addressing (docs/dma-engine.md)."""

from backend.endpoints.dma_engine.engine import DmaCounters, DmaEngine

__all__ = ["DmaCounters", "DmaEngine"]
