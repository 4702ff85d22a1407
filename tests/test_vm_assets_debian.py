"""Fetching from Debian: which mirror, which members are kept, and what each way to fail says."""

import io
import shutil
import socket
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_programs import FakePrograms

from backend.vm import debian
from backend.vm.debian import NotThere, extract, find_mirror, merged_usr
from backend.vm.errors import CannotRun


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePrograms:
    monkeypatch.delenv("VIOASID_MIRROR", raising=False)
    fake = FakePrograms(tmp_path / "bin", monkeypatch)
    keyring = tmp_path / "keys.gpg"
    keyring.touch()
    monkeypatch.setattr(debian, "KEYRING", keyring)
    return fake


def quiet(phase: str) -> None:
    pass


# -- the mirror ------------------------------------------------------------------------------------------------------


def test_the_variable_comes_first(programs: FakePrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.add("apt-get", "echo http://host.example/debian trixie main origin=Debian")
    monkeypatch.setenv("VIOASID_MIRROR", "https://own.example/debian/")
    assert (find_mirror().url, find_mirror().source) == ("https://own.example/debian", "VIOASID_MIRROR")
    for bad in ("own.example", "http://two words", "-x"):
        monkeypatch.setenv("VIOASID_MIRROR", bad)
        with pytest.raises(CannotRun, match=r"VIOASID_MIRROR is .*, no URL"):
            find_mirror()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["http://m.example/debian trixie main origin=Debian"], "http://m.example/debian"),
        # lists not downloaded yet: the origin is not known, the name of the folder has to do
        (["http://m.example/debian/ bookworm main origin="], "http://m.example/debian"),
        (["http://m.example/debian bookworm-updates main origin=$(ORIGIN)"], "http://m.example/debian"),
        (
            ["https://a.example/debian bookworm main origin=", "http://m.example/d trixie main origin=Debian"],
            "http://m.example/d",
        ),
        # third parties use Debian's suite names
        (
            [
                "https://other.example/debian/12/prod bookworm main origin=other",
                "http://m.example/d trixie main origin=Debian",
            ],
            "http://m.example/d",
        ),
        (
            [
                "http://sec.example/debian-security trixie-security main origin=Debian",
                "cdrom:[Debian]/ trixie main origin=Debian",
                "http://m.example/debian trixie contrib origin=Debian",
                "http://a.example/debian trixie main origin=Debian",
                "http://b.example/debian trixie main origin=Debian",
            ],
            "http://a.example/debian",
        ),
    ],
)
def test_the_mirror_of_the_hosts_apt(programs: FakePrograms, lines: Sequence[str], expected: str) -> None:
    programs.add("apt-get", "\n".join(f"echo '{line}'" for line in lines))
    assert (find_mirror().url, find_mirror().source) == (expected, "apt")


def test_a_list_of_mirrors_gives_its_first(programs: FakePrograms, tmp_path: Path) -> None:
    listed = tmp_path / "mirrors.list"
    listed.write_text("# mirrors\n\nhttps://one.example/debian/ priority:1\nhttps://two.example/debian\n")
    programs.add("apt-get", f"echo mirror+file:{listed} trixie main origin=Debian")
    assert find_mirror().url == "https://one.example/debian"


@pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="mmdebstrap is absent: apt-get install mmdebstrap")
def test_a_host_of_another_kind_takes_the_default_of_mmdebstrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, config = tmp_path / "sources.list", tmp_path / "apt.conf"
    sources.write_text("deb http://archive.example/ubuntu noble main\n")
    config.write_text(f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "/dev/null";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    monkeypatch.delenv("VIOASID_MIRROR", raising=False)
    mirror = find_mirror()
    assert mirror.source == "mmdebstrap"
    assert mirror.url.startswith("http")


def test_no_mirror_at_all(programs: FakePrograms) -> None:
    programs.add("apt-get", "exit 1")
    programs.add("mmdebstrap", "exit 1")
    with pytest.raises(CannotRun, match=r"No Debian mirror is known here\. Set VIOASID_MIRROR"):
        find_mirror()


def test_settings_for_reaching_the_mirror_are_the_hosts(programs: FakePrograms) -> None:
    lines = ['Acquire::http::Proxy "http://p.example:1";', 'Acquire::Check-Date "false";']
    other = ['Acquire::https "";', 'APT::Architecture "amd64";', 'Acquire::IndexTargets::deb "";']
    programs.add("apt-config", "\n".join(f"echo '{line}'" for line in lines + other))
    assert debian.host_settings() == lines


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./usr/bin/busybox", "usr/bin/busybox"),
        ("./bin/busybox", "usr/bin/busybox"),
        ("lib/modules/6/x.ko", "usr/lib/modules/6/x.ko"),
        ("./boot/vmlinuz-6", "boot/vmlinuz-6"),
        ("/etc/passwd", "etc/passwd"),
        ("./a/../../etc/passwd", None),
        ("./", None),
    ],
)
def test_paths_of_a_merged_usr(name: str, expected: str | None) -> None:
    assert merged_usr(name) == expected


