"""Random topologies: ranks of a random model, in every supported cache layout, on poisoned memory.

What a rank's memory holds is decided by NumPy's own indexing over the declared dims, never by the
planner, so that a transfer can be compared byte for byte with what it should have done.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from support.models import (
    BLOCK_TOKENS,
    DTYPES,
    HEADED,
    HEADLESS,
    STATES_HEADED,
    STATES_HEADLESS,
    Kind,
    Model,
)

from kvpack.blocks import NO_BLOCK, BlockTable, Role, block_table, touched_blocks
from kvpack.layout import CacheLayout, CacheTensor, LayerGroup, declare
from kvpack.shards import WHOLE_CONTEXT, ContextShard, Shard
from kvpack.verification import Party

GUARD_BYTES = 64


@dataclass
class Rank:
    """One rank's memory, its declaration and its block lists over positions ``[first, last)``.

    ``views[layer, name]`` has the shape (block, token, head, inner axes), ``poison`` what the
    buffers held before anything was written, ``absent`` the optional tensors that nobody sends.
    """

    name: str
    role: Role
    layout: CacheLayout
    buffers: list[np.ndarray]
    views: dict[tuple[int, str], np.ndarray]
    blocks: list[np.ndarray]
    first: int
    last: int
    poison: list[np.ndarray]
    absent: frozenset[tuple[int, str]] = frozenset()

    def held(self, tensor: CacheTensor) -> np.ndarray:
        """The positions whose token of a tensor the block lists give a place: (position, local,
        block), one row each."""
        shard, tokens = self.layout.context_of(tensor.group), tensor.block_tokens
        begin = self.first
        if tensor.state:
            begin = self.last - 1
        elif tensor.window is not None and self.role == "destination":
            begin = max(begin, self.last - tensor.window)
        position = np.array(
            [p for p in range(begin, self.last) if position_rank(shard, p) == shard.rank], np.int64
        )
        local = np.array([shard.tokens_before(int(p)) for p in position], np.int64)
        ids = self.blocks[tensor.group]
        number = local // tokens - (-(-shard.tokens_before(self.last) // tokens) - len(ids))
        block = np.where(number >= 0, np.append(ids, NO_BLOCK)[np.maximum(number, -1)], NO_BLOCK)
        return np.stack([position, local, block], 1)[block >= 0]

    def fill(self, model: Model) -> None:
        """Write the request's logical values where the block lists say."""
        for tensor in self.layout.tensors:
            if (tensor.layer, tensor.name) in self.absent:
                continue
            view = self.views[tensor.layer, tensor.name]
            position, local, block = self.held(tensor).T
            heads = slice(tensor.heads.start, tensor.heads.stop)
            values = model.values[tensor.layer, tensor.name][position, heads]
            view[block, local % tensor.block_tokens] = values.reshape(len(values), *view.shape[2:])

    def expected(self, model: Model) -> list[np.ndarray]:
        """What the still poisoned buffers must hold after a transfer."""
        self.fill(model)
        wanted = [buffer.copy() for buffer in self.buffers]
        for buffer, poison in zip(self.buffers, self.poison, strict=True):
            buffer[:] = poison
        return wanted

    def table(self) -> BlockTable:
        """Its block lists, checked and packed."""
        return block_table(self.layout, self.blocks, self.first, self.last, self.role)

    def party(self, first: int, last: int) -> Party:
        """This rank with the part of its block lists that ``[first, last)`` touches.

        The state is that after its last position, so that an earlier part has none.
        """
        lists = []
        for group, ids in enumerate(self.blocks):
            begin = touched_blocks(self.layout, group, self.first, self.last)[1] - len(ids)
            start, stop = touched_blocks(self.layout, group, first, last)
            if self.layout.groups[group].state and last < self.last:
                start, stop = begin, begin
            lists.append(ids[max(start - begin, 0) : max(stop - begin, 0)])
        return Party(self.layout, lists)


@dataclass(frozen=True)
class Topology:
    """One request: every rank that has it, every rank that wants it, and its positions."""

    model: Model
    sources: list[Rank]
    destinations: list[Rank]
    first: int
    last: int

    @property
    def layouts(self) -> dict[str, CacheLayout]:
        """Cache layouts of the sources, by name."""
        return {rank.name: rank.layout for rank in self.sources}


def position_rank(shard: ContextShard, position: int) -> int:
    """Which rank of a context-parallel group holds a position."""
    return position // shard.interleave % shard.ranks


def random_topology(seed: int) -> Topology:
    """The topology of a seed."""
    return topology_of(random.Random(seed))


