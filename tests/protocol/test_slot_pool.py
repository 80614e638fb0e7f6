"""The pool of staging slots: no slot with two owners, no generation twice, no run starved."""

from __future__ import annotations

import random

import pytest

from kvpack.errors import StagingError
from kvpack.protocol import PoolCounts, SlotPool, SlotRun


def _take(pool: SlotPool, slots: int, owner: str = "a") -> SlotRun:
    run = pool.take(slots, slots, owner)
    assert run is not None
    return run


def test_random_use_never_gives_a_slot_to_two_owners() -> None:
    rng = random.Random(0)
    for _ in range(200):
        pool = SlotPool(rng.randint(1, 24))
        held: dict[SlotRun, str] = {}
        generations: set[int] = set()
        for _ in range(100):
            pool.check_integrity()
            if held and rng.random() < 0.5:
                known = rng.choice(list(held))
                held[known] = rng.choice(("free", "free", "in_doubt", "retired"))
                if held[known] == "free":
                    pool.free(known)
                    del held[known]
                elif held[known] == "in_doubt":
                    pool.doubt(known)
                else:
                    pool.retire(known)
                continue
            least = rng.randint(1, 6)
            run = pool.take(rng.randint(1, 10), least, rng.choice("abc"))
            if run is not None:
                assert run.slots >= least
                assert run.generation not in generations
                used = {s for r in held for s in range(r.slot, r.slot + r.slots)}
                assert used.isdisjoint(range(run.slot, run.slot + run.slots))
                generations.add(run.generation)
                held[run] = "owned"
        count = dict.fromkeys(("owned", "in_doubt", "retired"), 0)
        for run, state in held.items():
            count[state] += run.slots
        free = pool.capacity - sum(count.values())
        assert pool.counts() == PoolCounts(capacity=pool.capacity, free=free, **count)


def test_the_longest_run_is_given_where_the_wanted_one_is_not_there() -> None:
    pool = SlotPool(8)
    first = _take(pool, 3)
    _take(pool, 1)
    pool.free(first)
    assert pool.largest_free() == 4
    run = pool.take(6, 2, "b")
    assert run is not None
    assert (run.slot, run.slots) == (4, 4)


def test_a_large_run_is_not_starved_by_small_ones() -> None:
    pool = SlotPool(8)
    small = [_take(pool, 1) for _ in range(8)]
    assert pool.take(4, 4, "large") is None
    for step in range(100):
        pool.free(small.pop(random.Random(step).randrange(len(small))))
        if pool.take(4, 4, "large") is not None:
            return
        run = pool.take(1, 1, "small")
        if run is not None:
            small.append(run)
    raise AssertionError("small runs kept taking the slots")


def test_without_a_reservation_it_would_starve() -> None:
    pool = SlotPool(8)
    small = [_take(pool, 1) for _ in range(8)]
    for step in range(100):
        pool.free(small.pop(random.Random(step).randrange(len(small))))
        assert pool.take(4, 4, "large") is None
        pool.forget("large")
        small.append(_take(pool, 1, "small"))


def test_a_window_in_doubt_is_not_waited_for() -> None:
    pool = SlotPool(4)
    runs = [_take(pool, 1) for _ in range(4)]
    assert pool.take(2, 2, "large") is None  # reserves the upper two
    pool.doubt(runs[3])
    pool.free(runs[2])
    assert pool.take(1, 1, "small") == SlotRun(2, 1, 5)


@pytest.mark.parametrize("state", ["owned", "in_doubt", "retired"])
def test_a_run_is_freed_once(state: str) -> None:
    pool = SlotPool(4)
    run = _take(pool, 2)
    if state != "owned":
        pool.doubt(run)
    if state == "retired":
        pool.retire(run)
    assert getattr(pool.counts(), state) == 2
    pool.free(run)
    assert pool.counts().free == 4
    with pytest.raises(StagingError, match="freed once"):
        pool.free(run)
    _take(pool, 2)
    with pytest.raises(StagingError, match="freed once"):
        pool.free(run)  # same slots, another generation


def test_retired_slots_bound_the_longest_run() -> None:
    pool = SlotPool(8)
    runs = [_take(pool, 3), _take(pool, 2)]
    pool.retire(runs[1])
    assert pool.largest_possible() == 3
    pool.free(runs[1])
    assert pool.largest_possible() == 8


def test_a_run_of_no_slots_is_refused() -> None:
    with pytest.raises(StagingError, match="1 or more"):
        SlotPool(4).take(0, 0, "a")
    with pytest.raises(StagingError, match="0 or more"):
        SlotPool(-1)
