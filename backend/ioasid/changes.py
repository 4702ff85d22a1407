"""What commands changed of the ways that DMA takes, for whoever watches."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .context import Context


class What(StrEnum):
    """What happened."""

    ATTACH = "attach"
    DETACH = "detach"
    INVALIDATE = "invalidate"


@dataclass(frozen=True, slots=True)
class Change:
    """One change, after it was made."""

    what: What
    context: Context
    ioasid: int
    """Of an attachment, that which it led to; of an invalidation, that which was invalidated."""
    rid: int | None = None
    """None for an invalidation of all devices."""
    pasid: int | None = None
    iova: int | None = None
    """Of an invalidation of a range; None: of all."""
    size: int | None = None
