"""What the receiving side grants, takes and doubts; the test plays the senders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvpack.errors import (
    BlockListError,
    CoverageError,
    EndpointError,
    ProtocolError,
    StagingError,
    UnknownPeerError,
)
from kvpack.protocol import (
    DestinationReleased,
    Drop,
    Outcome,
    ReceiveEnded,
    Request,
    Scatter,
    SourceSpec,
)
from kvpack.protocol.cluster import StraightWire
from kvpack.protocol.messages import Cancel, Data, Done, Drained, Fail, Grant, Want

Make = Callable[..., Any]

TOKEN_BYTES = 10
SLOT_BYTES = 64
ONE_SLOT = {"receiver_options": {"chunk_bytes": SLOT_BYTES}}
"""Leases of one slot, so that a request has several."""


def receive(
    bench: Any,
    receive_id: int = 1,
    first: int = 0,
    last: int = 20,
    *,
    peers: tuple[str, ...] = ("p0@1",),
    request_id: str = "r",
    ready: bool = True,
    timeout_s: float = 40.0,
) -> None:
    actions = bench.receiver.start(
        receive_id,
        request_id,
        first,
        last,
        [SourceSpec(peer) for peer in peers],
        receivers=("d0",),
        timeout_s=timeout_s,
        now=bench.now,
    )
    bench.do(actions)
    if ready:
        bench.do(bench.receiver.destination_ready(receive_id))


def want(bench: Any, peer: str = "p0@1", first: int = 0, last: int = 20, **fields: Any) -> None:
    bench.hear(peer, Want, first=first, last=last, **({"aux": b""} | fields))


def land(
    bench: Any, grant: Grant, wire_first: int, wire_last: int, peer: str = "p0@1", **fields: Any
) -> None:
    said = {
        "number": grant.number,
        "slot": grant.slot,
        "generation": grant.generation,
        "first": grant.first,
        "last": grant.last,
        "request_id": grant.request_id,
        "attempt": grant.attempt,
    }
    bench.hear(peer, Data, wire_first=wire_first, wire_last=wire_last, **(said | fields))


def carry(bench: Any, peer: str = "p0@1", first: int = 0, last: int = 20) -> None:
    """Fill each grant of a part and scatter it until all bytes have landed."""
    start, used = 0, 0
    while start < (last - first) * TOKEN_BYTES:
        grants = [g for g in bench.said(Grant, peer) if (g.first, g.last) == (first, last)]
        limit = start // 16 * 16 + grants[used].slots * SLOT_BYTES
        end = min((last - first) * TOKEN_BYTES, limit // TOKEN_BYTES * TOKEN_BYTES)
        land(bench, grants[used], start, end, peer)
        bench.do(bench.receiver.scattered(bench.asked(Scatter)[-1].chunk.chunk_id))
        start, used = end, used + 1


def drained(bench: Any, grants: int, peer: str = "p0@1", **fields: Any) -> None:
    fields = {"outcome": Outcome.CANCELLED, "reason": "as told"} | fields
    bench.hear(peer, Drained, grants=grants, **fields)


def test_a_receive_asks_every_sender_and_is_done_when_all_is_scattered(make_bench: Make) -> None:
    bench = make_bench("p0@1", "p1@1")
    receive(bench, peers=("p0@1", "p1@1"))
    assert [(r.first, r.last, r.receivers) for r in bench.said(Request)] == [(0, 20, ("d0",))] * 2
    want(bench, "p0@1", 0, 20, aux=b"0")
    want(bench, "p1@1", 12, 20, aux=b"b")
    want(bench, "p1@1", 0, 12, aux=b"a")
    carry(bench, "p0@1")
    assert not bench.asked(ReceiveEnded)
    carry(bench, "p1@1", 12, 20)
    carry(bench, "p1@1", 0, 12)
    (end,) = bench.asked(ReceiveEnded)
    assert (end.outcome, end.reason) == (Outcome.DONE, "")
    assert end.aux == {"p0@1": (b"0",), "p1@1": (b"a", b"b")}
    assert bench.asked(DestinationReleased)
    assert len(bench.said(Done)) == 2
    assert bench.receiver.slots.free == 8


def test_nothing_is_granted_before_the_destination_is_ready(make_bench: Make) -> None:
    bench = make_bench("p0@1")
    receive(bench, ready=False)
    want(bench)
    assert not bench.said(Grant)
    bench.do(bench.receiver.destination_ready(1))
    assert bench.said(Grant)


def test_senders_that_have_nothing_yet_hold_nothing(make_bench: Make) -> None:
    bench = make_bench("p0@1", "p1@1")
    receive(bench, peers=("p0@1", "p1@1"))
    assert bench.receiver.slots.owned == 0
    want(bench, "p1@1")
    assert not bench.said(Grant, "p0@1")


def test_what_fits_is_one_lease(make_bench: Make) -> None:
    bench = make_bench("p0@1", receive_slots=16)
    receive(bench)
    want(bench)
    assert [grant.slots for grant in bench.said(Grant)] == [4]


def test_a_pool_smaller_than_the_request_still_carries_it(make_bench: Make) -> None:
    bench = make_bench("p0@1", receive_slots=1)
    receive(bench)
    want(bench)
    carry(bench)
    assert bench.asked(ReceiveEnded)[0].outcome is Outcome.DONE
    assert len(bench.said(Grant)) == 4


def test_a_grant_always_has_a_byte_to_carry(make_bench: Make) -> None:
    bench = make_bench("p0@1", receive_slots=64)
    receive(bench)
    want(bench)
    (grant,) = bench.said(Grant)
    land(bench, grant, 0, 200)
    assert len(bench.said(Grant)) == 1


def test_leases_are_no_larger_than_chunks_may_be(make_bench: Make) -> None:
    bench = make_bench("p0@1", receive_slots=64, receiver_options={"chunk_bytes": 100})
    receive(bench)
    want(bench)
    assert [grant.slots for grant in bench.said(Grant)] == [2, 2]


def test_one_slow_sender_leaves_slots_for_whoever_comes_next(make_bench: Make) -> None:
    bench = make_bench("p0@1", "p1@1", receive_slots=4)
    receive(bench, 1, last=1000, request_id="slow")
    want(bench, last=1000, request_id="slow")
    receive(bench, 2, peers=("p1@1",))
    want(bench, "p1@1", attempt=2)
    assert bench.said(Grant, "p1@1")


def test_every_sender_gets_one_lease_before_any_gets_two(make_bench: Make) -> None:
    peers = tuple(f"p{i}@1" for i in range(4))
    bench = make_bench(*peers, receive_slots=5)
    receive(bench, peers=peers, ready=False)
    for peer in peers:
        want(bench, peer)
    bench.do(bench.receiver.destination_ready(1))
    assert [len(bench.said(Grant, peer)) for peer in peers] == [1, 1, 1, 1]


def test_requests_of_large_pieces_are_not_starved_by_small_ones(make_bench: Make) -> None:
    def wire_of(peer: str, request: Request, first: int, last: int) -> StraightWire:
        cut_bytes = 160 if request.request_id == "large" else 10
        return StraightWire((last - first) * cut_bytes, cut_bytes)

    bench = make_bench("p0@1", "p1@1", receive_slots=4, wire_of=wire_of)
    receive(bench, 1, last=500, request_id="small")
    receive(bench, 2, last=500, request_id="more", peers=("p1@1",))
    want(bench, last=500, request_id="small")
    want(bench, "p1@1", last=500, request_id="more", attempt=2)
    receive(bench, 3, last=2, request_id="large")
    want(bench, last=2, request_id="large", attempt=3)
    starts = {"small": 0, "more": 0}
    number = {"small": 0, "more": 0}
    peer_of = {"small": "p0@1", "more": "p1@1"}
    for _ in range(30):
        for name, peer in peer_of.items():
            grants = [g for g in bench.said(Grant, peer) if g.request_id == name]
            if number[name] == len(grants):
                continue
            grant = grants[number[name]]
            number[name] += 1
            end = (starts[name] // 16 * 16 + grant.slots * 64) // 10 * 10
            land(bench, grant, starts[name], end, peer)
            starts[name] = end
            bench.do(bench.receiver.scattered(bench.asked(Scatter)[-1].chunk.chunk_id))
    assert [g.slots for g in bench.said(Grant) if g.request_id == "large"] == [3]


@pytest.mark.parametrize(
    ("fields", "drop"),
    [
        ({"number": 99}, Drop.DUPLICATE),
        ({"generation": 99}, Drop.WRONG_LEASE),
        ({"slot": 7}, Drop.WRONG_LEASE),
        ({"last": 19}, Drop.WRONG_RANGE),
        ({"wire_first": 190, "wire_last": 210}, Drop.WRONG_RANGE),
        ({"wire_last": 200}, Drop.WRONG_RANGE),  # more than the lease holds
        ({"attempt": 2}, Drop.UNKNOWN_REQUEST),
        ({"request_id": "other"}, Drop.UNKNOWN_REQUEST),
        ({"token": b"?" * 16}, Drop.WRONG_TOKEN),
        ({"peer": "p1@1"}, Drop.DUPLICATE),  # whose lease it is not
        ({"peer": "p9@1"}, Drop.UNKNOWN_PEER),
    ],
)
def test_data_that_does_not_match_its_grant_is_dropped(
    make_bench: Make, fields: dict[str, Any], drop: Drop
) -> None:
    bench = make_bench("p0@1", "p1@1", **ONE_SLOT)
    receive(bench, peers=("p0@1", "p1@1"))
    want(bench)
    grant = bench.said(Grant)[0]
    land(bench, grant, **({"wire_first": 0, "wire_last": 60} | fields))
    assert not bench.asked(Scatter)
    assert bench.exchange.drops == {drop: 1}


def test_data_is_scattered_once(make_bench: Make) -> None:
    bench = make_bench("p0@1", **ONE_SLOT)
    receive(bench)
    want(bench)
    one, two = bench.said(Grant)[:2]
    land(bench, one, 0, 60)
    land(bench, one, 0, 60)
    land(bench, two, 50, 110)  # another lease, bytes that have landed
    assert len(bench.asked(Scatter)) == 1
    assert bench.exchange.drops == {Drop.DUPLICATE: 1, Drop.WRONG_RANGE: 1}


def test_malformed_bytes_are_counted(make_bench: Make) -> None:
    bench = make_bench("p0@1")
    assert bench.exchange.deliver("p0@1", b"\x93garbage", 0.0) == []
    assert bench.exchange.drops == {Drop.MALFORMED: 1}


@pytest.mark.parametrize(
    ("first", "last", "drop"),
    [(0, 20, Drop.DUPLICATE), (5, 20, Drop.WRONG_RANGE), (20, 30, Drop.WRONG_RANGE)],
)
def test_parts_overlap_no_other_and_stay_in_the_request(
    make_bench: Make, first: int, last: int, drop: Drop
) -> None:
    bench = make_bench("p0@1")
    receive(bench)
    want(bench)
    want(bench, first=first, last=last)
    assert bench.exchange.drops == {drop: 1}


def test_a_sender_cannot_call_half_of_it_complete(make_bench: Make) -> None:
    bench = make_bench("p0@1")
    receive(bench)
    want(bench, last=10)
    grant = bench.said(Grant)[0]
    assert grant.last == 10
    land(bench, grant, 0, 100)
    bench.do(bench.receiver.scattered(1))
    assert not bench.asked(ReceiveEnded)
    bench.wait_until(40.0)
    (end,) = bench.asked(ReceiveEnded)
    assert end.outcome is Outcome.TIMED_OUT
    assert "p0 made 10 of 20 positions available; 100 of their 100 bytes" in end.reason


def test_leases_stay_in_doubt_until_their_sender_is_drained(make_bench: Make) -> None:
    bench = make_bench("p0@1", **ONE_SLOT)
    receive(bench)
    want(bench)
    issued = len(bench.said(Grant))
    bench.do(bench.receiver.end(1, Outcome.CANCELLED, "cancelled by the engine"))
    assert bench.asked(ReceiveEnded)[0].outcome is Outcome.CANCELLED
    assert bench.asked(DestinationReleased)
    assert [cancel.grants for cancel in bench.said(Cancel)] == [issued]
    held = bench.receiver.slots.in_doubt
    assert held
    drained(bench, issued + 1)  # more than were issued: nobody can have seen them
    drained(bench, issued, attempt=2)
    assert bench.receiver.slots.in_doubt == held
    drained(bench, issued - 1)
    assert 0 < bench.receiver.slots.in_doubt < held
    drained(bench, issued)
    drained(bench, issued)
    assert bench.receiver.slots.free == 8


def test_data_after_the_end_is_never_scattered(make_bench: Make) -> None:
    bench = make_bench("p0@1", **ONE_SLOT)
    receive(bench)
    want(bench)
    one, two = bench.said(Grant)[:2]
    land(bench, one, 0, 60)
    bench.do(bench.receiver.end(1, Outcome.CANCELLED, "cancelled"))
    assert not bench.asked(DestinationReleased)  # chunk 1 is still being scattered
    land(bench, two, 60, 110)
    assert len(bench.asked(Scatter)) == 1
    bench.do(bench.receiver.scattered(1))
    assert len(bench.asked(DestinationReleased)) == len(bench.asked(ReceiveEnded)) == 1
    drained(bench, len(bench.said(Grant)))
    assert bench.receiver.slots.free == 8


def test_one_failed_sender_fails_the_receive_and_cancels_the_others(make_bench: Make) -> None:
    bench = make_bench("p0@1", "p1@1")
    receive(bench, peers=("p0@1", "p1@1"))
    bench.hear("p0@1", Fail, outcome=Outcome.FAILED, reason="its event never fired")
    (end,) = bench.asked(ReceiveEnded)
    assert (end.outcome, end.reason) == (Outcome.FAILED, "p0: its event never fired")
    assert {c.reason for c in bench.said(Cancel)} == {end.reason}
    assert len(bench.said(Cancel, "p0@1")) == len(bench.said(Cancel, "p1@1")) == 1
    bench.hear("p1@1", Fail, outcome=Outcome.FAILED, reason="mine too")
    assert len(bench.asked(ReceiveEnded)) == 1


def test_drained_that_overtakes_fail_ends_the_receive_as_fail_would(make_bench: Make) -> None:
    bench = make_bench("p0@1")
    receive(bench)
    want(bench)
    drained(bench, len(bench.said(Grant)), reason="no longer needed")
    (end,) = bench.asked(ReceiveEnded)
    assert (end.outcome, end.reason) == (Outcome.CANCELLED, "p0: no longer needed")
    assert bench.receiver.slots.free == 8


def test_a_lost_peer_fails_its_own_receives_and_is_not_taken_for_dead(make_bench: Make) -> None:
    bench = make_bench("p0@1", "p1@1")
    receive(bench, 1, request_id="one")
    receive(bench, 2, request_id="two", peers=("p1@1",))
    want(bench, request_id="one")
    want(bench, "p1@1", request_id="two", attempt=2)
    doubted = bench.receiver.slots.owned
    bench.do(bench.exchange.disconnect("p0@1", "it hung up"))
    (end,) = bench.asked(ReceiveEnded)
    assert (end.receive_id, end.reason) == (1, "p0: it hung up")
    assert 0 < bench.receiver.slots.in_doubt < doubted
    bench.do(bench.exchange.exited("p0@1"))
    assert bench.receiver.slots.in_doubt == 0


def test_a_peer_that_comes_back_is_asked_about_the_leases_in_doubt(make_bench: Make) -> None:
    bench = make_bench("p0@1")
    receive(bench)
    want(bench)
    bench.do(bench.exchange.disconnect("p0@1", "it hung up"))
    assert not bench.said(Cancel)
    bench.connect("p0@1")
    (cancel,) = bench.said(Cancel)
    drained(bench, cancel.grants)
    assert bench.receiver.slots.free == 8


def test_leases_in_doubt_for_long_are_retired_and_still_return_by_proof(make_bench: Make) -> None:
    bench = make_bench("p0@1", receive_slots=1, receiver_options={"doubt_s": 60.0})
    receive(bench)
    want(bench)
    bench.wait_until(40.0)
    assert bench.receiver.slots.in_doubt == 1
    bench.wait_until(100.0)
    assert bench.receiver.slots.retired == 1
    with pytest.raises(StagingError, match="all 1 receive slots are retired"):
        receive(bench, 2)
    drained(bench, 1)
    receive(bench, 2)


def test_a_failed_scatter_fails_the_receive(make_bench: Make) -> None:
    bench = make_bench("p0@1")
    receive(bench)
    want(bench)
    land(bench, bench.said(Grant)[0], 0, 60)
    bench.do(bench.receiver.scatter_failed(1, "illegal address"))
    (end,) = bench.asked(ReceiveEnded)
    assert (end.outcome, end.reason) == (Outcome.FAILED, "scatter: illegal address")
    assert bench.asked(DestinationReleased)


def test_a_plan_that_does_not_hold_fails_with_its_own_words(make_bench: Make) -> None:
    def refuse(peer: str, request: Request, first: int, last: int) -> StraightWire:
        raise CoverageError("layer 3 is not there")

    bench = make_bench("p0@1", wire_of=refuse)
    receive(bench)
    want(bench)
    assert bench.asked(ReceiveEnded)[0].reason == "p0: layer 3 is not there"


def test_a_piece_larger_than_the_staging_fails_naming_both(make_bench: Make) -> None:
    bench = make_bench(
        "p0@1",
        receive_slots=2,
        wire_of=lambda peer, request, first, last: StraightWire(1000, 500),
    )
    receive(bench)
    want(bench)
    assert "takes 515 bytes of staging" in bench.asked(ReceiveEnded)[0].reason


def test_the_next_attempt_is_untouched_by_the_last(make_bench: Make) -> None:
    bench = make_bench("p0@1")
    receive(bench)
    want(bench)
    late = bench.said(Grant)[0]
    bench.do(bench.receiver.end(1, Outcome.CANCELLED, "again"))
    receive(bench, 2)
    want(bench, attempt=2)
    land(bench, late, 0, 60)
    bench.hear("p0@1", Fail, outcome=Outcome.FAILED, reason="late")
    drained(bench, 2)
    assert not bench.asked(Scatter)
    assert len(bench.asked(ReceiveEnded)) == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"last": 0}, BlockListError),
        ({"peers": ()}, CoverageError),
        ({"peers": ("p0@1", "p0@1")}, EndpointError),
        ({"peers": ("p9@1",)}, UnknownPeerError),
        ({"request_id": "x" * 257}, ProtocolError),
        ({"request_id": "taken"}, EndpointError),
    ],
)
def test_what_cannot_be_asked_for_is_refused_and_changes_nothing(
    make_bench: Make, change: dict[str, Any], error: type[Exception]
) -> None:
    bench = make_bench("p0@1")
    receive(bench, request_id="taken")
    before = list(bench.actions)
    with pytest.raises(error):
        receive(bench, 2, **change)
    assert bench.actions == before
    receive(bench, 2)


def test_closing_ends_everything(make_bench: Make) -> None:
    bench = make_bench("p0@1")
    receive(bench)
    want(bench)
    bench.do(bench.exchange.close())
    assert bench.asked(ReceiveEnded)[0].outcome is Outcome.CANCELLED
    assert bench.said(Cancel)
