"""Plans of known shapes: how many fragments, how long, merged how far, refused why."""

import numpy as np
import pytest

from kvpack.columns import Row
from kvpack.errors import CoverageError, IncompatibleLayoutsError
from kvpack.layout import CacheLayout, CacheTensor, ContextShard, Memory, Shard, declare
from kvpack.plan import Slice, check_layouts, compile_plan


def memory(address: int, shape: tuple[int, ...], dtype: str = "float16") -> Memory:
    """Contiguous memory that nobody reads."""
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return Memory(address, shape, tuple(strides), dtype)


def pool(
    address: int,
    *,
    layers: int = 2,
    heads: Shard = Shard(0, 4, 4),  # noqa: B008 - frozen
    dims: str = "layer kv block head token dim",
    tokens: int = 16,
    dim: int = 64,
    blocks: int = 8,
    dtype: str = "float16",
    first_layer: int = 0,
    group: int = 0,
) -> tuple[CacheTensor, ...]:
    """K and V of some layers in one pool."""
    sizes = {
        "layer": layers,
        "kv": 2,
        "block": blocks,
        "head": heads.count,
        "token": tokens,
        "dim": dim,
    }
    shape = tuple(sizes[name] for name in dims.split())
    return declare(
        memory(address, shape, dtype),
        dims,
        layers=range(first_layer, first_layer + layers),
        names=("k", "v"),
        heads=heads,
        group=group,
    )


def test_qwen3_235b_from_four_ranks_to_data_parallel_is_48128_fragments_a_rank() -> None:
    shape = {"layers": 94, "dim": 128, "tokens": 32, "dtype": "float8_e4m3fn", "blocks": 512}
    source = CacheLayout(pool(1 << 40, heads=Shard(2, 1, 4), **shape))  # type: ignore[arg-type]
    destination = CacheLayout(pool(1 << 44, heads=Shard(0, 4, 4), **shape))  # type: ignore[arg-type]
    ids = np.random.default_rng(0).permutation(512)[:256]
    plan = compile_plan(source, destination)
    found = plan.fragments(ids, ids[::-1], 0, 8192)
    assert len(found.nbytes) == 94 * 2 * 256 == 48_128
    assert set(found.nbytes.tolist()) == {4096}
    assert plan.nbytes(0, 8192) == 197_132_288
    assert plan.wire(0, 8192).fragments == 48_128


def test_deepseek_r1_in_a_block_major_pool_is_one_fragment_a_block() -> None:
    layouts = [
        CacheLayout(
            declare(
                memory(base, (512, 61, 32, 576), "float8_e4m3fn"),
                "block layer token dim",
                layers=range(61),
                names="kv",
            )
        )
        for base in (1 << 40, 1 << 44)
    ]
    plan = compile_plan(*layouts)
    ids = np.random.default_rng(0).permutation(512)[:256]
    found = plan.fragments(ids, ids[::-1], 0, 8192)
    assert len(plan.lanes) == 1
    assert found.nbytes.tolist() == [1_124_352] * 256
    assert int(found.nbytes.sum()) == 287_834_112


def test_neighbouring_blocks_of_both_lists_merge_into_one_piece() -> None:
    source, destination = CacheLayout(pool(1 << 20)), CacheLayout(pool(1 << 24))
    plan = compile_plan(source, destination)
    found = plan.fragments([3, 4, 5, 0], [1, 2, 3, 7], 0, 64)
    assert len(found.nbytes) == 2 * 2 * 4
    merged = found.merged()
    block = 4 * 16 * 64 * 2
    assert merged.nbytes.tolist() == [3 * block, block] * 4
    assert merged.nbytes.sum() == found.nbytes.sum()
    assert merged.merged().nbytes.tolist() == merged.nbytes.tolist()


def test_merging_nothing_is_nothing() -> None:
    plan = compile_plan(CacheLayout(pool(1 << 20)), CacheLayout(pool(1 << 24, first_layer=9)))
    assert plan.lanes == ()
    assert len(plan.fragments([0], [0], 0, 16).merged().nbytes) == 0


def test_blocks_that_are_neighbours_on_one_side_alone_do_not_merge() -> None:
    plan = compile_plan(CacheLayout(pool(1 << 20)), CacheLayout(pool(1 << 24)))
    found = plan.fragments([3, 4, 5, 6], [1, 3, 5, 7], 0, 64)
    assert found.merged().nbytes.tolist() == found.nbytes.tolist()


