"""Cache shapes of engines, declared by hand and moved byte by byte."""

import random

import numpy as np
import pytest
from support.shipping import chunks_of

from kvpack.blocks import block_table
from kvpack.errors import IncompatibleLayoutsError
from kvpack.kernels import gather, scatter
from kvpack.layout import CacheLayout, CacheTensor, Memory, Shard, declare
from kvpack.plan import compile_plan
from kvpack.verification import Party, Request, verify
from kvpack.wire import chunk_origin

FIRST, LAST = 5, 90


def noise(nbytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def lists(seed: int, blocks: int, tokens: int) -> np.ndarray:
    """Shuffled blocks for positions ``[FIRST, LAST)``."""
    count = -(-LAST // tokens) - FIRST // tokens
    return np.array(random.Random(seed).sample(range(blocks), count), np.int32)


def move(source: CacheLayout, ours: list, destination: CacheLayout, theirs: list) -> int:
    """Move positions ``[FIRST, LAST)`` by the twins, after the proof; returns the fragments."""
    request = Request(FIRST, LAST)
    verify({"p": Party(source, ours)}, {"d": Party(destination, theirs)}, request)
    plan = compile_plan(source, destination)
    held = block_table(source, ours, FIRST, LAST, "source")
    wanted = block_table(destination, theirs, FIRST, LAST, "destination")
    wire = plan.wire(FIRST, LAST)
    for start, stop in chunks_of(wire, wire.total_bytes):
        staging = np.zeros(stop - chunk_origin(start), np.uint8)
        gather(
            plan.table("source"), wire.spans("source", start, stop, held.offsets), held.ids, staging
        )
        spans = wire.spans("destination", start, stop, wanted.offsets)
        scatter(plan.table("destination"), spans, wanted.ids, staging)
    return wire.fragments


def rows(page: np.ndarray, ids: np.ndarray, tokens: int) -> np.ndarray:
    """Rows of positions ``[FIRST, LAST)`` of pages seen as (block, token, bytes)."""
    flat = page[ids].reshape(-1, page.shape[-1])
    return flat[FIRST - FIRST // tokens * tokens :][: LAST - FIRST]


def data_and_scales(
    pool: np.ndarray, tokens: int, data: int, scales: int, padding: int
) -> tuple[CacheLayout, tuple[np.ndarray, np.ndarray]]:
    """Pages of so many tokens' rows of data, then their scales, then padding: two declarations."""
    page = tokens * (data + scales) + padding
    blocks = pool.nbytes // page
    address = pool.ctypes.data
    tensors = [
        *declare(
            Memory(address, (blocks, tokens, data), (page, data, 1), "uint8"),
            "block token bytes", layers=0, names="index_k",
        ),
        *declare(
            Memory(address + tokens * data, (blocks, tokens, scales), (page, scales, 1), "uint8"),
            "block token bytes", layers=0, names="index_k_scale",
        ),
    ]  # fmt: skip
    pages = pool[: blocks * page].reshape(blocks, page)
    views = (
        pages[:, : tokens * data].reshape(blocks, tokens, data),
        pages[:, tokens * data : tokens * (data + scales)].reshape(blocks, tokens, scales),
    )
    return CacheLayout(tensors), views


def test_data_then_scales_in_one_page_land_in_pages_of_another_size() -> None:
    for (ours, padding), (theirs, room) in (
        ((64, 0), (64, 0)),
        ((64, 0), (16, 96)),
        ((8, 4), (32, 0)),
    ):
        here, there = noise(1 << 18, 1), noise(1 << 18, 2)
        before = there.copy()
        source, held = data_and_scales(here, ours, 128, 4, padding)
        destination, got = data_and_scales(there, theirs, 128, 4, room)
        blocks = lists(3, 12, ours), lists(4, 12, theirs)
        move(source, [blocks[0]], destination, [blocks[1]])
        for have, want in zip(got, held, strict=True):
            assert (rows(have, blocks[1], theirs) == rows(want, blocks[0], ours)).all()
        assert (there != before).sum() <= (LAST - FIRST) * 132
        assert (there != before).sum() > 0.98 * (LAST - FIRST) * 132


def test_scales_beside_data_come_from_a_tensor_of_their_own() -> None:
    here = noise(1 << 18, 1)
    source, held = data_and_scales(here, 64, 128, 4, 0)
    data, scales = np.zeros((200, 1, 128), np.uint8), np.zeros((200, 4), np.uint8)
    destination = CacheLayout(
        [
            *declare(data, "block token bytes", layers=0, names="index_k"),
            *declare(
                scales, "(block token) bytes", layers=0, names="index_k_scale", block_tokens=1
            ),
        ]
    )
    ours, theirs = lists(3, 20, 64), lists(4, 200, 1)
    move(source, [ours], destination, [theirs])
    assert (data[theirs, 0] == rows(held[0], ours, 64)).all()
    assert (scales[theirs] == rows(held[1], ours, 64)).all()


def test_rows_that_nobody_may_look_into_move_whole() -> None:
    for row in (656, 132, 584):
        here, there = noise(9 * 64 * row, 1).reshape(9, 64, row), np.zeros((200, row), np.uint8)
        source = CacheLayout(declare(here, "block token bytes", layers=3, names="kv"))
        destination = CacheLayout(
            declare(there, "(block token) bytes", layers=3, names="kv", block_tokens=1)
        )
        ours, theirs = lists(1, 9, 64), lists(2, 200, 1)
        assert move(source, [ours], destination, [theirs]) == LAST - FIRST
        assert (there[theirs] == rows(here, ours, 64)).all()


def test_vectorised_keys_land_in_plain_rows_and_back() -> None:
    heads, dim, lanes, tokens = 2, 64, 8, 16

    def layout(k: np.ndarray, v: np.ndarray, dims: tuple[str, str]) -> CacheLayout:
        shard = Shard(0, heads, heads)
        tensors: list[CacheTensor] = []
        for array, axes, name in zip((k, v), dims, "kv", strict=True):
            tensors += declare(array, axes, layers=0, names=name, heads=shard)
        return CacheLayout(tensors)

    draw = np.random.default_rng(0).integers
    k = draw(0, 1 << 16, (9, heads, dim // lanes, tokens, lanes), dtype=np.uint16)
    v = draw(0, 1 << 16, (9, heads, dim, tokens), dtype=np.uint16)
    rocm = layout(k, v, ("block head hi token lo", "block head dim token"))
    plain_k, plain_v = (np.zeros((30, 8, heads, dim), np.uint16) for _ in range(2))
    plain = layout(plain_k, plain_v, ("block token head dim", "block token head dim"))
    ours, theirs = lists(1, 9, tokens), lists(2, 30, 8)
    move(rocm, [ours], plain, [theirs])
    for position in range(FIRST, LAST):
        held, got = ours[position // tokens], theirs[position // 8 - FIRST // 8]
        for head in range(heads):
            key = k[held, head, :, position % tokens].reshape(-1)
            assert (plain_k[got, position % 8, head] == key).all()
            assert (plain_v[got, position % 8, head] == v[held, head, :, position % tokens]).all()
    back_k, back_v = np.zeros_like(k), np.zeros_like(v)
    back = layout(back_k, back_v, ("block head hi token lo", "block head dim token"))
    move(plain, [theirs], back, [ours])
    for position in range(FIRST, LAST):
        where = (ours[position // tokens], slice(None), slice(None), position % tokens)
        assert (back_k[where] == k[where]).all()
        assert (back_v[where] == v[where]).all()


def test_inner_axes_in_another_order_are_refused() -> None:
    source = CacheLayout(declare(noise(480, 1).reshape(5, 4, 24), "slot tap channel",
                                 layers=0, names="conv"))  # fmt: skip
    destination = CacheLayout(declare(noise(480, 2).reshape(5, 24, 4), "slot channel tap",
                                      layers=0, names="conv"))  # fmt: skip
    with pytest.raises(
        IncompatibleLayoutsError,
        match=r"'conv' of layer 0: the source counts its elements by \(tap, channel\), the "
        r"destination by \(channel, tap\); declare a transposed view on one side",
    ):
        compile_plan(source, destination)


def test_a_transposed_view_of_a_state_lands_by_its_axes() -> None:
    lying = noise(5 * 4 * 24, 1).reshape(5, 4, 24)  # slot, tap, channel
    upright = np.zeros((7, 24, 4), np.uint8)
    source = CacheLayout(
        declare(lying.transpose(0, 2, 1), "slot channel tap", layers=0, names="conv")
    )
    destination = CacheLayout(declare(upright, "slot channel tap", layers=0, names="conv"))
    move(source, [[2]], destination, [[6]])
    assert (upright[6] == lying[2].T).all()
    assert not upright[:6].any()
