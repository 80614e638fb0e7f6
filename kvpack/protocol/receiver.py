"""The receiving side of the protocol: asks senders, grants leases, and judges what has arrived."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvpack.errors import BlockListError, CoverageError, EndpointError, KvpackError, StagingError
from kvpack.protocol.actions import (
    WIRE_ALIGNMENT,
    Action,
    DestinationReleased,
    IncomingChunk,
    Post,
    ReceiveEnded,
    Scatter,
    WireOf,
)
from kvpack.protocol.inbox import Lease, Part, Receive, Scattering, Source, SourceSpec
from kvpack.protocol.machine import Machine, SessionKey
from kvpack.protocol.messages import (
    Cancel,
    Data,
    Done,
    Drained,
    Fail,
    Grant,
    Outcome,
    Request,
    Want,
    decode,
    encode,
)
from kvpack.protocol.peers import Drop, Peers
from kvpack.protocol.pool import SlotPool, SlotRun

FromSender = Want | Data | Fail | Drained


class Receiver(Machine):
    """Asks senders for requests and grants them leases, fairly, until everything is scattered.

    Every method takes an event and returns the actions it calls for. A chunk id that is not under
    way is an error of the caller's (KeyError); nothing that a peer sends raises.

    A source (one sender of one receive) that is at work may hold a fair share of the receive slots:
    one of as many shares as there are such sources, and one more for whoever comes next. It gets
    one lease in any case. What fits in the share is granted as one lease, else in halves of it.

    Parameters
    ----------
    peers, pool, slot_bytes, wire_of
        See `Machine`; the pool is the receive slots.
    chunk_bytes : int or None
        No lease is larger, unless one piece is; None leaves it to the fair share.
    doubt_s : float
        Leases in doubt for longer are retired: counted as lost, unless proof comes after all.
    """

    def __init__(
        self,
        peers: Peers,
        pool: SlotPool,
        *,
        slot_bytes: int,
        wire_of: WireOf,
        chunk_bytes: int | None = None,
        doubt_s: float = 60.0,
    ) -> None:
        super().__init__(peers, pool, slot_bytes=slot_bytes, wire_of=wire_of)
        self._chunk_slots = pool.capacity if chunk_bytes is None else self._slots(chunk_bytes)
        self._doubt_s = doubt_s
        self._last_attempt = 0
        self._receives: dict[int, Receive] = {}
        self._by_request: dict[str, Receive] = {}
        self._chunks: dict[int, Scattering] = {}
        self._doubtful: dict[SessionKey, Source] = {}
        self._at_work: dict[SessionKey, Source] = {}
        self._turns: dict[SessionKey, Source] = {}

    # -- the engine's events ------------------------------------------------------------------

    def start(
        self,
        receive_id: int,
        request_id: str,
        first: int,
        last: int,
        sources: Sequence[SourceSpec],
        *,
        receivers: tuple[str, ...],
        timeout_s: float,
        now: float,
        stream_layers: bool = False,
    ) -> list[Action]:
        """Ask senders for positions [first, last) of a request.

        Parameters
        ----------
        receive_id : int
            Names the receive in actions and calls; unique.
        request_id : str
            At most one receive of an id at a time.
        first, last : int
            Positions, half open.
        sources : sequence of SourceSpec
            The senders; each must be connected.
        receivers : tuple of str
            Names of all endpoints that receive this request, this one included.
        timeout_s : float
            When it ends at the latest, from now.
        now : float
            Seconds.
        stream_layers : bool
            The plan property of that name.

        Raises
        ------
        BlockListError
            If the range is empty.
        CoverageError
            If no sender is named.
        EndpointError
            If a receive of that id is in flight, or a sender is named twice.
        UnknownPeerError
            If a sender is not connected.
        ProtocolError
            If an id, a name or a list is too long for a message.
        StagingError
            If no receive slot is left: all are retired.
        """
        self._check_start(request_id, first, last, sources)
        self._now = now
        self._last_attempt += 1
        receive = Receive(receive_id, request_id, self._last_attempt, self._watch(now + timeout_s))
        for spec in sources:
            key = (spec.peer, request_id, receive.attempt)
            request = self._message(
                Request,
                key,
                first=first,
                last=last,
                selection=spec.selection,
                stream_layers=stream_layers,
                receivers=receivers,
                timeout_s=timeout_s,
            )
            decode(encode(request))  # what the peer would refuse is refused here
            peer = self._peers.get(spec.peer)
            # A lease beyond what the sender cuts at once would lie idle while it holds one chunk.
            max_slots = min(self._chunk_slots, self._slots(peer.max_chunk_bytes))
            receive.sources[spec.peer] = Source(key, peer.name, receive, request, max_slots)
        self._receives[receive_id] = self._by_request[request_id] = receive
        self._actions += [Post(peer, s.request) for peer, s in receive.sources.items()]
        return self._settle()

    def destination_ready(self, receive_id: int) -> list[Action]:
        """Take note that a receive's blocks may be written; nothing is granted before."""
        receive = self._receives.get(receive_id)
        if receive is None:
            return []  # it ended before its event fired
        receive.ready = True
        for source in receive.sources.values():
            self._queue(source)
        return self._settle()

    def end(self, receive_id: int, outcome: Outcome, reason: str) -> list[Action]:
        """End a receive, cancelled or failed; once is enough."""
        receive = self._receives.get(receive_id)
        if receive is not None:
            self._end(receive, outcome, reason)
        return self._settle()

    def close(self, reason: str = "the receiving endpoint was closed") -> list[Action]:
        """End everything. Scatters under way must still be reported."""
        for receive in list(self._receives.values()):
            self._end(receive, Outcome.CANCELLED, reason)
        return self._settle()

    # -- the device's and the transport's events ----------------------------------------------

    def scattered(self, chunk_id: int) -> list[Action]:
        """Take note that a chunk lies in its blocks and its lease is read no more."""
        done = self._chunks[chunk_id]
        done.source.scattered_bytes += done.chunk.wire_last - done.chunk.wire_first
        self._close_chunk(done)
        self._end_if_complete(done.source.receive)
        return self._settle()

    def scatter_failed(self, chunk_id: int, reason: str) -> list[Action]:
        """Take note that a chunk's scatter is over, with an error."""
        failed = self._chunks[chunk_id]
        self._end(failed.source.receive, Outcome.FAILED, f"scatter: {reason}")
        self._close_chunk(failed)
        return self._settle()

    def peer_lost(self, peer: str, reason: str) -> list[Action]:
        """End a peer's receives; its leases stay in doubt, for its writes may still land."""
        for receive in list(self._receives.values()):
            if peer in receive.sources:
                self._end(receive, Outcome.FAILED, f"{receive.sources[peer].name}: {reason}")
        return self._settle()

    def peer_exited(self, peer: str, reason: str = "its process exited") -> list[Action]:
        """Take back the leases of a peer whose process is known to have exited."""
        actions = self.peer_lost(peer, reason)
        for source in [s for s in self._doubtful.values() if s.key[0] == peer]:
            self._dispel(source, source.issued)
        return actions + self._settle()

    def peer_connected(self, peer: str) -> list[Action]:
        """Ask a peer that is connected again, in the same incarnation, about leases in doubt."""
        for source in self._doubtful.values():
            if source.key[0] == peer:
                self._cancel(source, Outcome.FAILED, "the connection was lost")
        return self._settle()

    def tick(self, now: float) -> list[Action]:
        """Let time pass: end what is past its deadline, retire what is in doubt for too long."""
        self._now = now
        if now < self._soonest:
            return []
        for receive in list(self._receives.values()):
            if receive.deadline <= now:
                waiting = [s.progress() for s in receive.sources.values() if not s.complete]
                self._end(receive, Outcome.TIMED_OUT, "; ".join(waiting))
        for source in self._doubtful.values():
            if not source.retired and source.doubted_since + self._doubt_s <= now:
                source.retired = True
                for lease in source.leases.values():
                    if not lease.landed:
                        self._pool.retire(lease.run)
        doubtful = (s for s in self._doubtful.values() if not s.retired)
        self._soonest = min(
            (
                *(receive.deadline for receive in self._receives.values()),
                *(source.doubted_since + self._doubt_s for source in doubtful),
            ),
            default=float("inf"),
        )
        return self._settle()

    # -- the senders' messages ----------------------------------------------------------------

    def on_message(self, peer: str, message: FromSender, now: float) -> list[Action]:
        """Take a message that `Peers.admit` let in."""
        self._now = now
        source = self._source(peer, message.request_id, message.attempt)
        if isinstance(message, Drained):
            self._on_drained((peer, message.request_id, message.attempt), source, message)
        elif source is None:
            self._peers.drop(Drop.UNKNOWN_REQUEST)
        elif isinstance(message, Want):
            self._on_want(source, message)
        elif isinstance(message, Data):
            self._on_data(source, message)
        else:
            self._end(source.receive, message.outcome, f"{source.name}: {message.reason}")
        return self._settle()

    def _source(self, peer: str, request_id: str, attempt: int) -> Source | None:
        receive = self._by_request.get(request_id)
        if receive is None or receive.attempt != attempt:
            return None
        return receive.sources.get(peer)

    def _on_want(self, source: Source, want: Want) -> None:
        if (want.first, want.last) in source.parts:
            return self._peers.drop(Drop.DUPLICATE)
        if not source.accepts(want.first, want.last):
            return self._peers.drop(Drop.WRONG_RANGE)
        try:
            wire = self._wire_of(source.key[0], source.request, want.first, want.last)
        except KvpackError as error:
            return self._end(source.receive, Outcome.FAILED, f"{source.name}: {error}")
        part = Part(want.first, want.last, wire, want.aux)
        source.parts[want.first, want.last] = part
        source.wanted_bytes += wire.total_bytes
        if source.receive.ready:
            self._queue(source)
        return self._end_if_complete(source.receive)

    def _on_data(self, source: Source, data: Data) -> None:
        lease = source.leases.get(data.number)
        if lease is None or lease.landed:
            return self._peers.drop(Drop.DUPLICATE)
        if (data.slot, data.generation) != (lease.run.slot, lease.run.generation):
            return self._peers.drop(Drop.WRONG_LEASE)
        part = lease.part
        staging_bytes = data.wire_last - data.wire_first // WIRE_ALIGNMENT * WIRE_ALIGNMENT
        if (
            (data.first, data.last) != (part.first, part.last)
            or staging_bytes > lease.run.slots * self._slot_bytes
            or not part.land(data.wire_first, data.wire_last)
        ):
            return self._peers.drop(Drop.WRONG_RANGE)
        lease.landed = True
        part.open_slots -= lease.run.slots
        source.open_slots -= lease.run.slots
        self._queue(source)
        source.receive.scattering += 1
        chunk = IncomingChunk(
            self._next_chunk_id(),
            source.receive.receive_id,
            *source.key,
            number=data.number,
            first=part.first,
            last=part.last,
            wire=part.wire,
            wire_first=data.wire_first,
            wire_last=data.wire_last,
            run=lease.run,
            checksum=data.checksum,
        )
        self._chunks[chunk.chunk_id] = Scattering(chunk, source, part)
        self._actions.append(Scatter(chunk))
        return None

    def _on_drained(self, key: SessionKey, source: Source | None, drained: Drained) -> None:
        if source is not None:  # it overtook FAIL
            reason = f"{source.name}: {drained.reason}"
            self._end(source.receive, drained.outcome, reason)
        doubtful = self._doubtful.get(key)
        if doubtful is not None and drained.grants <= doubtful.issued:
            self._dispel(doubtful, drained.grants)
        elif doubtful is not None:
            self._peers.drop(Drop.WRONG_RANGE)

    # -- leases -------------------------------------------------------------------------------

    def _settle(self) -> list[Action]:
        """Grant what can be granted after the events so far and return the actions."""
        granted = True
        while granted and self._turns and self._pool.largest_free():
            granted = False
            for source in list(self._turns.values()):
                # A turn may have ended the receive of a later one.
                if source.key in self._turns and self._take_turn(source):
                    granted = True
                if not self._pool.largest_free():
                    break
        return self._take_actions()

    def _take_turn(self, source: Source) -> bool:
        """Grant a source one more lease, if it can use one, may have it and there is one."""
        part = source.hungry_part(self._slot_bytes)
        if part is None:
            del self._turns[source.key]
            return False
        piece = self._slots(part.least_bytes)
        if piece > self._pool.largest_possible():
            reason = f"{source.name}: {self._too_large(part.least_bytes)}"
            self._end(source.receive, Outcome.FAILED, reason)
            return False
        need = self._slots(part.hungry_bytes(self._slot_bytes) + WIRE_ALIGNMENT - 1)
        share = self._share()
        want = max(piece, min(need, source.max_slots, share if need <= share else share // 2))
        if source.open_slots and source.open_slots + want > share:
            del self._turns[source.key]  # until one of its leases is filled, or the share grows
            return False
        # With leases open it can wait for a decent one; with none it takes what there is.
        least = max(piece, want // 2) if source.open_slots else piece
        run = self._pool.take(want, least, source.key)
        if run is None:
            return False
        self._turns[source.key] = self._turns.pop(source.key)
        self._issue(source, part, run)
        return True

    def _share(self) -> int:
        """Count the slots of open leases that each source at work may have."""
        counts = self._pool.counts()
        return (counts.free + counts.owned) // (len(self._at_work) + 1)

    def _issue(self, source: Source, part: Part, run: SlotRun) -> None:
        source.issued += 1
        source.leases[source.issued] = Lease(run, part)
        part.open_slots += run.slots
        source.open_slots += run.slots
        self._post(
            Grant,
            source.key,
            number=source.issued,
            first=part.first,
            last=part.last,
            slot=run.slot,
            slots=run.slots,
            generation=run.generation,
        )

    def _queue(self, source: Source) -> None:
        """Let a source take turns if it can use a lease, and be at work while it has any."""
        if source.hungry_part(self._slot_bytes) is not None:
            self._at_work[source.key] = source
            self._turns.setdefault(source.key, source)
        elif not source.open_slots:
            self._dismiss([source])

    def _dismiss(self, sources: Iterable[Source]) -> None:
        """Take sources out; the shares of the others grow, so that they may have turns again."""
        for source in sources:
            self._at_work.pop(source.key, None)
            self._turns.pop(source.key, None)
            self._pool.forget(source.key)
        self._turns.update(self._at_work)

    def _close_chunk(self, scattering: Scattering) -> None:
        """Free the lease of a chunk whose scatter is over."""
        chunk, receive = scattering.chunk, scattering.source.receive
        del self._chunks[chunk.chunk_id], scattering.source.leases[chunk.number]
        self._pool.free(chunk.run)
        receive.scattering -= 1
        if receive.outcome is not None and not receive.scattering:
            self._actions.append(DestinationReleased(receive.receive_id))

    def _dispel(self, source: Source, grants: int) -> None:
        """Return the leases in doubt that are proved to be written to no more."""
        for number, lease in list(source.leases.items()):
            if number <= grants and not lease.landed:
                self._pool.free(lease.run)
                del source.leases[number]
        self._turns.update(self._at_work)  # there is more to share
        if all(lease.landed for lease in source.leases.values()):
            del self._doubtful[source.key]

    # -- ends ---------------------------------------------------------------------------------

    def _end_if_complete(self, receive: Receive) -> None:
        if all(source.complete for source in receive.sources.values()):
            self._end(receive, Outcome.DONE, "")

    def _end(self, receive: Receive, outcome: Outcome, reason: str) -> None:
        if receive.outcome is not None:
            return
        receive.outcome = outcome
        del self._receives[receive.receive_id], self._by_request[receive.request_id]
        self._dismiss(receive.sources.values())
        for source in receive.sources.values():
            in_doubt = [lease for lease in source.leases.values() if not lease.landed]
            for lease in in_doubt:
                self._pool.doubt(lease.run)
            if in_doubt:
                source.doubted_since = self._now
                self._watch(self._now + self._doubt_s)
                self._doubtful[source.key] = source
            if outcome is Outcome.DONE:
                self._post(Done, source.key)
            else:
                self._cancel(source, outcome, reason)
        aux = receive.aux() if outcome is Outcome.DONE else {}
        self._actions.append(ReceiveEnded(receive.receive_id, outcome, reason, aux))
        if not receive.scattering:
            self._actions.append(DestinationReleased(receive.receive_id))

    def _cancel(self, source: Source, outcome: Outcome, reason: str) -> None:
        self._post(Cancel, source.key, outcome=outcome, reason=reason, grants=source.issued)

    # -- checks -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError unless every held slot belongs to exactly one lease."""
        self._pool.check_integrity()
        counts = self._pool.counts()
        live = [s for r in self._receives.values() for s in r.sources.values()]
        opened = sum(source.open_slots for source in live)
        assert opened == sum(_open_slots(source) for source in live), "open leases are miscounted"
        scattering = sum(entry.chunk.run.slots for entry in self._chunks.values())
        held = opened + scattering
        doubted = sum(_open_slots(source) for source in self._doubtful.values())
        assert counts.owned == held, f"{counts.owned} receive slots are held, leases have {held}"
        assert counts.in_doubt + counts.retired == doubted, (
            f"{counts.in_doubt} and {counts.retired} receive slots are in doubt and retired, "
            f"doubtful leases have {doubted}"
        )

    def _check_start(
        self, request_id: str, first: int, last: int, sources: Sequence[SourceSpec]
    ) -> None:
        what = f"request {request_id!r}"
        if not 0 <= first < last:
            raise BlockListError(f"{what}: positions [{first}, {last}) are empty or negative")
        if not sources:
            raise CoverageError(f"{what}: no sender is named in `from_`")
        peers = [spec.peer for spec in sources]
        if len(set(peers)) < len(peers):
            raise EndpointError(f"{what}: a sender is named twice in {peers}")
        for peer in peers:
            self._peers.get(peer)
        if request_id in self._by_request:
            raise EndpointError(
                f"{what}: a receive of that id is in flight; wait for it or cancel it"
            )
        if not self._pool.largest_possible():
            raise StagingError(
                f"{what}: all {self._pool.capacity} receive slots are retired, for senders that "
                "may still write to them; they return when those processes exit"
            )


def _open_slots(source: Source) -> int:
    return sum(lease.run.slots for lease in source.leases.values() if not lease.landed)
