"""What holds for every transport."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpack.errors import ClosedError, PeerLostError, TransportError
from kvpack.transport import Region, Window
from kvpack.transport.gate import Gate
from kvpack.transport.slots import encode_metadata

POISON = 0xA5


def noise(seed: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def test_bytes_land_in_the_named_slots_and_nowhere_else(fleet: Any) -> None:
    here, there = fleet.pair()
    here.sent(0, 64)[:] = noise(1, 64 * 4096)
    before = there.memory.copy()
    fleet.finish(here, here.transport.write(there.name, 5, 17, 9, b"done"))
    expected = before
    start = there.send.nbytes + 17 * 4096
    expected[start : start + 9 * 4096] = here.sent(5, 9)
    np.testing.assert_array_equal(there.memory, expected)
    assert (there.received(16) == POISON).all()
    assert (there.received(26) == POISON).all()


def test_random_runs_all_land_with_several_in_flight(fleet: Any) -> None:
    here, there = fleet.pair()
    here.sent(0, 64)[:] = noise(2, 64 * 4096)
    rng = random.Random(3)
    expected = there.received(0, 96).copy()
    messages = []
    for round_ in range(30):
        writes = []
        for lease in rng.sample(range(12), 6):
            slots = rng.randint(1, 8)
            source, target = rng.randint(0, 64 - slots), lease * 8 + rng.randint(0, 8 - slots)
            message = f"{round_}/{lease}".encode()
            writes.append(here.transport.write(there.name, source, target, slots, message))
            expected[target * 4096 : (target + slots) * 4096] = here.sent(source, slots)
            messages.append((here.name, message))
        fleet.finish(here, *writes)
    fleet.drive(lambda: len(there.arrived) == len(messages))
    np.testing.assert_array_equal(there.received(0, 96), expected)
    assert sorted(there.arrived) == sorted(messages)


def test_bytes_are_visible_when_their_notification_arrives(fleet: Any) -> None:
    here, there = fleet.pair(slot_bytes=65536, send_slots=16, receive_slots=16)
    for turn in range(20):
        here.sent(0, 16)[:] = turn
        write = here.transport.write(there.name, 0, 0, 16, b"turn")

        def arrived(write: Any = write) -> bool:
            here.transport.poll(write)
            there.arrived.extend(there.transport.notifications())
            return bool(there.arrived)

        fleet.drive(arrived)
        assert (there.received(0, 16) == turn).all()
        there.arrived.clear()
        fleet.finish(here, write)


def test_an_empty_notification_is_none(fleet: Any) -> None:
    here, there = fleet.pair()
    fleet.finish(here, here.transport.write(there.name, 0, 0, 1, b""))
    here.transport.notify(there.name, b"after")
    fleet.drive(lambda: bool(there.arrived))
    assert there.arrived == [(here.name, b"after")]


def test_one_write_carries_64_mib(fleet: Any) -> None:
    here, there = fleet.pair(slot_bytes=65536, send_slots=1024, receive_slots=1024)
    here.sent(0, 1024)[:] = noise(4, 2**26)
    fleet.finish(here, here.transport.write(there.name, 0, 0, 1024, b"large"))
    np.testing.assert_array_equal(there.received(0, 1024), here.sent(0, 1024))
    assert (there.sent(0, 1024) == POISON).all()


def test_two_nodes_write_to_each_other_at_once(fleet: Any) -> None:
    here, there = fleet.pair(slot_bytes=65536, send_slots=128, receive_slots=128)
    here.sent(0, 128)[:] = noise(5, 2**23)
    there.sent(0, 128)[:] = noise(6, 2**23)
    going = [here.transport.write(there.name, 32 * i, 32 * i, 32, b"go") for i in range(4)]
    coming = [there.transport.write(here.name, 32 * i, 32 * i, 32, b"come") for i in range(4)]
    fleet.finish_all([(here, write) for write in going] + [(there, write) for write in coming])
    fleet.drive(lambda: len(here.arrived) == len(there.arrived) == 4)
    np.testing.assert_array_equal(there.received(0, 128), here.sent(0, 128))
    np.testing.assert_array_equal(here.received(0, 128), there.sent(0, 128))


def test_four_transports_of_one_process_all_write_to_each_other(fleet: Any) -> None:
    nodes = [fleet.open() for _ in range(4)]
    for node in nodes:
        node.add(*(other for other in nodes if other is not node))
    for i, node in enumerate(nodes):
        node.sent(0, 8)[:] = i
        writes = [
            node.transport.write(other.name, 0, 8 * i, 8, b"hello")
            for other in nodes
            if other is not node
        ]
        fleet.finish(node, *writes)
    fleet.drive(lambda: all(len(node.arrived) == 3 for node in nodes))
    for i, node in enumerate(nodes):
        for j in range(4):
            assert (node.received(8 * j, 8) == (POISON if i == j else j)).all()


def test_messages_of_any_bytes_arrive_whole(fleet: Any) -> None:
    here, there = fleet.pair()
    messages = [b"", b"\0", bytes(range(256)), noise(7, 8000).tobytes()]
    for message in messages:
        here.transport.notify(there.name, message)
    fleet.drive(lambda: len(there.arrived) == len(messages))
    assert sorted(there.arrived) == sorted((here.name, message) for message in messages)


def test_messages_of_a_peer_that_was_never_added_arrive(fleet: Any) -> None:
    here, there = fleet.open(), fleet.open()
    here.add(there)
    here.transport.notify(there.name, b"stranger")
    fleet.drive(lambda: bool(there.arrived))
    assert there.arrived == [(here.name, b"stranger")]


def test_an_unknown_peer_is_named(fleet: Any) -> None:
    here = fleet.open()
    with pytest.raises(TransportError, match="'decode@7' is not known"):
        here.transport.write("decode@7", 0, 0, 1, b"")
    with pytest.raises(TransportError, match="'decode@7' is not known"):
        here.transport.notify("decode@7", b"hello")
    here.transport.remove_peer("decode@7")


def test_a_removed_peer_is_written_no_more_and_can_be_added_again(fleet: Any) -> None:
    here, there = fleet.pair()
    fleet.finish(here, here.transport.write(there.name, 0, 0, 1, b""))
    here.transport.remove_peer(there.name)
    with pytest.raises(TransportError, match="is not known"):
        here.transport.write(there.name, 0, 1, 1, b"")
    here.add(there)
    here.sent(0)[:] = 9
    fleet.finish(here, here.transport.write(there.name, 0, 2, 1, b""))
    assert (there.received(2) == 9).all()


def test_writes_in_flight_outlive_the_removal_of_their_peer(fleet: Any) -> None:
    here, there = fleet.pair(slot_bytes=65536, send_slots=256, receive_slots=256)
    here.sent(0, 256)[:] = noise(8, 2**24)
    writes = [here.transport.write(there.name, 64 * i, 64 * i, 64, b"end") for i in range(4)]
    here.transport.remove_peer(there.name)
    with pytest.raises(TransportError, match="4 writes to it have not ended"):
        here.add(there)
    fleet.finish(here, *writes)
    fleet.drive(lambda: len(there.arrived) == 4)
    np.testing.assert_array_equal(there.received(0, 256), here.sent(0, 256))
    here.add(there)


@pytest.mark.parametrize(
    ("local", "remote", "slots", "where"),
    [
        (0, 0, 0, "send window"),
        (-1, 0, 1, "send window"),
        (60, 0, 5, "64 slots of .* send window"),
        (0, 0, 65, "send window"),
        (0, 92, 5, "96 slots of peer"),
        (0, -1, 1, "peer"),
    ],
)
def test_slots_out_of_range_are_refused(
    fleet: Any, local: int, remote: int, slots: int, where: str
) -> None:
    here, there = fleet.pair()
    with pytest.raises(TransportError, match=where):
        here.transport.write(there.name, local, remote, slots, b"never")
    fleet.turn()
    assert (there.memory == POISON).all()
    assert there.arrived == []


def test_damaged_metadata_is_refused_and_leaves_nothing(fleet: Any) -> None:
    here, there = fleet.open(), fleet.open()
    whole = there.transport.metadata
    rng = random.Random(9)
    blobs = [b"", b"garbage", whole[:-1], whole + b"x", whole[: len(whole) // 2]]
    blobs.append(b"\x95" + whole[1:] + b"\x91" * 100_000)
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        blobs.append(bytes(flipped))
    for blob in blobs:
        with pytest.raises(TransportError, match=r"metadata|transport"):
            here.transport.add_peer(there.name, blob, there.receive)
    here.add(there)


def test_a_payload_that_is_whole_but_not_a_transports_is_refused(fleet: Any) -> None:
    if fleet.kind == "loopback":
        pytest.skip("a loopback's payload is empty")
    here, there = fleet.open(), fleet.open()
    blob = encode_metadata("nixl-ucx", there.name, b"not NIXL's")
    with pytest.raises(TransportError, match="nixlMismatchError"):
        here.transport.add_peer(there.name, blob, there.receive)
    here.add(there)


def test_metadata_of_another_peer_or_transport_is_refused(fleet: Any) -> None:
    here, there, third = fleet.open(), fleet.open(), fleet.open()
    with pytest.raises(TransportError, match=f"is that of '{third.name}'"):
        here.transport.add_peer(there.name, third.transport.metadata, there.receive)
    with pytest.raises(TransportError, match="uses transport 'carrier-pigeon'"):
        here.transport.add_peer(
            there.name, encode_metadata("carrier-pigeon", there.name, b""), there.receive
        )


def test_a_peer_is_added_once_and_never_itself(fleet: Any) -> None:
    here, there = fleet.pair()
    with pytest.raises(TransportError, match="known already"):
        here.add(there)
    with pytest.raises(TransportError, match="its own peer"):
        here.add(here)


def test_a_window_must_fit_the_peers_memory_and_this_sides_slots(fleet: Any) -> None:
    here, there = fleet.open(), fleet.open()
    blob = there.transport.metadata
    too_long = Window(there.receive.address, 4096, 97)
    with pytest.raises(TransportError, match="97"):
        here.transport.add_peer(there.name, blob, too_long)
    with pytest.raises(TransportError, match="slots of 8192 bytes and this side of 4096"):
        here.transport.add_peer(there.name, blob, Window(there.receive.address, 8192, 4))
    here.add(there)


def test_a_closed_peer_is_lost_and_its_next_incarnation_is_another_peer(fleet: Any) -> None:
    here, there = fleet.open(), fleet.open("decode@1")
    here.add(there)
    fleet.finish(here, here.transport.write(there.name, 0, 0, 1, b""))
    assert fleet.close(there) == 0
    with pytest.raises(PeerLostError, match=r"'decode@1'.*connect again"):
        fleet.drive(lambda: here.transport.poll(here.transport.write(there.name, 0, 0, 1, b"")) < 0)
    again = fleet.open("decode@2")
    here.transport.remove_peer("decode@1")
    here.add(again)
    here.sent(0)[:] = 4
    fleet.finish(here, here.transport.write("decode@2", 0, 3, 1, b""))
    assert (again.received(3) == 4).all()


def test_a_lost_write_keeps_raising(fleet: Any) -> None:
    here, there = fleet.pair(slot_bytes=65536, send_slots=512, receive_slots=512)
    write = here.transport.write(there.name, 0, 0, 512, b"")
    fleet.close(there)
    for _ in range(2):
        with pytest.raises(PeerLostError, match=there.name):
            fleet.finish(here, write)
    assert isinstance(write.error, PeerLostError)


def test_a_closed_transport_refuses_everything(fleet: Any) -> None:
    here, there = fleet.pair()
    write = here.transport.write(there.name, 0, 0, 1, b"")
    fleet.finish(here, write)
    assert fleet.close(here) == 0
    assert here.transport.close() == 0
    acts: list[Callable[[], object]] = [
        lambda: here.transport.write(there.name, 0, 0, 1, b""),
        lambda: here.transport.poll(write),
        lambda: here.transport.notify(there.name, b""),
        lambda: here.transport.notifications(),
        lambda: here.transport.remove_peer(there.name),
        lambda: here.transport.metadata,
    ]
    for act in acts:
        with pytest.raises(ClosedError, match="is closed"):
            act()


def test_a_forked_child_is_refused(fleet: Any) -> None:
    here, there = fleet.pair()
    child = os.fork()
    if child == 0:
        try:
            here.transport.notify(there.name, b"from the child")
        except ClosedError as error:
            os._exit(0 if "forked child" in str(error) else 2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    fleet.finish(here, here.transport.write(there.name, 0, 0, 1, b""))


def test_two_threads_at_once_are_refused() -> None:
    gate = Gate("transport 'prefill@1'")
    refusals: list[TransportError] = []

    def enter() -> None:
        try:
            with gate:
                pass
        except TransportError as error:
            refusals.append(error)

    with gate:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(10)
    enter()
    assert [str(error)[:24] for error in refusals] == ["two threads are inside t"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Region(0, 10),
        lambda: Region(4096, 0),
        lambda: Region(4096, 2**63),
        lambda: Region(4096, 10, "tpu"),  # type: ignore[arg-type]
        lambda: Region(4096, 10, "cpu", 1),
        lambda: Region(4096, 10, "cuda", -1),
        lambda: Window(4096, 0, 1),
        lambda: Window(4096, 64, 0),
    ],
)
def test_memory_that_cannot_be_is_refused(make: Any) -> None:
    with pytest.raises(TransportError):
        make()


def test_the_send_window_lies_in_the_region(fleet: Any) -> None:
    node = fleet.open()
    region = Region(node.memory.ctypes.data, 4096 * 4)
    with pytest.raises(TransportError, match="does not lie within"):
        type(node.transport)("outside@1", region, Window(region.address, 4096, 5))
