"""Fixtures of more than one file."""

from collections.abc import Iterator

import pytest
from amd_driver import Vm


@pytest.fixture
def vm() -> Iterator[Vm]:
    """A VM behind the AMD IOMMU, which is off."""
    vm = Vm()
    yield vm
    vm.close()


@pytest.fixture
def started(vm: Vm) -> Vm:
    """The same, the IOMMU turned on."""
    vm.start()
    return vm
