"""Named shapes: their numbers are those that others published."""

from __future__ import annotations

import pytest

from kvpack.layout import Shard
from kvpack.shapes import ENGINE_LAYOUTS, MODELS, Parallelism, Pieces

MIB = 1 << 20
GIB = 1 << 30


def test_qwen3_235b_on_one_rank_of_four_is_48128_pieces_of_4_kib() -> None:
    (pieces,) = MODELS["qwen3-235b"].block_pieces(
        tokens=8192, block_tokens=32, dtype_bytes=1, parallelism=Parallelism(tp=4)
    )
    assert pieces == Pieces(count=48_128, piece_bytes=4096)
    assert pieces.total_bytes == 188 * MIB
    assert MODELS["qwen3-235b"].request_bytes(8192, dtype_bytes=1) == 788_529_152


def test_deepseek_r1_in_fp8_is_287_834_112_bytes_on_whichever_rank() -> None:
    shape = MODELS["deepseek-r1"]
    assert shape.request_bytes(8192, dtype_bytes=1) == 287_834_112
    for tp_rank in range(4):
        (pieces,) = shape.block_pieces(
            tokens=8192,
            block_tokens=64,
            dtype_bytes=2,
            parallelism=Parallelism(tp=4),
            tp_rank=tp_rank,
        )
        assert pieces == Pieces(count=7_808, piece_bytes=72 * 1024)


@pytest.mark.parametrize(
    ("name", "gib", "merged", "merged_kib"),
    [
        ("llama-3.1-8b", 1.00, 16_384, 16),
        ("llama-3.3-70b", 2.50, 40_960, 16),
        ("qwen3-32b", 2.00, 32_768, 16),
        ("qwen3-235b", 1.47, 48_128, 8),
        ("minimax-m2", 1.94, 31_744, 16),
    ],
)
def test_grouped_query_models_in_bf16_take_the_published_sizes(
    name: str, gib: float, merged: int, merged_kib: int
) -> None:
    shape = MODELS[name]
    assert shape.request_bytes(8192, dtype_bytes=2) / GIB == pytest.approx(gib, abs=0.005)
    (pieces,) = shape.block_pieces(
        tokens=8192, block_tokens=16, dtype_bytes=2, parallelism=Parallelism(tp=4)
    )
    # Published for K and V side by side, one piece a block; K alone is half of it, twice as often.
    assert pieces == Pieces(count=2 * merged, piece_bytes=merged_kib * 1024 // 2)


def test_sliding_windows_keep_no_more_than_they_see() -> None:
    shape = MODELS["gpt-oss-120b"]
    assert shape.num_layers == 36
    full_token = 18 * 2 * 8 * 64 * 2
    assert shape.token_bytes(2) == 2 * full_token
    assert shape.request_bytes(8192, 2) == full_token * (8192 + 128)
    assert shape.request_bytes(100, 2) == 2 * full_token * 100


def test_opaque_rows_ignore_the_dtype_of_the_cache() -> None:
    shape = MODELS["deepseek-v3.2"]
    assert shape.token_bytes(1) == shape.token_bytes(2) == 61 * (656 + 132)
    rows, indexer = shape.block_pieces(tokens=8192, block_tokens=64, dtype_bytes=2)
    assert rows == Pieces(count=7_808, piece_bytes=41_984)
    assert indexer == Pieces(count=7_808, piece_bytes=8_448)


def test_attention_data_parallel_ranks_hold_whole_requests() -> None:
    assert Parallelism(tp=16, attention_dp=True).ranks_per_request == 1
    assert Parallelism(tp=16, attention_dp=True).num_ranks == 16
    assert Parallelism(tp=16, attention_dp=True).heads(4, 11) == Shard(0, 4, 4)
    assert Parallelism(tp=4, pp=2).ranks_per_request == 8
    assert Parallelism(tp=4, pp=2).heads(4, 3) == Shard(3, 1, 4)
    with pytest.raises(ValueError, match="tp=0 must be at least 1"):
        Parallelism(tp=0)


def test_engine_layouts_name_every_axis_of_a_cache_once() -> None:
    for layout in ENGINE_LAYOUTS.values():
        axes = layout.dims.replace("(", " ").replace(")", " ").split()
        assert len(axes) == len(set(axes))
        assert (
            {"block", "token", "head", "dim"}
            <= set(axes)
            <= {
                "block",
                "token",
                "head",
                "dim",
                "kv",
                "layer",
            }
        )
