"""Which QEMU, kernel and libvfio-user a run gets, and how the suites are tried in turn."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_programs import FakePrograms

from backend.vm import assets, libvfio_user, qemu_binary
from backend.vm.assets import Asset
from backend.vm.cache import Cache, Made
from backend.vm.debian import NotThere
from backend.vm.errors import CannotRun
from backend.vm.libvfio_user import SONAME, compile_source, missing_from
from backend.vm.progress import Report
from backend.vm.qemu_binary import DoesNotRun, Unfit, unpacked_argv, wanted


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePrograms:
    monkeypatch.setenv("VIOASID_MIRROR", "http://m.example/debian")
    return FakePrograms(tmp_path / "bin", monkeypatch)


def qemu_script(version: str, devices: str) -> str:
    return f"""case "$*" in
        --version) echo 'QEMU emulator version {version}' ;;
        '-device help') echo '{devices}' ;;
    esac"""


VFIO_USER = 'name "vfio-pci", bus PCI\nname "vfio-user-pci", bus PCI, desc "VFIO over socket PCI device assignment"'


# -- QEMU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["10.1.0", "10.1.0-rc1 (v10.1.0-rc1)", "11.0.50 (Debian 1:11.1.3+ds-1)", "100.0.0"])
def test_the_hosts_qemu_comes_first(programs: FakePrograms, tmp_path: Path, version: str) -> None:
    path = programs.add(qemu_binary.PROGRAM, qemu_script(version, VFIO_USER))
    found = assets.qemu(Cache(tmp_path / "cache"))
    assert (found.argv, found.source) == ([str(path)], "host")
    assert version.startswith(found.version)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (qemu_script("10.0.13", VFIO_USER), "10.1 is the first that has"),
        (qemu_script("9.2.0", VFIO_USER), "10.1 is the first that has"),
        (qemu_script("11.1.3", 'name "vfio-pci", bus PCI'), "built without vfio-user-pci"),
        ("echo hello", "is no QEMU"),
        ("echo broken >&2; exit 1", "does not run: broken"),
    ],
)
def test_a_qemu_that_does_not_fit(programs: FakePrograms, script: str, reason: str) -> None:
    programs.add(qemu_binary.PROGRAM, script)
    with pytest.raises(Unfit, match=reason):
        qemu_binary.find_host()


def test_no_qemu_on_the_host(programs: FakePrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(programs.folder))
    with pytest.raises(Unfit, match="no QEMU is installed"):
        qemu_binary.find_host()


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("usr/bin/qemu-system-x86_64", True),
        ("usr/bin/qemu-system-i386", False),
        ("usr/lib/x86_64-linux-gnu/libc.so.6", True),
        ("usr/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1", True),
        ("usr/lib/x86_64-linux-gnu/libc.a", False),
        ("usr/lib/x86_64-linux-gnu/gconv/UTF-16.so", False),
        ("usr/share/qemu/bios-256k.bin", True),
        ("usr/share/seabios/bios-256k.bin", True),
        ("usr/share/doc/qemu/copyright", False),
    ],
)
def test_members_that_qemu_needs(path: str, kept: bool) -> None:
    assert wanted(path) is kept


def test_an_unpacked_qemu_runs_by_its_own_loader(tmp_path: Path) -> None:
    with pytest.raises(Unfit, match="holds no QEMU"):
        unpacked_argv(tmp_path)
    libraries = tmp_path / "usr/lib/x86_64-linux-gnu"
    for path in (libraries / "ld-linux-x86-64.so.2", tmp_path / "usr/bin/qemu-system-x86_64"):
        path.parent.mkdir(parents=True)
        path.touch()
    argv = unpacked_argv(tmp_path)
    loader, program = str(libraries / "ld-linux-x86-64.so.2"), str(tmp_path / "usr/bin/qemu-system-x86_64")
    assert argv[:4] == [loader, "--library-path", str(libraries), program]
    with pytest.raises(DoesNotRun, match="Permission denied"):
        qemu_binary.check(argv)


# -- suites ----------------------------------------------------------------------------------------------------------


def asset(answers: dict[str, Exception | None], asked: list[str]) -> Asset:
    def fetch(suites: Sequence[str], tree: Path, work: Path, report: Report) -> Made:
        asked.append(suites[-1])
        (tree / "from").write_text(suites[-1])
        if error := answers[suites[-1]]:
            raise error
        return Made({"suite": suites[-1]}, ["from"])

    return Asset("thing", "a thing", 1, ("package",), [[suite] for suite in answers], fetch)


def test_the_next_suite_is_tried_where_one_has_it_not(tmp_path: Path) -> None:
    asked: list[str] = []
    found = asset({"one": NotThere("404"), "two": Unfit("too old"), "three": None, "four": None}, asked).get(
        Cache(tmp_path)
    )
    assert asked == ["one", "two", "three"]
    assert (found.path / "from").read_text() == found.facts["suite"] == "three"


def test_no_suite_has_it(programs: FakePrograms, tmp_path: Path) -> None:
    answers: dict[str, Exception | None] = {"one": NotThere("404"), "two": NotThere("404"), "three": Unfit("too old")}
    with pytest.raises(CannotRun, match=r"has not a thing \(one, two: 404; three: too old\). Set VIOASID_MIRROR"):
        asset(answers, []).get(Cache(tmp_path))


def test_a_mirror_that_is_gone_ends_the_search(tmp_path: Path) -> None:
    asked: list[str] = []
    with pytest.raises(CannotRun, match="gone"):
        asset({"one": CannotRun("gone"), "two": None}, asked).get(Cache(tmp_path))
    assert asked == ["one"]


def test_what_is_asked_for_is_the_key(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = asset({"one": None}, []).get(cache)
    second = asset({"one": None, "two": None}, []).get(cache)
    assert first.path != second.path


# -- libvfio-user ----------------------------------------------------------------------------------------------------


def source_tree(root: Path, functions: Sequence[str]) -> Path:
    (root / "include").mkdir(parents=True)
    (root / "lib").mkdir()
    (root / "include/libvfio-user.h").touch()
    for name in libvfio_user.SOURCES:
        (root / "lib" / f"{name}.c").touch()
    exported = '__attribute__((visibility("default")))'
    text = "".join(f"{exported} int {name}(void) {{ return 0; }}\n" for name in functions)
    (root / "lib/pci.c").write_text(f"#include <json.h>\n{text}int hidden(void) {{ return json_object_get_int(0); }}\n")
    (root / "LICENSE").write_text("BSD")
    return root


needs_json_c = pytest.mark.skipif(
    not any(Path(folder, "json.h").exists() for folder in libvfio_user.JSON_C_HEADERS) or not shutil.which("cc"),
    reason="json-c's headers or a compiler are absent: apt-get install gcc libc6-dev libjson-c-dev",
)


@needs_json_c
def test_a_library_is_compiled_and_loads(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    made = libvfio_user.lay_out(source_tree(tmp_path / "source", libvfio_user.NEEDED), entry)
    assert made.library == entry / "lib" / SONAME
    assert missing_from(str(made.library)) == []
    assert made.include is not None
    assert (made.include / "libvfio-user.h").exists()


@needs_json_c
def test_a_source_that_lacks_a_function(tmp_path: Path) -> None:
    source = source_tree(tmp_path / "source", libvfio_user.NEEDED[1:])
    with pytest.raises(CannotRun, match=f"lacks {libvfio_user.NEEDED[0]}"):
        compile_source(source, tmp_path / SONAME)


@needs_json_c
def test_a_source_that_does_not_compile(tmp_path: Path) -> None:
    source = source_tree(tmp_path / "source", libvfio_user.NEEDED)
    (source / "lib/irq.c").write_text("this is no C\n")
    with pytest.raises(CannotRun, match=r"cannot be compiled: .*irq\.c.*error"):
        compile_source(source, tmp_path / SONAME)


@needs_json_c
def test_the_variable_names_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, old = tmp_path / SONAME, tmp_path / "old.so"
    compile_source(source_tree(tmp_path / "source", libvfio_user.NEEDED), built)
    monkeypatch.setenv("VIOASID_LIBVFIO_USER", str(built))
    found = assets.libvfio_user(Cache(tmp_path / "cache"))
    assert (found.library, found.source) == (built, "host")
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(old)], check=True)
    for path, problem in ((old, "lacks vfu_create_ctx"), (tmp_path / "absent.so", "does not load")):
        monkeypatch.setenv("VIOASID_LIBVFIO_USER", str(path))
        with pytest.raises(CannotRun, match=f"VIOASID_LIBVFIO_USER is {path}, which {problem}"):
            assets.libvfio_user(Cache(tmp_path / "cache"))
