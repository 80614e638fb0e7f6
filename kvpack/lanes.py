"""Lanes: what two cache tensors have in common, as affine axes, coalesced and merged.

A lane pairs a slice of a source cache tensor with the same slice of a destination cache tensor. Its
axes carry a stride on each side; neighbouring axes that are contiguous on both sides become one,
and so do neighbouring lanes (K with V, layer with layer). All of it is integer arithmetic on the
two declarations, so both peers reach the same lanes in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, lcm, prod
from typing import Literal

from kvpack.errors import IncompatibleLayoutsError
from kvpack.layout import CacheTensor, live_from
from kvpack.shards import ContextShard

Side = Literal["source", "destination"]

MAX_LEVELS = 3
MAX_WIDTH = 16
MAX_RESIDUES = 1 << 12


@dataclass(frozen=True)
class PairAxis:
    """An axis that both sides share: its count, and its stride in bytes on either side."""

    count: int
    source: int
    destination: int

    def on(self, side: Side) -> int:
        """Stride on one side."""
        return self.source if side == "source" else self.destination


@dataclass(frozen=True)
class Form:
    """The axes of a piece of a lane after coalescing: levels around one contiguous run.

    Attributes
    ----------
    levels : tuple of PairAxis
        Outermost first.
    run_bytes : int
        Bytes that are contiguous on both sides.
    """

    levels: tuple[PairAxis, ...]
    run_bytes: int

    @property
    def fragments(self) -> int:
        """How many runs the piece has."""
        return prod(axis.count for axis in self.levels)


@dataclass(frozen=True)
class LaneSide:
    """Where a lane lies on one side; strides in bytes."""

    base: int
    block_stride: int
    block_tokens: int
    token_stride: int


@dataclass(frozen=True)
class Lane:
    """A pair of a source slice and a destination slice.

    Attributes
    ----------
    layers : tuple of int
        Global layer ids that the lane carries.
    names : tuple of str
        Names of the cache tensors it carries.
    heads : tuple of int
        The heads ``[start, stop)``.
    source_group, destination_group : int
        Layer groups whose block lists address it.
    source, destination : LaneSide
        Addresses.
    axes : tuple of PairAxis
        All axes but blocks and tokens, not coalesced; bytes of an element last.
    unit_tokens : int
        Positions that both sides address as one piece.
    """

    layers: tuple[int, ...]
    names: tuple[str, ...]
    heads: tuple[int, int]
    source_group: int
    destination_group: int
    source: LaneSide
    destination: LaneSide
    axes: tuple[PairAxis, ...]
    unit_tokens: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one position."""
        return prod(axis.count for axis in self.axes)

    @cached_property
    def full(self) -> Form:
        """A whole unit: tokens are an axis like the others and merge with them."""
        token = PairAxis(self.unit_tokens, self.source.token_stride, self.destination.token_stride)
        return coalesce((*self.axes, token))

    @cached_property
    def clipped(self) -> Form:
        """One position of a clipped unit; tokens stay outside."""
        return coalesce(self.axes)

    def width(self, side: Side, form: Form) -> int:
        """Widest access in bytes that every address of the form on a side allows, at most 16."""
        here = self.source if side == "source" else self.destination
        terms = [here.base, here.block_stride, form.run_bytes]
        if here.block_tokens > 1:
            terms.append(here.token_stride)
        terms += [axis.on(side) for axis in form.levels]
        return gcd(MAX_WIDTH, *terms)


@dataclass(frozen=True)
class Residue:
    """A class of positions that a source rank and a destination rank both hold.

    Unit ``j`` covers the ``unit_tokens`` positions from ``p0 + j * period``; on a side it begins at
    local token ``phase + j * step``. Without context parallelism there is one residue, with
    ``period == unit_tokens`` and ``p0 == 0``. Of a request only the last ``window`` positions
    travel, all of them if that is None; a state is a window of one.
    """

    unit_tokens: int
    period: int
    p0: int
    source_phase: int
    source_step: int
    destination_phase: int
    destination_step: int
    window: int | None = None

    def tokens(self, first: int, last: int, end: int) -> tuple[int, int]:
        """What travels of positions ``[first, last)`` of a request that ends at ``end``.

        Returns
        -------
        tuple of (int, int)
            Positions of the residue before it, and in it.
        """
        before = self.tokens_before(min(live_from(self.window, first, end), last))
        return before, self.tokens_before(last) - before

    def tokens_before(self, position: int) -> int:
        """How many positions of the residue lie below ``position``."""
        if position <= self.p0:
            return 0
        periods, rest = divmod(position - self.p0, self.period)
        return periods * self.unit_tokens + min(rest, self.unit_tokens)


