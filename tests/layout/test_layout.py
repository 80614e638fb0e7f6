"""Cache layouts: shards, groups, memory of their own, and what travels to a peer."""

import random
import re

import msgspec
import numpy as np
import pytest
import torch
from support.topology import random_topology

from kvpack.errors import LayoutError
from kvpack.layout import (
    CacheLayout,
    CacheTensor,
    ContextShard,
    LayerGroup,
    Memory,
    Shard,
    declare,
)


def latents(
    address: int = 1 << 20,
    *,
    layer: int = 0,
    name: str = "kv",
    group: int = 0,
    tokens: int = 4,
    blocks: int = 8,
    device: str = "cpu",
    dim: int = 16,
) -> tuple[CacheTensor, ...]:
    shape = (blocks, tokens, dim)
    memory = Memory(address, shape, (tokens * dim, dim, 1), "float16", device)
    return declare(memory, "block token dim", layers=layer, names=name, group=group)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 8, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 16, 24])
def test_balanced_shards_cover_the_heads_and_number_their_replicas(total: int, ranks: int) -> None:
    shards = [Shard.balanced(total, ranks, rank) for rank in range(ranks)]
    assert {head for s in shards for head in range(s.start, s.stop)} == set(range(total))
    assert all(s.total == total for s in shards)
    if ranks <= total:
        assert sum(s.count for s in shards) == total
        assert max(s.count for s in shards) - min(s.count for s in shards) <= 1
        assert all((s.replica, s.replicas) == (0, 1) for s in shards)
        return
    assert [s.start for s in shards] == sorted(s.start for s in shards)
    copies = {head: [s for s in shards if s.start == head] for head in range(total)}
    for held in copies.values():
        assert [s.replica for s in held] == list(range(len(held)))
        assert all((s.count, s.replicas) == (1, len(held)) for s in held)
    lengths = [len(held) for held in copies.values()]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shard(0, 0, 4), "heads [0, 0) does not lie within the 4 heads"),
        (lambda: Shard(3, 2, 4), "shard of heads [3, 5) does not lie within the 4 heads"),
        (lambda: Shard(-1, 2, 4), "shard of heads [-1, 1)"),
        (lambda: Shard(0, 1, 1, 2, 2), "replica 2 is outside the 2 replicas of the shard"),
        (lambda: Shard.balanced(8, 4, 4), "rank 4 of 4 cannot hold a share of 8 heads"),
        (lambda: Shard.balanced(0, 4, 0), "rank 0 of 4 cannot hold a share of 0 heads"),
        (lambda: ContextShard(2, 2), "context shard rank 2 of 2 with interleave 1 is not valid"),
        (lambda: ContextShard(0, 2, 0), "with interleave 0 is not valid"),
    ],
)
def test_impossible_shards_are_refused(make: object, said: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(said)):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("interleave", [1, 3, 16])
def test_context_shards_deal_out_every_position_once(ranks: int, interleave: int) -> None:
    shards = [ContextShard(rank, ranks, interleave) for rank in range(ranks)]
    owner = [p // interleave % ranks for p in range(200)]
    for position in range(200):
        counts = [shard.tokens_before(position) for shard in shards]
        assert counts == [owner[:position].count(rank) for rank in range(ranks)]


def test_tensors_stand_in_canonical_order_however_they_were_given() -> None:
    tensors = [
        *latents(1 << 20, layer=3),
        *latents(2 << 20, layer=1, group=1, tokens=8),
        *latents(3 << 20, layer=0),
        *latents(4 << 20, layer=0, name="index_k"),
    ]
    layout = CacheLayout(tensors)
    assert [(t.group, t.layer, t.name) for t in layout.tensors] == [
        (0, 0, "index_k"), (0, 0, "kv"), (0, 3, "kv"), (1, 1, "kv"),
    ]  # fmt: skip
    assert layout == CacheLayout(tensors[::-1])
    assert layout.groups == (LayerGroup(4, 8), LayerGroup(8, 8))
    assert layout.token_bytes == 4 * 32
    assert layout.device == "cpu"


def test_a_group_has_the_blocks_that_all_its_tensors_have() -> None:
    layout = CacheLayout([*latents(1 << 20, blocks=8), *latents(2 << 20, layer=1, blocks=5)])
    assert layout.groups == (LayerGroup(4, 5),)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([], "a cache layout needs at least one cache tensor"),
        (
            [*latents(1 << 20, layer=3), *latents(2 << 20, layer=3)],
            "cache tensor 'kv' of layer 3 is declared twice",
        ),
        (
            [*latents(1 << 20), *latents(2 << 20, group=1)],
            "cache tensor 'kv' of layer 0 is declared twice",
        ),
        (
            [*latents(1 << 20), *latents(2 << 20, layer=1, device="cuda:0")],
            "cache tensors lie on several devices: cpu, cuda:0",
        ),
        (
            [*latents(1 << 20), *latents(2 << 20, layer=1, group=2)],
            "layer group 1 has no cache tensor; number the groups from 0 on",
        ),
        (
            [*latents(1 << 20), *latents(2 << 20, layer=1, tokens=8)],
            "cache tensors of layer group 0 have blocks of [4, 8] tokens; tensors that share a "
            "block list share its block size",
        ),
        (
            [*latents(1 << 20), *latents((1 << 20) + 64, layer=1)],
            "layer group 0: cache tensor 'kv' of layer 0 and cache tensor 'kv' of layer 1 overlap "
            "in memory; tensors of one layer group need bytes of their own",
        ),
        ([*latents(1 << 20), *latents(1 << 20, layer=1)], "overlap in memory"),
        (
            [*latents(1 << 20), *latents((1 << 20) + 8 * 128 - 2, layer=1)],
            "overlap in memory",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused(tensors: list[CacheTensor], said: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(said)):
        CacheLayout(tensors)


def test_a_group_number_below_zero_is_refused() -> None:
    with pytest.raises(LayoutError, match="must not be negative"):
        latents(group=-1)


def test_tensors_side_by_side_do_not_overlap() -> None:
    CacheLayout([*latents(1 << 20), *latents((1 << 20) + 8 * 128, layer=1)])


def test_layer_groups_may_share_their_memory() -> None:
    layout = CacheLayout([*latents(1 << 20), *latents(1 << 20, layer=1, group=1)])
    assert len(layout.groups) == 2


@pytest.mark.parametrize(
    "dims",
    [
        "block layer kv head token dim",
        "block layer kv token head dim",
        "block token layer kv head dim",
        "token block layer kv head dim",
        "block token head dim layer kv",
    ],
)
def test_tensors_that_interleave_in_one_pool_do_not_overlap(dims: str) -> None:
    sizes = {"block": 6, "layer": 3, "kv": 2, "token": 4, "head": 2, "dim": 8}
    if dims.endswith("kv"):
        sizes["kv"] = sizes["layer"] = 1
    pool = np.zeros([sizes[name] for name in dims.split()], np.float16)
    layout = CacheLayout(
        declare(
            pool,
            dims,
            layers=range(sizes["layer"]),
            names=("k", "v")[: sizes["kv"]],
            heads=Shard(0, 2, 2),
        )
    )
    assert len(layout.tensors) == sizes["layer"] * sizes["kv"]


def test_a_pool_of_one_block_interleaves_whatever_its_stride_says() -> None:
    pool = np.zeros((4, 2, 2, 8), np.float16)[None]
    assert pool.strides[0] == 0
    CacheLayout(
        declare(pool, "block token kv head dim", layers=0, names=("k", "v"), heads=Shard(0, 2, 2))
    )


def test_rows_of_two_block_strides_interleave_in_one_allocation() -> None:
    # One slab of 64-byte slots: even slots hold a tensor of many short blocks, odd ones another.
    ours = Memory(1 << 20, (32, 1, 32), (64, 32, 1), "float16")
    theirs = Memory((1 << 20) + 64, (8, 1, 32), (256, 32, 1), "float16")
    layout = CacheLayout(
        [
            *declare(ours, "block token dim", layers=0, names="kv"),
            *declare(theirs, "block token dim", layers=1, names="kv"),
        ]
    )
    assert layout.groups == (LayerGroup(1, 8),)
    with pytest.raises(LayoutError, match="overlap in memory"):
        CacheLayout(
            [
                *declare(ours, "block token dim", layers=0, names="kv"),
                *declare(
                    Memory((1 << 20) + 62, (8, 1, 32), (256, 32, 1), "float16"),
                    "block token dim",
                    layers=1,
                    names="kv",
                ),
            ]
        )


def test_values_laid_over_keys_are_refused() -> None:
    pool = torch.zeros(8, 16, 2, 32)
    k = declare(pool, "block token head dim", layers=0, names="k", heads=Shard(0, 2, 2))
    shifted = pool.view(-1)[32:].unfold(0, 16 * 2 * 32, 16 * 2 * 32).view(-1, 16, 2, 32)
    v = declare(shifted, "block token head dim", layers=0, names="v", heads=Shard(0, 2, 2))
    with pytest.raises(LayoutError, match="'k' of layer 0 and cache tensor 'v' of layer 0 overlap"):
        CacheLayout([*k, *v])


def test_one_shared_byte_among_random_interleaved_tensors_is_found() -> None:
    rng = random.Random(5)
    for _ in range(60):
        blocks, rows, row = rng.randint(1, 5), rng.randint(2, 6), rng.choice((4, 6, 16))
        block_stride = rows * row + rng.choice((0, 3))
        slots = rng.sample(range(rows), rows)
        tensors = [
            *(
                declare(
                    Memory(4096 + slot * row, (blocks, 1, row), (block_stride, row, 1), "uint8"),
                    "block token bytes",
                    layers=slot,
                    names="x",
                )
                for slot in slots
            )
        ]
        CacheLayout([t for some in tensors for t in some])
        moved = rng.choice(slots[1:]) if len(slots) > 1 else slots[0]
        nudge = rng.choice((-1, 1)) if 0 < moved < rows - 1 else (-1 if moved else 1)
        tensors.append(
            declare(
                Memory(
                    4096 + moved * row + nudge, (blocks, 1, row), (block_stride, row, 1), "uint8"
                ),
                "block token bytes",
                layers=rows,
                names="x",
            )
        )
        with pytest.raises(LayoutError, match="overlap in memory"):
            CacheLayout([t for some in tensors for t in some])


def test_a_pool_of_many_layers_and_a_million_tokens_is_checked_at_once() -> None:
    shape = (1 << 20, 1, 94, 2, 1, 128)
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    layout = CacheLayout(
        declare(
            Memory(1 << 30, shape, tuple(strides), "uint8"),
            "block token layer kv head dim",
            layers=range(94),
            names=("k", "v"),
            heads=Shard(0, 1, 4),
        )
    )
    assert len(layout.tensors) == 188


def test_interleaving_that_cannot_be_proved_disjoint_is_refused_without_much_memory() -> None:
    ours = Memory(1 << 30, (1 << 30, 1, 4), (64, 64, 1), "uint8")
    theirs = Memory((1 << 30) + 32, (1 << 29, 1, 4), (128, 64, 1), "uint8")
    with pytest.raises(LayoutError, match="too many to prove that they do not overlap"):
        CacheLayout(
            [
                *declare(ours, "block token bytes", layers=0, names="x"),
                *declare(theirs, "block token bytes", layers=1, names="x"),
            ]
        )


def test_a_layout_travels_whole() -> None:
    for seed in range(50):
        for rank in random_topology(seed).sources:
            data = rank.layout.encode()
            back = CacheLayout.decode(data)
            assert back == rank.layout
            assert isinstance(back.tensors, tuple)
            assert back.encode() == data


def test_a_layout_of_188_tensors_is_a_few_kilobytes() -> None:
    layout = CacheLayout([t for i in range(188) for t in latents((1 + i) << 32, layer=i)])
    assert len(layout.encode()) < 64 * 188


def test_garbage_is_not_a_layout() -> None:
    rng = random.Random(2)
    for data in (
        b"",
        b"\x00",
        b"garbage",
        b"\xff" * 100,
        rng.randbytes(500),
        msgspec.msgpack.encode({}),
    ):
        with pytest.raises(LayoutError, match=f"{len(data)} bytes are not a cache layout"):
            CacheLayout.decode(data)


def test_damaged_layouts_are_refused_or_valid_but_never_anything_else() -> None:
    rng = random.Random(4)
    layout = CacheLayout([*latents(1 << 20), *latents(2 << 20, layer=1)], ContextShard(1, 2, 4))
    good = layout.encode()
    refused = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5))):
            data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), 0xCF, 0xD3, 0xFF))
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        try:
            CacheLayout.decode(bytes(data))
        except LayoutError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", (1 << 64) - 1),
        ("address", (1 << 63) - 8),
        ("num_blocks", 1 << 60),
        ("block_stride", 1 << 62),
        ("block_tokens", 1 << 40),
        ("inner", ((1 << 32, 1), (1 << 32, 1))),
        ("token_stride", -2),
        ("item_bytes", 3),
        ("item_bytes", 8),
        ("layer", -1),
    ],
)
def test_numbers_that_no_memory_has_are_refused(field: str, value: object) -> None:
    plain = msgspec.to_builtins(CacheLayout(latents()))
    place = CacheTensor.__struct_fields__.index(field)
    tensor = list(plain["tensors"][0])
    tensor[place] = value
    data = msgspec.msgpack.encode({**plain, "tensors": [tensor]})
    with pytest.raises(LayoutError, match="not a cache layout"):
        CacheLayout.decode(data)
