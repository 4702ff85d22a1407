"""Every page-table format through the commands, in both stages; tables of the guest's are laid by the reference."""

from __future__ import annotations

import dataclasses
import errno
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from core_formats import core_format
from ioasid_guest import DEV1, GOLDEN, Guest, refused
from reference import common as ref
from reference.formats import FIRST_STAGES, VARIANTS, Variant
from reference.memory import Memory, Region

from backend.core import Access, ArmStage1, ArmStage2, ExecuteDisable, Fault, Reason, TableFormat, Translation
from backend.ioasid import FORMATS, PASID_FORMATS, Kind, PgtableFormat

DATA, TABLES, PAGES = 1 << 20, 2 << 20, 1024
READ = ref.Access(ref.Kind.READ)


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """4 MiB of memory, on 1, to which dev1 is attached."""
    guest = Guest(pages=PAGES)
    assert guest.ctx.alloc() == 1
    guest.ctx.map_dma(1, 0, GOLDEN, guest.ram.size)
    guest.ctx.attach(DEV1, 1)
    yield guest
    guest.close()


def said(made: TableFormat) -> PgtableFormat:
    """What a user says for a format of the core: by hand, field by field."""
    fields = {each.name: getattr(made, each.name) for each in dataclasses.fields(made)}
    words: dict[str, object] = {"vendor": made.name, "output_width": fields.pop("output_bits", 0)}
    options = []
    if isinstance(made, ArmStage1 | ArmStage2):
        lower = fields.pop("lower" if isinstance(made, ArmStage1) else "tree")
        upper = fields.pop("upper", None)
        tree = lower or upper
        words |= {"address_width": tree.input_bits, "granule": tree.granule}
        if lower:
            words["levels"] = lower.levels
        else:
            options.append("no-lower")
        if upper:
            words |= {"upper_root": upper.root, "upper_address_width": upper.input_bits, "upper_granule": upper.granule}
        for name, each in (("", lower), ("upper-", upper)):
            if each and each.ignore_top_byte:
                options.append(f"{name}ignore-top-byte")
            if each and not each.hierarchical:
                options.append(f"no-{name}hierarchical")
    else:
        words["levels"] = fields.pop("levels")
    if "accessed_dirty" in fields:
        words["accessed"] = words["dirty"] = fields.pop("accessed_dirty")
    elif "accessed" in fields:
        words |= {"accessed": fields.pop("accessed"), "dirty": fields.pop("dirty")}
    usual = {
        "sign_extended", "gigabyte_leaves", "large_leaves", "write_protect", "snoop_control", "execute_only",
        "access_faults", "two_xn", "svnapot", "svpbmt",
    }  # fmt: skip
    for name, value in fields.items():
        if isinstance(value, ExecuteDisable):
            if value is not ExecuteDisable.HONOURED:
                options.append(f"execute-disable-{value.name.lower()}")
        elif value != (name in usual):
            options.append(("no-" if name in usual else "") + name.replace("_", "-"))
    return PgtableFormat(**words, options=tuple(options))  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each.name)
def test_every_option_can_be_said(variant: Variant) -> None:
    made, _ = core_format(variant.config(variant.make(Memory(1 << 24), Region(TABLES, 1 << 24))))
    rule = FORMATS[made.name]
    complete = rule.complete(said(made))
    again = rule.table(complete)
    # The root is told beside the format, and the levels of the upper range follow from its width.
    if isinstance(made, ArmStage1):
        lower = dataclasses.replace(made.lower, root=0) if made.lower else None
        upper = dataclasses.replace(made.upper, levels=None) if made.upper else None
        made = dataclasses.replace(made, lower=lower, upper=upper)
    elif isinstance(made, ArmStage2):
        made = dataclasses.replace(made, tree=dataclasses.replace(made.tree, root=0))
    assert again == made
    assert set(complete.options) <= set(rule.options)


@pytest.mark.parametrize("variant", FIRST_STAGES, ids=lambda each: each.name)
def test_a_guests_table(guest: Guest, variant: Variant) -> None:
    memory = Memory(PAGES * 4096)
    builder = variant.make(memory, Region(TABLES, PAGES * 4096))
    leaf = min(builder.sizes)
    iova = builder.extend(2 * leaf)
    builder.map(iova, DATA, leaf)
    config = variant.config(builder)
    for address, word in memory.words.items():
        guest.ram.poke(address, struct.pack("<Q", word))
    made, root = core_format(config)
    expected = variant.walk(memory, config, iova + 24, READ)
    ctx = guest.ctx
    child = ctx.create_nesting(1)
    ctx.attach(DEV1, child)
    try:
        ctx.bind_pgtable(child, root, said(made))
        answer = guest.engine.core.translate(DEV1, iova + 24, Access.READ)
        if isinstance(expected, ref.Result):
            assert isinstance(answer, Translation)
            assert (answer.gpa, answer.hva) == (DATA + 24, GOLDEN + DATA + 24)
        else:
            assert isinstance(answer, Fault)
        assert guest.hva(DEV1, builder.extend(5 * leaf)) == Reason.NOT_PRESENT
        info = ctx.get_info(child)
        assert info.format is not None and info.format.vendor == made.name
        assert info.page_sizes[0] == leaf
    finally:
        ctx.detach(DEV1)
        ctx.free(child)
        for address in memory.words:
            guest.ram.poke(address, bytes(8))


