"""Declared tensors: every address is the one that NumPy's own indexing gives."""

import itertools
import random
import re

import numpy as np
import pytest
import torch
from support.models import HEADED, HEADLESS, Kind, Model
from support.topology import axes_of, logical_views, make_rank

from kvpack.errors import LayoutError
from kvpack.layout import CacheTensor, Memory, Shard, declare
from kvpack.shards import WHOLE_CONTEXT


def address_of(view: np.ndarray, index: tuple[int, ...]) -> int:
    """Where NumPy finds an element."""
    element = view[tuple(slice(i, i + 1) for i in index)]
    return int(element.__array_interface__["data"][0])


def declared_address(
    tensor: CacheTensor, block: int, token: int, head: int, inner: tuple[int, ...]
) -> int:
    """Where the declaration says that it is."""
    return (
        tensor.address
        + block * tensor.block_stride
        + token * tensor.token_stride
        + head * tensor.head_stride
        + sum(i * stride for i, (_, stride) in zip(inner, tensor.inner, strict=True))
    )


@pytest.mark.parametrize("dims", [*HEADED, *HEADLESS])
def test_declared_addresses_are_those_of_numpy(dims: str) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        headed = "head" in dims
        names = ("k", "v") if headed else ("kv",)
        kind = Kind(
            (3, 4, 9), names, 5 if headed else 0, rng.choice((4, 6)), rng.choice((1, 2, 4, 8))
        )
        shard = Shard(1, 3, 5) if headed else Shard()
        rank = make_rank(
            rng, Model.of([kind], 40), "rank", layers=kind.layers, heads=[shard], first=0, last=40,
            context=WHOLE_CONTEXT, dims=dims,
        )  # fmt: skip
        assert [(t.layer, t.name) for t in rank.layout.tensors] == [
            (layer, name) for layer in kind.layers for name in names
        ]
        for tensor in rank.layout.tensors:
            view = rank.views[tensor.layer, tensor.name]
            assert view.shape[:3] == (tensor.num_blocks, tensor.block_tokens, tensor.heads.count)
            assert view.shape[3:] == tuple(count for count, _ in tensor.inner)
            for _ in range(10):
                index = tuple(rng.randrange(n) for n in view.shape)
                assert declared_address(tensor, *index[:3], index[3:]) == address_of(view, index)


def test_torch_tensors_are_declared_as_they_lie() -> None:
    pool = torch.zeros(2, 6, 4, 16, 8, dtype=torch.bfloat16).transpose(2, 3)
    tensors = declare(
        pool, "kv block token head dim", layers=7, names=("k", "v"), heads=Shard(4, 4, 8)
    )
    assert [t.name for t in tensors] == ["k", "v"]
    for j, tensor in enumerate(tensors):
        assert (tensor.layer, tensor.dtype, tensor.item_bytes, tensor.device) == (
            7, "bfloat16", 2, "cpu",
        )  # fmt: skip
        for block, token, head, dim in itertools.product((0, 5), (0, 15), (0, 3), (0, 7)):
            wanted = pool[j, block, token, head, dim].data_ptr()
            assert declared_address(tensor, block, token, head, (dim,)) == wanted


def test_a_slice_of_a_tensor_begins_where_the_slice_does() -> None:
    whole = torch.zeros(10, 16, 4, 8)
    part = whole[3:, :, 1:3]
    (tensor,) = declare(part, "block token head dim", layers=0, names="k", heads=Shard(0, 2, 2))
    assert tensor.address == whole[3, 0, 1].data_ptr()
    assert (tensor.num_blocks, tensor.block_stride) == (7, 16 * 4 * 8 * 4)


def test_memory_is_declared_without_being_touched() -> None:
    memory = Memory(
        1 << 44, (2, 64, 16, 8, 128), (1 << 20, 16384, 1024, 128, 1), "float16", "cuda:3"
    )
    k, v = declare(
        memory, "kv block token head dim", layers=5, names=("k", "v"), heads=Shard(0, 8, 8)
    )
    assert (k.address, v.address) == (1 << 44, (1 << 44) + (1 << 21))
    assert (k.device, k.block_stride, k.token_stride, k.head_stride) == ("cuda:3", 32768, 2048, 256)
    assert k.inner == ((128, 2),)
    assert k.token_bytes == 2048


def test_a_token_pool_is_cut_into_blocks_as_told() -> None:
    pool = np.zeros((96, 2, 4), np.float32)
    (tensor,) = declare(
        pool, "(block token) head dim", layers=0, names="k", heads=Shard(0, 2, 2), block_tokens=32
    )
    assert (tensor.num_blocks, tensor.block_tokens, tensor.block_stride) == (3, 32, 32 * 32)


@pytest.mark.parametrize(
    ("dtype", "item_bytes"),
    [
        (torch.float64, 8), (torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2),
        (torch.uint8, 1), (torch.int8, 1), (torch.bool, 1), (torch.int64, 8),
        (torch.float8_e4m3fn, 1), (torch.float8_e5m2, 1), (torch.float8_e8m0fnu, 1),
    ],
)  # fmt: skip
def test_dtypes_of_caches_are_known(dtype: torch.dtype, item_bytes: int) -> None:
    (tensor,) = declare(torch.zeros(4, 2, 8, dtype=dtype), "block token dim", layers=0, names="kv")
    assert tensor.item_bytes == item_bytes
    assert tensor.dtype == str(dtype).removeprefix("torch.")


