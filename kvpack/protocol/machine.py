"""What the sender's and the receiver's state machine share: peers, staging, actions and time."""

from __future__ import annotations

import math
from typing import Any, TypeAlias, TypeVar

from kvpack.protocol.actions import Action, Post, WireOf
from kvpack.protocol.messages import MAX_REASON_CHARS, Message
from kvpack.protocol.peers import Peers
from kvpack.protocol.pool import PoolCounts, SlotPool

SessionKey: TypeAlias = tuple[str, str, int]
"""Peer, request id, attempt."""

MessageT = TypeVar("MessageT", bound=Message)


class Machine:
    """Base of both state machines: events go in, lists of actions come out, in order.

    No clock: `tick` and messages bring the time, in seconds from any origin, never backwards.

    Parameters
    ----------
    peers : Peers
        Shared by the sender and the receiver of an endpoint.
    pool : SlotPool
        The send slots or the receive slots; this machine alone takes from it.
    slot_bytes : int
        Size of one of them; a multiple of 16.
    wire_of : WireOf
        Gives a part's wire order.
    """

    def __init__(self, peers: Peers, pool: SlotPool, *, slot_bytes: int, wire_of: WireOf) -> None:
        self._peers = peers
        self._pool = pool
        self._slot_bytes = slot_bytes
        self._wire_of = wire_of
        self._now = -math.inf
        self._soonest = math.inf
        self._last_chunk_id = 0
        self._actions: list[Action] = []

    @property
    def next_deadline(self) -> float:
        """When `tick` next has something to do, or earlier; infinite if never."""
        return self._soonest

    @property
    def slots(self) -> PoolCounts:
        """How many staging slots are in each state."""
        return self._pool.counts()

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def _watch(self, deadline: float) -> float:
        self._soonest = min(self._soonest, deadline)
        return deadline

    def _next_chunk_id(self) -> int:
        self._last_chunk_id += 1
        return self._last_chunk_id

    def _post(self, kind: type[Message], key: SessionKey, **fields: Any) -> None:
        """Post a message of a session, unless its peer is gone."""
        if key[0] in self._peers:
            self._actions.append(Post(key[0], self._message(kind, key, **fields)))

    def _message(self, kind: type[MessageT], key: SessionKey, **fields: Any) -> MessageT:
        """Build a session's next message; a reason is cut to what a message may carry."""
        peer, request_id, attempt = key
        if "reason" in fields:
            fields["reason"] = fields["reason"][:MAX_REASON_CHARS]
        return kind(
            token=self._peers.get(peer).its_token,
            request_id=request_id,
            attempt=attempt,
            seq=self._peers.next_seq(peer),
            **fields,
        )

    def _too_large(self, piece_bytes: int) -> str:
        """Say why a piece can never be carried."""
        counts = self._pool.counts()
        longest = self._pool.largest_possible() * self._slot_bytes
        return (
            f"one piece takes {piece_bytes} bytes of staging, the longest run of slots has "
            f"{longest} ({counts.retired} of {counts.capacity} slots are retired): open the "
            "endpoint with more staging"
        )

    def _slots(self, num_bytes: int) -> int:
        """Count the slots that so many bytes of staging take."""
        return max(1, -(-num_bytes // self._slot_bytes))
