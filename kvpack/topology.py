"""Topologies: the model's shape, and on each side the parallelism and the layout of the cache.

Nothing here needs a GPU, a model or a cache: a rank's cache layout is declared over made-up
addresses, so that what will travel can be worked out before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from kvpack.blocks import NO_BLOCK, touched_blocks
from kvpack.dims import parse_dims
from kvpack.errors import LayoutError, OptionsError
from kvpack.layout import CacheLayout, CacheTensor, Memory, Shard, declare
from kvpack.parallel import Parallelism, Rank
from kvpack.shapes import EngineLayout, ModelShape, TensorKind

__all__ = ["DTYPES", "Deployment", "Topology"]

DTYPES: Mapping[str, tuple[str, int]] = {
    "fp8": ("float8_e4m3fn", 1),
    "bf16": ("bfloat16", 2),
    "fp16": ("float16", 2),
    "fp32": ("float32", 4),
}
"""Element types of a cache: torch's name and the bytes of an element."""

_ITEM_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, **dict(DTYPES.values())}
_FIRST_ADDRESS = 1 << 40
_ALIGNMENT = 512
"""As torch's allocator aligns what it gives out, in bytes."""
_POOL_REQUESTS = 4
"""Requests that fit a made-up pool: enough for random block ids to be scattered."""


@dataclass(frozen=True)
class Deployment:
    """One side of a topology.

    Parameters
    ----------
    name : str
        What its ranks are called, with a number after it: ``"prefill"`` gives ``prefill-0``.
    parallelism : Parallelism
        How its ranks share model and requests.
    layout : EngineLayout
        How each rank lays out its cache.
    block_tokens : int
        Tokens of a block.

    Raises
    ------
    OptionsError
        If a block has no tokens.
    """

    name: str
    parallelism: Parallelism
    layout: EngineLayout
    block_tokens: int

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise OptionsError(f"{self.name} block of {self.block_tokens} tokens must hold one")

    def rank_name(self, rank: Rank) -> str:
        """Return what a rank's endpoint is called."""
        return f"{self.name}-{rank.number}"


