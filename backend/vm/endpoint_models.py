"""The models of endpoints that a machine file can name, a row each: how one is made, and what it can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from backend.endpoints.dma_engine import DmaEngine
from backend.endpoints.nvme import Namespace, NvmeController
from backend.ioasid import BEHIND_X86, Traits
from backend.pci import PciFunction


@dataclass(frozen=True, slots=True)
class EndpointModel:
    """`build` takes the function's name and, where the model has a `disk`, the namespace behind it."""

    build: Callable[[str, Namespace | None], PciFunction]
    traits: Traits = BEHIND_X86
    disk: bool = False
    """Whether the machine file gives it a `size`."""
    pasids: bool = False
    """It sends PASIDs: then Linux leaves its other requests untranslated, in an identity domain."""


def _nvme(name: str, namespace: Namespace | None) -> PciFunction:
    assert namespace is not None
    return NvmeController(namespace, name=name)


def _dma_engine(name: str, _namespace: Namespace | None) -> PciFunction:
    return DmaEngine(name=name)


def _plain_dma_engine(name: str, _namespace: Namespace | None) -> PciFunction:
    return DmaEngine(name=name, pasids=False)


ENDPOINT_MODELS: Mapping[str, EndpointModel] = {
    "nvme": EndpointModel(_nvme, disk=True),
    "dma-engine": EndpointModel(_dma_engine, pasids=True),
    "dma-engine-plain": EndpointModel(_plain_dma_engine),
}
