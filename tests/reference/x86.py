"""x86-64 paging, 4 and 5 levels: VT-d first stage and AMD guest (v2) tables.

Intel SDM volume 3, 4.5 and 4.6 (4-level and 5-level paging, access rights), 4.7 (faults), 4.8 (accessed and dirty);
Intel VT-d 3.6 (first-stage translation), 9.7 (first-stage entries); AMD IOMMU 48882 2.2.6 (guest tables).

unspecified: several faults in one walk. Here structural faults come in the order in which the entries are read and the
access rights are judged at the end, as a processor does (SDM 4.7).
unspecified: what XD means while execute-disable is off: reserved on a processor, ignored by VT-d; hence `xd`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from .building import Builder as _Builder
from .common import (
    RWX,
    Access,
    Fault,
    Kind,
    Perms,
    Reader,
    Reason,
    Result,
    Update,
    bits,
    is_sign_extended,
    mask,
    merge,
    pending,
)
from .memory import Memory, Region

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE, XD = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 63


class Xd(Enum):
    """What bit 63 of an entry means (EFER.NXE, VT-d NXE, AMD NXSup)."""

    HONOURED = 1
    IGNORED = 2
    RESERVED = 3


@dataclass(frozen=True, slots=True)
class Config:
    """One tree. `sign_extended` False: AMD requests of PASID 0, all 48 or 57 bits unsigned.

    `pa_bits`: host address width; higher address bits of an entry are reserved. `write_protect`: CR0.WP or VT-d WPE.
    `smep`: privileged requests may not execute user pages.
    """

    root: int
    levels: int = 4
    sign_extended: bool = True
    pa_bits: int = 52
    gigabyte_pages: bool = True
    write_protect: bool = True
    xd: Xd = Xd.HONOURED
    smep: bool = False

    def __post_init__(self) -> None:
        if self.levels not in (4, 5) or self.root % 4096:
            raise ValueError(f"x86 tables have 4 or 5 levels and a 4 KiB aligned root, not {self}")


def _reserved(config: Config, level: int, leaf: bool) -> int:
    """Bits that must be zero in a present entry (SDM tables 4-15 to 4-20, VT-d 9.7)."""
    reserved = mask(51, config.pa_bits)
    if level >= 4 or (level == 3 and not config.gigabyte_pages):
        reserved |= LARGE
    elif leaf and level == 3:
        reserved |= mask(29, 13)
    elif leaf and level == 2:
        reserved |= mask(20, 13)
    if config.xd is Xd.RESERVED:
        reserved |= XD
    return reserved


def walk(memory: Reader, config: Config, iova: int, access: Access) -> Result | Fault:
    """Translates `iova` (64 bits) for one access."""
    # 1. The address is canonical, or fits the tables where it is unsigned.
    width = 12 + 9 * config.levels
    if not (is_sign_extended(iova, width) if config.sign_extended else iova >> width == 0):
        return Fault(Reason.ADDRESS_WIDTH, 0)

    table = config.root
    used: list[Update] = []
    every_writable = every_user = True
    any_xd = False
    for level in range(config.levels, 0, -1):
        # 2. The entry: nine bits of the address index each table.
        shift = 12 + 9 * (level - 1)
        address = table + 8 * bits(iova, shift + 8, shift)
        entry = memory.read64(address)
        if entry is None:
            return Fault(Reason.TABLE_ACCESS, level, address, None, merge(used))
        # 3. P.
        if not entry & PRESENT:
            return Fault(Reason.NOT_PRESENT, level, address, entry, merge(used))
        # 4. Reserved bits of a present entry; the low address bits of a large page are among them.
        leaf = level == 1 or (level in (2, 3) and bool(entry & LARGE) and (level == 2 or config.gigabyte_pages))
        if entry & _reserved(config, level, leaf):
            return Fault(Reason.RESERVED_BITS, level, address, entry, merge(used))
        used += pending(address, entry, ACCESSED)
        every_writable &= bool(entry & WRITABLE)
        every_user &= bool(entry & USER)
        any_xd |= bool(entry & XD) and config.xd is Xd.HONOURED
        if not leaf:
            table = entry & mask(51, 12)
            continue
        # 5. Access rights: R/W, U/S and XD of all levels together (SDM 4.6.1). A mapped page is readable.
        if access.privileged:
            read = True
            write = every_writable or not config.write_protect
            execute = not any_xd and not (config.smep and every_user)
        else:
            read, write = every_user, every_user and every_writable
            execute = every_user and not any_xd
        allowed = {Kind.READ: read, Kind.WRITE: write, Kind.EXECUTE: execute}[access.kind]
        if not allowed:
            return Fault(Reason.PERMISSION, level, address, entry, merge(used))
        # 6. Accessed in every entry used, dirty in the last one at a write (SDM 4.8).
        if access.kind is Kind.WRITE:
            used += pending(address, entry, DIRTY)
        output = (entry & mask(51, shift)) | bits(iova, shift - 1, 0)
        return Result(output, 1 << shift, read, write, execute, every_user, merge(used))
    raise AssertionError("level 1 is always a leaf")


class Builder(_Builder):
    """Table entries grant everything, leaves decide. Leaves of 4 KiB, 2 MiB, 1 GiB."""

    sizes = (1 << 30, 1 << 21, 1 << 12)

    def __init__(self, memory: Memory, region: Region, levels: int = 4, sign_extended: bool = True) -> None:
        self.levels = levels
        self.input_bits = 12 + 9 * levels
        self.sign_extended = sign_extended
        super().__init__(memory, region)

    def shift(self, level: int) -> int:
        return {1: 12, 2: 21, 3: 30, 4: 39, 5: 48}[level]

    def extend(self, raw: int) -> int:
        if self.sign_extended and raw >> (self.input_bits - 1):
            return raw + (1 << 64) - (1 << self.input_bits)
        return raw

    def table_entry(self, level: int, address: int) -> int:
        return address | 0x7

    def leaf_entry(self, level: int, oa: int, perms: Perms = RWX, size: int | None = None) -> int:
        entry = oa | 0x1 | (0x80 if level > 1 else 0)
        return entry | (0x2 * perms.write) | (0x4 * perms.user) | (0 if perms.execute else 0x8000_0000_0000_0000)

    def config(self, **changes: Any) -> Config:
        return replace(Config(self.root, self.levels, self.sign_extended), **changes)
