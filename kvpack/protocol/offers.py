"""The sender's books: what was published under a request id, who asked for it, what has ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvpack.errors import BlockListError, ProtocolError
from kvpack.protocol.actions import CheckPart, OutgoingChunk, Wire
from kvpack.protocol.machine import SessionKey
from kvpack.protocol.messages import MAX_AUX_BYTES, MAX_NAME_CHARS, Grant, Outcome, Request


@dataclass(eq=False, slots=True)
class Send:
    """One published range of a request."""

    send_id: int
    offer: Offer
    first: int
    last: int
    to: tuple[str, ...] | None
    aux: bytes
    deadline: float
    check: CheckPart
    ready: bool = False
    ended: bool = False
    released: bool = False
    gathering: int = 0

    def serves(self, session: Session) -> bool:
        """Tell whether a session may have, and asks for, some of this range."""
        request = session.request
        visible = self.to is None or session.name in self.to
        return visible and self.first < request.last and request.first < self.last

    def receivers(self) -> dict[str, Session | None]:
        """Return each endpoint that must receive it, with its session if it has asked."""
        names = self.offer.receivers if self.to is None else self.to
        return {name: self.offer.sessions.get(name) for name in names}

    def gathered_for_all(self) -> bool:
        """Tell whether every receiver has asked, and has all it will get of these blocks."""
        receivers = self.receivers()
        return bool(receivers) and all(
            session is not None and (session.outcome is not None or session.has_all_of(self))
            for session in receivers.values()
        )

    def verdict(self) -> tuple[Outcome, str] | None:
        """Return how the send ends if every receiver has finished with it, else None."""
        ended = []
        for session in self.receivers().values():
            if session is None or session.outcome is None:
                return None
            ended.append((session.outcome, f"{session.name}: {session.reason}"))
        if not ended:
            return None
        return next((end for end in ended if end[0] is not Outcome.DONE), (Outcome.DONE, ""))

    def waits_for(self) -> str:
        """Say what a send that has not ended is waiting for."""
        receivers = self.receivers()
        waiting = [] if receivers else ["no receiver asked for it"]
        for name, session in receivers.items():
            if session is None:
                waiting.append(f"{name} did not ask for it")
            elif session.outcome is None:
                waiting.append(f"{name} did not say DONE")
        if not self.ready:
            waiting.append("its blocks never became ready")
        return "; ".join(waiting)


@dataclass(eq=False, slots=True)
class Part:
    """What one session gets of one send."""

    send: Send
    first: int
    last: int
    wire: Wire
    wanted: bool = False
    cut_bytes: int = 0

    @property
    def uncut_bytes(self) -> int:
        """Wire bytes that no chunk has taken yet."""
        return self.wire.total_bytes - self.cut_bytes


@dataclass(eq=False, slots=True)
class Session:
    """One receiver's attempt at one request."""

    key: SessionKey
    name: str
    offer: Offer
    request: Request
    deadline: float
    parts: list[Part] = field(default_factory=list)
    grants: dict[int, Grant] = field(default_factory=dict)
    next_grant: int = 1
    known_grants: int = 0
    chunks: int = 0
    outcome: Outcome | None = None
    reason: str = ""
    owes_drained: bool = False

    def part_of(self, grant: Grant) -> Part | None:
        """Return the part that a grant is for, if it was wanted and is not cut up yet."""
        for part in self.parts:
            if (part.first, part.last) == (grant.first, grant.last):
                return part if part.wanted and part.uncut_bytes else None
        return None

    def has_all_of(self, send: Send) -> bool:
        """Tell whether all of its part of a send has been cut into chunks."""
        return all(not part.uncut_bytes for part in self.parts if part.send is send)

    def waited_for(self) -> str:
        """Say what a session that timed out had waited for."""
        nothing = "" if self.parts else ": nothing was sent under that request id"
        return f"after {self.request.timeout_s} s{nothing}"

    def uncovered(self) -> str:
        """Say what of the request the sends so far leave out; empty if nothing."""
        gaps, end = [], self.request.first
        for first, last in sorted((part.first, part.last) for part in self.parts):
            if first > end:
                gaps.append((end, first))
            end = last
        if end < self.request.last:
            gaps.append((end, self.request.last))
        if not gaps:
            return ""
        missing = ", ".join(f"[{a}, {b})" for a, b in gaps)
        sends = [s for s in self.offer.sends.values() if s.to is None or self.name in s.to]
        ranges = ", ".join(f"[{a}, {b})" for a, b in sorted((s.first, s.last) for s in sends))
        return (
            f"positions [{self.request.first}, {self.request.last}) were asked for, but "
            f"{ranges or 'nothing'} is sent to {self.name} and {missing} is missing: ask for "
            "positions that are sent"
        )


