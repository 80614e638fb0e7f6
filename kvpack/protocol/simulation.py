"""Random schedules on a simulated cluster: requests, cancellations, retries and deaths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from kvpack.errors import StagingError
from kvpack.protocol.cluster import (
    EXIT_S,
    SLOT_BYTES,
    Chaos,
    Cluster,
    Node,
    Report,
    SimulationError,
    StraightWire,
    Transfer,
)
from kvpack.protocol.exchange import Exchange
from kvpack.protocol.inbox import SourceSpec
from kvpack.protocol.messages import Outcome, Request
from kvpack.protocol.peers import Peers
from kvpack.protocol.pool import SlotPool
from kvpack.protocol.receiver import Receiver
from kvpack.protocol.sender import Sender

CALM = Chaos(duplicate=0.1, slow=0.05, timeouts_s=(1e5, 1e5), tombstone_s=(1e4,))
"""Messages are late, out of order and repeated; every transfer must succeed."""

ROUGH = Chaos(duplicate=0.1, slow=0.1, error=0.01, cancel=0.15, retry=0.5, pause=0.15)
"""Transfers are cancelled, fail and time out; every lease must come back."""

WILD = replace(ROUGH, drop=0.02, cut=0.15, crash=0.15)
"""Messages and connections are lost, endpoints die: leases may stay in doubt, never be shared."""


@dataclass(frozen=True)
class Machines:
    """The classes that endpoints are built from: a test replaces one by a faulty one."""

    sender: type[Sender] = Sender
    receiver: type[Receiver] = Receiver
    pool: type[SlotPool] = SlotPool


@dataclass(frozen=True)
class _Plan:
    """One request of a schedule."""

    request_id: str
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    tokens: int
    cut_bytes: int


def simulate(seed: int, chaos: Chaos, machines: Machines | None = None) -> Report:
    """Run one random schedule to its end.

    Raises
    ------
    SimulationError
        If a rule is broken. An AssertionError of `check_integrity` is passed on.
    """
    simulation = _Simulation(Cluster(seed, chaos), machines or Machines())
    simulation.plan()
    simulation.cluster.run()
    simulation.check_end()
    return simulation.cluster.report


class _Simulation:
    def __init__(self, cluster: Cluster, machines: Machines) -> None:
        self.cluster = cluster
        self._machines = machines
        self._plans: dict[str, _Plan] = {}
        self._last_id = 0

    def plan(self) -> None:
        rng = self.cluster.random
        names = [f"e{index}" for index in range(rng.randint(2, 4))]
        for name in names:
            self._open(name, 1)
        for index in range(rng.randint(1, 4)):
            rng.shuffle(names)
            split = rng.randint(1, len(names) - 1)
            plan = _Plan(
                f"r{index}",
                tuple(names[:split]),
                tuple(names[split:]),
                tokens=rng.randint(1, 12),
                cut_bytes=rng.choice((8, 24, 64, 100, 160)),
            )
            self._plans[plan.request_id] = plan
            self._ask(plan)
        for node in list(self.cluster.nodes.values()):
            self._plan_misfortunes(node)

    # -- endpoints ----------------------------------------------------------------------------

    def _open(self, name: str, incarnation: int) -> Node:
        rng = self.cluster.random
        peers = Peers()
        send_slots, receive_slots = rng.randint(3, 8), rng.randint(3, 10)
        sender = self._machines.sender(
            peers,
            self._machines.pool(send_slots),
            slot_bytes=SLOT_BYTES,
            wire_of=self._wire_of,
            tombstone_s=rng.choice(self.cluster.chaos.tombstone_s),
            max_tombstones=rng.choice((1, 100)) if self.cluster.chaos.cancel else 1000,
        )
        receiver = self._machines.receiver(
            peers,
            self._machines.pool(receive_slots),
            slot_bytes=SLOT_BYTES,
            wire_of=self._wire_of,
            chunk_bytes=rng.choice((None, 100, 200)),
            doubt_s=rng.choice((5.0, 100.0)),
        )
        exchange = Exchange(peers, sender, receiver)
        token = rng.randbytes(16)
        node = Node(name, incarnation, exchange, token, send_slots, receive_slots)
        self.cluster.nodes[node.key] = node
        for other in list(self.cluster.nodes.values()):
            if other is not node:
                self.cluster.connect(node, other)
                self.cluster.connect(other, node)
        return node

    def _newest(self, name: str) -> Node:
        return [node for node in self.cluster.nodes.values() if node.name == name][-1]

    def _wire_of(self, peer: str, request: Request, first: int, last: int) -> StraightWire:
        del peer
        cut_bytes = self._plans[request.request_id].cut_bytes
        tokens = 0 if request.selection == () else last - first
        return StraightWire(tokens * cut_bytes, cut_bytes)

    def _plan_misfortunes(self, node: Node) -> None:
        cluster, rng, chaos = self.cluster, self.cluster.random, self.cluster.chaos
        others = [other for other in cluster.nodes.values() if other is not node]

        def pause() -> None:
            pause_s = rng.uniform(1, 120)
            node.paused_until = cluster.now + pause_s
            cluster.after(pause_s, None, lambda: None)

        def cut() -> None:
            other = rng.choice(others)
            cluster.cut(node, other)
            again = cluster.happens(0.5)
            for one, two in ((node, other), (other, node)):
                cluster.after(cluster.delay(), one, partial(cluster.disconnect, one, two))
                if again:
                    cluster.after(20 + cluster.delay(), one, partial(cluster.connect, one, two))

        def crash() -> None:
            node.alive, node.died = False, cluster.now
            for other in others:
                if cluster.happens(0.5):
                    lost = partial(cluster.disconnect, other, node)
                    cluster.after(cluster.delay(), other, lost)
                cluster.after(2 * EXIT_S, other, partial(cluster.bury, other, node))
            if cluster.happens(0.5):
                cluster.after(cluster.delay(), None, restart)

        def restart() -> None:
            self._open(node.name, node.incarnation + 1)
            for plan in self._plans.values():
                if node.name in plan.senders:
                    self._send(plan, node.name)
                elif node.name in plan.receivers:
                    self._receive(plan, node.name)

        for probability, misfortune in (
            (chaos.pause, pause),
            (chaos.cut, cut),
            (chaos.crash, crash),
        ):
            if cluster.happens(probability):
                cluster.after(rng.uniform(0, 40), node, misfortune)

    # -- requests -----------------------------------------------------------------------------

    def _ask(self, plan: _Plan) -> None:
        for name in plan.senders:
            self._send(plan, name)
        for name in plan.receivers:
            self._receive(plan, name)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _send(self, plan: _Plan, name: str) -> None:
        """Publish a request in up to three ranges, the last of them last."""
        rng = self.cluster.random
        inner = {rng.randint(1, plan.tokens) for _ in range(rng.randint(0, 2))}
        to = rng.choice((None, plan.receivers))
        for first, last in pairwise(sorted({0, plan.tokens} | inner)):
            delay = rng.uniform(0, 8) if last < plan.tokens else rng.uniform(8, 10)
            self._publish(plan, name, (first, last), to, delay, retries=2)

    def _publish(
        self,
        plan: _Plan,
        name: str,
        positions: tuple[int, int],
        to: tuple[str, ...] | None,
        delay: float,
        retries: int,
    ) -> None:
        cluster, rng, send_id = self.cluster, self.cluster.random, self._next_id()
        node = self._newest(name)
        sender = node.exchange.sender

        def publish() -> None:
            first, last = positions
            node.sends[send_id] = Transfer(
                plan.request_id, first, last, plan.receivers, plan.cut_bytes, retry
            )
            timeout_s = rng.uniform(*cluster.chaos.timeouts_s)
            actions = sender.publish(
                send_id,
                plan.request_id,
                first,
                last,
                to=to,
                final=last == plan.tokens,
                aux=bytes(positions),
                deadline=cluster.now + timeout_s,
            )
            cluster.act(node, actions)
            cluster.after(rng.uniform(0, 5), node, ready)
            if cluster.happens(cluster.chaos.cancel):
                cluster.after(rng.uniform(0, 30), node, cancel)

        def ready() -> None:
            node.sends[send_id].ready = True
            cluster.act(node, sender.source_ready(send_id))

        def cancel() -> None:
            cluster.act(node, sender.end(send_id, Outcome.CANCELLED, "cancelled"))

        def retry() -> None:
            if retries and node.alive:
                self._publish(plan, name, positions, to, cluster.delay(), retries - 1)

        cluster.after(delay, node, publish)

    def _receive(self, plan: _Plan, name: str) -> None:
        rng = self.cluster.random
        first = rng.randint(0, plan.tokens - 1)
        last = rng.randint(first + 1, plan.tokens)
        elected = [rng.choice((None, None, ())) for _ in plan.senders]
        self._start(plan, name, (first, last), elected, retries=2)

    def _start(
        self,
        plan: _Plan,
        name: str,
        positions: tuple[int, int],
        elected: Sequence[tuple[()] | None],
        retries: int,
    ) -> None:
        cluster, rng, receive_id = self.cluster, self.cluster.random, self._next_id()
        node = self._newest(name)
        receiver = node.exchange.receiver

        def start() -> None:
            sources = tuple(
                SourceSpec(self._newest(sender).key, lanes)
                for sender, lanes in zip(plan.senders, elected, strict=True)
            )
            if any(source.peer not in node.connected for source in sources):
                retry()
                return
            first, last = positions
            try:
                actions = receiver.start(
                    receive_id,
                    plan.request_id,
                    first,
                    last,
                    sources,
                    receivers=plan.receivers,
                    timeout_s=rng.uniform(*cluster.chaos.timeouts_s),
                    now=cluster.now,
                )
            except StagingError:
                return  # all slots are retired
            node.receives[receive_id] = Transfer(
                plan.request_id, first, last, plan.receivers, plan.cut_bytes, retry, sources
            )
            cluster.act(node, actions)
            cluster.after(rng.uniform(0, 5), node, ready)
            if cluster.happens(cluster.chaos.cancel):
                cluster.after(rng.uniform(0, 30), node, cancel)

        def ready() -> None:
            node.receives[receive_id].ready = True
            cluster.act(node, receiver.destination_ready(receive_id))

        def cancel() -> None:
            cluster.act(node, receiver.end(receive_id, Outcome.CANCELLED, "cancelled"))

        def retry() -> None:
            if retries and node.alive:
                self._start(plan, name, positions, elected, retries - 1)

        cluster.after(rng.uniform(0, 10), node, start)

    # -- the end ------------------------------------------------------------------------------

    def check_end(self) -> None:
        report, chaos = self.cluster.report, self.cluster.chaos
        for node in self.cluster.nodes.values():
            report.drops.update({k.value: n for k, n in node.exchange.drops.items()})
            if not node.alive:
                continue
            node.exchange.check_integrity()
            outgoing, incoming = node.exchange.sender.slots, node.exchange.receiver.slots
            doubted = incoming.in_doubt + incoming.retired
            report.doubted_slots += doubted
            if outgoing.free < outgoing.capacity or incoming.free + doubted < incoming.capacity:
                raise SimulationError("slots are held although nothing is under way")
            if chaos.reliable and doubted:
                raise SimulationError("leases are in doubt although every message arrived")
            for transfer in (*node.sends.values(), *node.receives.values()):
                if not transfer.released:
                    raise SimulationError("a transfer's blocks were never released")
                if chaos is CALM and transfer.outcome is not Outcome.DONE:
                    raise SimulationError("a transfer failed although nothing went wrong")
