"""A pool of equal staging slots, handed out as runs of adjacent ones."""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass

from kvpack.errors import StagingError


class SlotState(enum.Enum):
    """What a run of slots is to its pool."""

    OWNED = "owned"
    IN_DOUBT = "in doubt"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Adjacent slots with one owner.

    Attributes
    ----------
    slot, slots : int
        The first one, and how many.
    generation : int
        Larger than that of every run handed out before, so it never repeats for a slot.
    """

    slot: int
    slots: int
    generation: int


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """How many slots of a pool are in each state."""

    capacity: int
    free: int
    owned: int
    in_doubt: int
    retired: int


class SlotPool:
    """Hands out runs of adjacent slots, first fit.

    A run is free, owned, in doubt (a write that nobody can call back may still land in it) or
    retired (in doubt for so long that it is counted as lost). Only `free` brings one back, whatever
    its state.

    Where the least that an owner can use is not to be had, the pool reserves a window of slots for
    it, so that a large run is not starved by many small ones. One window is reserved at a time.

    Parameters
    ----------
    slots : int
        The pool's size.
    """

    def __init__(self, slots: int) -> None:
        if slots < 0:
            raise StagingError(f"a pool of {slots} slots; it needs 0 or more")
        self._capacity = slots
        self._free: list[tuple[int, int]] = [(0, slots)] if slots else []
        self._runs: dict[int, tuple[SlotRun, SlotState]] = {}
        self._generation = 0
        self._owned = self._in_doubt = self._retired = 0
        self._reserved_for: Hashable | None = None
        self._window = (0, 0)

    @property
    def capacity(self) -> int:
        """All slots, whatever their state."""
        return self._capacity

    def counts(self) -> PoolCounts:
        """How many slots are in each state now."""
        return PoolCounts(
            capacity=self._capacity,
            free=self._capacity - self._owned - self._in_doubt - self._retired,
            owned=self._owned,
            in_doubt=self._in_doubt,
            retired=self._retired,
        )

    def largest_free(self) -> int:
        """Length of the longest free run, reserved or not."""
        return max((end - start for start, end in self._free), default=0)

    def largest_possible(self) -> int:
        """Length of the longest run there could be if every slot that is not retired came back."""
        if not self._retired:
            return self._capacity
        return max((end - start for start, end in self._spans(SlotState.RETIRED)), default=0)

    def take(self, want: int, least: int, owner: Hashable) -> SlotRun | None:
        """Take `want` adjacent slots, or the longest run there is if it has `least` of them.

        Parameters
        ----------
        want, least : int
            Slots; ``1 <= least``. A `want` below `least` is raised to it.
        owner : hashable
            Who asks; a reservation is kept under this name until it is served or forgotten.

        Returns
        -------
        SlotRun or None
            None if not even `least` are to be had now.
        """
        if least < 1:
            raise StagingError(f"a run of {least} slots was asked for; it needs 1 or more")
        want = max(want, least)
        runs = self._free if owner == self._reserved_for else self._unreserved()
        fitting = next((run for run in runs if run[1] - run[0] >= want), None)
        if fitting is None:
            fitting = max(runs, key=lambda run: run[1] - run[0], default=(0, 0))
        start, end = fitting
        if end - start < least:
            if self._reserved_for is None:
                self._reserve(least, owner)
            return None
        self.forget(owner)
        return self._own(start, min(want, end - start))

    def free(self, run: SlotRun) -> None:
        """Bring a run back: its owner is finished with it, or the doubt is dispelled."""
        self._count(run, -run.slots)
        del self._runs[run.slot]
        start, end = run.slot, run.slot + run.slots
        index = bisect_left(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))

    def doubt(self, run: SlotRun) -> None:
        """Mark a run as one that a late write may still hit."""
        self._move(run, SlotState.IN_DOUBT)
        if run.slot < self._window[1] and self._window[0] < run.slot + run.slots:
            self._reserved_for = None  # who waits for this window might wait for ever

    def retire(self, run: SlotRun) -> None:
        """Mark a run in doubt as lost, until proof comes after all."""
        self._move(run, SlotState.RETIRED)

    def forget(self, owner: Hashable) -> None:
        """Drop the reservation of an owner that needs it no longer."""
        if owner == self._reserved_for:
            self._reserved_for = None

    def check_integrity(self) -> None:
        """Raise AssertionError unless free runs and held runs tile the pool exactly."""
        held = [(run.slot, run.slot + run.slots) for run, _ in self._runs.values()]
        position = 0
        for start, end in sorted(self._free + held):
            assert start == position < end, f"slots [{position}, {start}) have no owner or two"
            position = end
        assert position == self._capacity, f"slots end at {position} of {self._capacity}"
        free = sum(end - start for start, end in self._free)
        assert free == self.counts().free, f"{free} slots are free, {self.counts()} counted"
        starts = {start for start, _ in self._free}
        assert not any(end in starts for _, end in self._free), "free runs are not merged"
        assert self._free == sorted(self._free), "free runs are not in order"

    def _move(self, run: SlotRun, state: SlotState) -> None:
        self._count(run, -run.slots)
        self._runs[run.slot] = (run, state)
        self._count(run, run.slots)

    def _count(self, run: SlotRun, slots: int) -> None:
        """Add to the count of the state that a run is in."""
        held, state = self._runs.get(run.slot, (None, None))
        if held != run:
            raise StagingError(f"{run} is not held; a run is freed once, by its owner")
        if state is SlotState.OWNED:
            self._owned += slots
        elif state is SlotState.IN_DOUBT:
            self._in_doubt += slots
        else:
            self._retired += slots

    def _own(self, start: int, slots: int) -> SlotRun:
        index = bisect_left(self._free, (start + 1, 0)) - 1
        free_start, free_end = self._free.pop(index)
        rest = [(free_start, start), (start + slots, free_end)]
        self._free[index:index] = [(a, b) for a, b in rest if a < b]
        self._generation += 1
        run = SlotRun(start, slots, self._generation)
        self._runs[start] = (run, SlotState.OWNED)
        self._owned += slots
        return run

    def _reserve(self, slots: int, owner: Hashable) -> None:
        # First fit fills the pool from below, so the top comes free soonest.
        doubtful = (SlotState.IN_DOUBT, SlotState.RETIRED)
        for start, end in reversed(self._spans(*doubtful)):
            if end - start >= slots:
                self._reserved_for = owner
                self._window = (end - slots, end)
                return

    def _unreserved(self) -> list[tuple[int, int]]:
        if self._reserved_for is None:
            return self._free
        low, high = self._window
        outside = []
        for start, end in self._free:
            outside += [(start, min(end, low)), (max(start, high), end)]
        return [(start, end) for start, end in outside if start < end]

    def _spans(self, *excluded: SlotState) -> list[tuple[int, int]]:
        """Return the maximal spans without a run in one of the excluded states, ascending."""
        spans, position = [], 0
        for slot in sorted(self._runs):
            run, state = self._runs[slot]
            if state in excluded:
                spans.append((position, slot))
                position = slot + run.slots
        return [(a, b) for a, b in [*spans, (position, self._capacity)] if a < b]
