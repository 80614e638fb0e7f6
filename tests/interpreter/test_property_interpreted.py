"""The property suite with the Triton kernels themselves, run by Triton's interpreter."""

from __future__ import annotations

import pytest
from support.property_case import check_case, wanted_bytes
from support.shipping import Copies
from support.topology import random_topology

from kvpack.kernels.launch import interpreted

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="needs TRITON_INTERPRET=1 set before triton is imported"
)

CASES = 200
BATCH = 20
MAX_BYTES = 1500


def small_seeds(count: int) -> list[int]:
    """The first seeds of topologies of small pools, one or two pairs of ranks."""
    found: list[int] = []
    seed = 0
    while len(found) < count:
        topology = random_topology(seed)
        wanted = sum(wanted_bytes(rank) for rank in topology.destinations)
        if wanted <= MAX_BYTES and len(topology.sources) * len(topology.destinations) <= 2:
            found.append(seed)
        seed += 1
    return found


@pytest.fixture(scope="module")
def seeds() -> list[int]:
    return small_seeds(CASES)


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_interpreted_kernels_land_every_byte(seeds: list[int], batch: int) -> None:
    for seed in seeds[batch * BATCH : (batch + 1) * BATCH]:
        check_case(seed, Copies(backend="triton"))
