"""Cache layouts: every cache tensor of one rank, declared, never inferred.

A cache tensor is one logical tensor of one layer (``k``, ``v``, the MLA latent ``kv``) in this
rank's memory, reduced to affine form: where block 0 begins and how many bytes lie between two
blocks, tokens, heads and inner elements. ``declare`` makes cache tensors from a tensor and a dims
string; a ``CacheLayout`` gathers those of one rank and is all that a peer must know to plan
against it.

A state tensor (SSM or convolution state) has one slot a request instead of blocks of tokens. To a
plan it is the limit of a sliding window: a slot is a block of one token, and of a request's
positions only the last is kept, whose token is the state after all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import msgspec
import numpy as np

from kvpack.dims import ADDRESSING_AXES, Axis, logical_axes
from kvpack.errors import LayoutError
from kvpack.overlap import check_disjoint, check_self_disjoint, extent
from kvpack.shards import WHOLE_CONTEXT, ContextShard as ContextShard, Shard as Shard

_ITEM_BYTES = {
    "float64": 8, "int64": 8, "uint64": 8,
    "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}  # fmt: skip

_MAX_ADDRESS = (1 << 63) - 1


@dataclass(frozen=True)
class Memory:
    """A tensor given by its address alone, for callers without torch or NumPy arrays.

    Attributes
    ----------
    address : int
        Byte address of the first element.
    shape, strides : tuple of int
        Outermost axis first; strides in elements, as torch gives them.
    dtype : str
        For example ``"bfloat16"``.
    device : str
        ``"cpu"`` or ``"cuda:0"``.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str = "cpu"


