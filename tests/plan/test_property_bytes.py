"""Placement is proved by bytes: random topologies through plan, twins and verify."""

import random

import numpy as np
import pytest
from support.topology import Topology, elected_plans, random_topology, ship

from kvpack.verification import Request, verify

CASES = 2000
BATCH = 100


def random_chunk_bytes(rng: random.Random, plan_bytes: int, token_bytes: int) -> int:
    """From about one token to the whole transfer, at most some sixteen chunks."""
    least = max(token_bytes + 16, plan_bytes // 16)
    return rng.choice((least, rng.randint(least, least + plan_bytes), plan_bytes + 16))


def move_and_compare(topology: Topology, seed: int) -> None:
    rng = random.Random(seed)
    stream_layers = rng.random() < 0.4
    first, last = topology.first, topology.last
    for rank in topology.sources:
        rank.fill(topology.model)
    sent = [[buffer.copy() for buffer in rank.buffers] for rank in topology.sources]
    for rank in topology.destinations:
        wanted = rank.expected(topology.model)
        moved = 0
        for source, plan in elected_plans(topology, rank, str(seed), stream_layers):
            total = plan.wire(first, last).total_bytes
            token_bytes = max(c.token_bytes for c in plan.classes)
            chunk_bytes = random_chunk_bytes(rng, total, token_bytes)
            moved += ship(plan, source, rank, first, last, chunk_bytes)
        for got, want in zip(rank.buffers, wanted, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=f"seed {seed}, {rank.name}")
        shard = rank.layout.context
        positions = shard.tokens_before(last) - shard.tokens_before(first)
        assert moved == positions * rank.layout.token_bytes, f"seed {seed}: bytes travelled twice"
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


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_every_byte_of_random_topologies_lands_where_it_belongs(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        move_and_compare(random_topology(seed), seed)
