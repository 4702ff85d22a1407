"""The fuzzing harnesses over their corpus, by the host's compiler with its sanitizers; `make fuzz` looks for more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from core_objects import COMPILER, NoSanitizer, link

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))

from fuzzing import HARNESSES, HERE, corpus_file, read_corpus  # noqa: E402

VARIANTS = 60
"""Of each input: a few seconds a harness."""


def build(harness: str, made: Path) -> None:
    if COMPILER is None:
        pytest.skip("no C compiler: install gcc")
    try:
        link(made, "address,undefined", HERE / f"{harness}.c", HERE / "standalone.c", flags=(f"-I{HERE}",))
    except NoSanitizer as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("harness", HARNESSES)
def test_corpus(harness: str, tmp_path: Path) -> None:
    """Every input kept, those that once failed among them, and some that differ from each by a little."""
    made = tmp_path / harness
    build(harness, made)
    inputs = read_corpus(harness)
    assert inputs
    done = subprocess.run(
        [str(made), f"+{VARIANTS}", str(corpus_file(harness))], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stderr == ""
    assert int(done.stdout) == len(inputs) * (1 + VARIANTS)


def test_an_input_that_is_not_hex_is_named(tmp_path: Path) -> None:
    made, corpus = tmp_path / "walk", tmp_path / "corpus.txt"
    corpus.write_text("00ff\n0x\n")
    build("walk", made)
    done = subprocess.run([str(made), str(corpus)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{corpus}:2: ")
