"""Regular topologies, axis by axis: tensor, pipeline and context parallelism of tiny layouts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import numpy as np

from kvpack.blocks import touched_blocks
from kvpack.layout import CacheLayout, ContextShard, Memory, Shard, declare
from kvpack.verification import Party, Request, verify

TENSOR = (1, 2, 3, 4, 6, 8, 16)
HEADS = (1, 2, 4, 8)
PIPELINE = (1, 2, 3)
CONTEXT = (1, 2, 3, 4)
STAGES = {1: (0, 5), 2: (0, 2, 5), 3: (0, 1, 4, 5)}
LAYERS = 5
FIRST, LAST = 3, 29


@dataclass(frozen=True)
class Parallelism:
    """How many ranks share out heads, layers and positions, in runs of ``interleave``."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    interleave: int = 2


@dataclass(frozen=True)
class Combination:
    """A model of so many heads, prefilled one way and decoded another."""

    heads: int
    source: Parallelism
    destination: Parallelism


def all_combinations() -> Iterator[Combination]:
    """Every value of every axis with every other."""
    for heads, *axes in product(HEADS, TENSOR, TENSOR, PIPELINE, PIPELINE, CONTEXT, CONTEXT):
        tensors, pipelines, contexts = axes[:2], axes[2:4], axes[4:]
        sides = zip(tensors, pipelines, contexts, strict=True)
        yield Combination(heads, *(Parallelism(*side) for side in sides))


@lru_cache(256)
def parties(heads: int, side: Parallelism, role: str) -> dict[str, Party]:
    """Every rank of a side, by name, with addresses of its own and shuffled blocks."""
    block_tokens = 4 if role == "source" else 2
    bounds = list(pairwise(STAGES[side.pipeline]))
    out = {}
    grid = product(range(side.tensor), bounds, range(side.context))
    for number, (rank, (low, high), context) in enumerate(grid, 1):
        shard = Shard.balanced(heads, side.tensor, rank)
        shape = (high - low, 2, 20, block_tokens, shard.count, 2)
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(6))
        memory = Memory((number + (1000 if role == "source" else 0)) << 16, shape, strides, "uint8")
        layout = CacheLayout(
            declare(
                memory, "layer kv block token head dim", layers=range(low, high),
                names=("k", "v"), heads=shard,
            ),
            ContextShard(context, side.context, side.interleave),
        )  # fmt: skip
        start, stop = touched_blocks(layout, 0, FIRST, LAST)
        ids = random.Random(number).sample(range(20), stop - start)
        out[f"{role}{rank}.{low}.{context}"] = Party(layout, ids)
    return out


def check_combination(
    case: Combination, request_id: str = "request", receivers: int | None = None
) -> int:
    """Prove that every byte arrives once, from one sender, at every receiver or at some of them.

    Returns the number of receivers looked at.
    """
    sources = parties(case.heads, case.source, "source")
    wanted = parties(case.heads, case.destination, "destination")
    names = list(wanted)
    if receivers is not None and receivers < len(names):
        names = random.Random(repr(case)).sample(names, receivers)
    proof = verify(sources, {n: wanted[n] for n in names}, Request(FIRST, LAST, request_id))
    everything = 0
    for name in names:
        layout = wanted[name].layout
        shard = layout.context
        held = shard.tokens_before(LAST) - shard.tokens_before(FIRST)
        everything += held * layout.token_bytes
    assert proof.nbytes == everything, case
    return len(names)
