"""`vioasid spaces`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_serving import FIRST, Served, memory, serving, vioasid


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "s", endpoints=2) as found:
        yield found


def test_the_tree(served: Served) -> None:
    with served.client() as client, memory(1 << 20) as ram:
        ram.share(client)
        client.call("ioasid.alloc", kind="kernel")
        client.call("ioasid.map_dma", ioasid=1, iova=0, vaddr=ram.vaddr, size=ram.size)
        client.call("vfio.bind_ioasid_fd", rid=FIRST)
        client.call("vfio.attach_ioasid", rid=FIRST, ioasid=1)
        for parent in (1, 1):
            client.call("ioasid.create_nesting", parent=parent)
        client.call("ioasid.bind_pgtable", ioasid=2, root=0x3000, levels=3)
        client.call("vfio.attach_ioasid", rid=FIRST, ioasid=2, access="r")
        client.call("endpoint.dma_read", rid=FIRST, iova=0x5000, length=4)  # its table is empty
        (context,) = client.call("vm.contexts")
        socket_option = ["--socket", str(served.path)]
        shown = vioasid("spaces", *socket_option).stdout.splitlines()
        assert shown == [
            f"context {context['context']}, client of pid {os.getpid()}: 3 IOASIDs, 1 device",
            "└─ 1 kernel, amd-v1 4 levels, 48 bits, 1 mapping of 1 MiB",
            "   │  attached: sw0 01:00.0, routed to a child",
            "   │  0 requests, 0 bytes, 0 faults",
            "   ├─ 2 user, amd-v1 3 levels, 39 bits, root 0x3000",
            "   │     attached: sw0 01:00.0 (r)",
            "   │     1 request, 0 bytes, 1 fault",
            "   └─ 3 user, no table bound",
            "         0 requests, 0 bytes, 0 faults",
        ]
        (listed,) = json.loads(vioasid("spaces", "--json", *socket_option).stdout)["contexts"]
        assert [(each["ioasid"], each["parent"], each["kind"]) for each in listed["spaces"]] == [
            (1, None, "kernel"), (2, 1, "user"), (3, 1, "user"),
        ]  # fmt: skip
    done = vioasid("spaces", *socket_option)
    assert (done.returncode, done.stdout) == (0, "no contexts: nobody has opened one\n")