@dataclass(frozen=True)
class Topology:
    """A model, the two sides that hold its cache, and one request.

    Parameters
    ----------
    shape : ModelShape
        What the model caches.
    prefill, decode : Deployment
        Who sends and who receives.
    dtype : str
        A name in `DTYPES`: elements of the cache, where the shape leaves them open.
    first, tokens : int
        Positions ``[first, tokens)`` travel: `tokens` is the length of the prompt, and the first
        of them the decode side has already.
    stream_layers : bool
        Whether each layer leaves when it is computed.
    request_id : str
        Decides which of several copies is sent.
    seed : int
        Of the random block lists.

    Raises
    ------
    OptionsError
        If the dtype has no such name, or no positions are left.
    """

    shape: ModelShape
    prefill: Deployment
    decode: Deployment
    dtype: str = "bf16"
    first: int = 0
    tokens: int = 8192
    stream_layers: bool = False
    request_id: str = "request"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionsError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not 0 <= self.first < self.tokens:
            raise OptionsError(
                f"first={self.first} is outside [0, {self.tokens}), the positions of a prompt of "
                f"tokens={self.tokens}; at least one must be left to send"
            )

    @property
    def request_bytes(self) -> int:
        """Bytes of the whole request's cache in all layers and heads, each replica but once."""
        return self.shape.request_bytes(self.tokens, DTYPES[self.dtype][1])

    def cache_layout(self, side: Deployment, rank: Rank) -> CacheLayout:
        """Declare what a rank of a side holds, over made-up addresses.

        Parameters
        ----------
        side : Deployment
            Either side of this topology.
        rank : Rank
            One of its ranks.

        Returns
        -------
        CacheLayout
            With one layer group for each window of the shape, those that keep all tokens first and
            states last.

        Raises
        ------
        OptionsError
            If the rank's pipeline stage has no layer that caches anything.
        LayoutError
            If the layout's dims strings do not fit the shape.
        """
        address = _FIRST_ADDRESS
        tensors: list[CacheTensor] = []
        for group, kinds in enumerate(self._groups(side, rank)):
            for kind, layers in kinds:
                dims = side.layout.dims_of(kind)
                heads = None if kind.heads is None else rank.heads(kind.heads)
                axes = parse_dims(dims)
                named = {axis for axes_ in axes for axis in axes_}
                sizes = self._sizes(side, kind, heads)
                for held in [layers] if "layer" in named else [[layer] for layer in layers]:
                    for names in [kind.names] if "kv" in named else [(n,) for n in kind.names]:
                        sizes |= {"layer": len(held), "kv": len(names)}
                        memory, address = _memory(
                            dims, axes, sizes, _element(kind, self.dtype), address
                        )
                        tensors += declare(
                            memory,
                            dims,
                            layers=held,
                            names=names,
                            heads=heads,
                            group=group,
                            block_tokens=None if kind.state else side.block_tokens,
                            window=kind.window,
                            optional=kind.only is not None,
                        )
        return CacheLayout(tensors, rank.positions(side.block_tokens))

    def block_lists(
        self, side: Deployment, rank: Rank, layout: CacheLayout, *, scattered: bool
    ) -> list[npt.NDArray[np.int32]]:
        """Make up the block lists of the request on one rank.

        Ranks of a side agree on them as far as they have the same layer groups and positions.

        Parameters
        ----------
        side : Deployment
            Either side of this topology.
        rank : Rank
            One of its ranks.
        layout : CacheLayout
            What the rank holds.
        scattered : bool
            Random block ids, as in a cache that has been in use; else ascending ones.

        Returns
        -------
        list of ndarray of int32
            One per layer group; ``NO_BLOCK`` before a window.
        """
        lists = []
        for number, kind in enumerate(layout.groups):
            start, stop = touched_blocks(layout, number, self.first, self.tokens)
            blocks = np.arange(stop - start)
            if scattered:
                rng = np.random.default_rng((self.seed, int(side is self.decode), number))
                blocks = rng.permutation(kind.num_blocks)[: stop - start]
            if kind.window is not None and not kind.state:
                kept = layout.context.tokens_before(max(0, self.tokens - kind.window))
                blocks[: max(0, kept // side.block_tokens - start)] = NO_BLOCK
            lists.append(blocks.astype(np.int32))
        return lists

    def _sizes(self, side: Deployment, kind: TensorKind, heads: Shard | None) -> dict[str, int]:
        """Sizes of the axes of a kind's tensors, but for those of layers and names."""
        sizes = {"head": 1 if heads is None else heads.count, "dim": kind.row_elements}
        if kind.state:
            return sizes | {"slot": _POOL_REQUESTS}
        blocks = _POOL_REQUESTS * -(-self.tokens // side.block_tokens)
        return sizes | {"block": blocks, "token": side.block_tokens}

    def _groups(self, side: Deployment, rank: Rank) -> list[list[tuple[TensorKind, list[int]]]]:
        """Kinds of tensor of a rank with the layers it holds, those of one block list together.

        Layers past the model's own, a draft's, are on the last pipeline stage.
        """
        own = self.shape.num_layers
        stage = rank.layers(own)
        last = rank.pp == side.parallelism.pp - 1
        groups: dict[tuple[bool, int], list[tuple[TensorKind, list[int]]]] = {}
        for kind in self.shape.kinds:
            layers = [i for i in kind.layers if i in stage or (last and i >= own)]
            if layers and kind.only in (None, side.name):
                groups.setdefault((kind.state, kind.window or 0), []).append((kind, layers))
        if not groups:
            raise OptionsError(
                f"{side.rank_name(rank)} holds layers {stage.start} to {stage.stop - 1}, none of "
                "which caches anything; lower pp or give the stages other layers"
            )
        return [groups[key] for key in sorted(groups)]


def _element(kind: TensorKind, dtype: str) -> str:
    """Name of the element type of a kind, in a cache of `dtype`."""
    return DTYPES[dtype][0] if kind.dtype_bytes is None else f"uint{8 * kind.dtype_bytes}"


def _memory(
    dims: str,
    axes: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    dtype: str,
    address: int,
) -> tuple[Memory, int]:
    """A contiguous tensor of the axes at an address, and the next address that is free."""
    named = {axis for names in axes for axis in names}
    if "dim" not in named or named - set(sizes):
        raise LayoutError(
            f"dims string {dims!r} cannot be given a size; write it with dim and any of "
            f"{', '.join(axis for axis in sizes if axis != 'dim')}"
        )
    shape = tuple(prod(sizes[axis] for axis in names) for names in axes)
    strides = tuple(prod(shape[place + 1 :]) for place in range(len(shape)))
    item_bytes = _ITEM_BYTES[dtype]
    end = address + prod(shape) * item_bytes
    return Memory(address, shape, strides, dtype), -(-end // _ALIGNMENT) * _ALIGNMENT
