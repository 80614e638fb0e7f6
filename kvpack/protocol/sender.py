"""The sending side of the protocol: serves the receivers that ask for what is published here."""

from __future__ import annotations

from collections import Counter

from kvpack.errors import KvpackError
from kvpack.protocol.actions import (
    WIRE_ALIGNMENT,
    Action,
    CheckPart,
    Gather,
    OutgoingChunk,
    SendEnded,
    SourceReleased,
    WireOf,
    Write,
    check_nothing,
)
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
)
from kvpack.protocol.offers import EndedAttempt, EndedAttempts, InFlight, Offer, Part, Send, Session
from kvpack.protocol.peers import Drop, Peers, largest_chunk_slots
from kvpack.protocol.pool import SlotPool, SlotRun

FromReceiver = Request | Grant | Done | Cancel


class Sender(Machine):
    """Serves the REQUESTs of receivers from the sends published here.

    Every method takes an event and returns the actions it calls for. A chunk id that is not under
    way is an error of the caller's (KeyError); nothing that a peer sends raises.

    Parameters
    ----------
    peers, pool, slot_bytes, wire_of
        See `Machine`; the pool is the send slots.
    tombstone_s : float
        How long an ended session is remembered.
    max_tombstones : int
        How many are at most; see `EndedAttempts`.
    max_peer_sessions : int
        How many open sessions one peer may have.
    """

    def __init__(
        self,
        peers: Peers,
        pool: SlotPool,
        *,
        slot_bytes: int,
        wire_of: WireOf,
        tombstone_s: float = 300.0,
        max_tombstones: int = 16384,
        max_peer_sessions: int = 4096,
    ) -> None:
        super().__init__(peers, pool, slot_bytes=slot_bytes, wire_of=wire_of)
        self._tombstone_s = tombstone_s
        self._max_peer_sessions = max_peer_sessions
        self._offers: dict[str, Offer] = {}
        self._sends: dict[int, Send] = {}
        self._sessions: dict[SessionKey, Session] = {}
        self._ended = EndedAttempts(max_tombstones)
        self._open: Counter[str] = Counter()
        self._chunks: dict[int, InFlight] = {}
        self._turns: dict[SessionKey, Session] = {}
        self._changed: dict[str, Offer] = {}

    # -- the engine's events ------------------------------------------------------------------

    def publish(
        self,
        send_id: int,
        request_id: str,
        first: int,
        last: int,
        *,
        to: tuple[str, ...] | None,
        final: bool,
        aux: bytes,
        deadline: float,
        check: CheckPart = check_nothing,
    ) -> list[Action]:
        """Offer positions [first, last) of a request to the endpoints named, or to whoever asks.

        Parameters
        ----------
        send_id, request_id : int, str
            Names the send, uniquely; several sends of one request have disjoint ranges.
        first, last : int
            Positions, half open.
        to : tuple of str or None
            Names of the endpoints that must receive it; None leaves it to the REQUESTs.
        final : bool
            Whether it is the last send of its id.
        aux : bytes
            Delivered with the completion.
        deadline : float
            When it ends at the latest.
        check : CheckPart
            Called for each part of it; what it raises is why the session ends.

        Raises
        ------
        BlockListError
            If the range is empty or overlaps a send of that id that is in flight, or `to` is empty.
        ProtocolError
            If the request id or `aux` is too long.
        """
        offer = self._offers.get(request_id) or Offer(request_id)
        offer.check_new(first, last, to, aux)
        self._offers[request_id] = offer
        send = Send(send_id, offer, first, last, to, aux, self._watch(deadline), check)
        offer.sends[send_id] = self._sends[send_id] = send
        offer.final = offer.final or final
        offer.expires = max(offer.expires, deadline)
        return self._settle(offer)

    def source_ready(self, send_id: int) -> list[Action]:
        """Take note that a send's blocks hold their data; nothing is gathered before."""
        send = self._sends.get(send_id)
        if send is None:
            return []  # it ended before its event fired
        send.ready = True
        return self._settle(send.offer)

    def end(self, send_id: int, outcome: Outcome, reason: str) -> list[Action]:
        """End a send, cancelled or failed, with every session that it serves; once is enough."""
        send = self._sends.get(send_id)
        if send is not None:
            self._end_send(send, outcome, reason)
        return self._settle()

    def close(self, reason: str = "the sending endpoint was closed") -> list[Action]:
        """End everything. Chunks under way must still be reported."""
        for send in list(self._sends.values()):
            self._end_send(send, Outcome.CANCELLED, reason)
        for session in list(self._sessions.values()):
            self._end_session(session, Outcome.CANCELLED, reason)
        return self._settle()

    # -- the transport's and the device's events ----------------------------------------------

    def gathered(self, chunk_id: int, checksum: int | None = None) -> list[Action]:
        """Take note that a chunk lies in its local slots."""
        flight = self._chunks[chunk_id]
        flight.send.gathering -= 1
        if flight.session.outcome is None:
            flight.writing = True
            landing = flight.chunk.landing() | {"checksum": checksum}
            message = self._message(Data, flight.session.key, **landing)
            self._actions.append(Write(flight.chunk, message))
        else:
            self._land(flight)
        self._release(flight.send)
        return self._settle()

    def written(self, chunk_id: int) -> list[Action]:
        """Take note that a chunk's write is over and its local slots are read no more."""
        self._land(self._chunks[chunk_id])
        return self._settle()

    def chunk_failed(self, chunk_id: int, reason: str) -> list[Action]:
        """Take note that a chunk's gather or write is over, with an error."""
        flight = self._chunks[chunk_id]
        flight.send.gathering -= not flight.writing
        if flight.session.outcome is None:
            self._end_session(flight.session, Outcome.FAILED, reason)
        self._land(flight)
        self._release(flight.send)
        return self._settle()

    def receivers_at_work(self) -> set[str]:
        """Keys of the peers whose requests are open here."""
        return {key[0] for key, session in self._sessions.items() if session.outcome is None}

    def peer_lost(self, peer: str, reason: str) -> list[Action]:
        """End a peer's sessions; its writes in flight must still be reported."""
        for session in [s for s in self._sessions.values() if s.key[0] == peer]:
            self._end_session(session, Outcome.FAILED, reason)
        return self._settle()

    def peer_exited(self, peer: str, reason: str = "its process exited") -> list[Action]:
        """Forget a peer whose process is known to have exited: nothing of it will ever arrive."""
        actions = self.peer_lost(peer, reason)
        self._ended.forget_peer(peer)
        self._open += Counter()  # drops the peers that have none
        return actions

    def tick(self, now: float) -> list[Action]:
        """Let time pass: end what is past its deadline."""
        self._now = now
        if now < self._soonest:
            return []
        overdue = [s for s in self._sends.values() if s.deadline <= now]
        for send, waited in [(send, send.waits_for()) for send in overdue]:
            self._end_send(send, Outcome.TIMED_OUT, waited)
        for session in list(self._sessions.values()):
            if session.outcome is None and session.deadline <= now:
                self._end_session(session, Outcome.TIMED_OUT, session.waited_for())
        for offer in list(self._offers.values()):
            self._changed[offer.request_id] = offer
        self._ended.expire(now)
        actions = self._settle()
        self._soonest = min(
            (
                *(send.deadline for send in self._sends.values()),
                *(s.deadline for s in self._sessions.values() if s.outcome is None),
                *(offer.expires for offer in self._offers.values() if offer.expires > now),
                self._ended.next_expiry,
            )
        )
        return actions

    # -- the receivers' messages --------------------------------------------------------------

    def on_message(self, peer: str, message: FromReceiver, now: float) -> list[Action]:
        """Take a message that `Peers.admit` let in."""
        self._now = now
        key = (peer, message.request_id, message.attempt)
        match message:
            case Request():
                self._on_request(key, message)
            case Grant():
                self._on_grant(key, message)
            case Done():
                self._on_done(key)
            case Cancel():
                self._on_cancel(key, message)
        return self._settle()

    def _on_request(self, key: SessionKey, request: Request) -> None:
        peer, request_id, attempt = key
        if key in self._sessions:
            return self._peers.drop(Drop.DUPLICATE)
        if key in self._ended:
            if self._ended.get(key) is None:
                reason = f"attempt {attempt} came after later ones had ended: ask again"
                self._post(Fail, key, outcome=Outcome.FAILED, reason=reason)
            return self._peers.drop(Drop.STALE_ATTEMPT)
        if self._open[peer] >= self._max_peer_sessions:
            reason = f"{self._open[peer]} requests of one peer are open, no more may be"
            self._peers.drop(Drop.TOO_MANY)
            self._bury(key, Outcome.FAILED, reason)
            return self._post(Fail, key, outcome=Outcome.FAILED, reason=reason)
        offer = self._offers.setdefault(request_id, Offer(request_id))
        name = self._peers.get(peer).name
        older = offer.sessions.get(name)
        if older and older.key[0] == peer and older.key[2] > attempt:
            self._peers.drop(Drop.STALE_ATTEMPT)
            self._bury(key, Outcome.CANCELLED, "a later attempt came first")
            return None
        deadline = self._watch(self._now + request.timeout_s)
        session = Session(key, name, offer, request, deadline)
        offer.sessions[name] = self._sessions[key] = session
        offer.receivers |= dict.fromkeys((*request.receivers, name))
        self._open[peer] += 1
        if older is not None and older.outcome is None:
            self._end_session(older, Outcome.CANCELLED, f"replaced by attempt {attempt}")
        self._changed[request_id] = offer
        return None

    def _on_grant(self, key: SessionKey, grant: Grant) -> None:
        session = self._sessions.get(key)
        if session is None or session.outcome is not None:
            return self._refuse(key, grant.number)
        if grant.number < session.next_grant or grant.number in session.grants:
            return self._peers.drop(Drop.DUPLICATE)
        if session.part_of(grant) is None:
            return self._peers.drop(Drop.WRONG_RANGE)
        receive_slots = self._peers.get(key[0]).receive_slots
        if grant.slot + grant.slots > receive_slots or len(session.grants) >= receive_slots:
            return self._peers.drop(Drop.WRONG_LEASE)
        session.grants[grant.number] = grant
        session.known_grants = max(session.known_grants, grant.number)
        self._turns.setdefault(key, session)
        return None

    def _on_done(self, key: SessionKey) -> None:
        session = self._sessions.get(key)
        if session is None or session.outcome is not None:
            return self._peers.drop(Drop.UNKNOWN_REQUEST)
        # By the count of the module `messages` no grant is left over. If one is, hand it back.
        session.owes_drained = bool(session.grants)
        return self._end_session(session, Outcome.DONE, "", tell=False)

    def _on_cancel(self, key: SessionKey, cancel: Cancel) -> None:
        session = self._sessions.get(key)
        if session is None or session.outcome is not None:
            return self._refuse(key, cancel.grants)
        session.owes_drained = True
        session.known_grants = max(session.known_grants, cancel.grants)
        return self._end_session(session, cancel.outcome, cancel.reason, tell=False)

    def _refuse(self, key: SessionKey, grants: int) -> None:
        """Answer for a session that is over, or that will never be opened."""
        session = self._sessions.get(key)
        if session is not None:
            session.known_grants = max(session.known_grants, grants)
            session.owes_drained = True
            return
        ended = self._ended.get(key)
        if ended is None:
            ended = self._bury(key, Outcome.CANCELLED, "that attempt is not open here")
        ended.grants = max(ended.grants, grants)
        self._answer(key, ended)

    # -- offers, sessions and their ends ------------------------------------------------------

    def _settle(self, changed: Offer | None = None) -> list[Action]:
        """Draw every conclusion from the events so far and return the actions."""
        if changed is not None:
            self._changed[changed.request_id] = changed
        while True:
            while self._changed:
                self._settle_offer(self._changed.popitem()[1])
            self._cut_chunks()
            if not self._changed:
                return self._take_actions()

    def _settle_offer(self, offer: Offer) -> None:
        for session in offer.live_sessions():
            self._extend(session)
        for send in list(offer.sends.values()):
            self._release(send)
            verdict = send.verdict()
            if verdict is not None:
                self._end_send(send, *verdict)
        over = not offer.sends and not any(offer.live_sessions())
        if over and (offer.final or offer.expires <= self._now):
            self._offers.pop(offer.request_id, None)

    def _extend(self, session: Session) -> None:
        """Give a session its parts of the sends so far, and tell it of those that are ready."""
        request, peer = session.request, session.key[0]
        served = {part.send for part in session.parts}
        for send in session.offer.sends.values():
            if send in served or not send.serves(session):
                continue
            first, last = max(send.first, request.first), min(send.last, request.last)
            if send.released:
                reason = f"the blocks of positions [{first}, {last}) were released already"
                return self._end_session(session, Outcome.FAILED, reason)
            try:
                wire = self._wire_of(peer, request, first, last)
                send.check(wire)
            except KvpackError as error:
                return self._end_session(session, Outcome.FAILED, str(error))
            session.parts.append(Part(send, first, last, wire))
        for part in session.parts:
            if not part.wanted and (part.send.ready or not part.wire.total_bytes):
                part.wanted = True
                self._post(Want, session.key, first=part.first, last=part.last, aux=part.send.aux)
        uncovered = session.uncovered()
        if session.offer.final and uncovered:
            self._end_session(session, Outcome.FAILED, uncovered)
        return None

    def _release(self, send: Send) -> None:
        """Release a send's blocks if nothing can be gathered from them any more."""
        if send.released or send.gathering or not (send.ended or send.gathered_for_all()):
            return
        send.released = True
        self._actions.append(SourceReleased(send.send_id))

    def _end_send(self, send: Send, outcome: Outcome, reason: str) -> None:
        send.ended = True
        del send.offer.sends[send.send_id], self._sends[send.send_id]
        self._actions.append(SendEnded(send.send_id, outcome, reason))
        for session in send.offer.live_sessions():
            if send.serves(session):
                self._end_session(session, outcome, reason)
        self._release(send)
        self._changed[send.offer.request_id] = send.offer

    def _end_session(
        self, session: Session, outcome: Outcome, reason: str, *, tell: bool = True
    ) -> None:
        if session.outcome is not None:
            return
        session.outcome, session.reason = outcome, reason
        session.grants.clear()
        self._turns.pop(session.key, None)
        self._pool.forget(session.key)
        if tell:
            self._post(Fail, session.key, outcome=outcome, reason=reason)
        self._changed[session.offer.request_id] = session.offer
        self._bury_if_idle(session)

    def _bury_if_idle(self, session: Session) -> None:
        if session.outcome is None or session.chunks:
            return
        del self._sessions[session.key]
        self._open[session.key[0]] -= 1
        ended = self._bury(session.key, session.outcome, session.reason)
        ended.grants = session.known_grants
        if session.owes_drained:
            self._answer(session.key, ended)

    def _bury(self, key: SessionKey, outcome: Outcome, reason: str) -> EndedAttempt:
        expires = self._watch(self._now + self._tombstone_s)
        return self._ended.add(key, EndedAttempt(outcome, reason, 0, expires))

    def _answer(self, key: SessionKey, ended: EndedAttempt) -> None:
        outcome, reason = ended.outcome, ended.reason
        if outcome is Outcome.DONE:
            outcome, reason = Outcome.CANCELLED, "the receiver said DONE"
        self._post(Drained, key, outcome=outcome, reason=reason, grants=ended.grants)

    # -- chunks -------------------------------------------------------------------------------

    def _cut_chunks(self) -> None:
        """Cut a chunk for each session in turn while there are grants and local slots."""
        cut = True
        while cut and self._turns and self._pool.largest_free():
            cut = False
            for session in list(self._turns.values()):
                grant = session.grants.get(session.next_grant)
                part = session.part_of(grant) if grant is not None else None
                if grant is None or part is None:
                    del self._turns[session.key]
                elif self._cut(session, part, grant):
                    self._turns[session.key] = self._turns.pop(session.key)
                    cut = True

    def _cut(self, session: Session, part: Part, grant: Grant) -> bool:
        """Cut the next chunk of a part for a grant; tell whether there were slots for it."""
        lease_bytes = grant.slots * self._peers.get(session.key[0]).slot_bytes
        left_bytes = part.uncut_bytes + part.cut_bytes % WIRE_ALIGNMENT
        piece = self._slots(min(part.wire.piece_bytes, left_bytes))
        want = self._slots(min(lease_bytes, left_bytes))
        want = min(want, largest_chunk_slots(self._pool.capacity))
        # With chunks under way it can wait for decent slots; with none it takes what there is.
        least = max(piece, want // 2) if session.chunks else piece
        if piece > self._pool.largest_possible():
            self._end_session(session, Outcome.FAILED, self._too_large(part.wire.piece_bytes))
            return False
        run = self._pool.take(want, least, session.key)
        if run is None:
            return False
        try:
            end = part.wire.cut(part.cut_bytes, min(lease_bytes, run.slots * self._slot_bytes))
        except KvpackError as error:
            self._pool.free(run)
            self._end_session(session, Outcome.FAILED, str(error))
            return False
        self._start(session, part, session.grants.pop(grant.number), run, end)
        return True

    def _start(
        self, session: Session, part: Part, grant: Grant, run: SlotRun, wire_last: int
    ) -> None:
        chunk = OutgoingChunk(
            self._next_chunk_id(),
            part.send.send_id,
            *session.key,
            number=grant.number,
            first=part.first,
            last=part.last,
            wire=part.wire,
            wire_first=part.cut_bytes,
            wire_last=wire_last,
            run=run,
            lease=SlotRun(grant.slot, grant.slots, grant.generation),
        )
        part.cut_bytes = wire_last
        part.send.gathering += 1
        session.next_grant += 1
        session.chunks += 1
        self._chunks[chunk.chunk_id] = InFlight(chunk, session, part.send)
        self._actions.append(Gather(chunk))

    def _land(self, flight: InFlight) -> None:
        del self._chunks[flight.chunk.chunk_id]
        self._pool.free(flight.chunk.run)
        flight.session.chunks -= 1
        self._bury_if_idle(flight.session)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every held slot belongs to exactly one chunk under way."""
        self._pool.check_integrity()
        counts = self._pool.counts()
        held = sum(flight.chunk.run.slots for flight in self._chunks.values())
        assert counts.owned == held, f"{counts.owned} send slots are held, chunks have {held}"
        chunks = Counter(flight.session.key for flight in self._chunks.values())
        for key, session in self._sessions.items():
            assert session.chunks == chunks[key], f"{key} counts {session.chunks} chunks"
            assert session.outcome is None or session.chunks, f"{key} ended and idle, not buried"
        assert sum(self._open.values()) == len(self._sessions), "open sessions are miscounted"
