"""What the sending side does with sends, requests and grants; the test plays the receivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvpack.errors import BlockListError, CoverageError, ProtocolError
from kvpack.protocol import (
    Drop,
    Gather,
    Outcome,
    OutgoingChunk,
    Request,
    SendEnded,
    SourceReleased,
    Wire,
    Write,
)
from kvpack.protocol.cluster import StraightWire
from kvpack.protocol.messages import Cancel, Done, Drained, Fail, Grant, Want

Make = Callable[..., Any]


def publish(
    bench: Any,
    send_id: int = 1,
    first: int = 0,
    last: int = 20,
    *,
    to: tuple[str, ...] | None = ("d0",),
    final: bool = True,
    ready: bool = True,
    **more: Any,
) -> None:
    actions = bench.sender.publish(
        send_id, "r", first, last, to=to, final=final, aux=b"aux", deadline=50.0, **more
    )
    bench.do(actions)
    if ready:
        bench.do(bench.sender.source_ready(send_id))


def ask(
    bench: Any,
    peer: str = "d0@1",
    first: int = 0,
    last: int = 20,
    *,
    receivers: tuple[str, ...] = ("d0",),
    **fields: Any,
) -> None:
    fields = {"selection": None, "stream_layers": False, "timeout_s": 40.0} | fields
    bench.hear(peer, Request, first=first, last=last, receivers=receivers, **fields)


def publish_and_ask(bench: Any) -> None:
    publish(bench)
    ask(bench, timeout_s=99.0)


def grant(bench: Any, number: int, *, peer: str = "d0@1", slots: int = 1, **fields: Any) -> None:
    fields = {"first": 0, "last": 20, "slot": number, "generation": number} | fields
    bench.hear(peer, Grant, number=number, slots=slots, **fields)


def cancel(bench: Any, *, peer: str = "d0@1", grants: int = 0, **fields: Any) -> None:
    fields = {"outcome": Outcome.CANCELLED, "reason": "cancelled by the engine"} | fields
    bench.hear(peer, Cancel, grants=grants, **fields)


def chunks(bench: Any) -> list[OutgoingChunk]:
    return [action.chunk for action in bench.asked(Gather)]


def carry(bench: Any, peer: str = "d0@1", last: int = 20) -> None:
    """Grant, gather and write until the whole of a part was written."""
    number = 0
    while True:
        number += 1
        before = len(chunks(bench))
        grant(bench, number, peer=peer, slots=4, last=last)
        chunk = chunks(bench)[before]
        bench.do(bench.sender.gathered(chunk.chunk_id))
        bench.do(bench.sender.written(chunk.chunk_id))
        if chunk.wire_last == chunk.wire.total_bytes:
            return


def test_a_request_waits_for_its_send_and_a_send_for_its_request(make_bench: Make) -> None:
    for steps in ((ask, publish), (publish, ask)):
        bench = make_bench("d0@1")
        steps[0](bench)
        assert not bench.actions
        steps[1](bench)
        assert [(w.first, w.last, w.aux) for w in bench.said(Want)] == [(0, 20, b"aux")]


def test_nothing_is_wanted_before_the_source_is_ready(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench, ready=False)
    ask(bench)
    assert not bench.said(Want)
    bench.do(bench.sender.source_ready(1))
    assert len(bench.said(Want)) == 1


def test_a_part_without_bytes_waits_for_nothing(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench, ready=False)
    ask(bench, selection=())
    assert len(bench.said(Want)) == 1
    assert bench.asked(SourceReleased)


def test_a_transfer_runs_through_and_its_blocks_are_free_before_it_is_done(
    make_bench: Make,
) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench, first=5, last=17)
    grant(bench, 1, slots=9, first=5, last=17)
    (chunk,) = chunks(bench)
    assert (chunk.first, chunk.last, chunk.wire_first, chunk.wire_last) == (5, 17, 0, 120)
    assert not bench.asked(SourceReleased)
    (write,) = [a for a in bench.do(bench.sender.gathered(1, 77)) if isinstance(a, Write)]
    assert (write.message.number, write.message.checksum) == (1, 77)
    assert bench.asked(SourceReleased)
    bench.do(bench.sender.written(1))
    assert not bench.asked(SendEnded)
    bench.hear("d0@1", Done)
    assert bench.asked(SendEnded) == [SendEnded(1, Outcome.DONE, "")]
    assert not bench.said(Fail)
    assert not bench.said(Drained)


def test_chunks_fit_the_lease_and_half_of_the_send_slots(make_bench: Make) -> None:
    bench = make_bench("d0@1", send_slots=4)
    publish(bench)
    ask(bench)
    grant(bench, 1, slots=1)
    grant(bench, 2, slots=9)
    one, two = chunks(bench)
    assert (one.wire_last, one.run.slots) == (60, 1)
    # Bytes 60 to 170 lie in two slots from byte 48 of the wire on.
    assert (two.wire_first, two.wire_last, two.run.slots) == (60, 170, 2)


def test_grants_are_used_in_the_order_of_their_numbers(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench)
    grant(bench, 2)
    assert not chunks(bench)
    grant(bench, 1)
    assert [chunk.number for chunk in chunks(bench)] == [1, 2]


def test_a_grant_is_used_for_its_own_part(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench, 1, 0, 8, final=False)
    publish(bench, 2, 8, 20)
    ask(bench)
    grant(bench, 1, first=8, last=20)
    assert [(chunk.first, chunk.last) for chunk in chunks(bench)] == [(8, 20)]


def test_a_grant_waits_for_a_send_slot(make_bench: Make) -> None:
    bench = make_bench("d0@1", send_slots=1)
    publish(bench)
    ask(bench)
    grant(bench, 1)
    grant(bench, 2)
    assert len(chunks(bench)) == 1
    bench.do(bench.sender.gathered(1))
    assert len(chunks(bench)) == 1
    bench.do(bench.sender.written(1))
    assert len(chunks(bench)) == 2


def test_send_slots_go_round_the_receivers(make_bench: Make) -> None:
    bench = make_bench("d0@1", "d1@1", send_slots=1)
    publish(bench, to=("d0", "d1"))
    for peer in ("d0@1", "d1@1"):
        ask(bench, peer)
        for number in (1, 2, 3):
            grant(bench, number, peer=peer)
    for chunk_id in range(1, 6):
        bench.do(bench.sender.gathered(chunk_id))
        bench.do(bench.sender.written(chunk_id))
    # The first had a chunk under way before the second came.
    served = [chunk.peer[:2] for chunk in chunks(bench)]
    assert served == ["d0", "d0", "d1", "d0", "d1", "d1"]


def test_a_range_that_no_send_covers_fails_at_once_naming_both(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench, 1, 0, 8, final=False)
    ask(bench, first=4, last=20)
    assert not bench.said(Fail)
    publish(bench, 2, 10, 20)
    (fail,) = bench.said(Fail)
    assert "[4, 20) were asked for, but [0, 8), [10, 20) is sent to d0" in fail.reason
    assert "and [8, 10) is missing: ask for positions that are sent" in fail.reason
    assert {end.outcome for end in bench.asked(SendEnded)} == {Outcome.FAILED}


def test_a_part_that_the_blocks_of_a_send_lack_ends_the_session_before_it_is_offered(
    make_bench: Make,
) -> None:
    bench = make_bench("d0@1", "d1@1")
    checked = []

    def check(wire: Wire) -> None:
        checked.append(wire.total_bytes)
        if wire.total_bytes > 50:
            raise BlockListError("the window is gone")

    publish(bench, 1, 0, 8, to=("d0", "d1"), check=check)
    ask(bench, "d0@1", first=0, last=8)
    (fail,) = bench.said(Fail, "d0@1")
    assert fail.reason == "the window is gone"
    assert checked == [80]
    assert not bench.said(Want)
    ask(bench, "d1@1", first=3, last=8)
    assert checked == [80, 50]
    assert bench.said(Want, "d1@1")


def test_whoever_is_not_named_gets_nothing(make_bench: Make) -> None:
    bench = make_bench("d0@1", "d1@1")
    publish(bench)
    ask(bench, "d1@1")
    (fail,) = bench.said(Fail, "d1@1")
    assert "nothing is sent to d1" in fail.reason
    assert not bench.asked(SendEnded)


def test_overlapping_sends_are_refused_and_change_nothing(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench, 1, 0, 8, final=False)
    with pytest.raises(BlockListError, match=r"\[7, 9\) overlap the send of \[0, 8\)"):
        publish(bench, 2, 7, 9)
    ask(bench, first=8, last=10)
    assert not bench.said(Fail)  # the refused send was final
    publish(bench, 3, 8, 10)
    assert [(w.first, w.last) for w in bench.said(Want)] == [(8, 10)]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("r", 3, 3, None, b""), BlockListError),
        (("r", -1, 3, None, b""), BlockListError),
        (("r", 0, 3, (), b""), BlockListError),
        (("", 0, 3, None, b""), ProtocolError),
        (("r" * 257, 0, 3, None, b""), ProtocolError),
        (("r", 0, 3, None, b"x" * 65537), ProtocolError),
    ],
)
def test_a_send_that_no_message_can_carry_is_refused(
    make_bench: Make, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    bench = make_bench()
    request_id, first, last, to, aux = arguments
    with pytest.raises(error):
        bench.sender.publish(1, request_id, first, last, to=to, final=True, aux=aux, deadline=1.0)
    assert bench.wait_until(9.0) == []


def test_a_send_to_several_ends_with_the_last_of_them(make_bench: Make) -> None:
    bench = make_bench("d0@1", "d1@1")
    publish(bench, to=None)
    ask(bench, "d0@1", receivers=("d0", "d1"))
    carry(bench, "d0@1")
    bench.hear("d0@1", Done)
    assert not bench.asked(SourceReleased)
    assert not bench.asked(SendEnded)
    ask(bench, "d1@1", receivers=("d0", "d1"))
    carry(bench, "d1@1")
    assert bench.asked(SourceReleased)
    bench.hear("d1@1", Done)
    assert bench.asked(SendEnded) == [SendEnded(1, Outcome.DONE, "")]


def test_one_receiver_that_cancels_does_not_stop_the_others(make_bench: Make) -> None:
    bench = make_bench("d0@1", "d1@1")
    publish(bench, to=("d0", "d1"))
    ask(bench, "d0@1")
    ask(bench, "d1@1")
    cancel(bench, peer="d0@1")
    assert len(bench.said(Drained, "d0@1")) == 1
    assert not bench.asked(SendEnded)
    carry(bench, "d1@1")
    bench.hear("d1@1", Done)
    assert bench.asked(SendEnded) == [
        SendEnded(1, Outcome.CANCELLED, "d0: cancelled by the engine")
    ]


def test_a_cancel_drains_when_the_last_write_is_over(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench)
    grant(bench, 1)
    grant(bench, 2)
    bench.do(bench.sender.gathered(1))
    cancel(bench, grants=3)
    assert bench.asked(SendEnded)[0].outcome is Outcome.CANCELLED
    assert not bench.asked(SourceReleased)  # chunk 2 is still being gathered
    assert not any(isinstance(a, Write) for a in bench.do(bench.sender.gathered(2)))
    assert bench.asked(SourceReleased)
    assert not bench.said(Drained)
    bench.do(bench.sender.written(1))
    assert [drained.grants for drained in bench.said(Drained)] == [3]
    assert bench.sender.slots.free == 8


def test_a_write_that_failed_is_over(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench)
    grant(bench, 1)
    bench.do(bench.sender.gathered(1))
    bench.do(bench.sender.chunk_failed(1, "remote disconnect"))
    assert [fail.reason for fail in bench.said(Fail)] == ["remote disconnect"]
    cancel(bench, grants=1)
    assert [drained.grants for drained in bench.said(Drained)] == [1]


def test_a_grant_after_the_end_is_answered_and_never_used(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench)
    bench.do(bench.sender.end(1, Outcome.CANCELLED, "no longer needed"))
    assert [(f.outcome, f.reason) for f in bench.said(Fail)] == [
        (Outcome.CANCELLED, "no longer needed")
    ]
    grant(bench, 1)
    grant(bench, 2)
    drained = bench.said(Drained)
    assert [(d.grants, d.outcome, d.reason) for d in drained] == [
        (1, Outcome.CANCELLED, "no longer needed"),
        (2, Outcome.CANCELLED, "no longer needed"),
    ]
    assert not chunks(bench)


def test_a_cancel_that_overtakes_its_request_keeps_it_shut(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    cancel(bench, attempt=4, grants=0)
    assert len(bench.said(Drained)) == 1
    publish(bench)
    ask(bench, attempt=4)
    assert not bench.said(Want)
    assert bench.exchange.drops == {Drop.STALE_ATTEMPT: 1}


def test_a_later_attempt_replaces_an_earlier_one(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench, attempt=3)
    grant(bench, 1, attempt=3)
    ask(bench, attempt=7)
    ask(bench, attempt=5)
    assert [want.attempt for want in bench.said(Want)] == [3, 7]
    assert not bench.asked(SendEnded)
    cancel(bench, attempt=3, grants=2)
    cancel(bench, attempt=5)
    assert [drained.attempt for drained in bench.said(Drained)] == [5]
    bench.do(bench.sender.gathered(1))
    assert [(d.attempt, d.grants) for d in bench.said(Drained)] == [(5, 0), (3, 2)]
    assert not bench.asked(Write)


@pytest.mark.parametrize("forget", ["by number", "by time"])
def test_forgotten_attempts_stay_shut(make_bench: Make, forget: str) -> None:
    options = {"max_tombstones": 1} if forget == "by number" else {"tombstone_s": 5.0}
    bench = make_bench("d0@1", sender_options=options)
    cancel(bench, attempt=4)
    if forget == "by number":
        cancel(bench, attempt=6, request_id="another")
    else:
        bench.wait_until(6.0)
    publish(bench)
    ask(bench, attempt=4)
    assert not bench.said(Want)
    assert "ask again" in bench.said(Fail)[0].reason
    ask(bench, attempt=7)
    assert [want.attempt for want in bench.said(Want)] == [7]


def test_blocks_that_were_released_are_not_sent_again(make_bench: Make) -> None:
    bench = make_bench("d0@1", "d1@1")
    publish(bench, to=("d0", "d1"))
    ask(bench, "d0@1")
    ask(bench, "d1@1")
    carry(bench, "d0@1")
    carry(bench, "d1@1")
    bench.hear("d0@1", Done)
    ask(bench, "d1@1", attempt=2)
    assert "released already" in bench.said(Fail, "d1@1")[-1].reason


def test_everything_said_twice_changes_nothing(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench)
    ask(bench)
    grant(bench, 1, slots=4)
    grant(bench, 1, slots=4)
    bench.do(bench.sender.gathered(1))
    bench.do(bench.sender.written(1))
    bench.hear("d0@1", Done)
    bench.hear("d0@1", Done)
    assert len(bench.said(Want)) == len(chunks(bench)) == len(bench.asked(SendEnded)) == 1
    assert bench.exchange.drops == {Drop.DUPLICATE: 2, Drop.UNKNOWN_REQUEST: 1}


@pytest.mark.parametrize(
    ("fields", "drop"),
    [
        ({"slot": 60, "slots": 5}, Drop.WRONG_LEASE),
        ({"first": 1}, Drop.WRONG_RANGE),
    ],
)
def test_a_grant_out_of_bounds_is_dropped(
    make_bench: Make, fields: dict[str, Any], drop: Drop
) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench)
    grant(bench, 1, **fields)
    assert not chunks(bench)
    assert bench.exchange.drops == {drop: 1}


def test_a_plan_that_does_not_hold_fails_with_its_own_words(make_bench: Make) -> None:
    def refuse(peer: str, request: Request, first: int, last: int) -> Wire:
        raise CoverageError(f"layer 3 is not here for {peer}")

    bench = make_bench("d0@1", wire_of=refuse)
    publish(bench)
    ask(bench)
    assert [fail.reason for fail in bench.said(Fail)] == ["layer 3 is not here for d0@1"]


def test_a_piece_larger_than_the_staging_fails_naming_both(make_bench: Make) -> None:
    bench = make_bench(
        "d0@1",
        send_slots=2,
        wire_of=lambda peer, request, first, last: StraightWire(1000, 500),
    )
    publish(bench)
    ask(bench)
    grant(bench, 1, slots=9)
    reason = "one piece takes 515 bytes of staging, the longest run of slots has 128"
    assert reason in bench.said(Fail)[0].reason


def test_a_lost_peer_fails_its_own_sessions_only(make_bench: Make) -> None:
    bench = make_bench("d0@1", "d1@1")
    publish(bench, 1, 0, 10, to=("d0",), final=False)
    publish(bench, 2, 10, 20, to=("d1",))
    ask(bench, "d0@1", last=10)
    ask(bench, "d1@1", first=10)
    grant(bench, 1, last=10, slots=2)
    bench.do(bench.sender.gathered(1))
    bench.do(bench.exchange.disconnect("d0@1", "it hung up"))
    assert bench.asked(SendEnded) == [SendEnded(1, Outcome.FAILED, "d0: it hung up")]
    assert bench.sender.slots.free < 8  # the write may still read its slots
    bench.do(bench.sender.chunk_failed(1, "remote disconnect"))
    assert bench.sender.slots.free == 8
    grant(bench, 1, peer="d1@1", first=10)
    assert chunks(bench)[-1].peer == "d1@1"


def test_another_incarnation_is_another_peer(make_bench: Make) -> None:
    bench = make_bench("d0@1", "d0@2")
    publish(bench, to=("d0",))
    ask(bench, "d0@1", attempt=9)
    ask(bench, "d0@2", attempt=1)
    assert len(bench.said(Want, "d0@2")) == 1
    assert "replaced" in bench.said(Fail, "d0@1")[0].reason
    assert not bench.asked(SendEnded)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda b: publish(b, to=None), "no receiver asked for it"),
        (publish, "d0 did not ask for it"),
        (publish_and_ask, "d0 did not say DONE"),
        (lambda b: publish(b, ready=False), "its blocks never became ready"),
    ],
)
def test_a_send_ends_by_its_time_to_live_and_says_what_it_waited_for(
    make_bench: Make, prepare: Callable[[Any], object], reason: str
) -> None:
    bench = make_bench("d0@1")
    prepare(bench)
    assert bench.exchange.next_deadline == 50.0
    bench.wait_until(49.9)
    assert not bench.asked(SendEnded)
    bench.wait_until(50.0)
    (end,) = bench.asked(SendEnded)
    assert end.outcome is Outcome.TIMED_OUT
    assert reason in end.reason
    assert bench.asked(SourceReleased)


def test_a_request_that_nothing_is_sent_for_ends_by_its_deadline(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    ask(bench, timeout_s=3.0)
    bench.wait_until(3.0)
    (fail,) = bench.said(Fail)
    assert (fail.outcome, "nothing was sent" in fail.reason) == (Outcome.TIMED_OUT, True)


def test_one_peer_may_open_so_many_sessions(make_bench: Make) -> None:
    bench = make_bench("d0@1", sender_options={"max_peer_sessions": 2})
    for attempt in (1, 2, 3):
        ask(bench, attempt=attempt, request_id=f"r{attempt}")
    assert [fail.request_id for fail in bench.said(Fail)] == ["r3"]
    assert bench.exchange.drops == {Drop.TOO_MANY: 1}


def test_closing_ends_everything_and_waits_for_what_is_in_flight(make_bench: Make) -> None:
    bench = make_bench("d0@1")
    publish(bench)
    ask(bench)
    grant(bench, 1)
    bench.do(bench.exchange.close())
    assert bench.asked(SendEnded)[0].outcome is Outcome.CANCELLED
    assert not bench.asked(SourceReleased)
    bench.do(bench.sender.gathered(1))
    assert bench.asked(SourceReleased)
    assert bench.sender.slots.free == 8
