"""Placement is proved by bytes: random topologies through plan, twins and verify."""

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from support.property_case import check_case, check_topology, features
from support.topology import random_topology, topology_of

CASES = 2000
BATCH = 100


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_every_byte_of_random_topologies_lands_where_it_belongs(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        check_case(seed)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(strategies.randoms(use_true_random=False))
def test_every_byte_lands_where_a_search_for_a_small_failure_finds_none(rng: random.Random) -> None:
    check_topology(topology_of(rng), seed=0)


def test_the_cases_cover_what_they_are_meant_to() -> None:
    counts = Counter(name for seed in range(300) for name in features(random_topology(seed)))
    rare = {name: count for name, count in counts.items() if count < 5}
    assert not rare
    assert len(counts) == 16
