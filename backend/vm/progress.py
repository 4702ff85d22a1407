"""What a long piece of work is at: one moving line on a terminal, nothing in a pipe. Everything goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str], None]
"""Takes the phase that work has reached, a few words in the present tense."""


@contextmanager
def shown(what: str) -> Iterator[Report]:
    """Show `what`, its phase and the seconds it has taken, on stderr while the block runs, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda phase: None
        return
    # rich costs 0.1 s to import, and most runs have nothing to fetch
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda phase: progress.update(task, description=f"{what}: {phase}")


def notice(sentence: str) -> None:
    """Say one thing that the user must know even in a pipe, such as that we wait for somebody else."""
    print(f"vioasid: {sentence}", file=sys.stderr, flush=True)