@pytest.mark.parametrize("vendor", FORMATS)
@pytest.mark.parametrize("above", FORMATS)
def test_every_pair(guest: Guest, vendor: str, above: str) -> None:
    """A table of any format that the host builds, and over each of them one of any format that a guest could bind."""
    ctx = guest.ctx
    parent = ctx.alloc(vendor=above)
    ctx.map_dma(parent, 0x3000, GOLDEN + 0x1000, 0x1000)
    ctx.attach(DEV1, parent, pasid=1)
    assert guest.hva(DEV1, 0x3008, pasid=1) == GOLDEN + 0x1008
    child = ctx.alloc(Kind.USER, parent=parent, vendor=vendor, root=0x8000)
    ctx.attach(DEV1, child, pasid=1)
    answer = guest.engine.core.translate(DEV1, 0x3000, Access.READ, pasid=1)
    assert isinstance(answer, Fault)
    assert (answer.stage, answer.table, answer.reason) == (2, True, Reason.NOT_PRESENT), "the root lies nowhere"
    for _ in range(2):
        ctx.detach(DEV1, pasid=1)
    ctx.free(child)
    ctx.free(parent)


def test_formats_that_cannot_be(guest: Guest) -> None:
    ctx = guest.ctx
    unsupported: tuple[dict[str, Any], ...] = (
        {"vendor": "ppc"}, {"vendor": "x86", "levels": 3}, {"vendor": "riscv", "levels": 6}, {"granule": 16384},
        {"vendor": "arm-s2", "granule": 8192}, {"vendor": "x86", "address_width": 39},
        {"vendor": "arm-s2", "address_width": 60},
    )  # fmt: skip
    impossible: tuple[dict[str, Any], ...] = (
        {"options": ["no-gigabyte-leaves"], "vendor": "x86"}, {"output_width": 46, "vendor": "x86"},
        {"accessed": True}, {"upper_root": 0x1000, "vendor": "arm-s1"}, {"root": 0x1000},
        {"vendor": "arm-s2", "address_width": 48, "levels": 1}, {"options": "fast"}, {"options": ["x"] * 17},
    )  # fmt: skip
    for code, group in ((errno.EOPNOTSUPP, unsupported), (errno.EINVAL, impossible)):
        for fields in group:
            assert refused(partial(ctx.alloc, **fields)) == code, fields

    child = ctx.create_nesting(1)
    bind = [
        (errno.EOPNOTSUPP, 0, PgtableFormat("x86", options=("fast",))),
        (errno.EOPNOTSUPP, 0, PgtableFormat("x86", accessed=True)),
        (errno.EOPNOTSUPP, 0, PgtableFormat("riscv", accessed=True)),
        (errno.EOPNOTSUPP, 0, PgtableFormat("riscv", output_width=40)),
        (errno.EOPNOTSUPP, 0, PgtableFormat("arm-s2", upper_root=0)),
        (errno.EOPNOTSUPP, 0, PgtableFormat("ept", 4, address_width=57)),
        (errno.EINVAL, 0, PgtableFormat("ept", dirty=True)),
        (errno.EINVAL, 0, PgtableFormat("x86", output_width=20)),
        (errno.EINVAL, 0x1040, PgtableFormat("x86")),
        (errno.EINVAL, 0x1000, PgtableFormat("riscv-x4")),
        (errno.EINVAL, 1 << 56, PgtableFormat("riscv")),
        (errno.EINVAL, 0x1010, PgtableFormat("arm-s1")),
    ]
    for code, root, fmt in bind:
        assert refused(partial(ctx.bind_pgtable, child, root, fmt)) == code, fmt
    ctx.bind_pgtable(child, 0x4000, PgtableFormat("riscv-x4"))
    ctx.free(child)


def test_what_is_left_at_0_is_the_usual(guest: Guest) -> None:
    widths = {"amd-v1": 48, "x86": 47, "vtd-second-stage": 48, "ept": 48, "arm-s1": 48, "arm-s2": 48, "riscv": 38,
              "riscv-x4": 41}  # fmt: skip
    for vendor, width in widths.items():
        ioasid = guest.ctx.alloc(vendor=vendor)
        info = guest.ctx.get_info(ioasid)
        assert info.address_width == width, "of what signs its addresses, the host maps the lower half"
        assert info.page_sizes[:2] == (1 << 12, 1 << 21)
        guest.ctx.map_dma(ioasid, (1 << width) - 4096, GOLDEN, 4096)
        assert refused(partial(guest.ctx.map_dma, ioasid, 1 << width, GOLDEN, 4096)) == errno.EINVAL
        guest.ctx.free(ioasid)


def test_info_lists_what_is_taken(guest: Guest) -> None:
    offers = {each.vendor: each for each in guest.ctx.get_info(1).bindable}
    assert offers.keys() == FORMATS.keys() == {
        "amd-v1", "x86", "vtd-second-stage", "ept", "arm-s1", "arm-s2", "riscv", "riscv-x4"
    }  # fmt: skip
    assert {each.vendor for each in guest.ctx.get_info(1).pasid_tables} == PASID_FORMATS.keys()
    assert offers["riscv-x4"].address_widths == (41, 50, 59)
    assert offers["arm-s1"].granules == (4096, 16384, 65536)
    # 64 KiB pages: 13 bits a level above 16; 52 with the large address extension
    assert offers["arm-s1"].address_widths == (29, 42, 52, 52)
    child = guest.ctx.create_nesting(1)
    for offer in offers.values():
        for levels in offer.levels:
            guest.ctx.bind_pgtable(child, 0, PgtableFormat(offer.vendor, levels))
            guest.ctx.unbind_pgtable(child)
    guest.ctx.free(child)
