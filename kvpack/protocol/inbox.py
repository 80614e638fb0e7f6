"""The receiver's books: what a receive asks of each sender, and what has come of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvpack.protocol.actions import WIRE_ALIGNMENT, IncomingChunk, Wire
from kvpack.protocol.machine import SessionKey
from kvpack.protocol.messages import LaneSelection, Outcome, Request
from kvpack.protocol.pool import SlotRun


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One sender of a receive.

    Attributes
    ----------
    peer : str
        Key of the connected peer.
    selection : tuple of LaneSelection or None
        The lanes it was elected for; None is everything the plan has, empty is nothing.
    """

    peer: str
    selection: tuple[LaneSelection, ...] | None = None


@dataclass(eq=False, slots=True)
class Lease:
    """Receive slots granted to one sender for one chunk of a part."""

    run: SlotRun
    part: Part
    landed: bool = False


@dataclass(eq=False, slots=True)
class Part:
    """One range of positions that a sender has said can be gathered."""

    first: int
    last: int
    wire: Wire
    aux: bytes
    landed: list[tuple[int, int]] = field(default_factory=list)
    landed_bytes: int = 0
    open_slots: int = 0

    @property
    def least_bytes(self) -> int:
        """Staging bytes that any lease for it must have."""
        return min(self.wire.piece_bytes, self.wire.total_bytes + WIRE_ALIGNMENT - 1)

    def hungry_bytes(self, slot_bytes: int) -> int:
        """Wire bytes to come that its open leases cannot hold, 0 or less if they can."""
        return self.wire.total_bytes - self.landed_bytes - self.open_slots * slot_bytes

    def land(self, first: int, last: int) -> bool:
        """Take note of landed wire bytes; False, and no note, if they are outside or not new."""
        index = bisect_left(self.landed, (first, last))
        start, end = first, last
        if index < len(self.landed):
            if self.landed[index][0] < last:
                return False
            if self.landed[index][0] == last:
                end = self.landed[index][1]
        if index:
            if self.landed[index - 1][1] > first:
                return False
            if self.landed[index - 1][1] == first:
                start = self.landed[index - 1][0]
        if last > self.wire.total_bytes:
            return False
        low = index - (start != first)
        self.landed[low : index + (end != last)] = [(start, end)]
        self.landed_bytes += last - first
        return True


@dataclass(eq=False, slots=True)
class Source:
    """One sender's share in a receive: its parts, and the leases it holds or may still write to."""

    key: SessionKey
    name: str
    receive: Receive
    request: Request
    max_slots: int
    parts: dict[tuple[int, int], Part] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    issued: int = 0
    open_slots: int = 0
    wanted_bytes: int = 0
    scattered_bytes: int = 0
    doubted_since: float = 0.0
    retired: bool = False

    @property
    def covered(self) -> int:
        """Positions of the parts so far."""
        return sum(part.last - part.first for part in self.parts.values())

    @property
    def complete(self) -> bool:
        """Whether its parts make up the request and each wire byte of them has been scattered."""
        everything = self.covered == self.request.last - self.request.first
        return everything and self.scattered_bytes == self.wanted_bytes

    def hungry_part(self, slot_bytes: int) -> Part | None:
        """Return a part that could use one more lease."""
        hungry = (part for part in self.parts.values() if part.hungry_bytes(slot_bytes) > 0)
        return next(hungry, None)

    def accepts(self, first: int, last: int) -> bool:
        """Tell whether a new part lies within the request and overlaps no other."""
        inside = self.request.first <= first and last <= self.request.last
        return inside and not any(p.first < last and first < p.last for p in self.parts.values())

    def progress(self) -> str:
        """Say how far it came."""
        return (
            f"{self.name} made {self.covered} of {self.request.last - self.request.first} "
            f"positions available; {self.scattered_bytes} of their {self.wanted_bytes} bytes "
            "were scattered"
        )


@dataclass(eq=False, slots=True)
class Receive:
    """One request that this endpoint asked for."""

    receive_id: int
    request_id: str
    attempt: int
    deadline: float
    sources: dict[str, Source] = field(default_factory=dict)
    ready: bool = False
    scattering: int = 0
    outcome: Outcome | None = None

    def aux(self) -> Mapping[str, tuple[bytes, ...]]:
        """Return what each peer's sends carried, in order of their positions."""
        return {
            peer: tuple(part.aux for _, part in sorted(source.parts.items()))
            for peer, source in self.sources.items()
        }


@dataclass(frozen=True, slots=True)
class Scattering:
    """A chunk between its landing and its scatter's end."""

    chunk: IncomingChunk
    source: Source
    part: Part
