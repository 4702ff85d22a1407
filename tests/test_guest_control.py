"""A guest's run seen through its control socket: the VM's stage 2, and the guest's domains beneath it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_serving import COMMAND

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

SECONDS = 300


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def boot(tmp_path: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "run").mkdir(mode=0o700)
    with subprocess.Popen([*COMMAND, "boot", "--json"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.terminate()


def asked(environment: dict[str, str], *arguments: str) -> Any:
    """What a verb says as JSON; None while there is no run to ask."""
    done = subprocess.run(
        [*COMMAND, *arguments, "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in {0, 2}, done.stderr
    return json.loads(done.stdout) if done.returncode == 0 else None


def test_spaces_and_faults_of_a_running_guest(boot: subprocess.Popen[str], environment: dict[str, str]) -> None:
    """The run is found without its name; its one context holds the stage 2 and, beneath it, the guest's domains."""
    domains: list[dict[str, Any]] = []
    stage2: dict[str, Any] = {}
    faults: list[dict[str, Any]] = []
    deadline = time.monotonic() + SECONDS
    while boot.poll() is None and time.monotonic() < deadline and not (domains and faults):
        found = asked(environment, "spaces")
        if found is not None:
            (context,) = found["contexts"]
            assert context["name"] == "q35-amd" and context["devices"] >= 2
            stage2 = context["spaces"][0]
            domains = domains or [each for each in context["spaces"] if each["parent"] is not None and each["attached"]]
        if domains:
            answer = asked(environment, "faults")
            faults = [] if answer is None else answer["faults"]
        time.sleep(0.1)
    assert boot.stdout is not None
    report = json.loads(boot.stdout.read())
    assert boot.wait(SECONDS) == 0 and report["ok"]

    assert (stage2["kind"], stage2["format"]["vendor"]) == ("vm", "amd-v1")
    assert stage2["mappings"] > 0 and stage2["mapped"] >= 256 << 20
    assert "iommu" in {each["name"] for each in stage2["attached"]}
    domain = domains[0]
    assert (domain["kind"], domain["parent"]) == ("user", stage2["ioasid"])
    assert domain["format"]["vendor"] == "amd-v1" and domain["root"] is not None
    assert [each["routes"] for each in domain["attached"]] == [True]
    # DMA that the checks had the controller do, and that the guest did not allow
    assert {fault["reason"] for fault in faults} <= {"NOT_PRESENT", "PERMISSION"} and faults
