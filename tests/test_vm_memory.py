"""The VM's stage 2 from several functions' DMA maps, over real memfds and the real core."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from guest_ram import PAGE, Mapping, Ram
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backend.core import Access, Fault, Reason
from backend.ioasid import Context, Engine, IoasidError, Kind
from backend.vm.memory import MappedExtent, VmMemory

R, RW = Access.READ, Access.READ | Access.WRITE
PROBE = 0x0010


@dataclass(frozen=True)
class Region:
    """What a DMA_MAP said."""

    gpa: int
    size: int
    hva: int | None
    access: Access = RW


class Vm:
    """An engine with one stage 2, and a device attached to it."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.ctx: Context = self.engine.open()
        self.stage2 = self.ctx.alloc(Kind.VM)
        self.port = self.engine.add_device(PROBE, "probe").port
        self.ctx.bind_device(PROBE)
        self.ctx.attach(PROBE, self.stage2)
        self.memory = VmMemory(self.engine.vm_memory, self.ctx.get_info(self.stage2).address_width or 0)

    def writable(self, gpa: int) -> bool:
        return not isinstance(self.engine.core.translate(PROBE, gpa, Access.WRITE), Fault)

    def why(self, gpa: int) -> Reason:
        answer = self.port.read(gpa, 8)
        assert isinstance(answer, Fault)
        return answer.reason

    def close(self) -> None:
        self.memory.close()
        self.engine.close()


@pytest.fixture
def vm() -> Iterator[Vm]:
    vm = Vm()
    yield vm
    vm.close()


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram(64 * PAGE)
    for page in range(64):
        ram.poke(page * PAGE, tag(0, page))
    yield ram
    ram.close()


def tag(file: int, page: int) -> bytes:
    return b"%03d/%04d" % (file, page)


def mappings_of(fd: int) -> int:
    """How often this process maps a file, from the kernel."""
    inode = str(os.fstat(fd).st_ino)
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum(line.split()[4] == inode for line in maps)


def test_two_functions_share_one_duplicate(vm: Vm, ram: Ram) -> None:
    first, second = ram.map_again(0, ram.size), ram.map_again(0, ram.size)
    base = mappings_of(ram.fd)
    vm.memory.map("iommu", Region(0, ram.size, first.hva))
    vm.memory.map("nvme", Region(0, ram.size, second.hva))
    assert mappings_of(ram.fd) == base + 1
    assert (vm.memory.regions("iommu"), vm.memory.regions("nvme"), vm.memory.regions()) == (1, 1, 2)
    extent = vm.memory.extents[0]
    assert (extent.gpa, extent.size, extent.access) == (0, ram.size, RW)
    assert extent.hva not in {first.hva, second.hva}

    first.close()  # what libvfio-user does to its own mapping is its own affair
    vm.memory.disconnect("iommu")
    assert vm.port.read(5 * PAGE, 8) == tag(0, 5)
    assert vm.port.write(5 * PAGE, b"by dma!!") is None
    assert ram.peek(5 * PAGE, 8) == b"by dma!!"

    second.close()
    assert mappings_of(ram.fd) == base - 1
    vm.memory.unmap("nvme", Region(0, ram.size, None))
    assert mappings_of(ram.fd) == base - 2
    assert vm.why(5 * PAGE) == Reason.NOT_PRESENT
    assert vm.memory.extents == []


@pytest.mark.parametrize("start", [0x100000, (6 << 20) + PAGE, PAGE])
def test_large_leaves_are_possible_wherever_the_client_mapped_it(vm: Vm, start: int) -> None:
    """hva = gpa modulo 1 GiB; the reservation made to get there is gone again."""
    ram = Ram(3 << 30)
    ram.poke(2 << 30, b"distant!")
    mapping = ram.map_again(PAGE, (3 << 30) - PAGE)
    before = vm.engine.core.counters().table_pages, address_space()
    vm.memory.map("a", Region(start, mapping.size, mapping.hva))
    extent = vm.memory.extents[0]
    assert (extent.hva - start) % (1 << 30) == 0
    assert vm.port.read(start + (2 << 30) - PAGE, 8) == b"distant!"
    assert vm.port.write(start + mapping.size - 4, b"last") is None
    assert ram.peek((3 << 30) - 4, 4) == b"last"
    assert vm.engine.core.counters().table_pages - before[0] <= 8, "3 GiB of 4 KiB leaves would take 1,536"
    assert address_space() - before[1] < mapping.size + (64 << 20)
    vm.memory.disconnect("a")
    mapping.close()
    ram.close()


