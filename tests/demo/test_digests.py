"""Digests of cache rows notice one flipped bit and two exchanged blocks, and say where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvpack.demo.digests import ShardDigests, compare, digest_rows

LAYERS, HEADS, TOKENS, DIM = 2, 4, 24, 8


def random_cache(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """(layer, tensor, token, head, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 2, TOKENS, HEADS, DIM, generator=generator).to(dtype)


def digests(cache: torch.Tensor, heads: range) -> ShardDigests:
    return ShardDigests(
        heads.start,
        np.stack(
            [
                np.stack([digest_rows(rows[:, heads.start : heads.stop]) for rows in layer])
                for layer in cache
            ]
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_caches_compare_equal_however_their_heads_are_shared(dtype: torch.dtype) -> None:
    cache = random_cache(0, dtype)
    whole = [digests(cache, range(4))]
    pairs = [digests(cache, range(2, 4)), digests(cache, range(2))]
    uneven = [digests(cache, range(1)), digests(cache, range(1, 4))]
    assert compare(whole, pairs) is None
    assert compare(pairs, uneven) is None


@pytest.mark.parametrize("seed", range(20))
def test_one_flipped_bit_is_found_and_placed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sent = random_cache(seed, torch.bfloat16)
    received = sent.clone()
    layer, tensor, token, head = (int(rng.integers(n)) for n in (LAYERS, 2, TOKENS, HEADS))
    row = received[layer, tensor, token, head].view(torch.uint8)
    row[int(rng.integers(len(row)))] ^= 1 << int(rng.integers(8))
    mismatch = compare([digests(sent, range(4))], [digests(received, range(4))])
    assert mismatch is not None
    assert (mismatch.rows, mismatch.total_rows) == (1, LAYERS * 2 * HEADS * TOKENS)
    assert (mismatch.layer, mismatch.name) == (layer, "kv"[tensor])
    assert (mismatch.head, mismatch.position) == (head, token)
    assert f"head {head}, position {token}" in str(mismatch)


def test_two_exchanged_blocks_are_found_though_the_set_of_rows_is_the_same() -> None:
    sent = random_cache(1, torch.float32)
    received = sent.clone()
    received[:, :, 0:8], received[:, :, 8:16] = sent[:, :, 8:16], sent[:, :, 0:8]
    one, other = digests(sent, range(4)), digests(received, range(4))
    assert sorted(one.values.ravel()) == sorted(other.values.ravel())
    mismatch = compare([one], [other])
    assert mismatch is not None
    assert mismatch.rows == LAYERS * 2 * HEADS * 16


def test_two_exchanged_heads_are_found() -> None:
    sent = random_cache(2, torch.float32)
    mismatch = compare([digests(sent, range(4))], [digests(sent[..., [1, 0, 2, 3], :], range(4))])
    assert mismatch is not None
    assert (mismatch.rows, mismatch.head) == (LAYERS * 2 * 2 * TOKENS, 0)


def test_shards_that_leave_a_head_out_are_refused() -> None:
    cache = random_cache(3, torch.float32)
    with pytest.raises(ValueError, match="begins at head 3 instead of 2"):
        compare([digests(cache, range(4))], [digests(cache, range(2)), digests(cache, range(3, 4))])
    with pytest.raises(ValueError, match="shapes differ"):
        compare([digests(cache, range(4))], [digests(cache, range(2))])
