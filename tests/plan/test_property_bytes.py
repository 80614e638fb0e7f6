"""Placement is proved by bytes: random topologies through plan, twins and verify."""

import pytest
from support.property_case import check_case

CASES = 2000
BATCH = 100


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_every_byte_of_random_topologies_lands_where_it_belongs(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        check_case(seed)
