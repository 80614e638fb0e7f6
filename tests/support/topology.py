"""Random ranks of a random model: caches of every supported layout, filled from logical tensors."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kvpack.blocks import touched_blocks
from kvpack.layout import CacheLayout, CacheTensor, ContextShard, Shard, declare

HEADED = (
    "kv block token head dim",
    "block kv token head dim",
    "block kv head token dim",
    "kv block head token dim",
    "block layer kv head token dim",
    "block layer kv token head dim",
    "layer kv block token head dim",
    "layer block kv head token dim",
    "block token head dim",
    "block head token dim",
    "layer block head token dim",
    "(block token) head dim",
    "block head token (kv dim)",
    "block token head (kv dim)",
    "block head dim token",
    "block head hi token lo",
)
HEADLESS = ("block token dim", "layer block token dim", "block layer token dim", "(block token) dim")
DTYPES = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


@dataclass(frozen=True)
class Model:
    """The logical tensors of one request: random bytes, and which axes they have."""

    layers: int
    heads: int
    dim: int
    item_bytes: int
    tokens: int
    names: tuple[str, ...]
    headed: bool
    values: dict[tuple[int, str], np.ndarray]

    @staticmethod
    def random(rng: random.Random, headed: bool | None = None) -> Model:
        headed = rng.random() < 0.8 if headed is None else headed
        names = ("k", "v") if headed else ("kv",)
        layers, heads = rng.randint(1, 4), rng.choice((1, 2, 3, 4, 6, 8)) if headed else 1
        dim, item = rng.choice((2, 4, 6, 8, 10, 16, 24)), rng.choice((1, 2, 4, 8))
        tokens = rng.randint(1, 150)
        noise = np.random.default_rng(rng.getrandbits(32))
        values = {
            (layer, name): noise.integers(
                0, 1 << (8 * item), (tokens, heads, dim), dtype=DTYPES[item]
            )
            for layer in range(layers)
            for name in names
        }
        return Model(layers, heads, dim, item, tokens, names, headed, values)


@dataclass
class Rank:
    """One rank's memory, its declaration and the block list of the request."""

    name: str
    layout: CacheLayout
    buffers: list[np.ndarray]
    views: dict[tuple[int, str], np.ndarray]
    """Per layer and name, a view of shape (block, token, head, dim)."""
    blocks: np.ndarray
    first: int
    last: int
    poison: list[np.ndarray] = field(default_factory=list)

    def fill(self, model: Model) -> None:
        """Write the request's logical values where the block list says."""
        for (layer, name), view in self.views.items():
            _place(self, view, model.values[layer, name], layer, name)

    def expected(self, model: Model) -> list[np.ndarray]:
        """What the buffers must hold after a transfer: poison, and the request's bytes."""
        kept = [buffer.copy() for buffer in self.buffers]
        for buffer, poison in zip(self.buffers, self.poison, strict=True):
            buffer[:] = poison
        self.fill(model)
        wanted = [buffer.copy() for buffer in self.buffers]
        for buffer, before in zip(self.buffers, kept, strict=True):
            buffer[:] = before
        return wanted


def _tensor(rank: Rank, layer: int, name: str) -> CacheTensor:
    return next(t for t in rank.layout.tensors if (t.layer, t.name) == (layer, name))


