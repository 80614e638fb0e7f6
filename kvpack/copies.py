"""Gather and scatter under way on one device: streams of their own, events, nothing waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kvpack import kernels
from kvpack.kernels.table import LaneTable
from kvpack.options import Options
from kvpack.staging import Pool, Staging

if TYPE_CHECKING:
    import torch


class Ready(Protocol):
    """What ``send`` and ``receive`` wait for: a ``torch.cuda.Event``, or anything like it."""

    def query(self) -> bool:
        """Whether the work before the event is over; never blocks."""


@dataclass(eq=False, slots=True)
class Copy:
    """One gather or scatter. On the CPU it is over when it is made."""

    started: torch.cuda.Event | None = None
    ended: torch.cuda.Event | None = None

    def is_over(self) -> bool:
        """Whether the copy has run; raises what the device reports."""
        return self.ended is None or self.ended.query()

    @property
    def device_ms(self) -> float | None:
        """Kernel time between its events, once it is over; None on the CPU."""
        if self.started is None or self.ended is None:
            return None
        return float(self.started.elapsed_time(self.ended))


class Copier:
    """Runs gathers and scatters between an engine's cache and the staging memory.

    Parameters
    ----------
    staging : Staging
        Memory on the device that the cache is on.
    options : Options
        Backend and cap.
    """

    def __init__(self, staging: Staging, options: Options) -> None:
        self._staging = staging
        self._options = options
        self._streams: dict[Pool, torch.cuda.Stream] = {}
        self._idle_events: list[torch.cuda.Event] = []
        if staging.device != "cpu":
            import torch

            # A stream a direction: a scatter never queues behind a gather.
            self._streams = {
                "send": torch.cuda.Stream(staging.device),
                "receive": torch.cuda.Stream(staging.device),
            }

    @property
    def is_asynchronous(self) -> bool:
        """Whether a copy only starts when it is asked for, as on a GPU."""
        return bool(self._streams)

    def enter_thread(self) -> None:
        """Make the device current on the calling thread, as a CUDA launch needs."""
        if self._streams:
            import torch

            torch.cuda.set_device(self._staging.device)

    def table(self, rows: npt.NDArray[np.int64]) -> LaneTable:
        """Bring a lane table to the device, once for each plan."""
        table = LaneTable(rows, self._staging.device)
        if self._streams:
            table.resident()
        return table

    def warmup(self) -> None:
        """Compile every kernel that this device will ever need."""
        if self._streams:
            kernels.warmup(self._staging.device)

    def gather(
        self, table: LaneTable, spans: npt.NDArray[np.int64], ids: npt.NDArray[np.int32],
        slot: int, slots: int,
    ) -> Copy:  # fmt: skip
        """Start to pack a chunk into send slots."""
        return self._start("send", table, spans, ids, slot, slots)

    def scatter(
        self, table: LaneTable, spans: npt.NDArray[np.int64], ids: npt.NDArray[np.int32],
        slot: int, slots: int,
    ) -> Copy:  # fmt: skip
        """Start to unpack a chunk from receive slots."""
        return self._start("receive", table, spans, ids, slot, slots)

    def retire(self, copy: Copy) -> None:
        """Take the events of a copy that is over back into use."""
        if copy.started is not None and copy.ended is not None:
            self._idle_events += (copy.started, copy.ended)

    def _start(
        self,
        pool: Pool,
        table: LaneTable,
        spans: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int32],
        slot: int,
        slots: int,
    ) -> Copy:
        run = kernels.gather if pool == "send" else kernels.scatter
        stream = self._streams.get(pool)
        timing = None if stream is None else (self._event(), self._event())
        run(
            table,
            spans,
            ids,
            self._staging.slot_view(pool, slot, slots),
            backend=self._options.backend,
            stream=stream,
            max_ctas=self._options.max_ctas,
            timing=timing,
        )
        return Copy() if timing is None else Copy(*timing)

    def _event(self) -> torch.cuda.Event:
        if self._idle_events:
            return self._idle_events.pop()
        import torch

        return torch.cuda.Event(enable_timing=True)
