"""The property suite on a GPU: the same cases, their memory copied there, every byte compared."""

from __future__ import annotations

import pytest
from support.property_case import check_case
from support.shipping import Copies

from kvpack.kernels import warmup

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASES = 2000
BATCH = 200


@pytest.fixture(scope="module", autouse=True)
def _warm():
    warmup("cuda")


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_every_byte_lands_where_it_belongs(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        check_case(seed, Copies(device="cuda:0"))
