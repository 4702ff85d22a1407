"""Mutations of the sources, each a small error that a guest's suite must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MACHINE = "q35-amd-sva"


class DoesNotApply(ValueError):
    """The source no longer has the place that the mutation changes: bring the mutation up to date."""


@dataclass(frozen=True)
class Mutation:
    """In `file`, the text `old`, which stands there once, becomes `new`. `what` says what is wrong then."""

    name: str
    what: str
    file: str
    old: str
    new: str
    machine: str = MACHINE

    def applied(self, text: str) -> str:
        """The mutated source."""
        if text.count(self.old) != 1:
            found = text.count(self.old)
            raise DoesNotApply(f"{self.name}: {self.file} has {found} times what it changes: {self.old!r}")
        return text.replace(self.old, self.new)


MUTATIONS: tuple[Mutation, ...] = ()
