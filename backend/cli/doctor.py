"""`vioasid doctor`: what this machine has and lacks, and the fix. Exit 0 when nothing failed, 1 when something did."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from backend.vm.doctor import Part, Status, all_well, examine

COLOURS = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "red"}


def fill_parser(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = __doc__
    shape = '{"ok", "parts": [{"name", "status", "detail", "fix"}]}'
    parser.add_argument("--json", action="store_true", help=f"print {shape}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every part; the exit status of the command."""
    parts = examine()
    if args.json:
        print(json.dumps({"ok": all_well(parts), "parts": [asdict(part) for part in parts]}, indent=2))
    elif sys.stdout.isatty():
        _print_table(parts)
    else:
        for part in parts:
            print(f"{part.status} {part.name}: {part.detail}" + (f" | fix: {part.fix}" if part.fix else ""))
    return 0 if all_well(parts) else 1


def _print_table(parts: Sequence[Part]) -> None:
    from rich.console import Console  # noqa: PLC0415  # 0.1 s that only a terminal needs
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, show_header=False, pad_edge=False)
    for part in parts:
        found = Text(part.detail, overflow="fold")
        if part.fix:
            found.append(f"\n{part.fix}", "bold")
        table.add_row(Text(part.status, COLOURS[part.status]), part.name, found)
    Console().print(table)
