"""The initramfs: what is in it, that it is the same for the same parts, and what is said when a part is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_vm_cpio import unpack

from backend.vm import initramfs
from backend.vm.cache import Cache
from backend.vm.errors import CannotRun
from backend.vm.initramfs import GUEST_TESTS, GuestFiles, archive, build_initramfs, build_program


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def files(tmp_path: Path) -> GuestFiles:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"\x7fELF busybox")
    return GuestFiles(busybox, None)


def test_everything_is_in_its_place(cache: Path, files: GuestFiles) -> None:
    entries = {entry.name: entry for entry in unpack(archive(files, build_program(Cache(cache))).data)}
    executable = {name for name, entry in entries.items() if entry.fields["mode"] & 0o170111 == 0o100111}
    assert executable == {"init", "bin/busybox", "bin/guest"}
    assert entries["init"].data == (GUEST_TESTS / "init").read_bytes()
    assert entries["init"].data.startswith(b"#!/bin/busybox sh\n")
    checks = sorted(path.name for path in (GUEST_TESTS / "checks").iterdir())
    assert [name.removeprefix("checks/") for name in entries if name.startswith("checks/")] == checks
    assert {"lib.sh", "ask-unmapped.sh", "dev/console", "dev/null"} <= set(entries)
    assert not any(name.startswith(("programs", "modules")) for name in entries)


def test_the_same_parts_give_the_same_archive_once(cache: Path, files: GuestFiles) -> None:
    first = build_initramfs(files, cache)
    whole = first.read_bytes()
    inode = first.stat().st_ino
    again = build_initramfs(files, cache)
    assert (again, again.stat().st_ino) == (first, inode)
    files.busybox.write_bytes(b"\x7fELF another")
    other = build_initramfs(files, cache)
    assert other != first
    assert whole != other.read_bytes()
    assert len(whole) == len(other.read_bytes())


def test_a_changed_script_makes_another_archive(
    cache: Path, files: GuestFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_initramfs(files, cache)
    copy = tmp_path / "guest-tests"
    (copy / "checks").mkdir(parents=True)
    (copy / "programs").symlink_to(GUEST_TESTS / "programs")
    for path in (GUEST_TESTS / "init", *GUEST_TESTS.glob("*.sh"), *GUEST_TESTS.glob("checks/*.sh")):
        (copy / path.relative_to(GUEST_TESTS)).write_bytes(path.read_bytes())
    monkeypatch.setattr(initramfs, "GUEST_TESTS", copy)
    assert build_initramfs(files, cache) == first
    (copy / "checks" / "99-more.sh").write_text(". /lib.sh\n")
    assert build_initramfs(files, cache) != first


def test_file_system_tools_come_with_their_libraries(cache: Path, tmp_path: Path, files: GuestFiles) -> None:
    program = Path("/bin/ls").resolve()
    root = tmp_path / "root"
    (root / "usr/sbin").mkdir(parents=True)
    (root / "usr/sbin/mke2fs").write_bytes(program.read_bytes())
    (root / "usr/lib").mkdir()
    with pytest.raises(CannotRun, match=r"mke2fs cannot be taken into the guest: .* is not below"):
        build_initramfs(GuestFiles(files.busybox, None, root=root), cache)
    for path in ("lib", "lib64", "usr/lib/x86_64-linux-gnu"):
        if Path("/", path).exists() and not (root / path).exists():
            (root / path).symlink_to(Path("/", path))
    entries = unpack(archive(GuestFiles(files.busybox, None, root=root), build_program(Cache(cache))).data)
    names = {entry.name for entry in entries}
    assert "sbin/mkfs.ext4" in names
    assert "sbin/fsck.ext4" not in names
    assert any(name.endswith("/libc.so.6") for name in names)
    assert any("ld-linux" in name for name in names)


def test_without_busybox(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=r"static busybox is not at .*; run `vioasid doctor`"):
        build_initramfs(GuestFiles(tmp_path / "none", None), cache)


def test_without_a_compiler(tmp_path: Path, files: GuestFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CannotRun, match=r"there is no C compiler cc, .*; install gcc and libc6-dev"):
        build_initramfs(files, tmp_path / "cache")


@pytest.mark.parametrize(
    ("says", "fix"), [("cannot find -lc", "install libc6-dev"), ("internal error", "set CC to another compiler")]
)
def test_a_compiler_that_fails(
    tmp_path: Path, files: GuestFiles, monkeypatch: pytest.MonkeyPatch, says: str, fix: str
) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    folder = tmp_path / "cache"
    with pytest.raises(CannotRun, match=f"(?s){says}\n.*did not compile with .*: {fix}"):
        build_initramfs(files, folder)
    assert not any("program" in name for name in os.listdir(folder) if not name.startswith(".lock"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, files: GuestFiles) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotRun, match="VIOASID_CACHE"):
        build_initramfs(files, tmp_path / "file" / "cache")
