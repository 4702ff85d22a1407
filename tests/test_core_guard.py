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


LOSS = """
import ctypes, faulthandler, mmap, os
from backend.core import RW, Core, Reason
size = 8 * 4096
fd = os.memfd_create("ram")
os.ftruncate(fd, size)
ram = mmap.mmap(fd, size)
hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))
def mapped():
    core = Core()
    core.create_host_space(1)
    core.map(1, 0, hva, size, RW)
    core.attach(8, None, 1)
    return core
def lose(core):
    os.ftruncate(fd, 4096)
    for request in (
        lambda: core.dma_read(8, 0, size), lambda: core.dma_write(8, 0, bytes(size)), lambda: core.dma_fill(8, 0, size),
        lambda: core.dma_copy(8, 0, 4096, 4096), lambda: core.load(8, 4096, 8), lambda: core.store(8, 4096, 1, 8),
        lambda: core.fetch_add(8, 4096, 1, 8), lambda: core.compare_exchange(8, 4096, 0, 1, 16),
    ):
        assert request().reason == Reason.MEMORY_GONE
    os.ftruncate(fd, size)
    assert core.dma_read(8, 0, size) == bytes(size)
"""

ORDERS = {
    "no reporter": "lose(mapped())",
    "reporter before": "faulthandler.enable(); lose(mapped())",
    "reporter after": "core = mapped(); faulthandler.enable(); lose(core)",
    "reporter before and after": "faulthandler.enable(); core = mapped(); faulthandler.enable(); lose(core)",
    "reporter on and off": "core = mapped(); faulthandler.enable(); faulthandler.disable(); lose(core)",
    "reporter between": "core = mapped(); faulthandler.enable(); lose(mapped()); lose(core)",
    "mapped since": "core = mapped(); faulthandler.enable(); core.map(1, 1 << 30, hva, 4096, RW); lose(core)",
}


@pytest.mark.parametrize("order", ORDERS)
def test_lost_memory_is_survived_whoever_handles_signals(order: str) -> None:
    """A reporter in front of the core's handler reports once, by mistake; behind it, it hears nothing."""
    program = LOSS + ORDERS[order]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Bus error") == (order == "reporter after")
    assert not done.stdout


def test_a_wild_pointer_after_a_loss_still_kills() -> None:
    program = LOSS + "core = mapped(); faulthandler.enable(); lose(core); ctypes.string_at(8)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGSEGV
