"""The constants of guest-tests/modules/vioasid_dma_regs.h: what a driver is written against, and so are the tests."""

from __future__ import annotations

import re
from pathlib import Path

HEADER = Path(__file__).parent.parent / "guest-tests" / "modules" / "vioasid_dma_regs.h"

VDMA: dict[str, int] = {
    name: int(value, 0)
    for name, value in re.findall(r"^#define VDMA_(\w+)\s+(0x[0-9a-f]+|\d+)\b", HEADER.read_text(), re.MULTILINE)
}
"""By name, without its VDMA_."""


def group(prefix: str) -> dict[str, int]:
    """Those whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in VDMA.items() if name.startswith(prefix)}
