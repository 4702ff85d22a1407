"""`make fuzz`: libFuzzer with AddressSanitizer and UndefinedBehaviorSanitizer on the C core; docs/fuzzing.md.

Each harness is a C file of this folder. Its corpus is text, corpus/<harness>.txt: one input a line, in hex. A run works
on a larger one in build/fuzz, which it starts from that file and goes on with the next time. An input that makes a
harness fail is made small and added to the file, so the tests run it from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from backend.core.build import SOURCES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORE = ROOT / "backend" / "core"
BUILD = ROOT / "build" / "fuzz"
HARNESSES = sorted(path.stem for path in HERE.glob("*.c") if path.stem != "standalone")
SLOW = 10
"""Seconds after which one input counts as endless: they take microseconds."""
LONGEST = 400
"""Bytes of an input: a hundred operations, more than any finding has needed."""

COMPARISON = "tests/test_core_formats.py"
COMPARISON_SECONDS = 20
"""What it takes for 200,000 cases."""
MOST = 200
"""Inputs of a harness that the text file keeps, of all sizes alike: the tests run each, some varied."""


@dataclass(frozen=True)
class Outcome:
    harness: str
    executions: int
    seconds: float
    failure: str | None
    """Last lines of the report, if an input failed."""


def build(harnesses: Sequence[str]) -> bool:
    """Compile the core once and link each harness with it: BUILD/<harness>/fuzzer. False: the compiler has said why."""
    wide = ["-mcx16"] if platform.machine() == "x86_64" else []  # clang: no call for a compare-and-swap of 128 bits
    flags = [
        "-std=gnu11", *wide, "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CORE}", f"-I{HERE}",
        "-fno-sanitize-recover=all",
    ]  # fmt: skip
    objects = BUILD / "core"
    objects.mkdir(parents=True, exist_ok=True)
    sanitized = "-fsanitize=fuzzer-no-link,address,undefined"
    commands = [
        ["clang", *flags, sanitized, "-c", "-o", str(objects / f"{source}.o"), str(CORE / f"{source}.c")]
        for source in SOURCES
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(pool.map(_run, commands)):
            return False
        return not any(
            pool.map(
                _run,
                (
                    ["clang", *flags, "-fsanitize=fuzzer,address,undefined", "-o", str(folder(harness, ".") / "fuzzer"),
                     str(HERE / f"{harness}.c"), *(str(objects / f"{source}.o") for source in SOURCES)]
                    for harness in harnesses
                ),
            )
        )  # fmt: skip


def _run(command: list[str]) -> int:
    return subprocess.run(command, check=False).returncode


def corpus_file(harness: str) -> Path:
    return HERE / "corpus" / f"{harness}.txt"


def read_corpus(harness: str) -> list[bytes]:
    """The inputs of the text file; empty if there is none."""
    path = corpus_file(harness)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [bytes.fromhex(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]


def failures_of(harness: str) -> list[str]:
    """The lines that were once failures: those with a comment behind them."""
    path = corpus_file(harness)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in lines if line.partition("#")[0].strip() and "#" in line]


def write_corpus(harness: str, inputs: Sequence[bytes]) -> None:
    """Replace the inputs of the text file; what once failed stays."""
    path = corpus_file(harness)
    path.parent.mkdir(exist_ok=True)
    lines = [*failures_of(harness), *sorted((data.hex() for data in set(inputs)), key=lambda line: (len(line), line))]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def folder(harness: str, name: str) -> Path:
    made = BUILD / harness / name
    made.mkdir(parents=True, exist_ok=True)
    return made


def start(harness: str, seconds: int) -> subprocess.Popen[str]:
    """Start a run on the working corpus."""
    corpus = folder(harness, "corpus")
    for data in read_corpus(harness):
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    log = (BUILD / harness / "log").open("w+", encoding="utf-8", errors="replace")
    command = [
        str(BUILD / harness / "fuzzer"), f"-max_total_time={seconds}", f"-timeout={SLOW}", f"-max_len={LONGEST}",
        "-len_control=0", "-print_final_stats=1", f"-artifact_prefix={folder(harness, 'failures')}/", str(corpus),
    ]  # fmt: skip
    process: subprocess.Popen[str] = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    log.close()
    return process


def start_comparison(seconds: int, seed: int) -> subprocess.Popen[str]:
    """Start the suite that compares the core with the reference, as long as it takes about that time alone."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "comparison.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--timeout=0", "-p", "no:cacheprovider", COMPARISON],
            stdout=log, stderr=log, text=True, cwd=ROOT,
            env={**os.environ, "VIO_CASES": str(max(1, seconds // COMPARISON_SECONDS)), "VIO_SEED": str(seed)},
        )  # fmt: skip


def outcome(harness: str, status: int, seconds: int) -> Outcome:
    """Read what a run has printed."""
    log = (BUILD / harness / "log").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"stat::number_of_executed_units: (\d+)", log) or re.search(r"(?s:.*)^#(\d+)", log, re.M)
    report = [line for line in log.splitlines() if not line.startswith(("#", "\tNEW", "stat::", "NEW_FUNC"))]
    return Outcome(harness, int(found[1]) if found else 0, seconds, "\n".join(report[-40:]) if status else None)


def keep_failures(harness: str, report: str) -> list[Path]:
    """Make each failing input small, and add it to the text file."""
    kept = []
    for path in sorted(folder(harness, "failures").glob("*-*")):
        small = path.with_name("small")
        subprocess.run(
            [str(BUILD / harness / "fuzzer"), "-minimize_crash=1", "-max_total_time=20", f"-timeout={SLOW}",
             f"-exact_artifact_path={small}", str(path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        data = (small if small.exists() else path).read_bytes()
        why = re.search(r"does not hold: .*|ERROR: .*?(?= on | \(|$)|runtime error: .*", report, re.M)
        corpus_file(harness).parent.mkdir(exist_ok=True)
        with corpus_file(harness).open("a", encoding="utf-8") as file:
            file.write(f"{data.hex()} # {why[0] if why else path.name}\n")
        small.unlink(missing_ok=True)
        kept.append(path.rename(BUILD / harness / path.name))
    return kept


def shrink(harness: str) -> None:
    """Keep in the text file some of the fewest inputs that reach what the working corpus reaches."""
    fewest = folder(harness, "fewest")
    for path in fewest.iterdir():
        path.unlink()
    subprocess.run(
        [str(BUILD / harness / "fuzzer"), "-merge=1", "-use_counters=0", str(fewest), str(folder(harness, "corpus"))],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    inputs = sorted((path.read_bytes() for path in fewest.iterdir()), key=lambda data: (len(data), data))
    inputs = [data for data in inputs if data]
    kept = [inputs[i * len(inputs) // MOST] for i in range(MOST)] if len(inputs) > MOST else inputs
    write_corpus(harness, kept)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("harness", nargs="*", choices=[*HARNESSES, []], help=f"of {', '.join(HARNESSES)} (all)")
    parser.add_argument("--time", type=int, default=60, metavar="SECONDS", help="of each, all at once (60)")
    parser.add_argument("--keep", action="store_true", help="afterwards, keep the inputs worth keeping in corpus/")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    args = parser.parse_args()
    chosen: list[str] = args.harness or HARNESSES
    if not build(chosen):
        print("vioasid: the harnesses were not built (see above)", file=sys.stderr)
        return 2
    seed = secrets.randbelow(1 << 32)
    comparison = None if args.harness else start_comparison(args.time, seed)
    running = {harness: start(harness, args.time) for harness in chosen}
    failed = False
    try:
        outcomes = [outcome(harness, process.wait(), args.time) for harness, process in running.items()]
        if comparison is not None:
            failed = comparison.wait() != 0
            print(
                f"vioasid: compared with the reference, VIO_SEED={seed}: see build/fuzz/comparison.log", file=sys.stderr
            )
    except KeyboardInterrupt:
        for process in (*running.values(), *([comparison] if comparison else [])):
            process.terminate()
        return 130
    for one in outcomes:
        if not args.json:
            print(f"{one.harness:<12} {one.executions:>12,} executions, {one.executions / one.seconds:>8,.0f} a second")
        if one.failure is not None:
            kept = keep_failures(one.harness, one.failure)
            print(f"{one.failure}\nvioasid: {one.harness} failed: {', '.join(map(str, kept))}", file=sys.stderr)
            print(f"vioasid: it is in {corpus_file(one.harness)} now, where the tests run it", file=sys.stderr)
        elif args.keep:
            shrink(one.harness)
    if args.json:
        print(json.dumps({"results": [vars(one) for one in outcomes]}))
    return 1 if failed or any(one.failure is not None for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
