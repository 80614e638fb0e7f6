"""Public gather and scatter: checks at the door, then Triton or its NumPy twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvpack.columns import Span
from kvpack.errors import BlockListError, OptionsError, StagingError
from kvpack.kernels import launch, reference
from kvpack.kernels.specializations import copy_specialization
from kvpack.kernels.table import LaneTable, as_lane_table

if TYPE_CHECKING:
    import torch

    from kvpack.kernels.launch import Timing
    from kvpack.kernels.table import TableLike

    StagingMemory: TypeAlias = npt.NDArray[np.uint8] | torch.Tensor

Backend = Literal["triton", "numpy"]
WIDTHS = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Footprint:
    """What spans ask of staging memory: bytes from its start, widest and narrowest access."""

    staging_bytes: int
    widest: int
    narrowest: int


def gather(
    table: TableLike,
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    staging: StagingMemory,
    *,
    backend: Backend | None = None,
    stream: torch.cuda.Stream | None = None,
    max_ctas: int | None = None,
    timing: Timing | None = None,
) -> None:
    """Pack a chunk: copy it from cache blocks into staging memory.

    On CUDA this enqueues one small upload and one kernel and returns: cache, table and staging
    must live until they have run. `spans` and `blocks` may be reused at once.

    Parameters
    ----------
    table : LaneTable
        The source side's lane table. An array, or a tensor where the kernels run, is made into a
        LaneTable on every call, which on a GPU waits for it.
    spans : ndarray of int64, shape (spans, len(Span))
        ``plan.spans(...)`` of that side and chunk.
    blocks : ndarray of int32, shape (ids,)
        The request's block ids, layer group after layer group. Bytes of negative ids are skipped.
    staging : torch.Tensor or ndarray of uint8, shape (bytes,)
        Memory of the chunk, beginning at a multiple of its widest access.
    backend : {"triton", "numpy"}, optional
        Default: Triton where `staging` is on a GPU, else NumPy. On the CPU Triton needs its
        interpreter (``TRITON_INTERPRET=1``).
    stream : torch.cuda.Stream, optional
        Default: torch's current stream of the device. Not used on the CPU.
    max_ctas : int, optional
        Thread blocks that may be launched. Default: as many as there are tiles. Not used by
        NumPy, which runs in the calling thread.

    timing : tuple of two torch.cuda.Event, optional
        Recorded right before and right after the kernel, so that their difference is its time and
        not that of the host's work. Not used on the CPU.

    Raises
    ------
    BlockListError
        If `blocks` is not one int32 list, or too short for the spans.
    LayoutError
        If `table` is no lane table.
    OptionsError
        If `max_ctas` is below 1, `backend` unknown or unable to run here, or `spans` not a span
        table of `table`.
    StagingError
        If `staging` is no such memory, too short, misaligned, or not where the table is.
    """
    _copy(table, spans, blocks, staging, backend, stream, max_ctas, timing, scatter=False)


def scatter(
    table: TableLike,
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    staging: StagingMemory,
    *,
    backend: Backend | None = None,
    stream: torch.cuda.Stream | None = None,
    max_ctas: int | None = None,
    timing: Timing | None = None,
) -> None:
    """Unpack a chunk: copy it from staging memory into cache blocks.

    Parameters and errors are those of :func:`gather`; `table` and `blocks` are the destination's.
    """
    _copy(table, spans, blocks, staging, backend, stream, max_ctas, timing, scatter=True)


def choose_backend(backend: str | None, on_gpu: bool) -> Backend:
    """Backend for memory on a GPU or not.

    Raises
    ------
    OptionsError
        If `backend` is unknown or cannot reach that memory.
    """
    if backend is None:
        return "triton" if on_gpu else "numpy"
    if backend == "numpy":
        if on_gpu:
            raise OptionsError(
                "backend 'numpy' cannot reach memory on a GPU; use 'triton' or leave it out"
            )
        return "numpy"
    if backend == "triton":
        if not on_gpu and not launch.interpreted():
            raise OptionsError(
                "backend 'triton' reaches memory on the CPU in Triton's interpreter only; set "
                "TRITON_INTERPRET=1 before triton is imported, or use 'numpy'"
            )
        return "triton"
    raise OptionsError(f"backend {backend!r} is not one of 'triton', 'numpy'")


def check_request(
    table: LaneTable, spans: npt.NDArray[np.int64], blocks: npt.NDArray[np.int32]
) -> Footprint:
    """Refuse spans that are not of this table, and block ids that do not reach.

    Returns
    -------
    Footprint
        What the spans ask of staging memory.

    Raises
    ------
    BlockListError, OptionsError
        As :func:`gather`.
    """
    if not isinstance(spans, np.ndarray) or spans.dtype != np.int64 or spans.ndim != 2:
        raise OptionsError("spans must be a two-dimensional int64 array; pass plan.spans(...)")
    if spans.shape[1] != len(Span):
        raise OptionsError(
            f"spans have {spans.shape[1]} columns, not {len(Span)}; pass plan.spans(...)"
        )
    if not isinstance(blocks, np.ndarray) or blocks.dtype != np.int32 or blocks.ndim != 1:
        raise BlockListError(
            f"block ids must be a one-dimensional int32 array, not {type(blocks).__name__} of "
            f"{getattr(blocks, 'dtype', 'no dtype')}; use numpy.asarray(ids, numpy.int32)"
        )
    end = 0
    widest, narrowest = 1, 16
    num_ids = len(blocks)
    # Spans are few: plain integers are faster than arrays of them.
    for row, lanes, unit, units, token, _, entry, offset, pitch, nbytes, width, _ in spans.tolist():
        if not 0 <= row <= len(table.rows) - 2 * lanes + 1:
            raise OptionsError(
                f"a span of {lanes} lanes begins at lane table row {row}, but the table has "
                f"{len(table.rows)}; pass spans and table of one plan and side"
            )
        block_tokens, phase, step = table.tokens[row]
        first = phase + unit * step + token
        lowest = first // block_tokens + entry
        highest = (first + (units - 1) * step) // block_tokens + entry
        if not 0 <= lowest <= highest < num_ids:
            raise BlockListError(
                f"a span needs block ids {lowest} to {highest} of a list of {num_ids}; pass the "
                f"ids of every block that the request's range touches"
            )
        if width not in WIDTHS or offset < 0:
            raise OptionsError(
                f"a span has width {width} and staging offset {offset}; pass plan.spans(...)"
            )
        end = max(end, offset + (lanes - 1) * pitch + units * nbytes)
        widest = max(widest, width)
        narrowest = min(narrowest, width)
    return Footprint(end, widest, narrowest)


def _copy(
    table: TableLike,
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    staging: StagingMemory,
    backend: Backend | None,
    stream: torch.cuda.Stream | None,
    max_ctas: int | None,
    timing: Timing | None,
    *,
    scatter: bool,
) -> None:
    if max_ctas is not None and max_ctas < 1:
        raise OptionsError(f"max_ctas is {max_ctas}, below 1; leave it out for no cap")
    table = as_lane_table(table)
    footprint = check_request(table, spans, blocks)
    address, on_gpu = _check_staging(table, footprint, staging, writable=not scatter)
    if choose_backend(backend, on_gpu) == "triton":
        specialization = copy_specialization(
            scatter, footprint.narrowest == 16, max_ctas is not None
        )
        launch.launch_copy(specialization, table, spans, blocks, address, stream, max_ctas, timing)
    else:
        twin = reference.scatter if scatter else reference.gather
        twin(table.rows, spans, blocks, address)


def _check_staging(
    table: LaneTable, footprint: Footprint, staging: StagingMemory, *, writable: bool
) -> tuple[int, bool]:
    """Address of checked staging memory, and whether it is on a GPU."""
    if isinstance(staging, np.ndarray):
        address, nbytes, on_gpu, where = staging.ctypes.data, staging.size, False, "cpu"
        contiguous = staging.flags.c_contiguous and (staging.flags.writeable or not writable)
        is_bytes = staging.dtype == np.uint8
    else:
        address, nbytes, on_gpu = staging.data_ptr(), staging.numel(), staging.is_cuda
        contiguous, where = staging.is_contiguous(), str(staging.device)
        is_bytes = staging.dtype.itemsize == 1
    if not is_bytes or staging.ndim != 1 or not contiguous:
        raise StagingError(
            f"staging must be one contiguous, writable run of uint8, not {staging.dtype} of shape "
            f"{tuple(staging.shape)}; pass a slice of the staging buffer"
        )
    if table.on_gpu != on_gpu or (on_gpu and where != str(table.resident().device)):
        raise StagingError(
            f"staging is on {where} but the lane table is {table!r}; make the table with "
            f"LaneTable(rows, {where!r})"
        )
    if footprint.staging_bytes > nbytes:
        raise StagingError(
            f"the spans need {footprint.staging_bytes} bytes of staging and {nbytes} were given; "
            f"cut a smaller chunk or pass more"
        )
    if address % footprint.widest:
        raise StagingError(
            f"staging at address {address:#x} is not a multiple of the spans' "
            f"{footprint.widest}-byte access; begin chunks at multiples of 256 bytes"
        )
    return address, on_gpu
