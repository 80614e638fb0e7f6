"""Every byte of every block arrives where it belongs, and no other byte changes."""

from __future__ import annotations

import itertools
import random
import threading

import numpy as np
import pytest
from support.caches import PATIENCE_S, Cache, Flag, Group, is_idle, ship_once, until
from support.topology import Rank, random_topology

from kvpack import NO_BLOCK, Shard
from kvpack.endpoint import Endpoint


def cut(rng: random.Random, rank: Rank) -> list[tuple[int, int]]:
    """Cut a rank's positions into one to three ranges."""
    inner = range(rank.first + 1, rank.last)
    cuts = sorted(rng.sample(inner, min(rng.randint(0, 2), len(inner))))
    return list(itertools.pairwise([rank.first, *cuts, rank.last]))


@pytest.mark.parametrize("seed", range(24))
def test_random_ranks_exchange_random_ranges(group: Group, seed: int) -> None:
    if group.transport == "nixl" and seed % 3:
        seed += 1000  # not the loopback's topologies again
    rng = random.Random(seed)
    topology = random_topology(seed)
    wanted = [rank.expected(topology.model) for rank in topology.destinations]
    for rank in topology.sources:
        rank.fill(topology.model)
    held = [[buffer.copy() for buffer in rank.buffers] for rank in topology.sources]
    ends = {
        rank.name: group.open(
            rank.name,
            rank.layout,
            staging_bytes=rng.choice((24, 64, 256)) << 12,
            chunk_bytes=rng.choice((4096, 3 << 12, 1 << 20)),
        )
        for rank in topology.sources + topology.destinations
    }
    for source, destination in itertools.product(topology.sources, topology.destinations):
        group.meet(ends[source.name], ends[destination.name])
    names = [rank.name for rank in topology.destinations]
    stream_layers = rng.random() < 0.3

    def send_all() -> list[object]:
        handles = []
        for rank in topology.sources:
            ranges = cut(rng, rank)
            rng.shuffle(ranges)
            for first, last in ranges:
                lists = rank.party(first, last).blocks
                handles.append(
                    ends[rank.name].send(
                        "request",
                        lists,
                        first,
                        last,
                        to=rng.choice((None, names)),
                        final=(first, last) == ranges[-1],
                        aux=f"<{rank.name} {first}>".encode(),
                    )
                )
        return handles

    def receive_all() -> list[object]:
        return [
            ends[rank.name].receive(
                "request",
                rank.blocks,
                topology.first,
                topology.last,
                from_=[source.name for source in topology.sources],
                receivers=names,
                stream_layers=stream_layers,
            )
            for rank in topology.destinations
        ]

    steps = [send_all, receive_all]
    rng.shuffle(steps)
    handles = [handle for step in steps for handle in step()]
    results = [handle.result(PATIENCE_S) for handle in handles]

    for rank, expected in zip(topology.destinations, wanted, strict=True):
        for buffer, right in zip(rank.buffers, expected, strict=True):
            np.testing.assert_array_equal(buffer, right)
    for rank, before in zip(topology.sources, held, strict=True):
        for buffer, right in zip(rank.buffers, before, strict=True):
            np.testing.assert_array_equal(buffer, right)
    for result in results:
        for sender, aux in getattr(result, "aux", {}).items():
            assert aux.startswith(f"<{sender} ".encode())
    for end in ends.values():
        until(lambda end=end: is_idle(end))
        assert not end.capacity().drops


def test_the_comparison_of_bytes_sees_one_wrong_byte(loopback_group: Group) -> None:
    here, there = Cache.of().fill(1), Cache.of()
    prefill, decode = loopback_group.pair(here, there)
    ship_once(prefill, decode, here, there)
    here.pools[1][0, :, 0, 0, 0] ^= 1  # of every block
    rng = random.Random(0)
    ours, theirs = here.blocks(rng, 0, 21), there.blocks(rng, 0, 21)
    assert (there.read(theirs, 0, 21) != here.read(ours, 0, 21)).any()


