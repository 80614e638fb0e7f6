"""From a call to a launch: the upload through a pinned ring, the grid, the stream.

A launch needs its spans and block ids on the device. They go up in one copy from a pinned slot,
which is written again only after the launch that read it is over. In the steady state nothing is
allocated and nothing is waited for: when every slot is still in use the ring grows.
"""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvpack.columns import Row, Span
from kvpack.kernels.specializations import (
    EXPAND_RUNS,
    Specialization,
    expand_specialization,
    specializations,
)
from kvpack.kernels.table import DEVICE_COLUMNS, HEADER_WORDS, LaneTable

if TYPE_CHECKING:
    import torch

    Timing: TypeAlias = tuple[torch.cuda.Event, torch.cuda.Event]

_SMALLEST_SLOT_WORDS = 4096
_SLOTS_AT_ONCE = 16
_ROW_BYTES = 8 * DEVICE_COLUMNS


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@dataclass
class _Slot:
    """Pinned memory, its copy on the device, and the end of the launch that last read them.

    ``over`` is a `torch.cuda.Event`, whose methods are untyped; None on the CPU.
    """

    host: torch.Tensor
    words: npt.NDArray[np.int64]
    device: torch.Tensor
    over: Any


class Launcher:
    """Launches kernels on one device; safe to use from several threads.

    Parameters
    ----------
    device : torch.device
        A CUDA device, or the CPU under Triton's interpreter.
    """

    def __init__(self, device: torch.device) -> None:
        from kvpack.kernels import programs

        self._device = device
        self._kernels: dict[str, Any] = {"copy": programs.copy, "expand": programs.expand}
        self._lock = threading.Lock()
        self._ring: list[_Slot] = []

    def launch(
        self,
        specialization: Specialization,
        grid: int,
        spans: npt.NDArray[np.int64],
        last_tiles: npt.NDArray[np.int64],
        blocks: npt.NDArray[np.int32],
        stream: torch.cuda.Stream | None,
        timing: Timing | None = None,
    ) -> None:
        """Upload and launch, in `stream`'s order; returns before either has happened.

        Parameters
        ----------
        specialization : Specialization
            What to run.
        grid : int
            Programs, at least 1.
        spans : ndarray of int64, shape (spans, len(Span))
            As the kernel reads them: ROW and OFFSET are addresses.
        last_tiles : ndarray of int64, shape (spans,)
            Tiles of the launch up to and including each span.
        blocks : ndarray of int32, shape (ids,)
            Block ids.
        stream : torch.cuda.Stream or None
            None is torch's current stream of the device.
        timing : tuple of two torch.cuda.Event, optional
            Recorded around the kernel.
        """
        num_spans = len(spans)
        ids_at = HEADER_WORDS + num_spans * (1 + len(Span))
        num_words = ids_at + (len(blocks) + 1) // 2
        with self._lock:
            slot = self._take(num_words)
            words = slot.words
            words[0] = num_spans
            words[1] = last_tiles[-1] if num_spans else 0
            words[HEADER_WORDS] = 0
            first_tiles = words[HEADER_WORDS : HEADER_WORDS + num_spans]
            first_tiles[1:] = last_tiles[:-1]
            words[HEADER_WORDS + num_spans : ids_at] = spans.reshape(-1)
            words[ids_at:].view(np.int32)[: len(blocks)] = blocks
            self._run(specialization, grid, slot, num_words, stream, timing)
            # A slot whose launch failed is dropped: nothing tells when it may be written again.
            self._ring.append(slot)

    def _run(
        self,
        specialization: Specialization,
        grid: int,
        slot: _Slot,
        num_words: int,
        stream: torch.cuda.Stream | None,
        timing: Timing | None,
    ) -> None:
        kernel = self._kernels[specialization.kernel][(grid,)]
        arguments = specialization.launch_arguments
        if slot.over is None:
            kernel(slot.device, **arguments)
            return
        import torch

        if stream is None:
            stream = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(stream):
            slot.device[:num_words].copy_(slot.host[:num_words], non_blocking=True)
            if timing is not None:
                timing[0].record(stream)
            kernel(slot.device, **arguments)
            slot.over.record(stream)
            if timing is not None:
                timing[1].record(stream)

    def _take(self, num_words: int) -> _Slot:
        for i, slot in enumerate(self._ring):
            if len(slot.words) >= num_words and (slot.over is None or slot.over.query()):
                return self._ring.pop(i)
        num_words = 1 << max(num_words - 1, _SMALLEST_SLOT_WORDS - 1).bit_length()
        slot, *spare = self._new_slots(num_words)
        self._ring.extend(spare)
        return slot

    def _new_slots(self, num_words: int) -> list[_Slot]:
        import torch

        cuda = self._device.type == "cuda"
        shape = (_SLOTS_AT_ONCE, num_words)
        hosts = torch.empty(shape, dtype=torch.int64, pin_memory=cuda)
        devices = torch.empty(shape, dtype=torch.int64, device=self._device) if cuda else hosts
        events: list[Any] = [torch.cuda.Event() if cuda else None for _ in hosts]
        return [
            _Slot(host, host.numpy(), device, event)
            for host, device, event in zip(hosts, devices, events, strict=True)
        ]


