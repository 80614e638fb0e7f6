"""Hybrid models' requests through endpoints: one packed message, and refusals that say why."""

from __future__ import annotations

import numpy as np
import pytest
from support.caches import PATIENCE_S, Group, is_idle, until
from support.mixed import SLIDING, STATE, HybridCache, padded

from kvpack import (
    CacheLayout,
    CoverageError,
    Endpoint,
    IncompatibleLayoutsError,
    Shard,
    TransferFailedError,
    declare,
)

LAST = 500
OURS, THEIRS = (16, 16, 64), (64, 32, 16)


@pytest.fixture
def pair(loopback_group: Group):
    """A connected pair over caches of different block sizes, big enough for one chunk."""
    here, there = HybridCache.of(1, OURS), HybridCache.of(2, THEIRS)
    room = {"staging_bytes": 4 << 20, "slot_bytes": 4096}
    ends = [loopback_group.open(n, c.layout, **room) for n, c in (("p", here), ("d", there))]
    loopback_group.meet(*ends)
    yield *ends, here, there
    for end in ends:
        until(lambda end=end: is_idle(end))


def arrived(here: HybridCache, ours: list, there: HybridCache, theirs: list, first: int) -> None:
    held, got = here.read(ours, first, LAST), there.read(theirs, first, LAST)
    for name, values in held.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


