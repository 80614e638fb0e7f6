"""Turns: what happened is taken to the protocol, and what the protocol asks for is done.

One thread at a time makes turns, the endpoint's own or the engine's through ``Endpoint.progress``.
A turn polls and posts and never waits. The state machines are shared with the callers of ``send``
and ``receive`` under a lock; transport, copies and events are the turning thread's alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from kvpack.chunks import Chunks
from kvpack.copies import Copier
from kvpack.errors import TransportError
from kvpack.links import Link
from kvpack.protocol import (
    Action,
    DestinationReleased,
    Exchange,
    Gather,
    Outcome,
    Peer,
    Post,
    ReceiveEnded,
    Scatter,
    SendEnded,
    SourceReleased,
    Write,
    encode,
)
from kvpack.transfers import Incoming, Outgoing, Transfers
from kvpack.transport import Transport

MAX_EARLY_MESSAGES = 256
"""Messages kept of peers that were given this endpoint's metadata before it was given theirs."""

MAX_EARLY_BYTES = 1 << 16
"""None of them is longer: what is kept of strangers stays within 16 MiB."""

KNOCK_S = 1.0
"""How often an open receive's senders are knocked at. What is sent to a peer that is gone is lost
without a word, and only what is sent after it fails."""


class Progress:
    """State machines, transport and copies of one endpoint, and the turns that join them.

    Parameters
    ----------
    transport : Transport
        Open.
    copier : Copier
        Of the staging memory.
    exchange : Exchange
        The protocol.
    slot_bytes : int
        Bytes of a staging slot.

    Attributes
    ----------
    lock : threading.RLock
        Guards `exchange`, `transfers` and `links`.
    wake : threading.Event
        Set when there is something to do.
    links : dict of str to Link
        Connected peers by key; replaced, never changed.
    pollers : list of callable
        Called every turn; each tells how much it did.
    """

    def __init__(
        self, transport: Transport, copier: Copier, exchange: Exchange, *, slot_bytes: int
    ) -> None:
        self.transport = transport
        self.copier = copier
        self.exchange = exchange
        self.transfers = Transfers()
        self.lock = threading.RLock()
        self.wake = threading.Event()
        self.links: dict[str, Link] = {}
        self.pollers: list[Callable[[], int]] = []
        self._chunks = Chunks(
            transport,
            copier,
            exchange.sender,
            exchange.receiver,
            self.transfers,
            slot_bytes=slot_bytes,
            tell=self.tell,
            name_of=self.name_of,
            lose=self._lose,
        )
        self._next_knock = 0.0
        self._actions: deque[Action] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._early: deque[tuple[str, bytes]] = deque(maxlen=MAX_EARLY_MESSAGES)

    def tell(self, event: Callable[[], list[Action]]) -> list[Action]:
        """Let a state machine take an event; queue what it asks for, and return it."""
        with self.lock:
            actions = event()
            self._actions.extend(actions)
        self.wake.set()
        return actions

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function in the next turn, on the turning thread."""
        future: Future[Any] = Future()
        self._calls.append((function, future))
        self.wake.set()
        return future

    @property
    def is_busy(self) -> bool:
        """Whether copies or writes are under way."""
        return self._chunks.is_busy

    def turn(self) -> bool:
        """Take and do what there is; tells whether there was anything."""
        now = time.monotonic()
        if now >= self.exchange.next_deadline:  # first, so that nothing that fails delays it
            self.tell(lambda: self.exchange.tick(now))
        moved = self._do_actions() | self._run_calls()
        for poll in self.pollers:
            moved |= bool(poll())
        for peer, payload in self.transport.notifications():
            moved = True
            self._arrived(peer, payload)
        moved |= self._poll_ready()
        moved |= self._do_actions()
        if self._chunks.is_busy:
            moved |= self._chunks.poll()
        if now >= self._next_knock:
            self._next_knock = now + KNOCK_S
            self._knock()
        return self._do_actions() or moved

    def _knock(self) -> None:
        """Find out whether those that open transfers wait for are still there."""
        with self.lock:
            awaited = self.exchange.sender.receivers_at_work()
        awaited |= {
            key for received in list(self.transfers.incoming.values()) for key in received.peers
        }
        for key in awaited & self.links.keys():
            self._notify(key, b"")

    def _run_calls(self) -> bool:
        ran = bool(self._calls)
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        return ran

    def _poll_ready(self) -> bool:
        sender, receiver = self.exchange.sender, self.exchange.receiver
        moved = False
        for send_id, sent in list(self.transfers.outgoing.items()):
            moved |= self._look(sent, send_id, sender.source_ready, sender.end)
        for receive_id, received in list(self.transfers.incoming.items()):
            moved |= self._look(received, receive_id, receiver.destination_ready, receiver.end)
        return moved

    def _look(
        self,
        transfer: Outgoing | Incoming,
        transfer_id: int,
        on_ready: Callable[[int], list[Action]],
        end: Callable[[int, Outcome, str], list[Action]],
    ) -> bool:
        """Ask a transfer's event once more, unless it has fired; tells whether there was news."""
        if transfer.is_ready:
            return False
        try:
            transfer.is_ready = transfer.ready is None or transfer.ready.query()
        except Exception as error:  # what a device reports has no class of its own
            transfer.is_ready = True
            reason = f"its ready event failed: {error}"
            self.tell(lambda: end(transfer_id, Outcome.FAILED, reason))
            return True
        if transfer.is_ready:
            self.tell(lambda: on_ready(transfer_id))
        return transfer.is_ready

    def _do_actions(self) -> bool:
        did = False
        while self._actions:
            did = True
            with self.lock:
                action = self._actions.popleft()
            self._do(action)
        return did

    def _do(self, action: Action) -> None:
        match action:
            case Post(peer, message):
                self.transfers.mark_post(peer, message, self.name_of)
                self._notify(peer, encode(message))
            case Gather(chunk):
                self._chunks.gather(chunk)
            case Write(chunk, message):
                self._chunks.write(chunk, message)
            case Scatter(chunk):
                self._chunks.scatter(chunk)
            case SourceReleased(send_id):
                self.transfers.release_source(send_id)
            case DestinationReleased(receive_id):
                self.transfers.release_destination(receive_id)
            case SendEnded():
                self.transfers.end_send(action)
            case ReceiveEnded():
                self.transfers.end_receive(action, self.name_of)

    # -- peers ------------------------------------------------------------------------------------

    def name_of(self, key: str) -> str:
        """A peer's name by its key; of one that has left, what the key tells."""
        link = self.links.get(key)
        return link.name if link is not None else key.rpartition("@")[0]

    def find(self, name: str) -> Link | None:
        """The link to the peer of a name."""
        return next((link for link in self.links.values() if link.name == name), None)

    def add_link(self, link: Link, peer: Peer) -> None:
        """Take up a peer that the transport knows, and what it said before."""
        with self.lock:
            self.links = {**self.links, link.key: link}
            self._actions.extend(self.exchange.connect(peer))
        early, self._early = self._early, deque(maxlen=MAX_EARLY_MESSAGES)
        for key, payload in early:
            self._arrived(key, payload)

    def remove_link(self, key: str, reason: str, *, exited: bool) -> None:
        """Let go of a peer: it is told, its transfers fail, and leases stay in doubt.

        Only a peer that exited brings its leases back, since then nothing of it can land any more.
        """
        self._lose(key, reason)
        self._do_actions()
        with self.lock:
            self.links = {k: link for k, link in self.links.items() if k != key}
            self._actions.extend(
                self.exchange.exited(key) if exited else self.exchange.disconnect(key, reason)
            )
        self.transport.remove_peer(key)

    def _arrived(self, peer: str, payload: bytes) -> None:
        """Take a notification; nothing in it can raise."""
        if not payload:
            return  # a knock
        if peer in self.links:
            self.tell(lambda: self.exchange.deliver(peer, payload, time.monotonic()))
        elif len(payload) <= MAX_EARLY_BYTES:
            self._early.append((peer, payload))

    def _notify(self, peer: str, payload: bytes) -> None:
        """Send a peer a notification; if that fails, so do the transfers with it."""
        try:
            self.transport.notify(peer, payload)
        except TransportError as error:
            self._lose(peer, str(error))

    def _lose(self, peer: str, reason: str) -> None:
        """Fail the transfers with a peer, and no others."""
        with self.lock:
            self._actions.extend(self.exchange.sender.peer_lost(peer, reason))
            self._actions.extend(self.exchange.receiver.peer_lost(peer, reason))
