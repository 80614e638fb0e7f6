"""The demo's paged pools: a block list reads back what it wrote, and nothing else moves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kvpack.demo.paging import NAMES, PagedCache, shuffled_blocks
from kvpack.shapes import ENGINE_LAYOUTS

CPU = torch.device("cpu")
POISON = 0xFF


def make_cache(dims: str, rng: np.random.Generator, dtype: torch.dtype) -> PagedCache:
    return PagedCache(
        dims,
        layers=int(rng.integers(1, 4)),
        num_blocks=int(rng.integers(4, 9)),
        block_tokens=int(rng.integers(1, 7)),
        heads=int(rng.integers(1, 4)),
        head_dim=int(rng.integers(1, 6)),
        dtype=dtype,
        device=CPU,
        poison=POISON,
    )


def random_rows(cache: PagedCache, tokens: int) -> dict[tuple[int, str], torch.Tensor]:
    _, _, heads, dim = cache.view(0, "k").shape
    return {
        (layer, name): torch.randn(tokens, heads, dim).to(cache.view(layer, name).dtype)
        for layer in range(cache.num_layers)
        for name in NAMES
    }


@pytest.mark.parametrize("layout", ENGINE_LAYOUTS)
@pytest.mark.parametrize("seed", range(8))
def test_a_sequence_reads_back_as_written_and_nothing_else_is_touched(
    layout: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    dtype = [torch.float32, torch.bfloat16][seed % 2]
    cache = make_cache(ENGINE_LAYOUTS[layout].dims, rng, dtype)
    count = int(rng.integers(1, cache.num_blocks))
    tokens = int(rng.integers((count - 1) * cache.block_tokens + 1, count * cache.block_tokens + 1))
    blocks = shuffled_blocks(cache.num_blocks, count, rng)
    assert cache.untouched(blocks[:0], 0)

    rows = random_rows(cache, tokens)
    for (layer, name), values in rows.items():
        cache.write(layer, name, values, blocks)

    assert cache.untouched(blocks, tokens)
    for (layer, name), values in rows.items():
        assert torch.equal(cache.read(layer, name, blocks, tokens), values)
        for position in range(tokens):
            block = int(blocks[position // cache.block_tokens])
            token = position % cache.block_tokens
            assert torch.equal(cache.view(layer, name)[block, token], values[position])


@pytest.mark.parametrize("layout", ENGINE_LAYOUTS)
def test_views_of_all_tensors_tile_the_pools(layout: str) -> None:
    cache = make_cache(ENGINE_LAYOUTS[layout].dims, np.random.default_rng(1), torch.float32)
    pool_bytes = sum(pool.tensor.nbytes for pool in cache.pools)
    view_bytes = 0
    for number, (layer, name) in enumerate(itertools.product(range(cache.num_layers), NAMES)):
        view = cache.view(layer, name)
        view_bytes += view.numel() * view.element_size()
        view.fill_(float(number))
    assert view_bytes == pool_bytes
    for number, (layer, name) in enumerate(itertools.product(range(cache.num_layers), NAMES)):
        assert bool((cache.view(layer, name) == number).all())


def test_pools_have_the_shapes_that_their_dims_strings_say() -> None:
    def shapes(dims: str) -> list[tuple[int, ...]]:
        cache = PagedCache(
            dims,
            layers=3,
            num_blocks=7,
            block_tokens=5,
            heads=2,
            head_dim=4,
            dtype=torch.float32,
            device=CPU,
            poison=POISON,
        )
        return [tuple(pool.tensor.shape) for pool in cache.pools]

    assert shapes("kv block token head dim") == [(2, 7, 5, 2, 4)] * 3
    assert shapes("block kv head token dim") == [(7, 2, 2, 5, 4)] * 3
    assert shapes("block head token (kv dim)") == [(7, 2, 5, 8)] * 3
    assert shapes("(block token) head dim") == [(35, 2, 4)] * 6
    assert shapes("block layer kv head token dim") == [(7, 3, 2, 2, 5, 4)]


def test_one_byte_outside_the_request_is_noticed_wherever_it_is() -> None:
    rng = np.random.default_rng(3)
    for layout in ENGINE_LAYOUTS.values():
        for _ in range(10):
            cache = make_cache(layout.dims, rng, torch.float32)
            blocks = shuffled_blocks(cache.num_blocks, cache.num_blocks - 1, rng)
            tokens = len(blocks) * cache.block_tokens - int(rng.integers(cache.block_tokens))
            inside = {
                (int(blocks[position // cache.block_tokens]), position % cache.block_tokens)
                for position in range(tokens)
            }
            outside = [
                slot
                for slot in itertools.product(range(cache.num_blocks), range(cache.block_tokens))
                if slot not in inside
            ]
            block, token = outside[rng.integers(len(outside))]
            layer = int(rng.integers(cache.num_layers))
            name = NAMES[rng.integers(2)]
            row = cache.view(layer, name)[block, token].view(torch.uint8)
            assert cache.untouched(blocks, tokens)
            row[-1, int(rng.integers(row.shape[-1]))] ^= 1
            assert not cache.untouched(blocks, tokens)


def test_swapped_blocks_change_places_under_the_given_names_only() -> None:
    rng = np.random.default_rng(5)
    cache = make_cache("block head token (kv dim)", rng, torch.float32)
    blocks = shuffled_blocks(cache.num_blocks, 3, rng)
    tokens = 3 * cache.block_tokens
    rows = random_rows(cache, tokens)
    for (layer, name), values in rows.items():
        cache.write(layer, name, values, blocks)
    cache.swap_blocks(int(blocks[0]), int(blocks[2]), names=("k",))
    for layer in range(cache.num_layers):
        keys = rows[layer, "k"].split(cache.block_tokens)
        swapped = torch.cat([keys[2], keys[1], keys[0]])
        assert torch.equal(cache.read(layer, "k", blocks, tokens), swapped)
        assert torch.equal(cache.read(layer, "v", blocks, tokens), rows[layer, "v"])
    cache.overwrite_block(int(blocks[1]))
    assert not cache.read(0, "v", blocks[1:2], cache.block_tokens).any()
    assert cache.untouched(blocks, tokens)


def test_tokens_that_do_not_fit_their_blocks_are_refused() -> None:
    cache = make_cache("kv block token head dim", np.random.default_rng(0), torch.float32)
    with pytest.raises(ValueError, match="do not fit the 1 blocks"):
        cache.read(0, "k", np.zeros(1, np.int32), cache.block_tokens + 1)
    with pytest.raises(ValueError, match="5 blocks wanted of a pool of 4"):
        shuffled_blocks(4, 5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="must name block, token, head, dim"):
        make_cache("kv block token dim", np.random.default_rng(0), torch.float32)
