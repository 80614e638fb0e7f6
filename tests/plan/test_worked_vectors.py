"""Worked pointer arithmetic: exact addresses of small transfers, through the public API."""

import numpy as np
import pytest

from kvpack.blocks import NO_BLOCK
from kvpack.election import Election
from kvpack.fragments import Fragments
from kvpack.layout import CacheLayout, CacheTensor, ContextShard, Memory, Shard, declare
from kvpack.plan import compile_plan
from kvpack.verification import Party, Request, verify

SOURCE = 65536
DESTINATION = 524288


def memory(
    address: int, shape: tuple[int, ...], dtype: str = "float16", device: str = "cpu"
) -> Memory:
    """Contiguous memory that nobody reads."""
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return Memory(address, shape, tuple(strides), dtype, device)


def layout(*tensors: tuple[CacheTensor, ...]) -> CacheLayout:
    return CacheLayout([tensor for some in tensors for tensor in some])


def lists(found: Fragments) -> tuple[list[int], list[int], list[int]]:
    return found.source.tolist(), found.destination.tolist(), found.nbytes.tolist()


def latent_pool(address: int, layers: list[int], num_blocks: int = 8) -> tuple[CacheTensor, ...]:
    """A block-major pool of MLA latents, 256 bytes a layer and block."""
    shape = (num_blocks, len(layers), 4, 32)
    return declare(memory(address, shape), "block layer token dim", layers=layers, names="kv")


def test_equal_block_major_pools_move_one_run_a_block() -> None:
    dims, shape = "block layer kv head token dim", (8, 2, 2, 4, 4, 8)
    ours, theirs = (
        layout(
            declare(
                memory(base, shape), dims, layers=[0, 1], names=("k", "v"), heads=Shard(0, 4, 4)
            )
        )
        for base in (SOURCE, DESTINATION)
    )
    found = compile_plan(ours, theirs).fragments([3, 0, 7], [1, 4, 2], 0, 12)
    assert lists(found) == (
        [68608, 65536, 72704],
        [525312, 528384, 526336],
        [1024] * 3,
    )


def test_a_pipeline_stage_takes_its_layers_as_one_run() -> None:
    source = layout(latent_pool(SOURCE, [0, 1, 2, 3]))
    destination = layout(latent_pool(DESTINATION, [2, 3]))
    found = compile_plan(source, destination).fragments([0], [0], 0, 4)
    assert lists(found) == ([SOURCE + 512], [DESTINATION], [512])


def test_layers_apart_at_the_destination_are_two_runs() -> None:
    source = layout(latent_pool(SOURCE, [0, 1, 2, 3]))
    destination = layout(latent_pool(DESTINATION, [2, 9, 3]))
    found = compile_plan(source, destination).fragments([0], [0], 0, 4)
    assert lists(found) == (
        [SOURCE + 512, SOURCE + 768],
        [DESTINATION, DESTINATION + 512],
        [256, 256],
    )


def test_head_major_fan_in_from_four_ranks_to_two() -> None:
    dims = "block layer kv head token dim"
    source = layout(
        declare(
            memory(SOURCE, (4, 2, 2, 2, 4, 8)),
            dims,
            layers=[0, 1],
            names=("k", "v"),
            heads=Shard.balanced(8, 4, 3),
        )
    )
    destination = layout(
        declare(
            memory(DESTINATION, (4, 2, 2, 4, 4, 8)),
            dims,
            layers=[0, 1],
            names=("k", "v"),
            heads=Shard.balanced(8, 2, 1),
        )
    )
    found = compile_plan(source, destination).fragments([0], [0], 0, 4)
    assert (found.source - SOURCE).tolist() == [0, 128, 256, 384]
    assert (found.destination - DESTINATION).tolist() == [128, 384, 640, 896]
    assert found.nbytes.tolist() == [128] * 4


def test_token_major_rows_split_by_heads_are_a_run_a_token() -> None:
    dims = "block kv token head dim"
    source = layout(
        declare(
            memory(SOURCE, (4, 2, 4, 4, 8)), dims, layers=0, names=("k", "v"), heads=Shard(0, 4, 4)
        )
    )
    destination = layout(
        declare(
            memory(DESTINATION, (4, 2, 4, 2, 8)),
            dims,
            layers=0,
            names=("k", "v"),
            heads=Shard(2, 2, 4),
        )
    )
    found = compile_plan(source, destination).fragments([0], [0], 0, 4)
    assert (found.source - SOURCE).tolist() == [32, 96, 160, 224, 288, 352, 416, 480]
    assert (found.destination - DESTINATION).tolist() == list(range(0, 256, 32))
    assert found.nbytes.tolist() == [32] * 8


def grouped_query_rank(address: int, heads: int, ranks: int, rank: int) -> CacheLayout:
    """Keys alone: two positions of 16 bytes a head and block, head outside token."""
    shard = Shard.balanced(heads, ranks, rank)
    shape = (4, shard.count, 2, 8)
    return layout(
        declare(memory(address, shape), "block head token dim", layers=0, names="k", heads=shard)
    )


