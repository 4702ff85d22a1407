"""Files of Debian packages and sources, fetched and checked by apt, without root and beside the host's own apt.

Binary packages come by mmdebstrap in its extract variant: apt downloads them and their dependencies and checks the
signatures, dpkg-deb unpacks them, and no maintainer script runs. As none runs, mode "chrootless" is safe here; it needs
neither root nor user namespaces nor a chroot, so root, users and containers all take this one way. The result arrives
as a tar stream of which only the members asked for are written down: no set-uid program, no device node, no foreign
owner.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from backend.vm.errors import CannotRun
from backend.vm.progress import Report

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

CODENAMES = ("bullseye", "bookworm", "trixie", "forky", "duke", "sid")
SUITES = frozenset((*CODENAMES, "oldoldstable", "oldstable", "stable", "testing", "unstable"))

PHASES = {
    "running apt-get update": "asking the mirror",
    "downloading packages": "downloading packages",
    "extracting archives": "unpacking",
    "creating tarball": "copying",
}


class NotThere(Exception):
    """This suite of this mirror has not what was asked for; another may. The message says what was wrong."""


@dataclass(frozen=True, slots=True)
class Mirror:
    url: str
    source: str
    """Who named it: "VIOASID_MIRROR", "apt" or "mmdebstrap"."""


# -- the mirror ------------------------------------------------------------------------------------------------------


def find_mirror() -> Mirror:
    """$VIOASID_MIRROR, else the mirror of the host's own apt where that is Debian's, else mmdebstrap's default.

    Raises CannotRun when the variable is no URL of a mirror, or nothing on this host names one.
    """
    if own := os.environ.get("VIOASID_MIRROR"):
        if not re.fullmatch(r"[a-z0-9+.-]+:/\S+", own):
            raise CannotRun(f"VIOASID_MIRROR is {own!r}, no URL. Set it to a Debian mirror, as scheme://host/debian.")
        return Mirror(own.rstrip("/"), "VIOASID_MIRROR")
    if url := _host_mirror():
        return Mirror(url, "apt")
    if url := _default_mirror():
        return Mirror(url, "mmdebstrap")
    raise CannotRun("No Debian mirror is known here. Set VIOASID_MIRROR to one, as scheme://host/debian.")


def _host_mirror() -> str | None:
    """The site that the host's apt takes Debian's main archive from.

    The release file says whose archive it is once it was downloaded; before that only names can tell, and third parties
    use Debian's suite names too, so an unknown origin counts only if its URL ends as Debian's mirrors do.
    """
    fields = "$(SITE) $(RELEASE) $(COMPONENT) origin=$(ORIGIN)"
    named = []
    for line in _output(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]).splitlines():
        site, release, component, origin = (line.split(" ", 3) + [""] * 4)[:4]
        origin = origin.removeprefix("origin=")
        suite, _, part = release.partition("-")
        if component != "main" or suite not in SUITES or part.startswith("security") or site.startswith("cdrom:"):
            continue
        if origin == "Debian" or (origin in ("", "$(ORIGIN)") and site.rstrip("/").endswith("/debian")):
            named.append((origin == "Debian", site.rstrip("/")))
    # max() keeps the first of equals: the order of the host's own sources
    return _first_of_list(max(named, key=lambda known: known[0])[1]) if named else None


def _first_of_list(site: str) -> str:
    """A site "mirror+file:PATH" (cloud images have it) names a file that lists mirrors; anything else is itself."""
    scheme, _, path = site.partition(":")
    if scheme != "mirror+file":
        return site
    try:
        for line in Path("/" + path.lstrip("/")).read_text().splitlines():
            if url := line.partition("#")[0].split():
                return url[0].rstrip("/")
    except OSError:
        pass
    return site


def _default_mirror() -> str | None:
    """What mmdebstrap would write into sources.list itself; it is stopped before it fetches anything."""
    hook = '--setup-hook=cat "$1/etc/apt/sources.list" >&2; exit 1'
    shown = _output(["mmdebstrap", "--mode=chrootless", "--variant=custom", hook, "trixie", "-"], stderr=True)
    found = re.search(r"^deb (?:\[[^]]*\] )?(\S+) trixie main", shown, re.MULTILINE)
    return found[1].rstrip("/") if found else None


def _output(argv: Sequence[str], *, stderr: bool = False) -> str:
    """Standard output of a short command ("" if it cannot run), with stderr mixed in on request."""
    merged = subprocess.STDOUT if stderr else subprocess.DEVNULL
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=merged, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def host_settings() -> list[str]:
    """The host's apt settings for reaching its mirror (proxies, certificates, clock checks), as lines of apt.conf."""
    wanted = re.compile(r"Acquire::((https?|ftp)::|(Check-Valid-Until|Check-Date|Max-ValidTime|ForceIPv[46]) )")
    lines = _output(["apt-config", "dump"]).splitlines()
    return [line for line in lines if wanted.match(line) and not line.endswith(' "";')]