class CacheTensor(msgspec.Struct, frozen=True, array_like=True):
    """One logical tensor of one layer in this rank's memory. All strides are in bytes.

    Attributes
    ----------
    layer : int
        Global layer id, the same on every rank.
    name : str
        ``"k"``, ``"v"``, ``"kv"`` (MLA latent), ``"index_k"`` ...; matched by equality.
    group : int
        Index of the layer group, that is of the request's block list.
    address : int
        Byte address of block 0, token 0, head ``heads.start``, first inner element.
    num_blocks, block_stride, block_tokens, token_stride, head_stride : int
        Blocks there are, bytes from one to the next, tokens in each, and so on.
    heads : Shard
        Heads held; ``Shard()`` for tensors without a head axis.
    inner : tuple of (count, stride)
        Inner axes in logical order.
    dtype : str
        Element type by name; both sides must agree.
    item_bytes : int
        Bytes of one element.
    device : str
        Where the memory is.
    window : int or None
        How many positions at a request's end are kept; None: all of them.
    state : bool
        Whether a block is a request's slot. Then it has one token, and the window is 1.
    optional : bool
        Whether a receiver does without it where no sender has it.
    inner_names : tuple of str
        What the declaration calls the inner axes.
    """

    layer: int
    name: str
    group: int
    address: int
    num_blocks: int
    block_stride: int
    block_tokens: int
    token_stride: int
    heads: Shard
    head_stride: int
    inner: tuple[tuple[int, int], ...]
    dtype: str
    item_bytes: int
    device: str = "cpu"
    window: int | None = None
    state: bool = False
    optional: bool = False
    inner_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise LayoutError(f"{self.title}: a window of {self.window} positions keeps nothing")
        if self.state and (self.block_tokens, self.window) != (1, 1):
            raise LayoutError(
                f"{self.title}: a state tensor has blocks of one token and a window of 1, not "
                f"{self.block_tokens} and {self.window}; declare it with a slot axis"
            )
        if self.group < 0 or self.layer < 0:
            raise LayoutError(f"{self.title}: layer and layer group must not be negative")
        if self.address <= 0 or self.item_bytes not in (1, 2, 4, 8):
            raise LayoutError(
                f"{self.title}: address {self.address} or element size {self.item_bytes} is not "
                "that of a tensor in memory"
            )
        for what, count, stride in self.axes:
            if count < 1 or stride < 0:
                raise LayoutError(
                    f"{self.title}: axis {what} has size {count} and stride {stride} bytes; sizes "
                    "must be positive and strides not negative (make a contiguous copy)"
                )
        if not any(s == self.item_bytes for _, n, s in self.axes[1:] if n > 1) and any(
            n > 1 for _, n, _ in self.axes[2:]
        ):
            raise LayoutError(
                f"{self.title}: no axis of unit stride inside a block; kvpack moves runs of bytes, "
                "so one of token, head and inner axes must be contiguous"
            )
        if self.address + extent(self.axes, self.item_bytes) > _MAX_ADDRESS:
            raise LayoutError(
                f"{self.title}: sizes and strides {self.axes} reach beyond byte {_MAX_ADDRESS} of "
                "memory; declare the tensor's own"
            )
        check_self_disjoint(self.title, self.axes, self.item_bytes)

    @property
    def title(self) -> str:
        """How messages call this tensor."""
        return f"cache tensor {self.name!r} of layer {self.layer}"

    @property
    def axes(self) -> tuple[tuple[str, int, int], ...]:
        """All axes as (name, count, stride in bytes), the block axis first."""
        return (
            ("block", self.num_blocks, self.block_stride),
            ("token", self.block_tokens, self.token_stride),
            ("head", self.heads.count, self.head_stride),
            *((f"inner {i}", n, s) for i, (n, s) in enumerate(self.inner)),
        )

    @property
    def inner_items(self) -> int:
        """Elements of one token and head."""
        return prod(n for n, _ in self.inner)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over the heads held."""
        return self.heads.count * self.inner_items * self.item_bytes


class LayerGroup(msgspec.Struct, frozen=True, array_like=True):
    """What the cache tensors that share one block list have in common.

    Attributes
    ----------
    block_tokens, num_blocks : int
        Tokens a block, and blocks.
    window : int or None
        How many positions at a request's end are kept; None: all of them.
    state : bool
        Whether the list is one slot, which holds the request's state.
    """

    block_tokens: int
    num_blocks: int
    window: int | None = None
    state: bool = False

    def live_from(self, first: int, end: int) -> int:
        """First position from ``first`` on that a request of ``end`` positions needs here."""
        return live_from(self.window, first, end)


def live_from(window: int | None, first: int, end: int) -> int:
    """First position from ``first`` on within the window of a request that ends at ``end``."""
    return first if window is None else max(first, end - window)


class CacheLayout(msgspec.Struct, frozen=True, dict=True):
    """All cache tensors of one rank: everything that a peer must know to plan against it.

    Attributes
    ----------
    tensors : sequence of CacheTensor
        Each (layer, name) once. Tensors of one layer group must not overlap in memory; groups may
        alias each other.
    context : ContextShard
        Positions held under context parallelism; all of them unless told otherwise. State is not
        dealt out by position: each rank holds the heads of it that it declares.

    Raises
    ------
    LayoutError
        If a tensor is declared twice, the tensors of a group disagree on block size or window,
        mix blocks with slots, overlap, or do not share one device, or a layer group has no tensor.

    Examples
    --------
    >>> import numpy as np
    >>> pool = np.zeros((2, 64, 16, 8, 128), np.float16)
    >>> layout = CacheLayout(
    ...     declare(pool, "kv block token head dim", layers=0, names=("k", "v"),
    ...             heads=Shard(0, 8, 8)))
    >>> [t.name for t in layout.tensors], layout.groups[0].num_blocks
    (['k', 'v'], 64)
    """

    tensors: Sequence[CacheTensor]
    context: ContextShard = WHOLE_CONTEXT

    def __post_init__(self) -> None:
        # Kept in canonical order, so that equal caches have equal layouts and both sides enumerate
        # them alike.
        ordered = tuple(sorted(self.tensors, key=lambda t: (t.group, t.layer, t.name)))
        msgspec.structs.force_setattr(self, "tensors", ordered)
        if not ordered:
            raise LayoutError("a cache layout needs at least one cache tensor")
        seen: set[tuple[int, str]] = set()
        for tensor in ordered:
            if (tensor.layer, tensor.name) in seen:
                raise LayoutError(f"{tensor.title} is declared twice")
            seen.add((tensor.layer, tensor.name))
        devices = sorted({t.device for t in ordered})
        if len(devices) > 1:
            raise LayoutError(f"cache tensors lie on several devices: {', '.join(devices)}")
        for index in range(ordered[-1].group + 1):
            members = [t for t in ordered if t.group == index]
            if not members:
                raise LayoutError(
                    f"layer group {index} has no cache tensor; number the groups from 0 on"
                )
            if len({t.state for t in members}) > 1:
                state = next(t.title for t in members if t.state)
                raise LayoutError(
                    f"layer group {index} holds {state}, which has a slot a request, and cache "
                    "tensors with blocks of tokens; declare state in a layer group of its own"
                )
            sizes = sorted({t.block_tokens for t in members})
            if len(sizes) > 1:
                raise LayoutError(
                    f"cache tensors of layer group {index} have blocks of {sizes} tokens; tensors "
                    "that share a block list share its block size"
                )
            windows = sorted({str(t.window) for t in members})
            if len(windows) > 1:
                raise LayoutError(
                    f"cache tensors of layer group {index} have windows of {', '.join(windows)} "
                    "positions; tensors that share a block list share its window"
                )
            check_disjoint(index, [(t.title, t.address, t.axes, t.item_bytes) for t in members])

    @property
    def device(self) -> str:
        """The device that all cache tensors lie on."""
        return self.tensors[0].device

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layer groups, in the order of a request's block lists."""
        return tuple(
            LayerGroup(
                members[0].block_tokens,
                min(t.num_blocks for t in members),
                members[0].window,
                members[0].state,
            )
            for members in (
                [t for t in self.tensors if t.group == index]
                for index in range(self.tensors[-1].group + 1)
            )
        )

    def context_of(self, group: int) -> ContextShard:
        """The positions of a layer group that this rank holds; any, where it is state."""
        return WHOLE_CONTEXT if self.groups[group].state else self.context

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all cache tensors but state."""
        return sum(t.token_bytes for t in self.tensors if not t.state)

    def encode(self) -> bytes:
        """Serialise with msgpack."""
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> CacheLayout:
        """Read what ``encode`` wrote, with every check of a fresh declaration.

        Raises
        ------
        LayoutError
            If the bytes are not a cache layout.
        """
        try:
            return msgspec.msgpack.decode(data, type=CacheLayout)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise LayoutError(f"{len(data)} bytes are not a cache layout: {error}") from error


def declare(
    tensor: Any,
    dims: str,
    *,
    layers: int | Sequence[int],
    names: str | Sequence[str],
    heads: Shard | None = None,
    group: int = 0,
    block_tokens: int | None = None,
    window: int | None = None,
    optional: bool = False,
) -> tuple[CacheTensor, ...]:
    """Declare what a tensor holds.

    Parameters
    ----------
    tensor : torch.Tensor, numpy.ndarray or Memory
        The memory, on CPU or CUDA. It is not touched; the caller keeps it alive.
    dims : str
        The meaning of its axes, for example ``"kv block token head dim"``; see ``kvpack.dims``.
    layers : int or sequence of int
        Global layer ids, one per entry of the ``layer`` axis, or the only one.
    names : str or sequence of str
        Names, one per entry of the ``kv`` axis, or the only one.
    heads : Shard, optional
        Heads held; needed where ``dims`` has a ``head`` axis.
    group : int
        Layer group, that is which of the request's block lists addresses this tensor.
    block_tokens : int, optional
        Tokens a block, where the tensor's shape does not say: ``"(block token) head dim"``.
    window : int, optional
        How many positions at a request's end this layer group keeps: a sliding window. Only those
        travel. A tensor with a ``slot`` axis keeps one state and takes no window.
    optional : bool
        Whether a receiver does without it where no sender has it, as with the layers of a draft
        model.

    Returns
    -------
    tuple of CacheTensor
        One per layer and name.

    Raises
    ------
    LayoutError
        If dims string, shape and the rest do not agree, or the memory cannot be addressed.

    Examples
    --------
    >>> import numpy as np
    >>> pool = np.zeros((4096, 1, 64), np.float32)
    >>> k, = declare(pool, "(block token) head dim", layers=3, names="k", heads=Shard(2, 1, 8),
    ...              block_tokens=1)
    >>> k.num_blocks, k.block_stride, k.token_bytes
    (4096, 256, 256)
    """
    memory = _memory(tensor)
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    names = (names,) if isinstance(names, str) else tuple(names)
    sizes = {"kv": len(names), "layer": len(layers)}
    if heads is not None:
        sizes["head"] = heads.count
    if block_tokens is not None:
        sizes["token"] = block_tokens
    axes = logical_axes(dims, memory.shape, memory.strides, sizes)
    state = "slot" in axes
    if state and ("block" in axes or "token" in axes or window is not None):
        raise LayoutError(
            f"dims string {dims!r} has a slot axis, so one state a request: it can have neither "
            "block nor token axis, nor a window"
        )
    for needed in () if state else ("block", "token"):
        if needed not in axes:
            raise LayoutError(f"dims string {dims!r} has no {needed} axis (nor a slot axis)")
    for axis, values in (("kv", names), ("layer", layers)):
        if axis not in axes and len(values) != 1:
            raise LayoutError(
                f"{len(values)} {axis} entries {values} but no {axis} axis in {dims!r}"
            )
    if ("head" in axes) != (heads is not None):
        raise LayoutError(
            f"dims string {dims!r} and heads={heads} do not agree: give heads=Shard(...) exactly "
            "where there is a head axis"
        )
    if memory.dtype not in _ITEM_BYTES:
        raise LayoutError(
            f"dtype {memory.dtype!r} is not supported; declare rows of other formats as uint8"
        )
    item_bytes = _ITEM_BYTES[memory.dtype]
    blocks = axes["slot" if state else "block"]

    def stride(axis: str) -> int:
        return axes.get(axis, Axis(1, 0)).stride * item_bytes

    return tuple(
        CacheTensor(
            layer=layer,
            name=name,
            group=group,
            address=memory.address + i * stride("layer") + j * stride("kv"),
            num_blocks=blocks.count,
            block_stride=blocks.stride * item_bytes,
            block_tokens=1 if state else axes["token"].count,
            token_stride=stride("token"),
            heads=heads if heads is not None else Shard(),
            head_stride=stride("head"),
            inner=tuple(
                (axis.count, axis.stride * item_bytes)
                for name_, axis in axes.items()
                if name_ not in ADDRESSING_AXES
            ),
            dtype=memory.dtype,
            item_bytes=item_bytes,
            device=memory.device,
            window=1 if state else window,
            state=state,
            optional=optional,
            inner_names=tuple(name_ for name_ in axes if name_ not in ADDRESSING_AXES),
        )
        for i, layer in enumerate(layers)
        for j, name in enumerate(names)
    )


def _memory(tensor: Any) -> Memory:
    """Address, shape, strides and dtype of a torch tensor, a NumPy array or a Memory."""
    if isinstance(tensor, Memory):
        return tensor
    if isinstance(tensor, np.ndarray):
        if any(s % tensor.itemsize for s in tensor.strides):
            raise LayoutError(
                f"strides {tensor.strides} are not multiples of the element size {tensor.itemsize}"
            )
        return Memory(
            address=tensor.ctypes.data,
            shape=tensor.shape,
            strides=tuple(s // tensor.itemsize for s in tensor.strides),
            dtype=str(tensor.dtype),
        )
    if hasattr(tensor, "data_ptr") and hasattr(tensor, "stride"):
        return Memory(
            address=tensor.data_ptr(),
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            dtype=str(tensor.dtype).removeprefix("torch."),
            device=str(tensor.device),
        )
    raise LayoutError(
        f"cannot declare a {type(tensor).__name__}; pass a torch tensor, a NumPy array or a Memory"
    )
