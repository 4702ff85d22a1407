"""From a run to its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from backend.vm.boot import Boot, Outcome
from backend.vm.lost import VmLost
from backend.vm.report import Check, Report, guest_checks

KERNEL_LINE = "text"  # what `ready` calls it


def report_of(boot: Boot, lost: VmLost | None = None) -> Report:
    """Checks of every boot under its name (a single one goes without), facts of the first guest, DMA of all."""
    several = len(boot.outcomes) > 1
    checks: list[Check] = []
    for outcome in boot.outcomes:
        prefix = f"{outcome.name}/" if several else ""
        checks += guest_checks(outcome.result.results, prefix)
        checks += [Check(f"{prefix}{check.name}", check.status, check.detail) for check in outcome.checks]
    return Report(
        checks,
        guest=_facts(boot.outcomes),
        dma=_dma(boot),
        pasids=next((outcome.pasids for outcome in boot.outcomes if outcome.pasids), {}),
        example=next((outcome.example for outcome in boot.outcomes if outcome.example is not None), None),
        lost_part=lost.part if lost is not None else None,
        lost_reason=str(lost) if lost is not None else "",
    )


def _facts(outcomes: list[Outcome]) -> dict[str, str | int]:
    if not outcomes:
        return {}
    facts: Mapping[str, str] = outcomes[0].result.facts
    seconds = {f"seconds_{outcome.name}": f"{outcome.seconds:.1f}" for outcome in outcomes}
    return {**{("command_line" if key == KERNEL_LINE else key): value for key, value in facts.items()}, **seconds}


def _dma(boot: Boot) -> dict[str, int]:
    totals: dict[str, int] = {}
    for outcome in boot.outcomes:
        for key, value in asdict(outcome.traffic).items():
            totals[key] = totals.get(key, 0) + value
    counters = boot.backend.engine.core.counters()
    commands = sorted(boot.backend.iommu_commands().items())
    pages = next((outcome.pages for outcome in boot.outcomes if outcome.pages), {})
    return {
        **totals,
        **pages,
        "iotlb_hits": counters.iotlb_hits,
        "iotlb_misses": counters.iotlb_misses,
        "iommu_enables": sum(iommu.enables for iommu in boot.backend.iommus.values()),
        **{f"iommu_{opcode.name.lower()}": count for opcode, count in commands},
    }
