"""Named shapes: their numbers are those that others published."""

from __future__ import annotations

import pytest

from kvpack.shapes import ENGINE_LAYOUTS, MODELS

GIB = 1 << 30


def test_qwen3_235b_and_deepseek_r1_in_fp8_take_the_published_bytes() -> None:
    assert MODELS["qwen3-235b"].request_bytes(8192, dtype_bytes=1) == 788_529_152
    assert MODELS["deepseek-r1"].request_bytes(8192, dtype_bytes=1) == 287_834_112


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("llama-3.1-8b", 1.00),
        ("llama-3.3-70b", 2.50),
        ("qwen3-32b", 2.00),
        ("qwen3-235b", 1.47),
        ("minimax-m2", 1.94),
    ],
)
def test_grouped_query_models_in_bf16_take_the_published_sizes(name: str, gib: float) -> None:
    assert MODELS[name].request_bytes(8192, dtype_bytes=2) / GIB == pytest.approx(gib, abs=0.005)


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
