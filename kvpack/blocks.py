"""Block lists of a request: checked against a cache layout, and packed for the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvpack.errors import BlockListError
from kvpack.layout import CacheLayout

NO_BLOCK = -1
"""A block id for a stretch of positions that holds nothing, as engines' null blocks do."""

Blocks = npt.ArrayLike | Sequence[npt.ArrayLike]
Role = Literal["source", "destination"]


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The block lists of one request on one side, ready for a launch.

    Attributes
    ----------
    first, last : int
        Positions ``[first, last)`` that the lists cover.
    ids : ndarray of int32, shape (n,)
        The lists of all layer groups one after another.
    ranges : tuple of (int, int)
        Per layer group: the local block numbers ``[start, stop)`` that its list is for.
    """

    first: int
    last: int
    ids: npt.NDArray[np.int32]
    ranges: tuple[tuple[int, int], ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Per layer group: what to add to a local block number ``t // T`` to index ``ids``."""
        lengths = [stop - start for start, stop in self.ranges]
        return tuple(
            end - stop for end, (_, stop) in zip(accumulate(lengths), self.ranges, strict=True)
        )

    def of_group(self, group: int) -> tuple[int, npt.NDArray[np.int32]]:
        """Local number of the first block of a layer group's list, and the list itself."""
        start, stop = self.ranges[group]
        return start, self.ids[start + self.offsets[group] : stop + self.offsets[group]]


def touched_blocks(layout: CacheLayout, group: int, first: int, last: int) -> tuple[int, int]:
    """Local numbers ``[start, stop)`` of the blocks that positions ``[first, last)`` touch.

    Of a state group that is one slot, which belongs to the last position.
    """
    if layout.groups[group].state:
        first = last - 1
    tokens, context = layout.groups[group].block_tokens, layout.context_of(group)
    before, until = context.tokens_before(first), context.tokens_before(last)
    if before == until:
        return 0, 0
    return before // tokens, -(-until // tokens)


def check_range(first: int, last: int) -> None:
    """Refuse a range of positions that is empty or negative.

    Raises
    ------
    BlockListError
        Naming the range.
    """
    if not 0 <= first < last:
        raise BlockListError(
            f"positions [{first}, {last}) are empty or negative; a request needs 0 <= first < last"
        )


def block_table(
    layout: CacheLayout, blocks: Blocks, first: int, last: int, role: Role
) -> BlockTable:
    """Check the block lists of one side of a request, jointly and before anything is launched.

    Parameters
    ----------
    layout : CacheLayout
        Of this side.
    blocks : array_like of int, or sequence of them
        One block list per layer group, or the list itself where there is one group. A list holds
        exactly the blocks that positions ``[first, last)`` touch, in sequence order. That of a
        layer group with a window may begin later, with the window or with what is left of it, or
        have ``NO_BLOCK`` before; that of a state group is the slot of the state after ``last``
        positions, or empty at a source that does not have it.
    first, last : int
        Positions, absolute in the sequence.
    role : {"source", "destination"}
        A source may name a block twice and must have every block, but in a window; what it lacks
        there ``check_held`` judges, once a receiver says where its request ends. A destination may
        have ``NO_BLOCK`` entries, which are skipped, and no block twice; its request ends at
        ``last``, and blocks before the window are left alone.

    Raises
    ------
    BlockListError
        Naming the layer group, the value and the bound.
    """
    check_range(first, last)
    lists = _lists(layout, blocks)
    parts: list[npt.NDArray[np.int32]] = []
    ranges: list[tuple[int, int]] = []
    for group, values in enumerate(lists):
        most, stop = touched_blocks(layout, group, first, last)
        least = most
        if layout.groups[group].window is not None:
            least = stop if role == "source" else _live_start(layout, group, first, last, stop)
        _check_length(layout, group, len(values), (most, least, stop), (first, last))
        _check_ids(layout, group, values)
        if role == "destination":
            values = values[max(len(values) - (stop - least), 0) :]
            _check_unique(group, values)
        elif layout.groups[group].window is None:
            _check_complete(group, values)
        ranges.append((stop - len(values), stop))
        parts.append(values.astype(np.int32))
    return BlockTable(first, last, np.concatenate(parts), tuple(ranges))


def check_held(
    layout: CacheLayout, table: BlockTable, live: Mapping[int, int], last: int, end: int
) -> None:
    """Refuse to gather positions of windows, or a state, that a source does not have.

    Parameters
    ----------
    layout : CacheLayout
        Of the source.
    table : BlockTable
        Block lists of one send.
    live : mapping of int to int
        Per layer group the first position that travels; see ``Wire.source_live``.
    last, end : int
        Where the part and the whole request end.

    Raises
    ------
    BlockListError
        Naming the layer group, what is needed and what is missing.
    """
    for group, first in live.items():
        kind = layout.groups[group]
        start, stop = touched_blocks(layout, group, first, last)
        if kind.window is None or start == stop:
            continue
        begin, ids = table.of_group(group)
        if kind.state:
            if table.last != end:
                raise BlockListError(
                    f"layer group {group} holds state, and what is sent is the state after "
                    f"{table.last} positions, but the request ends at position {end}; send and ask "
                    "for the same last position"
                )
            if not len(ids) or ids[0] == NO_BLOCK:
                raise BlockListError(
                    f"layer group {group} holds state, but the send of positions [{table.first}, "
                    f"{table.last}) names no slot; the request ends there and needs it"
                )
            continue
        lacking = [n for n in range(start, stop) if n < begin or ids[n - begin] == NO_BLOCK]
        if lacking:
            tokens, context = kind.block_tokens, layout.context
            gap = next(n for n in range(lacking[0], stop + 1) if n not in lacking)
            since = max(context.position_of(lacking[0] * tokens), first)
            until = min(context.position_of(gap * tokens - 1) + 1, last)
            raise BlockListError(
                f"positions [{first}, {last}) are needed of the request that ends at {end}, but "
                f"the source, whose layer group {group} keeps a window of {kind.window} positions, "
                f"has no block for [{since}, {until}); send before the engine gives them up"
            )


