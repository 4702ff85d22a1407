"""The DMA engine's registers: they are those of the header that its driver is built with."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest
from dma_driver import Host, Ring
from dma_header import HEADER, VDMA, group

from backend.endpoints.dma_engine import DmaEngine, descriptors, engine, registers
from backend.pci import ResetKind


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def names(kind: type[IntEnum] | type[IntFlag]) -> dict[str, int]:
    return {name: int(member) for name, member in kind.__members__.items()}


def test_the_device_has_the_numbers_of_the_header() -> None:
    assert names(descriptors.Opcode) == group("OP_")
    assert names(descriptors.Flag) == group("FLAG_")
    assert names(descriptors.Status) == group("STATUS_")
    assert names(descriptors.Cause) == group("REASON_")
    assert names(registers.Control) == group("CONTROL_")
    assert names(registers.Command) == group("COMMAND_")
    assert names(registers.State) == {name: value for name, value in group("STATE_").items() if name != "MASK"}
    assert names(registers.Error) == {name: value for name, value in group("ERROR_").items() if name != "SHIFT"}
    assert names(registers.Feature) == group("FEATURE_")
    for name in ("ID", "VERSION", "RESET", "QUEUES_MAX", "QUEUE_BASE", "QUEUE_STRIDE", "ERROR_SHIFT", "MSIX_BAR"):
        assert getattr(registers, name) == VDMA[name], name
    sizes = {"DESCRIPTOR_SIZE": descriptors.DESCRIPTOR_SIZE, "COMPLETION_SIZE": descriptors.RECORD_SIZE}
    sizes |= {name: getattr(registers, name) for name in ("DOORBELL_BASE", "DOORBELL_STRIDE")}
    assert sizes == {name: VDMA[name] for name in sizes}
    ids = engine.PCI_IDS
    assert (ids.vendor, ids.device, ids.class_code) == (VDMA["VENDOR_ID"], VDMA["DEVICE_ID"], VDMA["CLASS"])


def test_each_register_stands_where_the_header_says() -> None:
    queues = 16
    offsets = {register.name: register.offset for register in registers.new_table(queues, 0)}
    expected = group("REG_")
    for queue in range(queues):
        base = VDMA["QUEUE_BASE"] + queue * VDMA["QUEUE_STRIDE"]
        expected |= {f"Q{queue}_{name}": base + offset for name, offset in group("Q_").items()}
        page = VDMA["DOORBELL_BASE"] + queue * VDMA["DOORBELL_STRIDE"]
        expected |= {f"Q{queue}_DB_{name}": page + offset for name, offset in group("DB_").items()}
    assert offsets == expected


def test_the_structures_of_the_header_have_the_device_s_layout(tmp_path: Path) -> None:
    """By the C compiler: the header in a program that asserts sizes and offsets."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the core is compiled with it"
    fields = {
        "vdma_descriptor": "opcode:0 reserved:1 flags:2 tag:4 completion:8 target:16 source:24 compare:24 length:32 "
        "value:40 value_high:48 compare_high:56",
        "vdma_completion": "status:0 reason:1 access:2 tag:4 done:8 result:16 result_high:24 fault_address:24",
    }
    lines = ['#include "vioasid_dma_regs.h"', "#include <stddef.h>"]
    for struct, text in fields.items():
        size = VDMA["DESCRIPTOR_SIZE" if struct == "vdma_descriptor" else "COMPLETION_SIZE"]
        lines.append(f'_Static_assert(sizeof(struct {struct}) == {size}, "size");')
        for field in text.split():
            name, offset = field.split(":")
            lines.append(f'_Static_assert(offsetof(struct {struct}, {name}) == {offset}, "{name}");')
    source = tmp_path / "layout.c"
    source.write_text("\n".join(lines) + "\n")
    command = [
        compiler,
        "-std=gnu11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{HEADER.parent}",
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_it_says_of_itself(host: Host) -> None:
    assert host.reg("ID").to_bytes(4, "little") == b"VDMA"
    assert host.reg("VERSION") == 1
    assert host.reg("QUEUES") == 8
    assert host.reg("ORDER_MAX") == 12
    assert host.reg("DEPTH") == 16
    assert host.reg("LENGTH_MAX", 8) == 4 << 30
    assert host.reg("OPERATIONS") == 0xFF
    assert host.reg("FEATURES") == 0
    assert [Ring(host, number, 4).get("VECTOR") for number in range(8)] == list(range(8))


@pytest.mark.parametrize("queues", [0, 17, -1])
def test_a_device_has_1_to_16_queues(queues: int) -> None:
    with pytest.raises(ValueError, match="give 1 to 16"):
        DmaEngine(queues=queues)


def test_doorbell_pages_of_queues_that_are_not_there_do_nothing() -> None:
    host = Host(queues=1)
    for offset in range(VDMA["DOORBELL_BASE"] + 0x1000, registers.BAR_SIZE, 0x1000):
        host.put(offset, 0xFFFF_FFFF)
        assert host.get(offset, 8) == 0
    assert host.get(VDMA["QUEUE_BASE"] + VDMA["QUEUE_STRIDE"], 8) == 0
    assert host.function.interrupts.vectors == 1
    host.close()


def test_a_plain_device_moves_the_kernel_s_memory_alone() -> None:
    """Without PASID, ATS and PRI: it has none of their capabilities, and a job in a PASID reaches nothing."""
    host = Host(pasids=False)
    assert host.function.config.read(0x100, 4) == 0
    assert (host.function.page_requests, host.function.tlb) == (None, None)
    assert host.reg("FEATURES") == 0
    ring = Ring(host, 0, 4)
    ring.start(VDMA["CONTROL_UNTAGGED"] | VDMA["CONTROL_PASID"], pasid=1)
    target = host.allocate()
    where = ring.push("FILL", target=target, length=8, value=7)
    tagged = ring.push("FILL", target=target, length=8, value=9, flags=VDMA["FLAG_TARGET_PASID"])
    ring.doorbell()
    assert host.record(where).status == VDMA["STATUS_SUCCESS"]
    record = host.record(tagged)
    assert (record.status, record.reason) == (VDMA["STATUS_FAULT"], VDMA["REASON_PASID_OFF"])
    assert host.peek(target, 8) == (7).to_bytes(8, "little")
    host.close()


def test_settings_are_fixed_while_a_queue_runs(host: Host) -> None:
    ring = Ring(host, 3, 6)
    ring.start()
    before = {name: ring.get(name) for name in ("CONTROL", "PASID", "RING", "ORDER", "VECTOR")}
    for name in before:
        ring.set(name, 1)
    assert {name: ring.get(name) for name in before} == before
    ring.set("COMMAND", VDMA["COMMAND_ABORT"])
    ring.set("ORDER", 1)
    assert ring.get("ORDER") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ORDER", 13),
        ("ORDER", 0xFFFF_FFFF),
        ("RING", 0x1040),
        ("RING", (1 << 64) - 4096),
        ("VECTOR", 8),
        ("VECTOR", 0xFFFF_FFFF),
        ("CONTROL", 2),  # a ring in a PASID, without a PASID
        ("PASID", 1 << 16),
    ],
)
def test_a_wrong_setting_is_an_error_of_the_queue(host: Host, name: str, value: int) -> None:
    ring = Ring(host, 2, 7)
    for each, good in (("CONTROL", 5), ("PASID", 3), ("ORDER", 7), ("VECTOR", 2)):
        ring.set(each, value if each == name else good)
    ring.set("RING", value if name == "RING" else ring.base, 8)
    ring.set("COMMAND", VDMA["COMMAND_START"])
    assert (ring.state, ring.error) == (VDMA["STATE_ERROR"], VDMA["ERROR_SETTING"])
    ring.doorbell(1)
    assert ring.get("TAIL") == ring.get("HEAD") == 0
    ring.set("COMMAND", VDMA["COMMAND_START"])
    assert ring.state == VDMA["STATE_ERROR"]
    ring.set("COMMAND", VDMA["COMMAND_ABORT"])
    assert (ring.state, ring.error) == (VDMA["STATE_DISABLED"], 0)
    ring.set("RING", ring.base, 8)
    ring.start()
    assert ring.do("NOP").status == VDMA["STATUS_SUCCESS"]


