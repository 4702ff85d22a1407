"""Words that every format shares: accesses, permissions, results, faults and entry updates.

Levels are numbered alike for all formats: 1 is the table whose entries map the smallest page, rising to the root;
0 means that no entry was looked at. x86, EPT, VT-d and AMD number so themselves; Arm's level is 4 - level, RISC-V's
index i is level - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Reason(Enum):
    """Why a walk failed. One enumeration for all formats."""

    NOT_PRESENT = 1  # an entry that maps nothing
    PERMISSION = 2  # mapped, but not for this kind of access or this privilege
    RESERVED_BITS = 3  # a present entry with a reserved bit or encoding
    ADDRESS_WIDTH = 4  # input wider than the tables, not canonical, or output wider than the physical address
    BAD_LEVEL = 5  # a leaf or a pointer where the format allows none, or an illegal size code
    MISALIGNED = 6  # a large leaf whose base is not a multiple of its size
    TABLE_ACCESS = 7  # the entry lies outside memory
    ACCESS_FLAG = 8  # accessed bit clear and hardware does not set it
    DIRTY = 9  # dirty bit clear at a write and hardware does not set it


class Kind(Enum):
    """What a request does."""

    READ = 1
    WRITE = 2
    EXECUTE = 3


@dataclass(frozen=True, slots=True)
class Access:
    """One request: its kind, and whether it asks for supervisor privilege."""

    kind: Kind
    privileged: bool = False


@dataclass(frozen=True, slots=True)
class Perms:
    """What a mapping grants; the builders turn it into each format's bits.

    `user`: unprivileged requests are allowed too.
    """

    read: bool = True
    write: bool = True
    execute: bool = True
    user: bool = True


RWX = Perms()


@dataclass(frozen=True, slots=True)
class Update:
    """A change hardware makes to one 64-bit entry: `set` bits become 1, `clear` bits become 0 (Arm's AP[2])."""

    address: int
    set: int
    clear: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """A successful translation.

    `read`, `write`, `execute`: what the tables allow to a request of this one's privilege, leaving accessed and dirty
    bits aside; `user`: whether the tables allow unprivileged requests at all. `size`: bytes of the page that holds the
    address. `updates`: one per entry that changes, in the order in which the entries were used.
    """

    output: int
    size: int
    read: bool
    write: bool
    execute: bool
    user: bool
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """A failed translation: an answer, not an exception.

    `address` and `entry`: the entry at fault and where it lies, None if no entry was read. `may_update`: accessed bits
    that an implementation is free to have set before it met the fault; never more than these.
    """

    reason: Reason
    level: int
    address: int | None = None
    entry: int | None = None
    may_update: tuple[Update, ...] = ()


class Reader(Protocol):
    """Where a walker reads its entries."""

    def read64(self, address: int) -> int | None:
        """The aligned 64-bit little-endian word at `address`, or None if no memory is there."""


def bits(value: int, high: int, low: int) -> int:
    """Bits high:low of `value`, both included."""
    return (value >> low) & ((1 << (high - low + 1)) - 1)


def mask(high: int, low: int) -> int:
    """A mask of bits high:low, both included; empty if high < low."""
    return ((1 << (high + 1)) - (1 << low)) if high >= low else 0


def is_sign_extended(address: int, width: int) -> bool:
    """Whether bits 63:width of a 64-bit address all equal bit width-1."""
    upper = address >> (width - 1)
    return upper in (0, (1 << (65 - width)) - 1)


def pending(address: int, entry: int, flags: int) -> list[Update]:
    """The update that sets those of `flags` which are clear in the entry: none if all are set."""
    return [Update(address, flags & ~entry)] if flags & ~entry else []


def merge(updates: list[Update]) -> tuple[Update, ...]:
    """One update per entry, in order of first use."""
    merged: dict[int, Update] = {}
    for update in updates:
        old = merged.get(update.address, Update(update.address, 0))
        merged[update.address] = Update(update.address, old.set | update.set, old.clear | update.clear)
    return tuple(merged.values())
