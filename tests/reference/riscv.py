"""RISC-V paging: Sv39, Sv48, Sv57 (first stage) and Sv39x4, Sv48x4, Sv57x4 (second stage), Svnapot, Svpbmt.

Privileged specification: "Virtual Address Translation Process" (the ten steps, numbered below), "Sv39", "Sv48",
"Sv57" (entry formats, canonical addresses), "Two-Stage Address Translation" (x4 modes), chapters Svnapot, Svpbmt,
Svadu/Svade, Svrsw60t59b. RISC-V IOMMU specification: "Process to translate an IOVA", tc.SADE and tc.GADE, PC.SUM.

Specified: the order of steps, hence of faults. unspecified: among the conditions of step 3; here V, then the rest.
unspecified: which of A and D is named where both must be set; here ACCESS_FLAG before DIRTY.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .building import Builder as _Builder
from .common import RWX, Access, Fault, Kind, Perms, Reader, Reason, Result, Update, bits, is_sign_extended, mask
from .memory import Memory, Region

V, R, W, X, U, A, D, N = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 6, 1 << 7, 1 << 63


@dataclass(frozen=True, slots=True)
class Config:
    """`second_stage`: an x4 mode. `hardware_ad`: SADE or GADE; else A or D clear is a fault (Svade).

    `sum`: privileged reads and writes may touch user pages. `svrsw60t59b`: bits 60:59 are software's.
    """

    root: int
    levels: int = 3
    second_stage: bool = False
    hardware_ad: bool = False
    sum: bool = False
    svnapot: bool = True
    svpbmt: bool = True
    svrsw60t59b: bool = False

    def __post_init__(self) -> None:
        if self.levels not in (3, 4, 5) or self.root % (16384 if self.second_stage else 4096):
            raise ValueError(f"Sv39, Sv48 and Sv57 have 3 to 5 levels and an aligned root (x4: 16 KiB), not {self}")


def walk(memory: Reader, config: Config, iova: int, access: Access) -> Result | Fault:
    """Translates `iova` (64 bits) for one access."""
    # 0. First stage: bits above the width equal its top bit; second stage: two more bits, the rest zero.
    width = 12 + 9 * config.levels
    if not (iova >> (width + 2) == 0 if config.second_stage else is_sign_extended(iova, width)):
        return Fault(Reason.ADDRESS_WIDTH, 0)

    # 1. a = root, i = LEVELS - 1.
    a = config.root
    i = config.levels - 1
    while True:
        # 2. The entry; the root of an x4 mode has an index of 11 bits.
        shift = 12 + 9 * i
        top = shift + 8 + (2 if config.second_stage and i == config.levels - 1 else 0)
        address = a + 8 * bits(iova, top, shift)
        pte = memory.read64(address)
        level = i + 1
        if pte is None:
            return Fault(Reason.TABLE_ACCESS, level, address)
        # 3. V; W without R; anything reserved.
        if not pte & V:
            return Fault(Reason.NOT_PRESENT, level, address, pte)
        if _reserved(config, pte, i):
            return Fault(Reason.RESERVED_BITS, level, address, pte)
        # 4. A pointer leads one level down; there is none below level 0.
        if pte & (R | X):
            break
        i -= 1
        if i < 0:
            return Fault(Reason.BAD_LEVEL, level, address, pte)
        a = bits(pte, 53, 10) << 12

    # 5. A superpage is aligned: ppn[i-1:0] = 0.
    if i > 0 and bits(pte, 10 + 9 * i - 1, 10):
        return Fault(Reason.MISALIGNED, level, address, pte)

    # 6. U. The second stage sees every request as a user's; execution of user pages is never a supervisor's.
    user_page = bool(pte & U)
    if config.second_stage or not access.privileged:
        read = write = execute = user_page
    else:
        read = write = config.sum or not user_page
        execute = not user_page
    # 7., 8. R, W, X. (Step 7 of the specification, shadow stacks, is no concern of an IOMMU.)
    read, write, execute = read and bool(pte & R), write and bool(pte & W), execute and bool(pte & X)
    if not {Kind.READ: read, Kind.WRITE: write, Kind.EXECUTE: execute}[access.kind]:
        return Fault(Reason.PERMISSION, level, address, pte)

    # 9. A and D of the leaf.
    needed = (A | (D if access.kind is Kind.WRITE else 0)) & ~pte
    if needed and not config.hardware_ad:
        return Fault(Reason.ACCESS_FLAG if needed & A else Reason.DIRTY, level, address, pte)
    updates = (Update(address, needed),) if needed else ()

    # 10. The address; a NAPOT entry takes its low four page-number bits from the input.
    size_bits = 16 if pte & N else shift
    output = (bits(pte, 53, 10) << 12 & ~mask(size_bits - 1, 0)) | bits(iova, size_bits - 1, 0)
    return Result(output, 1 << size_bits, read, write, execute, user_page, updates)


def _reserved(config: Config, pte: int, i: int) -> bool:
    """Step 3: encodings reserved for future standard use in a valid entry of index i."""
    leaf = bool(pte & (R | X))
    pbmt = bits(pte, 62, 61)
    return (
        (not pte & R and bool(pte & W))
        or bool(bits(pte, 58, 54))
        or (bool(bits(pte, 60, 59)) and not config.svrsw60t59b)
        or (pbmt != 0 and (not config.svpbmt or not leaf or pbmt == 3))
        # Svnapot: only 64 KiB, page number ending in 1000, at the last level.
        or (bool(pte & N) and (not config.svnapot or not leaf or i != 0 or bits(pte, 13, 10) != 8))
        # D, A and U of a pointer.
        or (not leaf and bool(pte & (D | A | U)))
    )


class Builder(_Builder):
    """Leaves of every level's size and, with `napot`, of 64 KiB in sixteen entries.

    preset: which of A (0x40) and D (0x80) leaves have from the start.
    """

    def __init__(
        self,
        memory: Memory,
        region: Region,
        levels: int = 3,
        *,
        second_stage: bool = False,
        napot: bool = True,
        preset: int = 0xC0,
    ) -> None:
        self.levels = levels
        self.second_stage = second_stage
        self.input_bits = {3: 39, 4: 48, 5: 57}[levels] + (2 if second_stage else 0)
        self.root_bytes = 16384 if second_stage else 4096
        by_level = [1 << s for s in (48, 39, 30, 21, 12)[5 - levels :]]
        self.sizes = tuple(sorted([*by_level, *([1 << 16] if napot else [])], reverse=True))
        self.preset = preset
        super().__init__(memory, region)

    def shift(self, level: int) -> int:
        return (12, 21, 30, 39, 48)[level - 1]

    def extend(self, raw: int) -> int:
        if not self.second_stage and raw >> (self.input_bits - 1):
            return raw + (1 << 64) - (1 << self.input_bits)
        return raw

    def table_entry(self, level: int, address: int) -> int:
        return (address >> 2) | 1

    def leaf_entry(self, level: int, oa: int, perms: Perms = RWX, size: int | None = None) -> int:
        entry = (oa >> 2) | 1 | (2 * perms.read) | (4 * perms.write) | (8 * perms.execute) | (16 * perms.user)
        if size == 1 << 16:
            entry |= (1 << 63) | (8 << 10)
        return entry | self.preset

    def config(self, **changes: Any) -> Config:
        return replace(Config(self.root, self.levels, self.second_stage), **changes)
