"""Phase times are unions over chunks, and a record is what a table needs."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from kvpack.profiling import Phase, PhaseClock, RecordBuilder


def test_overlapping_chunks_count_once():
    clock = PhaseClock()
    clock.add(Phase.WIRE, 1.0, 3.0)
    clock.add(Phase.WIRE, 2.0, 4.0)
    clock.add(Phase.WIRE, 1.5, 2.5)
    assert clock.phase_ms(Phase.WIRE) == pytest.approx(3000.0)


def test_gaps_between_chunks_do_not_count():
    clock = PhaseClock()
    clock.add(Phase.GATHER, 5.0, 6.0)
    clock.add(Phase.GATHER, 0.0, 1.0)
    assert clock.phase_ms(Phase.GATHER) == pytest.approx(2000.0)
    assert clock.covered_ms() == pytest.approx(2000.0)


def test_phases_that_hide_behind_each_other_cover_the_task_once():
    clock = PhaseClock()
    clock.add(Phase.GATHER, 0.0, 2.0)
    clock.add(Phase.WIRE, 1.0, 3.0)
    clock.add(Phase.SCATTER, 3.0, 4.0)
    assert sum(clock.phase_ms(phase) for phase in Phase) == pytest.approx(5000.0)
    assert clock.covered_ms() == pytest.approx(4000.0)


def test_union_equals_counting_milliseconds_on_random_intervals():
    generator = random.Random(7)
    for _ in range(200):
        clock = PhaseClock()
        inside = set()
        for _ in range(generator.randrange(12)):
            start = generator.randrange(60)
            stop = start + generator.randrange(12)
            clock.add(Phase.POST, start / 1e3, stop / 1e3)
            inside.update(range(start, stop))
        assert clock.phase_ms(Phase.POST) == pytest.approx(len(inside))


def test_open_intervals_are_told_apart_by_key():
    clock = PhaseClock()
    clock.begin(Phase.WIRE, 0.0, key=0)
    clock.begin(Phase.WIRE, 1.0, key=1)
    clock.begin(Phase.WIRE, 9.0, key=0)
    clock.end(Phase.WIRE, 2.0, key=0)
    assert clock.phase_ms(Phase.WIRE) == pytest.approx(2000.0)
    clock.end(Phase.WIRE, 3.0, key=1)
    assert clock.phase_ms(Phase.WIRE) == pytest.approx(3000.0)
    clock.end(Phase.WIRE, 50.0, key=1)
    assert clock.phase_ms(Phase.WIRE) == pytest.approx(3000.0)


def test_an_interval_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="monotonic"):
        PhaseClock().add(Phase.QUEUE, 2.0, 1.0)


def builder() -> RecordBuilder:
    record = RecordBuilder("request-1", "send", "cpu", start_s=10.0)
    record.peers.append("decode-0")
    record.nbytes = 3 * 2**30
    record.fragments = 48_128
    record.chunks = 2
    record.writes = 2
    return record


def test_a_record_holds_every_phase_and_the_task():
    building = builder()
    building.clock.add(Phase.QUEUE, 10.0, 10.5)
    building.clock.add(Phase.WIRE, 10.5, 12.0)
    building.add_device_ms(Phase.GATHER, 0.25)
    building.add_device_ms(Phase.GATHER, 0.5)
    record = building.finish(12.0, "done")
    assert record.task_ms == pytest.approx(2000.0)
    assert record.covered_ms == pytest.approx(record.task_ms)
    assert record.phase_ms(Phase.QUEUE) == pytest.approx(500.0)
    assert record.phase_ms(Phase.SCATTER) == 0.0
    assert (record.gather_device_ms, record.scatter_device_ms) == (0.75, None)


def test_throughput_says_which_giga():
    record = builder().finish(12.0, "done")
    assert record.throughput_gib_s == pytest.approx(1.5)
    assert record.throughput_gb_s == pytest.approx(1.5 * 2**30 / 1e9)


def test_a_transfer_that_ends_at_once_has_no_throughput():
    assert builder().finish(10.0, "cancelled", "before it began").throughput_gib_s == 0.0


def test_a_failure_closes_what_was_open():
    building = builder()
    building.clock.begin(Phase.WIRE, 11.0, key=1)
    record = building.finish(14.0, "failed", "peer lost")
    assert record.phase_ms(Phase.WIRE) == pytest.approx(3000.0)
    assert (record.outcome, record.reason) == ("failed", "peer lost")


def test_a_record_survives_json_and_cannot_be_changed():
    record = builder().finish(12.0, "done")
    exported = json.loads(json.dumps(record.to_dict()))
    assert exported == record.to_dict()
    assert set(exported["phases_ms"]) == {phase.label for phase in Phase}
    assert exported["throughput_gib_s"] == record.throughput_gib_s
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.nbytes = 0
