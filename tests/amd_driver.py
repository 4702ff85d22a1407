"""A driver for the AMD IOMMU, for tests: a VM's memory, the IOMMU's registers, and structures laid by hand.

Layouts and numbers are those of the AMD I/O Virtualization Technology (IOMMU) Specification, publication 48882; nothing
of them is taken from the code under test.
"""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from guest_ram import PAGE, Ram

from backend.core import Access, Fault, Reason
from backend.ioasid import BEHIND_X86, Engine
from backend.viommu.amd import AmdIommu

IOMMU = 0x0010  # 00:02.0
ENDPOINT = 0x0018  # 00:03.0
SECOND = 0x0021  # 00:04.1

MEMORY = 4 << 20
DEVICE_TABLE = 0x00_0000
COMMANDS = 0x10_0000
EVENTS = 0x20_0000
PPRS = 0x26_0000
SEMAPHORE = 0x28_0000
TABLES = 0x29_0000
DATA = 0x30_0000
NOWHERE = 0x7_0000_0000  # no memory there

CONTROL, STATUS = 0x18, 0x2020
COMMAND_HEAD, COMMAND_TAIL, EVENT_HEAD, EVENT_TAIL = 0x2000, 0x2008, 0x2010, 0x2018
PPR_BASE, PPR_HEAD, PPR_TAIL = 0x38, 0x2030, 0x2038
IOMMU_EN, EVENT_LOG_EN, EVENT_INT_EN, COM_WAIT_INT_EN, COMMAND_EN, GT_EN = 1, 1 << 2, 1 << 3, 1 << 4, 1 << 12, 1 << 16
PPR_LOG_EN, PPR_INT_EN, PPR_EN = 1 << 13, 1 << 14, 1 << 15
EVENT_OVERFLOW, EVENT_INT, COM_WAIT_INT, EVENT_RUN, COMMAND_RUN = 1, 2, 4, 8, 16
PPR_OVERFLOW, PPR_INT, PPR_RUN = 1 << 5, 1 << 6, 1 << 7
READ, WRITE = 1 << 61, 1 << 62

IOVA = 0x7_1234_5000  # 35 bits, so that every level of four indexes something

# What the Extended Feature Register offers (section 3.3.1): PreF, PPR, NX, GT, IA, GA; HATS six levels, GATS five, GLX
# three; PASIDs of 16 bits, US; GIo, HA, EPH, HD
OFFERED = 0b1101_1011 | 2 << 10 | 1 << 12 | 2 << 14 | 15 << 32 | 1 << 37 | 1 << 48 | 1 << 49 | 1 << 50 | 1 << 52

# Event codes and flags (section 2.5)
ILLEGAL_ENTRY, PAGE_FAULT, DEVICE_TABLE_ERROR, PAGE_TABLE_ERROR, ILLEGAL_COMMAND, COMMAND_ERROR = 1, 2, 3, 4, 5, 6
IOTLB_TIMEOUT, INVALID_REQUEST, INVALID_PPR = 7, 8, 9
GN, NX, US, PR, RW, PE, RZ = 1 << 0, 1 << 1, 1 << 2, 1 << 4, 1 << 5, 1 << 6, 1 << 7
MASTER_ABORT, DATA_ERROR = 1 << 9, 3 << 9  # Type of a hardware error

ALL_PAGES = 0x7FFF_FFFF_FFFF_F000
EVERY_PAGE = (ALL_PAGES, True)


@dataclass(frozen=True)
class Event:
    """An event as its figure in section 2.5 lays it out."""

    code: int
    device: int
    domain: int
    flags: int
    address: int

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name):#x}" for name in self.__dataclass_fields__)
        return f"Event({fields})"


@dataclass(frozen=True)
class PageRequest:
    """An entry of the PPR log (section 2.6)."""

    code: int
    device: int
    pasid: int
    tag: int
    last: bool
    flags: int
    address: int


GN_PPR, US_PPR, WRITE_PPR, READ_PPR, EXECUTE_PPR = 1 << 8, 1 << 6, 1 << 5, 1 << 2, 1 << 1


