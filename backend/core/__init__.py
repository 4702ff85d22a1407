"""The C core and its Python face: page tables, nested walk, IOTLB, routes and DMA."""

from backend.core.answers import (
    RW,
    Access,
    Counters,
    Fault,
    Reason,
    RouteCounters,
    SpaceCounters,
    Translation,
    Translations,
)
from backend.core.core import Core
from backend.core.errors import (
    BadValueError,
    BufferGoneError,
    BusyError,
    ClosedError,
    CoreError,
    ExistsError,
    KindError,
    LimitError,
    NoMemoryError,
    NotMappedError,
    OverlapError,
    UnknownIdError,
    UntrackedError,
)
from backend.core.memory import PlainMemory
from backend.core.native import ANY_PASID
from backend.core.pasid_format import AmdGcr3, ArmCd, PasidFormat, RiscVPdt, VtdPasid
from backend.core.path import Path, Step
from backend.core.process import FOREIGN, HostProcess
from backend.core.table_format import (
    X86,
    AmdV1,
    ArmStage1,
    ArmStage2,
    ArmTree,
    Ept,
    ExecuteDisable,
    RiscV,
    RiscVSecondStage,
    TableFormat,
    VtdSecondStage,
)
from backend.core.tables import TableBuilder

Prot = Access

__all__ = [
    "ANY_PASID",
    "FOREIGN",
    "RW",
    "X86",
    "Access",
    "AmdGcr3",
    "AmdV1",
    "ArmCd",
    "ArmStage1",
    "ArmStage2",
    "ArmTree",
    "BadValueError",
    "BufferGoneError",
    "BusyError",
    "ClosedError",
    "Core",
    "CoreError",
    "Counters",
    "Ept",
    "ExecuteDisable",
    "ExistsError",
    "Fault",
    "HostProcess",
    "KindError",
    "LimitError",
    "NoMemoryError",
    "NotMappedError",
    "OverlapError",
    "PasidFormat",
    "Path",
    "PlainMemory",
    "Prot",
    "Reason",
    "RiscV",
    "RiscVPdt",
    "RiscVSecondStage",
    "RouteCounters",
    "SpaceCounters",
    "Step",
    "TableBuilder",
    "TableFormat",
    "Translation",
    "Translations",
    "UnknownIdError",
    "UntrackedError",
    "VtdPasid",
    "VtdSecondStage",
]
