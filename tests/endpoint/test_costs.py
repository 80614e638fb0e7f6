"""What an endpoint costs the engine: idle, and in calls of its own thread."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import pytest
from support.caches import PATIENCE_S, Cache, Group, ship_once

IDLE_S = 2.0
IDLE_CPU_BOUND = 0.015
"""Of a core, for each endpoint; the design's bar of 0.01 with room for a shared machine."""


@pytest.fixture
def pair(group: Group):
    """A connected pair that has worked already, and its caches."""
    here, there = Cache.of(num_blocks=1024).fill(1), Cache.of(num_blocks=1024)
    ends = group.pair(here, there)
    ship_once(*ends, here, there)
    return *ends, here, there


def test_idle_endpoints_cost_little(
    pair: tuple, record_property: Callable[[str, object], None]
) -> None:
    threading.Event().wait(0.5)  # the measurement begins when the pauses have grown
    before = time.process_time()
    threading.Event().wait(IDLE_S)
    share = (time.process_time() - before) / IDLE_S / 2
    record_property("idle_core_share_per_endpoint", round(share, 4))
    assert share < IDLE_CPU_BOUND


def test_calls_return_at_once(pair: tuple, record_property: Callable[[str, object], None]) -> None:
    prefill, decode, *_ = pair
    blocks = list(range(256))
    times: dict[str, list[float]] = {"send": [], "receive": []}
    for number in range(200):
        started = time.perf_counter()
        sent = prefill.send(f"{number}", blocks, 0, 1024)
        between = time.perf_counter()
        received = decode.receive(f"{number}", blocks, 0, 1024, from_=["prefill"])
        times["send"].append(between - started)
        times["receive"].append(time.perf_counter() - between)
        received.result(PATIENCE_S)
        sent.result(PATIENCE_S)
    for name, taken in times.items():
        cuts = statistics.quantiles(taken, n=100)
        record_property(f"{name}_us_p50_p99", [round(cuts[49] * 1e6), round(cuts[98] * 1e6)])
        assert cuts[49] < 5e-3
