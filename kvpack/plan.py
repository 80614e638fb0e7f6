"""Transfer plans: what two cache layouts have in common, compiled to address arithmetic.

A plan depends on the two layouts alone. It is compiled once per peer; a request adds its block ids
and its range of positions. The same table drives the kernels, their NumPy twins, the descriptors
of the direct path and the verifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpack.blocks import Blocks, BlockTable, block_table, check_held
from kvpack.columns import Row, Span
from kvpack.errors import CoverageError
from kvpack.fragments import Fragments, run_addresses
from kvpack.lanes import (
    MAX_LEVELS,
    Form,
    Lane,
    LaneClass,
    Residue,
    Side,
    check_compatible,
    merge_lanes,
    pair,
    residues,
    split_lane,
)
from kvpack.layout import CacheLayout, CacheTensor
from kvpack.wire import Wire


class Slice(NamedTuple):
    """Part of a plan that was elected: heads ``[first_head, last_head)`` of one name and layers.

    Attributes
    ----------
    name : str
        Name of the cache tensors.
    first_layer, last_layer : int
        Layer ids ``[first_layer, last_layer)``.
    first_head, last_head : int
        Global heads ``[first_head, last_head)``.
    """

    name: str
    first_layer: int
    last_layer: int
    first_head: int
    last_head: int


Selection = tuple[Slice, ...]


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Address arithmetic from one source cache layout to one destination cache layout.

    Attributes
    ----------
    source, destination : CacheLayout
        The two declarations.
    selection : tuple of Slice or None
        What was elected of it; None is everything in common.
    stream_layers : bool
        Whether lanes stay within a layer, so that a layer can leave when it is computed.
    classes : tuple of LaneClass
        In wire order.
    lanes : tuple of Lane
        In wire order, class after class.
    """

    source: CacheLayout
    destination: CacheLayout
    selection: Selection | None
    stream_layers: bool
    classes: tuple[LaneClass, ...]
    lanes: tuple[Lane, ...]

    @cached_property
    def _tables(self) -> dict[Side, npt.NDArray[np.int64]]:
        return {"source": self._table("source"), "destination": self._table("destination")}

    def table(self, side: Side) -> npt.NDArray[np.int64]:
        """Lane table of one side.

        Parameters
        ----------
        side : {"source", "destination"}
            Whose addresses.

        Returns
        -------
        ndarray of int64, shape (2 * lanes, len(Row)), read-only
            The full and the clipped form of each lane; columns as ``kvpack.columns.Row``.
        """
        return self._tables[side]

    def _table(self, side: Side) -> npt.NDArray[np.int64]:
        rows = [
            _row(lane, form, lane_class.residue, side)
            for lane_class in self.classes
            for lane in self.lanes_of(lane_class)
            for form in (lane.full, lane.clipped)
        ]
        table = np.array(rows, np.int64).reshape(-1, len(Row))
        table.flags.writeable = False
        return table

    def lanes_of(self, lane_class: LaneClass) -> tuple[Lane, ...]:
        """The lanes of one class, in wire order."""
        return self.lanes[lane_class.first_lane : lane_class.first_lane + lane_class.lanes]

    def wire(self, first: int, last: int, end: int | None = None) -> Wire:
        """The wire bytes of positions ``[first, last)`` of a request.

        Parameters
        ----------
        first, last : int
            Positions.
        end : int, optional
            Where the request ends, if not at ``last``: what windows and states are counted from.
        """
        return Wire(self.classes, first, last, last if end is None else end)

    def nbytes(self, first: int, last: int) -> int:
        """Bytes of cache that move for positions ``[first, last)``."""
        return self.wire(first, last).payload_bytes

    def fragments(
        self, source_blocks: Blocks, destination_blocks: Blocks, first: int, last: int
    ) -> Fragments:
        """Every fragment of a request, in wire order.

        Parameters
        ----------
        source_blocks, destination_blocks : array_like of int, or one per layer group
            Block lists as ``send`` and ``receive`` take them.
        first, last : int
            Positions.

        Returns
        -------
        Fragments
            Source and destination addresses and lengths.

        Raises
        ------
        BlockListError
            If a list does not fit its layout.
        """
        return self.fragments_between(
            block_table(self.source, source_blocks, first, last, "source"),
            block_table(self.destination, destination_blocks, first, last, "destination"),
            first,
            last,
        )

    def fragments_between(
        self, source: BlockTable, destination: BlockTable, first: int, last: int
    ) -> Fragments:
        """As ``fragments``, from block tables that may cover more than ``[first, last)``.

        The request ends where the destination's table does.
        """
        wire = self.wire(first, last, destination.last)
        check_held(self.source, source, wire.source_live, last, destination.last)
        parts: list[tuple[npt.NDArray[np.int64], ...]] = []
        spans = (
            wire.spans("source", 0, wire.total_bytes, source.offsets),
            wire.spans("destination", 0, wire.total_bytes, destination.offsets),
        )
        for ours, theirs in zip(*spans, strict=True):
            held = run_addresses(self.table("source"), ours, source.ids)
            to = run_addresses(self.table("destination"), theirs, destination.ids)
            run_bytes = self.table("source")[ours[Span.ROW], Row.RUN_BYTES]
            skip = to < 0
            if skip.any():
                held, to = held[~skip], to[~skip]
            parts.append((held, to, np.full(len(held), run_bytes, np.int64)))
        if not parts:
            empty = np.zeros(0, np.int64)
            return Fragments(empty, empty, empty)
        return Fragments(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def explain(self, first: int = 0, last: int | None = None) -> str:
        """Say in words what will move for positions ``[first, last)``.

        Parameters
        ----------
        first, last : int, optional
            Positions; one period of the largest unit unless given.
        """
        if not self.classes:
            return "Nothing moves: the two cache layouts have no layer, head or position in common."
        if last is None:
            last = first + max(c.residue.period for c in self.classes)
        wire = self.wire(first, last)
        lines = [
            f"Positions [{first}, {last}): {wire.payload_bytes:,} bytes in {len(self.lanes)} lanes"
            f"{', layer by layer' if self.stream_layers else ''}."
        ]
        for lane_class in self.classes:
            lanes = self.lanes_of(lane_class)
            form, residue = lanes[0].full, lane_class.residue
            layers = _intervals(layer for lane in lanes for layer in lane.layers)
            heads = _intervals(h for lane in lanes for h in range(*lane.heads))
            names = ", ".join(sorted({name for lane in lanes for name in lane.names}))
            every = (
                ""
                if residue.period == residue.unit_tokens
                else f", every {residue.period} positions from {residue.p0}"
            )
            group = self.destination.groups[lane_class.destination_group]
            window = "" if group.window is None else f", the last {group.window} of a request"
            units = (
                f"blocks of {lanes[0].source.block_tokens} tokens to blocks of "
                f"{lanes[0].destination.block_tokens}; units of {residue.unit_tokens} positions"
                f"{every}{window}, each"
            )
            lines.append(
                f"  {names} of layers {layers}, heads {heads}: "
                f"{'one slot a request,' if group.state else units} "
                f"{form.fragments} fragment(s) of {form.run_bytes:,} bytes; accesses "
                f"of {lane_class.source_widths[0]} bytes to gather and "
                f"{lane_class.destination_widths[0]} to scatter."
            )
        return "\n".join(lines)


def compile_plan(
    source: CacheLayout,
    destination: CacheLayout,
    *,
    selection: Selection | None = None,
    stream_layers: bool = False,
) -> TransferPlan:
    """Compile what two cache layouts have in common.

    Parameters
    ----------
    source, destination : CacheLayout
        The rank that has the cache and the rank that wants it.
    selection : tuple of Slice, optional
        What the receiver elected of this source; everything in common unless given.
    stream_layers : bool
        Keep lanes within one layer.

    Returns
    -------
    TransferPlan
        Possibly without lanes, where the two have nothing in common.

    Raises
    ------
    IncompatibleLayoutsError
        If both declare a cache tensor and disagree on dtype, inner shape or number of heads.
    CoverageError
        If the selection names something that the two do not have in common.
    """
    pieces = list(_common(source, destination))
    if selection is not None:
        pieces = list(_selected(pieces, selection))
    found = [
        (residue, lane)
        for residue, lanes in _by_residue(source, destination, pieces)
        for merged in merge_lanes(lanes, across_layers=not stream_layers)
        for lane in split_lane(merged)
    ]
    found.sort(key=partial(_wire_key, stream_layers=stream_layers))
    classes: list[LaneClass] = []
    first_lane = 0
    for kind, members in groupby(found, key=_kind):
        lanes = len(list(members))
        classes.append(replace(kind, first_lane=first_lane, lanes=lanes))
        first_lane += lanes
    return TransferPlan(
        source,
        destination,
        selection,
        stream_layers,
        tuple(classes),
        tuple(lane for _, lane in found),
    )


def check_layouts(source: CacheLayout, destination: CacheLayout) -> None:
    """Refuse two layouts that declare a cache tensor differently, or positions beyond pairing.

    Raises
    ------
    IncompatibleLayoutsError
        Naming the cache tensor, both declarations and the mend.
    """
    theirs = {(t.layer, t.name): t for t in destination.tensors}
    pairs: dict[tuple[int, int], tuple[CacheTensor, CacheTensor]] = {}
    for tensor in source.tensors:
        other = theirs.get((tensor.layer, tensor.name))
        if other is not None:
            check_compatible(tensor, other)
            pairs[tensor.group, other.group] = (tensor, other)
    for tensor, other in pairs.values():
        _residues(source, tensor, destination, other)


Piece = tuple[CacheTensor, CacheTensor, int, int]


def _common(source: CacheLayout, destination: CacheLayout) -> Iterator[Piece]:
    """Cache tensors of both, with the heads that both hold."""
    held = {(t.layer, t.name): t for t in source.tensors}
    for wanted in destination.tensors:
        tensor = held.get((wanted.layer, wanted.name))
        if tensor is None:
            continue
        check_compatible(tensor, wanted)
        start = max(tensor.heads.start, wanted.heads.start)
        stop = min(tensor.heads.stop, wanted.heads.stop)
        if start < stop:
            yield tensor, wanted, start, stop


def _selected(pieces: Sequence[Piece], selection: Selection) -> Iterator[Piece]:
    """The parts of the pieces that a selection names."""
    for part in selection:
        hits = 0
        for tensor, wanted, start, stop in pieces:
            if tensor.name != part.name or not part.first_layer <= tensor.layer < part.last_layer:
                continue
            if not start <= part.first_head < part.last_head <= stop:
                continue
            hits += 1
            yield tensor, wanted, part.first_head, part.last_head
        if not hits:
            raise CoverageError(
                f"the elected heads [{part.first_head}, {part.last_head}) of {part.name!r} in "
                f"layers [{part.first_layer}, {part.last_layer}) are not what source and "
                "destination have in common; elect again from the layouts as they are now"
            )


def _by_residue(
    source: CacheLayout, destination: CacheLayout, pieces: Sequence[Piece]
) -> Iterator[tuple[Residue, list[Lane]]]:
    def kind(piece: Piece) -> tuple[bool, int, int, int]:
        tensor, wanted, _, _ = piece
        return tensor.state, wanted.window or 0, tensor.block_tokens, wanted.block_tokens

    for _, alike in groupby(sorted(pieces, key=kind), key=kind):
        members = list(alike)
        tensor, wanted, _, _ = members[0]
        for residue in _residues(source, tensor, destination, wanted):
            yield (
                residue,
                [
                    pair(tensor, wanted, (start, stop), residue.unit_tokens)
                    for tensor, wanted, start, stop in members
                ],
            )


def _residues(
    source: CacheLayout, tensor: CacheTensor, destination: CacheLayout, wanted: CacheTensor
) -> Iterator[Residue]:
    """The positions that two ranks share of a pair of cache tensors."""
    contexts = [
        layout.context_of(t.group) for layout, t in ((source, tensor), (destination, wanted))
    ]
    shared = residues(contexts[0], tensor.block_tokens, contexts[1], wanted.block_tokens)
    return (replace(residue, window=wanted.window) for residue in shared)


def _kind(found: tuple[Residue, Lane]) -> LaneClass:
    """The class that a lane belongs to, its place in the wire order left open."""
    residue, lane = found
    full, clipped = lane.full, lane.clipped
    return LaneClass(
        residue=residue,
        source_group=lane.source_group,
        destination_group=lane.destination_group,
        token_bytes=lane.token_bytes,
        first_lane=0,
        lanes=0,
        source_widths=(lane.width("source", full), lane.width("source", clipped)),
        destination_widths=(lane.width("destination", full), lane.width("destination", clipped)),
        full_counts=_counts(full),
        clipped_counts=_counts(clipped),
    )


def _wire_key(found: tuple[Residue, Lane], *, stream_layers: bool) -> tuple[object, ...]:
    """Canonical order: layer groups, class, layers; bases only break ties between split lanes.

    Where layers are to leave one by one, the layer comes first.
    """
    kind, lane = _kind(found), found[1]
    return (
        lane.layers if stream_layers else (),
        (kind.destination_group, kind.source_group, kind.residue.p0, kind.residue.unit_tokens),
        (kind.token_bytes, kind.source_widths, kind.destination_widths),
        (kind.full_counts, kind.clipped_counts),
        (lane.layers, lane.names, lane.heads, lane.destination.base, lane.source.base),
    )


def _counts(form: Form) -> tuple[int, ...]:
    return (*(axis.count for axis in form.levels), form.run_bytes)


def _row(lane: Lane, form: Form, residue: Residue, side: Side) -> list[int]:
    here = lane.source if side == "source" else lane.destination
    levels = [(axis.count, axis.on(side)) for axis in form.levels]
    padded = [(1, 0)] * (MAX_LEVELS - len(levels)) + levels
    values = {
        Row.BASE: here.base,
        Row.BLOCK_STRIDE: here.block_stride,
        Row.BLOCK_TOKENS: here.block_tokens,
        Row.TOKEN_STRIDE: here.token_stride,
        Row.PHASE: residue.source_phase if side == "source" else residue.destination_phase,
        Row.STEP: residue.source_step if side == "source" else residue.destination_step,
        Row.RUN_BYTES: form.run_bytes,
        Row.TOKEN_BYTES: lane.token_bytes,
    }
    for (count, stride), columns in zip(
        padded,
        ((Row.COUNT0, Row.STRIDE0), (Row.COUNT1, Row.STRIDE1), (Row.COUNT2, Row.STRIDE2)),
        strict=True,
    ):
        values[columns[0]], values[columns[1]] = count, stride
    return [values[column] for column in Row]


def _intervals(values: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    ordered = sorted(set(values))
    runs = [
        [value for _, value in run]
        for _, run in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
