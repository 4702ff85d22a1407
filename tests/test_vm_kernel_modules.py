"""Load order of modules that the host's own C compiler makes, so that their ELF layout is not ours."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.vm.errors import CannotRun
from backend.vm.kernel_modules import load_order, modinfo

MODULES = {
    "drivers/low.ko": ["depends="],
    "drivers/mid-one.ko.xz": ["depends=low"],
    "fs/mid_two.ko.gz": ["depends=low,built-in-part"],
    "fs/top.ko.xz": ["license=GPL", "depends=mid-one,mid_two", "softdep=pre: helper absent_helper post: late"],
    "lib/helper.ko": ["depends="],
    "lib/late.ko": ["depends="],
    "lib/chicken.ko": ["depends=", "softdep=pre: egg"],
    "lib/egg.ko": ["depends=chicken"],
    "lib/broken_need.ko": ["depends=nowhere"],
}
COMPRESS = {".xz": ["xz", "-c"], ".gz": ["gzip", "-c"]}


def compiled(strings: list[str], work: Path) -> bytes:
    text = "".join(
        f'__attribute__((section(".modinfo"), used)) static const char m{i}[] = "{s}";\n' for i, s in enumerate(strings)
    )
    built = work / "module.o"
    argv = ["cc", "-c", "-x", "c", "-", "-o", str(built)]
    subprocess.run(argv, input=f"{text}int code(void) {{ return 0; }}\n".encode(), check=True)
    return built.read_bytes()


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modules")
    for name, strings in MODULES.items():
        path = root / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = compiled(strings, root)
        compress = COMPRESS.get(path.suffix)
        path.write_bytes(
            subprocess.run(compress, input=data, capture_output=True, check=True).stdout if compress else data
        )
    (root / "modules.builtin").write_text("kernel/drivers/built-in-part.ko\n")
    return root


def test_each_after_what_it_needs(modules: Path) -> None:
    names = [module.name for module in load_order(modules, ["top"])]
    assert sorted(names) == ["helper", "low", "mid_one", "mid_two", "top"]
    for first, then in (
        ("low", "mid_one"),
        ("low", "mid_two"),
        ("mid_one", "top"),
        ("mid_two", "top"),
        ("helper", "top"),
    ):
        assert names.index(first) < names.index(then)


def test_data_is_decompressed(modules: Path) -> None:
    for module in load_order(modules, ["top"]):
        assert module.data.startswith(b"\x7fELF")


def test_built_in_counts_as_present_and_spelling_does_not_matter(modules: Path) -> None:
    assert load_order(modules, ["built_in-part"]) == []
    assert [module.name for module in load_order(modules, ["mid_one", "mid-one"])] == ["low", "mid_one"]


def test_a_circle_through_a_soft_dependency_ends(modules: Path) -> None:
    assert {module.name for module in load_order(modules, ["chicken"])} == {"chicken", "egg"}


def test_absent_modules_name_who_wants_them(modules: Path) -> None:
    with pytest.raises(CannotRun, match="lacks module no_such, which the guest needs"):
        load_order(modules, ["no-such"])
    with pytest.raises(CannotRun, match="lacks module nowhere, which broken_need needs"):
        load_order(modules, ["broken_need"])


def test_a_folder_without_modules(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="holds no kernel modules"):
        load_order(tmp_path, ["nvme"])


def test_damaged_files(modules: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    shutil.copy(modules / "kernel/drivers/mid-one.ko.xz", tmp_path / "kernel/cut.ko.xz")
    with open(tmp_path / "kernel/cut.ko.xz", "r+b") as file:
        file.truncate(100)
    (tmp_path / "kernel/text.ko").write_text("not a module")
    for name in ("cut", "text"):
        with pytest.raises(CannotRun, match=f"kernel module .*{name}.* is damaged"):
            load_order(tmp_path, [name])


def test_modinfo_tags(modules: Path) -> None:
    top = load_order(modules, ["top"])[-1]
    assert modinfo(top.data, Path("top.ko")) == {
        "license": ["GPL"],
        "depends": ["mid-one,mid_two"],
        "softdep": ["pre: helper absent_helper post: late"],
    }


@given(changes=st.dictionaries(st.integers(0, 63), st.integers(0, 255), max_size=8), keep=st.integers(0, 4096))
def test_hostile_elf_headers_are_read_or_refused(modules: Path, changes: dict[int, int], keep: int) -> None:
    data = bytearray((modules / "kernel/drivers/low.ko").read_bytes())
    for offset, value in changes.items():
        data[offset] = value
    with contextlib.suppress(CannotRun):
        modinfo(bytes(data[:keep]), Path("hostile.ko"))
