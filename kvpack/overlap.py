"""Proofs that declared memory does not overlap, within a cache tensor and a layer group."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from kvpack.errors import LayoutError

Axes = Sequence[tuple[str, int, int]]
Footprint = tuple[str, int, Axes, int]
"""(title, byte address, axes as (name, count, stride in bytes), bytes of one element)"""

_MAX_ROWS = 1 << 22


def check_self_disjoint(title: str, axes: Axes, item_bytes: int) -> None:
    """Refuse a tensor whose axes reach the same byte twice.

    Raises
    ------
    LayoutError
        If an axis steps by less than what the finer axes cover, as in an expanded tensor.
    """
    covered = item_bytes
    for name, count, stride in sorted((a for a in axes if a[1] > 1), key=lambda a: a[2]):
        if stride < covered:
            raise LayoutError(
                f"{title}: axis {name} steps by {stride} bytes over elements that cover {covered}; "
                "its entries overlap in memory"
            )
        covered = stride * (count - 1) + covered


def check_disjoint(group: int, footprints: Sequence[Footprint]) -> None:
    """Refuse a layer group in which two cache tensors share a byte.

    Raises
    ------
    LayoutError
        Naming the two tensors.
    """
    spans = sorted(
        (
            (address, address + extent(axes, item_bytes), i)
            for i, (_, address, axes, item_bytes) in enumerate(footprints)
        ),
    )
    cluster: list[int] = []
    reach = 0
    for start, stop, i in spans:
        if start >= reach:
            _check_cluster(group, [footprints[j] for j in cluster])
            cluster = []
        cluster.append(i)
        reach = max(reach, stop)
    _check_cluster(group, [footprints[j] for j in cluster])


def extent(axes: Axes, item_bytes: int) -> int:
    """Bytes from the first element to the end of the last."""
    return sum((count - 1) * stride for _, count, stride in axes) + item_bytes


def _check_cluster(group: int, members: Sequence[Footprint]) -> None:
    """Tensors whose address ranges interleave, as those of a block-major pool do."""
    if len(members) < 2:
        return
    block_strides = {axes[0][2] for _, _, axes, _ in members}
    modulo = block_strides.pop() if len(block_strides) == 1 else 0
    if modulo and _disjoint(group, members, modulo) is None:
        return
    fault = _disjoint(group, members, None)
    if fault is not None:
        raise LayoutError(
            f"layer group {group}: {members[fault[0]][0]} and {members[fault[1]][0]} overlap in "
            "memory; tensors of one layer group need bytes of their own"
        )


def _disjoint(
    group: int, members: Sequence[Footprint], modulo: int | None
) -> tuple[int, int] | None:
    """Two members that share a byte, or None. With ``modulo``, one block stands for all of them."""
    starts, stops, owners, total = [], [], [], 0
    for i, (title, address, axes, item_bytes) in enumerate(members):
        outer, row_bytes = _rows(axes if modulo is None else axes[1:], item_bytes)
        total += prod(count for count, _ in outer)
        if total > _MAX_ROWS:
            raise LayoutError(
                f"layer group {group}: {title} and others interleave in more than {_MAX_ROWS} "
                "rows, too many to prove that they do not overlap; declare it in a layer group of "
                "its own"
            )
        row_starts = np.zeros(1, np.int64)
        for count, stride in outer:
            row_starts = (np.arange(count, dtype=np.int64)[:, None] * stride + row_starts).ravel()
        first = row_starts + address
        if modulo is not None:
            first = first % modulo
        starts.append(first)
        stops.append(first + row_bytes)
        owners.append(np.full(len(first), i))
    start, stop, owner = (np.concatenate(parts) for parts in (starts, stops, owners))
    order = np.argsort(start, kind="stable")
    clash = np.flatnonzero(start[order][1:] < stop[order][:-1])
    if len(clash):
        return int(owner[order][clash[0]]), int(owner[order][clash[0] + 1])
    if modulo is not None and len(stop) and int(stop.max()) > modulo + int(start.min()):
        return int(owner[order][-1]), int(owner[order][0])
    return None


def _rows(axes: Axes, item_bytes: int) -> tuple[list[tuple[int, int]], int]:
    """Axes, as (count, stride), around the contiguous rows of a tensor, and the bytes of a row."""
    row = item_bytes
    outer: list[tuple[int, int]] = []
    for _, count, stride in sorted((a for a in axes if a[1] > 1), key=lambda a: a[2]):
        if stride == row and not outer:
            row *= count
        else:
            outer.append((count, stride))
    return outer, row