def test_streaming_layers_keeps_every_lane_within_a_layer() -> None:
    dims = "block layer kv head token dim"
    source, destination = (
        CacheLayout(pool(1 << 20, dims=dims)),
        CacheLayout(pool(1 << 24, dims=dims)),
    )
    whole = compile_plan(source, destination)
    streamed = compile_plan(source, destination, stream_layers=True)
    assert [lane.layers for lane in whole.lanes] == [(0, 1)]
    assert [lane.layers for lane in streamed.lanes] == [(0,), (1,)]
    assert all(lane.names == ("k", "v") for lane in streamed.lanes)
    assert len(whole.fragments([0], [0], 0, 16).nbytes) == 1
    assert len(streamed.fragments([0], [0], 0, 16).nbytes) == 2
    assert whole.nbytes(0, 16) == streamed.nbytes(0, 16)


def test_layers_of_a_lane_class_are_in_ascending_order() -> None:
    source = CacheLayout(pool(1 << 20, layers=12))
    destination = CacheLayout(pool(1 << 24, layers=12, dims="layer block kv token head dim"))
    plan = compile_plan(source, destination, stream_layers=True)
    layers = [lane.layers[0] for lane in plan.lanes]
    assert layers == sorted(layers)
    assert len(plan.classes) == 1


def test_layers_behind_a_gap_still_merge() -> None:
    dims, shape = "block layer token dim", (8, 5, 4, 32)
    source = CacheLayout(declare(memory(1 << 20, shape), dims, layers=[0, 7, 1, 2, 3], names="kv"))
    destination = CacheLayout(
        declare(memory(1 << 24, shape), dims, layers=[0, 8, 1, 2, 3], names="kv")
    )
    plan = compile_plan(source, destination)
    assert [lane.layers for lane in plan.lanes] == [(0,), (1, 2, 3)]
    assert plan.fragments([2], [3], 0, 4).nbytes.tolist() == [256, 768]


def test_more_axes_than_levels_are_cut_into_lanes() -> None:
    # Kv, token, head and two inner axes, none of which is contiguous with its neighbour.
    source = CacheLayout(
        declare(
            Memory(1 << 20, (4, 2, 3, 5, 7, 2), (4096, 2048, 640, 120, 16, 1), "uint16"),
            "block kv token head hi lo",
            layers=0,
            names=("k", "v"),
            heads=Shard(0, 5, 5),
        )
    )
    destination = CacheLayout(
        declare(
            Memory(1 << 24, (4, 2, 5, 3, 7, 2), (4096, 2048, 400, 120, 16, 1), "uint16"),
            "block kv head token hi lo",
            layers=0,
            names=("k", "v"),
            heads=Shard(0, 5, 5),
        )
    )
    plan = compile_plan(source, destination)
    assert len(plan.lanes) > 1
    found = plan.fragments([1], [2], 0, 3)
    assert len(found.nbytes) == 2 * 3 * 5 * 7
    assert len(set(found.destination.tolist())) == len(found.nbytes)
    for source_address, address in zip(found.source, found.destination, strict=True):
        kv, rest = divmod(int(source_address) - (1 << 20) - 8192, 4096)
        token, rest = divmod(rest, 1280)
        head, rest = divmod(rest, 240)
        assert address == (1 << 24) + 2 * 8192 + kv * 4096 + head * 800 + token * 240 + rest


def test_tables_are_read_only() -> None:
    plan = compile_plan(CacheLayout(pool(1 << 20)), CacheLayout(pool(1 << 24)))
    table = plan.table("source")
    assert table.shape == (2 * len(plan.lanes), len(Row))
    assert table.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


def test_both_sides_compile_the_same_plan_from_what_travelled() -> None:
    dims = "block token head dim"
    source = CacheLayout(pool(1 << 20, heads=Shard(1, 2, 4)), ContextShard(0, 2, 8))
    destination = CacheLayout(
        [
            tensor
            for i, name in enumerate(("v", "k"))
            for tensor in declare(
                memory((1 << 24) + (i << 22), (8, 16, 4, 64)),
                dims,
                layers=1,
                names=name,
                heads=Shard(0, 4, 4),
            )
        ]
    )
    ours = compile_plan(source, destination)
    theirs = compile_plan(
        CacheLayout.decode(source.encode()), CacheLayout.decode(destination.encode())
    )
    assert ours.lanes == theirs.lanes
    assert ours.classes == theirs.classes
    assert (ours.table("destination") == theirs.table("destination")).all()


def test_a_selection_moves_what_it_names() -> None:
    source, destination = CacheLayout(pool(1 << 20)), CacheLayout(pool(1 << 24))
    plan = compile_plan(source, destination, selection=(Slice("k", 1, 2, 0, 4),))
    assert [(lane.layers, lane.names) for lane in plan.lanes] == [((1,), ("k",))]
    assert compile_plan(source, destination, selection=()).lanes == ()