def test_one_token_one_head_one_element_is_a_cache_too() -> None:
    (tensor,) = declare(
        np.zeros((8, 1, 1, 1), np.uint8), "block token head dim", layers=0, names="k", heads=Shard()
    )
    assert tensor.token_bytes == 1


@pytest.mark.parametrize(
    ("array", "dims", "options", "said"),
    [
        (np.zeros((4, 8)), "block dim", {}, "dims string 'block dim' has no token axis"),
        (np.zeros((4, 8)), "token dim", {}, "dims string 'token dim' has no block axis"),
        (
            np.zeros((4, 2, 8)),
            "block token dim",
            {"names": ("k", "v")},
            "2 kv entries ('k', 'v') but no kv axis in 'block token dim'",
        ),
        (
            np.zeros((4, 2, 8)),
            "block token dim",
            {"layers": (0, 1, 2)},
            "3 layer entries (0, 1, 2) but no layer axis",
        ),
        (
            np.zeros((4, 2, 3, 8)),
            "block token head dim",
            {},
            "give heads=Shard(...) exactly where there is a head axis",
        ),
        (np.zeros((4, 2, 8)), "block token dim", {"heads": Shard()}, "and heads=Shard("),
        (
            np.zeros((4, 2, 3, 8)),
            "block token head dim",
            {"heads": Shard(0, 2, 2)},
            "has size 3, which does not agree with the declared head=2",
        ),
        (
            np.zeros((4, 2, 3, 8)),
            "block token kv dim",
            {"names": ("k", "v")},
            "has size 3, which does not agree with the declared kv=2",
        ),
        (
            np.zeros((4, 2, 8)),
            "block token dim",
            {"block_tokens": 16},
            "axis 1 of 'block token dim' has size 2, which does not agree with the declared",
        ),
        (np.zeros((30, 8)), "(block token) dim", {"block_tokens": 16}, "declared token=16"),
        (np.zeros((30, 8)), "(block token) dim", {}, "block_tokens=..."),
        (
            np.zeros((4, 2, 8), np.complex64),
            "block token dim",
            {},
            "dtype 'complex64' is not supported; declare rows of other formats as uint8",
        ),
        (np.zeros((4, 2, 8), ">f4"), "block token dim", {}, "dtype '>f4' is not supported"),
        (
            np.zeros((4, 2, 8))[:, :, ::-1],
            "block token dim",
            {},
            "strides not negative (make a contiguous copy)",
        ),
        (np.zeros((0, 2, 8)), "block token dim", {}, "axis block has size 0"),
        (np.zeros((4, 2, 0)), "block token dim", {}, "axis inner 0 has size 0"),
        (
            np.zeros((4, 2, 3, 16))[..., ::2],
            "block token head dim",
            {"heads": Shard(0, 3, 3)},
            "cache tensor 'k' of layer 0: no axis of unit stride inside a block; kvpack moves runs "
            "of bytes, so one of token, head and inner axes must be contiguous",
        ),
        (
            np.broadcast_to(np.zeros((1, 2, 8)), (4, 2, 8)),
            "block token dim",
            {},
            "axis block steps by 0 bytes over elements that cover 8; its entries overlap",
        ),
        (
            torch.zeros(4, 2, 1, 8).expand(4, 2, 3, 8),
            "block token head dim",
            {"heads": Shard(0, 3, 3)},
            "axis head steps by 0 bytes over elements that cover 4",
        ),
        (
            np.lib.stride_tricks.as_strided(np.zeros(99), (4, 4, 8), (64, 32, 8)),
            "block token dim",
            {},
            "its entries overlap in memory",
        ),
        (
            np.zeros((4, 2), [("a", "u1"), ("x", "<f4")])["x"][:, :, None],
            "block token dim",
            {},
            "are not multiples of the element size 4",
        ),
        (
            [[1.0]],
            "block token",
            {},
            "cannot declare a list; pass a torch tensor, a NumPy array or",
        ),
        (Memory(0, (4, 2, 8), (16, 8, 1), "uint8"), "block token dim", {}, "address 0"),
        (Memory(64, (4, 2, 8), (16, 8, 1), "uint8"), "block token dim", {"layers": -1}, "negative"),
        (Memory(64, (4, 2, 8), (16, 8, 1), "uint8"), "block token dim", {"group": -1}, "negative"),
        (
            Memory((1 << 63) - 50, (4, 2, 8), (16, 8, 1), "uint8"),
            "block token dim",
            {"block_tokens": 2},
            "reach beyond byte 9223372036854775807 of memory",
        ),
    ],
)
def test_what_cannot_be_addressed_is_refused(
    array: object, dims: str, options: dict[str, object], said: str
) -> None:
    arguments = {"layers": 0, "names": "k", **options}
    with pytest.raises(LayoutError, match=re.escape(said)):
        declare(array, dims, **arguments)  # type: ignore[arg-type]


def test_the_block_axis_alone_need_not_hold_the_unit_stride() -> None:
    with pytest.raises(LayoutError, match="no axis of unit stride inside a block"):
        declare(np.zeros((2, 8, 4)), "token dim block", layers=0, names="kv")


def test_logical_views_agree_with_einops_by_hand() -> None:
    array = np.arange(4 * 3 * 10).reshape(4, 3, 10)
    sizes = {"block": 4, "token": 3, "kv": 2, "dim": 5}
    views = logical_views(array, "block token (kv dim)", sizes, (0,), ("k", "v"))
    assert axes_of("block token (kv dim)") == [["block"], ["token"], ["kv", "dim"]]
    assert (views[0, "v"][:, :, 0] == array[:, :, 5:]).all()
