"""Every declaration of ctypes_bindings against the C compiler: sizes, offsets, constants, prototypes."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from vfu import libvfio_user

from backend.vm.libvfio_user import LibvfioUser
from ctypes_bindings import declarations

__all__ = ["libvfio_user"]

HEADER = "#include <stddef.h>\n#include <stdio.h>\n#include <libvfio-user.h>\n"

CONSTANTS = [
    name
    for name, value in vars(declarations).items()
    if isinstance(value, int) and name.startswith(("VFU_", "VFIO_", "LIBVFIO_", "PCI_"))
]

TYPES = {
    ctypes.c_void_p: "void *",
    ctypes.c_char_p: "const char *",
    ctypes.c_int: "int",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_size_t: "size_t",
    declarations.LogFn: "vfu_log_fn_t *",
    declarations.RegionAccessCb: "vfu_region_access_cb_t *",
    declarations.ResetCb: "vfu_reset_cb_t *",
    declarations.DmaRegisterCb: "vfu_dma_register_cb_t *",
    declarations.DmaUnregisterCb: "vfu_dma_unregister_cb_t *",
    ctypes.POINTER(declarations.Iovec): "struct iovec *",
    None: "void",
}

CALLBACKS: dict[str, str] = {
    "LogFn": "vfu_log_fn_t: void, vfu_ctx_t *, int, const char *",
    "RegionAccessCb": "vfu_region_access_cb_t: ssize_t, vfu_ctx_t *, char *, size_t, loff_t, bool",
    "ResetCb": "vfu_reset_cb_t: int, vfu_ctx_t *, vfu_reset_type_t",
    "DmaRegisterCb": "vfu_dma_register_cb_t: void, vfu_ctx_t *, vfu_dma_info_t *",
    "DmaUnregisterCb": "vfu_dma_unregister_cb_t: void, vfu_ctx_t *, vfu_dma_info_t *",
}


@pytest.fixture(scope="module")
def include(libvfio_user: LibvfioUser) -> Path:
    if libvfio_user.include is None:
        pytest.skip(f"{libvfio_user.library} has no header beside it: install libvfio-user's headers")
    return libvfio_user.include


def run(tmp_path: Path, include: Path, program: str) -> list[str]:
    """Compile a program against the header, run it, return its lines."""
    source, binary = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text(HEADER + program)
    compiler = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-isystem", str(include), "-o", str(binary)]
    done = subprocess.run([*compiler, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.splitlines()


def main_of(lines: Sequence[str]) -> str:
    return "int main(void)\n{\n" + "\n".join(lines) + "\n    return 0;\n}\n"


def printed(*numbers: str) -> str:
    return f'    printf("{" ".join(["%lld"] * len(numbers))}\\n", {", ".join(f"(long long)({n})" for n in numbers)});'


def test_structures_lie_as_the_compiler_lays_them(tmp_path: Path, include: Path) -> None:
    asked: list[str] = []
    expected: list[str] = []
    for structure in declarations.STRUCTURES:
        name = vars(structure)["_c_name_"]
        # A flexible array at the end (the data behind a message) adds nothing to C's size.
        asked.append(printed(f"sizeof({name})"))
        expected.append(f"{ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            offset, size = getattr(structure, field).offset, getattr(structure, field).size
            asked.append(printed(f"offsetof({name}, {field})", f"sizeof((({name} *)0)->{field})"))
            expected.append(f"{offset} {size}")
    assert run(tmp_path, include, main_of(asked)) == expected


def test_every_field_of_a_structure_is_declared() -> None:
    """A field left out would leave a gap that alignment does not explain."""
    for structure in declarations.STRUCTURES:
        packed = getattr(structure, "_pack_", None) == 1
        end, widest = 0, 1
        for field, kind, *_ in structure._fields_:
            alignment = 1 if packed else ctypes.alignment(kind)
            widest = max(widest, alignment)
            described = getattr(structure, field)
            assert described.offset == -(-end // alignment) * alignment, f"{structure.__name__}: a gap before {field}"
            end = described.offset + described.size
        assert ctypes.sizeof(structure) == -(-end // widest) * widest, f"{structure.__name__}: a gap at its end"


def test_constants_are_the_headers(tmp_path: Path, include: Path) -> None:
    assert len(CONSTANTS) > 40
    lines = run(tmp_path, include, main_of([printed(name) for name in CONSTANTS]))
    assert lines == [str(getattr(declarations, name)) for name in CONSTANTS]


def c_type(declared: Any, position: int) -> str:
    """How the prototype spells a declared type; the context is the one opaque pointer in first place."""
    if declared is ctypes.c_void_p and position == 0:
        return "vfu_ctx_t *"
    return TYPES[declared]


ENUMS = {("vfu_create_ctx", 0): "vfu_trans_t", ("vfu_create_ctx", 4): "vfu_dev_type_t"}
ENUMS |= {("vfu_pci_init", 1): "vfu_pci_type_t", ("vfu_setup_device_nr_irqs", 1): "enum vfu_dev_irq_type"}


SPELLED = ENUMS | {("vfu_create_ctx", 3): "void *"}


def test_prototypes_are_the_headers(tmp_path: Path, include: Path) -> None:
    """A second declaration of each function, made from ours: the compiler refuses it unless the types are the same."""
    lines: list[str] = []
    for name, result, arguments in declarations.FUNCTIONS:
        returned = "vfu_ctx_t *" if result is ctypes.c_void_p else TYPES[result]
        spelled = [
            "void *"
            if (name, position) == ("vfu_create_ctx", 3)
            else ENUMS.get((name, position), c_type(kind, position))
            for position, kind in enumerate(arguments)
        ]
        lines.append(f"{returned} {name}({', '.join(spelled)});")
    assert run(tmp_path, include, "\n".join(lines) + "\n" + main_of([])) == []


def test_enumerations_are_passed_as_ints(tmp_path: Path, include: Path) -> None:
    kinds = sorted({*ENUMS.values(), "vfu_reset_type_t"})
    lines = run(tmp_path, include, main_of([printed(f"sizeof({kind})") for kind in kinds]))
    assert lines == [str(ctypes.sizeof(ctypes.c_int))] * len(kinds)


def test_callback_types_are_the_headers(tmp_path: Path, include: Path) -> None:
    sizes = {"bool": ctypes.c_bool, "loff_t": ctypes.c_longlong, "ssize_t": ctypes.c_ssize_t, "size_t": ctypes.c_size_t}
    sizes |= {"int": ctypes.c_int, "vfu_reset_type_t": ctypes.c_int}
    lines: list[str] = []
    for ours, description in CALLBACKS.items():
        typedef, _, types = description.partition(": ")
        returned, *arguments = types.split(", ")
        lines.append(f"typedef {returned} (again_{ours})({', '.join(arguments)});")
        lines.append(f'_Static_assert(__builtin_types_compatible_p(again_{ours}, {typedef}), "{typedef}");')
        declared = getattr(declarations, ours)
        assert len(declared._argtypes_) == len(arguments)
        assert (declared._restype_ is None) == (returned == "void")
        for kind, spelled in zip((declared._restype_, *declared._argtypes_), (returned, *arguments), strict=True):
            if spelled in sizes:
                assert kind is sizes[spelled], (ours, spelled)
            elif spelled != "void":
                assert ctypes.sizeof(kind) == ctypes.sizeof(ctypes.c_void_p), (ours, spelled)
        lines.append("")
    assert run(tmp_path, include, "\n".join(lines) + main_of([printed("sizeof(loff_t)")])) == ["8"]


def test_the_codec_packs_what_the_structures_say() -> None:
    """backend.pci cuts messages with struct formats: they must agree with the structures checked above."""
    from backend.pci import messages  # noqa: PLC0415

    header, access = declarations.Header, declarations.RegionAccess
    packed = messages.ACCESS.pack(1, 2, 3, 4, 5, 6, 7, 8)
    assert messages.HEADER.size == ctypes.sizeof(header)
    assert messages.ACCESS.size == ctypes.sizeof(header) + ctypes.sizeof(access)
    head = header.from_buffer_copy(packed)
    body = access.from_buffer_copy(packed[ctypes.sizeof(header) :])
    assert (head.msg_id, head.cmd, head.msg_size, head.flags, head.error_no) == (1, 2, 3, 4, 5)
    assert (body.offset, body.region, body.count) == (6, 7, 8)
    for name in ("VERSION", "DMA_MAP", "DMA_UNMAP", "REGION_READ", "REGION_WRITE"):
        assert getattr(messages, name) == getattr(declarations, f"VFIO_USER_{name}")
    assert messages.SET_IRQS == declarations.VFIO_USER_DEVICE_SET_IRQS
