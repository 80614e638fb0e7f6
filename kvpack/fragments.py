"""Fragments: the contiguous runs of a request, from a plan's tables and the block ids."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpack.columns import Row, Span


class Fragments(NamedTuple):
    """Runs of bytes that are contiguous on both sides: descriptors of an unpacked transfer.

    Attributes
    ----------
    source, destination : ndarray of int64, shape (n,)
        Byte addresses.
    nbytes : ndarray of int64, shape (n,)
        Length of each.
    """

    source: npt.NDArray[np.int64]
    destination: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]

    def merged(self) -> Fragments:
        """Join neighbours in wire order that continue each other on both sides."""
        if not len(self.nbytes):
            return self
        ends = self.nbytes[:-1]
        joins = (self.source[1:] == self.source[:-1] + ends) & (
            self.destination[1:] == self.destination[:-1] + ends
        )
        heads = np.flatnonzero(np.concatenate(([True], ~joins)))
        return Fragments(
            self.source[heads], self.destination[heads], np.add.reduceat(self.nbytes, heads)
        )


def run_addresses(
    table: npt.NDArray[np.int64], span: npt.NDArray[np.int64], ids: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Addresses of the runs of a span in wire order.

    Parameters
    ----------
    table : ndarray of int64, shape (rows, len(Row))
        Lane table of one side.
    span : ndarray of int64, shape (len(Span),)
        One row of that side's spans.
    ids : ndarray of int32
        Block ids of the request.

    Returns
    -------
    ndarray of int64, shape (runs,)
        Byte addresses; -1 where the block is ``NO_BLOCK``.
    """
    rows = table[span[Span.ROW] + 2 * np.arange(span[Span.LANES])]
    row = rows[0]  # counts, block size and phase are those of the whole lane class
    t = row[Row.PHASE] + (span[Span.UNIT] + np.arange(span[Span.UNITS])) * row[Row.STEP]
    t += span[Span.TOKEN]
    blocks = ids[t // row[Row.BLOCK_TOKENS] + span[Span.BLOCKS]].astype(np.int64)
    units = np.multiply.outer(rows[:, Row.BLOCK_STRIDE], blocks)
    units += np.multiply.outer(rows[:, Row.TOKEN_STRIDE], t % row[Row.BLOCK_TOKENS])
    units += rows[:, Row.BASE, None]
    tokens = int(span[Span.TOKENS]) if span[Span.FORM] else 1
    inner = np.multiply.outer(rows[:, Row.TOKEN_STRIDE], np.arange(tokens))
    for count, stride in (
        (Row.COUNT0, Row.STRIDE0),
        (Row.COUNT1, Row.STRIDE1),
        (Row.COUNT2, Row.STRIDE2),
    ):
        if row[count] > 1:
            steps = np.multiply.outer(rows[:, stride], np.arange(row[count]))
            inner = (inner[:, :, None] + steps[:, None, :]).reshape(len(rows), -1)
    out: npt.NDArray[np.int64] = (units[:, :, None] + inner[:, None, :]).reshape(-1)
    if (blocks < 0).any():
        held = np.broadcast_to(blocks[None, :, None] >= 0, (*units.shape, inner.shape[1]))
        out[~held.reshape(-1)] = -1
    return out
