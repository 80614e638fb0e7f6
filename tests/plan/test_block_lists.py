"""Block lists: what a request must bring, and what each wrong list is told."""

import re

import numpy as np
import pytest
import torch

from kvpack.blocks import NO_BLOCK, block_table, touched_blocks
from kvpack.errors import BlockListError
from kvpack.layout import CacheLayout, ContextShard, Memory, declare
from kvpack.plan import compile_plan


def latents(
    *block_tokens: int, num_blocks: int = 2048, context: ContextShard | None = None
) -> CacheLayout:
    """One layer and layer group per block size; group 1 of half as many blocks, and so on."""
    tensors = []
    for group, tokens in enumerate(block_tokens):
        shape = (num_blocks >> group, tokens, 8)
        memory = Memory((1 + group) << 30, shape, (tokens * 8, 8, 1), "float16")
        tensors += declare(memory, "block token dim", layers=group, names="kv", group=group)
    return CacheLayout(tensors, context or ContextShard())


@pytest.mark.parametrize(
    ("blocks", "first", "last", "role", "said"),
    [
        (
            [4096, 1],
            0,
            32,
            "source",
            "block id 4096 in layer group 0 is outside the cache's 2048 blocks (entry 0 of",
        ),
        (
            [1, 2048],
            0,
            32,
            "destination",
            "block id 2048 in layer group 0 is outside the cache's 2048 blocks (entry 1 of",
        ),
        (
            [1, -2],
            0,
            32,
            "destination",
            "block id -2 in layer group 0 is outside the cache's 2048 blocks (entry 1 of the list)",
        ),
        (
            [7, NO_BLOCK],
            0,
            32,
            "source",
            "block id -1 (NO_BLOCK) at entry 1 of layer group 0: the source has no bytes there; "
            "send a range that begins after it",
        ),
        (
            [7, 9, 7],
            0,
            48,
            "destination",
            "block id 7 stands twice in the destination list of layer group 0; two stretches of "
            "positions would overwrite each other",
        ),
        (
            [7],
            0,
            17,
            "source",
            "block list of layer group 0 is too short: positions [0, 17) touch 2 blocks of 16 "
            "tokens (numbers [0, 2) of the sequence), got 1",
        ),
        (
            [7, 8, 9],
            20,
            48,
            "destination",
            "block list of layer group 0 is too long: positions [20, 48) touch 2 blocks of 16 "
            "tokens (numbers [1, 3) of the sequence), got 3",
        ),
        (
            [],
            0,
            16,
            "source",
            "block list of layer group 0 is too short: positions [0, 16) touch 1 blocks",
        ),
        ([7], 16, 16, "source", "positions [16, 16) are empty or negative"),
        ([7], 16, 3, "source", "positions [16, 3) are empty or negative"),
        ([7], -1, 3, "source", "positions [-1, 3) are empty or negative"),
        ([[7], [8]], 0, 16, "source", "2 block lists for a cache layout of 1 layer groups"),
        ([7.0], 0, 16, "source", "dtype float64; it must be a one-dimensional list of integers"),
        (np.zeros((1, 1, 1), int), 0, 16, "source", "shape (1, 1)"),
        (None, 0, 16, "source", "block lists None are not 1 list(s) of integers"),
        ([[1, 2], [3]], 0, 16, "source", "are not 1 list(s) of integers"),
        (["a"], 0, 16, "source", "it must be a one-dimensional list of integers"),
        ([True], 0, 16, "source", "dtype bool; it must be a one-dimensional list of integers"),
        (np.array([2**64 - 1], np.uint64), 0, 16, "destination", "block id 18446744073709551615"),
        ([2**70], 0, 16, "destination", "it must be a one-dimensional list of integers"),
    ],
)
def test_a_bad_list_is_told_value_bound_and_mend(
    blocks: object, first: int, last: int, role: str, said: str
) -> None:
    with pytest.raises(BlockListError, match=re.escape(said)):
        block_table(latents(16), blocks, first, last, role)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([[1], [2], [3]], "3 block lists for a cache layout of 2 layer groups; pass one per group"),
        ([[1]], "1 block lists for a cache layout of 2 layer groups; pass one per group"),
        (5, "are not 2 list(s) of integers"),
        ([1, 2], "block list of layer group 0 has shape () and dtype int64"),
        ([[1], [1024]], "block id 1024 in layer group 1 is outside the cache's 1024 blocks"),
        (
            [[1], [1, 2]],
            "block list of layer group 1 is too long: positions [0, 16) touch 1 blocks",
        ),
    ],
)
def test_a_bad_list_among_several_groups_is_named(blocks: object, said: str) -> None:
    with pytest.raises(BlockListError, match=re.escape(said)):
        block_table(latents(16, 32), blocks, 0, 16, "source")  # type: ignore[arg-type]


