"""Every format in every configuration worth telling apart: a walker, a builder, and which stage it can stand in.

A variant's name is what a test prints, so that a failure names its format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import amd_v1, arm_lpae, ept, riscv, vtd_second_stage, x86
from .building import Builder
from .common import Access, Fault, Kind, Reader, Result
from .memory import Memory, Region
from .nested import Stage


@dataclass(frozen=True)
class Variant:
    """`make` builds an empty tree; `changes` replace fields of the configuration that the builder gives.

    stage: 1, 2, or 0 for a format that stands in either. table_kind: as in nested.Stage.
    """

    name: str
    stage: int
    walk: Callable[[Reader, Any, int, Access], Result | Fault]
    make: Callable[[Memory, Region], Builder]
    changes: dict[str, Any] = field(default_factory=dict)
    table_kind: Kind = Kind.READ

    def config(self, builder: Builder) -> Any:
        """The configuration of a tree in this variant."""
        return builder.config(**self.changes)

    def as_stage(self, config: Any) -> Stage:
        """For the nested walk."""
        return Stage(self.walk, config, self.table_kind)


def _x86(name: str, levels: int = 4, sign_extended: bool = True, **changes: Any) -> Variant:
    make = partial(x86.Builder, levels=levels, sign_extended=sign_extended)
    return Variant(f"x86-{name}", 1, x86.walk, make, changes)


def _vtd(name: str, levels: int, **changes: Any) -> Variant:
    make = partial(vtd_second_stage.Builder, levels=levels)
    return Variant(f"vtd-ss-{name}", 2, vtd_second_stage.walk, make, changes)


def _ept(name: str, levels: int = 4, *, table_kind: Kind = Kind.READ, **changes: Any) -> Variant:
    return Variant(f"ept-{name}", 2, ept.walk, partial(ept.Builder, levels=levels), changes, table_kind)


def _amd(name: str, levels: int, skips: dict[int, int] | None = None, **changes: Any) -> Variant:
    # A tree that skips levels cannot map every address, so it does not serve as a random stage 2.
    make = partial(amd_v1.Builder, levels=levels, skips=skips)
    return Variant(f"amd-v1-{name}", 1 if skips else 0, amd_v1.walk, make, changes)


def _arm(name: str, granule: int, input_bits: int, *, changes: dict[str, Any] | None = None, **options: Any) -> Variant:
    stage = options.get("stage", 1)
    walk = arm_lpae.walk_stage1 if stage == 1 else arm_lpae.walk_stage2
    make = partial(arm_lpae.Builder, granule=granule, input_bits=input_bits, **options)
    return Variant(f"arm-s{stage}-{name}", stage, walk, make, changes or {})


def _riscv(name: str, levels: int, *, preset: int = 0xC0, **changes: Any) -> Variant:
    second = changes.pop("second_stage", False)
    napot = changes.get("svnapot", True)
    make = partial(riscv.Builder, levels=levels, second_stage=second, napot=napot, preset=preset)
    return Variant(f"riscv-{name}", 2 if second else 1, riscv.walk, make, changes)


VARIANTS: tuple[Variant, ...] = (
    _x86("4"),
    _x86("5", levels=5),
    _x86("4-pasid0", sign_extended=False),
    _x86("5-pasid0", levels=5, sign_extended=False),
    _x86("4-nowp-smep", write_protect=False, smep=True),
    _x86("4-noxd", xd=x86.Xd.IGNORED),
    _x86("4-xd-reserved-46", xd=x86.Xd.RESERVED, pa_bits=46, gigabyte_pages=False),
    _vtd("3", 3),
    _vtd("4-ad", 4, access_dirty=True),
    _vtd("4-haw46-plain", 4, pa_bits=46, snoop_control=False, large_1g=False, large_2m=False),
    _vtd("5", 5),
    _ept("4"),
    _ept("4-ad", access_dirty=True, table_kind=Kind.WRITE),
    _ept("4-mbec-46", mode_based_execute=True, pa_bits=46),
    _ept("5-plain", levels=5, execute_only=False, large_1g=False),
    *(_amd(str(levels), levels) for levels in range(1, 7)),
    _amd("4-ad", 4, accessed=True, dirty=True),
    _amd("4-a", 4, accessed=True),
    _amd("6-skip", 6, {6: 3, 3: 1}),
    _amd("4-readonly", 4, write=False),
    _arm("4k-48", 12, 48),
    _arm("4k-39-upper", 12, 39, upper=True),
    _arm("4k-25", 12, 25),
    _arm("4k-48-hd", 12, 48, dbm=True, preset=False),
    _arm("4k-32-pa36", 12, 32, changes={"pa_bits": 36}),
    _arm("16k-47", 14, 47),
    _arm("16k-36-upper", 14, 36, upper=True, changes={"affd": True}, preset=False),
    _arm("64k-48", 16, 48),
    _arm("64k-52", 16, 52, pa_bits=52),
    _arm("64k-48-lpa-pa44", 16, 48, changes={"lpa": True, "pa_bits": 44}),
    _arm("64k-42-upper-hd", 16, 42, upper=True, dbm=True),
    _arm("4k-40-join2", 12, 40, stage=2, joined=1),
    _arm("4k-43-join16", 12, 43, stage=2, joined=4),
    _arm("4k-48-hd", 12, 48, stage=2, dbm=True, preset=False),
    _arm("16k-40-join16", 14, 40, stage=2, joined=4, changes={"xnx": False}),
    _arm("64k-52", 16, 52, stage=2, pa_bits=52),
    _arm("64k-46-join16", 16, 46, stage=2, joined=4),
    _riscv("sv39", 3),
    _riscv("sv48", 4),
    _riscv("sv57", 5),
    _riscv("sv39-hw", 3, hardware_ad=True, preset=0),
    _riscv("sv39-fault", 3, preset=0x40),
    _riscv("sv48-plain-sum", 4, svnapot=False, svpbmt=False, svrsw60t59b=True, sum=True),
    _riscv("sv39x4", 3, second_stage=True),
    _riscv("sv48x4-hw", 4, second_stage=True, hardware_ad=True, preset=0),
    _riscv("sv57x4", 5, second_stage=True),
)

FIRST_STAGES = tuple(v for v in VARIANTS if v.stage in (0, 1))
SECOND_STAGES = tuple(v for v in VARIANTS if v.stage in (0, 2))
