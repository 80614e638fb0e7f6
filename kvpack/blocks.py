"""Block lists of a request: checked against a cache layout, and packed for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    offsets : tuple of int
        Per layer group: what to add to a local block number ``t // T`` to index ``ids``.
    """

    first: int
    last: int
    ids: npt.NDArray[np.int32]
    offsets: tuple[int, ...]

    def of_group(self, layout: CacheLayout, group: int) -> tuple[int, npt.NDArray[np.int32]]:
        """Local number of the first block of a layer group's list, and the list itself."""
        start, stop = touched_blocks(layout, group, self.first, self.last)
        return start, self.ids[start + self.offsets[group] : stop + self.offsets[group]]


def touched_blocks(layout: CacheLayout, group: int, first: int, last: int) -> tuple[int, int]:
    """Local numbers ``[start, stop)`` of the blocks that positions ``[first, last)`` touch."""
    tokens = layout.groups[group].block_tokens
    before, until = layout.context.tokens_before(first), layout.context.tokens_before(last)
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
        exactly the blocks that positions ``[first, last)`` touch, in sequence order.
    first, last : int
        Positions, absolute in the sequence.
    role : {"source", "destination"}
        A source may name a block twice and must have every block; a destination may have
        ``NO_BLOCK`` entries, which are skipped, and no block twice.

    Raises
    ------
    BlockListError
        Naming the layer group, the value and the bound.
    """
    check_range(first, last)
    lists = _lists(layout, blocks)
    parts: list[npt.NDArray[np.int32]] = []
    offsets: list[int] = []
    length = 0
    for group, values in enumerate(lists):
        start, stop = touched_blocks(layout, group, first, last)
        _check_list(layout, group, values, (start, stop), (first, last), role)
        offsets.append(length - start)
        parts.append(values.astype(np.int32))
        length += len(values)
    return BlockTable(first, last, np.concatenate(parts), tuple(offsets))


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


def _check_list(
    layout: CacheLayout,
    group: int,
    values: npt.NDArray[Any],
    touched: tuple[int, int],
    positions: tuple[int, int],
    role: Role,
) -> None:
    num_blocks = layout.groups[group].num_blocks
    tokens = layout.groups[group].block_tokens
    needed = touched[1] - touched[0]
    if len(values) != needed:
        word = "short" if len(values) < needed else "long"
        raise BlockListError(
            f"block list of layer group {group} is too {word}: positions [{positions[0]}, "
            f"{positions[1]}) touch {needed} blocks of {tokens} tokens (numbers [{touched[0]}, "
            f"{touched[1]}) of the sequence), got {len(values)}"
        )
    outside = np.flatnonzero((values < NO_BLOCK) | (values >= num_blocks))
    if len(outside):
        raise BlockListError(
            f"block id {values[outside[0]]} in layer group {group} is outside the cache's "
            f"{num_blocks} blocks (entry {outside[0]} of the list)"
        )
    empty = np.flatnonzero(values == NO_BLOCK)
    if role == "source":
        if len(empty):
            raise BlockListError(
                f"block id {NO_BLOCK} (NO_BLOCK) at entry {empty[0]} of layer group {group}: the "
                "source has no bytes there; send a range that begins after it"
            )
        return
    held = np.sort(values[values != NO_BLOCK])
    twice = np.flatnonzero(held[1:] == held[:-1])
    if len(twice):
        raise BlockListError(
            f"block id {held[twice[0]]} stands twice in the destination list of layer group "
            f"{group}; two stretches of positions would overwrite each other"
        )