def parse_page_request(raw: bytes) -> PageRequest:
    first, second, low, high = struct.unpack("<4I", raw)
    pasid = first >> 16 | (second >> 10 & 0xF) << 16
    tag, last, flags = second & 0x1FF, bool(second >> 9 & 1), second >> 16 & 0xFFF
    return PageRequest(second >> 28, first & 0xFFFF, pasid, tag, last, flags, high << 32 | low)


def parse_event(raw: bytes) -> Event:
    first, second, low, high = struct.unpack("<4I", raw)
    domain = second & 0xFFFF | (first >> 16 & 0xF) << 16
    return Event(second >> 28, first & 0xFFFF, domain, second >> 16 & 0xFFF, high << 32 | low)


def reason(answer: bytes | Fault | None) -> Reason:
    assert isinstance(answer, Fault)
    return answer.reason


def completion_wait(address: int = 0, data: int = 0, *, store: bool = True, interrupt: bool = False) -> bytes:
    return struct.pack("<QQ", 1 << 60 | address | store | interrupt << 1, data)


def invalidate_entry(device: int) -> bytes:
    return struct.pack("<QQ", 2 << 60 | device, 0)


def invalidate_pages(domain: int, address: int, size: bool, pasid: int | None = None) -> bytes:
    guest = 0 if pasid is None else 4
    return struct.pack("<QQ", 3 << 60 | domain << 32 | (pasid or 0), address | size | 2 | guest)


def invalidate_device_tlb(
    device: int, address: int, *, size: bool = False, pasid: int | None = None, most: int = 1
) -> bytes:
    """The queue is the device's own. A PASID's bits 7:0 stand in 55:48, 15:8 in 23:16, 19:16 in 59:56."""
    first, second = device | most << 24, device
    if pasid is not None:
        first |= (pasid >> 8 & 0xFF) << 16
        second |= (pasid & 0xFF) << 16 | (pasid >> 16) << 24
    return struct.pack("<IIQ", first, 4 << 28 | second, address | size | (0 if pasid is None else 4))


def invalidate_interrupts(device: int) -> bytes:
    return struct.pack("<QQ", 5 << 60 | device, 0)


def prefetch(device: int, address: int, count: int = 1, *, pasid: int | None = None, anew: bool = False) -> bytes:
    """Count 31:24, Inval 68; with GN (66) a PASID in 51:32."""
    guest = 0 if pasid is None else 4
    return struct.pack("<QQ", 6 << 60 | (pasid or 0) << 32 | count << 24 | device, address | anew << 4 | guest)


def complete_ppr(device: int, tag: int, code: int = 0, pasid: int | None = None) -> bytes:
    """Tag 105:96, code 111:108; with GN (66) a PASID in 51:32."""
    guest = 0 if pasid is None else 4
    return struct.pack("<QQ", 7 << 60 | (pasid or 0) << 32 | device, tag << 32 | code << 44 | guest)


def invalidate_all() -> bytes:
    return struct.pack("<QQ", 8 << 60, 0)


def device_entry(root: int = 0, mode: int = 0, domain: int = 0, *, low: int = 3 | READ | WRITE, high: int = 0) -> bytes:
    """A device table entry (section 2.2.2): V 0, TV 1, Mode 11:9, root 51:12, IR 61, IW 62, domain ID 79:64."""
    return struct.pack("<4Q", low | mode << 9 | root, domain | high, 0, 0)


def guest_entry(
    gcr3: int,
    *,
    glx: int = 0,
    giov: bool = False,
    five: bool = False,
    domain: int = 0,
    mode: int = 0,
    root: int = 0,
    low: int = 3 | READ | WRITE,
    high: int = 0,
) -> bytes:
    """An entry with GV 55, GIoV 54, GLX 57:56, GuestPagingMode 183:182; the GCR3 root in 60:58, 95:80 and 127:107."""
    low |= 1 << 55 | giov << 54 | glx << 56 | (gcr3 >> 12 & 7) << 58 | mode << 9 | root
    high |= domain | (gcr3 >> 15 & 0xFFFF) << 16 | (gcr3 >> 31) << 43
    return struct.pack("<4Q", low, high, five << 54, 0)


