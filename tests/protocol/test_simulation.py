"""Whole endpoints on a hostile network: 10,000 random schedules, and bugs that must be caught."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from kvpack.errors import StagingError
from kvpack.protocol import (
    Action,
    Drop,
    Outcome,
    Peers,
    Post,
    Receiver,
    Scatter,
    Sender,
    SlotPool,
    SlotRun,
    SourceReleased,
    Write,
)
from kvpack.protocol.cluster import Chaos
from kvpack.protocol.messages import Cancel, Drained
from kvpack.protocol.receiver import FromSender
from kvpack.protocol.sender import FromReceiver
from kvpack.protocol.simulation import (
    CALM,
    ROUGH,
    WILD,
    Machines,
    simulate,
)


@pytest.mark.parametrize(
    ("chaos", "schedules"),
    [(CALM, 3000), (ROUGH, 4000), (WILD, 3000)],
    ids=["calm", "rough", "wild"],
)
def test_every_schedule_keeps_every_rule(chaos: Chaos, schedules: int) -> None:
    outcomes: Counter[str] = Counter()
    drops: Counter[str] = Counter()
    for seed in range(schedules):
        report = simulate(seed, chaos)
        outcomes.update(report.outcomes)
        drops.update(report.drops)
    # A schedule that no misfortune befell proves nothing: all of them must have happened.
    ends = {f"{what} {end.value}" for what in ("send", "receive") for end in Outcome}
    assert set(outcomes) == ({"send done", "receive done"} if chaos is CALM else ends)
    expected = {Drop.DUPLICATE, Drop.UNKNOWN_REQUEST, Drop.STALE_ATTEMPT}
    assert set(drops) == {
        drop.value for drop in expected | ({Drop.UNKNOWN_PEER} if chaos is WILD else set())
    }


def test_a_schedule_is_the_same_each_time() -> None:
    assert simulate(7, WILD) == simulate(7, WILD)


class FreesLeasesInDoubt(SlotPool):
    """Hands leases out again as soon as their receive has ended."""

    def doubt(self, run: SlotRun) -> None:
        super().free(run)

    def free(self, run: SlotRun) -> None:
        try:
            super().free(run)
        except StagingError:
            return

    def retire(self, run: SlotRun) -> None:
        return


class Unchecked(Receiver):
    """Leaves it to the model of memory to see what a pool does wrong."""

    def check_integrity(self) -> None:
        return


class NeverTakesBackLeases(SlotPool):
    """Loses what was in doubt: proof does not bring it back."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.doubted: set[SlotRun] = set()

    def doubt(self, run: SlotRun) -> None:
        self.doubted.add(run)
        super().doubt(run)

    def free(self, run: SlotRun) -> None:
        if run not in self.doubted:
            super().free(run)


class DrainsTooSoon(Sender):
    """Answers CANCEL while its writes are in flight."""

    def __init__(self, peers: Peers, *args: object, **options: object) -> None:
        super().__init__(peers, *args, **options)  # type: ignore[arg-type]
        self.peers = peers

    def on_message(self, peer: str, message: FromReceiver, now: float) -> list[Action]:
        actions = super().on_message(peer, message, now)
        if isinstance(message, Cancel):
            drained = Drained(
                token=self.peers.get(peer).its_token,
                request_id=message.request_id,
                attempt=message.attempt,
                seq=0,
                outcome=message.outcome,
                reason="drained, or so it says",
                grants=message.grants,
            )
            actions.append(Post(peer, drained))
        return actions


class ReusesSendSlotsOnceWriting(Sender):
    """Takes a write that was posted for one that is over."""

    def gathered(self, chunk_id: int, checksum: int | None = None) -> list[Action]:
        actions = super().gathered(chunk_id, checksum)
        if any(isinstance(a, Write) and a.chunk.chunk_id == chunk_id for a in actions):
            actions += super().written(chunk_id)
        return actions

    def written(self, chunk_id: int) -> list[Action]:
        return []

    def chunk_failed(self, chunk_id: int, reason: str) -> list[Action]:
        try:
            return super().chunk_failed(chunk_id, reason)
        except KeyError:
            return []


class ReleasesBlocksOnceReady(Sender):
    """Gives the engine its blocks back before they were gathered."""

    def source_ready(self, send_id: int) -> list[Action]:
        return [SourceReleased(send_id), *super().source_ready(send_id)]


class DoneOnceLanded(Receiver):
    """Takes a chunk that landed for one that was scattered."""

    def on_message(self, peer: str, message: FromSender, now: float) -> list[Action]:
        actions = super().on_message(peer, message, now)
        for action in list(actions):
            if isinstance(action, Scatter):
                actions += super().scattered(action.chunk.chunk_id)
        return actions

    def scattered(self, chunk_id: int) -> list[Action]:
        return []

    def scatter_failed(self, chunk_id: int, reason: str) -> list[Action]:
        return []


class TakesLostForDead(Receiver):
    """Frees the leases of a peer when the connection to it breaks."""

    def peer_lost(self, peer: str, reason: str) -> list[Action]:
        if reason == "connection lost":
            return self.peer_exited(peer)
        return super().peer_lost(peer, reason)


CUT_OFF = replace(WILD, cut=1.0, slow=0.3)


@pytest.mark.parametrize(
    ("machines", "chaos", "caught_by"),
    [
        (Machines(pool=FreesLeasesInDoubt), ROUGH, "leases have"),
        (
            Machines(pool=FreesLeasesInDoubt, receiver=Unchecked),
            ROUGH,
            "slots that were granted anew",
        ),
        (Machines(pool=NeverTakesBackLeases), ROUGH, "receive slots are in doubt"),
        (Machines(sender=DrainsTooSoon), ROUGH, "a write hit slots that were granted anew"),
        (Machines(sender=ReusesSendSlotsOnceWriting), CALM, "a send slot is reused too soon"),
        (Machines(sender=ReleasesBlocksOnceReady), CALM, "before or after their time"),
        (Machines(receiver=DoneOnceLanded), CALM, "while being scattered|wire bytes are missing"),
        (Machines(receiver=TakesLostForDead), CUT_OFF, "a write hit slots that were granted anew"),
    ],
)
def test_a_planted_bug_is_caught(machines: Machines, chaos: Chaos, caught_by: str) -> None:
    with pytest.raises(AssertionError, match=caught_by):
        _simulate_many(3000, chaos, machines)


def _simulate_many(schedules: int, chaos: Chaos, machines: Machines) -> None:
    for seed in range(schedules):
        simulate(seed, chaos, machines)
