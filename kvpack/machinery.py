"""The parts of an endpoint, put together when it opens and taken apart when it closes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvpack.connections import Connections, Identity
from kvpack.copies import Copier
from kvpack.driver import Driver
from kvpack.election import Election
from kvpack.errors import LayoutError, StagingError, UnknownPeerError
from kvpack.lanes import Side
from kvpack.layout import CacheLayout
from kvpack.links import MAX_PLANS, Link, PartWire, to_rows
from kvpack.options import Options
from kvpack.progress import Progress
from kvpack.protocol import (
    Exchange,
    Peers,
    PoolCounts,
    Receiver,
    Request,
    Sender,
    SlotPool,
    SourceSpec,
)
from kvpack.staging import Staging
from kvpack.transport import LoopbackTransport, Region, Transport, Window
from kvpack.transport.base import Device

_logger = logging.getLogger(__name__)

_QUIET_S = 5e-3
"""How long nothing must come before a closing endpoint stops to listen: a request that is on its
way to it is then answered, and does not wait for its deadline."""


@dataclass(frozen=True)
class Capacity:
    """What an endpoint has in use.

    Attributes
    ----------
    slot_bytes : int
        Bytes of a slot.
    send, receive : PoolCounts
        Slots of either pool by state.
    sends, receives : int
        Transfers that have not ended.
    peers : tuple of str
        Names of the connected peers.
    drops : mapping of str to int
        What arrived and had no effect, by cause.
    """

    slot_bytes: int
    send: PoolCounts
    receive: PoolCounts
    sends: int
    receives: int
    peers: tuple[str, ...]
    drops: Mapping[str, int]


class Machinery:
    """Staging, pools, state machines, transport, connections and driver of one endpoint.

    Parameters
    ----------
    name : str
        The endpoint's name.
    layout : CacheLayout
        Its cache.
    staging : Staging or None
        Its staging memory; of ``options.staging_bytes`` if None.
    options : Options
        Its options.

    Raises
    ------
    LayoutError, StagingError, TransportError
        As ``Endpoint``.
    """

    def __init__(
        self, name: str, layout: CacheLayout, staging: Staging | None, options: Options
    ) -> None:
        _check_device(layout)
        mine = Staging(layout.device, options.staging_bytes) if staging is None else staging
        if mine.device != layout.device:
            raise StagingError(
                f"staging is on {mine.device}, the cache on {layout.device}; open the staging on "
                "the cache's device"
            )
        mine.acquire()
        if staging is None:
            mine.close()  # freed with the last hold on it, which is this one
        self.layout = layout
        self.staging = mine
        self.options = options
        self._name = name
        self._send_pool = SlotPool(mine.send_slots)
        self._receive_pool = SlotPool(mine.receive_slots)
        self._elections: dict[tuple[str, ...], Election] = {}
        try:
            identity = Identity(name)
            self.progress = Progress(
                _open_transport(options.transport, identity.key, mine),
                Copier(mine, options),
                self._exchange(),
                slot_bytes=mine.slot_bytes,
            )
        except BaseException:
            mine.release()
            raise
        self.connections = Connections(identity, layout, mine, options.transport, self.progress)
        self.driver = Driver(name, self.progress, options)

    def _exchange(self) -> Exchange:
        peers, slot_bytes = Peers(), self.staging.slot_bytes
        sender = Sender(
            peers, self._send_pool, slot_bytes=slot_bytes, wire_of=self._wire_of("source")
        )
        receiver = Receiver(
            peers,
            self._receive_pool,
            slot_bytes=slot_bytes,
            wire_of=self._wire_of("destination"),
            chunk_bytes=self.options.chunk_bytes,
        )
        return Exchange(peers, sender, receiver)

    def _wire_of(self, side: Side) -> Callable[[str, Request, int, int], PartWire]:
        def wire_of(peer: str, request: Request, first: int, last: int) -> PartWire:
            return self.progress.links[peer].part(side, request, first, last)

        return wire_of

    def link(self, name: str) -> Link:
        """The link to a connected peer.

        Raises
        ------
        UnknownPeerError
            If it is not connected.
        """
        link = self.progress.find(name)
        if link is None:
            known = sorted(link.name for link in self.progress.links.values())
            raise UnknownPeerError(
                f"endpoint {self._name!r} is not connected to {name!r} (connected: "
                f"{', '.join(known) or 'none'}); connect first"
            )
        return link

    def sources(
        self, request_id: str, names: Sequence[str], stream_layers: bool, first: int, last: int
    ) -> list[SourceSpec]:
        """Elect what each sender of a request is to send, and see that staging can carry it.

        Raises
        ------
        CoverageError, StagingError, UnknownPeerError
            As ``Endpoint.receive``.
        """
        links = {name: self.link(name) for name in dict.fromkeys(names)}
        chosen = self._election(links).elect(f"{request_id}/{self._name}")
        sources = []
        for name, selection in chosen.items():
            link = links[name]
            plan, _ = link.plan("destination", selection, stream_layers)
            piece_bytes = plan.wire(first, last).piece_bytes
            slots = min(self.staging.receive_slots, link.metadata.staging.send_slots)
            if piece_bytes > slots * self.staging.slot_bytes:
                raise StagingError(
                    f"one token of a lane from {name!r} takes {piece_bytes} bytes of staging, but "
                    f"the smaller of its send pool and the receive pool here has "
                    f"{slots * self.staging.slot_bytes}; open the endpoints with more staging"
                )
            sources.append(SourceSpec(link.key, to_rows(selection)))
        return sources

    def _election(self, links: dict[str, Link]) -> Election:
        """The election among some senders, made once for each set of them."""
        keys = tuple(link.key for link in links.values())
        election = self._elections.get(keys)
        if election is None:
            election = Election({name: link.layout for name, link in links.items()}, self.layout)
            live = set(self.progress.links)
            kept = [(k, e) for k, e in self._elections.items() if live.issuperset(k)]
            self._elections = {**dict(kept[-MAX_PLANS:]), keys: election}
        return election

    def capacity(self) -> Capacity:
        """What is in use now."""
        progress = self.progress
        with progress.lock:
            return Capacity(
                slot_bytes=self.staging.slot_bytes,
                send=self._send_pool.counts(),
                receive=self._receive_pool.counts(),
                sends=len(progress.transfers.outgoing),
                receives=len(progress.transfers.incoming),
                peers=tuple(sorted(link.name for link in progress.links.values())),
                drops={cause.value: count for cause, count in progress.exchange.drops.items()},
            )

    def close(self) -> None:
        """Cancel what is under way, tell the peers, and give the staging memory back."""
        timeout_s = self.options.connect_timeout_s
        self.driver.stop()
        self.progress.tell(self.progress.exchange.close)
        self._wind_down(time.monotonic() + timeout_s)
        self.connections.close()
        unfinished = self.progress.transport.close(timeout_s)
        counts = self._receive_pool.counts()
        leased = counts.in_doubt + counts.retired
        if unfinished or leased or self.progress.is_busy:
            _logger.warning(
                "endpoint %r keeps its %d bytes of staging until the process ends: %d writes have "
                "not ended, and peers may still write to %d leased slots",
                self._name,
                self.staging.nbytes,
                unfinished,
                leased,
            )
        else:
            self.staging.release()

    def _wind_down(self, deadline: float) -> None:
        """Let copies, writes and last words end, and peers prove that they have drained."""
        now = busy_at = time.monotonic()
        while now < deadline and now - busy_at < _QUIET_S:
            moved = self.driver.try_turn()
            if moved:
                # Who asked for something in this turn is told too.
                self.progress.tell(self.progress.exchange.close)
            else:
                time.sleep(self.options.busy_poll_s)
            now = time.monotonic()
            if moved or self.progress.is_busy or self._receive_pool.counts().in_doubt:
                busy_at = now


def _check_device(layout: CacheLayout) -> None:
    if layout.device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise LayoutError(
            f"the cache is declared on {layout.device}, but torch {torch.__version__} finds no "
            "CUDA device on this machine; declare a cache in CPU memory or install a CUDA build"
        )


def _open_transport(kind: str, key: str, staging: Staging) -> Transport:
    memory, _, index = staging.device.partition(":")
    device: Device = "cuda" if memory == "cuda" else "cpu"
    region = Region(staging.address, staging.nbytes, device, int(index or 0))
    send = staging.send_window
    window = Window(send.address, send.slot_bytes, send.num_slots, device, int(index or 0))
    if kind == "loopback":
        return LoopbackTransport(key, region, window)
    from kvpack.transport import NixlTransport

    return NixlTransport(key, region, window)
