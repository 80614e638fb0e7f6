"""A simulated cluster: endpoints, their staging memory and a hostile network, every rule checked.

Endpoints run the real state machines. Memory is modelled by labels, one a slot, so that a write
into slots that were granted anew, a chunk overwritten before it was scattered, or a send slot
reused under a running write is seen when it happens.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from kvpack.errors import StagingError
from kvpack.protocol.actions import (
    WIRE_ALIGNMENT,
    Action,
    DestinationReleased,
    Gather,
    IncomingChunk,
    OutgoingChunk,
    Post,
    ReceiveEnded,
    Scatter,
    SendEnded,
    SourceReleased,
    Write,
)
from kvpack.protocol.exchange import Exchange
from kvpack.protocol.inbox import SourceSpec
from kvpack.protocol.messages import Data, Grant, Message, Outcome, encode
from kvpack.protocol.peers import Peer

SLOT_BYTES = 64

EXIT_S = 30.0
"""How long after a process was killed its last writes may still land."""


class SimulationError(AssertionError):
    """A rule of the protocol was broken."""


@dataclass(frozen=True)
class Chaos:
    """How hostile a schedule is.

    Attributes
    ----------
    drop, duplicate : float
        Probabilities, per message.
    slow : float
        Per delay of a message, write, gather or scatter: fifty times as long.
    error : float
        Per gather, write and scatter.
    cancel : float
        Per transfer.
    retry : float
        Per transfer that ended without success.
    pause, cut, crash : float
        Per endpoint: stopped for a while, cut off from a peer, killed.
    timeouts_s : tuple of float
        Between these two.
    tombstone_s : tuple of float
        One of them, per endpoint.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    error: float = 0.0
    cancel: float = 0.0
    retry: float = 0.0
    pause: float = 0.0
    cut: float = 0.0
    crash: float = 0.0
    timeouts_s: tuple[float, float] = (5.0, 90.0)
    tombstone_s: tuple[float, ...] = (5.0, 300.0)

    @property
    def reliable(self) -> bool:
        """Whether every message arrives, so that all doubt is dispelled in the end."""
        return not (self.drop or self.cut or self.crash)


