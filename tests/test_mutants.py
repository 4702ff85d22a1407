"""Each mutation of `make mutants` still applies to the sources, and leaves a program. The runs are not here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "mutants"))

from mutations import MUTATIONS, ROOT, DoesNotApply, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_a_mutation_applies(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    mutated = mutation.applied(text)
    assert mutated != text
    if mutation.file.endswith(".py"):
        compile(mutated, mutation.file, "exec")


def test_names_are_distinct() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("old", ["not there", "import"])
def test_what_stands_there_never_or_twice_is_told(old: str) -> None:
    with pytest.raises(DoesNotApply, match=r"has [02] times what it changes"):
        Mutation("x", "", "", old, "").applied("import a\nimport b\n")
