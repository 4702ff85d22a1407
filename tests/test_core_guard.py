"""Faults of the process that are not the guarded memory's: they end it, as they would without the core."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAMS = {
    "no other handler": "Core()",
    "reporter before": "faulthandler.enable(); Core()",
    "reporter after": "Core(); faulthandler.enable()",
    "reporter between": "Core(); faulthandler.enable(); Core()",
}


def end(preparation: str, fault: str) -> tuple[int, str]:
    program = f"import ctypes, faulthandler, os, signal; from backend.core import Core; {preparation}; {fault}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("preparation", PROGRAMS)
def test_a_wild_pointer_still_kills(preparation: str) -> None:
    code, said = end(PROGRAMS[preparation], "ctypes.string_at(8)")
    assert code == -signal.SIGSEGV
    assert said.count("Segmentation fault") == ("reporter" in preparation)


@pytest.mark.parametrize("preparation", PROGRAMS)
@pytest.mark.parametrize("name", ["SIGBUS", "SIGSEGV"])
def test_a_signal_sent_still_kills(preparation: str, name: str) -> None:
    code, _ = end(PROGRAMS[preparation], f"os.kill(os.getpid(), signal.{name})")
    assert code == -signal.Signals[name]
