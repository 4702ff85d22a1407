"""`vioasid`: its verbs, and the exit codes that tell how it went."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from backend.cli import boot, doctor, serve
from backend.cli.supervisor import guarded

EPILOG = """exit codes: 0 all passed, 1 a check failed, 2 could not run, 3 the VM was lost, 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="vioasid",
        description="A virtual IOMMU with real nested translation for stock QEMU guests, and the IOASID uAPI.",
        epilog=EPILOG,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in (boot, serve, doctor):
        module.add_parser(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded(lambda: int(args.run(args)))


if __name__ == "__main__":
    sys.exit(main())
