"""Every axis of parallelism exhaustively, and seeded combinations of all: exactly once, evenly."""

import random
from collections import Counter
from itertools import product

import pytest
from support.axes import (
    CONTEXT,
    HEADS,
    PIPELINE,
    TENSOR,
    Combination,
    Parallelism,
    all_combinations,
    check_combination,
    parties,
)

from kvpack.election import Election

SEED = 20_260
COMBINATIONS = 500
BATCH = 50


@pytest.mark.parametrize("heads", HEADS)
def test_every_pair_of_tensor_parallel_sizes_moves_each_byte_once(heads: int) -> None:
    for ours, theirs in product(TENSOR, TENSOR):
        check_combination(Combination(heads, Parallelism(ours), Parallelism(theirs)))


def test_every_pair_of_uneven_pipelines_moves_each_byte_once() -> None:
    for ours, theirs in product(PIPELINE, PIPELINE):
        check_combination(Combination(2, Parallelism(1, ours), Parallelism(1, theirs)))


@pytest.mark.parametrize("interleave", [1, 2, 3, 8])
def test_every_pair_of_context_parallel_sizes_moves_each_byte_once(interleave: int) -> None:
    for ours, theirs in product(CONTEXT, CONTEXT):
        for other in (1, 2, 3, 8):
            source = Parallelism(1, 1, ours, interleave)
            check_combination(Combination(1, source, Parallelism(1, 1, theirs, other)))


@pytest.mark.parametrize("batch", range(COMBINATIONS // BATCH))
def test_combinations_of_all_axes_move_each_byte_once(batch: int) -> None:
    drawn = random.Random(SEED).sample(list(all_combinations()), COMBINATIONS)
    for case in drawn[batch * BATCH : (batch + 1) * BATCH]:
        check_combination(case, receivers=6)


@pytest.mark.parametrize("heads", HEADS)
def test_every_replica_does_its_share_over_many_requests(heads: int) -> None:
    for ours, theirs in product([size for size in TENSOR if size > heads], TENSOR):
        sources = {
            name: party.layout
            for name, party in parties(heads, Parallelism(ours), "source").items()
        }
        copies = Counter(layout.tensors[0].heads.start for layout in sources.values())
        requests = 30 * max(copies.values())
        for name, party in parties(heads, Parallelism(theirs), "destination").items():
            if random.Random(f"{ours}/{name}").random() < 0.5 and theirs > 4:
                continue  # half of many receivers are enough to see it
            election = Election(sources, party.layout)
            sent: Counter[str] = Counter()
            for number in range(requests):
                chosen = election.elect(f"request {number}/{name}")
                sent.update(source for source, part in chosen.items() if part != ())
            wanted = party.layout.tensors[0].heads
            for source, layout in sources.items():
                head = layout.tensors[0].heads.start
                if not wanted.start <= head < wanted.stop:
                    assert not sent[source]
                    continue
                share = requests / copies[head]
                assert 0.4 * share < sent[source] < 1.8 * share, (ours, theirs, name, source)
