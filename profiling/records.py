"""What a transfer did and how long each phase took: the record on every handle.

No clock runs here. Callers pass times in float seconds of one monotonic clock
(`time.perf_counter`), and device times as their CUDA events gave them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from kvpack.profiling.phases import Phase

Side = Literal["send", "receive"]
Outcome = Literal["done", "failed", "cancelled", "timed_out"]
Path = Literal["staged", "direct"]


@dataclass(frozen=True)
class TransferRecord:
    """One transfer, after it ended.

    Parameters
    ----------
    request : str
        The request's id.
    side : {"send", "receive"}
        Which end wrote this record.
    peers : tuple of str
        Names of the endpoints at the other end.
    device : str
        Device of this side's staging memory.
    path : {"staged", "direct"}
        Gathered into staging memory, or written piece by piece.
    outcome : {"done", "failed", "cancelled", "timed_out"}
        How the transfer ended.
    reason : str
        Why it ended so, or took this path; may be empty.
    nbytes : int
        Bytes moved.
    fragments : int
        Contiguous pieces of which those bytes consist: the descriptors of an unpacked transfer.
    chunks : int
        Chunks that the transfer was cut into.
    writes : int
        Writes posted on the wire.
    task_ms : float
        From the caller's request to its completion, in milliseconds.
    phases_ms : tuple of float
        Milliseconds in each phase in the order of `Phase`: the length of the union of that
        phase's intervals over all chunks, as the host saw them. Phases of different chunks
        overlap, so these may add up to more than the task.
    covered_ms : float
        Length of the union of all phases' intervals; what it lacks of `task_ms` has no name.
    gather_device_ms, scatter_device_ms : float or None
        Kernel time between CUDA events, summed over chunks; None where none was measured.
    """

    request: str
    side: Side
    peers: tuple[str, ...]
    device: str
    path: Path
    outcome: Outcome
    reason: str
    nbytes: int
    fragments: int
    chunks: int
    writes: int
    task_ms: float
    phases_ms: tuple[float, ...]
    covered_ms: float
    gather_device_ms: float | None = None
    scatter_device_ms: float | None = None

    def phase_ms(self, phase: Phase) -> float:
        """Milliseconds during which any chunk was in `phase`."""
        return self.phases_ms[phase]

    @property
    def throughput_gib_s(self) -> float:
        """Bytes over the whole task, in GiB (2**30 bytes) a second."""
        return self._bytes_per_s / 2**30

    @property
    def throughput_gb_s(self) -> float:
        """Bytes over the whole task, in GB (10**9 bytes) a second."""
        return self._bytes_per_s / 1e9

    @property
    def _bytes_per_s(self) -> float:
        return self.nbytes * 1e3 / self.task_ms if self.task_ms > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON's own types, phases by name and throughputs included."""
        record = dataclasses.asdict(self)
        record["peers"] = list(self.peers)
        record["phases_ms"] = {phase.label: self.phases_ms[phase] for phase in Phase}
        record["throughput_gib_s"] = self.throughput_gib_s
        record["throughput_gb_s"] = self.throughput_gb_s
        return record


class PhaseClock:
    """Intervals of each phase of one transfer, in seconds.

    Intervals come whole (`add`), or as a `begin` and an `end` that share a key, which is the
    chunk's index or whatever else tells simultaneous intervals of one phase apart.
    """

    def __init__(self) -> None:
        self._intervals: tuple[list[tuple[float, float]], ...] = tuple([] for _ in Phase)
        self._open: dict[tuple[Phase, int], float] = {}

    def add(self, phase: Phase, start_s: float, stop_s: float) -> None:
        """Count ``[start_s, stop_s)`` as `phase`.

        Raises
        ------
        ValueError
            If the interval ends before it starts.
        """
        if stop_s < start_s:
            raise ValueError(
                f"{phase.label} ends at {stop_s} s, before it starts at {start_s} s; "
                "take both times from one monotonic clock"
            )
        self._intervals[phase].append((start_s, stop_s))

    def begin(self, phase: Phase, now_s: float, key: int = 0) -> None:
        """Open an interval of `phase`; one that is open under this key goes on unchanged."""
        self._open.setdefault((phase, key), now_s)

    def end(self, phase: Phase, now_s: float, key: int = 0) -> None:
        """Close the interval of `phase` under this key; nothing happens where none is open."""
        start_s = self._open.pop((phase, key), None)
        if start_s is not None:
            self.add(phase, start_s, now_s)

    def end_all(self, now_s: float) -> None:
        """Close every open interval, as a transfer that fails must."""
        for phase, key in list(self._open):
            self.end(phase, now_s, key)

    def phase_ms(self, phase: Phase) -> float:
        """Length of the union of the closed intervals of `phase`, in milliseconds."""
        return _union_s(self._intervals[phase]) * 1e3

    def covered_ms(self) -> float:
        """Length of the union of the closed intervals of all phases, in milliseconds."""
        return _union_s(span for intervals in self._intervals for span in intervals) * 1e3


def _union_s(intervals: Iterable[tuple[float, float]]) -> float:
    total = 0.0
    reached = float("-inf")
    for start, stop in sorted(intervals):
        if stop > reached:
            total += stop - max(start, reached)
            reached = stop
    return total


class RecordBuilder:
    """A transfer's record while it runs: counters that the endpoint adds to, and its clock.

    Parameters
    ----------
    request : str
        The request's id.
    side : {"send", "receive"}
        Which end this is.
    device : str
        Device of this side's staging memory.
    start_s : float
        When the caller asked.
    """

    def __init__(self, request: str, side: Side, device: str, start_s: float) -> None:
        self.request = request
        self.side: Side = side
        self.device = device
        self.start_s = start_s
        self.peers: list[str] = []
        self.path: Path = "staged"
        self.nbytes = 0
        self.fragments = 0
        self.chunks = 0
        self.writes = 0
        self.clock = PhaseClock()
        self._device_ms: dict[Phase, float] = {}

    def add_device_ms(self, phase: Phase, elapsed_ms: float) -> None:
        """Add what a pair of CUDA events around a kernel of `phase` measured."""
        self._device_ms[phase] = self._device_ms.get(phase, 0.0) + elapsed_ms

    def finish(self, now_s: float, outcome: Outcome, reason: str = "") -> TransferRecord:
        """Close what is open and return the record.

        Parameters
        ----------
        now_s : float
            When the transfer ended.
        outcome : {"done", "failed", "cancelled", "timed_out"}
            How it ended.
        reason : str
            Why.
        """
        self.clock.end_all(now_s)
        return TransferRecord(
            request=self.request,
            side=self.side,
            peers=tuple(self.peers),
            device=self.device,
            path=self.path,
            outcome=outcome,
            reason=reason,
            nbytes=self.nbytes,
            fragments=self.fragments,
            chunks=self.chunks,
            writes=self.writes,
            task_ms=(now_s - self.start_s) * 1e3,
            phases_ms=tuple(self.clock.phase_ms(phase) for phase in Phase),
            covered_ms=self.clock.covered_ms(),
            gather_device_ms=self._device_ms.get(Phase.GATHER),
            scatter_device_ms=self._device_ms.get(Phase.SCATTER),
        )
