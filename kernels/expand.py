"""Public expand: block ids to addresses, for callers that want pointers or NIXL descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvpack.kernels import launch, reference
from kvpack.kernels.copy import Backend, check_request, choose_backend
from kvpack.kernels.table import as_lane_table

if TYPE_CHECKING:
    import torch

    from kvpack.kernels.table import TableLike


def expand(
    table: TableLike,
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    *,
    device_index: int | None = None,
    backend: Backend | None = None,
    stream: torch.cuda.Stream | None = None,
) -> npt.NDArray[np.int64] | torch.Tensor:
    """Addresses of the runs that a chunk's copy on one side reads or writes.

    Source and destination give rows of equal bytes in equal order, so the two together are what
    an unpacked transfer would post.

    Parameters
    ----------
    table, spans, blocks, stream
        As for :func:`kvpack.kernels.gather`.
    device_index : int, optional
        Adds a column with this value: rows are then NIXL descriptors.
    backend : {"triton", "numpy"}, optional
        Default: Triton where the table is on a GPU, else NumPy.

    Returns
    -------
    ndarray or torch.Tensor of int64, shape (runs, 2) or (runs, 3)
        Address, bytes and device index of each run, in wire order; address and bytes are 0 in a
        block that holds nothing. From Triton a tensor where the table is, written in the order
        of `stream`; from NumPy an array.

    Raises
    ------
    BlockListError, LayoutError, OptionsError
        As :func:`kvpack.kernels.gather`.

    Examples
    --------
    >>> import numpy as np
    >>> from kvpack.columns import Row, Span
    >>> row = np.zeros((2, len(Row)), np.int64)
    >>> row[:, Row.BASE] = 65536
    >>> row[:, [Row.BLOCK_STRIDE, Row.RUN_BYTES]] = 1024
    >>> row[:, [Row.COUNT0, Row.COUNT1, Row.COUNT2, Row.BLOCK_TOKENS, Row.STEP]] = 1
    >>> row[:, Row.TOKEN_BYTES] = 1024
    >>> span = np.zeros((1, len(Span)), np.int64)
    >>> span[:, [Span.LANES, Span.TOKENS]] = 1
    >>> span[:, Span.UNITS], span[:, Span.UNIT_BYTES], span[:, Span.WIDTH] = 3, 1024, 16
    >>> expand(row, span, np.array([3, 0, 7], np.int32))
    array([[68608,  1024],
           [65536,  1024],
           [72704,  1024]])
    """
    table = as_lane_table(table)
    check_request(table, spans, blocks)
    if choose_backend(backend, table.on_gpu) == "triton":
        return launch.launch_expand(table, spans, blocks, device_index=device_index, stream=stream)
    return reference.expand(table.rows, spans, blocks, device_index=device_index)
