"""NumPy twins of the kernels against an oracle that walks the addressing formula byte by byte."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from support.kernel_cases import (
    HostMemory,
    Sizes,
    check_expand,
    check_gather,
    check_scatter,
    far_case,
    large_case,
    random_case,
)

from kvpack.columns import Row, Span
from kvpack.errors import BlockListError, LayoutError, OptionsError, StagingError
from kvpack.kernels import LaneTable, expand, gather, scatter
from kvpack.kernels.launch import interpreted
from kvpack.kernels.table import reciprocal


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_tables_copy_every_byte_and_no_other(first):
    for seed in range(first, first + 50):
        case = random_case(seed)
        check_gather(case, seed, gather)
        check_scatter(case, seed, scatter)
        check_expand(case, expand)


def test_the_random_tables_hold_every_width_and_form():
    spans = np.concatenate([random_case(seed).spans for seed in range(100)])
    assert set(spans[:, Span.WIDTH].tolist()) == {1, 2, 4, 8, 16}
    assert set(spans[:, Span.FORM].tolist()) == {0, 1}
    assert (spans[:, Span.TOKENS] == 1).any()
    assert (spans[:, Span.BLOCKS] < 0).any()


def test_blocks_that_hold_nothing_are_skipped():
    skipped = 0
    for seed in range(100):
        case = random_case(seed, holes=True)
        skipped += int((case.blocks < 0).sum())
        check_gather(case, seed, gather)
        check_scatter(case, seed, scatter)
        check_expand(case, expand)
    assert skipped > 50


def test_single_bytes_and_one_lane():
    for seed in range(50):
        case = random_case(seed, Sizes(lanes=1, blocks=1, run_words=1, classes=1, word_bytes=(1,)))
        check_gather(case, seed, gather)
        check_scatter(case, seed, scatter)


def test_whole_blocks_of_a_latent():
    case = large_case(seed=1, token_bytes=1152, tokens=32 * 40, block_tokens=32, lanes=3)
    assert set(case.spans[:, Span.WIDTH].tolist()) == {16}
    check_gather(case, 1, gather)
    check_scatter(case, 1, scatter)


@pytest.mark.parametrize("column", [Row.BASE, Row.BLOCK_STRIDE, Row.PHASE])
def test_the_oracle_notices_a_shifted_lane(column):
    case = large_case(seed=2, token_bytes=64, tokens=64, block_tokens=8)

    def shifted(table, *rest, **options):
        table[:, column] += 8 if column == Row.PHASE else 64
        gather(table, *rest, **options)

    with pytest.raises(AssertionError):
        check_gather(case, 2, shifted)


def test_the_oracle_notices_an_unclipped_end():
    case = next(
        case for case in map(random_case, range(100)) if (case.spans[:, Span.UNITS] > 1).any()
    )

    def longer(table, spans, blocks, staging, **options):
        spans = spans.copy()
        spans[np.argmax(spans[:, Span.UNITS] > 1), Span.UNITS] -= 1
        scatter(table, spans, blocks, staging, **options)

    with pytest.raises(AssertionError):
        check_scatter(case, 3, longer)


def test_addresses_beyond_32_bits_expand():
    check_expand(far_case(), expand)


def test_expand_gives_nixl_descriptors():
    case = random_case(5)
    table = case.table([0] * len(case.pool_bytes))
    descriptors = expand(table, case.spans, case.blocks, device_index=3)
    np.testing.assert_array_equal(descriptors[:, :2], expand(table, case.spans, case.blocks))
    assert (descriptors[:, 2] == 3).all()


def test_nothing_to_copy_touches_nothing():
    case = random_case(6)
    empty = case.spans[:0]
    staging = np.full(64, 0xA5, np.uint8)
    table = case.table([1 << 40] * len(case.pool_bytes))
    gather(table, empty, case.blocks, staging)
    scatter(table, empty, case.blocks, staging)
    assert (staging == 0xA5).all()
    assert expand(table, empty, case.blocks).shape == (0, 2)


@pytest.mark.parametrize("bits", [31, 63])
def test_reciprocals_divide_exactly(bits):
    rng = np.random.default_rng(bits)
    limit = 1 << min(bits, 62)
    powers = [1 << i for i in range(min(bits, 62))]
    random_divisors = (rng.integers(1, limit, 500) >> rng.integers(0, 30, 500)).tolist()
    divisors = {1, 3, 576, limit - 1, *powers, *random_divisors, *(p + 1 for p in powers)}
    for divisor in {d for d in divisors if 1 <= d < limit}:
        multiplier, shift = reciprocal(divisor)
        multiplier %= 1 << 64
        near = [divisor * k + j for k in (0, 1, (1 << bits) // divisor - 1) for j in (-1, 0, 1)]
        for n in [*near, 0, (1 << bits) - 1, *rng.integers(0, limit, 5).tolist()]:
            if not 0 <= n < 1 << bits:
                continue
            if bits == 63:
                assert (2 * n * multiplier >> 64) >> shift == n // divisor
            else:
                rounded = -(-multiplier >> 32)
                assert rounded < 1 << 32
                assert n * rounded >> 31 + shift == n // divisor


# --- what is refused at the door -----------------------------------------------------------------


@pytest.fixture
def request_of_8_blocks():
    case = large_case(seed=9, token_bytes=64, tokens=64, block_tokens=8)
    rng = np.random.default_rng(9)
    pool = HostMemory(case.pool_bytes[0], rng)
    staging = HostMemory(case.staging_bytes, rng)
    return pool, {
        "table": case.table([pool.address]),
        "spans": case.spans,
        "blocks": case.blocks,
        "staging": staging.array,
    }


@pytest.mark.parametrize("copy", [gather, scatter])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: {"max_ctas": 0}, OptionsError, "max_ctas is 0, below 1"),
        (lambda r: {"max_ctas": -4}, OptionsError, "max_ctas is -4, below 1"),
        (lambda r: {"backend": "cuda"}, OptionsError, "'cuda' is not one of"),
        (lambda r: {"spans": r["spans"].astype(np.int32)}, OptionsError, "int64"),
        (lambda r: {"spans": r["spans"][:, :-1]}, OptionsError, "11 columns, not 12"),
        (lambda r: {"table": r["table"][:0]}, OptionsError, "row 0, but the table has 0"),
        (lambda r: {"table": r["table"][:, :13]}, LayoutError, r"\(rows, 14\)"),
        (lambda r: {"table": r["table"].astype(np.int32)}, LayoutError, "int32"),
        (lambda r: {"blocks": r["blocks"].astype(np.int64)}, BlockListError, "int64"),
        (lambda r: {"blocks": list(r["blocks"])}, BlockListError, "list"),
        (lambda r: {"blocks": r["blocks"][:5]}, BlockListError, "of a list of 5"),
        (lambda r: {"staging": r["staging"][:-1]}, StagingError, "4096 bytes .* 4095 were given"),
        (lambda r: {"staging": r["staging"].view(np.int32)}, StagingError, "int32"),
        (lambda r: {"staging": r["staging"].reshape(2, -1)}, StagingError, "shape"),
        (lambda r: {"staging": np.empty(8192, np.uint8)[::2]}, StagingError, "contiguous"),
    ],
)
def test_bad_input_is_named_before_anything_is_copied(
    request_of_8_blocks, copy, change, error, message
):
    pool, request = request_of_8_blocks
    before = pool.array.copy(), request["staging"].copy()
    staging = request["staging"]
    with pytest.raises(error, match=message):
        copy(**request | change(request))
    np.testing.assert_array_equal(pool.array, before[0])
    np.testing.assert_array_equal(staging, before[1])


def test_misaligned_staging_is_refused(request_of_8_blocks):
    _, request = request_of_8_blocks
    longer = np.empty(8192, np.uint8)
    skip = -longer.ctypes.data % 16 + 4
    with pytest.raises(StagingError, match="16-byte access"):
        gather(**request | {"staging": longer[skip : skip + 4096]})


@pytest.mark.skipif(interpreted(), reason="the interpreter reaches memory on the CPU")
def test_triton_on_the_cpu_needs_the_interpreter(request_of_8_blocks):
    _, request = request_of_8_blocks
    with pytest.raises(OptionsError, match="TRITON_INTERPRET=1"):
        gather(**request, backend="triton")


@pytest.mark.parametrize("column", [Row.RUN_BYTES, Row.COUNT1, Row.BLOCK_TOKENS])
@pytest.mark.parametrize("value", [0, -1, 1 << 30])
def test_rows_beyond_32_bits_a_tile_are_refused(column, value):
    case = large_case(seed=9, token_bytes=64, tokens=64, block_tokens=8)
    table = case.table([0])
    table[1, column] = value
    with pytest.raises(LayoutError, match=str(value)):
        LaneTable(table)


def test_a_step_beyond_32_bits_a_tile_is_refused():
    case = large_case(seed=9, token_bytes=64, tokens=64, block_tokens=8)
    table = case.table([0])
    table[0, Row.STEP] = 1 << 29
    with pytest.raises(LayoutError, match=str(1 << 29)):
        LaneTable(table)


def test_a_lane_table_cannot_be_written():
    table = LaneTable(large_case(9, 64, 64, 8).table([0]))
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0] = 1


def test_the_package_imports_neither_triton_nor_torch():
    program = "import sys, kvpack.kernels; assert not {'triton', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