class Gcr3Table:
    """A GCR3 table (section 2.2.6.3): each level resolves 9 bits of the PASID, an entry is an address and bit 0."""

    def __init__(self, ram: Ram, base: int, levels: int) -> None:
        self._ram = ram
        self._free = base + PAGE
        self.root = base
        self.levels = levels
        ram.poke(base, bytes(PAGE))

    def slot(self, pasid: int) -> int:
        table = self.root
        for level in range(self.levels, 1, -1):
            at = table + (pasid >> 9 * (level - 1) & 0x1FF) * 8
            (entry,) = struct.unpack("<Q", self._ram.peek(at, 8))
            if not entry & 1:
                entry = self._free | 1
                self._ram.poke(self._free, bytes(PAGE))
                self._ram.poke(at, struct.pack("<Q", entry))
                self._free += PAGE
            table = entry & 0x000F_FFFF_FFFF_F000
        return table + (pasid & 0x1FF) * 8

    def set(self, pasid: int, entry: int) -> None:
        self._ram.poke(self.slot(pasid), struct.pack("<Q", entry))


class GuestTable:
    """A guest page table of four or five levels: x86-64, P 0, R/W 1, U/S 2, A 5, D 6, PS 7, XD 63 (SDM 3, 4.5)."""

    def __init__(self, ram: Ram, base: int, levels: int = 4) -> None:
        self._ram = ram
        self._free = base + PAGE
        self.root = base
        self.levels = levels
        ram.poke(base, bytes(PAGE))

    def slot(self, address: int, level: int = 1) -> int:
        table = self.root
        for above in range(self.levels, level, -1):
            at = table + (address >> 12 + 9 * (above - 1) & 0x1FF) * 8
            (entry,) = struct.unpack("<Q", self._ram.peek(at, 8))
            if not entry & 1:
                entry = self._free | 7
                self._ram.poke(self._free, bytes(PAGE))
                self._ram.poke(at, struct.pack("<Q", entry))
                self._free += PAGE
            table = entry & 0x000F_FFFF_FFFF_F000
        return table + (address >> 12 + 9 * (level - 1) & 0x1FF) * 8

    def set(self, address: int, entry: int, level: int = 1) -> None:
        self._ram.poke(self.slot(address, level), struct.pack("<Q", entry))

    def get(self, address: int, level: int = 1) -> int:
        (entry,) = struct.unpack("<Q", self._ram.peek(self.slot(address, level), 8))
        return int(entry)

    def map(self, address: int, gpa: int, *, writable: bool = True, user: bool = True) -> None:
        self.set(address, 1 | writable << 1 | user << 2 | gpa)


class PageTable:
    """Host page tables of any number of levels in guest memory (section 2.2.3): PR 0, NextLevel 11:9, IR 61, IW 62."""

    def __init__(self, ram: Ram, base: int, levels: int) -> None:
        self._ram = ram
        self._free = base + PAGE
        self.root = base
        self.levels = levels
        ram.poke(base, bytes(PAGE))

    def slot(self, iova: int, level: int) -> int:
        """GPA of the entry for `iova` at a level, whose tables above must exist or are made."""
        table = self.root
        for above in range(self.levels, level, -1):
            at = table + (iova >> (12 + 9 * (above - 1)) & 0x1FF) * 8
            (entry,) = struct.unpack("<Q", self._ram.peek(at, 8))
            if not entry & 1:
                entry = 1 | (above - 1) << 9 | self._free | READ | WRITE
                self._ram.poke(self._free, bytes(PAGE))
                self._ram.poke(at, struct.pack("<Q", entry))
                self._free += PAGE
            table = entry & 0x000F_FFFF_FFFF_F000
        return table + (iova >> (12 + 9 * (level - 1)) & 0x1FF) * 8

    def set(self, iova: int, entry: int, level: int = 1) -> None:
        self._ram.poke(self.slot(iova, level), struct.pack("<Q", entry))

    def map(self, iova: int, gpa: int, access: int = READ | WRITE) -> None:
        self.set(iova, 1 | gpa | access)


