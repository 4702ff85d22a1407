"""Whatever a guest writes, the controller answers or gives up and never raises: that would stop the transport."""

import struct

from guest_ram import PAGE
from hypothesis import given, settings
from hypothesis import strategies as st
from nvme_driver import CC, CSTS, FATAL, READY, Host
from paged_host import IOVA_BASE, MIB

from backend.endpoints.nvme import Namespace

U32 = st.integers(0, 2**32 - 1)
# Numbers near the bounds that a decoder has, more often than any others.
DWORD = st.one_of(st.integers(0, 64), st.sampled_from([0xFFFF, 0x10000, 2**31, 2**32 - 1, 0xFFFF_0001, 0x1F_0001]), U32)
ADDRESS = st.one_of(
    st.integers(0, 2 * MIB - 1).map(lambda offset: IOVA_BASE + offset),
    st.integers(0, 511).map(lambda page: IOVA_BASE + PAGE * page),
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 2**64 - PAGE, 2**64 - 4]),
)
COMMAND = st.tuples(
    st.one_of(st.integers(0, 0x0D), st.just(0x7C), st.integers(0, 255)),  # opcode
    st.sampled_from([0] * 9 + [1, 2, 0x40, 0xC0]),  # flags
    st.integers(0, 0xFFFF),  # command id
    st.sampled_from([0, 1, 1, 1, 1, 2, 0xFFFF_FFFE, 0xFFFF_FFFF]),
    st.tuples(ADDRESS, ADDRESS),
    st.tuples(*[DWORD] * 6),
)


def pack(command: tuple[int, int, int, int, tuple[int, int], tuple[int, ...]]) -> bytes:
    opcode, flags, cid, nsid, prps, dwords = command
    return struct.pack("<BBHIQQ2Q6I", opcode, flags, cid, nsid, 0, 0, *prps, *dwords)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), COMMAND), min_size=1, max_size=40))
def test_random_commands(
    commands: list[tuple[bool, tuple[int, int, int, int, tuple[int, int], tuple[int, ...]]]],
) -> None:
    """Commands may overwrite the queues themselves, so completions may be anything; the disk stays whole."""
    host = Host(memory=2 * MIB, namespace=Namespace.in_memory(MIB))
    try:
        host.enable()
        queue = host.create_queue(1, 32)
        for admin, command in commands:
            chosen = host.admin if admin else queue
            chosen.push(pack(command))
            host.doorbell(2 * chosen.qid, chosen.tail)
            host.doorbell(2 * chosen.qid + 1, chosen.tail)
        assert host.get(CSTS) & READY
        assert host.get(CSTS) & ~(READY | FATAL) == 0
        assert len(host.namespace.read(0, 2 * MIB)) == MIB
        host.put(CC, 0)
        host._next = MIB
        host.enable()
        host.identify(1)
    finally:
        host.close()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 0x40), st.integers(0x1000, 0x1100), st.integers(0, 0x3FFF)),
            st.sampled_from([1, 2, 4, 4, 4, 8]),
            st.one_of(st.sampled_from([0, 1, 0x0046_0001, 0x0046_4001, 0x001F_001F, IOVA_BASE]), st.integers(0, 2**64)),
        ),
        max_size=40,
    )
)
def test_random_register_writes(writes: list[tuple[int, int, int]]) -> None:
    host = Host(memory=2 * MIB, namespace=Namespace.in_memory(MIB))
    try:
        for offset, size, value in writes:
            host.put(offset, value & (1 << 8 * size) - 1, size)
            assert 0 <= host.get(offset, size) < 1 << 8 * size
        host.put(CC, 0)
        host.enable()
        host.identify(1)
    finally:
        host.close()
