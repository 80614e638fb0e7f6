"""One transfer's phases as they happen: an NVTX range and an interval of its record at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvpack.profiling import ranges
from kvpack.profiling.phases import Phase
from kvpack.profiling.records import Outcome, RecordBuilder, Side, TransferRecord


class Timeline:
    """Marks the phases of one transfer on one side.

    Parameters
    ----------
    request_id : str
        Of the request.
    side : {"send", "receive"}
        Which end this is.
    device : str
        Of the staging memory.
    started_s : float
        When the caller asked for the transfer, by ``time.perf_counter``.
    """

    def __init__(self, request_id: str, side: Side, device: str, started_s: float) -> None:
        self.builder = RecordBuilder(request_id, side, device, started_s)
        self.builder.clock.begin(Phase.QUEUE, started_s)
        self._ranges: dict[tuple[Phase, int], int] = {}
        self._record: TransferRecord | None = None
        self.begin(Phase.QUEUE)

    def begin(
        self, phase: Phase, key: int = 0, peer: str = "", chunk: int = -1, nbytes: int = 0
    ) -> None:
        """Begin a phase that may outlast this turn; one that is under way under ``key`` goes on.

        Nothing begins after the end of the transfer, which a late write may outlast.
        """
        if (phase, key) in self._ranges or self._record is not None:
            return
        request = self.builder.request
        self._ranges[phase, key] = ranges.start(phase, request, peer, chunk, nbytes)
        self.builder.clock.begin(phase, time.perf_counter(), key)

    def end(self, phase: Phase, key: int = 0) -> None:
        """End a phase; nothing happens if it is not under way."""
        handle = self._ranges.pop((phase, key), None)
        if handle is not None:
            self.builder.clock.end(phase, time.perf_counter(), key)
            ranges.end(handle)

    @contextmanager
    def within(self, phase: Phase, peer: str, chunk: int, nbytes: int) -> Iterator[None]:
        """Mark a phase that lies within this turn."""
        started = time.perf_counter()
        with ranges.phase(phase, self.builder.request, peer, chunk, nbytes):
            try:
                yield
            finally:
                self.builder.clock.add(phase, started, time.perf_counter())

    def chunk_begins(self, wire_bytes: int, fragments: int, peer: str) -> None:
        """Count a chunk that is being copied; the transfer is not complete yet."""
        self.end(Phase.COMPLETE)
        self.builder.chunks += 1
        self.builder.writes += 1
        self.builder.nbytes += wire_bytes
        self.builder.fragments += fragments
        if peer not in self.builder.peers:
            self.builder.peers.append(peer)

    def chunk_ends(self) -> None:
        """A chunk is where it belongs; if nothing else is under way, only the end remains."""
        if not self._ranges:
            self.begin(Phase.COMPLETE)

    def finish(self, outcome: Outcome, reason: str) -> TransferRecord:
        """Close what is open and give the record."""
        for phase, key in list(self._ranges):
            self.end(phase, key)
        self._record = self.builder.finish(time.perf_counter(), outcome, reason)
        return self._record