class Timer:
    """What runs out when `Timers.advance` comes to it."""

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Timers:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def __call__(self, seconds: float, call: Callable[[], None]) -> Timer:
        timer = Timer(self.now + seconds, call)
        self.timers.append(timer)
        return timer

    @property
    def waiting(self) -> list[float]:
        return [timer.due for timer in self.timers if timer.call is not None]

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for timer in list(self.timers):
            if timer.due <= self.now and timer.call is not None:
                call, timer.call = timer.call, None
                call()


class Tlb:
    """A device TLB that remembers what it was told, and answers at once or when it is asked to."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.told: list[tuple[int | None, int, int | None]] = []
        self.unanswered: list[Callable[[], None]] = []

    def __call__(self, pasid: int | None, iova: int, size: int | None, done: Callable[[], None]) -> None:
        self.told.append((pasid, iova, size))
        if self.at_once:
            done()
        else:
            self.unanswered.append(done)

    def take(self) -> list[tuple[int | None, int, int | None]]:
        told, self.told = self.told, []
        return told


class Driver:
    """A driver's hands on one IOMMU, whose structures lie from `base` on: DEVICE_TABLE and what follows are offsets."""

    def __init__(self, ram: Ram, iommu: AmdIommu, base: int = 0) -> None:
        self.ram = ram
        self.iommu = iommu
        self.base = base
        self.interrupts = 0
        self.command_size = self.event_size = self.ppr_size = 0
        self.sequence = 0
        iommu.connect_interrupts(self._interrupted)

    def _interrupted(self, vector: int) -> bool:
        assert vector == 0
        self.interrupts += 1
        return True

    # Registers, 64-bit ones as pairs of 32 bits

    def read(self, offset: int) -> int:
        return self.iommu.bar_read(0, offset, 4) | self.iommu.bar_read(0, offset + 4, 4) << 32

    def write(self, offset: int, value: int) -> None:
        self.iommu.bar_write(0, offset, 4, value & 0xFFFF_FFFF)
        self.iommu.bar_write(0, offset + 4, 4, value >> 32)

    def control(self, *, set_: int = 0, clear: int = 0) -> None:
        self.write(CONTROL, self.read(CONTROL) & ~clear | set_)

    @property
    def status(self) -> int:
        return self.read(STATUS)

    # Start, as a driver starts it

    def enable_msi(self) -> None:
        config = self.iommu.config
        config.write(0x64, 4, 0xFEE0_0000)
        config.write(0x6C, 2, 0x21)
        config.write(0x62, 2, config.read(0x62, 2) | 1)

    def start(self, *, pages: int = 2, commands: int = 9, events: int = 9) -> None:
        """Device table of `pages` pages, rings of 2^n entries, all on, everything invalidated."""
        self.write(0x00, self.base + DEVICE_TABLE | pages - 1)
        self.set_commands(commands)
        self.control(set_=COMMAND_EN | GT_EN)
        self.control(set_=IOMMU_EN)
        self.submit(invalidate_all())
        self.set_events(events)
        self.control(set_=EVENT_LOG_EN)
        self.enable_msi()
        self.control(set_=EVENT_INT_EN)
        assert self.wait()
        assert self.status == EVENT_RUN | COMMAND_RUN

    def set_commands(self, length: int, base: int | None = None) -> None:
        self.command_size = 16 << length
        self.write(0x08, (self.base + COMMANDS if base is None else base) | length << 56)
        self.write(COMMAND_HEAD, 0)
        self.write(COMMAND_TAIL, 0)

    def set_events(self, length: int, base: int | None = None) -> None:
        self.event_size = 16 << length
        self.write(0x10, (self.base + EVENTS if base is None else base) | length << 56)
        self.write(EVENT_HEAD, 0)
        self.write(EVENT_TAIL, 0)

    def set_pprs(self, length: int, base: int | None = None) -> None:
        self.ppr_size = 16 << length
        self.write(PPR_BASE, (self.base + PPRS if base is None else base) | length << 56)
        self.write(PPR_HEAD, 0)
        self.write(PPR_TAIL, 0)

    def start_pprs(self, length: int = 9) -> None:
        """As Linux does: PPREn, the ring, its interrupt, PPRLogEn."""
        self.control(set_=PPR_EN)
        self.set_pprs(length)
        self.control(set_=PPR_INT_EN)
        self.control(set_=PPR_LOG_EN)

    # Queues

    def place(self, *commands: bytes) -> int:
        """Put commands into the ring and answer with the new tail, not yet written to its register."""
        tail = self.read(COMMAND_TAIL)
        for command in commands:
            self.ram.poke(self.base + COMMANDS + tail, command)
            tail = (tail + 16) % self.command_size
        return tail

    def submit(self, *commands: bytes) -> None:
        self.write(COMMAND_TAIL, self.place(*commands))

    def wait(self) -> bool:
        """COMPLETION_WAIT with a store of the next number: whether it was stored."""
        self.sequence += 1
        self.submit(completion_wait(self.base + SEMAPHORE, self.sequence))
        return struct.unpack("<Q", self.ram.peek(self.base + SEMAPHORE, 8)) == (self.sequence,)

    def _taken(self, interrupt: int, head_at: int, tail_at: int, log: int, size: int) -> list[bytes]:
        """Take the entries out of a log, and clear its interrupt."""
        self.write(STATUS, interrupt)
        head, tail = self.read(head_at), self.read(tail_at)
        found = []
        while head != tail:
            found.append(self.ram.peek(self.base + log + head, 16))
            head = (head + 16) % size
        self.write(head_at, head)
        return found

    def events(self) -> list[Event]:
        return [parse_event(e) for e in self._taken(EVENT_INT, EVENT_HEAD, EVENT_TAIL, EVENTS, self.event_size)]

    def page_requests(self) -> list[PageRequest]:
        return [parse_page_request(e) for e in self._taken(PPR_INT, PPR_HEAD, PPR_TAIL, PPRS, self.ppr_size)]

    # Device table

    def set_entry(self, device: int, entry: bytes, *, flush: bool = True) -> None:
        self.ram.poke(self.base + DEVICE_TABLE + device * 32, entry)
        if flush:
            self.submit(invalidate_entry(device))
            assert self.wait()


