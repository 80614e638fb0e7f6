"""NVTX ranges, as a real tool sees them and as they cost without one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvpack.profiling import Phase, ranges

PHASES = ("queue", "credit", "prepare", "gather", "post", "wire", "scatter", "complete")

PROGRAM = """
import threading
from kvpack.profiling import Phase, ranges

assert ranges.enabled()
for phase in Phase:
    with ranges.phase(phase, "request-7", "decode-0", 3, 1 << 40):
        pass
ranges.push(Phase.PREPARE, "nested")
ranges.push(Phase.POST, "nested", nbytes=5)
ranges.pop()
ranges.pop()
first = ranges.start(Phase.WIRE, "first", chunk=0)
second = ranges.start(Phase.WIRE, "second", chunk=1)
ranges.end(first)
thread = threading.Thread(target=ranges.end, args=(second,))
thread.start()
thread.join()
try:
    with ranges.phase(Phase.SCATTER, "r" * 100):
        raise RuntimeError
except RuntimeError:
    pass
"""


def run(program: str, environment: dict[str, str]) -> None:
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=60,
        env={**os.environ, **environment},
        cwd=os.path.dirname(__file__),
    )


def payload(event: dict[str, object]) -> tuple[str, str, int, int]:
    record = np.frombuffer(bytes.fromhex(str(event["payload"])), dtype=ranges.PAYLOAD_DTYPE)[0]
    request, peer, chunk, nbytes = record.item()
    return request.decode(), peer.decode(), chunk, nbytes


@pytest.fixture(scope="module")
def events(nvtx_recorder, tmp_path_factory) -> list[dict[str, object]]:
    file = tmp_path_factory.mktemp("ranges") / "events"
    run(PROGRAM, nvtx_recorder.environment(file))
    return nvtx_recorder.events(file)


def test_phases_are_those_of_the_design_in_order():
    assert tuple(phase.label for phase in Phase) == PHASES


def test_a_tool_sees_each_phase_with_its_payload(events):
    pushed = [e for e in events if e["event"] == "push"][: len(PHASES)]
    assert tuple(e["name"] for e in pushed) == PHASES
    for event in pushed:
        assert payload(event) == ("request-7", "decode-0", 3, 1 << 40)


def test_phases_differ_in_category_and_colour(events):
    named = {e["category"]: e["name"] for e in events if e["event"] == "category"}
    pushed = [e for e in events if e["event"] == "push"][: len(PHASES)]
    assert tuple(named[e["category"]] for e in pushed) == PHASES
    assert len({e["color"] for e in pushed}) == len(PHASES)


def test_pushed_ranges_nest_and_all_close(events):
    depth = 0
    deepest = 0
    for event in events:
        depth += {"push": 1, "pop": -1}.get(str(event["event"]), 0)
        deepest = max(deepest, depth)
        assert depth >= 0
    assert (depth, deepest) == (0, 2)


def test_started_ranges_overlap_and_end_on_any_thread(events):
    started = [e for e in events if e["event"] == "start"]
    ended = [e for e in events if e["event"] == "end"]
    assert [payload(e)[0] for e in started] == ["first", "second"]
    assert [e["id"] for e in ended] == [e["id"] for e in started]
    assert len({e["id"] for e in started}) == 2
    assert ended[1]["thread"] != started[1]["thread"]


def test_long_names_are_cut_not_refused(events):
    last = [e for e in events if e["event"] == "push"][-1]
    assert payload(last)[0] == "r" * 48


def test_without_a_tool_nothing_is_recorded(nvtx_recorder, tmp_path: Path):
    file = tmp_path / "events"
    program = PROGRAM.replace("assert ranges", "assert not ranges")
    run(program, {"NVTX_RECORDER_FILE": str(file)})
    assert nvtx_recorder.events(file) == []


def test_without_a_tool_a_range_costs_a_fraction_of_a_microsecond():
    assert not ranges.enabled()

    def pairs(count: int) -> None:
        for _ in range(count):
            ranges.push(Phase.GATHER, "request", "peer", 1, 2)
            ranges.pop()

    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        pairs(2000)
        best = min(best, (time.perf_counter() - started) / 2000)
    # 0.1 us on a quiet machine; a range that reached a library would cost over 0.6.
    assert best < 0.5e-6
