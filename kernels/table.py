"""The lane table as the kernels want it: checked once, resident on the device, division-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvpack.columns import Row
from kvpack.errors import LayoutError

if TYPE_CHECKING:
    import torch

    TableLike: TypeAlias = "LaneTable | npt.NDArray[np.int64] | torch.Tensor"

DIVISORS = ("RUN_BYTES", "RUNS", "COUNT2", "COUNT1", "BLOCK_TOKENS")
"""What the kernels divide by. ``RUNS`` is the runs of an item: COUNT0 * COUNT1 * COUNT2."""

DEVICE_COLUMNS = len(Row) + 2 * len(DIVISORS)
"""Columns of a row on the device: ``Row``, then a multiplier and a shift for each divisor."""

HEADER_WORDS = 2
"""int64 words at the start of an upload: number of spans, number of tiles."""

MAX_TILE_BYTES = 1 << 17
"""No kernel tile is larger, so offsets within one fit in 32 bits whatever the lane's size."""

_LIMIT = 1 << 30


class LaneTable:
    """One side's lane table of a plan, made once and given to every launch.

    Parameters
    ----------
    rows : ndarray or torch.Tensor of int64, shape (rows, len(Row))
        ``plan.table(side)``. A tensor on a GPU is read back, which waits for it.
    device : torch.device or str, optional
        Where the kernels run, and where a copy of the table is put. Default: where `rows` is;
        the CPU for an array.

    Attributes
    ----------
    rows : ndarray of int64, shape (rows, len(Row))
        The table on the host; not writable.
    tokens : list of (int, int, int)
        BLOCK_TOKENS, PHASE and STEP of each row.

    Raises
    ------
    LayoutError
        If `rows` is no such table, or a row is beyond what the kernels' 32-bit arithmetic within
        a tile can address: runs, and runs of an item, of 2**30 and more.
    """

    def __init__(
        self, rows: npt.NDArray[np.int64] | torch.Tensor, device: torch.device | str | None = None
    ) -> None:
        if isinstance(rows, np.ndarray):
            host: npt.NDArray[Any] = rows
        else:
            device = rows.device if device is None else device
            host = rows.cpu().numpy()
        if host.dtype != np.int64 or host.ndim != 2 or host.shape[1] != len(Row):
            raise LayoutError(
                f"a lane table is int64 of shape (rows, {len(Row)}), not {host.dtype} of shape "
                f"{host.shape}; pass plan.table(side)"
            )
        self.rows: npt.NDArray[np.int64] = np.ascontiguousarray(host).view()
        self.rows.flags.writeable = False
        _check_rows(self.rows)
        columns = self.rows[:, [Row.BLOCK_TOKENS, Row.PHASE, Row.STEP]]
        self.tokens: list[tuple[int, int, int]] = list(map(tuple, columns.tolist()))
        self._resident = None if device is None else _resident(self.rows, device)

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels run on a GPU."""
        return self._resident is not None and self._resident.is_cuda

    def resident(self) -> torch.Tensor:
        """Table as the kernels read it.

        Returns
        -------
        torch.Tensor of int64, shape (rows, DEVICE_COLUMNS)
        """
        if self._resident is None:
            self._resident = _resident(self.rows, "cpu")
        return self._resident

    def __repr__(self) -> str:
        device = "cpu" if self._resident is None else self._resident.device
        return f"LaneTable({len(self.rows)} rows, device={device})"


def as_lane_table(table: TableLike) -> LaneTable:
    """Return `table` itself, or one made from an array or tensor (on every call anew)."""
    return table if isinstance(table, LaneTable) else LaneTable(table)


def reciprocal(divisor: int) -> tuple[int, int]:
    """Multiplier and shift that divide by `divisor` without a division.

    With ``2**(s-1) < divisor <= 2**s`` and ``m = ceil(2**(63+s) / divisor)``, ``n // divisor`` is
    ``(2*n*m >> 64) >> s`` for n below 2**63, and with ``ceil(m / 2**32)`` in place of m it is
    ``n*m >> (31+s)`` for n below 2**31 (Granlund and Montgomery, 1994).

    Parameters
    ----------
    divisor : int
        From 1 to 2**62.

    Returns
    -------
    multiplier : int
        The 64 bits of m, read as a signed integer.
    shift : int
        s.
    """
    shift = (divisor - 1).bit_length()
    multiplier = -(-(1 << (63 + shift)) // divisor)
    return multiplier - (1 << 64) if multiplier >= 1 << 63 else multiplier, shift


def _resident(rows: npt.NDArray[np.int64], device: torch.device | str) -> torch.Tensor:
    import torch

    extended = np.empty((len(rows), DEVICE_COLUMNS), np.int64)
    extended[:, : len(Row)] = rows
    for i, divisors in enumerate(_divisors(rows)):
        column = len(Row) + 2 * i
        values, inverse = np.unique(divisors, return_inverse=True)
        reciprocals = np.array([reciprocal(d) for d in values.tolist()], np.int64).reshape(-1, 2)
        extended[:, column : column + 2] = reciprocals[inverse]
    return torch.from_numpy(extended).to(device)


def _divisors(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    runs = rows[:, Row.COUNT0] * rows[:, Row.COUNT1] * rows[:, Row.COUNT2]
    named = {"RUNS": runs, **{c.name: rows[:, c] for c in Row}}
    return [named[name] for name in DIVISORS]


def _check_rows(rows: npt.NDArray[np.int64]) -> None:
    for name, values in zip(DIVISORS, _divisors(rows), strict=True):
        bad = np.flatnonzero((values < 1) | (values >= _LIMIT))
        if bad.size:
            raise LayoutError(
                f"{name} of lane table row {bad[0]} is {values[bad[0]]}, outside [1, {_LIMIT}); "
                f"declare the cache in smaller blocks"
            )
    steps = rows[:, Row.STEP]
    item_bytes = rows[:, Row.RUN_BYTES] * _divisors(rows)[1]
    reach = steps * (MAX_TILE_BYTES // item_bytes + 2)
    bad = np.flatnonzero((steps < 0) | (steps >= _LIMIT) | (reach >= _LIMIT))
    if bad.size:
        raise LayoutError(
            f"STEP of lane table row {bad[0]} is {steps[bad[0]]} tokens a unit of "
            f"{item_bytes[bad[0]]} bytes, beyond the kernels' {_LIMIT} tokens a tile; "
            f"declare a smaller context-parallel period"
        )
