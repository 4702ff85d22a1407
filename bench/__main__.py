"""`make bench`: every figure beside the floor of the same run, and whether the target is met.

Ratios hold where the figures themselves drift with the machine, so targets that can be are stated against the floor.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from backend.cli.supervisor import guarded
from bench import (
    core_bench,
    fault_bench,
    mmio_bench,
    rpc_bench,
    scale_bench,
    sva_bench,
    table_bench,
    uapi_bench,
    walk_bench,
)
from bench.result import Result

SUITES: dict[str, Callable[[], Sequence[Result]]] = {
    "walk": walk_bench.results,
    "core": core_bench.results,
    "table": table_bench.results,
    "scale": scale_bench.results,
    "mmio": mmio_bench.results,
    "rpc": rpc_bench.results,
    "uapi": uapi_bench.results,
    "sva": sva_bench.results,
    "faults": fault_bench.results,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[*SUITES, []], help="which suites to run (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    args = parser.parse_args()
    results: list[Result] = []
    console = Console(stderr=True)
    for name in args.suite or SUITES:
        with console.status(f"measuring {name} ..."):
            results += SUITES[name]()
    if args.json:
        print(json.dumps({"results": results}))
    else:
        _print(results)
    return 0


def _print(results: Sequence[Result]) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("what")
    for column in ("ours", "floor", "ratio", "target"):
        table.add_column(column, justify="right")
    table.add_column("met")
    for result in results:
        unit = result["unit"]
        table.add_row(
            result["name"],
            f"{result['value']:.4g} {unit}",
            "" if result["floor"] is None else f"{result['floor']:.4g} {unit}",
            "" if result["ratio"] is None else f"{result['ratio']:.2f}",
            result["target"] or "",
            {True: "yes", False: "NO", None: ""}[result["met"]],
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(guarded(main))