class Vm(Driver):
    """Memory, engine and IOMMU of a VM with two endpoints, and a driver's hands on its registers."""

    def __init__(self, *, memory: int = MEMORY, clock: Callable[[], float] = time.monotonic) -> None:
        ram = Ram(memory)
        self.engine = Engine(clock=clock)
        context = self.engine.open()
        self.context = context
        self.stage2 = context.alloc()
        context.map_dma(self.stage2, 0, ram.hva, memory, Access.READ | Access.WRITE)
        self.timers = Timers()
        for rid, name in ((ENDPOINT, "endpoint"), (SECOND, "second")):
            self.add_device(rid, name)
        super().__init__(ram, self.make_iommu(IOMMU, [ENDPOINT, SECOND]))
        self.engine.set_router(self.iommu.route)
        self.engine.on_fault(self.iommu.on_fault)
        context.faults.on_ready(self._faults_ready)
        self.endpoint = self.engine.devices[ENDPOINT].port
        self.second = self.engine.devices[SECOND].port

    def add_device(self, rid: int, name: str) -> None:
        self.engine.add_device(rid, name, BEHIND_X86)
        self.context.bind_device(rid)

    def make_iommu(self, rid: int, endpoints: list[int]) -> AmdIommu:
        self.add_device(rid, f"iommu {rid:x}")
        self.context.attach(rid, self.stage2)
        iommu = AmdIommu(self.context, self.stage2, endpoints, later=self.timers)
        iommu.rid = rid
        iommu.connect_dma(self.engine.devices[rid].port)
        return iommu

    def close(self) -> None:
        self.engine.close()
        self.ram.close()

    def _faults_ready(self) -> None:
        for record in self.context.read_faults().records:
            self.iommu.page_request(record)

    def translate(self, device: int = ENDPOINT, *, levels: int = 4, domain: int = 7, base: int = TABLES) -> PageTable:
        """Give a device an empty page table."""
        table = PageTable(self.ram, base, levels)
        self.set_entry(device, device_entry(table.root, levels, domain))
        return table