FETCH_SETTINGS = (
    'APT::Install-Recommends "false";',
    'APT::Sandbox::User "root";',  # user _apt cannot enter a cache folder under a private home
    'Acquire::Languages "none";',
    'Acquire::Retries "2";',
    'Acquire::http::Timeout "30";',  # of silence: a mirror that stalls is an error, not a hang
    'Acquire::https::Timeout "30";',
)


# -- binary packages -------------------------------------------------------------------------------------------------


def extract(
    packages: Sequence[str],
    suites: Sequence[str],
    into: Path,
    work: Path,
    *,
    keep: Callable[[str], bool],
    report: Report,
    arch: str | None = None,
) -> None:
    """Write the members of `packages` and of their dependencies for which keep(path) holds below `into`.

    `suites`: the base suite, then those laid over it; the last is preferred. `arch`: a Debian architecture, default the
    host's. Paths are those of a merged /usr ("usr/bin/busybox"). Raises NotThere, CannotRun, or OSError while writing.
    """
    mirror = find_mirror()
    need_program("mmdebstrap", "mmdebstrap")
    argv = ["mmdebstrap", "--mode=chrootless", "--variant=extract", "--format=tar"]
    argv += [f"--include={','.join(packages)}"]
    argv += [f"--architectures={arch}"] if arch else []
    argv += [f"--aptopt={line.rstrip(';')}" for line in (*host_settings(), *FETCH_SETTINGS)]
    argv += [f'--aptopt=APT::Default-Release "{suites[-1]}"', suites[0], "-"]
    argv += [f"deb [signed-by={keyring()}] {mirror.url} {suite} main" for suite in suites]
    log: list[str] = []
    with _running(argv, work, log, report) as process:
        _unpack(process, into, keep)
        status = process.wait()
    if status != 0:
        raise _explain(log, mirror, ", ".join(packages), " + ".join(suites))


LIFELINE = 'exec 3<&0; { cat <&3; kill -KILL 0; } >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'
"""Shell: end the process group once the writer of stdin is gone, by whatever death, and run the command beside."""


