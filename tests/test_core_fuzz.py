"""The fuzzing harnesses over their corpus, by the host's compiler with its sanitizers; `make fuzz` looks for more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))

from fuzzing import HARNESSES, HERE, compile_command, corpus_file, read_corpus  # noqa: E402

COMPILER = shutil.which("gcc") or shutil.which("cc")
VARIANTS = 60
"""Of each input: a few seconds a harness."""


@pytest.mark.parametrize("harness", HARNESSES)
def test_corpus(harness: str, tmp_path: Path) -> None:
    """Every input kept, those that once failed among them, and some that differ from each by a little."""
    if COMPILER is None:
        pytest.skip("no C compiler: install gcc")
    made = tmp_path / harness
    command = compile_command(harness, made, COMPILER, "address,undefined", HERE / "standalone.c")
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler's run-time for -fsanitize=address,undefined is missing: install libgcc-dev's libasan")
    assert built.returncode == 0, built.stderr
    inputs = read_corpus(harness)
    assert inputs
    done = subprocess.run(
        [str(made), f"+{VARIANTS}", str(corpus_file(harness))], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stderr == ""
    assert int(done.stdout) == len(inputs) * (1 + VARIANTS)


def test_an_input_that_is_not_hex_is_named(tmp_path: Path) -> None:
    if COMPILER is None:
        pytest.skip("no C compiler: install gcc")
    made, corpus = tmp_path / "walk", tmp_path / "corpus.txt"
    corpus.write_text("00ff\n0x\n")
    subprocess.run([*compile_command("walk", made, COMPILER, "address", HERE / "standalone.c")], check=True)
    done = subprocess.run([str(made), str(corpus)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{corpus}:2: ")