def topology_of(rng: random.Random) -> Topology:
    """A model, prefill ranks, decode ranks and a range, all random, and always enough to serve."""
    model = Model.random(rng)
    first = rng.choice((0, rng.randrange(model.tokens)))
    last = rng.choice((model.tokens, rng.randint(first + 1, model.tokens)))
    state = any(kind.state for kind in model.kinds)
    sent = (
        rng.choice((first, rng.randint(0, first))),
        last if state else rng.choice((last, rng.randint(last, model.tokens))),
    )
    sources = _side(rng, model, "source", *sent, end=last, most=8)
    destinations = _side(rng, model, "destination", first, last, end=last, most=3)
    held = {(t.layer, t.name) for rank in sources for t in rank.layout.tensors}
    for rank in destinations:
        rank.absent = frozenset((t.layer, t.name) for t in rank.layout.tensors) - held
        if rng.random() < 0.3:
            for ids in rank.blocks:
                ids[[rng.random() < 0.3 for _ in ids]] = NO_BLOCK
    return Topology(model, sources, destinations, first, last)


def _side(
    rng: random.Random, model: Model, role: Role, first: int, last: int, end: int, most: int
) -> list[Rank]:
    while True:
        tp, pp = rng.choice((1, 1, 2, 3, 4)), rng.choice((1, 1, 1, 2, 3))
        cp = rng.choice((1, 1, 1, 1, 2, 3, 4))
        if tp * pp * cp <= most and pp <= model.layers:
            break
    interleave = rng.choice((1, 2, 3, 4, 8))
    stages = sorted(rng.sample(range(1, model.layers), pp - 1))
    bounds = [0, *stages, model.layers]
    spread = rng.random() < 0.5  # state over all ranks of a stage, or a copy for each context rank
    shards = [
        _shards(rng, kind.heads, tp * cp) if kind.state and spread
        else [shard for shard in _shards(rng, kind.heads, tp) for _ in range(cp)]
        for kind in model.kinds
    ]  # fmt: skip
    fixed = {kind: rng.choice(BLOCK_TOKENS) for kind in model.kinds} if rng.random() < 0.6 else {}
    without = {kind for kind in model.kinds if kind.optional and rng.random() < 0.4}
    return [
        make_rank(
            rng,
            model,
            f"{'prefill' if role == 'source' else 'decode'}{t}.{stage}.{c}",
            layers=range(bounds[stage], bounds[stage + 1]),
            heads=[shard[t * cp + c] for shard in shards],
            first=first,
            last=last,
            end=end,
            role=role,
            context=ContextShard(c, cp, interleave),
            block_tokens=fixed,
            without=without,
        )
        for t in range(tp)
        for stage in range(pp)
        for c in range(cp)
    ]


def _shards(rng: random.Random, heads: int, ranks: int) -> list[Shard]:
    """Balanced shards or, now and then, any intervals that together cover the heads."""
    if not heads:
        return [Shard(replica=rank, replicas=ranks) for rank in range(ranks)]
    if rng.random() < 0.7:
        return [Shard.balanced(heads, ranks, rank) for rank in range(ranks)]
    cuts = sorted(rng.choice(range(heads + 1)) for _ in range(ranks - 1))
    out = []
    for start, stop in zip([0, *cuts], [*cuts, heads], strict=True):
        low = min(rng.randint(max(0, start - 1), start), heads - 1)
        high = max(rng.randint(stop, min(heads, stop + 1)), low + 1)
        out.append(Shard(low, high - low, heads))
    return out


def make_rank(
    rng: random.Random,
    model: Model,
    name: str,
    *,
    layers: Sequence[int],
    heads: Sequence[Shard],
    first: int,
    last: int,
    end: int | None = None,
    role: Role = "source",
    context: ContextShard = WHOLE_CONTEXT,
    dims: str | None = None,
    block_tokens: dict[Kind, int] | None = None,
    without: Collection[Kind] = (),
) -> Rank:
    """A rank with poisoned pools, in random layouts unless one is given, and shuffled block lists.

    ``heads`` has a shard a kind. Kinds of one block size and window share a layer group or do not,
    as chance will have it, so the two sides of a transfer number their groups differently. Of a
    window the lists hold what a request up to ``end`` needs, and more, or less than all before it.
    """
    pools = _Pools(rng)
    groups: list[LayerGroup] = []
    kept = [
        (replace(kind, layers=mine), shard)
        for kind, shard in zip(model.kinds, heads, strict=True)
        for mine in [tuple(layer for layer in kind.layers if layer in layers)]
        if mine and kind not in without
    ]
    sizes = {(k.layers, k.names): size for k, size in (block_tokens or {}).items()}
    for page, members in groupby(kept, key=lambda entry: entry[0].page):
        family = list(members)
        alike = page and rng.random() < 0.6
        for some in [family] if alike else [[entry] for entry in family]:
            kind = some[0][0]
            whole = next(k for k in model.kinds if k.names == kind.names and kind.keys <= k.keys)
            tokens = sizes.get((whole.layers, whole.names)) or rng.choice(BLOCK_TOKENS)
            group = _group(rng, groups, kind, tokens, context, (first, last), role)
            if alike:
                pools.add_page(some, group, groups[group])
            else:
                pools.add(*some[0], group, groups[group], dims)
    layout = CacheLayout(pools.tensors, context)
    blocks = [
        _block_list(rng, layout, group, first, last, last if end is None else end)
        for group in range(len(groups))
    ]
    poison = [buffer.copy() for buffer in pools.buffers]
    return Rank(name, role, layout, pools.buffers, pools.views, blocks, first, last, poison)