@pytest.mark.parametrize("how", ["register", "flr", "device"])
def test_reset_ends_everything_and_clears_every_register(host: Host, how: str) -> None:
    ring = Ring(host, 0, 4)
    ring.start()
    ring.do("FILL", target=host.allocate(), length=64)
    assert host.reg("JOBS", 8) == 1 and host.reg("BYTES", 8) == 64
    if how == "register":
        host.put(VDMA["REG_RESET"], 2)
        assert host.reg("JOBS", 8) == 1  # nothing else than VDMA_RESET resets
        host.put(VDMA["REG_RESET"], VDMA["RESET"])
    elif how == "flr":
        host.function.config.write(host.capability(0x10) + 8, 2, 0x8000)
    else:
        host.function.reset(ResetKind.DEVICE)
    table = registers.new_table(8, 0xFF)
    assert all(host.get(each.offset, each.width) == each.reset for each in table)


def test_every_width_and_offset_can_be_read_and_written(host: Host) -> None:
    """Experiments: whatever is written where, the device answers and can be reset."""
    for value in (0, 1, 2, 3, 0xFFFF_FFFF_FFFF_FFFF):
        for offset in range(0, 0x1000, 4):
            for size in (1, 2, 4, 8):
                if offset + size <= registers.BAR_SIZE:
                    host.put(offset, value & (1 << 8 * size) - 1, size)
                    host.get(offset, size)
    host.put(VDMA["REG_RESET"], VDMA["RESET"])
    ring = Ring(host, 7, 4)
    ring.start()
    assert ring.do("NOP").status == VDMA["STATUS_SUCCESS"]
