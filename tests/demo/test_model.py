"""The demo's model decodes from its cache as if undisturbed, and from a wrong one differently."""

from __future__ import annotations

import pytest
import torch

from kvpack.demo.model import Model, Prefill

pytest.importorskip("transformers")

TOKENS, NEW_TOKENS, BLOCK = 200, 24, 32


def make_model(seed: int, dtype: torch.dtype = torch.float32, architecture: str = "qwen3") -> Model:
    return Model(
        architecture,
        layers=4,
        kv_heads=4,
        head_dim=64,
        max_tokens=TOKENS + NEW_TOKENS,
        dtype=dtype,
        device=torch.device("cpu"),
        seed=seed,
    )


def decode(model: Model, prefill: Prefill) -> tuple[int, ...]:
    return model.decode(prefill.first_token, prefill.keys, prefill.values, NEW_TOKENS)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_from_the_cache_gives_the_undisturbed_tokens(
    dtype: torch.dtype, architecture: str
) -> None:
    model = make_model(0, dtype, architecture)
    prompt = model.prompt(TOKENS)
    undisturbed = model.generate(prompt, NEW_TOKENS)
    prefill = model.prefill(prompt)
    assert prefill.keys[3].shape == prefill.values[3].shape == (TOKENS, 4, 64)
    assert prefill.keys[0].dtype is dtype
    assert decode(model, prefill) == undisturbed
    assert len(undisturbed) == NEW_TOKENS
    # A model that repeats itself would decode alike from any cache.
    assert len(set(undisturbed)) > NEW_TOKENS // 2


def test_two_processes_would_build_the_same_model_prompt_and_cache() -> None:
    one, other = make_model(7), make_model(7)
    assert torch.equal(one.prompt(TOKENS), other.prompt(TOKENS))
    for left, right in zip(
        one.prefill(one.prompt(TOKENS)).keys, other.prefill(other.prompt(TOKENS)).keys, strict=True
    ):
        assert torch.equal(left, right)
    assert not torch.equal(one.prompt(TOKENS), make_model(8).prompt(TOKENS))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("seed", range(3))
def test_wrong_keys_change_tokens_and_exchanged_blocks_do_not(seed: int, architecture: str) -> None:
    model = make_model(seed, architecture=architecture)
    prompt = model.prompt(TOKENS)
    prefill = model.prefill(prompt)
    undisturbed = decode(model, prefill)

    def swapped(rows: torch.Tensor) -> torch.Tensor:
        blocks = list(rows.split(BLOCK))
        blocks[0], blocks[5] = blocks[5], blocks[0]
        return torch.cat(blocks)

    def zeroed(rows: torch.Tensor) -> torch.Tensor:
        damaged = rows.clone()
        damaged[5 * BLOCK : 6 * BLOCK] = 0
        return damaged

    first, keys, values = prefill.first_token, prefill.keys, prefill.values
    swapped_keys = tuple(swapped(rows) for rows in keys)
    swapped_values = tuple(swapped(rows) for rows in values)
    assert model.decode(first, swapped_keys, swapped_values, NEW_TOKENS) == undisturbed
    assert model.decode(first, swapped_keys, values, NEW_TOKENS) != undisturbed
    zeroed_keys = tuple(zeroed(rows) for rows in keys)
    zeroed_values = tuple(zeroed(rows) for rows in values)
    assert model.decode(first, zeroed_keys, zeroed_values, NEW_TOKENS) != undisturbed