def test_a_plan_refuses_bad_lists_of_either_side() -> None:
    plan = compile_plan(latents(16), latents(32))
    with pytest.raises(BlockListError, match="block id 2048"):
        plan.fragments([2048, 1], [3], 0, 32)
    with pytest.raises(BlockListError, match="too long"):
        plan.fragments([7, 1], [3, 4], 0, 32)


def test_a_source_may_name_a_block_twice() -> None:
    plan = compile_plan(latents(16), latents(16))
    found = plan.fragments([7, 7], [3, 4], 0, 32)
    assert found.source.tolist() == [(1 << 30) + 7 * 256] * 2
    assert found.destination.tolist() == [(1 << 30) + 3 * 256, (1 << 30) + 4 * 256]


def test_a_destination_may_skip_any_number_of_stretches() -> None:
    table = block_table(latents(16), [NO_BLOCK, 7, NO_BLOCK], 0, 48, "destination")
    assert table.ids.tolist() == [NO_BLOCK, 7, NO_BLOCK]


@pytest.mark.parametrize(
    "blocks",
    [
        [3, 1],
        (3, 1),
        [[3, 1]],
        np.array([3, 1], np.uint8),
        np.array([3, 9, 1], np.int64)[::2],
        np.array([[3, 1]], np.int32),
        [np.array([3, 1])],
        torch.tensor([3, 1], dtype=torch.int32),
        [torch.tensor([3, 1])],
    ],
)
def test_any_list_of_integers_will_do(blocks: object) -> None:
    table = block_table(latents(16), blocks, 0, 32, "destination")  # type: ignore[arg-type]
    assert table.ids.tolist() == [3, 1]
    assert table.ids.dtype == np.int32
    assert table.ids.flags.c_contiguous


def test_lists_are_copied() -> None:
    ids = np.array([3, 1], np.int32)
    table = block_table(latents(16), ids, 0, 32, "destination")
    ids[:] = 9
    assert table.ids.tolist() == [3, 1]


def test_lists_of_all_groups_are_packed_with_their_offsets() -> None:
    layout = latents(16, 48)
    table = block_table(layout, [[5, 6, 7], [8, 9]], 20, 60, "source")
    assert table.ids.tolist() == [5, 6, 7, 8, 9]
    assert table.offsets == (-1, 3)
    assert [(start, ids.tolist()) for start, ids in map(table.of_group, (0, 1))] == [
        (1, [5, 6, 7]),
        (0, [8, 9]),
    ]


def test_a_context_rank_lists_the_blocks_of_its_own_tokens() -> None:
    layout = latents(16, context=ContextShard(1, 4, interleave=8))
    # Positions [8, 16), [40, 48), [72, 80) ... are local tokens 0, 8, 16 ...
    assert touched_blocks(layout, 0, 0, 8) == (0, 0)
    assert touched_blocks(layout, 0, 0, 48) == (0, 1)
    assert touched_blocks(layout, 0, 50, 80) == (1, 2)
    assert touched_blocks(layout, 0, 0, 160) == (0, 3)
    assert block_table(layout, [], 16, 40, "source").ids.tolist() == []
    with pytest.raises(BlockListError, match="too long"):
        block_table(layout, [1], 16, 40, "source")
