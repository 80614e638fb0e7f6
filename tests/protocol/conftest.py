"""One endpoint's protocol driven by hand: the test plays its peers, its transport and its clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from kvpack.protocol import (
    Action,
    Exchange,
    Message,
    Peer,
    Peers,
    Post,
    Receiver,
    Request,
    Sender,
    SlotPool,
    Wire,
    encode,
)
from kvpack.protocol.cluster import StraightWire

MINE, ITS = b"m" * 16, b"i" * 16
TOKEN_BYTES = 10
SLOT_BYTES = 64

MessageT = TypeVar("MessageT", bound=Message)
ActionT = TypeVar("ActionT")


def straight(peer: str, request: Request, first: int, last: int) -> Wire:
    tokens = 0 if request.selection == () else last - first
    return StraightWire(tokens * TOKEN_BYTES, TOKEN_BYTES)


class Bench:
    """An exchange, the peers that the test plays, and everything that was asked for so far."""

    def __init__(
        self,
        *,
        send_slots: int = 8,
        receive_slots: int = 8,
        wire_of: Callable[[str, Request, int, int], Wire] = straight,
        sender_options: dict[str, Any] | None = None,
        receiver_options: dict[str, Any] | None = None,
    ) -> None:
        peers = Peers()
        both: dict[str, Any] = {"slot_bytes": SLOT_BYTES, "wire_of": wire_of}
        self.sender = Sender(peers, SlotPool(send_slots), **both, **(sender_options or {}))
        self.receiver = Receiver(peers, SlotPool(receive_slots), **both, **(receiver_options or {}))
        self.exchange = Exchange(peers, self.sender, self.receiver)
        self.actions: list[Action] = []
        self.now = 0.0

    def connect(self, *keys: str) -> None:
        for key in keys:
            peer = Peer(
                key, key.split("@")[0], MINE, ITS, SLOT_BYTES, send_slots=64, receive_slots=64
            )
            self.do(self.exchange.connect(peer))

    def do(self, actions: list[Action]) -> list[Action]:
        self.exchange.check_integrity()
        self.actions += actions
        return actions

    def hear(
        self, peer: str, kind: type[MessageT], attempt: int = 1, **fields: Any
    ) -> list[Action]:
        """Let a peer say something about request "r"."""
        said: dict[str, Any] = {"token": MINE, "request_id": "r", "seq": 1, **fields}
        message = kind(attempt=attempt, **said)
        return self.do(self.exchange.deliver(peer, encode(message), self.now))

    def wait_until(self, now: float) -> list[Action]:
        self.now = now
        return self.do(self.exchange.tick(now))

    def said(self, kind: type[MessageT], peer: str | None = None) -> list[MessageT]:
        """Return what was posted so far, of one kind."""
        return [
            action.message
            for action in self.actions
            if isinstance(action, Post)
            and isinstance(action.message, kind)
            and peer in (None, action.peer)
        ]

    def asked(self, kind: type[ActionT]) -> list[ActionT]:
        """Return the actions so far, of one kind."""
        return [action for action in self.actions if isinstance(action, kind)]


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    def make(*peers: str, **options: Any) -> Bench:
        bench = Bench(**options)
        bench.connect(*peers)
        return bench

    return make
