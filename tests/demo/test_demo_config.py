"""A run of the demo is refused before anything starts if its arguments do not fit together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvpack.demo.config import DemoConfig, Side
from kvpack.errors import OptionsError

CONFIG = DemoConfig(Side("prefill", 2, "hnd", 16), Side("decode", 1, "nhd", 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"staging_mib": 0}, "staging_mib=0 must be at least 1"),
        ({"new_tokens": 1}, "new_tokens=1 must be at least 2: the first comes out of prefill"),
        ({"head_dim": 63}, "head_dim=63 must be even"),
        ({"dtype": "int8"}, "dtype='int8' is not one of float32, bfloat16, float16"),
        ({"model": "gpt2"}, "model='gpt2' is not one of qwen3, llama"),
        ({"device": "tpu"}, "device='tpu' is not one of auto, cpu, cuda"),
        ({"corrupt": "all"}, "corrupt='all' is not one of none, order, keys, bytes"),
        ({"timeout_s": 0.0}, "timeout_s=0.0 must be positive"),
        ({"prefill": Side("prefill", 5, "hnd", 16)}, "prefill tp=5 is outside 1 to 4"),
        ({"decode": Side("decode", 0, "nhd", 16)}, "decode tp=0 is outside 1 to 4"),
        ({"decode": Side("decode", 1, "lmcache", 16)}, "decode layout 'lmcache' is not one of nhd"),
        ({"decode": Side("decode", 1, "nhd", 0)}, "decode block of 0 tokens must hold one"),
        ({"corrupt": "order", "tokens": 63}, "needs two full decode blocks, but 63 tokens fill 1"),
    ],
)
def test_bad_arguments_name_value_bound_and_mend(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError) as refused:
        dataclasses.replace(CONFIG, **changes)
    assert message in str(refused.value)


def test_heads_that_ranks_do_not_divide_are_allowed() -> None:
    config = dataclasses.replace(CONFIG, decode=Side("decode", 3, "nhd", 48))
    held = [config.decode.parallelism.rank(rank).heads(4) for rank in range(3)]
    assert [(shard.start, shard.count) for shard in held] == [(0, 1), (1, 1), (2, 2)]


def test_the_request_of_the_large_run_is_one_gibibyte() -> None:
    config = dataclasses.replace(
        CONFIG, tokens=8192, layers=32, kv_heads=8, head_dim=128, dtype="bfloat16"
    )
    assert config.request_bytes == 1 << 30
    assert config.row_bytes == 256


@pytest.mark.parametrize(
    ("layout", "prefill", "decode"),
    [("vllm", 16, 16), ("sglang", 1, 1), ("trtllm", 32, 32), ("hnd", 16, 32), ("nhd", 16, 32)],
)
def test_blocks_are_the_engines_own_unless_given(layout: str, prefill: int, decode: int) -> None:
    assert Side.of("prefill", 1, layout, None).block_tokens == prefill
    assert Side.of("decode", 1, layout, None).block_tokens == decode
    assert Side.of("decode", 1, layout, 48).block_tokens == 48
