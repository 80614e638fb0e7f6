"""Plans place every byte: random topologies against logical tensors on poisoned memory."""

import ctypes
import random

import numpy as np
import pytest
from support.topology import Model, Rank, make_rank

from kvpack.blocks import block_table
from kvpack.election import Election
from kvpack.layout import Shard
from kvpack.plan import compile_plan
from kvpack.verify import Party, Request, verify


def random_pair(seed: int) -> tuple[Model, list[Rank], list[Rank], int, int]:
    """A model, prefill ranks, decode ranks and a range, all random."""
    rng = random.Random(seed)
    model = Model.random(rng)
    first = rng.choice((0, rng.randrange(model.tokens)))
    last = rng.choice((model.tokens, rng.randint(first + 1, model.tokens)))
    sides = []
    for side in ("prefill", "decode"):
        tp = rng.choice((1, 1, 2, 3, 4))
        pp = rng.choice((1, 1, 2)) if model.layers > 1 else 1
        dims, tokens = None, None
        ranks = []
        for t in range(tp):
            for stage in range(pp):
                layers = range(stage * model.layers // pp, (stage + 1) * model.layers // pp)
                heads = Shard.balanced(model.heads, tp, t) if model.headed else Shard()
                rank = make_rank(
                    rng,
                    model,
                    f"{side}{t}.{stage}",
                    layers=layers,
                    heads=heads,
                    first=first,
                    last=last,
                    dims=dims,
                    block_tokens=tokens,
                )
                ranks.append(rank)
                if rng.random() < 0.5:
                    tokens = rank.layout.groups[0].block_tokens
        sides.append(ranks)
    return model, sides[0], sides[1], first, last


def ship_by_fragments(sources: list[Rank], destination: Rank, seed: int, stream: bool) -> None:
    layouts = {rank.name: rank.layout for rank in sources}
    chosen = Election(layouts, destination.layout).elect(str(seed))
    first, last = destination.first, destination.last
    wanted = block_table(destination.layout, destination.blocks, first, last, "destination")
    for rank in sources:
        plan = compile_plan(
            rank.layout, destination.layout, selection=chosen[rank.name], stream_layers=stream
        )
        held = block_table(rank.layout, rank.blocks, first, last, "source")
        for source, to, nbytes in zip(*plan.fragments_between(held, wanted, first, last), strict=True):
            ctypes.memmove(int(to), int(source), int(nbytes))


@pytest.mark.parametrize("chunk", range(10))
def test_fragments_place_every_byte_of_random_topologies(chunk: int) -> None:
    for seed in range(chunk * 30, chunk * 30 + 30):
        model, sources, destinations, first, last = random_pair(seed)
        for rank in sources:
            rank.fill(model)
        for rank in destinations:
            ship_by_fragments(sources, rank, seed, stream=bool(seed % 2))
            for got, wanted in zip(rank.buffers, rank.expected(model), strict=True):
                np.testing.assert_array_equal(got, wanted, err_msg=f"seed {seed}")
        proof = verify(
            {r.name: Party(r.layout, r.blocks) for r in sources},
            {r.name: Party(r.layout, r.blocks) for r in destinations},
            Request(first, last, stream_layers=bool(seed % 2)),
        )
        assert proof.nbytes == (last - first) * sum(r.layout.token_bytes for r in destinations)
