"""What CHECK_EXTENSION knows of."""

from functools import cache

from .commands import COMMANDS
from .formats import FORMATS
from .kinds import Kind
from .pasid_formats import PASID_FORMATS

EXTENSIONS = frozenset(
    {
        "alloc-format",
        "nesting-hardware",
        "nesting-software",
        "pgtable",
        "pasid-table",
        "device-cookie",
        "device-groups",
        "device-info",
        "enforce-snoop",
        "fault-queue",
        "invalidate-array",
        "pasid-virtualisation",
        "reserved-ranges",
    }
)
"""What v1 lacks, or leaves to the hardware, by name."""


@cache
def extensions() -> frozenset[str]:
    """All names that CHECK_EXTENSION answers with 1."""
    return EXTENSIONS.union(
        (name.lower() for name in COMMANDS),
        (f"kind:{kind}" for kind in Kind),
        (f"format:{vendor}" for vendor in FORMATS),
        (f"pasid-table:{vendor}" for vendor in PASID_FORMATS),
    )