def address_space() -> int:
    """Bytes of address space in use, from the kernel."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * PAGE


def test_same_words_again_cost_no_commands(vm: Vm, ram: Ram, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.memory.map("a", Region(0, ram.size, ram.hva))
    commands: list[str] = []
    for name in ("map", "unmap"):
        monkeypatch.setattr(vm.engine.vm_memory, name, lambda *args, name=name: commands.append(name))
    again = ram.map_again(0, ram.size)
    vm.memory.map("b", Region(0, ram.size, again.hva))
    vm.memory.map("b", Region(0, ram.size, again.hva))
    vm.memory.unmap("a", Region(0, ram.size, ram.hva))
    assert commands == []
    assert vm.memory.regions() == 1
    monkeypatch.undo()
    again.close()


def test_newest_word_wins_and_what_it_hid_comes_back(vm: Vm, ram: Ram) -> None:
    vm.memory.map("a", Region(0, 8 * PAGE, ram.hva))
    other = ram.map_again(32 * PAGE, 2 * PAGE)
    vm.memory.map("b", Region(2 * PAGE, 2 * PAGE, other.hva, R))
    assert [vm.port.read(page * PAGE, 8) for page in range(8)] == [tag(0, page) for page in (0, 1, 32, 33, 4, 5, 6, 7)]
    assert [vm.writable(page * PAGE) for page in range(8)] == [True, True, False, False, True, True, True, True]
    assert [(extent.gpa // PAGE, extent.size // PAGE) for extent in vm.memory.extents] == [(0, 2), (2, 2), (4, 4)]
    vm.memory.unmap("b", Region(2 * PAGE, 2 * PAGE, None))
    assert [vm.port.read(page * PAGE, 8) for page in range(8)] == [tag(0, page) for page in range(8)]
    assert len(vm.memory.extents) == 1, "no trace of the cut remains"
    vm.memory.map("b", Region(2 * PAGE, 2 * PAGE, other.hva, R))
    vm.memory.map("a", Region(0, 8 * PAGE, ram.hva))
    assert len(vm.memory.extents) == 1, "nor of what lies hidden"
    assert vm.port.read(2 * PAGE, 8) == tag(0, 2) and vm.writable(2 * PAGE)
    other.close()


def test_region_without_a_file_is_a_hole(vm: Vm, ram: Ram) -> None:
    vm.memory.map("a", Region(0, 4 * PAGE, ram.hva))
    vm.memory.map("a", Region(0xFFFC0000, 0x40000, None, R))
    assert vm.why(0xFFFC0000) == Reason.NOT_PRESENT
    vm.memory.map("b", Region(PAGE, PAGE, None))
    assert vm.why(PAGE) == Reason.NOT_PRESENT
    assert vm.port.read(2 * PAGE, 8) == tag(0, 2)


def test_mapping_that_cannot_be_written_stays_so(vm: Vm, ram: Ram) -> None:
    """A client that says "writable" of what was mapped read-only: a store there would end the process."""
    mapping = ram.map_again(0, PAGE, writable=False)
    vm.memory.map("a", Region(0, PAGE, mapping.hva, RW))
    assert vm.port.read(0, 8) == tag(0, 0)
    answer = vm.port.write(0, b"x")
    assert isinstance(answer, Fault) and answer.reason == Reason.PERMISSION
    mapping.close()


# The RAM of a PC with 512 MiB as its firmware remaps it: 18 maps and 12 unmaps, to the final set that QEMU 11.1 leaves.
# (start, end, access); None for what comes without a file.
LOW, HIGH, ROM = (0x000000, 0x0C0000, RW), (0x100000, 0x20000000, RW), (0xFFFC0000, 1 << 32, None)
Step = tuple[str, tuple[int, int, Access | None]]
FIRMWARE: list[Step] = [
    ("map", LOW),
    ("map", (0x0C0000, 0x100000, None)),
    ("map", HIGH),
    ("map", ROM),
    ("unmap", (0x0C0000, 0x100000, None)),
    ("map", (0x0C0000, 0x0F0000, None)),
    ("map", (0x0F0000, 0x100000, RW)),
    ("unmap", LOW),
    ("unmap", (0x0C0000, 0x0F0000, None)),
    ("map", (0x000000, 0x0C4000, RW)),
    ("map", (0x0C4000, 0x0F0000, None)),
    ("unmap", (0x000000, 0x0C4000, RW)),
    ("unmap", (0x0C4000, 0x0F0000, None)),
    ("unmap", (0x0F0000, 0x100000, RW)),
    ("map", (0x000000, 0x0C8000, RW)),
    ("map", (0x0C8000, 0x0E8000, None)),
    ("map", (0x0E8000, 0x100000, RW)),
    ("unmap", (0x0C8000, 0x0E8000, None)),
    ("map", (0x0C8000, 0x0E8000, RW)),
    ("unmap", (0x000000, 0x0C8000, RW)),
    ("unmap", (0x0C8000, 0x0E8000, RW)),
    ("map", (0x000000, 0x0E8000, RW)),
    ("unmap", (0x000000, 0x0E8000, RW)),
    ("map", (0x000000, 0x0C3000, RW)),
    ("map", (0x0C3000, 0x0E8000, R)),
    ("unmap", (0x0E8000, 0x100000, RW)),
    ("map", (0x0E8000, 0x0F0000, R)),
    ("unmap", (0x0E8000, 0x0F0000, R)),
    ("map", (0x0E8000, 0x0F0000, RW)),
    ("map", (0x0F0000, 0x100000, R)),
]
FINAL = [
    (0x000000, 0x0C3000, RW),
    (0x0C3000, 0x0E8000, R),
    (0x0E8000, 0x0F0000, RW),
    (0x0F0000, 0x100000, R),
    (0x100000, 0x20000000, RW),
]


def test_firmware_of_two_functions(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [step for step, _ in FIRMWARE].count("map") == 18 and len(FIRMWARE) == 30
    ram = Ram(512 << 20)
    base = mappings_of(ram.fd)
    for gpa in (0x1000, 0xC4000, 0xE9000, 0xFF000, 0x1FFFF000):
        ram.poke(gpa, b"%08x" % gpa)
    large = [0]
    real = vm.engine.vm_memory.map

    def counted(gpa: int, hva: int, size: int, access: Access) -> None:
        large[0] += gpa == HIGH[0]
        real(gpa, hva, size, access)

    monkeypatch.setattr(vm.engine.vm_memory, "map", counted)
    mapped: dict[str, dict[tuple[int, int], Mapping | None]] = {"iommu": {}, "nvme": {}}

    def say(function: str, step: Step) -> None:
        verb, (start, end, access) = step
        size = end - start
        if verb == "map":
            mapping = None if access is None else ram.map_again(start, size, writable=access == RW)
            mapped[function][start, end] = mapping
            region = Region(start, size, mapping.hva if mapping else None, access or R)
            vm.memory.map(function, region)
        else:
            vm.memory.unmap(function, Region(start, size, None))
            gone = mapped[function].pop((start, end))
            if gone is not None:
                gone.close()

    # Each has a socket of its own: one runs up to seven messages ahead of the other.
    for index in range(len(FIRMWARE) + 7):
        if index < len(FIRMWARE):
            say("iommu", FIRMWARE[index])
        if index >= 7:
            say("nvme", FIRMWARE[index - 7])

    extents = [(each.gpa, each.gpa + each.size, each.access) for each in vm.memory.extents]
    assert extents == FINAL
    assert large == [1], "the large part was mapped once, for both and through every change elsewhere"
    for gpa in (0x1000, 0xC4000, 0xE9000, 0xFF000, 0x1FFFF000):
        assert vm.port.read(gpa, 8) == b"%08x" % gpa
    writable = [vm.writable(gpa) for gpa in (0x1000, 0xC4000, 0xE9000, 0xFF000, 0x1FFFF000)]
    assert writable == [True, False, True, False, True]
    assert vm.why(0xFFFC0000) == vm.why(0x20000000) == Reason.NOT_PRESENT

    for function in ("nvme", "iommu"):
        for mapping in mapped[function].values():
            if mapping is not None:
                mapping.close()
        vm.memory.disconnect(function)
    assert vm.memory.extents == [] and vm.why(0x1000) == Reason.NOT_PRESENT
    assert mappings_of(ram.fd) == base
    ram.close()


def test_truncated_memory_faults(vm: Vm, ram: Ram) -> None:
    vm.memory.map("a", Region(0, ram.size, ram.hva))
    before = vm.memory.snapshot()
    os.ftruncate(ram.fd, 8 * PAGE)
    assert vm.port.read(7 * PAGE, 8) == tag(0, 7)
    assert vm.why(8 * PAGE) == Reason.MEMORY_GONE
    with pytest.raises(IoasidError, match="GPA 0x8000") as refused:
        vm.memory.read(7 * PAGE, 2 * PAGE)
    assert refused.value.errno == errno.EFAULT
    assert vm.memory.snapshot().changed(before) == [0, 0x10000, 0x20000, 0x30000]
    vm.memory.disconnect("a")


REFUSED = [
    (Region(0x800, PAGE, 1), errno.EINVAL, "whole 4 KiB pages"),
    (Region(0, PAGE - 1, 1), errno.EINVAL, "whole 4 KiB pages"),
    (Region(0, 0, 1), errno.EINVAL, "whole 4 KiB pages"),
    (Region((1 << 64) - PAGE, 2 * PAGE, 1), errno.EINVAL, "whole 4 KiB pages"),
    (Region(1 << 48, PAGE, 1), errno.EINVAL, "48 bits"),
    (Region((1 << 48) - PAGE, 2 * PAGE, 1), errno.EINVAL, "48 bits"),
    (Region(0, PAGE, PAGE), errno.EFAULT, "no mapping of this process"),
]


@pytest.mark.parametrize(("region", "code", "words"), REFUSED)
def test_refused_region(vm: Vm, ram: Ram, region: Region, code: int, words: str) -> None:
    vm.memory.map("a", Region(0, ram.size, ram.hva))
    before = vm.memory.extents
    with pytest.raises(IoasidError, match=words) as refused:
        vm.memory.map("b", region)
    assert refused.value.errno == code
    assert vm.memory.extents == before and vm.memory.regions("b") == 0
    with pytest.raises(IoasidError, match="b: no DMA region") as unknown:
        vm.memory.unmap("b", region)
    assert unknown.value.errno == errno.ENOENT


def test_refused_memory(vm: Vm, ram: Ram) -> None:
    private = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    where = ctypes.addressof(ctypes.c_char.from_buffer(private))
    with pytest.raises(IoasidError, match="share=on") as refused:
        vm.memory.map("a", Region(0, PAGE, where))
    assert refused.value.errno == errno.EINVAL
    private.close()
    with pytest.raises(IoasidError, match="no mapping of this process") as short:
        vm.memory.map("a", Region(0, ram.size + (1 << 30), ram.hva))
    assert short.value.errno == errno.EFAULT
    assert vm.memory.regions() == 0


def test_bounds(vm: Vm, ram: Ram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.vm.memory.MAX_REGIONS_OF_FUNCTION", 2)
    monkeypatch.setattr("backend.vm.memory.MAX_REGIONS", 3)
    for page in range(2):
        vm.memory.map("a", Region(page * PAGE, PAGE, ram.hva))
    vm.memory.map("b", Region(0, PAGE, ram.hva))
    for function in ("a", "b"):
        with pytest.raises(IoasidError, match=f"^{function}: .* regions") as refused:
            vm.memory.map(function, Region(2 * PAGE, PAGE, ram.hva))
        assert refused.value.errno == errno.ENOSPC
    vm.memory.map("a", Region(0, PAGE, ram.hva))
    assert vm.memory.regions() == 3


def test_stage2_that_refuses_leaves_all_as_it_was(vm: Vm, ram: Ram, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.memory.map("a", Region(0, ram.size, ram.hva))
    before, mapped = vm.memory.extents, mappings_of(ram.fd)
    monkeypatch.setattr("backend.ioasid.vm_memory.MAX_MAPPINGS", 2)
    with pytest.raises(IoasidError, match="of 2 extents"):
        vm.memory.map("b", Region(PAGE, PAGE, ram.hva, R))
    assert vm.memory.extents == before and mappings_of(ram.fd) == mapped
    assert vm.port.read(PAGE, 8) == tag(0, 1) and vm.writable(PAGE)
    monkeypatch.undo()
    vm.memory.map("b", Region(PAGE, PAGE, ram.hva, R))
    monkeypatch.setattr("backend.ioasid.vm_memory.MAX_MAPPINGS", 0)
    with pytest.raises(IoasidError):
        vm.memory.unmap("b", Region(PAGE, PAGE, None))
    assert vm.memory.regions("b") == 0
    assert vm.why(PAGE) == Reason.NOT_PRESENT, "what was taken away is away"
    monkeypatch.undo()
    vm.memory.map("a", Region(0, ram.size, ram.hva))
    assert vm.memory.extents == before, "and the next word heals the rest"


def test_read(vm: Vm, ram: Ram) -> None:
    vm.memory.map("a", Region(0, 2 * PAGE, ram.hva))
    vm.memory.map("b", Region(2 * PAGE, PAGE, ram.hva + 9 * PAGE))
    assert vm.memory.read(2 * PAGE - 8, 16) == bytes(8) + tag(0, 9)
    assert vm.memory.read(PAGE, 0) == b""
    for gpa, size, code in ((2 * PAGE, 2 * PAGE, errno.EFAULT), (0, 1 << 40, errno.EINVAL), (0, -1, errno.EINVAL)):
        with pytest.raises(IoasidError) as refused:
            vm.memory.read(gpa, size)
        assert refused.value.errno == code


def test_snapshot_tells_what_changed(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.vm.snapshot._swapping", lambda: False)
    ram = Ram(4 << 20)
    vm.memory.map("a", Region(0, 1 << 20, ram.hva))
    vm.memory.map("a", Region(1 << 20, 1 << 20, ram.hva + (1 << 20), R))
    vm.memory.map("a", Region(1 << 30, 2 << 20, ram.hva + (2 << 20)))
    ram.poke(0x4000, b"here")
    held = os.fstat(ram.fd).st_blocks
    before = vm.memory.snapshot()
    assert os.fstat(ram.fd).st_blocks == held, "a hole stays a hole"
    assert vm.memory.snapshot() == before and vm.memory.snapshot().digest == before.digest

    ram.poke(0x3_0000, bytes(PAGE))
    assert vm.memory.snapshot() == before, "a page of zeros reads as a hole does"
    ram.poke((1 << 20) + 5, b"x")
    assert vm.memory.snapshot() == before, "read-only memory is not part of it"
    ram.poke((3 << 20) - 1, b"!")
    after = vm.memory.snapshot()
    assert after.changed(before) == [(1 << 30) + 0xF0000] and after.digest != before.digest
    assert vm.memory.snapshot(exclude=[((1 << 30) + 0xFFFFF, 1)]) == before
    assert vm.memory.snapshot(exclude=[((1 << 30) + 0xFFFFE, 1)]) == after
    ram.poke(0x4000, b"Here")
    last = vm.memory.snapshot()
    assert last.changed(after) == [0]
    monkeypatch.setattr("backend.vm.snapshot._swapping", lambda: True)
    assert vm.memory.snapshot() == last, "reading all of it, as where the host may have swapped, says the same"
    vm.memory.close()
    ram.close()


class Words(RuleBasedStateMachine):
    """Three functions say what they like; a dictionary of pages says what must come of it."""

    PAGES = 12
    functions = st.sampled_from("abc")
    starts = st.integers(0, PAGES - 1)
    sizes = st.integers(1, PAGES)
    kinds = st.sampled_from(["rw", "ro", "rom"])

    def __init__(self) -> None:
        super().__init__()
        self.vm = Vm()
        self.rams = [Ram(2 * self.PAGES * PAGE) for _ in range(2)]
        for file, ram in enumerate(self.rams):
            for page in range(2 * self.PAGES):
                ram.poke(page * PAGE, tag(file, page))
        self.base = [mappings_of(ram.fd) for ram in self.rams]
        self.clock = 0
        self.pages: list[dict[tuple[str, int, int], tuple[int, bytes | None, bool]]] = [{} for _ in range(self.PAGES)]

    @rule(
        function=functions,
        start=starts,
        size=sizes,
        backing=st.tuples(st.integers(0, 1), st.integers(0, PAGES - 1)),
        kind=kinds,
    )
    def map(self, function: str, start: int, size: int, backing: tuple[int, int], kind: str) -> None:
        size = min(size, self.PAGES - start)
        file, offset = backing
        gone = self.rams[file].map_again(offset * PAGE, size * PAGE, writable=kind == "rw")
        hva = None if kind == "rom" else gone.hva
        self.vm.memory.map(function, Region(start * PAGE, size * PAGE, hva, RW if kind == "rw" else R))
        gone.close()
        self.clock += 1
        for page in range(start, start + size):
            content = None if kind == "rom" else tag(file, offset + page - start)
            self.pages[page][function, start, size] = (self.clock, content, kind == "rw")

    @rule(function=functions, start=starts, size=sizes)
    def unmap(self, function: str, start: int, size: int) -> None:
        size = min(size, self.PAGES - start)
        region = Region(start * PAGE, size * PAGE, None)
        if (function, start, size) in self.pages[start]:
            self.vm.memory.unmap(function, region)
        else:
            with pytest.raises(IoasidError):
                self.vm.memory.unmap(function, region)
        for page in self.pages:
            page.pop((function, start, size), None)

    @rule(function=functions)
    def disconnect(self, function: str) -> None:
        self.vm.memory.disconnect(function)
        for page in self.pages:
            for word in [word for word in page if word[0] == function]:
                del page[word]

    @invariant()
    def each_page_is_as_its_newest_word_says(self) -> None:
        for number, words in enumerate(self.pages):
            content, writable = max(words.values())[1:] if words else (None, False)
            answer = self.vm.port.read(number * PAGE, 8)
            if content is None:
                assert isinstance(answer, Fault) and answer.reason == Reason.NOT_PRESENT
            else:
                assert answer == content
            assert self.vm.writable(number * PAGE) == (content is not None and writable)

    @invariant()
    def nothing_is_held_for_longer_than_it_is_used(self) -> None:
        standing = {word for page in self.pages for word in page}
        assert self.vm.memory.regions() == len(standing)
        if not standing:
            assert [mappings_of(ram.fd) for ram in self.rams] == self.base
            assert self.vm.memory.extents == []

    @invariant()
    def extents_are_as_few_as_they_can_be(self) -> None:
        """No cut remains that no standing region has: or a client could fragment stage 2 without end."""
        standing = {word for page in self.pages for word in page}
        assert len(self.vm.memory.extents) <= max(0, 2 * len(standing) - 1)

    def teardown(self) -> None:
        self.vm.close()
        assert [mappings_of(ram.fd) for ram in self.rams] == self.base
        for ram in self.rams:
            ram.close()


TestWords = Words.TestCase
TestWords.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_extents_are_in_order(vm: Vm, ram: Ram) -> None:
    for page in (5, 1, 3):
        vm.memory.map("a", Region(page * PAGE, PAGE, ram.hva))
    hva = vm.memory.extents[0].hva
    assert vm.memory.extents == [MappedExtent(page * PAGE, PAGE, hva, RW) for page in (1, 3, 5)]
