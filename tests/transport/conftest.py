"""Transports over memory of their own, and the driving of several of them by one thread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvpack.transport import LoopbackTransport, NixlTransport, Region, Transport, Window, Write

POISON = 0xA5

_names = itertools.count()


@dataclass
class Node:
    """A transport whose region is a send window, then a receive window."""

    transport: Transport
    memory: np.ndarray
    send: Window
    receive: Window
    arrived: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.transport.name

    def sent(self, slot: int, slots: int = 1) -> np.ndarray:
        """View of slots of the send window."""
        return self._view(0, slot, slots)

    def received(self, slot: int, slots: int = 1) -> np.ndarray:
        """View of slots of the receive window."""
        return self._view(self.send.nbytes, slot, slots)

    def add(self, *others: Node) -> None:
        for other in others:
            self.transport.add_peer(other.name, other.transport.metadata, other.receive)

    def _view(self, base: int, slot: int, slots: int) -> np.ndarray:
        start = base + slot * self.send.slot_bytes
        return self.memory[start : start + slots * self.send.slot_bytes]


class Fleet:
    """The nodes of one test, driven by its thread."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.nodes: list[Node] = []

    def open(
        self,
        name: str | None = None,
        *,
        slot_bytes: int = 4096,
        send_slots: int = 64,
        receive_slots: int = 96,
    ) -> Node:
        """Open a transport on poisoned memory."""
        name = name or f"node{next(_names)}@1"
        memory = np.full((send_slots + receive_slots) * slot_bytes, POISON, dtype=np.uint8)
        address = memory.ctypes.data
        send = Window(address, slot_bytes, send_slots)
        receive = Window(address + send.nbytes, slot_bytes, receive_slots)
        make = LoopbackTransport if self.kind == "loopback" else NixlTransport
        node = Node(make(name, Region(address, memory.nbytes), send), memory, send, receive)
        self.nodes.append(node)
        return node

    def pair(self, **sizes: int) -> tuple[Node, Node]:
        """Open two nodes that know each other."""
        here, there = self.open(None, **sizes), self.open(None, **sizes)
        here.add(there)
        there.add(here)
        return here, there

    def close(self, node: Node) -> int:
        self.nodes.remove(node)
        return node.transport.close(timeout_s=1.0)

    def drive(self, until: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Take the notifications of all nodes in turn until something holds."""
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, f"nothing came of it in {timeout_s} s"
            self.turn()

    def turn(self) -> None:
        for node in self.nodes:
            node.arrived.extend(node.transport.notifications())

    def finish(self, node: Node, *writes: Write) -> None:
        """Poll a node's writes to their end while all nodes make progress."""
        self.finish_all([(node, write) for write in writes])

    def finish_all(self, writes: list[tuple[Node, Write]]) -> None:
        """Poll writes of several nodes to their end while all nodes make progress."""
        left = list(writes)

        def is_finished() -> bool:
            left[:] = [(node, write) for node, write in left if not node.transport.poll(write)]
            return not left

        self.drive(is_finished)


@pytest.fixture(params=["loopback", "nixl", "nixl-tcp"])
def fleet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Each kind of transport; NIXL by its own choice of path, and as over a network."""
    if request.param == "nixl-tcp":
        monkeypatch.setenv("UCX_TLS", "tcp,self")
        monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    fleet = Fleet(request.param)
    yield fleet
    for node in list(fleet.nodes):
        fleet.close(node)