@dataclass(frozen=True)
class LaneClass:
    """Lanes that are addressed alike and lie next to each other in the wire order.

    Attributes
    ----------
    residue : Residue
        Positions that the lanes carry.
    source_group, destination_group : int
        Layer groups whose block lists address them.
    token_bytes : int
        Bytes of one position of one lane.
    first_lane, lanes : int
        They are lanes ``[first_lane, first_lane + lanes)`` of the plan.
    source_widths, destination_widths : tuple of int
        Widest access in bytes for whole and for clipped units.
    full_counts, clipped_counts : tuple of int
        Counts of the levels and, last, the bytes of the run, of the two forms.
    """

    residue: Residue
    source_group: int
    destination_group: int
    token_bytes: int
    first_lane: int
    lanes: int
    source_widths: tuple[int, int]
    destination_widths: tuple[int, int]
    full_counts: tuple[int, ...]
    clipped_counts: tuple[int, ...]

    def widths_of(self, side: Side) -> tuple[int, int]:
        """Access widths of whole and of clipped units on one side."""
        return self.source_widths if side == "source" else self.destination_widths


def residues(
    source: ContextShard, source_tokens: int, destination: ContextShard, destination_tokens: int
) -> tuple[Residue, ...]:
    """Positions that two ranks share, as arithmetic progressions of units.

    Parameters
    ----------
    source, destination : ContextShard
        Positions held by either side.
    source_tokens, destination_tokens : int
        Tokens a block on either side.

    Raises
    ------
    IncompatibleLayoutsError
        If there would be more than ``MAX_RESIDUES`` of them.
    """
    split = [shard for shard in (source, destination) if shard.ranks > 1]
    unit = gcd(source_tokens, destination_tokens, *(shard.interleave for shard in split))
    period = lcm(unit, *(shard.interleave * shard.ranks for shard in split))
    if period // unit > MAX_RESIDUES:
        raise IncompatibleLayoutsError(
            f"context parallelism of {source} and {destination} with blocks of {source_tokens} and "
            f"{destination_tokens} tokens repeats after {period // unit} stretches of positions, "
            f"more than {MAX_RESIDUES}; choose smaller interleaves, or such as divide each other"
        )
    return tuple(
        Residue(
            unit,
            period,
            p0,
            source.tokens_before(p0),
            source.tokens_before(p0 + period) - source.tokens_before(p0),
            destination.tokens_before(p0),
            destination.tokens_before(p0 + period) - destination.tokens_before(p0),
        )
        for p0 in range(0, period, unit)
        if source.holds(p0) and destination.holds(p0)
    )


def coalesce(axes: Iterable[PairAxis]) -> Form:
    """Order axes as they lie at the destination and merge those contiguous on both sides."""
    ordered = sorted(
        (axis for axis in axes if axis.count > 1),
        key=lambda axis: (axis.destination, axis.source),
        reverse=True,
    )
    merged: list[PairAxis] = []
    for axis in ordered:
        outer = merged[-1] if merged else None
        if (
            outer is not None
            and outer.source == axis.count * axis.source
            and outer.destination == axis.count * axis.destination
        ):
            merged[-1] = PairAxis(outer.count * axis.count, axis.source, axis.destination)
        else:
            merged.append(axis)
    if merged and merged[-1].source == merged[-1].destination == 1:
        return Form(tuple(merged[:-1]), merged[-1].count)
    return Form(tuple(merged), 1)


def pair(
    source: CacheTensor, destination: CacheTensor, heads: tuple[int, int], unit_tokens: int
) -> Lane:
    """The lane over heads ``[start, stop)`` between two compatible declarations of a tensor."""
    start, stop = heads
    inner = _refine(source, destination)
    return Lane(
        layers=(source.layer,),
        names=(source.name,),
        heads=heads,
        source_group=source.group,
        destination_group=destination.group,
        source=_side(source, start),
        destination=_side(destination, start),
        axes=(
            PairAxis(stop - start, source.head_stride, destination.head_stride),
            *inner,
            PairAxis(source.item_bytes, 1, 1),
        ),
        unit_tokens=unit_tokens,
    )


def check_compatible(source: CacheTensor, destination: CacheTensor) -> None:
    """Refuse two declarations of one cache tensor that disagree.

    Raises
    ------
    IncompatibleLayoutsError
        Naming the tensor, both declarations and the mend.
    """
    for what, ours, theirs in (
        ("dtype", source.dtype, destination.dtype),
        ("elements a token and head", source.inner_items, destination.inner_items),
        ("heads in the model", source.heads.total, destination.heads.total),
        ("one slot a request", source.state, destination.state),
    ):
        if ours != theirs:
            raise IncompatibleLayoutsError(
                f"{source.title}: the source declares {what} = {ours}, the destination {theirs}; "
                "both sides must serve the same model with the same cache format"
            )
    names = source.inner_names, destination.inner_names
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        raise IncompatibleLayoutsError(
            f"{source.title}: the source counts its elements by ({', '.join(names[0])}), the "
            f"destination by ({', '.join(names[1])}); declare a transposed view on one side"
        )
    _refine(source, destination)


