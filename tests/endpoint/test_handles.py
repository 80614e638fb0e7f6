"""Handles: how transfers begin, are held back, end, and what their records say."""

from __future__ import annotations

import random
import threading
import time

import pytest
from support.caches import PATIENCE_S, Cache, Flag, Group, is_idle, ship_once, until

from kvpack import (
    Shard,
    TransferCancelledError,
    TransferError,
    TransferFailedError,
    TransferTimeoutError,
)
from kvpack.handles import ReceiveHandle, SendHandle
from kvpack.profiling import Phase

TOKENS = 24
OURS, THEIRS = [9, 3, 7, 1, 5, 2], [4, 8, 6, 0, 11, 13]


@pytest.fixture
def ends(group: Group):
    """A connected pair and its caches."""
    here, there = Cache.of().fill(1), Cache.of()
    return *group.pair(here, there), here, there


def arrived(here: Cache, there: Cache) -> bool:
    return bool((there.read(THEIRS, 0, TOKENS) == here.read(OURS, 0, TOKENS)).all())


def test_nothing_is_gathered_before_the_sources_event_fires(ends) -> None:
    prefill, decode, here, there = ends
    flag = Flag()
    sent = prefill.send("r", OURS, 0, TOKENS, ready=flag)
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    until(lambda: flag.queries > 20)
    assert prefill.capacity().send.owned == 0
    assert not sent.blocks_released
    assert not sent.done()
    assert not received.done()
    here.fill(77)  # only now does the engine write its cache
    flag.fired = True
    received.result(PATIENCE_S)
    assert arrived(here, there)
    assert sent.wait_blocks_released(PATIENCE_S)


def test_nothing_is_granted_before_the_destinations_event_fires(ends) -> None:
    prefill, decode, here, there = ends
    flag = Flag()
    sent = prefill.send("r", OURS, 0, TOKENS)
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"], ready=flag)
    until(lambda: flag.queries > 20)
    assert decode.capacity().receive.owned == 0
    assert there.is_poison()
    assert not sent.blocks_released
    flag.fired = True
    received.result(PATIENCE_S)
    sent.result(PATIENCE_S)
    assert received.blocks_released
    assert sent.blocks_released
    assert arrived(here, there)


def test_a_late_event_does_not_hold_up_another_request(ends) -> None:
    prefill, decode, here, there = ends
    late = Flag()
    waiting = prefill.send("late", [20, 21], 0, 8, ready=late)
    asked = decode.receive("late", [20, 21], 0, 8, from_=["prefill"])
    ship_once(prefill, decode, here, there)
    assert not waiting.done()
    late.fired = True
    asked.result(PATIENCE_S)


@pytest.mark.parametrize("side", ["send", "receive"])
def test_an_event_that_fails_ends_both_sides_and_says_why(ends, side: str) -> None:
    prefill, decode, here, there = ends
    flag = Flag()
    ready = {side: flag}
    asked = prefill.send("r", OURS[:3], 0, 12, final=False)
    sent = prefill.send("r", OURS[3:], 12, TOKENS, ready=ready.get("send"))
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"], ready=ready.get("receive"))
    until(lambda: flag.queries > 5 and (side == "receive" or asked.blocks_released))
    flag.error = RuntimeError("CUDA error: device-side assert")
    for handle in (sent, received, asked):
        with pytest.raises(TransferFailedError, match="device-side assert"):
            handle.result(PATIENCE_S)
        assert handle.wait_blocks_released(PATIENCE_S)
    there.erase(THEIRS[:3], 0, 12)
    assert there.is_poison()
    ship_once(prefill, decode, here, there)


def test_source_blocks_are_free_once_gathered_and_the_send_is_done_later(ends) -> None:
    prefill, decode, here, there = ends
    first, second = Flag(), Flag()
    first.fired = True
    early = prefill.send("r", OURS[:3], 0, 12, ready=first, final=False)
    late = prefill.send("r", OURS[3:], 12, TOKENS, ready=second)
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    assert early.wait_blocks_released(PATIENCE_S)
    assert not early.done()
    assert not late.blocks_released
    kept = here.read(OURS, 0, TOKENS)
    for pool in here.pools:
        pool[:, OURS[:3]] = 0  # the engine reuses what is released
    second.fired = True
    received.result(PATIENCE_S)
    assert (there.read(THEIRS, 0, TOKENS) == kept).all()
    for handle in (early, late):
        handle.result(PATIENCE_S)


def test_a_callback_runs_once_and_at_once_where_the_end_has_come(ends) -> None:
    prefill, decode, *_ = ends
    seen: list[object] = []
    sent = prefill.send("r", OURS, 0, TOKENS)
    sent.add_done_callback(seen.append)
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    received.result(PATIENCE_S)
    sent.result(PATIENCE_S)
    until(lambda: len(seen) == 1)
    received.add_done_callback(seen.append)
    assert seen == [sent, received]


