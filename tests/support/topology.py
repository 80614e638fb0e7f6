"""Random topologies: ranks of a random model, in every supported cache layout, on poisoned memory.

What a rank's memory holds is decided by NumPy's own indexing over the declared dims, never by the
planner, so that a transfer can be compared byte for byte with what it should have done.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvpack.blocks import NO_BLOCK, block_table, touched_blocks
from kvpack.columns import Span
from kvpack.election import Election
from kvpack.kernels import LaneTable, gather, scatter
from kvpack.layout import CacheLayout, CacheTensor, ContextShard, Shard, declare
from kvpack.plan import TransferPlan, compile_plan
from kvpack.verification import Party
from kvpack.wire import chunk_origin

HEADED = (
    "kv block token head dim",
    "block kv token head dim",
    "block kv head token dim",
    "kv block head token dim",
    "block layer kv head token dim",
    "block layer kv token head dim",
    "layer kv block token head dim",
    "layer block kv head token dim",
    "block token layer kv head dim",
    "block token head dim",
    "block head token dim",
    "layer block head token dim",
    "(block token) head dim",
    "(block token) layer kv head dim",
    "layer kv (block token) head dim",
    "block head token (kv dim)",
    "block token head (kv dim)",
    "block head dim token",
    "block head hi token lo",
)
HEADLESS = (
    "block token dim",
    "layer block token dim",
    "block layer token dim",
    "block token layer dim",
    "(block token) dim",
    "block 1 token hi lo",
)
BLOCK_TOKENS = (1, 2, 3, 4, 8, 16, 32, 48)
DTYPES = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}
GUARD_BYTES = 64
WHOLE_CONTEXT = ContextShard()


@dataclass(frozen=True)
class Kind:
    """Cache tensors of one shape: their layers, names, heads (0: no head axis) and inner size."""

    layers: tuple[int, ...]
    names: tuple[str, ...]
    heads: int
    dim: int
    item_bytes: int


@dataclass(frozen=True)
class Model:
    """What one request's cache holds.

    ``values[layer, name]`` has the shape (tokens, heads, dim).
    """

    kinds: tuple[Kind, ...]
    tokens: int
    values: dict[tuple[int, str], np.ndarray]

    @staticmethod
    def of(kinds: Sequence[Kind], tokens: int, seed: int = 0) -> Model:
        """Fill the tensors of the given kinds with noise."""
        noise = np.random.default_rng(seed)
        values = {
            (layer, name): noise.integers(
                0, 1 << (8 * kind.item_bytes), (tokens, kind.heads or 1, kind.dim),
                dtype=DTYPES[kind.item_bytes],
            )
            for kind in kinds
            for layer in kind.layers
            for name in kind.names
        }  # fmt: skip
        return Model(tuple(kinds), tokens, values)

    @staticmethod
    def random(rng: random.Random) -> Model:
        """Attention heads or latents; sometimes two sorts of layers, sometimes an index beside."""
        count = rng.randint(1, 4)
        cut = rng.choice((count, count, rng.randint(1, count)))
        parts = [tuple(range(cut)), tuple(range(cut, count))]
        kinds = [Model._kind(rng, layers) for layers in parts if layers]
        if rng.random() < 0.15:
            item = rng.choice((1, 2))
            kinds.append(Kind(parts[0], ("index_k",), 0, rng.choice((4, 9)), item))
        return Model.of(kinds, rng.randint(1, 120), rng.getrandbits(32))

    @staticmethod
    def _kind(rng: random.Random, layers: tuple[int, ...]) -> Kind:
        item = rng.choice((1, 2, 4, 8))
        if rng.random() < 0.2:
            return Kind(layers, ("kv",), 0, rng.choice((5, 8, 18, 36)), item)
        heads = rng.choice((1, 2, 3, 4, 6, 8))
        return Kind(layers, ("k", "v"), heads, rng.choice((2, 3, 4, 6, 8, 16)), item)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return 1 + max(layer for kind in self.kinds for layer in kind.layers)


@dataclass
class Rank:
    """One rank's memory, its declaration and its block lists over positions ``[first, last)``.

    ``views[layer, name]`` has the shape (block, token, head, inner axes), ``poison`` what the
    buffers held before anything was written.
    """

    name: str
    layout: CacheLayout
    buffers: list[np.ndarray]
    views: dict[tuple[int, str], np.ndarray]
    blocks: list[np.ndarray]
    first: int
    last: int
    poison: list[np.ndarray]

    def fill(self, model: Model) -> None:
        """Write the request's logical values where the block lists say."""
        shard = self.layout.context
        held = np.array(
            [p for p in range(self.first, self.last) if position_rank(shard, p) == shard.rank],
            np.int64,
        )
        local = np.array([shard.tokens_before(int(p)) for p in held], np.int64)
        for tensor in self.layout.tensors:
            view = self.views[tensor.layer, tensor.name]
            start, _ = touched_blocks(self.layout, tensor.group, self.first, self.last)
            block = self.blocks[tensor.group][local // tensor.block_tokens - start]
            there = block >= 0
            heads = slice(tensor.heads.start, tensor.heads.stop)
            values = model.values[tensor.layer, tensor.name][held[there], heads]
            into = (block[there], local[there] % tensor.block_tokens)
            view[into] = values.reshape(len(values), *view.shape[2:])

    def expected(self, model: Model) -> list[np.ndarray]:
        """What the still poisoned buffers must hold after a transfer."""
        self.fill(model)
        wanted = [buffer.copy() for buffer in self.buffers]
        for buffer, poison in zip(self.buffers, self.poison, strict=True):
            buffer[:] = poison
        return wanted

    def party(self, first: int, last: int) -> Party:
        """This rank with the part of its block lists that ``[first, last)`` touches."""
        lists = []
        for group, ids in enumerate(self.blocks):
            begin, _ = touched_blocks(self.layout, group, self.first, self.last)
            start, stop = touched_blocks(self.layout, group, first, last)
            lists.append(ids[start - begin : stop - begin] if stop > start else ids[:0])
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
    """A model, prefill ranks, decode ranks and a range, all random, and always enough to serve."""
    rng = random.Random(seed)
    model = Model.random(rng)
    first = rng.choice((0, rng.randrange(model.tokens)))
    last = rng.choice((model.tokens, rng.randint(first + 1, model.tokens)))
    sent = (
        rng.choice((first, rng.randint(0, first))),
        rng.choice((last, rng.randint(last, model.tokens))),
    )
    sources = _side(rng, model, "prefill", *sent, most=8)
    destinations = _side(rng, model, "decode", first, last, most=3)
    for rank in destinations:
        if rng.random() < 0.3:
            for ids in rank.blocks:
                ids[[rng.random() < 0.3 for _ in ids]] = NO_BLOCK
    return Topology(model, sources, destinations, first, last)


def _side(
    rng: random.Random, model: Model, side: str, first: int, last: int, most: int
) -> list[Rank]:
    while True:
        tp, pp = rng.choice((1, 1, 2, 3, 4)), rng.choice((1, 1, 1, 2, 3))
        cp = rng.choice((1, 1, 1, 1, 2, 3, 4))
        if tp * pp * cp <= most and pp <= model.layers:
            break
    interleave = rng.choice((1, 2, 3, 4, 8))
    stages = sorted(rng.sample(range(1, model.layers), pp - 1))
    bounds = [0, *stages, model.layers]
    shards = [_shards(rng, kind.heads, tp) for kind in model.kinds]
    fixed = {kind: rng.choice(BLOCK_TOKENS) for kind in model.kinds} if rng.random() < 0.6 else {}
    return [
        make_rank(
            rng,
            model,
            f"{side}{t}.{stage}.{c}",
            layers=range(bounds[stage], bounds[stage + 1]),
            heads=[shard[t] for shard in shards],
            first=first,
            last=last,
            context=ContextShard(c, cp, interleave),
            block_tokens=fixed,
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
    context: ContextShard = WHOLE_CONTEXT,
    dims: str | None = None,
    block_tokens: dict[Kind, int] | None = None,
) -> Rank:
    """A rank with poisoned pools, in random layouts unless one is given, and shuffled block lists.

    ``heads`` has a shard a kind. Kinds of one block size share a layer group or do not, as chance
    will have it, so the two sides of a transfer number their groups differently.
    """
    held = context.tokens_before(last) - context.tokens_before(first)
    tensors: list[CacheTensor] = []
    buffers: list[np.ndarray] = []
    views: dict[tuple[int, str], np.ndarray] = {}
    groups: list[tuple[int, int]] = []
    noise = np.random.default_rng(rng.getrandbits(32))
    for kind, shard in zip(model.kinds, heads, strict=True):
        mine = tuple(layer for layer in kind.layers if layer in layers)
        if not mine:
            continue
        tokens = (block_tokens or {}).get(kind) or rng.choice(BLOCK_TOKENS)
        shared = [g for g, (size, _) in enumerate(groups) if size == tokens]
        group = rng.choice([len(groups), *shared])
        if group == len(groups):
            groups.append((tokens, held // tokens + rng.randint(2, 5)))
        chosen = dims or rng.choice(HEADED if kind.heads else HEADLESS)
        low = rng.choice([d for d in (1, 2, 4, 8) if kind.dim % d == 0])
        words = [word for axis in axes_of(chosen) for word in axis]
        sizes = {
            "block": groups[group][1],
            "token": tokens,
            "head": shard.count,
            "dim": kind.dim,
            "hi": kind.dim // low,
            "lo": low,
        }
        for some in [mine] if "layer" in words else [(layer,) for layer in mine]:
            for names in [kind.names] if "kv" in words else [(n,) for n in kind.names]:
                sizes |= {"layer": len(some), "kv": len(names)}
                buffer, array = _pool(rng, noise, chosen, sizes, DTYPES[kind.item_bytes])
                buffers.append(buffer)
                tensors += declare(
                    array,
                    chosen,
                    layers=some,
                    names=names,
                    heads=shard if "head" in words else None,
                    group=group,
                    block_tokens=tokens if "(block token)" in chosen else None,
                )
                views |= logical_views(array, chosen, sizes, some, names)
    layout = CacheLayout(tensors, context)
    blocks = []
    for group, (_, num_blocks) in enumerate(groups):
        start, stop = touched_blocks(layout, group, first, last)
        blocks.append(np.array(rng.sample(range(num_blocks), stop - start), np.int32))
    poison = [buffer.copy() for buffer in buffers]
    return Rank(name, layout, buffers, views, blocks, first, last, poison)


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
    axes = axes_of(dims)
    for axis in axes:
        length = int(np.prod([sizes[name] for name in axis]))
        may_pad = len(axis) == 1 and axis[0] in ("block", "head", "dim") and length > 1
        shape.append(length)
        padded.append(length + (rng.choice((0, 0, 0, 1, 2)) if may_pad else 0))
    nbytes = int(np.prod(padded)) * item
    buffer = noise.integers(0, 256, nbytes + 2 * GUARD_BYTES, dtype=np.uint8)
    lead = -buffer.ctypes.data % 16 + rng.choice((0, 0, 16, 1, 3)) * item
    whole = buffer[lead : lead + nbytes].view(dtype).reshape(padded)
    return buffer, whole[tuple(slice(0, n) for n in shape)]


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
        flat += axis
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


def elected_plans(
    topology: Topology, destination: Rank, salt: str, stream_layers: bool
) -> Iterator[tuple[Rank, TransferPlan]]:
    """The plan of every source that a receiver elects."""
    chosen = Election(topology.layouts, destination.layout).elect(salt)
    for rank in topology.sources:
        if chosen[rank.name] != ():
            yield (
                rank,
                compile_plan(
                    rank.layout,
                    destination.layout,
                    selection=chosen[rank.name],
                    stream_layers=stream_layers,
                ),
            )


def chunks_of(plan: TransferPlan, first: int, last: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """Wire ranges of the chunks that a sender would cut."""
    wire = plan.wire(first, last)
    out, start = [], 0
    while start < wire.total_bytes:
        stop = wire.cut(start, chunk_bytes)
        out.append((start, stop))
        start = stop
    return out


def ship(
    plan: TransferPlan,
    source: Rank,
    destination: Rank,
    first: int,
    last: int,
    chunk_bytes: int,
    tables: dict[str, np.ndarray] | None = None,
) -> int:
    """Move a plan's bytes chunk by chunk through poisoned staging, by the kernels' NumPy twins.

    Returns the payload bytes moved. ``tables`` replaces the plan's, for planted faults.
    """
    ours_at = LaneTable((tables or {}).get("source", plan.table("source")))
    theirs_at = LaneTable((tables or {}).get("destination", plan.table("destination")))
    held = block_table(source.layout, source.blocks, source.first, source.last, "source")
    wanted = block_table(
        destination.layout, destination.blocks, destination.first, destination.last, "destination"
    )
    wire = plan.wire(first, last)
    moved = 0
    for start, stop in chunks_of(plan, first, last, chunk_bytes):
        nbytes = stop - chunk_origin(start)
        room = np.full(GUARD_BYTES + 256 + chunk_bytes + GUARD_BYTES, 0xA5, np.uint8)
        lead = -room.ctypes.data % 256
        staging = room[lead : lead + nbytes]
        ours = wire.spans("source", start, stop, held.offsets)
        theirs = wire.spans("destination", start, stop, wanted.offsets)
        gather(ours_at, ours, held.ids, staging)
        assert (room[lead + nbytes :] == 0xA5).all(), "gather wrote behind its chunk"
        assert (room[: lead + start - chunk_origin(start)] == 0xA5).all(), "gather wrote before it"
        scatter(theirs_at, theirs, wanted.ids, staging)
        payload = [int((s[:, Span.LANES] * s[:, Span.UNITS] * s[:, Span.UNIT_BYTES]).sum())
                   for s in (ours, theirs)]  # fmt: skip
        assert payload[0] == payload[1]
        moved += payload[0]
    return moved
