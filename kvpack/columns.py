"""Columns of the two int64 tables in which a transfer plan reaches the kernels.

A plan gives each side a lane table (:class:`Row`), fixed for the life of a connection, and each
chunk a short table of spans (:class:`Span`). Byte ``e`` of lane ``i`` of a span lies here, with
``r = table[span.ROW + 2 * i]``::

    unit, w  = divmod(e, span.UNIT_BYTES)
    t        = r.PHASE + (span.UNIT + unit) * r.STEP + span.TOKEN
    block    = ids[t // r.BLOCK_TOKENS + span.BLOCKS]
    q, o     = divmod(w, r.RUN_BYTES)
    q, i2    = divmod(q, r.COUNT2)
    q, i1    = divmod(q, r.COUNT1)
    token, i0 = divmod(q, r.COUNT0)
    cache    = (r.BASE + block * r.BLOCK_STRIDE + (t % r.BLOCK_TOKENS + token) * r.TOKEN_STRIDE
                + i0 * r.STRIDE0 + i1 * r.STRIDE1 + i2 * r.STRIDE2 + o)
    staged   = staging + span.OFFSET + i * span.LANE_PITCH + e

Addresses, strides, offsets and pitches are bytes. A negative block id holds nothing, and its
bytes are skipped.
"""

from __future__ import annotations

from enum import IntEnum


class Row(IntEnum):
    """Columns of a lane table.

    A lane has two adjacent rows: its full form (levels in merged order, the token axis among
    them where it is not part of the run) and its clipped form (tokens outermost).
    """

    BASE = 0
    """Address of block 0, token 0, first element of the lane's slice."""
    BLOCK_STRIDE = 1
    BLOCK_TOKENS = 2
    TOKEN_STRIDE = 3
    PHASE = 4
    """Local index of unit 0's first token."""
    STEP = 5
    """Local tokens from one unit to the next."""
    COUNT0 = 6
    """Outermost of three levels. An absent level has count 1 and stride 0."""
    STRIDE0 = 7
    COUNT1 = 8
    STRIDE1 = 9
    COUNT2 = 10
    STRIDE2 = 11
    RUN_BYTES = 12
    """Bytes that are contiguous on both sides."""
    TOKEN_BYTES = 13
    """Bytes of one token of the lane."""


class Span(IntEnum):
    """Columns of a span table: a row is a range of units of adjacent lanes of one lane class."""

    ROW = 0
    """Lane table row of the first lane; the next lanes' rows follow at a distance of two."""
    LANES = 1
    UNIT = 2
    """Index of the first unit."""
    UNITS = 3
    TOKEN = 4
    """First token inside the unit; 0 in the full form."""
    TOKENS = 5
    """Tokens of each unit: all of them in the full form, which alone may have several units."""
    BLOCKS = 6
    """What to add to ``t // BLOCK_TOKENS`` to index the request's block ids; may be negative."""
    OFFSET = 7
    """Staging offset of the first lane's first byte."""
    LANE_PITCH = 8
    """Staging bytes from one lane to the next."""
    UNIT_BYTES = 9
    """``TOKENS * TOKEN_BYTES``; a lane's units are adjacent in staging."""
    WIDTH = 10
    """Widest access, 16, 8, 4, 2 or 1 bytes, that every address of the span is a multiple of."""
    FORM = 11
    """0 for the full form, 1 for the clipped form."""