def test_a_prefix_that_is_there_is_left_alone(group: Group) -> None:
    here, there = Cache.of(block_tokens=4).fill(1), Cache.of(block_tokens=6)
    prefill, decode = group.pair(here, there)
    rng = random.Random(5)
    ours, theirs = here.blocks(rng, 0, 40), there.blocks(rng, 0, 40)
    sent = prefill.send("r", ours, 0, 40)
    first = 13
    ours, theirs = ours[first // 4 :], theirs[first // 6 :]
    decode.receive("r", theirs, first, 40, from_=["prefill"]).result(PATIENCE_S)
    sent.result(PATIENCE_S)
    assert (there.read(theirs, first, 40) == here.read(ours, first, 40)).all()
    there.erase(theirs, first, 40)
    assert there.is_poison()


def test_blocks_that_the_destination_lacks_are_skipped(group: Group) -> None:
    here, there = Cache.of(block_tokens=4).fill(1), Cache.of(block_tokens=4)
    prefill, decode = group.pair(here, there)
    sent = prefill.send("r", [7, 8, 9], 0, 12)
    decode.receive("r", [3, NO_BLOCK, 5], 0, 12, from_=["prefill"]).result(PATIENCE_S)
    sent.result(PATIENCE_S)
    for ours, theirs in ((7, 3), (9, 5)):
        assert (there.read([theirs], 0, 4) == here.read([ours], 0, 4)).all()
        there.erase([theirs], 0, 4)
    assert there.is_poison()


def test_aux_is_joined_in_the_order_of_positions_whatever_the_order_of_sends(
    group: Group,
) -> None:
    here, there = Cache.of().fill(1), Cache.of()
    prefill, decode = group.pair(here, there)
    rng = random.Random(2)
    ours, theirs = here.blocks(rng, 0, 12), there.blocks(rng, 0, 12)
    received = decode.receive("r", theirs, 0, 12, from_=["prefill"])
    prefill.send("r", ours[2:], 8, 12, final=False, aux=b"c")
    prefill.send("r", ours[:1], 0, 4, final=False, aux=b"a")
    prefill.send("r", ours[1:2], 4, 8, aux=b"b" * 65536)
    assert received.result(PATIENCE_S).aux == {"prefill": b"a" + b"b" * 65536 + b"c"}
    assert (there.read(theirs, 0, 12) == here.read(ours, 0, 12)).all()


def test_many_senders_and_many_receivers_at_once(group: Group) -> None:
    shards = [Shard(0, 1, 4), Shard(1, 1, 4), Shard(2, 2, 4)]
    whole = Cache.of(heads=Shard(0, 4, 4)).fill(3)
    sources = [Cache.of(heads=shard) for shard in shards]
    for cache, shard in zip(sources, shards, strict=True):
        for mine, all_heads in zip(cache.pools, whole.pools, strict=True):
            mine[:] = all_heads[:, :, :, shard.start : shard.stop]
    targets = [Cache.of(heads=Shard(0, 4, 4)), Cache.of(heads=Shard(1, 3, 4), block_tokens=7)]
    senders = [group.open(f"prefill{i}", c.layout) for i, c in enumerate(sources)]
    receivers = [group.open(f"decode{i}", c.layout) for i, c in enumerate(targets)]
    group.meet(*senders, *receivers)
    rng = random.Random(4)
    handles, lists = [], {}
    for number in range(12):
        request, tokens = f"r{number}", rng.randint(1, 60)
        ours = whole.blocks(rng, 0, tokens)
        for end, cache in zip(receivers, targets, strict=True):
            count = -(-tokens // cache.block_tokens)
            free = 64 - sum(len(v) for (name, _), v in lists.items() if name == end.name)
            if count > free:
                continue
            used = {b for (name, _), v in lists.items() if name == end.name for b in v}
            lists[end.name, request] = rng.sample(sorted(set(range(64)) - used), count)
        asked = [end for end in receivers if (end.name, request) in lists]
        if not asked:
            continue
        names = [end.name for end in asked]
        handles += [end.send(request, ours, 0, tokens, to=names) for end in senders]
        for end in asked:
            theirs = lists[end.name, request]
            from_ = [sender.name for sender in senders]
            handles.append(end.receive(request, theirs, 0, tokens, from_=from_, receivers=names))
        lists[request, "ours"] = (ours, tokens)  # type: ignore[assignment]
    for handle in handles:
        handle.result(PATIENCE_S)
    for end, cache in zip(receivers, targets, strict=True):
        heads = cache.layout.tensors[0].heads
        for (name, request), theirs in lists.items():
            if name == end.name:
                ours, tokens = lists[request, "ours"]
                right = whole.read(ours, 0, tokens)[:, :, :, heads.start : heads.stop]
                assert (cache.read(theirs, 0, tokens) == right).all()
    for end in senders + receivers:
        until(lambda end=end: is_idle(end))


def test_two_endpoints_that_send_to_each_other_through_small_staging_finish(group: Group) -> None:
    caches = [Cache.of(num_blocks=256, heads=Shard(0, 4, 4)).fill(i) for i in range(2)]
    ends = [
        group.open(f"both{i}", cache.layout, staging_bytes=8 << 12)
        for i, cache in enumerate(caches)
    ]
    group.meet(*ends)
    handles, checks = [], []
    for number in range(8):
        tokens = 60
        mine = list(range(number * 15, number * 15 + 15))
        free = list(range(128 + number * 15, 128 + number * 15 + 15))
        for end, cache, other, target in zip(ends, caches, ends[::-1], caches[::-1], strict=True):
            handles.append(end.send(f"{end.name}.{number}", mine, 0, tokens, to=[other.name]))
            handles.append(other.receive(f"{end.name}.{number}", free, 0, tokens, from_=[end.name]))
            checks.append((target, free, cache, mine, tokens))
    for handle in handles:
        handle.result(PATIENCE_S)
    for target, free, cache, mine, tokens in checks:
        assert (target.read(free, 0, tokens) == cache.read(mine, 0, tokens)).all()


def test_a_request_larger_than_both_pools_crosses_stagings_of_different_sizes(
    group: Group,
) -> None:
    here = Cache.of(num_blocks=300, heads=Shard(0, 4, 4), dim=32).fill(9)
    there = Cache.of(num_blocks=300, heads=Shard(0, 4, 4), dim=32, block_tokens=3)
    prefill = group.open("prefill", here.layout, staging_bytes=4 << 12)
    decode = group.open("decode", there.layout, staging_bytes=23 << 12, chunk_bytes=5000)
    group.meet(prefill, decode)
    rng = random.Random(1)
    tokens = 601
    ours, theirs = here.blocks(rng, 0, tokens), there.blocks(rng, 0, tokens)
    sent = prefill.send("r", ours, 0, tokens)
    received = decode.receive("r", theirs, 0, tokens, from_=["prefill"])
    received.result(PATIENCE_S)
    sent.result(PATIENCE_S)
    assert (there.read(theirs, 0, tokens) == here.read(ours, 0, tokens)).all()
    assert received.record.nbytes == 601 * 2 * 2 * 4 * 32 * 2 > 23 << 12
    assert received.record.chunks > 75


@pytest.mark.parametrize("slots", [(2, 2), (3, 4), (5, 2)])
def test_the_smallest_staging_that_holds_a_token_carries_a_request(
    loopback_group: Group, slots: tuple[int, int]
) -> None:
    # One token of a merged lane takes 2 layers * 2 * 4 heads * 8 * 2 = 256 bytes: one slot and
    # the alignment of a chunk within it.
    here, there = Cache.of(heads=Shard(0, 4, 4)).fill(1), Cache.of(heads=Shard(0, 4, 4))
    prefill = loopback_group.open("p", here.layout, staging_bytes=slots[0] * 256, slot_bytes=256)
    decode = loopback_group.open("d", there.layout, staging_bytes=slots[1] * 256, slot_bytes=256)
    loopback_group.meet(prefill, decode)
    ship_once(prefill, decode, here, there)


def test_a_sender_and_a_receiver_may_each_come_first_from_many_threads(group: Group) -> None:
    here, there = Cache.of(num_blocks=256).fill(1), Cache.of(num_blocks=256)
    prefill, decode = group.pair(here, there)
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            rng = random.Random(thread)
            for number in range(12):
                request, tokens = f"{thread}.{number}", rng.randint(1, 30)
                count = -(-tokens // 4)
                ours = rng.sample(range(256), count)
                theirs = rng.sample(range(thread * 60, thread * 60 + 60), count)
                calls = [
                    lambda r=request, o=ours, t=tokens: prefill.send(r, o, 0, t),
                    lambda r=request, o=theirs, t=tokens: decode.receive(
                        r, o, 0, t, from_=["prefill"]
                    ),
                ]
                rng.shuffle(calls)
                for handle in [call() for call in calls]:
                    handle.result(PATIENCE_S)
                assert (there.read(theirs, 0, tokens) == here.read(ours, 0, tokens)).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    until(lambda: is_idle(prefill) and is_idle(decode))


def test_a_gibibyte_crosses_64_mebibytes_of_staging() -> None:
    group = Group("nixl")
    try:
        shape = {"layers": 1, "num_blocks": 2100, "block_tokens": 16, "dim": 128}
        here = Cache.of(heads=Shard(0, 64, 64), **shape).fill(2)
        there = Cache.of(heads=Shard(0, 64, 64), **shape)
        prefill, decode = group.pair(
            here, there, staging_bytes=64 << 20, slot_bytes=65536, timeout_s=120.0
        )
        tokens = 32768
        rng = random.Random(0)
        ours, theirs = here.blocks(rng, 0, tokens), there.blocks(rng, 0, tokens)
        prefill.send("big", ours, 0, tokens)
        result = decode.receive("big", theirs, 0, tokens, from_=["prefill"]).result(120)
        assert result.record.nbytes == 1 << 30
        for pool, source in zip(there.pools, here.pools, strict=True):
            for ours_id, theirs_id in zip(ours, theirs, strict=True):
                assert (pool[:, theirs_id] == source[:, ours_id]).all()
    finally:
        group.close()


def test_messages_that_come_before_this_side_has_connected_are_kept(group: Group) -> None:
    here, there = Cache.of().fill(1), Cache.of()
    prefill = group.open("prefill", here.layout)
    decode = group.open("decode", there.layout)
    hello = decode.metadata()
    decode.connect(prefill.metadata())
    received = decode.receive("early", [1, 2], 0, 8, from_=["prefill"])
    flag = Flag()
    sent = prefill.send("early", [3, 4], 0, 8, ready=flag)
    until(lambda: flag.queries > 20)
    assert not received.done()
    prefill.connect(hello)
    flag.fired = True
    received.result(PATIENCE_S)
    sent.result(PATIENCE_S)
    assert (there.read([1, 2], 0, 8) == here.read([3, 4], 0, 8)).all()


def test_both_ends_of_one_process_may_be_driven_by_its_own_thread(group: Group) -> None:
    here, there = Cache.of().fill(1), Cache.of()
    prefill, decode = (
        group.open(name, cache.layout, driver="caller")
        for name, cache in (("prefill", here), ("decode", there))
    )
    group.meet(prefill, decode)
    pairs: list[tuple[Endpoint, Cache]] = [(prefill, here), (decode, there)]
    assert all(not end.progress() for end, _ in pairs for _ in range(5))
    sent = prefill.send("r", [3, 4], 0, 8)
    received = decode.receive("r", [1, 2], 0, 8, from_=["prefill"])
    until(lambda: sent.done() and received.done(), prefill, decode)
    assert (there.read([1, 2], 0, 8) == here.read([3, 4], 0, 8)).all()