@contextmanager
def _running(argv: Sequence[str], work: Path, log: list[str], report: Report) -> Iterator[subprocess.Popen[bytes]]:
    """A child in its own process group, which ends as a whole when the block is left or this process dies.

    `log` has the last lines of its stderr once the block was left.

    mmdebstrap's own answer to signals takes up to a minute, and all it would tidy up lies in `work`.
    """
    process = subprocess.Popen(
        ["sh", "-c", LIFELINE, "sh", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(work), "LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )
    reader = threading.Thread(target=_read_log, args=(process, log, report), daemon=True)
    reader.start()
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()


def _read_log(process: subprocess.Popen[bytes], log: list[str], report: Report) -> None:
    assert process.stderr
    for raw in process.stderr:
        line = raw.decode(errors="replace").rstrip()
        log.append(line)
        del log[:-200]  # the end holds the reason; a child that babbles takes no memory
        for start, phase in PHASES.items():
            if line.startswith(f"I: {start}"):
                report(phase)


def _unpack(process: subprocess.Popen[bytes], into: Path, keep: Callable[[str], bool]) -> None:
    assert process.stdout
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                path = merged_usr(member.name)
                if path and keep(path):
                    _write_member(tar, member, into / path)
    except tarfile.ReadError:
        pass  # cut short: the exit status and the log say why
    while process.stdout.read(1 << 16):  # padding after the last member
        pass


def merged_usr(name: str) -> str | None:
    """A member's path as it is where / and /usr are merged; None for a path that would leave the tree."""
    parts = [part for part in PurePosixPath(name).parts if part not in (".", "/")]
    if not parts or ".." in parts:
        return None
    if parts[0] in ("bin", "sbin", "lib", "lib64"):
        parts.insert(0, "usr")
    return "/".join(parts)


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """One member: a file with plain permissions, or a relative link. Folders follow from files; the rest is dropped."""
    if member.isreg():
        target.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(member)
        assert source
        with open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        target.chmod(0o755 if member.mode & 0o111 else 0o644)
    elif member.issym() and not member.linkname.startswith("/"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(member.linkname)


# -- sources ---------------------------------------------------------------------------------------------------------


def source(package: str, suite: str, folder: str, into: Path, work: Path, *, report: Report) -> str:
    """Unpack `folder` of the upstream tarball of source `package` into `into`; give the package's version.

    A private apt, configured by its own file alone, so that no hook of the host's apt runs.
    Raises NotThere, CannotRun, or OSError while writing.
    """
    mirror = find_mirror()
    need_program("xz", "xz-utils")
    for made in ("etc", "state/lists/partial", "cache/archives/partial", "source"):
        (work / made).mkdir(parents=True)
    (work / "etc/status").touch()
    (work / "etc/sources.list").write_text(f"deb-src [signed-by={keyring()}] {mirror.url} {suite} main\n")
    places = {
        "Dir::Etc::main": "/dev/null", "Dir::Etc::parts": "/dev/null", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::sourcelist": work / "etc/sources.list", "Dir::State": work / "state",
        "Dir::State::status": work / "etc/status", "Dir::Cache": work / "cache",
    }  # fmt: skip
    settings = [*host_settings(), *FETCH_SETTINGS, *(f'{name} "{value}";' for name, value in places.items())]
    (work / "etc/apt.conf").write_text("\n".join(settings) + "\n")
    for phase, verb in (("asking the mirror", ["update"]), ("downloading", ["source", "--download-only", package])):
        report(phase)
        log = _apt(["apt-get", "-q", *verb], work)
        if log is not None:
            raise _explain(log, mirror, f"source {package}", suite)
    report("unpacking")
    tarballs = sorted((work / "source").glob("*.orig.tar.*"))
    if not tarballs:
        raise NotThere(f"source {package} has no upstream tarball")
    unpacked = work / "unpacked"
    unpacked.mkdir()
    argv = ["tar", "-x", "-f", str(tarballs[0]), "-C", str(unpacked), "--no-same-owner", "--wildcards", f"*/{folder}/*"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    text = done.stderr.decode(errors="replace")
    found = list(unpacked.glob(f"*/{folder}"))
    if FULL.search(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode != 0 or not found:
        raise NotThere(f"source {package} holds no {folder}")
    found[0].rename(into)
    return tarballs[0].name.removeprefix(f"{package}_").split(".orig.")[0]


def _apt(argv: Sequence[str], work: Path) -> list[str] | None:
    """Run the private apt; None if all went well, else the lines it printed."""
    done = subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=work / "source",
        env={**os.environ, "APT_CONFIG": str(work / "etc/apt.conf"), "TMPDIR": str(work), "LC_ALL": "C.UTF-8"},
        check=False,
    )
    lines = done.stdout.decode(errors="replace").splitlines()
    # an update that reached nothing is but a warning to apt
    failed = done.returncode != 0 or any(line.startswith(("E: ", "W: Failed to fetch", "Err:")) for line in lines)
    return lines if failed else None


# -- what goes wrong -------------------------------------------------------------------------------------------------


def need_program(name: str, package: str) -> None:
    """Raise CannotRun if the host has no program `name`, which `package` holds."""
    if not shutil.which(name):
        raise CannotRun(f"{name} is not installed. Run: apt-get install {package}")


def keyring() -> Path:
    """The file with the keys that sign Debian's archive."""
    if not KEYRING.exists():
        raise CannotRun(f"{KEYRING} is missing, so nothing can be checked. Run: apt-get install debian-archive-keyring")
    return KEYRING


FULL = re.compile(r"No space left on device|Disk quota exceeded|enough free space")
UNREACHABLE = re.compile(
    r"could not (resolve|connect)|temporary failure|connection (refused|timed out|failed|reset)|unable to connect|"
    r"network is unreachable|no route to host|cannot initiate|not find the server|certificate|handshake|"
    r"50[234] |40[37] |method driver .* could not be found|proxy",
    re.IGNORECASE,
)
UNSIGNED = re.compile(
    r"NO_PUBKEY|not signed|EXPKEYSIG|signatures? (couldn't be verified|were invalid)|Missing key", re.IGNORECASE
)
ABSENT = re.compile(
    r"unable to (locate|find a source) package|no installation candidate|does not have a release file|\b404\b|"
    r"file not found|is invalid for apt::default-release|unmet dependencies|hash sum mismatch",
    re.IGNORECASE,
)


def _explain(log: Sequence[str], mirror: Mirror, what: str, suites: str) -> Exception:
    """The error for a failed fetch, from what apt and mmdebstrap printed."""
    if any(FULL.search(line) for line in log):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def first(pattern: re.Pattern[str]) -> str | None:
        return next((line.strip() for line in log if not line.startswith("I: ") and pattern.search(line)), None)

    if line := first(UNSIGNED):
        return CannotRun(
            f"{mirror.url} ({suites}) is not signed by a key in {KEYRING}: {line}. "
            "Run: apt-get install --only-upgrade debian-archive-keyring"
        )
    if line := first(UNREACHABLE):
        return CannotRun(
            f"The mirror {mirror.url} cannot be reached: {line}. "
            "Check the network and its proxy, or set VIOASID_MIRROR to a Debian mirror that this machine reaches."
        )
    if line := first(ABSENT):
        return NotThere(f"{what}: {line}")
    told = [line for line in log if line.strip() and not line.startswith("I: ")]
    errors = [line for line in told if line.startswith("E: ")] or told[-3:] or ["it was killed"]
    return CannotRun(
        f"Fetching {what} from {mirror.url} ({suites}) failed: {'; '.join(errors)}. "
        "Run it again, or set VIOASID_MIRROR to another Debian mirror."
    )
