"""The wire order of one request: where each byte travels, where chunks may be cut, what to launch.

A plan's wire order is canonical: lane class after lane class, lane after lane, position after
position. Within a lane the positions of a request are adjacent, so an offset counts tokens. A lane
class begins at a multiple of ``WIRE_ALIGNMENT`` bytes; what is skipped there carries nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod

import numpy as np
import numpy.typing as npt

from kvpack.columns import Span
from kvpack.errors import StagingError
from kvpack.lanes import MAX_WIDTH, LaneClass, Side
from kvpack.layout import live_from

WIRE_ALIGNMENT = 16
"""Lane classes begin, and chunks are placed in staging, at multiples of so many bytes."""


def chunk_origin(wire_first: int) -> int:
    """Wire offset that lies at the start of the staging memory of a chunk from ``wire_first``."""
    return wire_first // WIRE_ALIGNMENT * WIRE_ALIGNMENT


@dataclass(frozen=True)
class _Stretch:
    """A lane class within a request: its wire bytes and its tokens."""

    lane_class: LaneClass
    start: int
    first_token: int
    tokens: int

    @property
    def lane_bytes(self) -> int:
        return self.tokens * self.lane_class.token_bytes

    @property
    def stop(self) -> int:
        return self.start + self.lane_class.lanes * self.lane_bytes


@dataclass(frozen=True)
class Wire:
    """The wire bytes of positions ``[first, last)`` of a plan.

    Attributes
    ----------
    classes : tuple of LaneClass
        The plan's, in wire order.
    first, last : int
        Positions.
    end : int
        Where the whole request ends, of which they are a part: windows are counted from there.
    """

    classes: tuple[LaneClass, ...]
    first: int
    last: int
    end: int

    @cached_property
    def _stretches(self) -> tuple[_Stretch, ...]:
        out: list[_Stretch] = []
        end = 0
        for lane_class in self.classes:
            before, tokens = lane_class.residue.tokens(self.first, self.last, self.end)
            if tokens:
                start = -(-end // WIRE_ALIGNMENT) * WIRE_ALIGNMENT
                out.append(_Stretch(lane_class, start, before, tokens))
                end = out[-1].stop
        return tuple(out)

    @property
    def total_bytes(self) -> int:
        """Length of the wire range, alignment between lane classes included."""
        return self._stretches[-1].stop if self._stretches else 0

    @cached_property
    def source_live(self) -> dict[int, int]:
        """Per layer group of the source that anything travels of, the first such position."""
        live: dict[int, int] = {}
        for stretch in self._stretches:
            group, window = stretch.lane_class.source_group, stretch.lane_class.residue.window
            first = live_from(window, self.first, self.end)
            live[group] = min(first, live.get(group, first))
        return live

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of cache that travel."""
        return sum(s.stop - s.start for s in self._stretches)

    @cached_property
    def piece_bytes(self) -> int:
        """Staging bytes that hold one token of any lane, wherever a chunk begins."""
        tokens = [s.lane_class.token_bytes for s in self._stretches]
        return max(tokens) + WIRE_ALIGNMENT if tokens else 0

    @cached_property
    def fragments(self) -> int:
        """Runs of bytes contiguous on both sides: what an unpacked transfer would post."""
        return sum(
            s.lane_class.lanes * runs * form
            for s in self._stretches
            for _, units, _, tokens in _unit_pieces(
                s.first_token, s.first_token + s.tokens, s.lane_class.residue.unit_tokens
            )
            for runs, form in [
                (units, prod(s.lane_class.full_counts[:-1]))
                if tokens == s.lane_class.residue.unit_tokens
                else (tokens, prod(s.lane_class.clipped_counts[:-1]))
            ]
        )

    def cut(self, start: int, max_bytes: int) -> int:
        """End of the largest chunk from ``start`` that fits in ``max_bytes`` of staging.

        Parameters
        ----------
        start : int
            Wire offset where the chunk begins; zero, or where another chunk ended.
        max_bytes : int
            Staging bytes there are for it.

        Returns
        -------
        int
            Wire offset, after ``start``: at the end of a unit where one fits, else of a token.

        Raises
        ------
        StagingError
            If not even one token of the lane at ``start`` fits.
        """
        limit = chunk_origin(start) + max_bytes
        if limit >= self.total_bytes:
            return self.total_bytes
        i = bisect_right([s.start for s in self._stretches], limit) - 1
        stretch = self._stretches[i]
        token_bytes = stretch.lane_class.token_bytes
        lane, token = divmod((limit - stretch.start) // token_bytes, stretch.tokens)
        unit_tokens = stretch.lane_class.residue.unit_tokens
        whole = (stretch.first_token + token) // unit_tokens * unit_tokens - stretch.first_token
        for tokens in (max(whole, 0), token):
            end = min(stretch.start + (lane * stretch.tokens + tokens) * token_bytes, stretch.stop)
            if end > start:
                return end
        raise StagingError(
            f"one token of a lane has {token_bytes} bytes, but a chunk of {max_bytes} bytes is all "
            f"that staging allows; give the staging buffers at least "
            f"{token_bytes + WIRE_ALIGNMENT} bytes a pool"
        )

    def is_boundary(self, offset: int) -> bool:
        """Whether a chunk may begin or end at a wire offset."""
        for stretch in self._stretches:
            if stretch.start <= offset <= stretch.stop:
                return (offset - stretch.start) % stretch.lane_class.token_bytes == 0
        return offset == 0

    def spans(
        self, side: Side, wire_first: int, wire_last: int, block_offsets: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        """What one launch copies for the chunk ``[wire_first, wire_last)`` on one side.

        Parameters
        ----------
        side : {"source", "destination"}
            Whose cache is read or written.
        wire_first, wire_last : int
            Boundaries that ``cut`` gave.
        block_offsets : sequence of int
            Per layer group of that side, from ``BlockTable.offsets``.

        Returns
        -------
        ndarray of int64, shape (n, len(Span))
            One row a span; columns as ``kvpack.columns.Span``.
        """
        origin = chunk_origin(wire_first)
        rows = [
            row
            for stretch in self._stretches
            for row in _stretch_spans(stretch, side, wire_first, wire_last, origin, block_offsets)
        ]
        return np.array(rows, np.int64).reshape(-1, len(Span))


def _stretch_spans(
    stretch: _Stretch,
    side: Side,
    wire_first: int,
    wire_last: int,
    origin: int,
    block_offsets: Sequence[int],
) -> Iterator[list[int]]:
    lane_class = stretch.lane_class
    start, stop = max(wire_first, stretch.start), min(wire_last, stretch.stop)
    if start >= stop:
        return
    token_bytes = lane_class.token_bytes
    unit_tokens = lane_class.residue.unit_tokens
    group = lane_class.source_group if side == "source" else lane_class.destination_group
    full_width, clipped_width = lane_class.widths_of(side)
    cells = ((start - stretch.start) // token_bytes, (stop - stretch.start) // token_bytes)
    for lane, lanes, begin, end in _lane_pieces(*cells, stretch.tokens):
        for unit, units, token, tokens in _unit_pieces(
            stretch.first_token + begin, stretch.first_token + end, unit_tokens
        ):
            full = tokens == unit_tokens
            sent = unit * unit_tokens + token - stretch.first_token
            offset = stretch.start + lane * stretch.lane_bytes + sent * token_bytes - origin
            pitch = stretch.lane_bytes if lanes > 1 else 0
            row = {
                Span.ROW: 2 * (lane_class.first_lane + lane) + (0 if full else 1),
                Span.LANES: lanes,
                Span.UNIT: unit,
                Span.UNITS: units,
                Span.TOKEN: token,
                Span.TOKENS: tokens,
                Span.BLOCKS: block_offsets[group],
                Span.OFFSET: offset,
                Span.LANE_PITCH: pitch,
                Span.UNIT_BYTES: tokens * token_bytes,
                Span.WIDTH: gcd(
                    MAX_WIDTH,
                    full_width if full else clipped_width,
                    offset,
                    pitch,
                    tokens * token_bytes,
                ),
                Span.FORM: 0 if full else 1,
            }
            yield [row[column] for column in Span]


def _lane_pieces(start: int, stop: int, tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a run of (lane, token) cells into (lane, lanes, first token, last token) boxes."""
    lane, begin = divmod(start, tokens)
    last_lane, end = divmod(stop, tokens)
    if lane == last_lane:
        yield lane, 1, begin, end
        return
    if begin:
        yield lane, 1, begin, tokens
        lane += 1
    if last_lane > lane:
        yield lane, last_lane - lane, 0, tokens
    if end:
        yield last_lane, 1, 0, end


def _unit_pieces(start: int, stop: int, unit_tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut tokens into (unit, units, first token, tokens): a clipped unit, full ones, a clipped."""
    unit, token = divmod(start, unit_tokens)
    last_unit, rest = divmod(stop, unit_tokens)
    if token and unit == last_unit:
        yield unit, 1, token, rest - token
        return
    if token:
        yield unit, 1, token, unit_tokens - token
        unit += 1
    if last_unit > unit:
        yield unit, last_unit - unit, 0, unit_tokens
    if rest:
        yield last_unit, 1, 0, rest
