"""RegisterTable against a model that knows nothing but single bits."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.pci import Register, RegisterTable

SPAN = 64


@dataclass
class BitModel:
    """Each bit of a window with its value and its kind: reserved, ro, rw or w1c."""

    value: list[int]
    kind: list[str]

    @classmethod
    def of(cls, registers: list[Register]) -> "BitModel":
        model = cls([0] * 8 * SPAN, ["reserved"] * 8 * SPAN)
        for register in registers:
            for bit in range(8 * register.width):
                at = 8 * register.offset + bit
                for kind in ("ro", "rw", "w1c"):
                    if getattr(register, kind) >> bit & 1:
                        model.kind[at] = kind
                model.value[at] = register.reset >> bit & 1
        return model

    def read(self, offset: int, size: int) -> int:
        return sum(self.value[8 * offset + bit] << bit for bit in range(8 * size))

    def write(self, offset: int, size: int, value: int) -> None:
        for bit in range(8 * size):
            at, written = 8 * offset + bit, value >> bit & 1
            if self.kind[at] == "rw":
                self.value[at] = written
            elif self.kind[at] == "w1c" and written:
                self.value[at] = 0


@st.composite
def tables(draw: st.DrawFn) -> list[Register]:
    registers: list[Register] = []
    offset = 0
    while True:
        offset += draw(st.sampled_from((0, 0, 1, 4, 8)))
        width = draw(st.sampled_from((1, 2, 4, 8)))
        offset = -(-offset // min(width, 4)) * min(width, 4)
        if offset + width > SPAN - 8:
            return registers
        bits = 8 * width
        kinds = [draw(st.integers(0, (1 << bits) - 1)) for _ in range(3)]
        rw = kinds[0]
        w1c = kinds[1] & ~rw
        ro = kinds[2] & ~rw & ~w1c
        reset = draw(st.integers(0, (1 << bits) - 1)) & (ro | rw | w1c)
        registers.append(Register(f"R{offset}", offset, width, reset, ro=ro, rw=rw, w1c=w1c))
        offset += width


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(("read", "write", "reset")),
        st.integers(0, SPAN - 8),
        st.sampled_from((1, 2, 4, 8)),
        st.integers(0, 2**64 - 1),
    ),
    max_size=30,
)


@given(tables(), ACCESSES)
def test_any_access_does_what_each_bit_says(
    registers: list[Register], accesses: list[tuple[str, int, int, int]]
) -> None:
    table, model = RegisterTable(registers), BitModel.of(registers)
    for kind, offset, size, value in accesses:
        if kind == "read":
            assert table.read(offset, size) == model.read(offset, size)
        elif kind == "write":
            table.write(offset, size, value)
            model.write(offset, size, value)
        else:
            table.reset()
            model = BitModel.of(registers)
    for register in registers:
        assert table[register.name] == model.read(register.offset, register.width)


def test_halves_of_a_wide_register() -> None:
    table = RegisterTable([Register("BASE", 8, 8, rw=0x000F_FFFF_FFFF_F000)])
    table.write(8, 4, 0x8765_4321)
    table.write(12, 4, 0xFFFF_FFFF)
    assert table["BASE"] == 0x000F_FFFF_8765_4000
    assert (table.read(12, 4), table.read(8, 4)) == (0x000F_FFFF, 0x8765_4000)


def test_hooks_see_what_came_of_a_write() -> None:
    table = RegisterTable(
        [Register("A", 0, 4, rw=0xFF), Register("S", 4, 4, 0, ro=0x10, w1c=0xF), Register("B", 8, 8, rw=2**64 - 1)]
    )
    seen: list[tuple[str, int, int]] = []
    for name in ("A", "S", "B"):
        table.on_write(name, lambda new, old, name=name: seen.append((name, new, old)))  # type: ignore[misc]
    table["S"] = 0x1F
    table.write(0, 8, 0x0000_0005_0000_01AA)
    table.write(12, 4, 7)
    table.write(1, 1, 0xFF)
    table.write(0x20, 4, 1)
    assert seen == [("A", 0xAA, 0), ("S", 0x1A, 0x1F), ("B", 7 << 32, 0), ("A", 0xAA, 0xAA)]


def test_a_read_hook_gives_the_value_that_is_read() -> None:
    table = RegisterTable([Register("COUNT", 0, 8, ro=2**64 - 1), Register("NEXT", 8, 4, 0x55, ro=0xFF)])
    table.on_read("COUNT", lambda: 0x1122_3344_5566_7788)
    assert table.read(0, 8) == 0x1122_3344_5566_7788
    assert table.read(4, 4) == 0x1122_3344
    assert table.read(6, 4) == 0x0055_1122
    assert table["COUNT"] == 0


def test_the_device_sets_any_bit_that_is_defined() -> None:
    table = RegisterTable([Register("S", 0, 4, ro=0xF0, rw=0xF00, w1c=0xF)])
    table["S"] = 0xFFF
    assert table.read(0, 4) == 0xFFF
    with pytest.raises(ValueError, match="register S: 0x1001 sets reserved bits 0x1000"):
        table["S"] = 0x1001
    table.reset()
    assert table["S"] == 0
    assert ("S" in table, "T" in table, [register.name for register in table], table.end) == (True, False, ["S"], 4)


@pytest.mark.parametrize(
    ("register", "complaint"),
    [
        (lambda: Register("R", 0, 3), "width 3"),
        (lambda: Register("R", 2, 4), "offset 0x2 is not aligned to 4"),
        (lambda: Register("R", 0, 4, rw=1, ro=1), "more than one"),
        (lambda: Register("R", 0, 1, rw=0x100), "exceed 8 bits"),
        (lambda: Register("R", 0, 4, reset=2, rw=1), "reset value 0x2 sets reserved bits"),
        (lambda: Register("R", 0, 4, rw=-1), "exceed 32 bits"),
        (lambda: RegisterTable([Register("A", 0, 4), Register("A", 4, 4)]), "two registers are named A"),
        (lambda: RegisterTable([Register("A", 0, 8), Register("B", 4, 4)]), "registers A and B overlap at 0x4"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(register: object, complaint: str) -> None:
    assert callable(register)
    with pytest.raises(ValueError, match=complaint):
        register()
