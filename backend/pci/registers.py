"""Registers as a data table: name, offset, width, reset value, masks, and where the specification says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

WriteHook = Callable[[int, int], None]
ReadHook = Callable[[], int]

REGISTER_WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Register:
    """One register. Each mask says what a write by the guest does to those bits.

    `ro`   the device alone changes them;   `rw`   the guest's value is taken;   `w1c`   writing 1 clears, 0 leaves.
    Bits in no mask are reserved: they read as zero and writes to them are dropped.
    `width` is in bytes (1, 2, 4 or 8), `section` names the paragraph of the specification.
    """

    name: str
    offset: int
    width: int
    reset: int = 0
    ro: int = 0
    rw: int = 0
    w1c: int = 0
    section: str = ""

    def __post_init__(self) -> None:
        if self.width not in REGISTER_WIDTHS:
            raise ValueError(f"register {self.name}: width {self.width} is none of {REGISTER_WIDTHS} bytes")
        if self.offset < 0 or self.offset % min(self.width, 4):
            raise ValueError(f"register {self.name}: offset {self.offset:#x} is not aligned to {min(self.width, 4)}")
        if self.ro & self.rw or self.ro & self.w1c or self.rw & self.w1c:
            raise ValueError(f"register {self.name}: a bit stands in more than one of ro, rw and w1c")
        if self.mask >> 8 * self.width or self.ro < 0 or self.rw < 0 or self.w1c < 0:
            raise ValueError(f"register {self.name}: masks exceed {8 * self.width} bits")
        if self.reset < 0 or self.reset & ~self.mask:
            raise ValueError(f"register {self.name}: reset value {self.reset:#x} sets reserved bits")

    @property
    def mask(self) -> int:
        """Every bit that is not reserved."""
        return self.ro | self.rw | self.w1c

    @property
    def end(self) -> int:
        """Offset of the first byte behind the register."""
        return self.offset + self.width

    def written(self, old: int, value: int, enabled: int) -> int:
        """The register after a guest's write of `value` to the bits in `enabled` (a mask of whole bytes)."""
        rw = self.rw & enabled
        return (old & ~rw | value & rw) & ~(value & self.w1c & enabled)


class RegisterTable:
    """The registers of one BAR (or any other window), with their values.

    Accesses may be of 1, 2, 4 or 8 bytes at any offset: a 64-bit register can be reached by its halves, two 32-bit
    registers by one 64-bit access, lowest offset first. What no register covers reads as zero and ignores writes.
    """

    def __init__(self, registers: Iterable[Register]) -> None:
        self.registers: Sequence[Register] = tuple(sorted(registers, key=lambda register: register.offset))
        self._by_name: dict[str, int] = {}
        self._inside: dict[tuple[int, int], tuple[int, int]] = {}
        """Aligned accesses that one register holds, by (offset, bytes): its index, and how many bits are below."""
        self._by_byte: dict[int, int] = {}
        for index, register in enumerate(self.registers):
            if register.name in self._by_name:
                raise ValueError(f"two registers are named {register.name}")
            self._by_name[register.name] = index
            for size in REGISTER_WIDTHS:
                for offset in range(register.offset, register.end - size + 1, size):
                    self._inside[offset, size] = index, 8 * (offset - register.offset)
            for byte in range(register.offset, register.end):
                if byte in self._by_byte:
                    other = self.registers[self._by_byte[byte]].name
                    raise ValueError(f"registers {other} and {register.name} overlap at {byte:#x}")
                self._by_byte[byte] = index
        self._masks = [register.mask for register in self.registers]
        self._values = [register.reset for register in self.registers]
        self._write_hooks: list[WriteHook | None] = [None] * len(self.registers)
        self._read_hooks: list[ReadHook | None] = [None] * len(self.registers)

    def __iter__(self) -> Iterator[Register]:
        return iter(self.registers)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> int:
        """The present value of a register, as the device sees it (no read hook runs)."""
        return self._values[self._by_name[name]]

    def __setitem__(self, name: str, value: int) -> None:
        """Set a register from the device's side: any defined bit, no hook. Reserved bits raise ValueError."""
        index = self._by_name[name]
        if value & ~self._masks[index]:
            raise ValueError(f"register {name}: {value:#x} sets reserved bits {value & ~self._masks[index]:#x}")
        self._values[index] = value

    @property
    def end(self) -> int:
        """Offset of the first byte behind the last register."""
        return max((register.end for register in self.registers), default=0)

    def on_write(self, name: str, hook: WriteHook) -> None:
        """Call hook(new, old) after each guest's write that touched the register; one hook a register."""
        self._write_hooks[self._by_name[name]] = hook

    def on_read(self, name: str, hook: ReadHook) -> None:
        """Call hook() at each guest's read of the register, for the value to read; one hook a register."""
        self._read_hooks[self._by_name[name]] = hook

    def reset(self) -> None:
        """Every register back to its reset value; no hook runs."""
        self._values = [register.reset for register in self.registers]

    def read(self, offset: int, size: int) -> int:
        """A guest's read of `size` bytes at `offset`, little endian."""
        inside = self._inside.get((offset, size))
        if inside is not None:
            index, below = inside
            hook = self._read_hooks[index]
            value = self._values[index] if hook is None else hook()
            return value >> below & (1 << 8 * size) - 1
        result = 0
        for index in self._touched(offset, size):
            register = self.registers[index]
            hook = self._read_hooks[index]
            value = self._values[index] if hook is None else hook()
            shift = 8 * (register.offset - offset)
            result |= value << shift if shift >= 0 else value >> -shift
        return result & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write of the low `size` bytes of `value` at `offset`; runs the hooks of what it touched."""
        enabled = (1 << 8 * size) - 1
        inside = self._inside.get((offset, size))
        if inside is not None:
            index, below = inside
            self._write_one(index, value << below, enabled << below)
            return
        for index in self._touched(offset, size):
            shift = 8 * (offset - self.registers[index].offset)
            if shift >= 0:
                self._write_one(index, value << shift, enabled << shift)
            else:
                self._write_one(index, value >> -shift, enabled >> -shift)

    def _write_one(self, index: int, value: int, enabled: int) -> None:
        old = self._values[index]
        new = self._values[index] = self.registers[index].written(old, value, enabled)
        hook = self._write_hooks[index]
        if hook is not None:
            hook(new, old)

    def _touched(self, offset: int, size: int) -> list[int]:
        """Indices of the registers that overlap [offset, offset + size), in order of offset."""
        found: list[int] = []
        for byte in range(offset, offset + size):
            index = self._by_byte.get(byte)
            if index is not None and (not found or found[-1] != index):
                found.append(index)
        return found