@cache
def launcher(device: torch.device) -> Launcher:
    """Return the launcher of a device, one a process."""
    return Launcher(device)


def launch_copy(
    specialization: Specialization,
    table: LaneTable,
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    staging: int,
    stream: torch.cuda.Stream | None,
    max_ctas: int | None,
    timing: Timing | None,
) -> None:
    """Launch gather or scatter of checked arguments.

    Parameters
    ----------
    specialization : Specialization
        From :func:`copy_specialization`.
    table, spans, blocks, stream, max_ctas, timing
        As for :func:`kvpack.kernels.gather`.
    staging : int
        Address of the chunk's first byte.
    """
    _, lanes, _, units, _, _, _, _, _, unit_bytes, widths, _ = spans.T
    tile_bytes = widths * specialization.constants["BLOCK"]
    last_tiles = np.add.accumulate(lanes * -(-(units * unit_bytes) // tile_bytes))
    num_tiles = int(last_tiles[-1]) if len(spans) else 0
    if num_tiles == 0:
        return
    grid = num_tiles if max_ctas is None else min(num_tiles, max_ctas)
    resident = table.resident()
    spans = spans.copy()
    spans[:, Span.ROW] *= _ROW_BYTES
    spans[:, Span.ROW] += resident.data_ptr()
    spans[:, Span.OFFSET] += staging
    launcher(resident.device).launch(
        specialization, grid, spans, last_tiles, blocks, stream, timing
    )


def launch_expand(
    table: LaneTable,
    spans: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
    *,
    device_index: int | None,
    stream: torch.cuda.Stream | None,
) -> torch.Tensor:
    """Launch expand of checked arguments; see :func:`kvpack.kernels.expand`."""
    import torch

    resident = table.resident()
    columns = 2 if device_index is None else 3
    specialization = expand_specialization(columns)
    # Each lane is a span of its own here: spans of one lane class take turns in the wire order.
    lanes = np.repeat(spans, spans[:, Span.LANES], axis=0)
    first = np.cumsum(spans[:, Span.LANES]) - spans[:, Span.LANES]
    lane = np.arange(len(lanes)) - np.repeat(first, spans[:, Span.LANES])
    lanes[:, Span.ROW] += 2 * lane
    order = np.argsort(lanes[:, Span.OFFSET] + lane * lanes[:, Span.LANE_PITCH], kind="stable")
    lanes = lanes[order]
    runs = lanes[:, Span.UNITS] * lanes[:, Span.UNIT_BYTES]
    runs //= table.rows[lanes[:, Span.ROW], Row.RUN_BYTES]
    num_runs = int(runs.sum())
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        out = torch.empty((num_runs, columns), dtype=torch.int64, device=resident.device)
    if num_runs == 0:
        return out
    lanes[:, Span.LANES] = 1
    lanes[:, Span.ROW] *= _ROW_BYTES
    lanes[:, Span.ROW] += resident.data_ptr()
    lanes[:, Span.OFFSET] = out.data_ptr() + 8 * columns * (np.cumsum(runs) - runs)
    lanes[:, Span.LANE_PITCH] = device_index or 0
    last_tiles = np.cumsum(-(-runs // EXPAND_RUNS))
    grid = int(last_tiles[-1])
    launcher(resident.device).launch(specialization, grid, lanes, last_tiles, blocks, stream)
    return out


def warmup(device: torch.device | str) -> None:
    """Compile and load every specialisation for a device.

    No request compiles anything after it. Waits for the compiler; what Triton has on disk is
    compiled already.

    Parameters
    ----------
    device : torch.device or str
        A CUDA device. On the CPU, where nothing is compiled, this does nothing.
    """
    import torch

    device = torch.empty(0, device=device).device
    if device.type != "cuda":
        return
    spans = np.empty((0, len(Span)), np.int64)
    tiles = np.empty(0, np.int64)
    blocks = np.empty(0, np.int32)
    for specialization in specializations():
        launcher(device).launch(specialization, 1, spans, tiles, blocks, None)
