"""EPT, 4 and 5 levels.

Intel SDM volume 3, "The Extended Page Table Mechanism (EPT)": translation (28.3.2, tables of entry formats), EPT
misconfigurations (28.3.3.1), violations (28.3.3.2), prioritization (28.3.3.3), accessed and dirty flags (28.3.5);
27.6.11 EPTP (bit 6 turns accessed and dirty flags on).

EPT misconfigurations are RESERVED_BITS, violations NOT_PRESENT, PERMISSION or ADDRESS_WIDTH. With accessed and dirty
flags on, a processor treats every access to a guest paging structure as a write (28.3.5); a nested walk asks for that
by Stage.table_kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .building import Builder as _Builder
from .common import RWX, Access, Fault, Kind, Perms, Reader, Reason, Result, Update, bits, mask, merge, pending
from .memory import Memory, Region

READ, WRITE, EXECUTE, LARGE, ACCESSED, DIRTY, USER_EXECUTE = 1 << 0, 1 << 1, 1 << 2, 1 << 7, 1 << 8, 1 << 9, 1 << 10


@dataclass(frozen=True, slots=True)
class Config:
    """`execute_only`: IA32_VMX_EPT_VPID_CAP bit 0. `mode_based_execute`: bit 2 for privileged, bit 10 for user code.

    `access_dirty`: EPTP bit 6. `pa_bits`: MAXPHYADDR.
    """

    root: int
    levels: int = 4
    pa_bits: int = 52
    access_dirty: bool = False
    execute_only: bool = True
    mode_based_execute: bool = False
    large_2m: bool = True
    large_1g: bool = True

    def __post_init__(self) -> None:
        if self.levels not in (4, 5) or self.root % 4096:
            raise ValueError(f"EPT has 4 or 5 levels and a 4 KiB aligned root, not {self}")


def walk(memory: Reader, config: Config, iova: int, access: Access) -> Result | Fault:
    """Translates `iova` (64 bits, a guest-physical address) for one access."""
    # 1. 48 or 57 address bits; higher ones are an EPT violation.
    if iova >> (12 + 9 * config.levels):
        return Fault(Reason.ADDRESS_WIDTH, 0)

    table = config.root
    used: list[Update] = []
    read = write = execute = True
    grants = READ | WRITE | EXECUTE | (USER_EXECUTE if config.mode_based_execute else 0)
    execute_bit = USER_EXECUTE if config.mode_based_execute and not access.privileged else EXECUTE
    for level in range(config.levels, 0, -1):
        # 2. The entry.
        shift = 12 + 9 * (level - 1)
        address = table + 8 * bits(iova, shift + 8, shift)
        entry = memory.read64(address)
        if entry is None:
            return Fault(Reason.TABLE_ACCESS, level, address, None, merge(used))
        # 3. Present: any permission.
        if not entry & grants:
            return Fault(Reason.NOT_PRESENT, level, address, entry, merge(used))
        # 4. Misconfiguration: write without read; execute without read if unsupported; a reserved bit; a reserved
        #    memory type (2, 3, 7) in a leaf.
        large_here = (level == 2 and config.large_2m) or (level == 3 and config.large_1g)
        leaf = level == 1 or (large_here and bool(entry & LARGE))
        reserved = mask(51, config.pa_bits)
        if not leaf:
            reserved |= mask(6, 3)
        if level > 1 and not large_here:
            reserved |= LARGE
        if leaf:
            reserved |= mask(shift - 1, 12)
        unreadable = not entry & READ
        if (
            (unreadable and bool(entry & WRITE))
            or (unreadable and not config.execute_only)
            or bool(entry & reserved)
            or (leaf and bits(entry, 5, 3) in (2, 3, 7))
        ):
            return Fault(Reason.RESERVED_BITS, level, address, entry, merge(used))
        # 5. Permissions of all levels together.
        read &= bool(entry & READ)
        write &= bool(entry & WRITE)
        execute &= bool(entry & execute_bit)
        if config.access_dirty:
            used += pending(address, entry, ACCESSED)
        if not leaf:
            table = entry & mask(51, 12)
            continue
        if not {Kind.READ: read, Kind.WRITE: write, Kind.EXECUTE: execute}[access.kind]:
            return Fault(Reason.PERMISSION, level, address, entry, merge(used))
        # 6. Accessed in every entry, dirty in the leaf at a write, if EPTP bit 6 is set.
        if config.access_dirty and access.kind is Kind.WRITE:
            used += pending(address, entry, DIRTY)
        output = (entry & mask(51, shift)) | bits(iova, shift - 1, 0)
        return Result(output, 1 << shift, read, write, execute, True, merge(used))
    raise AssertionError("level 1 is always a leaf")


class Builder(_Builder):
    """Leaves of 4 KiB, 2 MiB, 1 GiB, memory type write-back."""

    sizes = (1 << 30, 1 << 21, 1 << 12)

    def __init__(self, memory: Memory, region: Region, levels: int = 4) -> None:
        self.levels = levels
        self.input_bits = 12 + 9 * levels
        super().__init__(memory, region)

    def shift(self, level: int) -> int:
        return (12, 21, 30, 39, 48)[level - 1]

    def table_entry(self, level: int, address: int) -> int:
        return address | 0x407  # user execution too, for mode-based execute control

    def leaf_entry(self, level: int, oa: int, perms: Perms = RWX, size: int | None = None) -> int:
        entry = oa | (6 << 3) | (0x1 * perms.read) | (0x2 * perms.write) | (0x80 if level > 1 else 0)
        return entry | (0x4 * perms.execute) | (0x400 * (perms.execute and perms.user))

    def config(self, **changes: Any) -> Config:
        return replace(Config(self.root, self.levels), **changes)