def _group(
    rng: random.Random,
    groups: list[LayerGroup],
    kind: Kind,
    tokens: int,
    context: ContextShard,
    positions: tuple[int, int],
    role: Role,
) -> int:
    """A layer group for a kind, of those there are or a new one."""
    window = kind.window
    if window is not None and not kind.state and role == "source":
        window = rng.choice((window, window, window + rng.randint(0, 20), None))
    held = context.tokens_before(positions[1]) - context.tokens_before(positions[0])
    tokens, held = (1, 0) if kind.state else (tokens, held)
    shared = [
        number
        for number, group in enumerate(groups)
        if (group.block_tokens, group.window, group.state) == (tokens, window, kind.state)
    ]
    number = rng.choice([len(groups), *shared])
    if number == len(groups):
        groups.append(LayerGroup(tokens, held // tokens + rng.randint(2, 5), window, kind.state))
    return number


def _block_list(
    rng: random.Random, layout: CacheLayout, group: int, first: int, last: int, end: int
) -> np.ndarray:
    """Shuffled ids; of a window, sometimes holes or nothing where a request needs no blocks."""
    kind = layout.groups[group]
    start, stop = touched_blocks(layout, group, first, last)
    ids = np.array(rng.sample(range(kind.num_blocks), stop - start), np.int32)
    if kind.window is None or kind.state:
        return ids
    needed, until = touched_blocks(layout, group, min(kind.live_from(first, end), last), last)
    spare = (needed if needed < until else stop) - start
    dead = ids[:spare]
    dead[[rng.random() < 0.7 for _ in dead]] = rng.choice((NO_BLOCK, *dead[:1]))
    return ids[rng.choice((0, spare, rng.randint(0, spare))) :]


class _Pools:
    """Poisoned buffers, the tensors declared over them, and NumPy's views of those."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._noise = np.random.default_rng(rng.getrandbits(32))
        self.tensors: list[CacheTensor] = []
        self.buffers: list[np.ndarray] = []
        self.views: dict[tuple[int, str], np.ndarray] = {}

    def add(
        self, kind: Kind, shard: Shard, number: int, group: LayerGroup, dims: str | None
    ) -> None:
        """Tensors of a kind in pools of their own."""
        rng = self._rng
        if kind.state:
            chosen = dims or rng.choice(STATES_HEADED if kind.heads else STATES_HEADLESS)
        else:
            chosen = dims or rng.choice(HEADED if kind.heads else HEADLESS)
        words = [word for axis in axes_of(chosen) for word in axis]
        sizes = self._sizes(kind, shard, group)
        for some in [kind.layers] if "layer" in words else [(layer,) for layer in kind.layers]:
            for names in [kind.names] if "kv" in words else [(n,) for n in kind.names]:
                sizes |= {"layer": len(some), "kv": len(names)}
                array = self._pool(chosen, sizes, DTYPES[kind.item_bytes])
                self._declare(array, chosen, kind, shard, number, group, some, names, sizes)

    def add_page(
        self, members: Sequence[tuple[Kind, Shard]], number: int, group: LayerGroup
    ) -> None:
        """Tensors of several kinds one after another in each block, or slot, of one buffer."""
        for layer in members[0][0].layers:
            offsets, end = [], 0
            for kind, shard in members:
                offsets.append(-(-end // kind.item_bytes) * kind.item_bytes)
                held = group.block_tokens * (shard.count if kind.heads else 1) * kind.dim
                end = offsets[-1] + held * kind.item_bytes
            page_bytes = -(-end // 8) * 8 + self._rng.choice((0, 0, 8, 64))
            raw = self._pool("block page", {"block": group.num_blocks, "page": page_bytes}, "uint8")
            for (kind, shard), offset in zip(members, offsets, strict=True):
                dims = "slot" if kind.state else "block token"
                dims += " head dim" if kind.heads else " dim"
                sizes = self._sizes(kind, shard, group)
                shape = [sizes[axis] for axis in dims.split()]
                item = kind.item_bytes
                inner = [item * math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
                array = np.lib.stride_tricks.as_strided(
                    raw[0, offset : offset + item].view(DTYPES[item]),
                    shape,
                    [raw.strides[0], *inner],
                )
                self._declare(array, dims, kind, shard, number, group, (layer,), kind.names, sizes)

    def _sizes(self, kind: Kind, shard: Shard, group: LayerGroup) -> dict[str, int]:
        low = self._rng.choice([d for d in (1, 2, 4, 8) if kind.dim % d == 0])
        return {
            "block": group.num_blocks,
            "slot": group.num_blocks,
            "token": group.block_tokens,
            "head": shard.count,
            "dim": kind.dim,
            "hi": kind.dim // low,
            "lo": low,
        }

    def _declare(
        self,
        array: np.ndarray,
        dims: str,
        kind: Kind,
        shard: Shard,
        number: int,
        group: LayerGroup,
        layers: Sequence[int],
        names: Sequence[str],
        sizes: dict[str, int],
    ) -> None:
        words = [word for axis in axes_of(dims) for word in axis]
        self.tensors += declare(
            array,
            dims,
            layers=layers,
            names=names,
            heads=shard if "head" in words else None,
            group=number,
            block_tokens=sizes["token"] if "(block token)" in dims else None,
            window=None if kind.state else group.window,
            optional=kind.optional,
        )
        self.views |= logical_views(array, dims, sizes, layers, names)

    def _pool(self, dims: str, sizes: dict[str, int], dtype: str) -> np.ndarray:
        """A tensor of the dims' shape inside random bytes: unaligned, sometimes padded or
        transposed."""
        rng, item = self._rng, np.dtype(dtype).itemsize
        shape, padded = [], []
        axes = axes_of(dims)
        for axis in axes:
            length = math.prod(sizes[name] for name in axis)
            may_pad = len(axis) == 1 and axis[0] in ("block", "slot", "head", "dim") and length > 1
            shape.append(length)
            padded.append(length + (rng.choice((0, 0, 0, 1, 2)) if may_pad else 0))
        order = list(range(len(axes)))
        if ["slot"] in axes and rng.random() < 0.5:
            rng.shuffle(order)
            if axes[order[-1]] in (["slot"], ["layer"]) or shape[order[-1]] == 1:
                order.sort()
        nbytes = math.prod(padded) * item
        buffer = self._noise.integers(0, 256, nbytes + 2 * GUARD_BYTES, dtype=np.uint8)
        lead = -buffer.ctypes.data % 16 + rng.choice((0, 0, 16, 1, 3)) * item
        whole = buffer[lead : lead + nbytes].view(dtype).reshape([padded[i] for i in order])
        self.buffers.append(buffer)
        return whole.transpose(np.argsort(order))[tuple(slice(0, n) for n in shape)]


def axes_of(dims: str) -> list[list[str]]:
    """Names of each axis of a dims string, read independently of the library."""
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
            out.append([] if word == "1" else [word])
    return out


def logical_views(
    array: np.ndarray,
    dims: str,
    sizes: dict[str, int],
    layers: Sequence[int],
    names: Sequence[str],
) -> dict[tuple[int, str], np.ndarray]:
    """Views of shape (block, token, head, inner axes), by NumPy's own strides and transpose."""
    shape: list[int] = []
    strides: list[int] = []
    flat: list[str] = []
    for axis, stride in zip(axes_of(dims), array.strides, strict=True):
        steps = [stride * int(np.prod([sizes[n] for n in axis[i + 1 :]])) for i in range(len(axis))]
        strides += steps
        shape += [sizes[name] for name in axis]
        flat += ["block" if name == "slot" else name for name in axis]
    logical = np.lib.stride_tricks.as_strided(array, shape, strides)
    leading = [n for n in ("layer", "kv", "block", "token", "head") if n in flat]
    inner = [n for n in flat if n not in leading]
    view = logical.transpose([flat.index(n) for n in leading + inner])
    for place, name in enumerate(("layer", "kv", "block", "token", "head")):
        if name not in flat:
            view = np.expand_dims(view, place)
    return {
        (layer, name): view[i, j] for i, layer in enumerate(layers) for j, name in enumerate(names)
    }
