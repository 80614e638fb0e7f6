"""The Triton kernels themselves, run by Triton's interpreter, against the oracle and the twins."""

from __future__ import annotations

import numpy as np
import pytest
from support.kernel_cases import (
    Sizes,
    check_expand,
    check_gather,
    check_scatter,
    far_case,
    large_case,
    many_spans_case,
    random_case,
)

from kvpack.columns import Span
from kvpack.kernels import LaneTable, expand, gather, scatter, warmup
from kvpack.kernels.launch import interpreted

pytestmark = pytest.mark.skipif(
    not interpreted(), reason="needs TRITON_INTERPRET=1 set before triton is imported"
)
TRITON = {"backend": "triton"}


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_tables_copy_every_byte_and_no_other(first):
    for seed in range(first, first + 10):
        case = random_case(seed)
        cap = {"max_ctas": 2} if seed % 4 == 0 else {}
        check_gather(case, seed, gather, **TRITON, **cap)
        check_scatter(case, seed, scatter, **TRITON, **cap)
        check_expand(case, expand, **TRITON)


@pytest.mark.parametrize("word_bytes", [1, 2, 4, 8, 16])
def test_every_width_copies_lanes_of_several_tiles(word_bytes):
    sizes = Sizes(lanes=2, blocks=12, run_words=40, classes=1, word_bytes=(word_bytes,))
    tile_bytes = 1024 * word_bytes
    found = 0
    for seed in range(400):
        case = random_case(seed, sizes)
        spans = case.spans
        lane_bytes = spans[:, Span.UNITS] * spans[:, Span.UNIT_BYTES]
        wide = spans[:, Span.WIDTH] == word_bytes
        if ((lane_bytes > tile_bytes) & wide & (lane_bytes < 6 * tile_bytes)).any():
            check_gather(case, seed, gather, **TRITON)
            check_scatter(case, seed, scatter, **TRITON)
            found += 1
        if found == 3:
            return
    pytest.fail(f"only {found} cases of this width")


def test_blocks_that_hold_nothing_are_skipped():
    for seed in range(100, 115):
        case = random_case(seed, holes=True)
        check_gather(case, seed, gather, **TRITON)
        check_scatter(case, seed, scatter, **TRITON)
        check_expand(case, expand, **TRITON)


@pytest.mark.parametrize("max_ctas", [None, 1, 3, 1000])
def test_runs_longer_than_a_tile_and_blocks_in_one_tile(max_ctas):
    # 36 KiB blocks cut tiles at every place: within a run, and across the next block's.
    case = large_case(seed=1, token_bytes=1152, tokens=32 * 5, block_tokens=32, lanes=2)
    check_gather(case, 1, gather, **TRITON, max_ctas=max_ctas)
    check_scatter(case, 1, scatter, **TRITON, max_ctas=max_ctas)


def test_tokens_of_one_byte():
    for seed in range(10):
        case = random_case(seed, Sizes(lanes=1, blocks=1, run_words=1, classes=1, word_bytes=(1,)))
        check_gather(case, seed, gather, **TRITON)
        check_scatter(case, seed, scatter, **TRITON)


def test_more_spans_than_a_program_compares_at_once():
    case = many_spans_case(seed=4, classes=60)
    assert len(case.spans) > 64
    check_gather(case, 4, gather, **TRITON, max_ctas=7)
    check_scatter(case, 4, scatter, **TRITON)
    check_expand(case, expand, **TRITON)


def test_addresses_beyond_32_bits_expand():
    check_expand(far_case(), expand, **TRITON)


def test_triton_expands_as_the_twin_does():
    for seed in range(200, 210):
        case = random_case(seed, holes=seed % 2 == 0)
        table = LaneTable(case.table([1 << 40] * len(case.pool_bytes)))
        for device_index in (None, 5):
            options = {"device_index": device_index}
            np.testing.assert_array_equal(
                expand(table, case.spans, case.blocks, **TRITON, **options),
                expand(table, case.spans, case.blocks, **options),
            )


def test_the_oracle_notices_one_wrong_id():
    case = large_case(seed=2, token_bytes=64, tokens=64, block_tokens=8)

    def confused(table, spans, blocks, staging, **options):
        swapped = blocks.copy()
        swapped[[0, 1]] = blocks[[1, 0]]
        scatter(table, spans, swapped, staging, **options)

    with pytest.raises(AssertionError):
        check_scatter(case, 2, confused, **TRITON)


def test_nothing_to_copy_launches_nothing():
    case = random_case(6)
    staging = np.full(64, 0xA5, np.uint8)
    table = case.table([1 << 40] * len(case.pool_bytes))
    gather(table, case.spans[:0], case.blocks, staging, **TRITON)
    assert (staging == 0xA5).all()
    assert tuple(expand(table, case.spans[:0], case.blocks, **TRITON).shape) == (0, 2)


def test_warming_up_the_cpu_is_nothing():
    warmup("cpu")
