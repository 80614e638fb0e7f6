"""Endpoints: kvpack's object in one worker process, one rank on one device."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from kvpack import arguments
from kvpack.blocks import Blocks, block_table
from kvpack.copies import Ready
from kvpack.errors import ClosedError, EndpointError
from kvpack.handles import ReceiveHandle, SendHandle
from kvpack.lanes import Side
from kvpack.layout import CacheLayout
from kvpack.links import blocks_hold
from kvpack.machinery import Capacity, Machinery
from kvpack.options import Options
from kvpack.protocol import Outcome
from kvpack.rendezvous import exchange
from kvpack.staging import Staging
from kvpack.timeline import Timeline
from kvpack.transfers import Incoming, Outgoing

__all__ = ["Capacity", "Endpoint"]


class Endpoint:
    r"""Sends and receives requests' KV caches for one rank.

    Parameters
    ----------
    name : str
        What peers call it; unique among those that ever meet.
    layout : CacheLayout
        This rank's cache. The caller keeps its memory alive until the endpoint is closed.
    staging : Staging, optional
        Staging memory on the cache's device; ``options.staging_bytes`` of its own unless given.
    options : Options, optional
        ``Options.from_environment()`` unless given.

    Raises
    ------
    LayoutError
        If the cache is on a CUDA device and this machine has none.
    EndpointError
        If the name is empty or too long.
    StagingError
        If the staging memory is elsewhere than the cache, or another endpoint uses it.
    TransportError
        If the transport cannot be opened.

    Examples
    --------
    >>> import numpy as np
    >>> from kvpack import CacheLayout, Endpoint, Options, Shard, declare
    >>> def cache():
    ...     return np.random.default_rng().integers(0, 99, (2, 16, 4, 2, 8), np.int16)
    >>> def layout(pool):
    ...     return CacheLayout(declare(pool, "kv block token head dim", layers=0,
    ...                                names=("k", "v"), heads=Shard(0, 2, 2)))
    >>> here, there = cache(), cache()
    >>> options = Options(transport="loopback", staging_bytes=1 << 20)
    >>> with Endpoint("prefill", layout(here), options=options) as prefill, \
    ...         Endpoint("decode", layout(there), options=options) as decode:
    ...     _ = prefill.connect(decode.metadata()), decode.connect(prefill.metadata())
    ...     sent = prefill.send("request", [3, 1], 0, 7)
    ...     result = decode.receive("request", [0, 5], 0, 7, from_=["prefill"]).result(10)
    >>> bool((there[:, 0] == here[:, 3]).all()), bool((there[:, 5, :3] == here[:, 1, :3]).all())
    (True, True)
    """

    def __init__(
        self,
        name: str,
        layout: CacheLayout,
        *,
        staging: Staging | None = None,
        options: Options | None = None,
    ) -> None:
        self.name = arguments.name("endpoint name", name)
        self.layout = layout
        self.options = Options.from_environment() if options is None else options
        self._machinery = Machinery(self.name, layout, staging, self.options)
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._closed = threading.Event()

    # -- connecting -------------------------------------------------------------------------------

    def metadata(self) -> bytes:
        """What a peer's ``connect`` needs; opaque, for the engine's own side channel.

        It holds the token that peers must show, so only they should see it.
        """
        self._check_open()
        return self._machinery.driver.run(self._machinery.connections.metadata)

    def connect(self, peer: bytes | str) -> str:
        """Connect to a peer.

        Both sides must connect: either each is given the other's ``metadata``, or one listens and
        the other is given its address, which connects both. A peer that restarted is connected
        again under its name; what was open with its former self fails.

        Parameters
        ----------
        peer : bytes or str
            The peer's metadata, or ``"host:port"`` of its ``listen``.

        Returns
        -------
        str
            The peer's name.

        Raises
        ------
        ProtocolError
            If the bytes are not metadata, or of another protocol version.
        IncompatibleLayoutsError
            If the two cache layouts disagree.
        EndpointError
            If the peer has this endpoint's name, or uses another transport.
        TransportError
            If the peer cannot be reached, or has slots of another size.
        StagingError
            If the peers outnumber the slots of either pool.
        """
        self._check_open()
        if isinstance(peer, str):
            peer = exchange(peer, self.metadata(), self.options.connect_timeout_s)
        encoded = peer
        return self._machinery.driver.run(lambda: self._machinery.connections.connect(encoded))

    def listen(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Let peers connect with ``connect("host:port")``.

        Parameters
        ----------
        host : str
            A loopback address.
        port : int
            0 takes a free one.

        Returns
        -------
        str
            ``"host:port"`` as ``connect`` takes it.

        Raises
        ------
        TransportError
            If the address cannot be bound or is not of the loopback.
        EndpointError
            If the endpoint listens already.
        """
        self._check_open()
        return self._machinery.driver.run(lambda: self._machinery.connections.listen(host, port))

    def disconnect(self, peer: str, *, exited: bool = False) -> None:
        """Let go of a peer; open transfers with it fail.

        Parameters
        ----------
        peer : str
            Its name.
        exited : bool
            The caller's word that the peer's process has exited. Only that proves that nothing
            of it can still land here, and brings leases in doubt back.

        Raises
        ------
        UnknownPeerError
            If it is not connected.
        """
        self._check_open()
        link = self._machinery.link(peer)
        reason = f"{peer!r} exited" if exited else f"{self.name!r} and {peer!r} were disconnected"
        self._machinery.driver.run(
            lambda: self._machinery.progress.remove_link(link.key, reason, exited=exited)
        )

    # -- transfers --------------------------------------------------------------------------------

    def send(
        self,
        request_id: str,
        blocks: Blocks,
        first: int,
        last: int,
        *,
        to: Sequence[str] | None = None,
        final: bool = True,
        ready: Ready | None = None,
        timeout_s: float | None = None,
        aux: bytes = b"",
    ) -> SendHandle:
        """Offer a request's cache, and send it to the receivers that ask; returns at once.

        Parameters
        ----------
        request_id : str
            Chosen by the engine, the same on both sides.
        blocks : array_like of int, or one per layer group
            Block list: exactly the blocks that positions ``[first, last)`` touch here. In a layer
            group with a window it may lack what fell out of the window, and for state it is the
            slot of the state after ``last`` positions, or empty.
        first, last : int
            Positions, absolute in the sequence.
        to : sequence of str, optional
            Endpoints that are to receive it: the send is done when all of them are. Unless given,
            whoever asks receives it, and names the others in its request.
        final : bool
            Whether this is the last send of the request. Several may carry different ranges.
        ready : event, optional
            Nothing is read from the blocks before ``ready.query()`` is true, as it is for a
            ``torch.cuda.Event`` whose work is over.
        timeout_s : float, optional
            When the send ends at the latest; ``options.timeout_s`` unless given.
        aux : bytes
            Small payload that is delivered with the completion, at most 64 KiB.

        Returns
        -------
        SendHandle
            Its ``blocks_released`` tells when the blocks may be reused.

        Raises
        ------
        BlockListError
            If the block list does not fit the range or the cache, or the range overlaps a send of
            the same request that is in flight.
        EndpointError
            If an argument is not of the kind that it has to be, or ``to`` is a single name.
        UnknownPeerError
            If ``to`` names an endpoint that is not connected.
        ProtocolError
            If ``aux`` is too long.
        """
        started_s = time.perf_counter()
        self._check_open()
        request_id = arguments.name("request_id", request_id)
        first, last = arguments.position("first", first), arguments.position("last", last)
        receivers = None if to is None else arguments.names("to", to)
        ready, aux = arguments.event("ready", ready), arguments.payload("aux", aux)
        timeout_s = self._timeout(timeout_s)
        table = block_table(self.layout, blocks, first, last, "source")
        for name in receivers or ():
            self._machinery.link(name)
        send_id, driver = next(self._ids), self._machinery.driver
        handle = SendHandle(request_id, lambda: self._cancel_send(send_id), driver)
        deadline = time.monotonic() + timeout_s
        progress = self._machinery.progress
        with progress.lock:  # so that nothing is done for the send before it is known
            self._check_open()
            progress.tell(
                lambda: progress.exchange.sender.publish(
                    send_id,
                    request_id,
                    first,
                    last,
                    to=receivers,
                    final=final,
                    aux=aux,
                    deadline=deadline,
                    check=blocks_hold(self.layout, table),
                )
            )
            timeline = Timeline(request_id, "send", self._machinery.staging.device, started_s)
            progress.transfers.outgoing[send_id] = Outgoing(handle, table, ready, timeline)
        return handle

    def receive(
        self,
        request_id: str,
        blocks: Blocks,
        first: int,
        last: int,
        *,
        from_: Sequence[str],
        receivers: Sequence[str] = (),
        ready: Ready | None = None,
        timeout_s: float | None = None,
        stream_layers: bool = False,
    ) -> ReceiveHandle:
        """Ask for a request's cache; returns at once.

        Parameters
        ----------
        request_id : str
            Chosen by the engine, the same on both sides.
        blocks : array_like of int, or one per layer group
            Block list: exactly the blocks that positions ``[first, last)`` touch here.
            ``NO_BLOCK`` skips a block. In a layer group with a window the list may begin with it,
            and for state it is the request's slot.
        first, last : int
            Positions, absolute in the sequence. What a prefix cache holds already is left out.
        from_ : sequence of str
            Every sender that holds part of it. Where several hold a copy, one is elected.
        receivers : sequence of str
            All the endpoints that receive this request, where they are several: a sender keeps its
            blocks until the last of them has what it wants.
        ready : event, optional
            Nothing is written to the blocks before ``ready.query()`` is true.
        timeout_s : float, optional
            When the receive ends at the latest; ``options.timeout_s`` unless given.
        stream_layers : bool
            Keep layers apart on the wire, so that a layer can leave when it is computed.

        Returns
        -------
        ReceiveHandle
            Done when every byte is in its block.

        Raises
        ------
        BlockListError
            If the block list does not fit the range or the cache, or names a block twice.
        CoverageError
            If none of the senders has some wanted layer, head or position.
        EndpointError
            If a receive of the same request is in flight, or an argument is not of the kind that it
            has to be, as a single name for ``from_``.
        StagingError
            If the pools are too small for one token.
        UnknownPeerError
            If ``from_`` names an endpoint that is not connected.
        """
        started_s = time.perf_counter()
        self._check_open()
        request_id = arguments.name("request_id", request_id)
        first, last = arguments.position("first", first), arguments.position("last", last)
        from_ = arguments.names("from_", from_)
        receivers = arguments.names("receivers", receivers)
        ready, timeout_s = arguments.event("ready", ready), self._timeout(timeout_s)
        table = block_table(self.layout, blocks, first, last, "destination")
        sources = self._machinery.sources(request_id, from_, stream_layers, first, last)
        receive_id, driver = next(self._ids), self._machinery.driver
        handle = ReceiveHandle(request_id, lambda: self._cancel_receive(receive_id), driver)
        progress = self._machinery.progress
        with progress.lock:  # so that nothing is done for the receive before it is known
            self._check_open()
            progress.tell(
                lambda: progress.exchange.receiver.start(
                    receive_id,
                    request_id,
                    first,
                    last,
                    sources,
                    receivers=tuple(dict.fromkeys((*receivers, self.name))),
                    timeout_s=timeout_s,
                    now=time.monotonic(),
                    stream_layers=stream_layers,
                )
            )
            timeline = Timeline(request_id, "receive", self._machinery.staging.device, started_s)
            timeline.builder.peers.extend(dict.fromkeys(from_))
            progress.transfers.incoming[receive_id] = Incoming(
                handle, table, ready, timeline, tuple(spec.peer for spec in sources)
            )
        return handle

    def _cancel_send(self, send_id: int) -> None:
        progress, reason = self._machinery.progress, "cancelled by the sender"
        sender = progress.exchange.sender
        progress.tell(lambda: sender.end(send_id, Outcome.CANCELLED, reason))

    def _cancel_receive(self, receive_id: int) -> None:
        progress, reason = self._machinery.progress, "cancelled by the receiver"
        receiver = progress.exchange.receiver
        progress.tell(lambda: receiver.end(receive_id, Outcome.CANCELLED, reason))

    # -- driving ----------------------------------------------------------------------------------

    def progress(self) -> bool:
        """Make one turn; for endpoints with ``Options(driver="caller")``. Never waits.

        Returns
        -------
        bool
            Whether anything happened.

        Raises
        ------
        EndpointError
            If the endpoint has a thread that does this.
        """
        self._check_open()
        if self._machinery.driver.has_thread:
            raise EndpointError(
                f"endpoint {self.name!r} is driven by its own thread; open it with "
                "Options(driver='caller') to drive it yourself"
            )
        return self._machinery.driver.turn()

    def capacity(self) -> Capacity:
        """Slots in use, transfers under way, and peers."""
        self._check_open()
        return self._machinery.capacity()

    def warmup(self, peers: Sequence[str] = ()) -> None:
        """Do ahead what a first transfer would pay for: kernels, plans and connections.

        Parameters
        ----------
        peers : sequence of str
            Peers to plan and to connect with.

        Raises
        ------
        UnknownPeerError
            If one is not connected.
        """
        self._check_open()
        links = [self._machinery.link(name) for name in arguments.names("peers", peers)]
        self._machinery.progress.copier.warmup()
        sides: tuple[Side, Side] = ("source", "destination")
        for link in links:
            for side in sides:
                link.plan(side, None, stream_layers=False)

        def knock() -> None:
            for link in links:
                self._machinery.progress.transport.notify(link.key, b"")

        self._machinery.driver.run(knock)

    def close(self) -> None:
        """Cancel what is under way, tell the peers, and give the staging memory back.

        Memory that a peer may still write to stays allocated until the process ends, and a warning
        says so. It takes at most a few times ``options.connect_timeout_s``.

        Raises
        ------
        EndpointError
            If it is called in a callback of a transfer, or while one of them blocks.
        """
        if os.getpid() != self._pid:
            return
        if self._machinery.driver.is_turning_here and not self._closed.is_set():
            raise EndpointError(
                f"endpoint {self.name!r} cannot close in a callback, whose thread has to bring its "
                "transfers to their ends; close it from another thread"
            )
        with self._machinery.progress.lock:
            if self._closed.is_set():
                return
            self._closed.set()
        self._machinery.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- checks -----------------------------------------------------------------------------------

    def _timeout(self, timeout_s: float | None) -> float:
        if timeout_s is None:
            return self.options.timeout_s
        return arguments.seconds("timeout_s", timeout_s)

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError(
                f"endpoint {self.name!r} belongs to process {self._pid} and cannot be used in its "
                f"forked child {os.getpid()}; open another one there, or start with spawn"
            )
        if self._closed.is_set():
            raise ClosedError(f"endpoint {self.name!r} is closed")