@dataclass(frozen=True)
class StraightWire:
    """A wire order that may be cut at every multiple of so many bytes."""

    total_bytes: int
    cut_bytes: int

    @property
    def piece_bytes(self) -> int:
        """Staging bytes that hold one piece wherever it starts."""
        return self.cut_bytes + WIRE_ALIGNMENT - 1

    def cut(self, start: int, max_bytes: int) -> int:
        """See `kvpack.protocol.Wire`."""
        limit = start // WIRE_ALIGNMENT * WIRE_ALIGNMENT + max_bytes
        end = min(limit // self.cut_bytes * self.cut_bytes, self.total_bytes)
        if end <= start:
            raise StagingError(f"{max_bytes} bytes of staging do not hold {self.cut_bytes}")
        return end


@dataclass
class Transfer:
    """What is seen from outside of one send or receive."""

    request_id: str
    first: int
    last: int
    receivers: tuple[str, ...]
    cut_bytes: int
    retry: Callable[[], None]
    sources: tuple[SourceSpec, ...] = ()
    ready: bool = False
    released: bool = False
    running: int = 0
    outcome: Outcome | None = None
    scattered: dict[str, list[tuple[int, int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )


Label: TypeAlias = tuple[str, str, int, int]
"""Sender, request id, attempt, grant number: names a chunk in the whole cluster."""


@dataclass(eq=False)
class Node:
    """One endpoint process in one incarnation, with its staging memory."""

    name: str
    incarnation: int
    exchange: Exchange
    token: bytes
    send_slots: int
    receive_slots: int
    alive: bool = True
    died: float = math.inf
    paused_until: float = 0.0
    sends: dict[int, Transfer] = field(default_factory=dict)
    receives: dict[int, Transfer] = field(default_factory=dict)
    connected: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.gathered_in: list[int | None] = [None] * self.send_slots
        self.generation_of: list[int] = [0] * self.receive_slots
        self.landed_in: list[Label | None] = [None] * self.receive_slots
        self.scattering: list[bool] = [False] * self.receive_slots

    @property
    def key(self) -> str:
        """Unique to the incarnation."""
        return f"{self.name}@{self.incarnation}"


@dataclass
class Report:
    """What happened in one schedule."""

    events: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)
    doubted_slots: int = 0


class Cluster:
    """Carries out the actions of all endpoints in random order and checks each of them."""

    def __init__(self, seed: int, chaos: Chaos) -> None:
        self.random = random.Random(seed)
        self.chaos = chaos
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.report = Report()
        self._events: list[tuple[float, int, Node | None, Callable[[], None]]] = []
        self._num_events = 0
        self._cut: set[frozenset[str]] = set()
        self._received: set[tuple[str, str, str]] = set()

    # -- time ---------------------------------------------------------------------------------

    def after(self, delay: float, node: Node | None, event: Callable[[], None]) -> None:
        """Let something happen to a node: never if it is dead by then, later if it is paused."""
        self._num_events += 1
        heapq.heappush(self._events, (self.now + delay, self._num_events, node, event))

    def delay(self) -> float:
        """Draw how long something takes."""
        return self.random.expovariate(0.04 if self.happens(self.chaos.slow) else 2.0)

    def happens(self, probability: float) -> bool:
        """Draw whether something happens."""
        return self.random.random() < probability

    def run(self) -> None:
        """Let time pass until every transfer has ended and nothing is under way."""
        while True:
            awake = [n for n in self.nodes.values() if n.alive and n.paused_until <= self.now]
            due = min((node.exchange.next_deadline for node in awake), default=math.inf)
            if self._events and self._events[0][0] <= due:
                self._step()
            elif self._events or self._open_transfers():
                _require(due < math.inf, f"{self._open_transfers()} transfers are stuck")
                self.now = max(self.now, due)
                for node in awake:
                    self.act(node, node.exchange.tick(self.now))
            else:
                return

    def _step(self) -> None:
        self.now, _, node, event = heapq.heappop(self._events)
        if node is not None and not node.alive:
            return
        if node is not None and node.paused_until > self.now:
            self.after(node.paused_until - self.now, node, event)
            return
        event()
        self.report.events += 1
        if node is not None and self.report.events % 4 == 0:
            node.exchange.check_integrity()

    def _open_transfers(self) -> int:
        return sum(
            transfer.outcome is None
            for node in self.nodes.values()
            if node.alive
            for transfer in (*node.sends.values(), *node.receives.values())
        )

    # -- connections --------------------------------------------------------------------------

    def connect(self, node: Node, other: Node) -> None:
        """Make one endpoint know another, if both live."""
        if other.key in node.connected or not (node.alive and other.alive):
            return
        node.connected.add(other.key)
        self._cut.discard(frozenset((node.key, other.key)))
        peer = Peer(
            key=other.key,
            name=other.name,
            my_token=node.token,
            its_token=other.token,
            slot_bytes=SLOT_BYTES,
            send_slots=other.send_slots,
            receive_slots=other.receive_slots,
        )
        self.act(node, node.exchange.connect(peer))

    def disconnect(self, node: Node, other: Node) -> None:
        """Tell an endpoint that the connection to another broke."""
        node.connected.discard(other.key)
        self.act(node, node.exchange.disconnect(other.key, "connection lost"))

    def bury(self, node: Node, other: Node) -> None:
        """Tell an endpoint that another's process has exited."""
        _require(not other.alive, "only the dead have exited")
        node.connected.discard(other.key)
        self.act(node, node.exchange.exited(other.key))

    def cut(self, node: Node, other: Node) -> None:
        """Let nothing that is posted from now on arrive, until they connect again."""
        self._cut.add(frozenset((node.key, other.key)))

    # -- actions ------------------------------------------------------------------------------

    def act(self, node: Node, actions: list[Action]) -> None:
        """Carry out what an endpoint's state machines ask for."""
        for action in actions:
            match action:
                case Post():
                    self._post(node, action.peer, action.message)
                case Gather():
                    self._gather(node, action.chunk)
                case Write():
                    self._write(node, action.chunk, action.message)
                case Scatter():
                    self._scatter(node, action.chunk)
                case SourceReleased():
                    self._release(node.sends[action.send_id])
                case DestinationReleased():
                    self._release(node.receives[action.receive_id])
                case SendEnded():
                    send = node.sends[action.send_id]
                    self._end(send, action.outcome, action.reason, "send")
                    if action.outcome is Outcome.DONE:
                        done = {(send.request_id, name, node.key) for name in send.receivers}
                        _require(done <= self._received, "a send is done before its receivers are")
                case ReceiveEnded():
                    receive = node.receives[action.receive_id]
                    self._end(receive, action.outcome, action.reason, "receive")
                    if action.outcome is Outcome.DONE:
                        _check_received(receive)
                        self._received |= {
                            (receive.request_id, node.name, source.peer)
                            for source in receive.sources
                        }

    def _post(self, node: Node, peer: str, message: Message) -> None:
        _require(peer in node.connected, f"a message to {peer}, which is not connected")
        if isinstance(message, Grant):
            for slot in range(message.slot, message.slot + message.slots):
                _require(not node.scattering[slot], "slots were granted while being scattered")
                _require(node.generation_of[slot] < message.generation, "a generation repeats")
                node.generation_of[slot] = message.generation
        copies = 1 + self.happens(self.chaos.duplicate) - self.happens(self.chaos.drop)
        if frozenset((node.key, peer)) in self._cut:
            copies = 0
        target, payload = self.nodes[peer], encode(message)

        def deliver() -> None:
            self.act(target, target.exchange.deliver(node.key, payload, self.now))

        for _ in range(copies):
            self.after(self.delay(), target, deliver)

    def _gather(self, node: Node, chunk: OutgoingChunk) -> None:
        send = node.sends[chunk.send_id]
        _require(
            send.ready and not send.released, "blocks were gathered before or after their time"
        )
        slots = range(chunk.run.slot, chunk.run.slot + chunk.run.slots)
        _require(all(node.gathered_in[s] is None for s in slots), "a send slot is reused too soon")
        _require(chunk.wire_last - _origin(chunk) <= len(slots) * SLOT_BYTES, "a chunk overflows")
        send.running += 1
        for slot in slots:
            node.gathered_in[slot] = chunk.chunk_id

        def gathered() -> None:
            send.running -= 1
            sender = node.exchange.sender
            failed = self.happens(self.chaos.error)
            if failed:
                actions = sender.chunk_failed(chunk.chunk_id, "gather failed")
            else:
                actions = sender.gathered(chunk.chunk_id)
            if not any(isinstance(a, Write) and a.chunk is chunk for a in actions):
                self._leave_send_slots(node, chunk)
            self.act(node, actions)

        self.after(self.delay(), node, gathered)

    def _leave_send_slots(self, node: Node, chunk: OutgoingChunk) -> None:
        for slot in range(chunk.run.slot, chunk.run.slot + chunk.run.slots):
            _require(node.gathered_in[slot] == chunk.chunk_id, "a send slot had two chunks")
            node.gathered_in[slot] = None

    def _write(self, node: Node, chunk: OutgoingChunk, message: Data) -> None:
        """Let a write land, whatever its session does, and then tell both sides of it."""
        target = self.nodes[chunk.peer]
        cut = frozenset((node.key, target.key)) in self._cut
        broken = self.happens(0.5 if cut else self.chaos.error)

        def land() -> None:
            if not node.alive and (self.now > node.died + EXIT_S or self.happens(0.5)):
                return
            sent = node.gathered_in[chunk.run.slot : chunk.run.slot + chunk.run.slots]
            _require(set(sent) == {chunk.chunk_id}, "a send slot changed under a running write")
            used = chunk.wire_last - _origin(chunk)
            _require(used <= chunk.lease.slots * SLOT_BYTES, "a chunk overflows its lease")
            for slot in range(chunk.lease.slot, chunk.lease.slot + chunk.lease.slots):
                fresh = target.generation_of[slot] == chunk.lease.generation
                _require(fresh or not target.alive, "a write hit slots that were granted anew")
                _require(not target.scattering[slot], "a write hit slots being scattered")
                target.landed_in[slot] = (node.key, *_session(chunk))
            self.after(self.delay(), node, over)

        def over() -> None:
            if broken:
                actions = node.exchange.sender.chunk_failed(chunk.chunk_id, "write failed")
            else:
                self._post(node, target.key, message) if target.key in node.connected else None
                actions = node.exchange.sender.written(chunk.chunk_id)
            self._leave_send_slots(node, chunk)
            self.act(node, actions)

        self.after(self.delay(), None, land)

    def _scatter(self, node: Node, chunk: IncomingChunk) -> None:
        receive = node.receives[chunk.receive_id]
        _require(receive.ready and not receive.released, "blocks were scattered to after release")
        _require(receive.outcome is None, "a chunk was scattered after the end")
        label = (chunk.peer, *_session(chunk))
        slots = range(chunk.run.slot, chunk.run.slot + chunk.run.slots)
        receive.running += 1
        for slot in slots:
            node.scattering[slot] = True

        def scattered() -> None:
            receive.running -= 1
            for slot in slots:
                _require(node.landed_in[slot] == label, "a chunk changed while it was scattered")
                node.scattering[slot] = False
            if self.happens(self.chaos.error):
                self.act(node, node.exchange.receiver.scatter_failed(chunk.chunk_id, "it failed"))
                return
            span = (chunk.first, chunk.wire_first, chunk.wire_last)
            receive.scattered[chunk.peer].append(span)
            self.act(node, node.exchange.receiver.scattered(chunk.chunk_id))

        self.after(self.delay(), node, scattered)

    def _release(self, transfer: Transfer) -> None:
        _require(not transfer.released, "blocks were released twice")
        _require(not transfer.running, "blocks were released while they were copied")
        transfer.released = True

    def _end(self, transfer: Transfer, outcome: Outcome, reason: str, what: str) -> None:
        _require(transfer.outcome is None, f"a {what} ended twice")
        _require((outcome is Outcome.DONE) == (reason == ""), "an end without a reason")
        transfer.outcome = outcome
        self.report.outcomes[f"{what} {outcome.value}"] += 1
        if outcome is not Outcome.DONE and self.happens(self.chaos.retry):
            transfer.retry()


def _require(condition: bool, broken: str) -> None:
    if not condition:
        raise SimulationError(broken)


def _origin(chunk: OutgoingChunk) -> int:
    return chunk.wire_first // WIRE_ALIGNMENT * WIRE_ALIGNMENT


def _session(chunk: OutgoingChunk | IncomingChunk) -> tuple[str, int, int]:
    return chunk.request_id, chunk.attempt, chunk.number


def _check_received(receive: Transfer) -> None:
    """Check that each wanted wire byte of each source has been scattered exactly once."""
    for source in receive.sources:
        tokens = 0 if source.selection == () else receive.last - receive.first
        ends: dict[int, int] = {}
        for part, wire_first, wire_last in sorted(receive.scattered[source.peer]):
            _require(ends.get(part, 0) == wire_first, "wire bytes were scattered twice or skipped")
            ends[part] = wire_last
        _require(sum(ends.values()) == tokens * receive.cut_bytes, "wire bytes are missing")