@dataclass(eq=False, slots=True)
class Offer:
    """Everything about one request id: its live sends, and the latest session of each receiver."""

    request_id: str
    sends: dict[int, Send] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    receivers: dict[str, None] = field(default_factory=dict)
    final: bool = False
    expires: float = -math.inf

    def live_sessions(self) -> Iterator[Session]:
        """Return the sessions that have not ended."""
        return (s for s in list(self.sessions.values()) if s.outcome is None)

    def check_new(self, first: int, last: int, to: tuple[str, ...] | None, aux: bytes) -> None:
        """Check what is to be published beside the live sends.

        Raises
        ------
        BlockListError
            If the range is empty or overlaps a live send, or nobody is to have it.
        ProtocolError
            If the id or `aux` is too long.
        """
        what = f"request {self.request_id!r}"
        if not 1 <= len(self.request_id) <= MAX_NAME_CHARS:
            raise ProtocolError(f"{what}: an id has 1 to {MAX_NAME_CHARS} characters")
        if not 0 <= first < last:
            raise BlockListError(f"{what}: positions [{first}, {last}) are empty or negative")
        if to is not None and not to:
            raise BlockListError(f"{what}: `to` names nobody; None is for whoever asks")
        for other in self.sends.values():
            if first < other.last and other.first < last:
                raise BlockListError(
                    f"{what}: positions [{first}, {last}) overlap the send of "
                    f"[{other.first}, {other.last}) in flight; send each position once"
                )
        if len(aux) > MAX_AUX_BYTES:
            raise ProtocolError(
                f"{what}: aux takes {len(aux)} bytes, {MAX_AUX_BYTES} are allowed; it is meant for "
                "a token and some counts"
            )


@dataclass(slots=True)
class InFlight:
    """A chunk between its gather's launch and its write's end."""

    chunk: OutgoingChunk
    session: Session
    send: Send
    writing: bool = False


@dataclass(slots=True)
class EndedAttempt:
    """What is remembered of an ended session, to answer late messages."""

    outcome: Outcome
    reason: str
    grants: int
    expires: float


class EndedAttempts:
    """A memory of ended sessions, bounded in number and time.

    Whatever it forgets raises its peer's floor: attempts up to the floor count as ended for good.

    Parameters
    ----------
    max_attempts : int
        How many are remembered.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._attempts: dict[SessionKey, EndedAttempt] = {}
        self._floors: dict[str, int] = {}

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._attempts or key[2] <= self._floors.get(key[0], 0)

    @property
    def next_expiry(self) -> float:
        """When the oldest may be forgotten; infinite if there is none."""
        oldest = next(iter(self._attempts.values()), None)
        return math.inf if oldest is None else oldest.expires

    def get(self, key: SessionKey) -> EndedAttempt | None:
        """Return what is remembered of a session."""
        return self._attempts.get(key)

    def add(self, key: SessionKey, attempt: EndedAttempt) -> EndedAttempt:
        """Remember an ended session; those added later expire no sooner."""
        self._attempts[key] = attempt
        if len(self._attempts) > self._max_attempts:
            self._forget(next(iter(self._attempts)))
        return attempt

    def expire(self, now: float) -> None:
        """Forget what is past its time."""
        while self.next_expiry <= now:
            self._forget(next(iter(self._attempts)))

    def forget_peer(self, peer: str) -> None:
        """Forget a peer from which nothing will ever arrive again, with its floor."""
        self._attempts = {k: a for k, a in self._attempts.items() if k[0] != peer}
        self._floors.pop(peer, None)

    def _forget(self, key: SessionKey) -> None:
        del self._attempts[key]
        self._floors[key[0]] = max(self._floors.get(key[0], 0), key[2])
