"""`vioasid`: its verbs, and the exit codes that tell how it went."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from backend.cli.supervisor import guarded

VERBS = {
    "boot": "boot a stock guest behind our IOMMU and check every claim",
    "serve": "serve a machine's functions for your own QEMU",
    "ctl": "call methods of a run's control socket: IOASID commands, DMA of software endpoints",
    "spaces": "show the IOASIDs of a run as a tree",
    "faults": "show the DMA faults of a run",
    "doctor": "say what this machine has and lacks, and the fix",
}

EPILOG = """exit codes: 0 all passed, 1 a check failed, 2 could not run, 3 the VM was lost, 130 interrupted"""


def parser(wanted: str) -> argparse.ArgumentParser:
    """Imports only the verb that is wanted: the doctor must be able to speak of a core that does not even load."""
    top = argparse.ArgumentParser(
        prog="vioasid",
        description="A virtual IOMMU with real nested translation for stock QEMU guests, and the IOASID uAPI.",
        epilog=EPILOG,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary)
        if name == wanted:
            importlib.import_module(f"backend.cli.{name}").fill_parser(verb)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = parser(words[0] if words else "").parse_args(words)
    return guarded(lambda: int(args.run(args)))


if __name__ == "__main__":
    sys.exit(main())