def test_two_heads_on_four_ranks_reach_one_rank_once_each() -> None:
    sources = {
        f"p{rank}": grouped_query_rank(SOURCE + 4096 * rank, 2, 4, rank) for rank in range(4)
    }
    destination = grouped_query_rank(DESTINATION, 2, 1, 0)
    chosen = Election(sources, destination).elect("request")
    busy = [name for name, selection in chosen.items() if selection != ()]
    assert [name in busy for name in ("p0", "p1")].count(True) == 1
    assert [name in busy for name in ("p2", "p3")].count(True) == 1
    for name in busy:
        plan = compile_plan(sources[name], destination, selection=chosen[name])
        head = int(name[1]) // 2
        assert lists(plan.fragments([3], [1], 0, 2)) == (
            [SOURCE + 4096 * int(name[1]) + 3 * 32],
            [DESTINATION + 64 + 32 * head],
            [32],
        )


def test_one_rank_of_two_heads_serves_four_replicas() -> None:
    source = grouped_query_rank(SOURCE, 2, 1, 0)
    for rank in range(4):
        destination = grouped_query_rank(DESTINATION, 2, 4, rank)
        found = compile_plan(source, destination).fragments([2], [0], 0, 2)
        assert lists(found) == ([SOURCE + 128 + 32 * (rank // 2)], [DESTINATION], [32])


def test_replicated_latents_come_from_one_elected_sender() -> None:
    sources = {f"p{rank}": layout(latent_pool(SOURCE << rank, [0, 1])) for rank in range(4)}
    destination = layout(latent_pool(DESTINATION << 6, [0, 1]))
    chosen = Election(sources, destination).elect("request")
    assert sorted(map(repr, chosen.values())) == ["()", "()", "()", "None"]
    blocks = [5, 1, 2]
    proof = verify(
        {name: Party(held, blocks) for name, held in sources.items()},
        {"d": Party(destination, [0, 4, 6])},
        Request(0, 12, "request"),
    )
    assert (proof.pairs, proof.fragments, proof.nbytes) == (1, 3, 3 * 512)


def test_suffix_lists_address_the_blocks_from_the_first_position_on() -> None:
    source = layout(latent_pool(SOURCE, [0]))
    destination = layout(latent_pool(DESTINATION, [0]))
    found = compile_plan(source, destination).fragments([6, 3], [1, 5], 9, 16)
    assert lists(found) == (
        # Position 9 is the second row of the third block: three rows of 64 bytes, then a block.
        [SOURCE + 6 * 256 + 64, SOURCE + 6 * 256 + 128, SOURCE + 6 * 256 + 192, SOURCE + 3 * 256],
        [
            DESTINATION + 256 + 64,
            DESTINATION + 256 + 128,
            DESTINATION + 256 + 192,
            DESTINATION + 5 * 256,
        ],
        [64, 64, 64, 256],
    )
    assert lists(found.merged()) == (
        [SOURCE + 6 * 256 + 64, SOURCE + 3 * 256],
        [DESTINATION + 256 + 64, DESTINATION + 5 * 256],
        [192, 256],
    )


@pytest.mark.parametrize("rank", range(3))
def test_context_parallel_ranks_take_every_third_block(rank: int) -> None:
    source = layout(latent_pool(SOURCE, [0]))
    destination = CacheLayout(latent_pool(DESTINATION, [0]), ContextShard(rank, 3, interleave=4))
    blocks = [7, 0, 4, 2, 6, 1]
    found = compile_plan(source, destination).fragments(blocks, [3, 5], 0, 24)
    assert lists(found) == (
        [SOURCE + 256 * block for block in blocks[rank::3]],
        [DESTINATION + 768, DESTINATION + 1280],
        [256, 256],
    )


def test_empty_blocks_are_skipped_on_both_sides_together() -> None:
    source = layout(latent_pool(SOURCE, [0]))
    destination = layout(latent_pool(DESTINATION, [0]))
    found = compile_plan(source, destination).fragments([6, 3, 1], [NO_BLOCK, 5, 0], 0, 12)
    assert lists(found) == (
        [SOURCE + 3 * 256, SOURCE + 256],
        [DESTINATION + 5 * 256, DESTINATION],
        [256, 256],
    )


def test_rows_of_24_bytes_use_accesses_of_8() -> None:
    rows = [
        layout(declare(memory(base, (4, 1, 24), "uint8"), "block token bytes", layers=0, names="x"))
        for base in (SOURCE, DESTINATION)
    ]
    plan = compile_plan(*rows)
    assert plan.classes[0].source_widths == plan.classes[0].destination_widths == (8, 8)
    assert lists(plan.fragments([2, 0], [0, 3], 0, 2)) == (
        [SOURCE + 48, SOURCE],
        [DESTINATION, DESTINATION + 72],
        [24, 24],
    )