@pytest.mark.parametrize("stream_layers", [False, True])
@pytest.mark.parametrize("first", [0, 77])
def test_a_mixed_request_is_one_message_and_one_launch_a_side(
    pair, first: int, stream_layers: bool
) -> None:
    prefill, decode, here, there = pair
    ours, theirs = here.blocks(3, LAST), there.blocks(4, LAST)
    before = {name: array.copy() for name, array in there.arrays.items()}
    cut = [ours[0], *padded(ours, 32)[1:]]
    sent = prefill.send("r", cut, 0, LAST)
    lists = [theirs[0][first // 64 :], theirs[1], theirs[2], theirs[3][first // 16 :]]
    received = decode.receive(
        "r", lists, first, LAST, from_=["p"], stream_layers=stream_layers
    ).result(PATIENCE_S)
    record = sent.result(PATIENCE_S).record
    assert (record.writes, record.chunks) == (1, 1)
    assert (received.record.writes, received.record.chunks) == (1, 1)
    arrived(here, ours, there, theirs, first)
    moved = sum(values.nbytes for values in here.read(ours, first, LAST).values())
    changed = sum(int((there.arrays[n] != before[n]).sum()) for n in before)
    assert 0.98 * moved < changed <= moved  # noise agrees with noise now and then
    assert moved <= record.nbytes < moved + 16 * 8


def test_chunked_prefill_sends_windows_as_they_come_and_the_state_last(pair) -> None:
    prefill, decode, here, there = pair
    ours, theirs = here.blocks(5, LAST), there.blocks(6, LAST)
    window = padded(ours, 32)[SLIDING]
    none = np.zeros(0, np.int32)
    ranges = [(256, 384), (384, LAST), (0, 256)]
    received = decode.receive("r", padded(theirs, 16), 0, LAST, from_=["p"])
    for first, last in ranges:
        lists = [
            ours[0][first // 16 : -(-last // 16)],
            window[first // 16 : -(-last // 16)],
            ours[STATE] if last == LAST else none,
            ours[3][first // 64 : -(-last // 64)],
        ]
        prefill.send("r", lists, first, last, final=(first, last) == ranges[-1])
    received.result(PATIENCE_S)
    arrived(here, ours, there, theirs, 0)


def refusal(prefill: Endpoint, decode: Endpoint, ours: list, theirs: list, **ranges) -> str:
    """What both sides say of a request that cannot be served; they must agree."""
    sent = prefill.send("r", ours, *ranges.get("sent", (0, LAST)))
    received = decode.receive("r", theirs, *ranges.get("asked", (0, LAST)), from_=["p"])
    with pytest.raises(TransferFailedError) as at_receiver:
        received.result(PATIENCE_S)
    with pytest.raises(TransferFailedError) as at_sender:
        sent.result(PATIENCE_S)
    reason = str(at_receiver.value).partition("p: ")[2]
    assert reason
    assert reason[:60] in str(at_sender.value)
    return reason


def test_a_window_that_the_engine_gave_up_is_refused_naming_the_gap(pair) -> None:
    prefill, decode, here, there = pair
    ours, theirs = here.blocks(3, LAST), there.blocks(4, LAST)
    ours[SLIDING] = ours[SLIDING][2:]
    assert (
        "positions [372, 500) are needed of the request that ends at 500, but the source, whose "
        "layer group 1 keeps a window of 128 positions, has no block for [372, 400); send before"
    ) in refusal(prefill, decode, ours, theirs)


def test_a_hole_in_a_window_is_refused_naming_it(pair) -> None:
    prefill, decode, here, there = pair
    ours, theirs = here.blocks(3, LAST), there.blocks(4, LAST)
    ours[SLIDING][3] = -1
    assert "has no block for [416, 432)" in refusal(prefill, decode, ours, theirs)


def test_the_state_of_another_position_is_refused_naming_both(pair) -> None:
    prefill, decode, here, there = pair
    ours, theirs = here.blocks(3, LAST), there.blocks(4, 400)
    ours[SLIDING] = np.arange(32, dtype=np.int32)
    said = refusal(prefill, decode, ours, theirs, asked=(0, 400))
    assert "is the state after 500 positions, but the request ends at position 400" in said


def test_a_state_that_was_not_named_is_refused(pair) -> None:
    prefill, decode, here, there = pair
    ours, theirs = here.blocks(3, LAST), there.blocks(4, LAST)
    ours[STATE] = ours[STATE][:0]
    assert "send of positions [0, 500) names no slot" in refusal(prefill, decode, ours, theirs)


def test_a_prefix_that_the_source_lacks_is_refused_naming_the_gap(pair) -> None:
    prefill, decode, here, there = pair
    ours, theirs = here.blocks(3, LAST), there.blocks(4, LAST)
    ours[0], ours[3] = ours[0][4:], ours[3][1:]
    said = refusal(prefill, decode, ours, theirs, sent=(64, LAST))
    assert (
        "positions [0, 500) were asked for, but [64, 500) is sent to d and [0, 64) is miss" in said
    )


def test_a_smaller_window_at_the_source_is_refused_where_it_matters(loopback_group: Group) -> None:
    here, there = HybridCache.of(1, OURS, window=100), HybridCache.of(2, THEIRS)
    ends = [
        loopback_group.open(n, c.layout, staging_bytes=4 << 20)
        for n, c in (("p", here), ("d", there))
    ]
    loopback_group.meet(*ends)
    ours, theirs = here.blocks(3, LAST), there.blocks(4, LAST)
    ours[SLIDING] = ours[SLIDING][2:]  # 100 positions and some are left
    assert "keeps a window of 100 positions, has no block for [372, 400)" in refusal(
        *ends, ours, theirs
    )
    ours, theirs = here.blocks(3, 90), there.blocks(4, 90)
    ends[0].send("short", ours, 0, 90)
    ends[1].receive("short", theirs, 0, 90, from_=["p"]).result(PATIENCE_S)


def test_state_against_blocks_is_refused_at_connect(loopback_group: Group) -> None:
    pool = np.zeros((4, 1, 4, 8, 16), np.uint8)
    (paged,) = declare(
        pool, "block token head dim state", layers=2, names="ssm", heads=Shard(0, 4, 4)
    )
    state = loopback_group.open("p", HybridCache.of(1, OURS).layout)
    blocks = loopback_group.open("d", CacheLayout([paged]))
    with pytest.raises(
        IncompatibleLayoutsError, match=r"'ssm' of layer 2: .* one slot a request = False, the dest"
    ):
        blocks.connect(state.metadata())


def test_a_receiver_does_without_optional_tensors_and_not_without_others(
    loopback_group: Group,
) -> None:
    here, there = HybridCache.of(1, OURS), HybridCache.of(2, THEIRS)
    draft = np.full((10, 64, 8), 7, np.uint8)
    prefill = loopback_group.open("p", here.layout, staging_bytes=4 << 20)

    def decode(name: str, optional: bool) -> Endpoint:
        more = declare(
            draft, "block token dim", layers=61, names="kv", group=4, optional=optional
        )  # fmt: skip
        layout = CacheLayout([*there.layout.tensors, *more])
        return loopback_group.open(name, layout, staging_bytes=4 << 20)

    lenient, strict = decode("lenient", True), decode("strict", False)
    loopback_group.meet(prefill, lenient, strict)
    ours, theirs = here.blocks(3, LAST), there.blocks(4, LAST)
    lists = [*theirs, np.arange(8, dtype=np.int32)]
    prefill.send("r", ours, 0, LAST)
    lenient.receive("r", lists, 0, LAST, from_=["p"]).result(PATIENCE_S)
    arrived(here, ours, there, theirs, 0)
    assert (draft == 7).all()
    with pytest.raises(CoverageError, match="'kv' of layer 61 is wanted, but none of p has it"):
        strict.receive("s", lists, 0, LAST, from_=["p"])
