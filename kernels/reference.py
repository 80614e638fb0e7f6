"""NumPy twins of the kernels, and the default backend of a machine without GPU.

They read and write raw addresses, as the kernels do. A lane is one vector operation: its memory
is seen as an array of equal elements, as long as its strides allow, and indexed by element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from kvpack.columns import Row, Span

_LEVELS = ((Row.COUNT0, Row.STRIDE0), (Row.COUNT1, Row.STRIDE1), (Row.COUNT2, Row.STRIDE2))


def gather(
    rows: npt.NDArray[np.int64],
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    staging: int,
) -> None:
    """Copy a chunk from cache blocks to staging memory.

    Parameters
    ----------
    rows : ndarray of int64, shape (rows, len(Row))
        Lane table.
    spans : ndarray of int64, shape (spans, len(Span))
        What to copy.
    blocks : ndarray of int32, shape (ids,)
        The request's block ids. Bytes of negative ones are skipped.
    staging : int
        Address of the chunk's first byte.
    """
    for lane in _lanes(rows, spans, blocks):
        staged = _elements(staging + lane.offset, lane.nbytes, lane.element_bytes)
        cache = _elements(lane.address, lane.reach, lane.element_bytes)
        if lane.held is None:
            # mode="raise" would gather into a buffer first.
            np.take(cache, lane.indices, out=staged.reshape(lane.indices.shape), mode="clip")
        else:
            staged.reshape(lane.indices.shape)[lane.held] = cache[lane.indices[lane.held]]


def scatter(
    rows: npt.NDArray[np.int64],
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    staging: int,
) -> None:
    """Copy a chunk from staging memory to cache blocks; parameters as for :func:`gather`."""
    for lane in _lanes(rows, spans, blocks):
        staged = _elements(staging + lane.offset, lane.nbytes, lane.element_bytes)
        staged = staged.reshape(lane.indices.shape)
        cache = _elements(lane.address, lane.reach, lane.element_bytes)
        if lane.held is None:
            cache[lane.indices] = staged
        else:
            cache[lane.indices[lane.held]] = staged[lane.held]


def expand(
    rows: npt.NDArray[np.int64],
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    device_index: int | None = None,
) -> npt.NDArray[np.int64]:
    """Addresses of a chunk's runs.

    Parameters
    ----------
    rows, spans, blocks
        As for :func:`gather`.
    device_index : int, optional
        Value of a third column.

    Returns
    -------
    ndarray of int64, shape (runs, 2) or (runs, 3)
        Address and bytes of each run, in wire order; both 0 in a block that holds nothing.
    """
    pieces: list[tuple[int, npt.NDArray[np.int64]]] = []
    for span in spans:
        items = _items(rows[span[Span.ROW]], span, blocks)
        for i in range(int(span[Span.LANES])):
            row = rows[span[Span.ROW] + 2 * i]
            starts = row[Row.BASE] + _run_offsets(row, items)
            pairs = np.stack([starts, np.full_like(starts, row[Row.RUN_BYTES])], axis=-1)
            pairs[items.blocks < 0] = 0
            pieces.append((int(span[Span.OFFSET] + i * span[Span.LANE_PITCH]), pairs))
    pieces.sort(key=lambda piece: piece[0])
    runs = np.concatenate([np.empty((0, 2), np.int64), *(p.reshape(-1, 2) for _, p in pieces)])
    if device_index is None:
        return runs
    return np.column_stack([runs, np.full(len(runs), device_index)])


@dataclass(frozen=True)
class _Items:
    """Block and token-in-block of each item of a span: a unit, or in the clipped form a token."""

    blocks: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Lane:
    """One lane of a span, as elements of the cache and a stretch of staging memory.

    ``indices`` has a row for each item. ``held`` marks the items whose block holds something;
    None means all.
    """

    offset: int
    nbytes: int
    address: int
    reach: int
    element_bytes: int
    indices: npt.NDArray[np.int64]
    held: npt.NDArray[np.bool_] | None


def _items(
    row: npt.NDArray[np.int64], span: npt.NDArray[np.int64], blocks: npt.NDArray[np.int32]
) -> _Items:
    first = row[Row.PHASE] + span[Span.UNIT] * row[Row.STEP] + span[Span.TOKEN]
    if span[Span.FORM]:
        tokens = first + np.arange(span[Span.TOKENS])
    else:
        tokens = first + np.arange(span[Span.UNITS]) * row[Row.STEP]
    entries, tokens = np.divmod(tokens, row[Row.BLOCK_TOKENS])
    return _Items(blocks[entries + span[Span.BLOCKS]].astype(np.int64), tokens)


def _run_offsets(row: npt.NDArray[np.int64], items: _Items) -> npt.NDArray[np.int64]:
    """Byte offsets from BASE of each run, shape (items, COUNT0, COUNT1, COUNT2)."""
    offsets: npt.NDArray[np.int64] = items.blocks * row[Row.BLOCK_STRIDE]
    offsets = offsets + items.tokens * row[Row.TOKEN_STRIDE]
    for count, stride in _LEVELS:
        offsets = offsets[..., None] + np.arange(row[count]) * row[stride]
    return offsets


def _lanes(
    rows: npt.NDArray[np.int64],
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
) -> Iterator[_Lane]:
    for span in spans:
        if not span[Span.UNITS] * span[Span.UNIT_BYTES]:
            continue
        items = _items(rows[span[Span.ROW]], span, blocks)
        held = items.blocks >= 0
        if not held.any():
            continue
        shape: bytes | None = None
        for i in range(int(span[Span.LANES])):
            row = rows[span[Span.ROW] + 2 * i]
            if row[Row.BLOCK_STRIDE :].tobytes() != shape:
                # Neighbouring lanes mostly differ in nothing but their base.
                shape = row[Row.BLOCK_STRIDE :].tobytes()
                offsets = _run_offsets(row, items).reshape(len(held), -1)
                lowest = int(offsets[held].min())
                highest = int(offsets[held].max())
                run_bytes = int(row[Row.RUN_BYTES])
                element_bytes = _element_bytes(row, items)
                within = np.arange(0, run_bytes, element_bytes)
                indices = ((offsets - lowest)[..., None] + within) // element_bytes
                indices = indices.reshape(len(held), -1)
            yield _Lane(
                offset=int(span[Span.OFFSET] + i * span[Span.LANE_PITCH]),
                nbytes=int(span[Span.UNITS] * span[Span.UNIT_BYTES]),
                address=int(row[Row.BASE]) + lowest,
                reach=highest - lowest + run_bytes,
                element_bytes=element_bytes,
                indices=indices,
                held=None if held.all() else held,
            )


def _element_bytes(row: npt.NDArray[np.int64], items: _Items) -> int:
    """Longest element that divides a lane's run and every distance between runs."""
    token_step = np.gcd.reduce(items.tokens - items.tokens[0]) * row[Row.TOKEN_STRIDE]
    strides = [row[stride] for count, stride in _LEVELS if row[count] > 1]
    return gcd(*map(int, (row[Row.RUN_BYTES], row[Row.BLOCK_STRIDE], token_step, *strides)))


class _Memory:
    """Memory at an address, as NumPy's array interface describes it."""

    def __init__(self, address: int, length: int, element_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "typestr": f"|V{element_bytes}",
            "shape": (length,),
        }


def _elements(address: int, nbytes: int, element_bytes: int) -> npt.NDArray[np.void]:
    elements: npt.NDArray[np.void] = np.asarray(
        _Memory(address, nbytes // element_bytes, element_bytes)
    )
    return elements