@pytest.mark.parametrize(
    "part", [Slice("k", 0, 2, 0, 5), Slice("k", 2, 3, 0, 4), Slice("latent", 0, 2, 0, 4)]
)
def test_a_selection_of_what_is_not_in_common_is_refused(part: Slice) -> None:
    source, destination = CacheLayout(pool(1 << 20)), CacheLayout(pool(1 << 24))
    with pytest.raises(CoverageError, match=f"heads .* of '{part.name}' in layers"):
        compile_plan(source, destination, selection=(part,))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype = float16, the destination bfloat16"),
        ({"dim": 128}, "elements a token and head = 64, the destination 128"),
        ({"heads": Shard(0, 4, 8)}, "heads in the model = 4, the destination 8"),
    ],
)
def test_layouts_that_disagree_are_refused(other: dict[str, object], said: str) -> None:
    source, destination = CacheLayout(pool(1 << 20)), CacheLayout(pool(1 << 24, **other))  # type: ignore[arg-type]
    for refuse in (check_layouts, compile_plan):
        with pytest.raises(IncompatibleLayoutsError, match="cache tensor 'k' of layer 0") as caught:
            refuse(source, destination)
        assert said in str(caught.value)
        assert "both sides must serve the same model" in str(caught.value)


def test_inner_axes_without_a_common_subdivision_are_refused() -> None:
    def cut(address: int, hi: int, lo: int) -> CacheLayout:
        shape = memory(address, (4, 8, hi, lo))
        return CacheLayout(declare(shape, "block token hi lo", layers=0, names="kv"))

    check_layouts(cut(1 << 20, 6, 4), cut(1 << 24, 3, 8))
    for refuse in (check_layouts, compile_plan):
        with pytest.raises(IncompatibleLayoutsError, match="no common subdivision") as caught:
            refuse(cut(1 << 20, 6, 4), cut(1 << 24, 4, 6))
        assert "inner axes (6, 4) of the source and (4, 6) of the destination" in str(caught.value)


def test_layouts_that_share_nothing_are_compatible() -> None:
    source = CacheLayout(pool(1 << 20, dtype="uint8"))
    destination = CacheLayout(pool(1 << 24, first_layer=2))
    check_layouts(source, destination)
    assert compile_plan(source, destination).explain().startswith("Nothing moves")


def test_context_interleaves_that_do_not_divide_each_other_still_pair() -> None:
    layouts = [
        CacheLayout(pool(base, tokens=2), ContextShard(0, 2, interleave))
        for base, interleave in ((1 << 20, 2), (1 << 24, 3))
    ]
    check_layouts(*layouts)
    found = compile_plan(*layouts).fragments([0, 1, 2], [0, 1, 2], 0, 12)
    # Positions 0, 1, 4, 5, 8, 9 here, 0, 1, 2, 6, 7, 8 there: three in common.
    assert int(found.nbytes.sum()) == 3 * layouts[0].token_bytes


def test_explain_says_what_moves_and_how() -> None:
    source = CacheLayout(pool(1 << 20, heads=Shard(2, 2, 4), tokens=32))
    destination = CacheLayout(pool(1 << 24, dims="layer block kv token head dim", tokens=48))
    text = compile_plan(source, destination, stream_layers=True).explain(0, 8192)
    assert text.splitlines()[0] == (
        f"Positions [0, 8192): {8192 * 2 * 2 * 2 * 64 * 2:,} bytes in 4 lanes, layer by layer."
    )
    assert "k, v of layers 0-1, heads 2-3" in text
    assert "blocks of 32 tokens to blocks of 48; units of 16 positions" in text
    assert "fragment(s) of 128 bytes" in text
    assert "accesses of 16 bytes to gather and 16 to scatter" in text


def test_explain_of_an_equal_pool_is_one_fragment_a_unit() -> None:
    dims = "block layer kv head token dim"
    plan = compile_plan(
        CacheLayout(pool(1 << 20, dims=dims)), CacheLayout(pool(1 << 24, dims=dims))
    )
    assert "units of 16 positions, each 1 fragment(s) of 32,768 bytes" in plan.explain()


def test_explain_names_residues_under_context_parallelism() -> None:
    source = CacheLayout(pool(1 << 20), ContextShard(1, 2, 16))
    text = compile_plan(source, CacheLayout(pool(1 << 24))).explain()
    assert "every 32 positions from 16" in text


def test_context_interleaves_that_need_too_many_lanes_are_refused() -> None:
    source = CacheLayout(pool(1 << 20), ContextShard(0, 2, 1 << 20))
    destination = CacheLayout(pool(1 << 24))
    for refuse in (check_layouts, compile_plan):
        with pytest.raises(IncompatibleLayoutsError, match="131072 stretches of positions, more"):
            refuse(source, destination)
