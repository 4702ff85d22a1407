"""A sparse physical memory with an end: 64-bit little-endian words in a dictionary."""

from __future__ import annotations

from collections.abc import Iterable

from .common import Update


class Memory:
    """`size` bytes from address 0; words never written read as 0, beyond the end nothing is there."""

    def __init__(self, size: int, words: dict[int, int] | None = None) -> None:
        self.size = size
        self.words: dict[int, int] = {} if words is None else words

    def read64(self, address: int) -> int | None:
        """The word at an 8-byte aligned address, None beyond the end."""
        if address % 8:
            raise ValueError(f"entry address {address:#x} is not a multiple of 8")
        if not 0 <= address <= self.size - 8:
            return None
        return self.words.get(address, 0)

    def write64(self, address: int, value: int) -> None:
        """Stores a word; an address outside memory is the caller's mistake."""
        if address % 8 or not 0 <= address <= self.size - 8:
            raise ValueError(f"cannot store a word at {address:#x} of a memory of {self.size:#x} bytes")
        if value >> 64 or value < 0:
            raise ValueError(f"{value:#x} does not fit a word")
        if value:
            self.words[address] = value
        else:
            self.words.pop(address, None)

    def read(self, address: int, length: int) -> bytes | None:
        """Bytes at any address, None if any of them lies beyond the end."""
        if address < 0 or length < 0 or address + length > self.size:
            return None
        first = address & ~7
        count = (address + length - first + 7) // 8
        data = b"".join(self.words.get(first + 8 * i, 0).to_bytes(8, "little") for i in range(count))
        return data[address - first : address - first + length]

    def copy(self) -> Memory:
        """A second memory with the same content."""
        return Memory(self.size, dict(self.words))

    def apply(self, updates: Iterable[Update]) -> None:
        """Makes the changes that a walk asked for."""
        for update in updates:
            old = self.read64(update.address)
            if old is None:
                raise ValueError(f"an update beyond memory, at {update.address:#x}")
            self.write64(update.address, (old | update.set) & ~update.clear)


class Region:
    """Hands out zeroed, naturally aligned table memory from [start, end); tables are never given back."""

    def __init__(self, start: int, end: int) -> None:
        self.next = start
        self.end = end
        self.tables: list[tuple[int, int]] = []  # (address, bytes) of each table, in order

    def allocate(self, size: int) -> int:
        """Address of `size` fresh bytes, aligned to `size` (a power of two)."""
        address = -(-self.next // size) * size
        if address + size > self.end:
            raise ValueError(f"no room for a table of {size:#x} bytes below {self.end:#x}")
        self.next = address + size
        self.tables.append((address, size))
        return address