def archive(path: Path) -> None:
    with tarfile.open(path, "w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "", data: bytes = b"") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.linkname, member.size, member.uid = kind, mode, link, len(data), 12345
            tar.addfile(member, io.BytesIO(data))

        add("./usr", tarfile.DIRTYPE)
        add("./usr/bin/plain", data=b"plain", mode=0o4755)
        add("./lib/text", data=b"text", mode=0o666)
        add("./usr/bin/near", tarfile.SYMTYPE, link="plain")
        add("./usr/bin/far", tarfile.SYMTYPE, link="/etc/passwd")
        add("./usr/dev-null", tarfile.CHRTYPE)
        add("./usr/share/doc/unwanted", data=b"x")
        add("./usr/../../escape", data=b"x")


def test_only_plain_files_and_near_links_are_written(programs: FakePrograms, tmp_path: Path) -> None:
    archive(tmp_path / "packages.tar")
    programs.add("apt-get", "echo http://m.example/debian trixie main origin=Debian")
    programs.add("mmdebstrap", f"echo 'I: running apt-get update...' >&2\ncat {tmp_path}/packages.tar")
    tree, work = tmp_path / "tree", tmp_path / "work"
    work.mkdir()
    phases: list[str] = []

    def keep(path: str) -> bool:
        return "unwanted" not in path

    extract(["one", "two"], ["trixie", "trixie-backports"], tree, work, keep=keep, report=phases.append)
    written = {str(path.relative_to(tree)): path for path in tree.rglob("*") if not path.is_dir()}
    assert sorted(written) == ["usr/bin/near", "usr/bin/plain", "usr/lib/text"]
    assert written["usr/bin/near"].read_text() == "plain"
    assert written["usr/bin/plain"].stat().st_mode & 0o7777 == 0o755  # no set-uid bit
    assert written["usr/lib/text"].stat().st_mode & 0o7777 == 0o644
    assert phases == ["asking the mirror"]
    asked = programs.calls("mmdebstrap").splitlines()
    assert "--include=one,two" in asked
    assert asked[-4:-2] == ["trixie", "-"]
    assert asked[-1] == f"deb [signed-by={debian.KEYRING}] http://m.example/debian trixie-backports main"


# -- what goes wrong -------------------------------------------------------------------------------------------------


def fetch(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    extract(["qemu"], ["trixie"], tmp_path / "tree", work, keep=lambda path: True, report=quiet)


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ("W: Failed to fetch x  Could not resolve 'm.example'", CannotRun, "cannot be reached.*VIOASID_MIRROR"),
        ("W: x  Could not connect to m.example:80 (10.0.0.1), connection timed out", CannotRun, "cannot be reached"),
        ("E: Unable to locate package qemu", NotThere, "qemu: E: Unable to locate package qemu"),
        ("E: The repository 'http://m trixie Release' does not have a Release file.", NotThere, "Release file"),
        ("E: The value 'trixie-backports' is invalid for APT::Default-Release", NotThere, "invalid"),
        ("W: GPG error: ... NO_PUBKEY 6ED0E7B82643E131", CannotRun, "debian-archive-keyring"),
        ("tar: x: Cannot write: No space left on device", OSError, "No space left on device"),
        ("E: You don't have enough free space in /x.", OSError, "No space left on device"),
        ("E: something never seen", CannotRun, "E: something never seen"),
        ("", CannotRun, "it was killed"),
    ],
)
def test_each_failure_says_what_to_do(
    programs: FakePrograms, tmp_path: Path, said: str, error: type[Exception], message: str
) -> None:
    programs.add("apt-get", "echo http://m.example/debian trixie main origin=Debian")
    programs.add("mmdebstrap", f'echo "I: running apt-get update..." >&2\necho "{said}" >&2\nexit 1')
    with pytest.raises(error, match=message):
        fetch(tmp_path)


def test_a_stream_that_ends_too_early_is_a_failure(programs: FakePrograms, tmp_path: Path) -> None:
    archive(tmp_path / "packages.tar")
    programs.add("apt-get", "echo http://m.example/debian trixie main origin=Debian")
    programs.add("mmdebstrap", f"head -c 1300 {tmp_path}/packages.tar\nkill -KILL $$")
    with pytest.raises(CannotRun, match="Run it again"):
        fetch(tmp_path)


def test_missing_tools_and_keys_are_named(
    programs: FakePrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.add("apt-get", "echo http://m.example/debian trixie main origin=Debian")
    monkeypatch.setenv("PATH", str(programs.folder))
    with pytest.raises(CannotRun, match="apt-get install mmdebstrap"):
        fetch(tmp_path)
    programs.add("mmdebstrap", "exit 1")
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "absent.gpg")
    with pytest.raises(CannotRun, match="apt-get install debian-archive-keyring"):
        fetch(tmp_path)


@pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="mmdebstrap is absent: apt-get install mmdebstrap")
def test_a_mirror_that_answers_nobody(programs: FakePrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/debian"
        monkeypatch.setenv("VIOASID_MIRROR", url)
        monkeypatch.setattr(debian, "FETCH_SETTINGS", ('Acquire::Retries "0";',))
        with pytest.raises(CannotRun, match=f"The mirror {url} cannot be reached: .*Connection refused"):
            fetch(tmp_path)
        source_work = tmp_path / "source-work"
        source_work.mkdir()
        with pytest.raises(CannotRun, match=f"The mirror {url} cannot be reached: .*Connection refused"):
            debian.source("qemu", "trixie", "folder", tmp_path / "source", source_work, report=quiet)
    assert not (tmp_path / "tree").exists()
    assert not (tmp_path / "source").exists()
    assert list((tmp_path / "work").iterdir()) == []
