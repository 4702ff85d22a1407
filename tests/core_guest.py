"""A guest for tests of the core: RAM, a stage 2 over it, tables laid in it, and what a request must answer.

What is expected comes from a list of the mappings made and from amd_v1_reference, never from the core.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import amd_v1_reference as reference

from backend.core import RW, Access, Core, Fault, Reason, Translation

PAGE = 4096
STAGE2 = 1
CHILD = 2
RID = 0x0108
DIRECT = 0x0110
"""A device attached to stage 2 itself."""


class Ram:
    """Anonymous memory, or a memfd, of this process."""

    def __init__(self, size: int, *, memfd: bool = False, align: int = PAGE) -> None:
        self.size = size
        self.fd = os.memfd_create("ram") if memfd else -1
        if memfd:
            os.ftruncate(self.fd, size)
            self.map = mmap.mmap(self.fd, size)
        else:
            self.map = mmap.mmap(-1, size + align, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._anchor: Any = ctypes.c_char.from_buffer(self.map)
        start = ctypes.addressof(self._anchor)
        self.skip = 0 if memfd else -start % align
        self.hva = start + self.skip

    def read(self, offset: int, size: int) -> bytes:
        return self.map[self.skip + offset : self.skip + offset + size]

    def write(self, offset: int, data: bytes) -> None:
        self.map[self.skip + offset : self.skip + offset + len(data)] = data

    def close(self) -> None:
        self._anchor = None
        self.map.close()
        if self.fd >= 0:
            os.close(self.fd)


@dataclass(frozen=True)
class Region:
    """A mapping of stage 2, as it was asked for."""

    gpa: int
    size: int
    offset: int
    access: Access


class Stage2Stop(Exception):
    """Stage 2 does not let an access through."""

    def __init__(self, gpa: int, reason: str) -> None:
        super().__init__(reason)
        self.gpa, self.reason = gpa, reason


class Guest:
    """One core with one stage 2, one nested space and two devices."""

    def __init__(
        self, *, ram: int = 64 * PAGE, iotlb_entries: int = 0, stage2_levels: int = 4, align: int = PAGE
    ) -> None:
        self.ram = Ram(ram, align=align)
        self.core = Core(iotlb_entries=iotlb_entries)
        self.stage2_levels = stage2_levels
        self.regions: list[Region] = []
        self.root, self.levels = 0, 0
        self.core.create_host_space(STAGE2, levels=stage2_levels)
        self.core.create_nested_space(CHILD, STAGE2)
        self.core.attach(RID, None, CHILD)
        self.core.attach(DIRECT, None, STAGE2)

    def close(self) -> None:
        self.core.close()
        self.ram.close()

    def map(self, gpa: int, size: int, offset: int = 0, access: Access = RW) -> None:
        self.core.map(STAGE2, gpa, self.ram.hva + offset, size, access)
        self.regions.append(Region(gpa, size, offset, access))

    def bind(self, root: int, levels: int, *, accessed: bool = False, dirty: bool = False) -> None:
        self.core.bind_table(CHILD, fmt="amd-v1", root=root, levels=levels, accessed=accessed, dirty=dirty)
        self.root, self.levels = root, levels

    # Guest RAM by GPA

    def region(self, gpa: int) -> Region | None:
        return next((one for one in self.regions if one.gpa <= gpa < one.gpa + one.size), None)

    def offset(self, gpa: int) -> int:
        one = self.region(gpa)
        assert one is not None, f"the test touches GPA {gpa:#x}, which it did not map"
        return one.offset + gpa - one.gpa

    def entry(self, gpa: int) -> int:
        return int(struct.unpack("<Q", self.ram.read(self.offset(gpa), 8))[0])

    def set_entry(self, gpa: int, entry: int) -> None:
        self.ram.write(self.offset(gpa), struct.pack("<Q", entry))

    def lay(self, iova: int, path: list[int], entries: list[int], *, levels: int | None = None) -> None:
        """Lay the entries that translate `iova`: entries[0] in the table path[0] at the root's level, and so on down.

        A pointer that skips levels makes the next table stand at the level it names.
        """
        level = levels or len(path)
        for table, entry in zip(path, entries, strict=True):
            self.set_entry(table + 8 * reference.index(iova, level), entry)
            level = entry >> 9 & 7

    # What must come out

    def stage2(self, gpa: int, access: Access) -> tuple[int, int, Access]:
        """(HVA, log2 of the leaf, permission) of a GPA, by the list of mappings."""
        if gpa >= 1 << {1: 21, 2: 30, 3: 39, 4: 48, 5: 57, 6: 64}[self.stage2_levels]:
            raise Stage2Stop(gpa, "ADDRESS_WIDTH")
        one = self.region(gpa)
        if one is None:
            raise Stage2Stop(gpa, "NOT_PRESENT")
        if access & ~one.access:
            raise Stage2Stop(gpa, "PERMISSION")
        hva = self.ram.hva + one.offset + gpa - one.gpa
        for lg2 in (30, 21):  # the largest leaf that lies in the mapping and is aligned on both sides
            start = gpa >> lg2 << lg2
            if (hva - gpa) % (1 << lg2) == 0 and one.gpa <= start and start + (1 << lg2) <= one.gpa + one.size:
                return hva, lg2, one.access
        return hva, 12, one.access

    def read_entry(self, gpa: int) -> int:
        self.stage2(gpa, Access.READ)
        return self.entry(gpa)

    def expect(self, iova: int, access: Access) -> Translation | dict[str, Any]:
        """The translation, or the fields of the fault that are defined by the tables alone."""
        try:
            found = reference.walk(self.read_entry, self.root, self.levels, iova, write=access == Access.WRITE)
            if isinstance(found, reference.Stop):
                return {
                    "stage": 1,
                    "level": found.level,
                    "gpa": found.at,
                    "entry": found.entry,
                    "reason": Reason[found.reason],
                }
            hva, lg2, permitted = self.stage2(found.address, access)
        except Stage2Stop as stop:
            return {"stage": 2, "gpa": stop.gpa, "reason": Reason[stop.reason]}
        size = 1 << min(lg2, found.size_lg2)
        stage1 = Access(found.read * Access.READ | found.write * Access.WRITE)
        permitted &= stage1
        if permitted & Access.READ:
            permitted |= Access.EXECUTE  # the format has no right to execute: execution reads
        return Translation(hva=hva, size=size - iova % size, gpa=found.address, access=permitted)

    def check(self, iova: int, access: Access) -> Translation | Fault:
        """Translate and compare; returns what came."""
        answer = self.core.translate(RID, iova, access)
        expected = self.expect(iova, access)
        if isinstance(expected, Translation):
            assert answer == expected, f"IOVA {iova:#x} {access!r}"
        else:
            assert isinstance(answer, Fault), f"IOVA {iova:#x}: {answer}, not {expected}"
            assert {name: getattr(answer, name) for name in expected} == expected, f"IOVA {iova:#x} {access!r}"
            assert (answer.rid, answer.ioasid, answer.iova, answer.access) == (RID, CHILD, iova, access)
        return answer
