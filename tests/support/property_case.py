"""One case of the property suite: a random topology, moved by some kernels, every byte compared."""

from __future__ import annotations

import itertools
import random

import numpy as np
from support.shipping import TWINS, Copies, elected_plans, ship
from support.topology import Rank, Topology, random_topology

from kvpack.blocks import BlockTable, block_table
from kvpack.verification import Request, verify


def check_case(seed: int, copies: Copies = TWINS) -> None:
    """Draw the case of a seed and check it."""
    check_topology(random_topology(seed), seed, copies)


def check_topology(topology: Topology, seed: int, copies: Copies = TWINS) -> None:
    """Move a topology's request in random parts and chunks, and compare and prove it.

    Raises
    ------
    AssertionError
        If a byte of any buffer of any rank is not what it has to be, naming the seed.
    """
    rng = random.Random(seed)
    stream_layers = rng.random() < 0.4
    first, last = topology.first, topology.last
    for rank in topology.sources:
        rank.fill(topology.model)
    sent = [[buffer.copy() for buffer in rank.buffers] for rank in topology.sources]
    parts = {rank.name: sends(rng, rank) for rank in topology.sources}
    for rank in topology.destinations:
        wanted = rank.expected(topology.model)
        with copies.placed(topology.sources, rank):
            moved = receive(rng, topology, rank, parts, str(seed), stream_layers, copies)
        for got, want in zip(rank.buffers, wanted, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=f"seed {seed}, {rank.name}")
        assert moved == wanted_bytes(rank), f"seed {seed}: bytes travelled twice"
    for rank, before in zip(topology.sources, sent, strict=True):
        for got, want in zip(rank.buffers, before, strict=True):
            assert np.array_equal(got, want), f"seed {seed}: {rank.name} was written to"
    proof = verify(
        {rank.name: rank.party(first, last) for rank in topology.sources},
        {rank.name: rank.party(first, last) for rank in topology.destinations},
        Request(first, last, str(seed), stream_layers),
    )
    changed = sum(
        int((got != poison).sum())
        for rank in topology.destinations
        for got, poison in zip(rank.buffers, rank.poison, strict=True)
    )
    assert proof.nbytes >= changed


def sends(rng: random.Random, rank: Rank) -> list[tuple[int, int, BlockTable]]:
    """Cut what a source sends into one to three sends, in any order, each with its own lists."""
    inner = range(rank.first + 1, rank.last)
    cuts = sorted(rng.sample(inner, min(rng.choice((0, 0, 1, 2)), len(inner))))
    ranges = list(itertools.pairwise([rank.first, *cuts, rank.last]))
    rng.shuffle(ranges)
    return [
        (a, b, block_table(rank.layout, rank.party(a, b).blocks, a, b, "source")) for a, b in ranges
    ]


def receive(
    rng: random.Random,
    topology: Topology,
    rank: Rank,
    parts: dict[str, list[tuple[int, int, BlockTable]]],
    salt: str,
    stream_layers: bool,
    copies: Copies,
) -> int:
    """Move everything that a receiver elects; returns the bytes of cache that travelled."""
    moved = 0
    for source, plan in elected_plans(topology, rank, salt, stream_layers):
        for begin, end, held in parts[source.name]:
            first, last = max(begin, topology.first), min(end, topology.last)
            if first >= last or not plan.classes:
                continue
            total = plan.wire(first, last, topology.last).total_bytes
            token_bytes = max(c.token_bytes for c in plan.classes)
            chunk_bytes = random_chunk_bytes(rng, total, token_bytes)
            moved += ship(plan, source, rank, first, last, chunk_bytes, held=held, copies=copies)
    return moved


def random_chunk_bytes(rng: random.Random, plan_bytes: int, token_bytes: int) -> int:
    """From about one token to the whole transfer, at most some six chunks."""
    least = max(token_bytes + 16, plan_bytes // 6)
    return rng.choice((least, rng.randint(least, least + plan_bytes), plan_bytes + 16))


def wanted_bytes(rank: Rank) -> int:
    """Bytes that must travel to a receiver; those for `NO_BLOCK` do, and are left out there."""
    shard, total = rank.layout.context, 0
    for tensor in rank.layout.tensors:
        begin = rank.first
        if tensor.window is not None:
            begin = max(begin, rank.last - tensor.window)
        positions = shard.tokens_before(rank.last) - shard.tokens_before(begin)
        if tensor.state:
            positions = 1
        if (tensor.layer, tensor.name) not in rank.absent:
            total += positions * tensor.token_bytes
    return total


def features(topology: Topology) -> set[str]:
    """What is out of the ordinary about a topology, in words."""
    sides = (topology.sources, topology.destinations)
    tensors = [[t for rank in side for t in rank.layout.tensors] for side in sides]
    groups = [[g for rank in side for g in rank.layout.groups] for side in sides]
    found = {
        "state": any(t.state for t in tensors[1]),
        "a window": any(t.window and not t.state for t in tensors[1]),
        "a window cuts the range": any(
            t.window and not t.state and topology.last - t.window > topology.first
            for t in tensors[1]
        ),
        "a wider window at the source": any(
            g.window and w.window and g.window > w.window and not w.state
            for g in groups[0]
            for w in groups[1]
        ),
        "optional tensors": any(t.optional for t in tensors[1]),
        "optional tensors that nobody sends": any(rank.absent for rank in topology.destinations),
        "optional tensors that nobody wants": any(t.optional for t in tensors[0])
        and not any(t.optional for t in tensors[1]),
        "scales": any(t.name == "kv_scale" for t in tensors[1]),
        "sections": any(t.name == "conv.B" for t in tensors[1]),
        "several layer groups": any(len(rank.layout.groups) > 1 for rank in topology.destinations),
        "blocks that hold nothing": any(
            (ids < 0).any() for side in sides for rank in side for ids in rank.blocks
        ),
        "context parallelism": any(rank.layout.context.ranks > 1 for s in sides for rank in s),
        "several senders": len(topology.sources) > 1,
        "several receivers": len(topology.destinations) > 1,
        "other block sizes": {t.block_tokens for t in tensors[0]}
        != {t.block_tokens for t in tensors[1]},
        "a prefix left out": topology.first > 0,
    }
    return {name for name, holds in found.items() if holds}