def _side(tensor: CacheTensor, head: int) -> LaneSide:
    return LaneSide(
        base=tensor.address + (head - tensor.heads.start) * tensor.head_stride,
        block_stride=tensor.block_stride,
        block_tokens=tensor.block_tokens,
        token_stride=tensor.token_stride,
    )


def _refine(source: CacheTensor, destination: CacheTensor) -> list[PairAxis]:
    """Inner axes of both sides, cut into axes that both can step through."""
    ours, theirs = list(source.inner), list(destination.inner)
    out: list[PairAxis] = []
    while ours and theirs:
        (n, s), (m, d) = ours.pop(), theirs.pop()
        count = min(n, m)
        if n % count or m % count:
            raise IncompatibleLayoutsError(
                f"{source.title}: inner axes {_sizes(source)} of the source and "
                f"{_sizes(destination)} of the destination have no common subdivision; cut the "
                "inner axes of one side at multiples of the other's"
            )
        out.append(PairAxis(count, s, d))
        if n > count:
            ours.append((n // count, s * count))
        if m > count:
            theirs.append((m // count, d * count))
    return out[::-1]


def _sizes(tensor: CacheTensor) -> tuple[int, ...]:
    return tuple(count for count, _ in tensor.inner)


def merge_lanes(lanes: Sequence[Lane], *, across_layers: bool) -> list[Lane]:
    """Join lanes that continue each other on both sides: K with V, then layer with layer.

    Parameters
    ----------
    lanes : sequence of Lane
        One per cache tensor.
    across_layers : bool
        Whether layers may be joined, too.
    """
    merged = _merge(lanes, lambda lane: lane.layers)
    return _merge(merged, lambda lane: lane.names) if across_layers else merged


def _merge(lanes: Sequence[Lane], same: Callable[[Lane], tuple[object, ...]]) -> list[Lane]:
    """Join chains of lanes of one shape whose addresses advance alike, where runs grow by it."""

    def shape(lane: Lane) -> tuple[object, ...]:
        sides = (lane.source, lane.destination)
        strides = tuple((s.block_stride, s.block_tokens, s.token_stride) for s in sides)
        groups = (lane.source_group, lane.destination_group)
        return (*groups, lane.heads, lane.unit_tokens, strides, same(lane), lane.axes)

    families: dict[tuple[object, ...], list[Lane]] = {}
    for lane in lanes:
        families.setdefault(shape(lane), []).append(lane)
    out: list[Lane] = []
    for family in families.values():
        family.sort(key=lambda lane: (lane.destination.base, lane.source.base))
        start = 0
        while start < len(family):
            stop = _chain(family, start)
            joined = _join(family[start:stop])
            if len(joined) > 1:
                # The last lane of a chain that does not pay may begin one that does.
                joined, stop = joined[:-1], stop - 1
            out.extend(joined)
            start = stop
    return out


def _chain(family: Sequence[Lane], start: int) -> int:
    """End of the longest chain from ``start`` whose bases advance by the same two steps."""
    stop = start + 1
    while stop < len(family) and _step(family, stop) == _step(family, start + 1):
        stop += 1
    return stop


def _step(family: Sequence[Lane], i: int) -> tuple[int, int]:
    before, here = family[i - 1], family[i]
    return (
        here.source.base - before.source.base,
        here.destination.base - before.destination.base,
    )


def _join(chain: Sequence[Lane]) -> Sequence[Lane]:
    """The chain as one lane if that makes fewer fragments, else the chain."""
    if len(chain) < 2:
        return chain
    source, destination = _step(chain, 1)
    first = chain[0]
    joined = replace(
        first,
        layers=tuple(sorted({layer for lane in chain for layer in lane.layers})),
        names=tuple(sorted({name for lane in chain for name in lane.names})),
        axes=(PairAxis(len(chain), source, destination), *first.axes),
    )
    if min(source, destination) <= 0 or joined.full.fragments >= len(chain) * first.full.fragments:
        return chain
    return [joined]


def split_lane(lane: Lane) -> list[Lane]:
    """Cut off outer axes until both forms have at most three levels."""
    if max(len(lane.full.levels), len(lane.clipped.levels)) <= MAX_LEVELS:
        return [lane]
    outer = max(
        (axis for axis in lane.axes if axis.count > 1), key=lambda a: (a.destination, a.source)
    )
    rest = list(lane.axes)
    rest.remove(outer)
    return [
        part
        for i in range(outer.count)
        for part in split_lane(
            replace(
                lane,
                source=replace(lane.source, base=lane.source.base + i * outer.source),
                destination=replace(
                    lane.destination, base=lane.destination.base + i * outer.destination
                ),
                axes=tuple(rest),
            )
        )
    ]
