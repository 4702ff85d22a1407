"""The software endpoints that `vioasid serve --no-vm` is asked for: what is read, and what is refused and how."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from control_serving import vioasid

from backend.cli.endpoint_options import MAX_FILE, chosen_endpoints
from backend.control.alone import SoftwareEndpoint
from backend.ioasid import MSI_WINDOW, PasidMode, Traits, Window
from backend.vm.errors import CannotRun


def test_all_that_can_be_said_in_an_option_and_in_a_file(tmp_path: Path) -> None:
    expected = SoftwareEndpoint(
        0x0351,
        "nic0",
        Traits(
            reserved=(Window(0x1000, 0x3000, "reserved"), Window(0xFFFFFFFFFFFFF000, 1 << 64, "reserved")),
            address_width=48,
            pasid_bits=8,
            pasid_mode=PasidMode.PER_RID,
            formats=frozenset({"amd-v1", "x86"}),
            snoop=False,
        ),
        "slot",
    )
    option = (
        "name=nic0,rid=03:0a.1,group=slot,snoop=no,pasid-bits=8,pasid-mode=per-rid,address-width=48,"
        "formats=amd-v1+x86,reserved=0x1000-0x2fff+0xfffffffffffff000-0xffffffffffffffff"
    )
    assert chosen_endpoints(None, [option]) == [expected]
    file = tmp_path / "e.toml"
    file.write_text(
        '[[endpoint]]\nname = "nic0"\nrid = 0x351\ngroup = "slot"\nsnoop = false\npasid-bits = 8\n'
        'pasid-mode = "per-rid"\naddress-width = 48\nformats = ["amd-v1", "x86"]\n'
        'reserved = ["4096-12287", "0xfffffffffffff000-0xffffffffffffffff"]\n'
    )
    assert chosen_endpoints(str(file), []) == [expected]


def test_what_is_not_said() -> None:
    assert [(each.rid, each.name) for each in chosen_endpoints(None, [])] == [
        (0x100, "sw0"), (0x108, "sw1"), (0x110, "sw2"), (0x118, "sw3"),
    ]  # fmt: skip
    (one,) = chosen_endpoints(None, ["snoop=yes"])
    assert (one.rid, one.name, one.group) == (0x100, "sw0", None)
    assert one.traits == Traits(reserved=(MSI_WINDOW,))
    assert [each.rid for each in chosen_endpoints("2", ["rid=0x110", "snoop=no"])] == [0x100, 0x108, 0x110, 0x118]
    (bare,) = chosen_endpoints(None, ["reserved="])
    assert bare.traits.reserved == ()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("", "'' is no key=value"),
        ("nic0", "'nic0' is no key=value"),
        ("name=a,name=b", "'name=b' is given twice"),
        ("speed=10", "there is no 'speed' (known: name, rid, group"),
        ("name=a b", "name must be 1 to 32 of"),
        (f"name={'a' * 33}", "name must be 1 to 32 of"),
        ("group=", "group must be 1 to 32 of"),
        ("rid=0x10000", "rid must be bus:device.function"),
        ("rid=01:20.0", "rid must be bus:device.function"),
        ("rid=-1", "rid must be bus:device.function"),
        ("snoop=maybe", "snoop must be yes or no, and is 'maybe'"),
        ("pasid-bits=21", "pasid-bits must be a number from 0 to 20"),
        ("pasid-bits=1_0", "pasid-bits must be a number from 0 to 20"),
        ("pasid-mode=mine", "pasid-mode must be one of whole, per-rid, global"),
        ("pasid-mode=global,pasid-bits=8", "pasid-mode global has 20 bits"),
        ("pasid-mode=per-rid,pasid-bits=0", "draws from a pool"),
        ("address-width=11", "address-width must be a number from 12 to 64"),
        ("formats=", "formats must be some of amd-v1"),
        ("formats=x86+vax", "formats must be some of amd-v1"),
        ("reserved=0x1000", "reserved must be ranges of whole pages"),
        ("reserved=0x1000-0x2000", "reserved must be ranges of whole pages"),
        ("reserved=0x2000-0xfff", "reserved must be ranges of whole pages"),
        ("reserved=0x0-0x1ffffffffffffffff", "reserved must be ranges of whole pages"),
        ("reserved=" + "+".join(f"{page * 4096}-{page * 4096 + 4095}" for page in range(17)), "16 ranges at most"),
    ],
)
def test_options_that_cannot_be(option: str, said: str) -> None:
    with pytest.raises(CannotRun) as refused:
        chosen_endpoints(None, [option])
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"--endpoint {option}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold [[endpoint]] tables"),
        ("endpoint = 3", "must hold [[endpoint]] tables"),
        ("[endpoint]\nname = 'a'", "must hold [[endpoint]] tables"),
        ("[[endpoint]]\nname = 'a'\n[more]\n", "must hold [[endpoint]] tables"),
        ("[[endpoint]]\nname = 'a'\n[[endpoint]]\nname = 'a'", "[[endpoint]] 2: another endpoint has"),
        ("[[endpoint]]\nrid = 1\n[[endpoint]]\nrid = '00:00.1'", "[[endpoint]] 2: another endpoint has"),
        ("[[endpoint]]\nsnoop = 1", "[[endpoint]] 1: snoop must be yes or no, and is 1"),
        ("[[endpoint]]\nsnoop = []", "[[endpoint]] 1: snoop must be yes or no, and is []"),
        ("[[endpoint]]\npasid-bits = true", "pasid-bits must be a number"),
        ("[[endpoint]]\npasid-mode = ['whole']", "pasid-mode must be one of"),
        ("[[endpoint]]\nformats = [['x86']]", "formats must be a list of strings"),
        ("[[endpoint]]\nreserved = [1]", "reserved must be a list of strings"),
        ("[[endpoint]]\nrid = 1.5", "rid must be"),
        ("[[endpoint", "correct the file"),
        ("[[endpoint]]\n" * 1025, "[[endpoint]] 1025: there are 1024 endpoints already"),
        ("#" * (MAX_FILE + 1), "more than"),
    ],
)
def test_files_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text(text)
    with pytest.raises(CannotRun) as refused:
        chosen_endpoints(str(file), [])
    assert said in str(refused.value)


def test_numbers_and_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    for given, said in (
        ("0", "give 1 to 1024"),
        ("1025", "give 1 to 1024"),
        ("-1", "give 1 to 1024"),
        ("4x", "No such file"),
        (str(tmp_path), "Is a directory"),
        (str(tmp_path / "latin"), "correct the file"),
    ):
        with pytest.raises(CannotRun) as refused:
            chosen_endpoints(given, [])
        assert said in str(refused.value) and str(refused.value).startswith(f"--endpoints {given}")


def test_the_command_says_it_and_ends_with_2(tmp_path: Path) -> None:
    socket = ("--socket", str(tmp_path / "s"))
    for arguments, said in (
        (("--no-vm", *socket, "--endpoint", "snoop=maybe"), "snoop must be yes or no"),
        (("--no-vm", *socket, "--endpoints", str(tmp_path / "none")), "No such file"),
        (("--endpoint", "snoop=no"), "go with --no-vm"),
        (("--endpoints", "2"), "go with --no-vm"),
    ):
        done = vioasid("serve", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()


def test_the_file_in_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "control.md").read_text()
    found = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    (tmp_path / "e.toml").write_text(found[1])
    (endpoint,) = chosen_endpoints(str(tmp_path / "e.toml"), [])
    assert (endpoint.rid, endpoint.name, endpoint.group, endpoint.traits.address_width) == (0x200, "nic0", "slot", 40)
    assert [(each.start, each.end) for each in endpoint.traits.reserved] == [(0xFEE00000, 0xFEF00000)]