def _place(rank: Rank, view: np.ndarray, values: np.ndarray, layer: int, name: str) -> None:
    tensor = _tensor(rank, layer, name)
    tokens, shard = tensor.block_tokens, rank.layout.context
    start, _ = touched_blocks(rank.layout, tensor.group, rank.first, rank.last)
    held = [
        p for p in range(rank.first, rank.last) if p // shard.interleave % shard.ranks == shard.rank
    ]
    heads = slice(tensor.heads.start, tensor.heads.stop)
    for p in held:
        local = shard.tokens_before(p)
        block = rank.blocks[local // tokens - start]
        if block >= 0:
            view[block, local % tokens] = values[p, heads]


def make_rank(
    rng: random.Random,
    model: Model,
    name: str,
    *,
    layers: Iterable[int],
    heads: Shard,
    first: int,
    last: int,
    context: ContextShard | None = None,
    dims: str | None = None,
    block_tokens: int | None = None,
) -> Rank:
    """A rank with poisoned pools in a random (or the given) layout and a shuffled block list."""
    layers = tuple(layers)
    dims = dims or rng.choice(HEADED if model.headed else HEADLESS)
    tokens = block_tokens or rng.choice((1, 2, 3, 4, 8, 16, 32, 48))
    context = context or ContextShard()
    held = context.tokens_before(last) - context.tokens_before(first)
    num_blocks = held // tokens + rng.randint(2, 5)
    low = rng.choice([d for d in (1, 2, 4, 8) if model.dim % d == 0])
    has_kv = "kv" in dims.replace("(", " ").replace(")", " ").split()
    stacked_layers = "layer" in dims
    sizes = {
        "block": num_blocks,
        "token": tokens,
        "head": heads.count,
        "dim": model.dim,
        "hi": model.dim // low,
        "lo": low,
        "kv": len(model.names),
        "layer": len(layers),
    }
    tensors: list[CacheTensor] = []
    buffers: list[np.ndarray] = []
    views: dict[tuple[int, str], np.ndarray] = {}
    noise = np.random.default_rng(rng.getrandbits(32))
    for some_layers in [layers] if stacked_layers else [(layer,) for layer in layers]:
        for some_names in [model.names] if has_kv else [(n,) for n in model.names]:
            buffer, array = _pool(rng, noise, dims, sizes, DTYPES[model.item_bytes])
            buffers.append(buffer)
            tensors += declare(
                array,
                dims,
                layers=some_layers,
                names=some_names,
                heads=heads if "head" in dims else None,
                block_tokens=tokens if "(block token)" in dims else None,
            )
            views |= _views(array, dims, sizes, some_layers, some_names)
    ids = np.array(rng.sample(range(num_blocks), num_blocks), np.int32)
    layout = CacheLayout(tensors, context)
    start, stop = touched_blocks(layout, 0, first, last)
    rank = Rank(name, layout, buffers, views, ids[: stop - start], first, last)
    rank.poison = [buffer.copy() for buffer in buffers]
    return rank


def _pool(
    rng: random.Random,
    noise: np.random.Generator,
    dims: str,
    sizes: dict[str, int],
    dtype: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Random bytes, and inside them a tensor of the dims' shape: unaligned, sometimes padded."""
    item = np.dtype(dtype).itemsize
    shape, padded = [], []
    for axis in _groups(dims):
        length = int(np.prod([sizes[name] for name in axis]))
        shape.append(length)
        pads = len(axis) == 1 and (dims.endswith("dim") or axis[0] in ("block", "head"))
        padded.append(length + (rng.choice((0, 0, 0, 1, 2)) if pads else 0))
    offset = rng.choice((0, 0, 16, 1, 3)) * item
    buffer = noise.integers(0, 256, int(np.prod(padded)) * item + offset + 64, dtype=np.uint8)
    lead = -buffer.ctypes.data % 64 + offset
    buffer = np.concatenate([buffer, noise.integers(0, 256, 64, dtype=np.uint8)])
    lead = -buffer.ctypes.data % 64 + offset
    whole = buffer[lead : lead + int(np.prod(padded)) * item].view(dtype).reshape(padded)
    return buffer, whole[tuple(slice(0, n) for n in shape)]


def _groups(dims: str) -> list[list[str]]:
    out: list[list[str]] = []
    inside = False
    for word in dims.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            inside = True
            out.append([])
        elif word == ")":
            inside = False
        elif inside:
            out[-1].append(word)
        else:
            out.append([word])
    return out


def _views(
    array: np.ndarray,
    dims: str,
    sizes: dict[str, int],
    layers: tuple[int, ...],
    names: tuple[str, ...],
) -> dict[tuple[int, str], np.ndarray]:
    """Views of shape (block, token, head, dim), by NumPy's own reshape and transpose."""
    flat = [name for axis in _groups(dims) for name in axis]
    strides: list[int] = []
    for axis, stride in zip(_groups(dims), array.strides, strict=True):
        inner = stride
        part = []
        for name in reversed(axis):
            part.append(inner)
            inner *= sizes[name]
        strides += part[::-1]
    logical = np.lib.stride_tricks.as_strided(array, [sizes[n] for n in flat], strides)
    order = [n for n in ("layer", "kv", "block", "token", "head", "hi", "lo", "dim") if n in flat]
    view = logical.transpose([flat.index(n) for n in order])
    if "layer" not in flat:
        view = view[None]
    if "kv" not in flat:
        view = view[:, None]
    if "head" not in flat:
        view = view[:, :, :, :, None]
    return {
        (layer, name): _Inner.of(view[i, j], "hi" in flat)
        for i, layer in enumerate(layers)
        for j, name in enumerate(names)
    }


class _Inner:
    """A view whose inner axes are cut in two, written to as if they were one."""

    def __init__(self, view: np.ndarray) -> None:
        self.view = view

    @staticmethod
    def of(view: np.ndarray, cut: bool) -> np.ndarray:
        return _Inner(view) if cut else view  # type: ignore[return-value]

    def __setitem__(self, key: tuple[int, int], values: np.ndarray) -> None:
        target = self.view[key]
        target[...] = values.reshape(target.shape)

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        target = self.view[key]
        return target.reshape(*target.shape[:-2], -1)
