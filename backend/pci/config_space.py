"""The configuration space of one function: all 4096 bytes, with what a guest may write (PCI 3.0 chapter 6, PCIe 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from backend.pci.bars import BAR_COUNT, Bar
from backend.pci.capabilities import Capability
from backend.pci.ids import PciIds
from backend.pci.registers import Register

CONFIG_SIZE = 4096
CONFIG_STANDARD_SIZE = 256
HEADER_SIZE = 64

COMMAND = 0x04
STATUS = 0x06
BAR0 = 0x10
CAPABILITY_POINTER = 0x34
INTERRUPT_LINE = 0x3C

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
COMMAND_PARITY = 1 << 6
COMMAND_SERR = 1 << 8
COMMAND_INTX_DISABLE = 1 << 10
STATUS_CAPABILITIES = 1 << 4
STATUS_ERRORS = 0xF900
"""Master data parity (bit 8) and bits 15:11: written 1 to clear (PCI 3.0, 6.2.3)."""


class ConfigSpace:
    """4096 bytes, the mask of what a guest may write, the mask of what it clears by writing 1, and reset values."""

    def __init__(
        self,
        ids: PciIds,
        bars: Mapping[int, Bar] | None = None,
        capabilities: Sequence[Capability] = (),
        *,
        force_bus_master: bool = False,
    ) -> None:
        self._data = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._clearable = bytearray(CONFIG_SIZE)
        self._reset = bytearray(CONFIG_SIZE)
        self._hooks: list[tuple[int, int, Callable[[], None]]] = []
        self._used: list[tuple[int, int, str]] = [(0, HEADER_SIZE, "the header")]
        self._found: dict[tuple[bool, int], int] = {}
        self._lay_header(ids, force_bus_master)
        self._lay_bars(bars or {})
        self._lay_chain([capability for capability in capabilities if not capability.extended])
        self._lay_extended_chain([capability for capability in capabilities if capability.extended])
        self._reset[:] = self._data

    def find(self, capability: int, *, extended: bool = False) -> int | None:
        """Offset of the first capability with this id, or None."""
        return self._found.get((extended, capability))

    def read(self, offset: int, size: int) -> int:
        """`size` bytes at `offset` as a little-endian number."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def read_bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`."""
        return bytes(self._data[offset : offset + count])

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write of `size` bytes: masks apply, then the hooks of what it touched run."""
        self.write_bytes(offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def write_bytes(self, offset: int, data: bytes) -> None:
        """A guest's write of any length; what reaches beyond the space is dropped."""
        for index, value in enumerate(data, offset):
            if index >= CONFIG_SIZE:
                break
            rw = self._writable[index]
            self._data[index] = (self._data[index] & ~rw | value & rw) & ~(value & self._clearable[index])
        end = offset + len(data)
        for start, stop, hook in self._hooks:
            if start < end and offset < stop:
                hook()

    def set(self, offset: int, size: int, value: int) -> None:
        """Change bytes from the device's side: no mask applies, no hook runs."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")

    def on_write(self, offset: int, size: int, hook: Callable[[], None]) -> None:
        """Call hook() after each guest's write that touched [offset, offset + size)."""
        self._hooks.append((offset, offset + size, hook))

    def reset(self) -> None:
        """Every byte back to its reset value."""
        self._data[:] = self._reset

    def _lay(self, base: int, register: Register) -> None:
        start, end = base + register.offset, base + register.end
        self._data[start:end] = register.reset.to_bytes(register.width, "little")
        self._writable[start:end] = register.rw.to_bytes(register.width, "little")
        self._clearable[start:end] = register.w1c.to_bytes(register.width, "little")

    def _lay_header(self, ids: PciIds, force_bus_master: bool) -> None:
        command = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_PARITY | COMMAND_SERR
        command |= COMMAND_INTX_DISABLE
        forced = COMMAND_BUS_MASTER if force_bus_master else 0
        full = 0xFFFF
        for register in (
            Register("VENDOR_ID", 0x00, 2, ids.vendor, ro=full, section="PCI 3.0, 6.2.1"),
            Register("DEVICE_ID", 0x02, 2, ids.device, ro=full, section="PCI 3.0, 6.2.1"),
            Register("COMMAND", COMMAND, 2, forced, ro=forced, rw=command & ~forced, section="PCI 3.0, 6.2.2"),
            Register("STATUS", STATUS, 2, ro=STATUS_CAPABILITIES, w1c=STATUS_ERRORS, section="PCI 3.0, 6.2.3"),
            Register("REVISION_ID", 0x08, 1, ids.revision, ro=0xFF, section="PCI 3.0, 6.2.1"),
            Register("PROGRAMMING_INTERFACE", 0x09, 1, ids.class_code & 0xFF, ro=0xFF, section="PCI 3.0, 6.2.1"),
            Register("CLASS", 0x0A, 2, ids.class_code >> 8, ro=full, section="PCI 3.0, 6.2.1"),
            Register("CACHE_LINE_SIZE", 0x0C, 1, rw=0xFF, section="PCI 3.0, 6.2.4"),
            Register("SUBSYSTEM_VENDOR_ID", 0x2C, 2, ids.subsystem_vendor, ro=full, section="PCI 3.0, 6.2.4"),
            Register("SUBSYSTEM_ID", 0x2E, 2, ids.subsystem, ro=full, section="PCI 3.0, 6.2.4"),
            Register("INTERRUPT_LINE", INTERRUPT_LINE, 1, rw=0xFF, section="PCI 3.0, 6.2.4"),
        ):
            self._lay(0, register)

    def _lay_bars(self, bars: Mapping[int, Bar]) -> None:
        for index, bar in bars.items():
            slots = 2 if bar.is_64bit else 1
            if not 0 <= index <= BAR_COUNT - slots:
                raise ValueError(f"BAR{index}: a function has BARs 0 to {BAR_COUNT - 1}, a 64-bit one takes two")
            if bar.is_64bit and index + 1 in bars:
                raise ValueError(f"BAR{index + 1} holds the upper half of the 64-bit BAR{index}")
            kind = 0x3 if bar.is_io else 0xF
            register = Register(f"BAR{index}", 0, 4 * slots, bar.type_bits, ro=kind, rw=bar.address_mask & ~kind)
            self._lay(BAR0 + 4 * index, register)

    def _lay_chain(self, capabilities: Sequence[Capability]) -> None:
        link = CAPABILITY_POINTER
        for capability, offset in self._places(capabilities, HEADER_SIZE, CONFIG_STANDARD_SIZE):
            self._data[link] = offset
            self._data[offset] = capability.id
            link = offset + 1
        if capabilities:
            self._data[STATUS] |= STATUS_CAPABILITIES

    def _lay_extended_chain(self, capabilities: Sequence[Capability]) -> None:
        # The chain must begin at 0x100 (PCIe 5.0, 7.6.1), so the first one stands there or none does.
        previous: int | None = None
        for capability, offset in self._places(capabilities, CONFIG_STANDARD_SIZE, CONFIG_SIZE):
            if previous is None and offset != CONFIG_STANDARD_SIZE:
                raise ValueError(f"the first extended capability stands at 0x100, not at {offset:#x}")
            self.set(offset, 4, capability.id | capability.version << 16)
            if previous is not None:
                self.set(previous, 4, self.read(previous, 4) | offset << 20)
            previous = offset

    def _places(self, capabilities: Sequence[Capability], start: int, end: int) -> list[tuple[Capability, int]]:
        """Each capability with its offset, in the order given; those that ask for a place come first to it."""
        places: dict[int, int] = {}
        for index, capability in sorted(enumerate(capabilities), key=lambda item: item[1].offset is None):
            places[index] = self._place(capability, start, end)
        for index, capability in enumerate(capabilities):
            self._found.setdefault((capability.extended, capability.id), places[index])
        return [(capability, places[index]) for index, capability in enumerate(capabilities)]

    def _place(self, capability: Capability, start: int, end: int) -> int:
        """Find room, write the registers, remember the place; returns the offset."""
        name = f"capability {capability.id:#x}"
        candidates = range(start, end, 4) if capability.offset is None else (capability.offset,)
        for offset in candidates:
            if offset % 4 or offset < start or offset + capability.size > end:
                continue
            if all(offset >= stop or offset + capability.size <= first for first, stop, _ in self._used):
                break
        else:
            where = "anywhere" if capability.offset is None else f"at {capability.offset:#x}"
            raise ValueError(f"{name} ({capability.size} bytes) does not fit {where} in [{start:#x}, {end:#x})")
        self._used.append((offset, offset + capability.size, name))
        for register in capability.registers():
            self._lay(offset, register)
        return offset
