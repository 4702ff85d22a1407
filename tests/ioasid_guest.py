"""A guest for tests of the uAPI: its memory at the HVAs of the RFC's flows, two devices, tables laid by hand."""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from collections.abc import Callable

import pytest
from guest_ram import PAGE, AmdTables, Ram

from backend.core import Access, Fault, Reason, Translation
from backend.ioasid import Context, Engine, IoasidError, Traits

GOLDEN = 0x40000000
"""RFC v1, section 5: GPA [0, 1G) stands at this HVA."""
FIXED_NOREPLACE = 0x100000
"""MAP_FIXED_NOREPLACE of <linux/mman.h>."""
DEV1, DEV2 = 0x0100, 0x0208


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Guest:
    """RAM, mapped at GOLDEN; an engine with two devices bound to a context."""

    def __init__(self, traits: Traits | None = None, *, pages: int = 64) -> None:
        self.ram = Ram(pages * PAGE)
        self._libc = ctypes.CDLL(None)
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        where = self._libc.mmap(
            GOLDEN, self.ram.size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | FIXED_NOREPLACE, self.ram.fd, 0
        )
        assert where == GOLDEN
        self.clock = Clock()
        self.engine = Engine(clock=self.clock, page_timeout=10)
        self.dev1 = self.engine.add_device(DEV1, "dev1", traits or Traits())
        self.dev2 = self.engine.add_device(DEV2, "dev2", traits or Traits())
        self.ctx: Context = self.engine.open()
        self.ctx.bind_device(DEV1, 0xC0)
        self.ctx.bind_device(DEV2)

    def close(self) -> None:
        self.engine.close()
        self._libc.munmap(GOLDEN, self.ram.size)
        self.ram.close()

    def tables(self, base: int = 0x8000) -> AmdTables:
        return AmdTables(self.ram, base)

    def hva(self, rid: int, iova: int, *, pasid: int | None = None, access: Access = Access.READ) -> int | Reason:
        """Where a request ends, or why nowhere."""
        answer = self.engine.core.translate(rid, iova, access, pasid=pasid)
        return answer.reason if isinstance(answer, Fault) else answer.hva

    def found(self, rid: int, iova: int, *, pasid: int | None = None) -> Translation:
        answer = self.engine.core.translate(rid, iova, Access.READ, pasid=pasid)
        assert isinstance(answer, Translation)
        return answer


def x86_tables(ram: Ram, base: int, mappings: dict[int, int]) -> int:
    """Four levels of x86-64 tables from GPA `base` onward, user and writable (SDM 3, 4.5.4: P 0, R/W 1, U/S 2); the
    root's GPA."""
    free = base + PAGE
    ram.poke(base, bytes(PAGE))
    for address, gpa in mappings.items():
        table = base
        for level in (4, 3, 2):
            slot = table + (address >> (12 + 9 * (level - 1)) & 511) * 8
            (entry,) = struct.unpack("<Q", ram.peek(slot, 8))
            if not entry:
                entry = free | 7
                ram.poke(free, bytes(PAGE))
                ram.poke(slot, struct.pack("<Q", entry))
                free += PAGE
            table = entry & 0x000FFFFFFFFFF000
        ram.poke(table + (address >> 12 & 511) * 8, struct.pack("<Q", gpa | 7))
    return base


def gcr3_table(ram: Ram, base: int, roots: dict[int, int]) -> int:
    """One level of AMD's guest CR3 table (48882, 2.2.6.3): PASID -> root | V; its GPA."""
    ram.poke(base, bytes(PAGE))
    for pasid, root in roots.items():
        ram.poke(base + pasid * 8, struct.pack("<Q", root | 1))
    return base


def refused(call: Callable[[], object]) -> int:
    """The errno with which a command is refused."""
    with pytest.raises(IoasidError) as error:
        call()
    code = error.value.errno
    assert code is not None and code in errno.errorcode
    assert ": " in error.value.sentence
    return code
