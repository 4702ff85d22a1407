"""Modules built for the kernel that guests boot; what stops that is said."""

import shutil
import subprocess
from pathlib import Path

import pytest

from backend.vm import assets, module_build, module_tools
from backend.vm.cache import Cache
from backend.vm.debian import NotThere
from backend.vm.errors import CannotRun
from backend.vm.kernel_image import Kernel
from backend.vm.kernel_modules import modinfo

MODULE = """#include <linux/module.h>
MODULE_DESCRIPTION("%s");
MODULE_LICENSE("GPL");
"""


def sources(folder: Path, text: str, kbuild: str = "obj-m := one.o") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "one.c").write_text(text)
    (folder / "Kbuild").write_text(kbuild + "\n")
    return folder


@pytest.mark.guest
def test_a_module_is_built_for_the_guests_kernel_and_kept(tmp_path: Path) -> None:
    kernel = assets.kernel()
    folder = sources(tmp_path / "sources", MODULE % "first")
    cache = Cache(tmp_path / "cache")
    shutil.copytree(tools_entry(), cache.root / tools_entry().name, symlinks=True)
    first = module_build.build(["one"], kernel, cache, folder)["one"]
    info = modinfo(first.read_bytes(), first)
    assert info["description"] == ["first"]
    assert info["vermagic"][0].split()[0] == kernel.version
    assert module_build.build(["one"], kernel, cache, folder)["one"] == first
    # what was built is a function of the sources, not of the folder of the build
    again = module_build.build(["one"], kernel, cache, sources(tmp_path / "elsewhere", MODULE % "first"))["one"]
    assert again == first
    kept = first.read_bytes()
    first.unlink()
    assert module_build.build(["one"], kernel, cache, folder)["one"].read_bytes() == kept
    second = module_build.build(["one"], kernel, cache, sources(folder, MODULE % "second"))["one"]
    assert modinfo(second.read_bytes(), second)["description"] == ["second"]


def tools_entry() -> Path:
    """The cached headers and compiler, fetched by now."""
    tools = assets.module_tools(assets.kernel())
    tree = tools.environment.get(module_tools.TREE)
    if tree is None:
        pytest.skip("the host's own headers and compiler are used; remove /lib/modules/VERSION/build to run this")
    return Path(tree)


@pytest.mark.guest
def test_what_the_compiler_says_is_told(tmp_path: Path) -> None:
    folder = sources(tmp_path / "sources", (MODULE % "x") + "int broken(void) { return undeclared; }\n")
    with pytest.raises(CannotRun, match=r"(?s)one\.c:4.*undeclared.*did not compile"):
        module_build.build(["one"], assets.kernel(), sources=folder)


@pytest.mark.guest
def test_a_module_that_is_not_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="builds no module two"):
        module_build.build(["one", "two"], assets.kernel(), sources=sources(tmp_path / "sources", MODULE % "x"))


def test_a_machine_without_modules_needs_no_headers(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path / "vmlinuz", None, "1.2.3-amd64", "cache")
    assert module_build.build([], kernel, Cache(tmp_path / "cache")) == {}
    assert not (tmp_path / "cache").exists()


def test_a_kernel_without_headers_in_debian_is_refused(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path / "vmlinuz", None, "6.6.6-mine", "user")
    with pytest.raises(CannotRun, match=r"/lib/modules/6\.6\.6-mine/build"):
        module_build.build(["one"], kernel, Cache(tmp_path / "cache"), sources(tmp_path / "sources", MODULE % "x"))


def test_unpacked_programs_run_by_the_loader_beside_them(tmp_path: Path) -> None:
    """A program put where the packages have the compiler runs with its arguments, by the loader of the tree."""
    tree = tmp_path / "tree"
    libraries = tree / module_tools.LIBRARIES
    libraries.mkdir(parents=True)
    asked = subprocess.run(["ldd", shutil.which("echo") or ""], capture_output=True, text=True, check=True).stdout
    for word in asked.split():
        if word.startswith("/"):
            shutil.copy(word, libraries / Path(word).name)
    binaries = tree / "usr/bin"
    binaries.mkdir()
    for name in ("make", "x86_64-linux-gnu-gcc-14", "x86_64-linux-gnu-as"):
        shutil.copy(shutil.which("echo") or "", binaries / name)
    headers = tree / "usr/src/linux-headers-1.2.3-amd64"
    headers.mkdir(parents=True)
    (headers / ".config").touch()
    module_tools.lay_out(tree)
    tools = module_tools.unpacked(tree, "1.2.3-amd64")
    done = subprocess.run(
        [*tools.make, "two  words"], env=dict(tools.environment), capture_output=True, text=True, check=True
    )
    common = tree / "usr/src/linux-headers-1.2.3-common"
    assert done.stdout == f"-C {common} KBUILD_OUTPUT={headers} two  words\n"
    assert (
        subprocess.run([tree / "usr/x86_64-linux-gnu/bin/as", "x"], env=dict(tools.environment), check=False).returncode
        == 0
    )


def test_a_tree_without_a_compiler_or_headers_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotThere, match="no compiler"):
        module_tools.lay_out(tmp_path)