def test_a_callback_may_start_transfers_and_another_may_raise(
    ends, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode, here, there = ends
    started: list[SendHandle | ReceiveHandle] = []

    def go_on(handle: object) -> None:
        started.append(prefill.send("second", [30, 31], 0, 8))
        started.append(decode.receive("second", [40, 41], 0, 8, from_=["prefill"]))

    def stumble(handle: object) -> None:
        raise RuntimeError("the engine's own fault")

    sent = prefill.send("first", OURS, 0, TOKENS)
    received = decode.receive("first", THEIRS, 0, TOKENS, from_=["prefill"])
    received.add_done_callback(stumble)
    received.add_done_callback(go_on)
    sent.result(PATIENCE_S)
    until(lambda: len(started) == 2)
    for handle in started:
        handle.result(PATIENCE_S)
    assert (there.read([40, 41], 0, 8) == here.read([30, 31], 0, 8)).all()
    assert "a callback of request 'first' failed" in caplog.text


def test_waiting_is_bounded_and_the_transfer_goes_on(ends) -> None:
    prefill, decode, here, there = ends
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    started = time.monotonic()
    assert not received.wait(0.05)
    with pytest.raises(TimeoutError, match=r"'r' has not ended within 0\.05 s; it goes on"):
        received.result(0.05)
    assert 0.1 <= time.monotonic() - started < 5
    with pytest.raises(TransferError, match="under way"):
        _ = received.record
    assert "under way" in repr(received)
    prefill.send("r", OURS, 0, TOKENS)
    received.result(PATIENCE_S)
    assert arrived(here, there)
    assert "done" in repr(received)


def test_deadlines_end_each_side_and_say_what_was_missing(ends) -> None:
    prefill, decode, here, there = ends
    nobody_asks = prefill.send("a", OURS, 0, TOKENS, timeout_s=0.2)
    nothing_sent = decode.receive("b", THEIRS, 0, TOKENS, from_=["prefill"], timeout_s=0.2)
    never_ready = prefill.send("c", OURS, 0, TOKENS, ready=Flag(), timeout_s=0.2)
    wants_it = decode.receive("c", [20, 21, 22, 23, 24, 25], 0, TOKENS, from_=["prefill"])
    for handle, words in (
        (nobody_asks, "send of request 'a' timed out: no receiver asked for it"),
        (nothing_sent, "receive of request 'b' timed out: prefill"),
        (never_ready, "its blocks never became ready"),
        (wants_it, "prefill: .*its blocks never became ready"),
    ):
        with pytest.raises(TransferTimeoutError, match=words):
            handle.result(PATIENCE_S)
        assert handle.wait_blocks_released(PATIENCE_S)
        assert handle.record.outcome == "timed_out"
        assert handle.record.reason
    until(lambda: is_idle(prefill) and is_idle(decode))
    ship_once(prefill, decode, here, there)


@pytest.mark.parametrize("side", ["send", "receive"])
@pytest.mark.parametrize("is_asked", [False, True])
def test_cancelling_ends_whoever_takes_part(ends, side: str, is_asked: bool) -> None:
    prefill, decode, here, there = ends
    handles: dict[str, SendHandle | ReceiveHandle] = {}
    if side == "send" or is_asked:
        handles["send"] = prefill.send("r", OURS[1:], 4, TOKENS, ready=Flag())
    if side == "receive" or is_asked:
        handles["receive"] = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    if is_asked:
        asked = prefill.send("r", OURS[:1], 0, 4)
        assert asked.wait_blocks_released(PATIENCE_S)
    handles[side].cancel()
    handles[side].cancel()
    for handle in handles.values():
        with pytest.raises(TransferCancelledError, match="cancelled"):
            handle.result(PATIENCE_S)
        assert handle.wait_blocks_released(PATIENCE_S)
        assert handle.record.outcome == "cancelled"
    there.erase(THEIRS[:1], 0, 4)
    assert there.is_poison()
    until(lambda: is_idle(prefill) and is_idle(decode))
    # Of the same id only where the other side has seen the end: a cancelled attempt whose CANCEL
    # is under way would end a send that is published before it comes.
    ship_once(prefill, decode, here, there, request="r" if is_asked else "another")


@pytest.mark.parametrize("side", ["send", "receive"])
def test_cancelling_at_any_turn_ends_each_side_once_and_loses_no_slot(
    group: Group, side: str
) -> None:
    """Both ends driven turn by turn, cancelled after each number of turns in random order."""
    here, there = Cache.of().fill(1), Cache.of()
    prefill, decode = (
        group.open(name, cache.layout, driver="caller", staging_bytes=8 << 8, slot_bytes=256)
        for name, cache in (("prefill", here), ("decode", there))
    )
    group.meet(prefill, decode)
    outcomes = set()
    for turns in range(60):
        rng = random.Random(turns)
        ends: list[object] = []
        sent = prefill.send(f"r{turns}", OURS, 0, TOKENS)
        received = decode.receive(f"r{turns}", THEIRS, 0, TOKENS, from_=["prefill"])
        for handle in (sent, received):
            handle.add_done_callback(ends.append)
        for _ in range(turns // 2):
            rng.choice((prefill, decode)).progress()
        {"send": sent, "receive": received}[side].cancel()
        until(sent.done, prefill, decode)
        for _ in range(20):
            prefill.progress(), decode.progress()
        if not received.done():
            # It asked after the send had ended, and would wait for another send of that id.
            received.cancel()
            until(received.done, prefill, decode)
        until(lambda: is_idle(prefill) and is_idle(decode), prefill, decode)
        assert sorted(map(id, ends)) == sorted([id(sent), id(received)])
        assert sent.blocks_released
        assert received.blocks_released
        pair = (sent.record.outcome, received.record.outcome)
        assert pair in (("done", "done"), ("cancelled", "cancelled"), ("cancelled", "done"))
        outcomes.add(pair)
        if received.record.outcome == "done":
            assert arrived(here, there)
    assert ("cancelled", "cancelled") in outcomes
    sent = prefill.send("r", OURS, 0, TOKENS)
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    until(lambda: sent.done() and received.done(), prefill, decode)
    received.result(0)
    assert arrived(here, there)


def test_cancelling_while_chunks_move_leaves_the_other_requests_whole(ends) -> None:
    prefill, decode, here, there = ends
    rng = random.Random(8)
    kept, cancelled = [], []
    for number in range(20):
        tokens = rng.randint(1, 12)
        theirs = list(range(3 * number, 3 * number + -(-tokens // 4)))
        ours = here.blocks(rng, 0, tokens)
        sent = prefill.send(f"{number}", ours, 0, tokens)
        received = decode.receive(f"{number}", theirs, 0, tokens, from_=["prefill"])
        if number % 2:
            received.cancel()
            cancelled += [sent, received]
        else:
            kept.append((sent, received, ours, theirs, tokens))
    for sent, received, ours, theirs, tokens in kept:
        sent.result(PATIENCE_S)
        received.result(PATIENCE_S)
        assert (there.read(theirs, 0, tokens) == here.read(ours, 0, tokens)).all()
    for handle in cancelled:
        assert handle.wait(PATIENCE_S)
        assert handle.record.outcome in ("cancelled", "done")
    until(lambda: is_idle(prefill) and is_idle(decode))


def test_a_request_id_may_be_used_again_once_both_sides_have_ended(ends) -> None:
    prefill, decode, here, there = ends
    for seed in range(5):
        ship_once(prefill, decode, here, there, request="same", seed=seed)


def test_records_account_for_the_whole_task(group: Group) -> None:
    here = Cache.of(num_blocks=256, heads=Shard(0, 4, 4), dim=64).fill(1)
    there = Cache.of(num_blocks=256, heads=Shard(0, 4, 4), dim=64)
    prefill, decode = group.pair(here, there, staging_bytes=1 << 18)
    rng = random.Random(3)
    tokens = 1000
    ours, theirs = here.blocks(rng, 0, tokens), there.blocks(rng, 0, tokens)
    sent = prefill.send("counted", ours, 0, tokens)
    received = decode.receive("counted", theirs, 0, tokens, from_=["prefill"])
    records = [handle.result(PATIENCE_S).record for handle in (received, sent)]
    payload = tokens * 2 * 2 * 4 * 64 * 2
    for record, side, peer in zip(records, ("receive", "send"), ("prefill", "decode"), strict=True):
        assert record.request == "counted"
        assert record.side == side
        assert record.peers == (peer,)
        assert (record.device, record.path) == ("cpu", "staged")
        assert (record.outcome, record.reason) == ("done", "")
        assert record.nbytes == payload
        # A block of one layer is contiguous on both sides, for K and for V.
        assert record.fragments == 250 * 2 * 2
        assert record.writes == record.chunks > payload // (1 << 18)
        assert record.covered_ms <= record.task_ms
        assert record.covered_ms >= 0.9 * record.task_ms - 1
        assert all(0 <= ms <= record.task_ms for ms in record.phases_ms)
    got, gave = records
    for phase in (Phase.WIRE, Phase.SCATTER):
        assert got.phase_ms(phase) > 0
    for phase in (Phase.GATHER, Phase.WIRE, Phase.CREDIT):
        assert gave.phase_ms(phase) > 0
    assert gave.phase_ms(Phase.SCATTER) == got.phase_ms(Phase.GATHER) == 0


def test_a_record_of_several_sends_counts_each_ones_own_share(ends) -> None:
    prefill, decode, *_ = ends
    late = Flag()
    first = prefill.send("r", OURS[:3], 0, 12, final=False)
    second = prefill.send("r", OURS[3:], 12, TOKENS, ready=late)
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    assert first.wait_blocks_released(PATIENCE_S)
    held_since, queries = time.perf_counter(), late.queries
    until(lambda: late.queries > queries + 20)
    held_ms = (time.perf_counter() - held_since) * 1e3
    late.fired = True
    whole = received.result(PATIENCE_S).record
    parts = [handle.result(PATIENCE_S).record for handle in (first, second)]
    assert sum(part.nbytes for part in parts) == whole.nbytes == TOKENS * 2 * 2 * 2 * 8 * 2
    assert [part.nbytes for part in parts] == [whole.nbytes // 2] * 2
    assert sum(part.fragments for part in parts) == whole.fragments
    # The second was not asked for while its event had not fired, and waited for no grant.
    assert parts[1].phase_ms(Phase.QUEUE) >= held_ms
    assert parts[1].phase_ms(Phase.CREDIT) < held_ms


def test_capacity_counts_what_is_under_way_and_returns_to_the_start(ends) -> None:
    prefill, decode, *_ = ends
    before = prefill.capacity(), decode.capacity()
    flag = Flag()
    sent = prefill.send("r", OURS, 0, TOKENS, ready=flag)
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    assert prefill.capacity().sends == 1
    assert decode.capacity().receives == 1
    assert decode.capacity().peers == ("prefill",)
    flag.fired = True
    received.result(PATIENCE_S)
    sent.result(PATIENCE_S)
    until(lambda: (prefill.capacity(), decode.capacity()) == before)


def test_warmup_plans_and_connects_without_moving_anything(ends) -> None:
    prefill, decode, here, there = ends
    prefill.warmup(["decode"])
    decode.warmup(["prefill"])
    assert there.is_poison()
    ship_once(prefill, decode, here, there)


@pytest.mark.parametrize("driver", ["thread", "caller"])
def test_callbacks_may_connect_and_disconnect(loopback_group: Group, driver: str) -> None:
    here, there = Cache.of().fill(1), Cache.of()
    prefill, decode = loopback_group.pair(here, there)
    elsewhere = Cache.of()
    third = loopback_group.open("third", elsewhere.layout, driver=driver)
    loopback_group.meet(prefill, third)
    seen: list[object] = []

    def turn_around(handle: object) -> None:
        third.disconnect("prefill")
        seen.append(third.connect(decode.metadata()))

    sent = prefill.send("r", OURS, 0, TOKENS, to=["third"])
    received = third.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    received.add_done_callback(turn_around)
    received.result(PATIENCE_S)
    until(lambda: bool(seen), *([third] if driver == "caller" else []))
    assert third.capacity().peers == ("decode",)
    assert sent.wait(PATIENCE_S)
    assert arrived(here, elsewhere)


@pytest.mark.parametrize("driver", ["thread", "caller"])
def test_what_would_wait_forever_in_a_callback_is_refused(
    loopback_group: Group, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = Cache.of().fill(1), Cache.of()
    prefill = loopback_group.open("prefill", here.layout)
    decode = loopback_group.open("decode", there.layout, driver=driver)
    loopback_group.meet(prefill, decode)
    never = decode.receive("never", [1], 0, 1, from_=["prefill"])
    prefill.send("r", OURS, 0, TOKENS)
    received = decode.receive("r", THEIRS, 0, TOKENS, from_=["prefill"])
    received.add_done_callback(lambda handle: decode.close())
    received.add_done_callback(lambda handle: never.result())
    received.result(PATIENCE_S)
    until(lambda: caplog.text.count("a callback of request 'r' failed") == 2)
    assert "close" in caplog.text
    assert "callback" in caplog.text
    driven = [decode] if driver == "caller" else []
    never.cancel()
    until(never.done, *driven)


def test_cancelling_while_it_finishes_ends_it_once(ends) -> None:
    prefill, decode, here, there = ends
    for number in range(30):
        ends_seen: list[object] = []
        sent = prefill.send(f"{number}", OURS, 0, TOKENS)
        received = decode.receive(f"{number}", THEIRS, 0, TOKENS, from_=["prefill"])
        for handle in (sent, received):
            handle.add_done_callback(ends_seen.append)
        threads = [threading.Thread(target=h.cancel) for h in (sent, received) for _ in range(2)]
        sent.wait_blocks_released(PATIENCE_S)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert sent.wait(PATIENCE_S)
        assert received.wait(PATIENCE_S)
        until(lambda seen=ends_seen: len(seen) == 2)
        if received.record.outcome == "done":
            assert arrived(here, there)
    until(lambda: is_idle(prefill) and is_idle(decode))
    ship_once(prefill, decode, here, there)
