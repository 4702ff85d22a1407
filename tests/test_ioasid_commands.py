"""The table of commands and the error it makes."""

import errno

import pytest

from backend.core import Access
from backend.ioasid import COMMANDS, IoasidError, Kind
from backend.ioasid.rows_memory import MAP_DMA

# "[RFC] /dev/ioasid uAPI proposal" v1, section 4.1: IOASID_BASE + n.
V1 = {
    "CHECK_EXTENSION": 0,
    "REGISTER_MEMORY": 1,
    "UNREGISTER_MEMORY": 2,
    "ALLOC": 3,
    "FREE": 4,
    "GET_INFO": 5,
    "MAP_DMA": 6,
    "UNMAP_DMA": 7,
    "CREATE_NESTING": 8,
    "BIND_PGTABLE": 9,
    "UNBIND_PGTABLE": 10,
    "BIND_PASID_TABLE": 11,
    "UNBIND_PASID_TABLE": 12,
    "INVALIDATE_CACHE": 13,
}


def test_numbers_are_those_of_v1() -> None:
    assert {name: command.number for name, command in COMMANDS.items() if command.number is not None} == V1


def test_each_row_says_what_a_reader_needs() -> None:
    for command in COMMANDS.values():
        assert command.summary and command.fields
        assert errno.EINVAL in command.errors, "a field can always be wrong"
        assert (errno.ENOENT in command.errors) >= command.takes_ioasid
        assert all(code in errno.errorcode and text for code, text in command.errors.items())


def test_kinds() -> None:
    only_kernel = {"MAP_DMA", "UNMAP_DMA", "SET_DIRTY_TRACKING", "GET_DIRTY_BITMAP"}
    tables = {"BIND_PGTABLE", "UNBIND_PGTABLE", "BIND_PASID_TABLE", "UNBIND_PASID_TABLE"}
    only_user = tables | {"INVALIDATE_CACHE"}
    assert {name for name, command in COMMANDS.items() if command.kinds == {Kind.KERNEL}} == only_kernel
    assert COMMANDS["CREATE_NESTING"].kinds == {Kind.KERNEL, Kind.VM, Kind.USER}
    assert {name for name, command in COMMANDS.items() if command.kinds == {Kind.USER}} == only_user


@pytest.mark.parametrize("bad", [-1, 1 << 64, 0x1001, "0x1000", 4096.0, None, True])
def test_an_address_is_a_page_number_in_bytes(bad: object) -> None:
    with pytest.raises(IoasidError, match="MAP_DMA: iova ") as refused:
        MAP_DMA.check({"ioasid": 1, "iova": bad, "vaddr": 4096, "size": 4096, "access": Access.READ})
    assert refused.value.errno == errno.EINVAL


def test_an_error_the_row_does_not_list_is_our_mistake() -> None:
    with pytest.raises(KeyError, match="ENOTTY"):
        MAP_DMA.refuse(errno.ENOTTY, "no such thing")


def test_error_reads_as_a_sentence() -> None:
    error = MAP_DMA.refuse(errno.EEXIST, "it overlaps")
    assert isinstance(error, OSError)
    assert error.name == "EEXIST"
    assert str(error) == "MAP_DMA: it overlaps (EEXIST: File exists)"
