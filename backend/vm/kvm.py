"""Whether KVM works here, seen by booting the very kernel under it, and the accelerator that follows.

/dev/kvm can exist, open, and run the firmware, and still fail in the middle of the kernel ("KVM internal error.
Suberror: 1, emulation failure") where a nested host emulates instructions it does not know. So nothing less than a
kernel that starts counts. The answer is remembered for this boot of the host, this QEMU and this kernel.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backend.vm.cache import Cache
from backend.vm.errors import CannotRun
from backend.vm.kernel_image import Kernel
from backend.vm.progress import shown
from backend.vm.qemu_binary import Qemu

DEVICE = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROBE_SECONDS = 20
"""A kernel under a working KVM panics for want of a root file system within 2 s."""
TOO_SLOW = f"no kernel booted within {PROBE_SECONDS} s"
STARTED = b"Linux version "
BROKEN = b"KVM internal error"
OUTPUT_LIMIT = 1 << 20
"""A kernel without a root prints 30 KiB before it gives up."""


@dataclass(frozen=True, slots=True)
class KvmState:
    works: bool
    exists: bool
    reason: str
    """Why not, or how it was seen to work."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    name: str
    """"kvm" or "tcg", as QEMU's -accel takes it."""
    note: str
    """What to tell the user about the choice; "" if there is nothing to tell."""


def device_state() -> KvmState | None:
    """What /dev/kvm alone says: a state if KVM cannot be used, None if only trying can tell."""
    if not DEVICE.exists():
        return KvmState(False, False, f"{DEVICE} does not exist")
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return KvmState(False, True, f"{DEVICE} cannot be opened: {error.strerror}")
    return None


def probe(qemu: Qemu, kernel: Kernel, cache: Cache | None = None) -> KvmState:
    """Whether `kernel` boots under KVM. Takes up to PROBE_SECONDS the first time, then answers from memory."""
    if state := device_state():
        return state
    memory = (cache or Cache()).root / "kvm.json"
    asked = [BOOT_ID.read_text().strip(), *qemu.argv, qemu.version, str(kernel.vmlinuz), kernel.version]
    try:
        known = json.loads(memory.read_text())
        if known["asked"] == asked:
            return KvmState(bool(known["works"]), True, str(known["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with shown("trying KVM"):
        state = _try(qemu, kernel)
    if state.reason != TOO_SLOW:  # which a busy host can be once
        text = json.dumps({"asked": asked, "works": state.works, "reason": state.reason})
        with suppress(OSError):  # it is only asked again
            memory.parent.mkdir(parents=True, exist_ok=True)
            fresh = memory.with_name(f".kvm-{os.getpid()}")
            fresh.write_text(text)
            fresh.replace(memory)
    return state


def choose(requested: str, qemu: Qemu, kernel: Kernel, cache: Cache | None = None) -> Accelerator:
    """The accelerator for a request of "auto", "kvm" or "tcg". Raises CannotRun if KVM is demanded and fails."""
    if requested == "tcg":
        return Accelerator("tcg", "")
    state = probe(qemu, kernel, cache)
    if state.works:
        return Accelerator("kvm", "")
    if requested == "kvm":
        raise CannotRun(f"KVM does not work here: {state.reason}. {fix(state)} Or use --accel tcg.")
    if not state.exists:
        return Accelerator("tcg", "no KVM here: the guest runs under TCG, slower")
    return Accelerator("tcg", f"KVM exists and does not work ({state.reason}): the guest runs under TCG, slower")


def fix(state: KvmState) -> str:
    """What a user can do about KVM that does not work."""
    if not state.exists:
        return "Load the module kvm_intel or kvm_amd, or enable virtualisation in the firmware or the outer hypervisor."
    if "cannot be opened" in state.reason:
        return "Join its group: adduser $USER kvm, then log in again."
    return "The host's KVM is at fault, mostly because it is nested itself."


def _try(qemu: Qemu, kernel: Kernel) -> KvmState:
    argv = [
        *qemu.argv, "-accel", "kvm", "-machine", "q35", "-cpu", "max", "-m", "512", "-nodefaults", "-no-user-config",
        "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel.vmlinuz),
        "-append", "console=ttyS0 panic=-1",
    ]  # fmt: skip
    output, ended = _run(argv)
    if BROKEN in output:
        line = next(line for line in output.splitlines() if BROKEN in line).decode(errors="replace").strip()
        detail = ", emulation failure" if b"emulation failure" in output else ""
        return KvmState(False, True, f"{line}{detail}")
    if STARTED in output and ended:
        return KvmState(True, True, f"Linux {kernel.version} booted under it")
    if not ended:
        return KvmState(False, True, TOO_SLOW)
    last = next((line for line in reversed(output.splitlines()) if line.strip()), b"QEMU ended without a word")
    return KvmState(False, True, last.decode(errors="replace").strip())


def _run(argv: Sequence[str]) -> tuple[bytes, bool]:
    """Output of QEMU, until it ends, breaks or takes too long; and whether it ended by itself."""
    deadline = time.monotonic() + PROBE_SECONDS
    output = b""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(output) < OUTPUT_LIMIT and selector.select(max(0.0, deadline - time.monotonic())):
                data = os.read(process.stdout.fileno(), 1 << 16)
                output += data
                if not data:
                    process.wait()
                    return output, True
                if BROKEN in output:  # the reason follows in the same breath
                    deadline = min(deadline, time.monotonic() + 0.5)
        return output, False
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
