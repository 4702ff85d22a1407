"""MessagePack-RPC clients that others wrote: where to get them, kept in the cache like all that is fetched."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.vm import debian
from backend.vm.assets import Asset
from backend.vm.cache import MIB, Cache, Made
from backend.vm.debian import NotThere
from backend.vm.errors import CannotRun
from backend.vm.progress import Report

NPM_PACKAGE = "neovim@5"
INSTALL_SECONDS = 90


# -- The npm package neovim --------------------------------------------------------------------------------------------


def _install(entry: Path, work: Path, report: Report) -> Made:
    report("npm install")
    argv = ["npm", "install", "--prefix", str(entry), "--cache", str(work), "--ignore-scripts", "--no-audit"]
    argv += ["--no-fund", "--no-update-notifier", "--loglevel=error", NPM_PACKAGE]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_SECONDS,
            cwd=entry,
        )
        wrong = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        wrong = f"not done in {INSTALL_SECONDS} seconds"
    if wrong:
        raise CannotRun(
            f"npm cannot install {NPM_PACKAGE}: {wrong[:300]}. Check the network and `npm config get registry`"
        )
    return Made({}, ["node_modules/neovim/package.json"])


@functools.cache
def npm_modules() -> Path | CannotRun:
    """The folder node_modules with the package and what it needs."""
    for program in ("node", "npm"):
        if not shutil.which(program):
            return CannotRun(f"{program} is missing. Run: apt-get install nodejs npm")
    key = {"package": NPM_PACKAGE}
    try:
        entry = Cache().get("npm-neovim", key, what="the npm package neovim", need=30 * MIB, maker=_install)
    except CannotRun as error:
        return error
    return entry.path / "node_modules"


# -- Neovim itself -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Neovim:
    argv: Sequence[str]
    environment: dict[str, str]


def _wanted(path: str) -> bool:
    library = re.fullmatch(r"usr/lib/[^/]+-linux-gnu[^/]*/[^/]+\.so(\.[^/]*)?", path)
    return path == "usr/bin/nvim" or path.startswith("usr/share/nvim/runtime/") or library is not None


def _fetch(suites: Sequence[str], tree: Path, work: Path, report: Report) -> Made:
    debian.extract(NEOVIM.packages, suites, tree, work, keep=_wanted, report=report)
    if not (tree / "usr/bin/nvim").exists():
        raise NotThere("the package neovim holds no nvim")
    return Made({}, ["usr/bin/nvim", "usr/share/nvim/runtime"])


NEOVIM = Asset("neovim", "Neovim", 120 * MIB, ("neovim",), (("trixie",), ("bookworm",), ("forky",), ("sid",)), _fetch)


@functools.cache
def neovim() -> Neovim | CannotRun:
    """The host's Neovim, else Debian's, unpacked and run by its own loader."""
    if host := shutil.which("nvim"):
        return Neovim([host], {})
    try:
        root = NEOVIM.get(Cache()).path
    except CannotRun as error:
        return error
    loader = next(iter(sorted(root.glob("usr/lib/*-linux-gnu*/ld-linux*.so*"))), None)
    if loader is None:
        return CannotRun(f"{root} holds no loader. Remove it to have Neovim fetched again.")
    argv = [str(loader), "--library-path", str(loader.parent), str(root / "usr/bin/nvim")]
    return Neovim(argv, {"VIMRUNTIME": str(root / "usr/share/nvim/runtime")})
