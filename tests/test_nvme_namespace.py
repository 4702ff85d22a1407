"""The namespace: files and memory, what is refused and why, what survives."""

import errno
import fcntl
import hashlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.endpoints.nvme import Namespace, NamespaceError

MIB = 1 << 20


def image(tmp_path: Path, size: int = MIB) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_memory_is_writable_zero_and_hashed() -> None:
    namespace = Namespace.in_memory(2 * MIB)
    namespace.view[MIB : MIB + 5] = b"hello"
    expected = hashlib.sha256(bytes(MIB) + b"hello" + bytes(MIB - 5)).hexdigest()
    assert namespace.digest() == expected
    assert namespace.digest(MIB, 5) == hashlib.sha256(b"hello").hexdigest()
    assert namespace.digest(2 * MIB) == hashlib.sha256(b"").hexdigest()
    assert namespace.read(MIB, 5) == b"hello"
    assert namespace.read(2 * MIB - 1, 10) == b"\0"
    assert (namespace.blocks, namespace.size) == (4096, 2 * MIB)
    namespace.close()
    namespace.close()


@pytest.mark.parametrize("length", [1, 511, 4096, 5000, MIB, MIB + 123])
@pytest.mark.parametrize("holes", [True, False])
def test_zero_clears_just_that(tmp_path: Path, length: int, holes: bool) -> None:
    namespace = Namespace.open(image(tmp_path, 3 * MIB))
    namespace.view[:] = b"\xff" * (3 * MIB)
    namespace.holes &= holes
    assert namespace.zero(777, length)
    assert bytes(namespace.view) == b"\xff" * 777 + bytes(length) + b"\xff" * (3 * MIB - 777 - length)
    namespace.close()


def test_zero_gives_space_back(tmp_path: Path) -> None:
    path = image(tmp_path, 2 * MIB)
    namespace = Namespace.open(path)
    namespace.view[:] = b"\xff" * (2 * MIB)
    namespace.flush()
    before = path.stat().st_blocks
    assert namespace.holes
    assert namespace.zero(0, MIB)
    assert path.stat().st_blocks <= before - MIB // 512
    namespace.close()


def test_a_file_keeps_its_blocks_and_its_identity(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    namespace = Namespace.open(path, size=MIB)
    namespace.view[4096:4101] = b"hello"
    assert namespace.flush()
    identity = namespace.uuid
    namespace.close()
    assert path.read_bytes() == bytes(4096) + b"hello" + bytes(MIB - 4101)
    again = Namespace.open(path)
    assert bytes(again.view[4096:4101]) == b"hello"
    assert again.uuid == identity
    again.close()


def test_a_size_extends_a_shorter_file(tmp_path: Path) -> None:
    path = image(tmp_path)
    path.write_bytes(b"x" * MIB)
    namespace = Namespace.open(path, size=3 * MIB, block_size=4096)
    assert (namespace.size, namespace.blocks) == (3 * MIB, 768)
    assert namespace.digest() == hashlib.sha256(b"x" * MIB + bytes(2 * MIB)).hexdigest()
    namespace.close()


def test_a_truncated_file_is_noticed_and_not_touched(tmp_path: Path) -> None:
    path = image(tmp_path, 4 * MIB)
    namespace = Namespace.open(path)
    os.truncate(path, MIB)
    assert not namespace.intact(0, 4 * MIB)
    assert namespace.intact(0, MIB)
    assert not namespace.zero(2 * MIB, 4096)
    assert namespace.read(MIB - 4, 100) == bytes(4)
    assert namespace.digest() == hashlib.sha256(bytes(MIB)).hexdigest()
    assert namespace.flush()
    namespace.close()
    assert path.stat().st_size == MIB


def refused(path: Path, **options: int) -> str:
    with pytest.raises(NamespaceError) as raised:
        Namespace.open(path, **options)
    return str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.img"
    assert "does not exist" in refused(path)
    assert "make the folder" in refused(tmp_path / "no" / "disk.img", size=MIB)
    assert "correct the path" in refused(tmp_path / ("x" * 300), size=MIB)
    assert list(tmp_path.iterdir()) == []


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")
    assert "folder" in refused(tmp_path)
    assert "character device" in refused(Path("/dev/null"))


def test_bad_sizes_leave_the_file_alone(tmp_path: Path) -> None:
    path = image(tmp_path, MIB - 512)
    assert "less than 1 MiB" in refused(path)
    assert f"make it {MIB + 512} bytes" in refused(image(tmp_path, MIB + 100))
    path = image(tmp_path, MIB + 512)
    assert f"make it {MIB + 4096} bytes" in refused(path, block_size=4096)
    assert "512 or 4096" in refused(path, block_size=1024)
    assert "more than the size" in refused(path, size=MIB)
    assert path.stat().st_size == MIB + 512
    assert "less than 1 MiB" in refused(tmp_path / "new.img", size=4096)
    assert not (tmp_path / "new.img").exists()
    with pytest.raises(NamespaceError, match="less than 1 MiB"):
        Namespace.in_memory(0)


def test_a_size_beyond_the_host_is_undone(tmp_path: Path) -> None:
    path = image(tmp_path)
    assert "free some space" in refused(path, size=1 << 62)
    assert path.stat().st_size == MIB
    assert "free some space" in refused(tmp_path / "new.img", size=1 << 62)
    assert not (tmp_path / "new.img").exists()


def test_a_file_that_cannot_be_mapped_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_args: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    path = image(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", no_memory)
        assert "free some space" in refused(path, size=4 * MIB)
        with pytest.raises(NamespaceError, match="ask for a smaller one"):
            Namespace.in_memory(MIB)
    assert path.stat().st_size == MIB
    Namespace.open(path).close()


def test_in_use_by_another_run(tmp_path: Path) -> None:
    path = image(tmp_path)
    first = Namespace.open(path)
    assert "in use by another run" in refused(path)
    assert "in use by another run" in refused(path, size=4 * MIB)
    assert path.stat().st_size == MIB
    first.close()
    Namespace.open(path).close()
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "in use" in refused(path)


def test_not_writable(tmp_path: Path) -> None:
    path = image(tmp_path)
    path.chmod(0o444)
    # root may write anything, so nobody tries; by a descriptor, as the folders above may be closed to nobody
    reader = os.open(path, os.O_RDONLY)
    script = (
        "import os, sys\n"
        "from backend.endpoints.nvme import Namespace, NamespaceError\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: Namespace.open(sys.argv[1])\n"
        "except NamespaceError as error: print(error)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, f"/proc/self/fd/{reader}"],
            pass_fds=(reader,),
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
        )
    finally:
        os.close(reader)
    assert "may not be written" in done.stdout