def kernel_blocks(
    ids: npt.ArrayLike, factor: int, block_tokens: int, first: int, last: int
) -> npt.NDArray[np.int32]:
    """The block list of an attention kernel whose blocks are parts of the manager's.

    Parameters
    ----------
    ids : array_like of int, shape (n,)
        Ids of the manager's blocks that positions ``[first, last)`` touch; ``NO_BLOCK`` stands for
        as many of the kernel's.
    factor : int
        Blocks of the kernel in one of the manager's: id ``i`` has those from ``i * factor`` on.
    block_tokens : int
        Tokens of a block of the kernel.
    first, last : int
        Positions.

    Returns
    -------
    ndarray of int32
        The blocks of the kernel that ``[first, last)`` touches.

    Raises
    ------
    BlockListError
        If the range is empty, or the list is not what it touches.

    Examples
    --------
    >>> kernel_blocks([7, 2], factor=4, block_tokens=16, first=40, last=90).tolist()
    [30, 31, 8, 9]
    """
    check_range(first, last)
    managed = np.asarray(ids, np.int64)
    tokens = factor * block_tokens
    needed = -(-last // tokens) - first // tokens
    if managed.shape != (needed,):
        raise BlockListError(
            f"positions [{first}, {last}) touch {needed} blocks of {factor} x {block_tokens} "
            f"tokens, got a list of shape {managed.shape}"
        )
    parts = managed[:, None] * factor + np.arange(factor)
    parts[managed == NO_BLOCK] = NO_BLOCK
    skipped = first // block_tokens - first // tokens * factor
    count = -(-last // block_tokens) - first // block_tokens
    return parts.reshape(-1)[skipped : skipped + count].astype(np.int32)


def _live_start(layout: CacheLayout, group: int, first: int, last: int, stop: int) -> int:
    """Number of the first block that a request needs of a layer group; ``stop`` if it is none."""
    live = layout.groups[group].live_from(first, last)
    start, until = touched_blocks(layout, group, live, last)
    return stop if start == until else start


def _lists(layout: CacheLayout, blocks: Blocks) -> list[npt.NDArray[Any]]:
    groups = len(layout.groups)
    try:
        if groups == 1:
            only = np.asarray(blocks)
            lists = [only if only.ndim == 1 else np.asarray(blocks[0])]  # type: ignore[index]
            given = 1 if only.ndim == 1 else len(only)
        else:
            lists = [np.asarray(values) for values in blocks]  # type: ignore[union-attr]
            given = len(lists)
    except (TypeError, ValueError, IndexError) as error:
        raise BlockListError(
            f"block lists {blocks!r} are not {groups} list(s) of integers"
        ) from error
    if given != groups:
        raise BlockListError(
            f"{given} block lists for a cache layout of {groups} layer groups; pass one per group"
        )
    for group, values in enumerate(lists):
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise BlockListError(
                f"block list of layer group {group} has shape {values.shape} and dtype "
                f"{values.dtype}; it must be a one-dimensional list of integers"
            )
    return lists


def _check_length(
    layout: CacheLayout,
    group: int,
    length: int,
    touched: tuple[int, int, int],
    positions: tuple[int, int],
) -> None:
    """Refuse a list that begins outside ``[most, least]`` of the touched (most, least, stop)."""
    most, least, stop = touched
    if stop - least <= length <= stop - most:
        return
    kind, word = layout.groups[group], "short" if length < stop - least else "long"
    where = f"positions [{positions[0]}, {positions[1]})"
    if kind.state:
        raise BlockListError(
            f"block list of layer group {group} is too {word}: it is the slot of one state, that "
            f"after {positions[1]} positions, got {length} ids"
        )
    some = "" if least == most else f", {stop - least} of them inside its window of {kind.window}"
    raise BlockListError(
        f"block list of layer group {group} is too {word}: {where} touch {stop - most} blocks of "
        f"{kind.block_tokens} tokens (numbers [{most}, {stop}) of the sequence){some}, got {length}"
    )


def _check_ids(layout: CacheLayout, group: int, values: npt.NDArray[Any]) -> None:
    num_blocks = layout.groups[group].num_blocks
    outside = np.flatnonzero((values < NO_BLOCK) | (values >= num_blocks))
    if len(outside):
        raise BlockListError(
            f"block id {values[outside[0]]} in layer group {group} is outside the cache's "
            f"{num_blocks} blocks (entry {outside[0]} of the list)"
        )


def _check_complete(group: int, values: npt.NDArray[Any]) -> None:
    empty = np.flatnonzero(values == NO_BLOCK)
    if len(empty):
        raise BlockListError(
            f"block id {NO_BLOCK} (NO_BLOCK) at entry {empty[0]} of layer group {group}: the "
            "source has no bytes there; send a range that begins after it"
        )


def _check_unique(group: int, values: npt.NDArray[Any]) -> None:
    held = np.sort(values[values != NO_BLOCK])
    twice = np.flatnonzero(held[1:] == held[:-1])
    if len(twice):
        raise BlockListError(
            f"block id {held[twice[0]]} stands twice in the destination list of layer group "
            f"{group}; two stretches of positions would overwrite each other"
        )
